"""StreamlinedTrainer against scripted metrics, a plain PyTorch loop and a plain transformers.Trainer."""

import copy
import gc
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from outcomes import findings, timeless_rows
from scripted import Scripted
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import StepLR
from transformers import TrainerCallback

from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, stratified_split
from lablib.data import stratified_subset
from lablib.hardware import algorithms
from lablib.identity import build_seeded
from lablib.trainer import NonFiniteLossError

VALIDATION_SPLIT = 0.25  # of tiny_data's 36 images: 27 + 9
STEPS = 4  # an epoch, in batches of 8, 8, 8 and 3
NOTHING_RANDOM = {"rotation_degrees": 0.0, "translation_fraction": 0.0}


def config(**knobs) -> TrainingConfig:
    defaults = {"num_epochs": 2, "batch_size": 8, "validation_split": VALIDATION_SPLIT, "device": "cpu"}
    return TrainingConfig(**{**defaults, **knobs})


def small_mlp(dropout: float = 0.1, seed: int = 0, model_class=MLP) -> MLP:
    return build_seeded(lambda: model_class((8,), dropout, image_shape=(1, 6, 6), num_classes=3), seed)


def normalised(images: torch.Tensor, data: ImageData) -> np.ndarray:
    """In double precision with NumPy, from the definition."""
    train = data.train_images.numpy() / 255
    mean, std = train.mean((0, 2, 3), keepdims=True), train.std((0, 2, 3), keepdims=True)
    return (images.numpy() / 255 - mean) / std


@pytest.fixture
def build(tiny_data):
    """A trainer of a small MLP on the tiny data."""

    def build(knobs: TrainingConfig, model=None, data=tiny_data, trainer_class=StreamlinedTrainer, **more):
        return trainer_class(model or small_mlp(seed=knobs.seed), knobs, data, **more)

    return build


def on(event: str, action) -> TrainerCallback:
    """A callback that does one thing."""
    callback = TrainerCallback()
    setattr(callback, event, lambda args, state, control, **given: action(state, control))
    return callback


def watched_mlp() -> tuple[MLP, dict[bool, list]]:
    """A network, and what it is shown in training (True) and outside."""
    model, shown = small_mlp(), {True: [], False: []}
    model.register_forward_pre_hook(lambda _, inputs: shown[model.training].append(inputs[0].detach().clone()))
    return model, shown


class BadLogits(MLP):
    """Its logits become NaN or infinite in one training step, counted from 1, or in an evaluation (None)."""

    bad_step, value, steps = None, math.nan, 0

    def forward(self, images):
        self.steps += self.training
        bad = self.steps == self.bad_step if self.training else self.bad_step is None
        return super().forward(images) * (self.value if bad else 1)


@pytest.mark.parametrize(
    ("metric", "script"), [("accuracy", [0.3, 0.9, 0.5, 0.9, 0.7]), ("loss", [0.9, 0.2, 0.5, 0.2, 0.7])]
)
def test_the_first_best_epoch_is_restored_and_tested_and_the_test_set_not_seen_before(metric, script, build, tiny_data):
    sealed, weights = copy.copy(tiny_data), []
    del sealed.__dict__["test_images"]
    sealed.__dict__["test_labels"] = range(18)  # their number only
    keeping = on("on_evaluate", lambda state, control: weights.append(findings(trainer)[1]))
    knobs = config(num_epochs=5, early_stopping_patience=None, early_stopping_metric=metric)
    trainer = build(knobs, data=sealed, trainer_class=Scripted, callbacks=[keeping])
    trainer.script = script
    trainer.train()
    assert [findings(trainer)[1] == of_epoch for of_epoch in weights] == [0, 1, 0, 0, 0]
    with pytest.raises(AttributeError, match="has no attribute 'test_images'"):
        trainer.test()
    trainer.data = tiny_data

    by_hand = copy.deepcopy(trainer.model).eval()
    with torch.no_grad():
        logits = by_hand(torch.from_numpy(normalised(tiny_data.test_images, tiny_data)).float())
    np.testing.assert_allclose(trainer.predict().predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    result, accuracy = trainer.test(), (logits.argmax(1) == tiny_data.test_labels).double().mean().item()
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, tiny_data.test_labels).item(), rel=1e-5)
    assert result["test_accuracy"] == pytest.approx(accuracy)


def test_training_images_alone_are_augmented_each_of_them_once_an_epoch(build, tiny_data, monkeypatch):
    calls, (model, shown) = [], watched_mlp()
    add = "lablib.trainer.augment", lambda pixels, *knobs: calls.append((len(pixels), knobs)) or pixels + 255
    monkeypatch.setattr(*add)
    monkeypatch.setattr("lablib.trainer.sanity_check", lambda trainer: None)  # which shows images too
    knobs = {"rotation_degrees": 7.0, "translation_fraction": 0.3, "horizontal_flip": True, "crop_padding": 1}
    trainer = build(config(**knobs), model)
    trainer.train()
    trainer.test()
    assert calls == [(size, tuple(knobs.values())) for size in (8, 8, 8, 3, 8, 8, 8, 3)]

    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    for epoch in (shown[True][:STEPS], shown[True][STEPS:]):
        sums = np.sort(torch.cat(epoch).double().sum((1, 2, 3)).numpy())
        expected = normalised(tiny_data.train_images[train] + 255.0, tiny_data).sum((1, 2, 3))
        np.testing.assert_allclose(sums, np.sort(expected), atol=1e-3)
    expected = normalised(tiny_data.train_images[validation], tiny_data)
    expected = expected, expected, normalised(tiny_data.test_images, tiny_data)
    for evaluated, images in zip(shown[False], expected, strict=True):
        np.testing.assert_allclose(evaluated.numpy(), images, rtol=1e-4, atol=1e-5)


def test_a_loss_that_holds_tensors_is_evaluated_over_all_images_at_once_whatever_the_limit(build, tiny_data):
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    weighted = type("Weighted", (StreamlinedTrainer,), {"losses": lambda self, *batch: {"loss": criterion(*batch)}})
    trainer = build(config(num_epochs=1, batch_size=4, max_train_images=15), trainer_class=weighted)
    trainer.args.per_device_eval_batch_size = 4  # batches of 4, 4 and 1, whose class weights differ
    trainer.train()
    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    assert torch.equal(trainer.train_dataset.indices, stratified_subset(train, tiny_data.train_labels, 15, seed=0))
    with torch.no_grad():
        logits = trainer.model.eval()(tiny_data.normalise(tiny_data.train_images[validation]))
    expected = F.cross_entropy(logits, tiny_data.train_labels[validation], criterion.weight)
    assert timeless_rows(trainer)[0]["val_loss"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("metric", "patience", "script", "epochs"),
    [
        ("accuracy", 2, [0.5, 0.6, 0.5, 0.6, 0.9, 0.9, 0.9], 4),  # an equal value is no improvement
        ("accuracy", 3, [0.5, 0.4, 0.6, 0.5, 0.4, 0.3, 0.9], 6),  # the improvement in epoch 3 starts the count again
        ("loss", 2, [1.0, 0.9, 0.95, 0.8, 0.81, 0.82, 0.1], 6),
        ("loss", 0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], 7),
    ],
)
def test_early_stopping_stops_after_patience_epochs_without_improvement(metric, patience, script, epochs, build):
    knobs = config(num_epochs=7, batch_size=32, early_stopping_metric=metric, early_stopping_patience=patience)
    trainer = build(knobs, trainer_class=Scripted)
    trainer.script = script
    trainer.train()
    before = timeless_rows(trainer)
    assert [row[f"val_{metric}"] for row in before] == script[:epochs]
    trainer.script = [0.0] * epochs
    trainer.evaluate()  # of the best epoch's weights
    assert timeless_rows(trainer) == before


@pytest.mark.parametrize(
    ("step", "value", "epochs", "words"),
    [
        (4, math.inf, 1, "training loss is not finite in epoch 1, step 4;"),
        (6, math.nan, 2, "training loss is not finite in epoch 2, step 6;"),
        (None, math.nan, 1, "validation loss is not finite in epoch 1; a smaller learning_rate"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_training_and_names_epoch_and_step(step, value, epochs, words, build):
    model = small_mlp(model_class=BadLogits)
    model.bad_step, model.value = step, value
    with pytest.raises(NonFiniteLossError, match=words):
        build(config(num_epochs=3), model).train()
    assert model.steps == epochs * STEPS


def test_augmentation_draws_again_in_each_epoch(build):
    model, shown = watched_mlp()
    build(config(batch_size=27, rotation_degrees=30.0), model).train()
    _, first, second = shown[True]  # after the sanity check
    assert not np.isin(first.sum((1, 2, 3)).numpy(), second.sum((1, 2, 3)).numpy()).any()


def noting() -> TrainerCallback:
    """Notes each event, when it is and what it is given."""

    def note(event, args, state, control, logs=(), metrics=(), **given):
        keys = {"loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "train_runtime"} & {*logs, *metrics}
        callback.noted.append((event, state.global_step, state.epoch, sorted(given), sorted(keys)))

    callback = TrainerCallback()
    vars(callback).update({name: partial(note, name) for name in dir(callback) if name.startswith("on_")}, noted=[])
    return callback


def test_a_callback_is_called_as_by_a_plain_trainer_event_by_event(build, tmp_path):
    class OwnLoss(MLP):
        def forward(self, images, labels):
            logits = super().forward(images.float())
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    in_lab, in_plain = noting(), noting()
    trainer = build(config(), callbacks=[in_lab])
    trainer.train()
    arguments = config().to_training_arguments(str(tmp_path / "plain"))
    arguments.remove_unused_columns = False
    more = {"eval_dataset": trainer.eval_dataset, "data_collator": lambda batch: batch, "callbacks": [in_plain]}
    more |= {"compute_metrics": lambda prediction: {"accuracy": 0.5}}
    plain = transformers.Trainer(small_mlp(model_class=OwnLoss), arguments, train_dataset=trainer.train_dataset, **more)
    plain.remove_callback(transformers.PrinterCallback)
    plain.train()
    assert in_lab.noted == [event for event in in_plain.noted if event[0] != "on_prediction_step"]
    assert len(in_lab.noted) > 6 * STEPS


@pytest.mark.parametrize(
    ("knobs", "optimizer"),
    [
        ({"optimizer": "sgd"}, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
        ({"optimizer": "adam"}, partial(torch.optim.Adam, weight_decay=0.1)),
        ({"optimizer": "adamw"}, partial(torch.optim.AdamW, weight_decay=0.1)),
    ],
)
def test_two_epochs_agree_with_a_plain_pytorch_loop(knobs, optimizer, build, tiny_data):
    knobs = {"learning_rate": 0.01, "weight_decay": 0.1, "early_stopping_metric": "loss", **knobs}
    trainer = build(config(**knobs, **NOTHING_RANDOM), small_mlp(dropout=0.0))
    trainer.train()
    rows = trainer.history

    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    epochs = [train[build(config()).epoch_order(epoch)].split(8) for epoch in range(2)]
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

    images, labels = torch.from_numpy(normalised(tiny_data.train_images, tiny_data)).float(), tiny_data.train_labels
    model = small_mlp(dropout=0.0)
    step = optimizer(model.parameters(), lr=0.01)
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
        accuracies = correct / len(train), (logits.argmax(1) == labels[validation]).double().mean().item()
        losses = total_loss / len(train), F.cross_entropy(logits, labels[validation]).item()
        assert (row["train_loss"], row["val_loss"]) == pytest.approx(losses, rel=1e-5)
        assert (row["train_accuracy"], row["val_accuracy"]) == pytest.approx(accuracies)
    assert rows[1]["val_loss"] < rows[0]["val_loss"]  # so that the restored weights are the last ones
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(trainer.model.state_dict()[name].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-6)


def test_momentum_is_zero_after_a_first_step_that_the_loss_scaler_of_fp16_skips(build):
    trainer = build(config(optimizer="sgd", learning_rate=0.5), small_mlp())
    optimizer, before = trainer.create_optimizer(), parameters_to_vector(trainer.model.parameters())
    with algorithms(deterministic=True):  # what is not initialised is NaN
        for skipped in (1.0, 0.0):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(skipped)
            for parameter in trainer.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert torch.equal(parameters_to_vector(trainer.model.parameters()), before - 0.5)


def test_the_best_weights_are_those_that_were_evaluated_whatever_a_callback_does(build):
    def scale(factor: float):  # so that other weights are evaluated than those that are trained
        trainer.model.load_state_dict({name: factor * weight for name, weight in trainer.model.state_dict().items()})
        trainer.predict()

    scaling = [on("on_epoch_end", lambda *_: scale(0.5)), on("on_evaluate", lambda *_: scale(2))]
    trainer = build(config(early_stopping_metric="loss"), callbacks=scaling)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == min(row["val_loss"] for row in timeless_rows(trainer))


def test_a_callback_that_asks_to_evaluate_log_or_stop_within_an_epoch_is_refused(build):
    for wish in ("should_evaluate", "should_log", "should_epoch_stop"):
        asking = on("on_step_end", lambda state, control, wish=wish: setattr(control, wish, True))
        with pytest.raises(ValueError, match=r"a callback asks to .* within an epoch; .* or set max_train_images"):
            build(config(), callbacks=[asking]).train()


def test_an_optimizer_and_a_schedule_of_ones_own_are_used(build):
    class Own(StreamlinedTrainer):
        def create_optimizer(self, model=None):
            return torch.optim.Adagrad(self.model.parameters(), lr=0.5)

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = StepLR(self.optimizer, STEPS)

    trainer = build(config(), trainer_class=Own)
    trainer.train()
    assert isinstance(trainer.optimizer, torch.optim.Adagrad)
    assert [row["learning_rate"] for row in trainer.history] == pytest.approx([0.5, 0.05])


def test_a_method_that_nothing_would_call_is_refused(build):
    mine = type("Mine", (StreamlinedTrainer,), {"_get_train_sampler": lambda self, *args: None})
    with pytest.raises(ValueError, match="nothing calls _get_train_sampler; see which methods"):
        build(config(), trainer_class=mine)


@pytest.mark.parametrize(
    ("schedule", "fraction", "warmup"), [("constant", 0.3, 4), ("cosine", 0, 0), ("cosine", 0.25, 3)]
)
def test_the_learning_rate_of_each_step_is_the_schedules(schedule, fraction, warmup, build):
    rates, note = [], lambda state, control: rates.append(trainer.optimizer.param_groups[0]["lr"])
    knobs = config(num_epochs=3, learning_rate=0.02, lr_schedule=schedule, warmup_fraction=fraction)
    trainer = build(knobs, callbacks=[on("on_pre_optimizer_step", note)])
    trainer.train()
    steps = np.arange(3 * STEPS)
    after = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * (steps - warmup) / (len(steps) - warmup))) / 2}
    expected = 0.02 * np.where(steps < warmup, steps / max(warmup, 1), after[schedule])
    assert rates == pytest.approx(expected, rel=1e-9)
    assert [row["learning_rate"] for row in timeless_rows(trainer)] == pytest.approx(expected[STEPS - 1 :: STEPS])


@pytest.mark.parametrize("limit", [None, 0.05])
def test_gradients_are_clipped_only_on_request_and_their_norm_is_kept(limit, build):
    model = small_mlp()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    knobs = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": limit, "batch_size": 27}
    trainer = build(config(num_epochs=1, **knobs), model)
    trainer.train()
    update = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
    (row,) = timeless_rows(trainer)
    assert row["grad_norm"] > 0.1  # so that a limit of 0.05 has something to clip
    assert update == pytest.approx(0.5 * min(row["grad_norm"], limit or math.inf), rel=1e-3)


def test_bf16_computes_in_bfloat16_and_leaves_nothing_behind(build, tiny_data):
    trainers, dtypes = [build(config(precision=precision)) for precision in ("fp32", "bf16", "fp32")], []
    before, in_bf16, after = trainers
    in_bf16.model.classifier.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for trainer in trainers:
        trainer.evaluate()
        trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in in_bf16.model.parameters())
    assert in_bf16.predict().predictions.dtype == np.float32
    assert in_bf16.model(in_bf16.prepare_images(tiny_data.test_images, training=False)).dtype == torch.float32
    assert findings(in_bf16) != findings(before) == findings(after)
    build(config(), in_bf16.model).test()
    assert dtypes[-1] == torch.float32
    again = [build(config(precision=precision), in_bf16.model) for precision in ("fp32", "bf16")]
    for trainer, dtype in zip(again, (torch.float32, torch.bfloat16), strict=True):
        trainer.train()
        assert dtypes[-1] == dtype


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_a_compiled_network_trains_as_the_plain_one_and_later_ones_are_not_compiled(build, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # so the same bits
    captured, counters = [], torch._dynamo.utils.counters
    trainers = [build(config(torch_compile=compiled)) for compiled in (True, False)]
    for trainer in trainers:
        counters.clear()
        trainer.train()
        captured.append(counters["stats"]["calls_captured"])
    assert captured[0] > 0 == captured[1]
    compiled, plain = trainers
    assert findings(plain) == findings(compiled)


def test_without_a_checkpoint_folder_each_trainer_has_one_that_goes_with_it(build):
    trainers = [build(config()) for _ in range(2)]
    folders = [Path(trainer.args.output_dir) for trainer in trainers]
    trainers[0].train()
    assert [any(folder.glob("checkpoint-*")) for folder in folders] == [True, False]
    del trainers
    gc.collect()
    assert not any(folder.exists() for folder in folders)


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end", "on_evaluate"])
def test_a_training_is_bitwise_the_same_whatever_a_callback_evaluates(event, build):
    def measure(state, control):
        measured.append(trainer.evaluate(metric_key_prefix="own")["own_loss"])
        trainer.model.value = math.nan
        assert math.isnan(trainer.test()["test_loss"])
        trainer.model.value = 1
        if event == "on_step_end" and state.epoch == 1:  # before the epoch's own evaluation
            control.should_evaluate = control.should_log = control.should_save = True

    measured, knobs = [], config(num_epochs=4, early_stopping_patience=2, learning_rate=1e-5)
    whole, trainer = (build(knobs, small_mlp(model_class=BadLogits), callbacks=c) for c in ([], [on(event, measure)]))
    for each in (whole, trainer):
        each.model.value = 1
        each.train()
    assert findings(trainer) == findings(whole)
    assert measured[-1] == timeless_rows(trainer)[-1]["val_loss"]
