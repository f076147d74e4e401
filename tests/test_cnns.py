from itertools import pairwise

import pytest
import torch
from torchvision.models.resnet import BasicBlock, ResNet

from lablib.models import PlainBlock, ResidualCNN, SimpleCNN


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_residual_cnns_have_the_published_parameter_counts_and_their_ratio():
    small, large = parameters(ResidualCNN(2, width=16)), parameters(ResidualCNN(4, width=16))
    assert (small, large) == (165_914, 2_793_114)
    assert round(100 * small / large, 2) == 5.94


@pytest.mark.parametrize(("depth", "width", "channels", "classes"), [(1, 4, 1, 2), (2, 16, 3, 10), (3, 8, 2, 7)])
def test_a_simple_cnn_has_the_parameters_of_the_formula(depth, width, channels, classes):
    wide = [width * 2**stage for stage in range(depth + 1)]
    convolutions = 9 * channels * width + sum(9 * i * o for i, o in pairwise(wide))
    expected = convolutions + 2 * sum(wide) + (wide[-1] + 1) * classes
    assert parameters(SimpleCNN(depth, width, (channels, 16, 16), classes)) == expected


def test_a_stage_computes_what_torchvisions_resnet_layer_computes_with_the_same_weights():
    torchvisions = ResNet(BasicBlock, [2, 2, 2, 2]).layer2.train()  # 64 to 128 channels, stride 2
    ours = ResidualCNN(2, width=32).stages[1].train()
    ours.load_state_dict(torchvisions.state_dict())
    images = torch.randn(4, 64, 9, 7, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(images), torchvisions.train(mode)(images))


@pytest.mark.parametrize("network", [SimpleCNN, ResidualCNN])
@pytest.mark.parametrize(
    ("depth", "shape", "classes"), [(1, (1, 2, 2), 2), (2, (3, 5, 9), 10), (4, (2, 16, 16), 3), (3, (3, 32, 32), 100)]
)
def test_any_image_size_down_to_the_smallest_gives_one_logit_a_class(network, depth, shape, classes):
    logits = network(depth, 4, shape, classes).eval()(torch.zeros(2, *shape))
    assert logits.shape == (2, classes)


@pytest.mark.parametrize("network", [SimpleCNN, ResidualCNN])
def test_smaller_images_are_refused_with_the_smallest_size(network):
    with pytest.raises(ValueError, match=r"7 × 32 pixels are too small for depth 3.* smallest are 8 × 8"):
        network(3, 4, (3, 7, 32))
    with pytest.raises(ValueError, match=r"smallest are 8 × 8"):
        network(3, 4)(torch.zeros(1, 3, 32, 7))


@pytest.mark.parametrize("network", [SimpleCNN, ResidualCNN])
@pytest.mark.parametrize("bad", [{"depth": 0}, {"depth": True}, {"depth": 2.0}, {"depth": 1, "width": -1}])
def test_a_depth_or_width_that_is_no_number_above_0_is_refused(network, bad):
    with pytest.raises(ValueError, match=f"{list(bad)[-1]} = .*, but it must be a whole number above 0"):
        network(**bad)


@pytest.mark.parametrize("depth", [2, 3])
def test_each_block_halves_the_resolution_and_doubles_the_channels(depth):
    for network in (SimpleCNN(depth, 4), ResidualCNN(depth, 4)):
        x = network.stem(torch.zeros(1, 3, 32, 32))
        assert x.shape == (1, 4, 32, 32)
        for stage in network.stages:
            before, x = x, stage(x)
            assert x.shape[1] == 2 * before.shape[1]
            assert x.shape[2] == before.shape[2] / 2


def test_without_shortcuts_the_convolutions_stay_and_nothing_is_added():
    plain, residual = ResidualCNN(2, 8, shortcut=False), ResidualCNN(2, 8)
    kept = {n: p.shape for n, p in residual.state_dict().items() if "downsample" not in n}
    assert {n: p.shape for n, p in plain.state_dict().items()} == kept
    block = PlainBlock(4, 4)
    torch.nn.init.zeros_(block.bn2.weight)
    images = torch.randn(2, 4, 6, 6)
    assert block(images).abs().max() == 0
    assert BasicBlock(4, 4).eval()(images).abs().max() > 0


@pytest.mark.parametrize("network", [SimpleCNN, ResidualCNN])
def test_a_cnn_is_saved_and_loaded_with_its_arguments(network, tmp_path):
    model = network(2, 4, (1, 8, 8), 3).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(network.from_pretrained(tmp_path).eval()(images), model(images))
