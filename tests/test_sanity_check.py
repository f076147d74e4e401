"""What would fail in a training fails before it, in words about what the user wrote, and the check leaves no trace."""

import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lablib import MLP, ResidualCNN, StreamlinedTrainer, TrainingConfig
from lablib.metrics import history
from lablib.trainer import SanityCheckError, sanity_check


def train(model, data, trainer_class=StreamlinedTrainer, **knobs) -> StreamlinedTrainer:
    plain = {"num_epochs": 2, "batch_size": 9, "validation_split": 0.25, "device": "cpu", "precision": "fp32"}
    trainer = trainer_class(model, TrainingConfig(**plain | knobs), data)
    trainer.train()
    return trainer


def refused(model, data, trainer_class=StreamlinedTrainer, **knobs) -> str:
    """The error's words; no step has been taken and the weights are the initial ones."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steps = []

    class Noting(trainer_class):
        def training_step(self, *args, **kwargs):
            steps.append(1)
            return super().training_step(*args, **kwargs)

    with pytest.raises(SanityCheckError) as caught:
        train(model, data, Noting, **knobs)
    assert not steps
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return str(caught.value)


def linear(outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, outputs))


class Linear(nn.Module):
    """What the networks below have in common."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, images):
        return self.linear(images.flatten(1))


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


# What is refused


@pytest.mark.parametrize("outputs", [2, 10])
def test_another_number_of_outputs_than_classes_is_named(outputs, tiny_data):
    words = refused(linear(outputs), tiny_data)
    assert f"the network has {outputs} outputs, but tiny has 3 classes" in words


@pytest.mark.parametrize("batch_size", [13, 26])  # of 27 images
def test_a_last_batch_that_fails_is_refused(batch_size, tiny_data):
    words = refused(batch_normed(), tiny_data, batch_size=batch_size)
    assert words.startswith(
        "the last batch of an epoch (1 of 27 images) fails with ValueError: Expected more than 1 val"
    )
    assert "Sequential was given float32 (1, 1, 6, 6)" in words
    assert words.endswith(". Choose a batch_size that leaves a larger last batch")


def test_a_network_for_other_images_is_shown_what_it_was_given(tiny_data):
    words = refused(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), tiny_data)
    assert "Sequential was given float32 (9, 1, 6, 6)" in words
    assert "mat1 and mat2 shapes cannot be multiplied (9x36 and 64x3)" in words


class Auxiliary(Linear):
    """As GoogLeNet: a second classifier in training."""

    def forward(self, images):
        logits = super().forward(images)
        return (logits, 0.5 * logits) if self.training else logits


class WithAuxiliaryLoss(StreamlinedTrainer):
    def losses(self, outputs, labels):
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        return {"loss": sum(F.cross_entropy(logits, labels) for logits in several)}


def test_a_network_with_an_auxiliary_classifier_needs_losses_that_know_of_it(tiny_data):
    assert "a full batch (9 of 27 images) fails with TypeError: cross_entropy_loss(): argument" in refused(
        Auxiliary(), tiny_data
    )
    assert train(Auxiliary(), tiny_data, WithAuxiliaryLoss).state.global_step == 6


class Answers(Linear):
    """Answers in a form of its own."""

    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, images):
        return self.form(super().forward(images))


@pytest.mark.parametrize(
    "form", [lambda x: {"logits": x}, lambda x: x.argmax(1), lambda x: x[:, :, None], lambda x: None]
)
def test_what_is_no_logits_is_refused(form, tiny_data):
    assert "a network must return logits of shape (images, classes)" in refused(Answers(form), tiny_data)


def test_a_loss_without_a_gradient_is_refused(tiny_data):
    assert "element 0 of tensors does not require grad" in refused(Answers(torch.detach), tiny_data)


class Unweighted(StreamlinedTrainer):
    """Its loss fails only in an evaluation."""

    def losses(self, outputs, labels):
        weight = None if torch.is_grad_enabled() else torch.ones(2)
        return {"loss": F.cross_entropy(outputs, labels, weight)}


def test_a_loss_that_fails_only_in_an_evaluation_is_refused(tiny_data):
    words = refused(linear(), tiny_data, Unweighted)
    assert words.startswith("an evaluation (9 of 9 images) fails with RuntimeError: weight tensor should be defined")


class Unwritable(Linear):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_weights_that_no_checkpoint_can_hold_are_refused_without_a_word_of_the_disk(tiny_data):
    words = refused(Unwritable(), tiny_data)
    assert words == (
        "no checkpoint of Unwritable can be written: "
        "TypeError: '_extra_state' in its state_dict() is a dict and not a tensor"
    )


# What trains


class Complex(Linear):
    """A filter in the frequencies, whose weights are complex."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.ones(6, 4, dtype=torch.complex64))

    def forward(self, images):
        return super().forward(torch.fft.irfft2(torch.fft.rfft2(images) * self.filter))


def test_complex_weights_train(tiny_data):
    model = Complex()
    train(model, tiny_data)
    assert not torch.equal(model.filter, torch.ones_like(model.filter))


class Keeping(Linear):
    """Keeps what it made of its images, with its history: PyTorch does not copy such a model."""

    def forward(self, images):
        self.kept = super().forward(images)
        return self.kept


def test_a_model_that_cannot_be_copied_is_checked_and_trained(tiny_data):
    model = Keeping()
    model(torch.zeros(2, 1, 6, 6))
    assert train(model, tiny_data).state.global_step == 6


# No trace


class Drawing(nn.Module):
    """Draws from all three generators, counts its passes, and has statistics that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.normalised, self.linear = nn.BatchNorm2d(1), nn.Linear(36, 3)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.passes, self.scale = 0, torch.ones(())

    def forward(self, images):
        self.passes += 1
        self.scale.mul_(1.01)
        self.mean = 0.9 * self.mean + 0.1 * images.mean().detach()
        noise = random.random() + np.random.rand() + torch.rand(len(images), 3)  # noqa: NPY002
        return self.linear(F.dropout(self.normalised(images), 0.3).flatten(1)) + noise * self.scale + self.mean


@pytest.mark.parametrize(
    ("build", "precision"),
    [(Drawing, "fp32"), (Drawing, "bf16"), (partial(ResidualCNN, 1, 4, (1, 6, 6), 3), "bf16")],
)
def test_a_training_is_bitwise_the_same_with_and_without_the_check(build, precision, tiny_data, monkeypatch):
    ends = []
    for check in (sanity_check, lambda trainer: None):
        monkeypatch.setattr("lablib.trainer.sanity_check", check)
        torch.manual_seed(0)
        trainer = train(build(), tiny_data, precision=precision, horizontal_flip=True, batch_size=10)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history(trainer.state.log_history)]
        ends.append((rows, {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("fails", [False, True])
def test_the_check_leaves_everything_as_it_was_even_after_a_training(fails, tiny_data, monkeypatch):
    knobs = TrainingConfig(num_epochs=1, batch_size=10, validation_split=0.25, device="cpu", precision="bf16")
    trainer = StreamlinedTrainer(Drawing(), knobs, tiny_data)
    trainer.train()  # accelerate has changed the model's forward since
    model = trainer.model.train()
    model.normalised.eval()

    def everything():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), "scale": model.scale}
        plain = {name: value for name, value in vars(model).items() if not isinstance(value, (dict, torch.Tensor))}
        values = {name: (id(tensor), tensor.tolist(), tensor.grad) for name, tensor in tensors.items()}
        return values, plain, [module.training for module in model.modules()], dict(vars(trainer))

    before = everything()
    if fails:
        monkeypatch.setattr("lablib.trainer.contiguous_weights", lambda model: {"no tensor": 1})
        with pytest.raises(SanityCheckError, match="no checkpoint of Drawing can be written"):
            sanity_check(trainer)
    else:
        sanity_check(trainer)
    assert everything() == before
    assert len(trainer._since_last_log) == 0


@pytest.mark.parametrize("network", [MLP, partial(ResidualCNN, 2)])
def test_the_check_takes_no_second_for_the_labs_own_networks(network, digits):
    model = network(image_shape=digits.image_shape, num_classes=10)
    trainer = StreamlinedTrainer(model, TrainingConfig(batch_size=128, device="cpu"), digits)
    sanity_check(trainer)  # what PyTorch prepares when it is first used is no part of it
    began = time.process_time()
    sanity_check(trainer)
    assert time.process_time() - began < 1
