"""The networks against closed formulas, arithmetic by hand and torchvision; and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from lablib import MLP, ResidualCNN, ResidualMLP, SimpleCNN
from lablib.models import PlainBlock


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_an_mlp_computes_linear_relu_and_so_on_and_has_no_other_weights():
    model, images = MLP((5, 3), image_shape=(2, 3, 3), num_classes=4).eval(), torch.rand(7, 2, 3, 3)
    assert count(model) == 19 * 5 + 6 * 3 + 4 * 4
    x = images.reshape(7, 18)
    for layer in (model.hidden[0], model.hidden[3]):
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(model(images), x @ model.classifier.weight.T + model.classifier.bias)


def test_hes_initialisation_has_his_spread_and_no_biases():
    model = MLP((400, 300), initialisation="he")
    for layer in (module for module in model.modules() if isinstance(module, nn.Linear)):
        assert layer.weight.std().item() == pytest.approx((2 / layer.in_features) ** 0.5, rel=0.05)
        assert layer.bias.abs().max() == 0
    with pytest.raises(ValueError, match="initialisation = 'xavier', but it must be None or \"he\""):
        MLP(initialisation="xavier")


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_residual_mlp_computes_a_relu_of_f_plus_the_shortcut(shortcut):
    model = ResidualMLP((4, 4), image_shape=(1, 2, 3), num_classes=3, shortcut=shortcut).eval()
    assert count(model) == 7 * 4 + 5 * 4 + (6 * 4 if shortcut else 0) + 5 * 4 + 5 * 4 + 5 * 3
    images = torch.rand(5, 1, 2, 3)
    x = images.reshape(5, 6)
    for block in model.blocks:
        first, last = (module for module in block.residual if isinstance(module, nn.Linear))
        branch = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
        skip = x @ block.projection.weight.T if x.shape[1] != 4 and shortcut else x if shortcut else 0
        x = (branch + skip).clamp(min=0)
    torch.testing.assert_close(model(images), x @ model.classifier.weight.T + model.classifier.bias)


def test_cnns_have_the_parameters_of_the_exercise_and_of_the_formula():
    assert (count(ResidualCNN(2, width=16)), count(ResidualCNN(4, width=16))) == (165_914, 2_793_114)
    stem, first, second = (9 * i * o + 2 * o for i, o in ((2, 8), (8, 16), (16, 32)))
    assert count(SimpleCNN(2, 8, (2, 16, 16), 7)) == stem + first + second + 33 * 7


def test_a_stage_computes_what_torchvisions_resnet_layer_computes_with_the_same_weights():
    torchvisions = ResNet(BasicBlock, [2, 2, 2, 2]).layer2.train()  # 64 to 128 channels, stride 2
    ours = ResidualCNN(2, width=32).stages[1].train()
    ours.load_state_dict(torchvisions.state_dict())
    images = torch.randn(4, 64, 9, 7)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(images), torchvisions.train(mode)(images))


@pytest.mark.parametrize("network", [SimpleCNN, ResidualCNN])
@pytest.mark.parametrize(("depth", "shape", "classes"), [(1, (1, 2, 2), 2), (2, (3, 5, 9), 10), (4, (2, 16, 16), 3)])
def test_each_stage_halves_the_resolution_and_doubles_the_channels_down_to_the_smallest(network, depth, shape, classes):
    model, images = network(depth, 4, shape, classes).eval(), torch.rand(2, *shape)
    features = model.stages(model.stem(images))
    assert features.shape == (2, 4 * 2**depth, *(-(-side // 2**depth) for side in shape[1:]))
    averages = features.flatten(2).sum(2) / features[0, 0].numel()
    torch.testing.assert_close(model(images), averages @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize("value", [{"hidden_sizes": np.array([8])}, {"dropout": np.float32(0.5)}])
def test_what_would_not_be_saved_is_refused(value):
    with pytest.raises(TypeError, match="not JSON serializable"):
        ResidualMLP(**value)


def test_without_shortcuts_the_convolutions_stay_and_nothing_is_added():
    plain, residual = ResidualCNN(2, 8, shortcut=False), ResidualCNN(2, 8)
    kept = {n: p.shape for n, p in residual.state_dict().items() if "downsample" not in n}
    assert {n: p.shape for n, p in plain.state_dict().items()} == kept
    block, images = PlainBlock(4, 4), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.bn2.weight)
    assert block(images).abs().max() == 0


SAVED = {
    "MLP": lambda: MLP((7, 5), 0.2, (3, 32, 32), 3),
    "ResidualMLP": lambda: ResidualMLP((7, 5), 0.2, (3, 32, 32), 3),
    "SimpleCNN": lambda: SimpleCNN(2, 4, num_classes=3),
    "ResidualCNN without shortcuts": lambda: ResidualCNN(1, 6, num_classes=3, shortcut=False),
}


@pytest.mark.parametrize("network", SAVED.values(), ids=SAVED)
def test_a_saved_network_comes_back_with_its_arguments_and_the_same_logits(network, tmp_path):
    model, images = network(), torch.randn(8, 3, 32, 32)
    model(images)  # which changes the statistics of batch norms
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert str(loaded) == str(model)


def test_the_weights_of_another_network_are_refused(tmp_path):
    MLP((8, 8)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="Missing key"):
        ResidualMLP.from_pretrained(tmp_path)
