"""What would fail in a training fails before it, in words about what the user wrote, and the check leaves no trace."""

import copy
import random
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from outcomes import findings
from torch import nn
from torch.nn import functional as F

from lablib import MLP, ResidualCNN, SimpleCNN, StreamlinedTrainer, TrainingConfig
from lablib.distillation import KnowledgeDistillationTrainer
from lablib.trainer import SanityCheckError, sanity_check


def train(model, data, trainer_class=StreamlinedTrainer, **knobs) -> StreamlinedTrainer:
    plain = {"num_epochs": 2, "batch_size": 9, "validation_split": 0.25, "device": "cpu", "precision": "fp32"}
    trainer = trainer_class(model, TrainingConfig(**plain | knobs), data)
    trainer.train()
    return trainer


def refused(model, data, trainer_class=StreamlinedTrainer, **knobs) -> str:
    """The error's words; no step has been taken, so the weights are the initial ones."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(SanityCheckError) as caught:
        train(model, data, trainer_class, **knobs)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    return str(caught.value)


class Linear(nn.Module):
    """What the networks below have in common."""

    def __init__(self, answer=lambda logits: logits):
        super().__init__()
        self.linear, self.answer = nn.Linear(36, 3), answer

    def forward(self, images):
        return self.answer(self.linear(images.flatten(1)))


class Expanded(Linear):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1).expand(3))


class Listed(Linear):
    def __init__(self):
        super().__init__()
        self.more = {"layers": [nn.Linear(3, 3)]}


def batch_normed() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


NO_LOGITS = "a network must return logits (images × classes), or a tuple that begins with them"
NO_SOFTMAX = "the network ends in a softmax or a ReLU, but the loss takes logits; remove it"
NO_DICT = "`losses` must return a dict of scalar tensors"
SMALLER = "Use a smaller batch_size or image_size"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (MLP((4,), 0.0, (1, 6, 6), 10), "the network has 10 outputs, but tiny has 3 classes"),
        (
            MLP((4,), 0.0, (1, 8, 8), 3),
            "(9x36 and 64x4). MLP was given float32 (9, 1, 6, 6)",
        ),
        (Linear(lambda logits: {"out": logits}), NO_LOGITS),
        (Linear(lambda logits: logits.argmax(1)), NO_LOGITS),
        (Linear(lambda logits: (logits, logits.mean())), "an evaluation (9 of 9 images) fails with "),
        (Linear(nn.Softmax(1)), NO_SOFTMAX),
        (Linear(F.relu), NO_SOFTMAX),
        (Linear(torch.detach), "a full batch (9 of 27 images) fails with RuntimeError: element 0"),
        (Listed(), "Listed holds layers in a plain list or dict, so they would not be trained; use nn.ModuleList"),
        (Expanded(), 'While copying the parameter named "scale"'),
        (Linear(Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))), SMALLER),
        (Linear(Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))), SMALLER),
    ],
)
def test_what_would_fail_in_a_training_is_refused_before_it(model, words, tiny_data):
    assert words in refused(model, tiny_data)


def fails_when_evaluated(logits, labels):
    return {"loss": F.cross_entropy(logits, labels, None if torch.is_grad_enabled() else torch.ones(2))}


@pytest.mark.parametrize(
    ("method", "own", "words"),
    [
        ("losses", staticmethod(F.cross_entropy), NO_DICT),
        ("losses", staticmethod(lambda logits, labels: {"loss": logits}), NO_DICT),
        ("losses", staticmethod(fails_when_evaluated), "an evaluation (9 of 9 images) fails with RuntimeError: weight"),
        ("compute_loss", lambda self, model, batch: model(batch["images"].float()).mean(), "override `losses`"),
    ],
)
def test_a_loss_that_would_fail_or_not_be_recorded_is_refused(method, own, words, tiny_data):
    assert words in refused(Linear(), tiny_data, type("Own", (StreamlinedTrainer,), {method: own}))


@pytest.mark.parametrize("batch_size", [13, 26])  # of 27 images
def test_a_last_batch_that_fails_is_refused(batch_size, tiny_data):
    words = refused(batch_normed(), tiny_data, batch_size=batch_size)
    assert words.startswith("the last batch of an epoch (1 of 27 images) fails with ValueError: Expected more than 1")
    assert words.endswith("Sequential was given float32 (1, 1, 6, 6). Use another batch_size")


def test_the_check_is_of_several_classes(tiny_data):
    class Margin(StreamlinedTrainer):
        def losses(self, logits, labels):
            between = torch.cdist(logits, logits)[labels[:, None] != labels]
            return {"loss": F.cross_entropy(logits, labels) + F.relu(1 - between.min())}

    order = tiny_data.train_labels.argsort(stable=True)  # as folders are sorted
    data = replace(tiny_data, train_images=tiny_data.train_images[order], train_labels=tiny_data.train_labels[order])
    assert train(Linear(), data, Margin).state.global_step == 6


def test_a_model_that_cannot_be_copied_and_whose_train_returns_nothing_is_checked_and_trained(tiny_data):
    class Keeping(SimpleCNN):  # what it made of its images, with its history
        def forward(self, images):
            self.kept = super().forward(images)
            return self.kept

        def train(self, mode=True):
            super().train(mode)

    model, teacher = (Keeping(1, 4, (1, 6, 6), 3) for _ in range(2))
    model(torch.zeros(2, 1, 6, 6))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    trainer = train(model, tiny_data, lambda *given: KnowledgeDistillationTrainer(model, teacher, *given[1:]))
    assert (trainer.state.global_step, trainer._memory_format) == (6, torch.channels_last)


class Drawing(nn.Module):
    """Draws from all three generators, counts its passes, and has statistics that no checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.normalised, self.linear = nn.BatchNorm2d(1), nn.Linear(36, 3)
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.passes, self.scale, self.last = 0, torch.ones(()), {"mean": 0.0}

    def forward(self, images):
        self.passes += 1
        self.scale.mul_(1.01)
        self.mean = 0.9 * self.mean + 0.1 * images.mean().detach() + self.passes * self.last["mean"]
        self.last["mean"] = self.mean.item()
        noise = random.random() + np.random.rand() + torch.rand(len(images), 3)  # noqa: NPY002
        return self.linear(F.dropout(self.normalised(images), 0.3).flatten(1)) + noise * self.scale + self.mean


@pytest.mark.parametrize(
    ("build", "precision"), [(Drawing, "fp32"), (partial(ResidualCNN, 1, 4, (1, 6, 6), 3), "bf16")]
)
def test_a_training_is_bitwise_the_same_with_and_without_the_check(build, precision, tiny_data, monkeypatch):
    ends = []
    for check in (sanity_check, lambda trainer: None):
        monkeypatch.setattr("lablib.trainer.sanity_check", check)
        torch.manual_seed(0)
        trainer = train(build(), tiny_data, precision=precision, horizontal_flip=True, batch_size=10)
        ends.append(findings(trainer))
    assert ends[0] == ends[1]
