"""Gradients by layer and predictions, against plain PyTorch."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import nn

from lablib import MLP, ResidualMLP
from lablib.diagnostics import gradient_norms, mean_angle, predict


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(9, 1, 4, 4, generator=generator), torch.arange(9) % 3


def build(network, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network(image_shape=(1, 4, 4), num_classes=3, **options)


def state(model):
    parameters = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    return parameters, {name: module.training for name, module in model.named_modules()}


def test_gradient_norms_are_those_of_backward_in_plain_pytorch(batch):
    model = build(MLP, hidden_sizes=(6, 5), dropout=0.5)
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
    expected = [weight.grad.pow(2).sum().sqrt().item() for weight, _ in (first, second, last)]
    assert table["norm"].tolist() == pytest.approx(expected, rel=1e-5)
    assert table["rms"].tolist() == pytest.approx(
        [norm / size**0.5 for norm, size in zip(expected, (96, 30, 15), strict=True)], rel=1e-5
    )
    assert table["layer"].tolist() == [1, 2, 3]
    assert table["name"].tolist() == ["hidden.0", "hidden.3", "classifier"]


def test_a_projection_is_no_layer_on_the_way(batch):
    model = build(ResidualMLP, hidden_sizes=(6, 6, 5))
    names = gradient_norms(model, batch)["name"].tolist()
    assert names == [f"blocks.{block}.residual.{layer}" for block in range(3) for layer in (0, 3)] + ["classifier"]


def test_convolutions_are_layers_and_one_that_is_not_used_has_no_gradient(batch):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)
            self.convolution = nn.Conv2d(1, 3, 4)

        def forward(self, images):
            return self.convolution(images).flatten(1)

    table = gradient_norms(Network(), batch)
    assert table["name"].tolist() == ["unused", "convolution"]
    assert table.loc[0, "norm"] == 0
    assert table.loc[1, "norm"] > 0


@pytest.mark.parametrize("training", [True, False])
def test_gradient_norms_leave_mode_weights_and_gradients_as_they_were(batch, training):
    model = build(MLP, hidden_sizes=(6, 5), dropout=0.5).train(training)
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    first = gradient_norms(model, batch)
    assert model.training is training
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    # the loss is without dropout, so that nothing is drawn
    assert first.equals(gradient_norms(model, batch))


@pytest.mark.parametrize("look", [lambda model, batch: gradient_norms(model, batch), lambda m, b: predict(m, b[0])])
def test_a_part_that_is_frozen_in_eval_mode_stays_so(batch, look):
    model = build(MLP, hidden_sizes=(6, 5)).train()
    model.hidden[2].eval()
    parameters, modes = state(model)
    look(model, batch)
    assert state(model)[1] == modes
    assert all(p.grad is None and torch.equal(p, parameters[name][0]) for name, p in model.named_parameters())


def test_running_statistics_stay_as_they_were(batch):
    model = nn.Sequential(nn.Conv2d(1, 3, 4), nn.BatchNorm2d(3), nn.Flatten()).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradient_norms(model, batch)
    predict(model, batch[0])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_gradient_norms_are_found_under_no_grad_too(batch):
    model = build(MLP, hidden_sizes=(6,))
    with torch.no_grad():
        table = gradient_norms(model, batch)
    assert table.equals(gradient_norms(model, batch))


def test_the_mode_comes_back_when_the_model_fails(batch):
    model = build(MLP, hidden_sizes=(6,)).train()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient_norms(model, (torch.rand(2, 1, 5, 5), torch.tensor([0, 1])))
    assert model.training


def test_a_model_without_layers_is_refused_by_its_name(batch):
    with pytest.raises(ValueError, match="Flatten has no linear or convolutional layer to take gradients of"):
        gradient_norms(nn.Flatten(), batch)


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_predict_is_the_softmax_of_the_logits_without_dropout(batch, batch_size):
    model = build(MLP, hidden_sizes=(6, 5), dropout=0.5).train()
    probabilities = predict(model, batch[0], batch_size)
    assert model.training
    exponentials = model.eval()(batch[0]).detach().double().exp()
    expected = exponentials / exponentials.sum(1, keepdim=True)
    torch.testing.assert_close(probabilities.double(), expected, atol=1e-6, rtol=0)
    assert not probabilities.requires_grad


@pytest.mark.parametrize("network", [MLP, ResidualMLP])
def test_the_mean_angle_is_scipys_between_the_features_before_the_last_linear_layer(batch, network):
    model = build(network, hidden_sizes=(6, 5), dropout=0.5).train()
    features = {}
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: features.update(last=inputs[0].detach()))
    model.eval()(batch[0])
    hook.remove()
    expected = np.degrees(np.arccos(1 - pdist(features["last"].double().numpy(), "cosine"))).mean()
    assert mean_angle(model.train(), batch[0]) == pytest.approx(expected, rel=1e-4)


def test_the_mean_angle_leaves_a_model_as_it_was(batch):
    model = build(MLP, hidden_sizes=(6, 5), dropout=0.5).train()
    model.hidden[2].eval()
    model.kept = model(batch[0])  # with its history, so that PyTorch does not copy the model
    parameters, modes = state(model)
    mean_angle(model, batch[0])
    assert state(model)[1] == modes
    assert all(torch.equal(p, parameters[name][0]) for name, p in model.named_parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not model.classifier._forward_pre_hooks


def test_images_that_look_the_same_have_an_angle_of_0_and_tiny_angles_are_not_lost():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    images = torch.tensor([[1.0, 0.0], [1.0, 1e-6]]).view(2, 1, 1, 2)
    assert mean_angle(model, images) == pytest.approx(np.degrees(1e-6), rel=1e-3)
    assert mean_angle(model, images[:1].expand(3, -1, -1, -1)) == 0
    right = torch.tensor([[1.0, 0.0], [0.0, 5.0]]).view(2, 1, 1, 2)
    assert mean_angle(model, right) == pytest.approx(90)


def test_an_angle_needs_two_images_and_a_linear_layer(batch):
    with pytest.raises(ValueError, match="an angle needs a linear layer and two images; there are 0 and 9"):
        mean_angle(nn.Flatten(), batch[0])
    with pytest.raises(ValueError, match="there are 2 and 1"):
        mean_angle(build(MLP, hidden_sizes=(6,)), batch[0][:1])
