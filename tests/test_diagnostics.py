"""What is measured on a model, against plain PyTorch, torchmetrics and formulas."""

import copy

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lablib import MLP, ResidualCNN, ResidualMLP
from lablib.diagnostics import expected_calibration_error, gradient_norms, multiply_adds


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 1, 4, 4, generator=generator), torch.arange(9) % 3


def build(network, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network(image_shape=(1, 4, 4), num_classes=3, **options)


def test_gradient_norms_are_those_of_backward_in_plain_pytorch(batch):
    model = build(MLP, hidden_sizes=(6, 5), dropout=0.5)
    with torch.no_grad():
        table = gradient_norms(model, batch)
    first, second, last = (
        (layer.weight.detach().clone().requires_grad_(), layer.bias.detach())
        for layer in (model.hidden[0], model.hidden[3], model.classifier)
    )
    x, labels = batch[0].reshape(9, 16), batch[1]
    for weight, bias in (first, second):
        x = (x @ weight.T + bias).clamp(min=0)
    logits = x @ last[0].T + last[1]
    (logits.logsumexp(1) - logits[torch.arange(9), labels]).mean().backward()
    expected = np.array([weight.grad.pow(2).sum().sqrt().item() for weight, _ in (first, second, last)])
    np.testing.assert_allclose(table["rms"], expected / np.sqrt([96, 30, 15]), rtol=1e-5)
    assert table.set_index("layer")["name"].to_dict() == {1: "hidden.0", 2: "hidden.3", 3: "classifier"}


def test_a_normalised_weight_has_the_gradient_of_the_plain_weight_that_it_stands_for(batch):
    first, last, plain = nn.Linear(16, 5), nn.Linear(5, 3), nn.Linear(16, 5)
    normalised = nn.utils.parametrizations.weight_norm(first)
    plain.load_state_dict({"weight": normalised.weight, "bias": normalised.bias})
    one, other = (gradient_norms(nn.Sequential(nn.Flatten(), of, nn.ReLU(), last), batch) for of in (normalised, plain))
    np.testing.assert_allclose(one["rms"], other["rms"], rtol=1e-5)


def test_layers_are_in_the_order_of_their_calls_and_a_shortcuts_projection_is_none(batch):
    class LastFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.last, self.projection = nn.Linear(2, 2), nn.Linear(3, 3), nn.Conv2d(1, 3, 4)
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, images):
            return self.last(self.frozen(self.projection(images.mul_(2)).flatten(1)))

    names = gradient_norms(build(ResidualMLP, hidden_sizes=(6, 6, 5)), batch)["name"].tolist()
    assert names == [f"blocks.{block}.residual.{layer}" for block in range(3) for layer in (0, 3)] + ["classifier"]
    before = batch[0].clone()
    assert gradient_norms(LastFirst(), batch)["name"].tolist() == ["projection", "last"]
    assert torch.equal(batch[0], before)


@pytest.mark.parametrize(
    "look", [gradient_norms, lambda model, batch: multiply_adds(model, (1, 4, 4))], ids=["gradients", "multiply-adds"]
)
def test_a_model_stays_as_it_was(batch, look):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 3)).train()
    model[3].eval()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    before = copy.deepcopy(model)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    look(model, batch)
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert all(map(torch.equal, (parameter.grad for parameter in model.parameters()), gradients))
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert not model[4]._forward_pre_hooks


def test_the_calibration_error_agrees_with_torchmetrics():
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(200, 5, generator=generator).softmax(1)
    labels = torch.randint(0, 5, (200,), generator=generator)
    theirs = torchmetrics.functional.calibration_error(probabilities, labels, "multiclass", n_bins=15, num_classes=5)
    confidence, predicted = probabilities.max(1)
    assert expected_calibration_error(confidence, predicted == labels) == pytest.approx(theirs.item(), abs=1e-5)


def test_multiply_adds_are_those_of_a_count_by_hooks():
    assert multiply_adds(MLP((128, 64)), (1, 28, 28)) == 784 * 128 + 128 * 64 + 64 * 10
    model, counted = ResidualCNN(2, 8).eval(), []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _, output: counted.append(m.weight[0].numel() * output.numel()))
    model(torch.zeros(1, 3, 32, 32))
    assert sum(counted) == multiply_adds(model, (3, 32, 32))
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)  # on 3 tokens: projections, attention, MLP
    assert (
        multiply_adds(nn.Sequential(nn.Flatten(1, 2), layer), (1, 3, 16)) == 3 * 16 * 64 + 2 * 9 * 16 + 2 * 3 * 16 * 32
    )
