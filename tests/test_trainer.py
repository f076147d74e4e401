"""StreamlinedTrainer against scripted metrics, a plain PyTorch loop and a plain transformers.Trainer."""

import copy
import gc
import itertools
import math
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from lablib import MLP, ImageData, ResidualCNN, SimpleCNN, StreamlinedTrainer, TrainingConfig, stratified_split
from lablib.data import ImageBatches, stratified_subset
from lablib.identity import build_seeded
from lablib.metrics import history
from lablib.trainer import NonFiniteLossError

VALIDATION_SPLIT = 0.25  # of tiny_data's 36 images: 27 + 9
STEPS = 4  # an epoch, in batches of 8, 8, 8 and 3
NOTHING_RANDOM = {"rotation_degrees": 0.0, "translation_fraction": 0.0}


def config(**knobs) -> TrainingConfig:
    defaults = {"num_epochs": 2, "batch_size": 8, "validation_split": VALIDATION_SPLIT, "device": "cpu"}
    return TrainingConfig(**{**defaults, **knobs})


def small_mlp(dropout: float = 0.1, seed: int = 0, model_class=MLP) -> MLP:
    return build_seeded(lambda: model_class((8,), dropout, image_shape=(1, 6, 6), num_classes=3), seed)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def timeless(trainer: StreamlinedTrainer) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history(trainer.state.log_history)]


def normalised(images: torch.Tensor, data: ImageData) -> np.ndarray:
    """In double precision with NumPy, from the definition."""
    train = data.train_images.numpy() / 255
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    return (images.numpy() / 255 - mean) / std


@pytest.fixture
def build(tmp_path, tiny_data):
    """A trainer of a small MLP on the tiny data, its checkpoints in a folder of its own."""
    numbers = itertools.count()

    def build(knobs: TrainingConfig, model=None, data=tiny_data, trainer_class=StreamlinedTrainer, **more):
        more = {"checkpoint_dir": str(tmp_path / f"checkpoints {next(numbers)}"), **more}
        return trainer_class(small_mlp(seed=knobs.seed) if model is None else model, knobs, data, **more)

    return build


@pytest.fixture
def unchecked(monkeypatch):
    """No sanity check, where a test counts what a network sees."""
    monkeypatch.setattr("lablib.trainer.sanity_check", lambda trainer: None)


class ScriptedTrainer(StreamlinedTrainer):
    """Its validation metric is written in advance, and it keeps the weights of each epoch."""

    def __init__(self, *args, script: list[float], **kwargs):
        super().__init__(*args, **kwargs)
        self.script, self.weights = script, []

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix == "eval":
            epoch = round(self.state.epoch)
            output.metrics[f"eval_{self.config.early_stopping_metric}"] = self.script[epoch - 1]
            self.weights.append(weights_of(self.model))
        return output


class InputsKept(MLP):
    """Remembers what it was shown, in training and outside."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shown = {True: [], False: []}

    def forward(self, images):
        self.shown[self.training].append(images.detach().clone())
        return super().forward(images)


class BadLogits(MLP):
    """Its logits become NaN or infinite in one training step, counted from 1."""

    bad_step, value, steps = 0, math.nan, 0

    def forward(self, images):
        logits = super().forward(images)
        self.steps += self.training
        return logits * self.value if self.training and self.steps == self.bad_step else logits


class InterruptAtEpoch(TrainerCallback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        if round(state.epoch) + 1 == self.epoch:
            raise KeyboardInterrupt


# Which weights are tested


@pytest.mark.parametrize(
    ("metric", "script"),
    [("accuracy", [0.3, 0.9, 0.5, 0.9, 0.7]), ("loss", [0.9, 0.2, 0.5, 0.2, 0.7])],
)
def test_the_first_best_epoch_is_restored_and_tested(metric, script, build, tiny_data):
    knobs = config(num_epochs=5, early_stopping_patience=None, early_stopping_metric=metric)
    trainer = build(knobs, trainer_class=ScriptedTrainer, script=script)
    trainer.train()
    assert same_bits(trainer.model.state_dict(), trainer.weights[1])
    for other in (0, 2, 3, 4):
        assert not same_bits(trainer.weights[1], trainer.weights[other])

    by_hand = small_mlp().eval()
    by_hand.load_state_dict(trainer.weights[1])
    with torch.no_grad():
        logits = by_hand(torch.from_numpy(normalised(tiny_data.test_images, tiny_data)).float())
    np.testing.assert_allclose(trainer.predict_test().predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    expected_loss = F.cross_entropy(logits, tiny_data.test_labels).item()
    expected_accuracy = (logits.argmax(1) == tiny_data.test_labels).double().mean().item()
    result = trainer.test()
    assert result["test_loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert result["test_accuracy"] == pytest.approx(expected_accuracy)


class SealedData(ImageData):
    """Breaks at the first look at the test set while it is sealed."""

    def __getattribute__(self, name):
        if name.startswith("test_") and object.__getattribute__(self, "__dict__").get("sealed"):
            raise PermissionError("the test set is sealed")
        return object.__getattribute__(self, name)


def test_the_test_set_is_not_looked_at_before_it_is_asked_for(build, tiny_data):
    parts = {name: getattr(tiny_data, name) for name in ("train_images", "train_labels", "test_images", "test_labels")}
    data = SealedData("sealed", **parts, class_names=tiny_data.class_names)
    data.__dict__["sealed"] = True
    trainer = build(config(), data=data)
    trainer.train()
    trainer.evaluate()
    with pytest.raises(PermissionError, match="sealed"):
        trainer.test()
    data.__dict__["sealed"] = False
    assert 0 <= trainer.test()["test_accuracy"] <= 1


# What the model sees


def test_validation_and_test_images_are_never_augmented(build, tiny_data, unchecked):
    model = small_mlp(model_class=InputsKept)
    trainer = build(config(num_epochs=1, rotation_degrees=45.0, translation_fraction=0.2), model)
    trainer.train()
    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    assert len(model.shown[False]) == 1
    expected = normalised(tiny_data.train_images[validation], tiny_data)
    np.testing.assert_allclose(torch.cat(model.shown[False]).numpy(), expected, rtol=1e-4, atol=1e-5)

    in_training = torch.cat(model.shown[True]).numpy()
    plain = normalised(tiny_data.train_images[train], tiny_data)
    distances = np.abs(in_training[:, None] - plain[None]).max((2, 3, 4)).min(1)
    assert len(in_training) == len(train)
    assert (distances > 0.01).all()

    model.shown[False].clear()
    trainer.test()
    expected = normalised(tiny_data.test_images, tiny_data)
    np.testing.assert_allclose(torch.cat(model.shown[False]).numpy(), expected, rtol=1e-4, atol=1e-5)


def test_each_training_image_is_augmented_once_an_epoch_and_none_in_an_evaluation(build, monkeypatch, unchecked):
    calls = []

    def counting(pixels, *knobs):
        calls.append((len(pixels), trainer.model.training, knobs))
        return pixels

    monkeypatch.setattr("lablib.trainer.augment", counting)
    trainer = build(config(rotation_degrees=7.0, translation_fraction=0.3, horizontal_flip=True, crop_padding=1))
    trainer.train()
    assert [size for size, _, _ in calls] == [8, 8, 8, 3] * 2
    assert all(training and knobs == (7.0, 0.3, True, 1) for _, training, knobs in calls)
    trainer.evaluate()
    trainer.test()
    assert len(calls) == 2 * STEPS


def test_at_most_so_many_training_images_are_seen_in_an_epoch_the_same_in_each(build, tiny_data, unchecked):
    model = small_mlp(model_class=InputsKept)
    build(config(max_train_images=15, **NOTHING_RANDOM), model).train()
    train, _ = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    chosen = stratified_subset(train, tiny_data.train_labels, 15, seed=0)
    in_training = model.shown[True]
    assert [len(batch) for batch in in_training] == [8, 7] * 2
    # normalised by the statistics of the whole training set
    expected = np.sort(normalised(tiny_data.train_images[chosen], tiny_data).sum((1, 2, 3)))
    for epoch in (in_training[:2], in_training[2:]):
        np.testing.assert_allclose(np.sort(torch.cat(epoch).double().sum((1, 2, 3)).numpy()), expected, atol=1e-4)
    assert [len(images) for images in model.shown[False]] == [9, 9]  # validated on all, in each epoch


def test_a_limit_below_the_number_of_classes_is_refused_before_the_training(build):
    with pytest.raises(ValueError, match="max_train_images = 2 of 27 training images in 3 classes"):
        build(config(max_train_images=2))


# What of transformers.Trainer would change the results


class Weighted(StreamlinedTrainer):
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))

    def losses(self, outputs, labels):
        return {"loss": self.criterion(outputs, labels)}


def test_a_loss_that_holds_tensors_is_evaluated_over_all_images_at_once(build, tiny_data):
    trainer = build(config(num_epochs=1, batch_size=4), trainer_class=Weighted)
    trainer.args.per_device_eval_batch_size = 4  # batches of 4, 4 and 1, whose class weights differ
    trainer.train()
    _, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    with torch.no_grad():
        logits = trainer.model.eval()(tiny_data.normalise(tiny_data.train_images[validation]))
    expected = F.cross_entropy(logits, tiny_data.train_labels[validation], Weighted.criterion.weight)
    assert timeless(trainer)[0]["val_loss"] == pytest.approx(expected.item(), abs=1e-6)


class WithKwargs(MLP):
    def forward(self, images, **kwargs):
        return super().forward(images)


@pytest.mark.parametrize("model_class", [MLP, WithKwargs])
def test_accumulated_gradients_make_the_step_of_the_whole_batch(model_class, build):
    steps = []
    for batch_size, accumulated in ((27, 1), (9, 3)):
        model = small_mlp(dropout=0, model_class=model_class)
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        knobs = config(num_epochs=1, batch_size=batch_size, optimizer="sgd", **NOTHING_RANDOM)
        build(replace(knobs, training_arguments={"gradient_accumulation_steps": accumulated}), model).train()
        steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]) - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=1e-6)
    assert steps[0].norm() > 1e-4


def test_what_would_change_results_in_silence_is_refused(build):
    with pytest.raises(ValueError, match="dataloader_drop_last"):
        config(training_arguments={"dataloader_drop_last": True})
    model = small_mlp()
    model.config = {"use_cache": "mine"}
    with pytest.raises(ValueError, match="transformers would write to the model's attribute `config`"):
        build(config(), model)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": STEPS + 2},
        {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"},
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "dataloader_persistent_workers": True},
        {"lr_scheduler_kwargs": {"num_cycles": 0.5}, "eval_accumulation_steps": 1},
        {"disable_tqdm": False, "log_level": "warning", "save_total_limit": 3, "adam_beta2": 0.99},
    ],
)
def test_further_training_arguments_train(arguments, build):
    trainer = build(config(lr_schedule="cosine", training_arguments=arguments))
    trainer.train()
    assert len(timeless(trainer)) == 2
    assert trainer.state.global_step == arguments.get("max_steps", 2 * STEPS)
    assert trainer.test()["test_loss"] > 0


def test_importing_the_lab_leaves_the_process_as_it_is():
    code = "import gc, sys, lablib.trainer; print(gc.get_freeze_count(), 'lomo_optim' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["0", "False"]


# When it stops


@pytest.mark.parametrize(
    ("metric", "patience", "script", "epochs"),
    [
        ("accuracy", 2, [0.5, 0.6, 0.5, 0.6, 0.9, 0.9, 0.9], 4),  # an equal value is no improvement
        ("accuracy", 3, [0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.9], 6),  # the improvement in epoch 3 starts the count anew
        ("accuracy", 3, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 7),
        ("loss", 2, [1.0, 0.9, 0.95, 0.8, 0.81, 0.82, 0.1], 6),
        ("loss", 0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 7),
    ],
)
def test_early_stopping_stops_after_exactly_patience_epochs_without_improvement(
    metric, patience, script, epochs, build
):
    knobs = config(num_epochs=7, batch_size=32, early_stopping_metric=metric, early_stopping_patience=patience)
    trainer = build(knobs, trainer_class=ScriptedTrainer, script=script)
    trainer.train()
    assert [row[f"val_{metric}"] for row in timeless(trainer)] == script[:epochs]


@pytest.mark.parametrize(
    ("step", "epoch", "value", "named"),
    [(1, 1, math.nan, "nan"), (4, 1, math.inf, "nan|inf"), (6, 2, math.nan, "nan"), (3, 1, math.inf, "nan|inf")],
)
def test_a_loss_that_is_not_finite_stops_the_training_and_names_epoch_and_step(step, epoch, value, named, build):
    model = small_mlp(model_class=BadLogits)
    model.bad_step, model.value = step, value
    with pytest.raises(NonFiniteLossError, match=rf"loss is ({named}) at epoch {epoch}, step {step};"):
        build(config(num_epochs=3), model).train()
    assert model.steps == epoch * STEPS


# What is random


def test_the_same_seed_gives_the_same_bits_whatever_else_is_drawn(build):
    knobs = config(seed=3, rotation_degrees=20.0, horizontal_flip=True)
    torch.manual_seed(11)
    one = build(knobs, small_mlp(dropout=0.3))
    one.train()
    torch.manual_seed(12)
    other = build(knobs, small_mlp(dropout=0.3))
    torch.rand(7)
    other.train()
    assert same_bits(one.model.state_dict(), other.model.state_dict())
    assert timeless(one) == timeless(other)


def test_another_seed_takes_the_images_in_another_order_and_gives_other_weights(build):
    trainers = [build(config(seed=seed), small_mlp()) for seed in (0, 0, 1)]
    samplers = [trainer.get_train_dataloader().batch_sampler for trainer in trainers]
    orders = [[int(position) for batch in sampler for position in batch] for sampler in samplers]
    assert all(sorted(order) == list(range(27)) for order in orders)
    assert orders[0] == orders[1] != orders[2]
    for trainer in trainers[1:]:
        trainer.train()
    for name, tensor in trainers[1].model.state_dict().items():
        assert not torch.equal(tensor, trainers[2].model.state_dict()[name]), name


def test_augmentation_and_dropout_draw_anew_in_each_epoch(build, unchecked):
    model = small_mlp(model_class=InputsKept)
    build(config(batch_size=27, rotation_degrees=30.0), model).train()
    first, second = model.shown[True]
    assert not np.isin(first.sum((1, 2, 3)).numpy(), second.sum((1, 2, 3)).numpy()).any()


# Callbacks


class PlainCallback(TrainerCallback):
    """Written for transformers.Trainer: notes what it is told, and stops the training after the second epoch."""

    def __init__(self):
        self.told = []

    def on_step_end(self, args, state, control, **kwargs):
        self.told.append(state.global_step)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.told.append(("evaluated", {"eval_loss", "eval_accuracy", "epoch"} <= metrics.keys()))

    def on_log(self, args, state, control, logs, **kwargs):
        self.told.append(sorted({"loss", "learning_rate", "grad_norm", "eval_loss", "train_runtime"} & logs.keys()))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        pairs = zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True)
        self.told.append([given.grad is not None and given is updated for given, updated in pairs])

    def on_epoch_end(self, args, state, control, train_dataloader, **kwargs):
        self.told.append((state.epoch, len(train_dataloader)))
        control.should_training_stop = round(state.epoch) == 2


class OwnLoss(MLP):
    def forward(self, images, labels):
        logits = super().forward(images.float())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_a_callback_is_told_the_same_as_by_a_plain_trainer_and_may_stop_the_training(build, tiny_data, tmp_path):
    in_lab, reference = PlainCallback(), PlainCallback()
    trainer = build(config(num_epochs=5, optimizer="sgd"), callbacks=[in_lab])
    trainer.train()
    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, 0)
    plain = transformers.Trainer(
        model := small_mlp(model_class=OwnLoss),
        config(num_epochs=5).to_training_arguments(str(tmp_path / "plain")),
        train_dataset=ImageBatches(tiny_data.train_images, tiny_data.train_labels, train),
        eval_dataset=ImageBatches(tiny_data.train_images, tiny_data.train_labels, validation),
        data_collator=lambda batch: batch,
        compute_metrics=lambda prediction: {"accuracy": 0.5},
        callbacks=[reference],
        optimizers=(torch.optim.SGD(model.parameters(), lr=1e-3), None),
    )
    plain.remove_callback(transformers.PrinterCallback)
    plain.train()
    assert in_lab.told == reference.told
    assert in_lab.told.count(("evaluated", True)) == len(timeless(trainer)) == 2


# The arithmetic


@pytest.mark.parametrize(
    ("knobs", "optimizer"),
    [
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ({"optimizer": "sgd", "weight_decay": 0.1}, lambda p: torch.optim.SGD(p, 0.01, 0.9, weight_decay=0.1)),
        ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.01)),
        ({"optimizer": "adam", "weight_decay": 0.1}, lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1)),
        ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    ],
    ids=["sgd", "sgd with decay", "adam", "adam with decay", "adamw"],
)
def test_two_epochs_agree_with_a_plain_pytorch_loop(knobs, optimizer, build, tiny_data, monkeypatch, unchecked):
    order = []
    take = ImageBatches.__getitems__

    def noting(self, positions):
        if self is trainer.train_dataset:
            order.append(self.indices[positions])
        return take(self, positions)

    monkeypatch.setattr(ImageBatches, "__getitems__", noting)
    knobs = {"learning_rate": 0.01, "early_stopping_metric": "loss", **knobs, **NOTHING_RANDOM}
    trainer = build(config(**knobs), small_mlp(dropout=0.0))
    trainer.train()
    rows = history(trainer.state.log_history)

    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    epochs = [order[:STEPS], order[STEPS:]]
    for batches in epochs:
        assert torch.equal(torch.cat(batches).sort().values, train)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

    images = torch.from_numpy(normalised(tiny_data.train_images, tiny_data)).float()
    labels = tiny_data.train_labels
    model = small_mlp(dropout=0.0)
    step = optimizer(model.parameters())
    val_losses = []
    for batches, row in zip(epochs, rows, strict=True):
        total_loss, correct = 0.0, 0
        for batch in batches:
            logits = model(images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            step.zero_grad()
            loss.backward()
            step.step()
            total_loss += loss.item() * len(batch)
            correct += (logits.argmax(1) == labels[batch]).sum().item()
        with torch.no_grad():
            logits = model(images[validation])
        val_losses.append(F.cross_entropy(logits, labels[validation]).item())
        assert row["train_loss"] == pytest.approx(total_loss / len(train), rel=1e-5)
        assert row["train_accuracy"] == pytest.approx(correct / len(train))
        assert row["val_loss"] == pytest.approx(val_losses[-1], rel=1e-5)
        expected = (logits.argmax(1) == labels[validation]).double().mean().item()
        assert row["val_accuracy"] == pytest.approx(expected)
    assert val_losses[1] < val_losses[0]  # so that the restored weights are the last ones
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(trainer.model.state_dict()[name].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_the_optimizer_is_the_plain_one_with_weight_decay_on_every_parameter(name, expected, build):
    passed = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-4}
    trainer = build(config(optimizer=name, weight_decay=0.02, learning_rate=0.3, training_arguments=passed))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is expected
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(trainer.model.parameters()))
    assert (group["weight_decay"], group["lr"]) == (0.02, 0.3)
    assert (group.get("betas"), group.get("eps")) == ((None, None) if name == "sgd" else ((0.5, 0.75), 1e-4))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize(("fraction", "warmup"), [(0.0, 0), (0.25, 3), (0.3, 4)])
def test_the_learning_rate_of_each_step_is_the_schedules(schedule, fraction, warmup, build):
    rates = []

    class NoteRate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    knobs = config(num_epochs=3, learning_rate=0.02, lr_schedule=schedule, warmup_fraction=fraction)
    trainer = build(knobs, callbacks=[NoteRate()])
    trainer.train()
    steps = 3 * STEPS
    expected = []
    for step in range(steps):
        if step < warmup:
            factor = step / warmup
        elif schedule == "constant":
            factor = 1.0
        else:
            factor = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        expected.append(0.02 * factor)
    assert rates == pytest.approx(expected, rel=1e-9)
    assert [row["learning_rate"] for row in timeless(trainer)] == pytest.approx(expected[STEPS - 1 :: STEPS])


@pytest.mark.parametrize("limit", [None, 0.05, 1e6])
def test_gradients_are_clipped_only_on_request(limit, build):
    model = small_mlp()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    knobs = config(num_epochs=1, batch_size=27, optimizer="sgd", learning_rate=0.5, max_grad_norm=limit)
    trainer = build(knobs, model)
    trainer.train()
    update = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
    (row,) = timeless(trainer)
    assert row["grad_norm"] > 0.1  # so that a limit of 0.05 has something to clip
    assert update == pytest.approx(0.5 * min(row["grad_norm"], limit or math.inf), rel=1e-3)


def test_bf16_computes_in_bfloat16_and_leaves_nothing_behind(build, tiny_data):
    before = build(config(precision="fp32"))
    before.train()

    in_bf16 = build(config(precision="bf16"))
    dtypes = []
    in_bf16.model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    in_bf16.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in in_bf16.model.parameters())
    assert in_bf16.predict_test().predictions.dtype == np.float32
    assert in_bf16.model(in_bf16.prepare_images(tiny_data.test_images, training=False)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")

    after = build(config(precision="fp32"))
    after.train()
    assert same_bits(before.model.state_dict(), after.model.state_dict())
    assert not same_bits(before.model.state_dict(), in_bf16.model.state_dict())


class NaNWhenEvaluated(MLP):
    def forward(self, images):
        return super().forward(images) * (1 if self.training else float("nan"))


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_an_evaluation_without_a_finite_loss_is_no_result(metric, build):
    trainer = build(config(early_stopping_metric=metric), NaNWhenEvaluated((8,), image_shape=(1, 6, 6), num_classes=3))
    with pytest.raises(NonFiniteLossError, match=r"the evaluation loss is nan at epoch 1; a smaller learning_rate"):
        trainer.train()


# Interrupting, and going on


COLOURS = {"image_shape": (3, 8, 8), "num_classes": 3}


@pytest.fixture(scope="module")
def colourful() -> ImageData:
    """24 + 6 images of 8 × 8 coloured pixels in 3 classes, told apart by their brightest channel."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(30) % 3
    images = torch.randint(0, 120, (30, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(30), labels] += 100
    return ImageData("colourful", images[:24], labels[:24], images[24:], labels[24:], ("red", "green", "blue"))


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "sgd"), ("bf16", "adam")])
@pytest.mark.parametrize("network", [partial(SimpleCNN, 1, 4, **COLOURS), partial(ResidualCNN, 1, 4, **COLOURS)])
def test_a_resumed_cnn_ends_like_one_that_was_not_interrupted_with_its_batch_norm_statistics(
    network, precision, optimizer, build, colourful, tmp_path
):
    knobs = config(num_epochs=3, precision=precision, optimizer=optimizer, horizontal_flip=True, seed=4)

    def build_cnn(folder, *callbacks):
        more = {"checkpoint_dir": str(tmp_path / folder), "callbacks": callbacks, "script": [0.1, 0.2, 0.3]}
        return build(knobs, build_seeded(network, 4), colourful, ScriptedTrainer, **more)

    undisturbed = build_cnn("undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        build_cnn("interrupted", InterruptAtEpoch(2)).train()
    torch.rand(5)
    resumed = build_cnn("interrupted")
    resumed.train(resume_from_checkpoint=True)
    assert same_bits(undisturbed.model.state_dict(), resumed.model.state_dict())
    assert timeless(undisturbed) == timeless(resumed)
    assert len(resumed.weights) == 2  # of the epochs after the interruption
    statistics = resumed.model.stem[1]
    assert statistics.num_batches_tracked == 3 * len(resumed.get_train_dataloader())
    assert not torch.equal(statistics.running_mean, resumed.weights[0]["stem.1.running_mean"])


def test_a_checkpoint_of_weights_in_another_memory_format_resumes_as_one_in_the_same(build, colourful, tmp_path):
    def build_cnn(folder, memory_format, *callbacks):
        network = build_seeded(partial(SimpleCNN, 1, 4, **COLOURS), 4).to(memory_format=memory_format)
        return build(config(), network, colourful, checkpoint_dir=str(tmp_path / folder), callbacks=callbacks)

    for begun in (torch.contiguous_format, torch.channels_last):
        with pytest.raises(KeyboardInterrupt):
            build_cnn(str(begun), begun, InterruptAtEpoch(2)).train()
        resumed = build_cnn(str(begun), torch.contiguous_format)
        resumed.train(resume_from_checkpoint=True)
        weights = torch.cat([parameter.flatten() for parameter in resumed.model.parameters()])
        if begun == torch.contiguous_format:
            expected = weights
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_the_seconds_of_a_resumed_training_go_on_without_the_pause(build, tmp_path):
    class SlowEpochs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            time.sleep(0.03)

    knobs, folder = config(num_epochs=4), str(tmp_path / "interrupted")
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        build(knobs, checkpoint_dir=folder, callbacks=[SlowEpochs(), InterruptAtEpoch(3)]).train()
    time.sleep(0.3)
    resumed = build(knobs, checkpoint_dir=folder, callbacks=[SlowEpochs()])
    resumed.train(resume_from_checkpoint=True)
    elapsed = time.perf_counter() - began
    seconds = [row["seconds"] for row in history(resumed.state.log_history)]
    assert all(later - earlier >= 0.03 for earlier, later in itertools.pairwise([0.0, *seconds]))
    assert seconds[-1] <= elapsed - 0.3


def test_trainers_without_a_checkpoint_folder_have_each_their_own_which_goes_without_a_warning(tiny_data):
    one = StreamlinedTrainer(small_mlp(), config(), tiny_data)
    other = StreamlinedTrainer(small_mlp(seed=1), config(seed=1), tiny_data)
    folders = [Path(trainer.args.output_dir) for trainer in (one, other)]
    one.train()
    assert [any(folder.glob("checkpoint-*")) for folder in folders] == [True, False]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del one, other
        gc.collect()
    assert not any(folder.exists() for folder in folders)
    assert [str(warning.message) for warning in caught] == []


# The history


def test_the_history_has_one_row_an_epoch_with_the_keys_that_it_promises(build):
    trainer = build(config(num_epochs=3))
    trainer.train()
    rows = history(trainer.state.log_history)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    measured = ["train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    keys = ["epoch", *measured, "learning_rate", "grad_norm", "seconds"]
    assert all(key in history.__doc__ for key in keys)
    for row in rows:
        assert sorted(row) == sorted(keys)
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())


def test_an_evaluation_after_the_training_does_not_rewrite_the_last_epoch(build):
    trainer = build(
        config(num_epochs=2, early_stopping_patience=None), trainer_class=ScriptedTrainer, script=[0.9, 0.2]
    )
    trainer.train()
    before = timeless(trainer)
    trainer.script[1] = 0.9  # the restored weights are those of epoch 1
    trainer.evaluate()
    assert timeless(trainer) == before


def test_an_epoch_that_a_callback_breaks_off_does_not_rewrite_the_one_before(build):
    class StopInEpoch3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2 * STEPS + 1

    whole, broken_off = build(config(num_epochs=2)), build(config(num_epochs=4), callbacks=[StopInEpoch3()])
    whole.train()
    broken_off.train()
    assert timeless(broken_off)[:2] == timeless(whole)
