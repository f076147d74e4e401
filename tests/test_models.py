"""The networks: sizes, shortcuts, and what they refuse."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from lablib import MLP, ResidualBlock, ResidualMLP

NETWORKS = (MLP, ResidualMLP)
SHAPES = [((1, 28, 28), 10), ((3, 5, 9), 4), ((1, 1, 1), 2)]
SIZES = [(8,), (128, 64), (16, 16, 16), (5, 7, 7, 3)]


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("image_shape", "num_classes"), SHAPES)
@pytest.mark.parametrize("hidden_sizes", SIZES)
def test_an_mlp_has_the_parameters_of_the_closed_formula(hidden_sizes, image_shape, num_classes):
    widths = [math.prod(image_shape), *hidden_sizes, num_classes]
    expected = sum((i + 1) * o for i, o in pairwise(widths))
    assert count(MLP(hidden_sizes, image_shape=image_shape, num_classes=num_classes)) == expected


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize(("image_shape", "num_classes"), SHAPES)
@pytest.mark.parametrize("hidden_sizes", SIZES)
def test_a_residual_mlp_has_the_parameters_of_the_closed_formula(hidden_sizes, image_shape, num_classes, shortcut):
    widths = [math.prod(image_shape), *hidden_sizes]
    expected = (widths[-1] + 1) * num_classes
    for i, o in pairwise(widths):
        expected += (i + 1) * o + (o + 1) * o + (i * o if shortcut and i != o else 0)
    model = ResidualMLP(hidden_sizes, image_shape=image_shape, num_classes=num_classes, shortcut=shortcut)
    assert count(model) == expected


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("image_shape", "num_classes"), SHAPES)
def test_a_network_takes_any_image_size_and_gives_a_logit_for_each_class(network, image_shape, num_classes):
    model = network((6, 4), image_shape=image_shape, num_classes=num_classes).eval()
    logits = model(torch.rand(5, *image_shape))
    assert logits.shape == (5, num_classes)
    # no softmax in the network: logits are not all positive with a sum of 1
    assert not torch.allclose(logits.sum(1), torch.ones(5))


@pytest.mark.parametrize("network", NETWORKS)
def test_an_image_has_the_same_logits_in_a_batch_and_alone(network):
    model, images = network((8, 8), image_shape=(1, 6, 6), num_classes=3).eval(), torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(model(images)[2:3], model(images[2:3]))


@pytest.mark.parametrize("network", NETWORKS)
def test_dropout_acts_in_training_only(network):
    model, images = network((64, 64), dropout=0.5, image_shape=(1, 6, 6)), torch.rand(4, 1, 6, 6)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_an_mlp_computes_linear_relu_linear():
    model, images = MLP((5,), image_shape=(2, 3, 3), num_classes=4).eval(), torch.rand(7, 2, 3, 3)
    hidden, classifier = model.hidden[0], model.classifier
    expected = (images.reshape(7, 18) @ hidden.weight.T + hidden.bias).clamp(min=0) @ classifier.weight.T
    torch.testing.assert_close(model(images), expected + classifier.bias)


@pytest.mark.parametrize("shortcut", [True, False])
def test_a_residual_mlp_computes_a_relu_of_f_plus_the_shortcut(shortcut):
    model = ResidualMLP((4, 4), image_shape=(1, 2, 3), num_classes=3, shortcut=shortcut).eval()
    x = images = torch.rand(5, 1, 2, 3)
    x = x.reshape(5, 6)
    for block in model.blocks:
        first, last = (module for module in block.residual if isinstance(module, nn.Linear))
        branch = (x @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
        skip = x @ block.projection.weight.T if x.shape[1] != 4 and shortcut else x if shortcut else 0
        x = (branch + skip).clamp(min=0)
    torch.testing.assert_close(model(images), x @ model.classifier.weight.T + model.classifier.bias)


def silence(block: ResidualBlock):
    """Make F = 0."""
    nn.init.zeros_(block.residual[-1].weight)
    nn.init.zeros_(block.residual[-1].bias)


@pytest.mark.parametrize("training", [True, False])
def test_with_f_equal_to_0_a_residual_block_is_the_identity(training):
    block, x = ResidualBlock(6, 6).train(training), torch.randn(5, 6)
    assert not torch.equal(block(x), x)
    silence(block)
    assert torch.equal(block(x), x)


def test_with_f_equal_to_0_a_widening_block_is_its_projection():
    block, x = ResidualBlock(6, 9).eval(), torch.randn(5, 6)
    silence(block)
    torch.testing.assert_close(block(x), x @ block.projection.weight.T)


def test_only_a_change_of_width_is_projected_and_without_bias():
    projections = [block.projection for block in ResidualMLP((8, 8, 4), image_shape=(1, 2, 4)).blocks]
    assert [type(projection) for projection in projections] == [nn.Identity, nn.Identity, nn.Linear]
    assert projections[2].weight.shape == (4, 8)
    assert projections[2].bias is None


def test_without_shortcut_a_block_with_f_equal_to_0_gives_0():
    for widths in ((6, 6), (6, 9)):
        block = ResidualBlock(*widths, shortcut=False)
        assert isinstance(block.projection, nn.Identity)
        silence(block)
        assert block(torch.randn(5, 6)).abs().max() == 0


def test_shortcuts_cost_nothing_where_all_widths_are_equal():
    with_shortcuts, without = (ResidualMLP((36, 36), image_shape=(1, 6, 6), shortcut=s) for s in (True, False))
    assert count(with_shortcuts) == count(without)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sizes", [(), (0,), (8, -1), (8.0,), ("8",), "8", (True,), (None,)])
def test_hidden_sizes_that_are_no_positive_whole_numbers_are_refused(network, sizes):
    with pytest.raises(ValueError, match=", but it must be one or more whole numbers above 0") as caught:
        network(sizes)
    assert f"hidden_sizes = {sizes!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("network", "options"), [(MLP, {}), (ResidualMLP, {}), (ResidualMLP, {"shortcut": False, "dropout": 0.3})]
)
def test_a_saved_model_comes_back_with_the_same_outputs(tmp_path, network, options):
    model = network((7, 5), image_shape=(3, 4, 6), num_classes=4, **options).eval()
    model.save_pretrained(tmp_path)
    loaded = network.from_pretrained(tmp_path)
    images = torch.rand(5, 3, 4, 6)
    assert torch.equal(loaded.eval()(images), model(images))
    assert str(loaded) == str(model)
