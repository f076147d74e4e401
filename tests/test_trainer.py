"""StreamlinedTrainer against scripted metrics, a plain PyTorch loop and a plain transformers.Trainer."""

import copy
import gc
import math
from dataclasses import replace
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
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback

from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, stratified_split
from lablib.data import stratified_subset
from lablib.hardware import algorithms
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


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


@pytest.fixture
def unchecked(monkeypatch):
    """No sanity check, where a test counts what a network sees."""
    monkeypatch.setattr("lablib.trainer.sanity_check", lambda trainer: None)


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
    class Keeping(TrainerCallback):
        def on_evaluate(self, args, state, control, model, **kwargs):
            weights.append(copy.deepcopy(model.state_dict()))

    sealed, weights = copy.copy(tiny_data), []
    del sealed.__dict__["test_images"], sealed.__dict__["test_labels"]
    knobs = config(num_epochs=5, early_stopping_patience=None, early_stopping_metric=metric)
    trainer = build(knobs, data=sealed, trainer_class=Scripted, callbacks=[Keeping()])
    trainer.script = script
    trainer.train()
    assert [same_bits(trainer.model.state_dict(), of_epoch) for of_epoch in weights] == [0, 1, 0, 0, 0]
    with pytest.raises(AttributeError, match="has no attribute 'test_images'"):
        trainer.test()
    trainer.data = tiny_data

    by_hand = small_mlp().eval()
    by_hand.load_state_dict(weights[1])
    with torch.no_grad():
        logits = by_hand(torch.from_numpy(normalised(tiny_data.test_images, tiny_data)).float())
    np.testing.assert_allclose(trainer.predict_test().predictions, logits.numpy(), rtol=1e-4, atol=1e-5)
    expected_loss = F.cross_entropy(logits, tiny_data.test_labels).item()
    expected_accuracy = (logits.argmax(1) == tiny_data.test_labels).double().mean().item()
    result = trainer.test()
    assert result["test_loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert result["test_accuracy"] == pytest.approx(expected_accuracy)


def test_training_images_alone_are_augmented_each_of_them_once_an_epoch(build, tiny_data, monkeypatch, unchecked):
    calls = []

    def brighten(pixels, *knobs):
        calls.append((len(pixels), knobs))
        return pixels + 255

    monkeypatch.setattr("lablib.trainer.augment", brighten)
    model, shown = watched_mlp()
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


def test_a_limit_on_the_training_images_leaves_a_stratified_part_of_them_and_all_of_the_validation(build, tiny_data):
    trainer = build(config(max_train_images=15))
    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    assert torch.equal(trainer.train_dataset.indices, stratified_subset(train, tiny_data.train_labels, 15, seed=0))
    assert torch.equal(trainer.eval_dataset.indices, validation)


def test_a_loss_that_holds_tensors_is_evaluated_over_all_images_at_once(build, tiny_data):
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    weighted = type("Weighted", (StreamlinedTrainer,), {"losses": lambda self, *batch: {"loss": criterion(*batch)}})
    trainer = build(config(num_epochs=1, batch_size=4), trainer_class=weighted)
    trainer.args.per_device_eval_batch_size = 4  # batches of 4, 4 and 1, whose class weights differ
    trainer.train()
    _, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    with torch.no_grad():
        logits = trainer.model.eval()(tiny_data.normalise(tiny_data.train_images[validation]))
    expected = F.cross_entropy(logits, tiny_data.train_labels[validation], criterion.weight)
    assert timeless_rows(trainer)[0]["val_loss"] == pytest.approx(expected.item(), abs=1e-6)


WITH_KWARGS = type("WithKwargs", (MLP,), {"forward": lambda self, images, **kwargs: MLP.forward(self, images)})


@pytest.mark.parametrize("model_class", [MLP, WITH_KWARGS])
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


def test_a_model_whose_attribute_transformers_would_write_to_is_refused(build):
    model = small_mlp()
    model.config = {"use_cache": "mine"}
    with pytest.raises(ValueError, match="transformers would write to the model's attribute `config`"):
        build(config(), model)


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
        (4, math.inf, 1, "training loss is (nan|inf) at epoch 1, step 4;"),
        (6, math.nan, 2, "training loss is nan at epoch 2, step 6;"),
        (None, math.nan, 1, "evaluation loss is nan at epoch 1; a smaller learning_rate"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_training_and_names_epoch_and_step(step, value, epochs, words, build):
    model = small_mlp(model_class=BadLogits)
    model.bad_step, model.value = step, value
    with pytest.raises(NonFiniteLossError, match=words):
        build(config(num_epochs=3), model).train()
    assert model.steps == epochs * STEPS


def test_a_test_loss_that_is_not_finite_loses_no_training(build):
    model = small_mlp(model_class=BadLogits)
    model.value = 1
    (trainer := build(config(num_epochs=1), model)).train()
    model.value = math.nan
    assert math.isnan(trainer.test()["test_loss"])


def test_augmentation_draws_again_in_each_epoch(build, unchecked):
    model, shown = watched_mlp()
    build(config(batch_size=27, rotation_degrees=30.0), model).train()
    first, second = shown[True]
    assert not np.isin(first.sum((1, 2, 3)).numpy(), second.sum((1, 2, 3)).numpy()).any()


class Noting(TrainerCallback):
    """Notes each event, when it is and what it is given."""

    def __init__(self):
        self.noted = []


for event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:

    def note(self, args, state, control, event=event, logs=(), metrics=(), **given):
        keys = {"loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy", "train_runtime"} & {*logs, *metrics}
        self.noted.append((event, state.global_step, state.epoch, sorted(given), sorted(keys)))

    setattr(Noting, event, note)


def test_a_callback_is_called_as_by_a_plain_trainer_event_by_event(build, tmp_path):
    class OwnLoss(MLP):
        def forward(self, images, labels):
            logits = super().forward(images.float())
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    in_lab, in_plain = Noting(), Noting()
    trainer = build(config(), callbacks=[in_lab])
    trainer.train()
    arguments = config().to_training_arguments(str(tmp_path / "plain"))
    arguments.per_device_eval_batch_size = len(trainer.eval_dataset)
    more = {"eval_dataset": trainer.eval_dataset, "data_collator": lambda batch: batch, "callbacks": [in_plain]}
    more |= {"compute_metrics": lambda prediction: {"accuracy": 0.5}}
    plain = transformers.Trainer(small_mlp(model_class=OwnLoss), arguments, train_dataset=trainer.train_dataset, **more)
    plain.remove_callback(transformers.PrinterCallback)
    plain.train()
    assert in_lab.noted == in_plain.noted
    assert len(in_lab.noted) > 6 * STEPS


BETAS = {"adam_beta1": 0.5, "adam_beta2": 0.75, "adam_epsilon": 1e-4}


@pytest.mark.parametrize(
    ("knobs", "optimizer"),
    [
        ({"optimizer": "sgd"}, partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)),
        ({"optimizer": "adam"}, partial(torch.optim.Adam, weight_decay=0.1)),
        ({"optimizer": "adamw"}, partial(torch.optim.AdamW, weight_decay=0.1)),
        ({"training_arguments": BETAS}, partial(torch.optim.Adam, weight_decay=0.1, betas=(0.5, 0.75), eps=1e-4)),
        ({"training_arguments": {"dataloader_num_workers": 1}}, partial(torch.optim.Adam, weight_decay=0.1)),
    ],
    ids=["sgd", "adam", "adamw", "betas", "loader's worker"],
)
def test_two_epochs_agree_with_a_plain_pytorch_loop(knobs, optimizer, build, tiny_data):
    knobs = {"learning_rate": 0.01, "weight_decay": 0.1, "early_stopping_metric": "loss", **knobs}
    trainer = build(config(**knobs, **NOTHING_RANDOM), small_mlp(dropout=0.0))
    trainer.train()
    rows = history(trainer.state.log_history)

    train, validation = stratified_split(tiny_data.train_labels, VALIDATION_SPLIT, seed=0)
    sampler = build(config()).get_train_dataloader().batch_sampler
    epochs = [[train[positions] for positions in sampler] for _ in range(2)]
    for batches in epochs:
        assert torch.equal(torch.cat(batches).sort().values, train)
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))

    images = torch.from_numpy(normalised(tiny_data.train_images, tiny_data)).float()
    labels = tiny_data.train_labels
    model = small_mlp(dropout=0.0)
    step = optimizer(model.parameters(), lr=0.01)
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
    class Averaging(TrainerCallback):  # so that other weights are evaluated than those that are trained
        def on_epoch_end(self, args, state, control, model, **kwargs):
            self.trained = copy.deepcopy(model.state_dict())
            model.load_state_dict({name: weight / 2 for name, weight in self.trained.items()})

        def on_evaluate(self, args, state, control, model, **kwargs):
            model.load_state_dict(self.trained)
            trainer.predict_test()  # an evaluation of other weights

    trainer = build(config(early_stopping_metric="loss"), callbacks=[Averaging()])
    trainer.train()
    best = min(row["val_loss"] for row in history(trainer.state.log_history))
    assert trainer.evaluate()["eval_loss"] == best


def test_a_learning_rate_that_a_callback_sets_is_refused(build):
    class Decaying(TrainerCallback):
        def on_epoch_end(self, args, state, control, optimizer, **kwargs):
            optimizer.param_groups[0]["lr"] /= 10

    with pytest.raises(
        ValueError, match=r"the learning rate was set outside the schedule, .* override create_scheduler"
    ):
        build(config(), callbacks=[Decaying()]).train()


class OwnSchedule(StreamlinedTrainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.Adagrad(self.model.parameters())

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = ReduceLROnPlateau(self.optimizer, mode="max")


def test_an_optimizer_and_a_schedule_of_ones_own_are_used_or_refused(build):
    trainer = build(config(), trainer_class=OwnSchedule)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)
    for method, kept in {"create_optimizer": "optimizer", "create_scheduler": "lr_scheduler"}.items():
        forgetful = type("Forgetful", (StreamlinedTrainer,), {method: lambda self, *args, **more: "not kept"})
        with pytest.raises(TypeError, match=rf"{method} must set self\.{kept}"):
            build(config(), trainer_class=forgetful).train()
    with pytest.raises(ValueError, match="ReduceLROnPlateau is given the validation loss; write mode='min'"):
        build(config(early_stopping_metric="loss"), trainer_class=OwnSchedule).train()


def test_a_checkpoint_of_fp16_resumes_in_another_precision(build, tmp_path):
    torch.save({"scale": 65536.0}, tmp_path / "scaler.pt")
    build(config())._load_scaler(str(tmp_path))  # upstream would look for a scaler


@pytest.mark.parametrize(
    ("schedule", "fraction", "warmup"), [("constant", 0.3, 4), ("cosine", 0, 0), ("cosine", 0.25, 3)]
)
def test_the_learning_rate_of_each_step_is_the_schedules(schedule, fraction, warmup, build):
    rates = []

    class NoteRate(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    knobs = config(num_epochs=3, learning_rate=0.02, lr_schedule=schedule, warmup_fraction=fraction)
    trainer = build(knobs, callbacks=[NoteRate()])
    trainer.train()
    steps = np.arange(3 * STEPS)
    after = {"constant": 1.0, "cosine": (1 + np.cos(np.pi * (steps - warmup) / (len(steps) - warmup))) / 2}
    expected = 0.02 * np.where(steps < warmup, steps / max(warmup, 1), after[schedule])
    assert rates == pytest.approx(expected, rel=1e-9)
    assert [row["learning_rate"] for row in timeless_rows(trainer)] == pytest.approx(expected[STEPS - 1 :: STEPS])


@pytest.mark.parametrize(("limit", "more"), [(None, {}), (0.05, {}), (None, {"max_steps": 1})])  # ends in mid-epoch
def test_gradients_are_clipped_only_on_request_and_their_norm_is_kept(limit, more, build):
    model = small_mlp()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    knobs = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": limit, "batch_size": 9 if more else 27}
    trainer = build(config(num_epochs=1, training_arguments=more, **knobs), model)
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
        trainer.train()
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in in_bf16.model.parameters())
    assert in_bf16.predict_test().predictions.dtype == np.float32
    assert in_bf16.model(in_bf16.prepare_images(tiny_data.test_images, training=False)).dtype == torch.float32
    assert same_bits(before.model.state_dict(), after.model.state_dict())
    assert not same_bits(before.model.state_dict(), in_bf16.model.state_dict())


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


def test_an_epoch_that_a_callback_breaks_off_and_evaluations_within_one_rewrite_no_epoch(build):
    class StopInEpoch3(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            broken_off.evaluate()
            control.should_training_stop = state.global_step == 2 * STEPS + 1
            control.should_evaluate = state.global_step == 1 and broken_off.asks

    knobs, calls = partial(config, **NOTHING_RANDOM), {2: [], 4: [StopInEpoch3()]}
    whole, broken_off = (build(knobs(num_epochs=n), small_mlp(dropout=0.0), callbacks=calls[n]) for n in calls)
    whole.train()
    broken_off.asks = False
    broken_off.train()
    assert timeless_rows(broken_off)[:2] == timeless_rows(whole)
    broken_off.asks = True
    with pytest.raises(ValueError, match="a callback asks to evaluate or to log within an epoch"):
        broken_off.train()
