"""The run store: what makes two runs the same, and what survives interruptions, damage and company."""

import contextlib
import copy
import dataclasses
import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F
from transformers import TrainerCallback

from lablib import MLP, ResidualMLP, StreamlinedTrainer, TrainingConfig
from lablib.identity import build_seeded, load_run, run_path
from lablib.runs import train_or_load

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
FILES = ["history.jsonl", "identity.json", "model.safetensors", "result.json"]

# with the mmap_mode of an experiment, whose worker processes these then are
side_by_side = joblib.Parallel(n_jobs=2, batch_size=1, mmap_mode="c")

tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)


@pytest.fixture
def config(tmp_path):
    return TrainingConfig(
        num_epochs=4, batch_size=8, validation_split=0.25, device="cpu", output_dir=str(tmp_path / "runs")
    )


@pytest.fixture
def undisturbed(config, tiny_data, tmp_path):
    """The same run in another store, where nothing happens to it."""

    def undisturbed(trainer_class=StreamlinedTrainer, **knobs):
        there = replace(config, output_dir=str(tmp_path / "undisturbed"), **knobs)
        return train_or_load(tiny_mlp, there, tiny_data, trainer_class=trainer_class)

    return undisturbed


def timeless(run):
    """All that a run found out, its weights as bytes, without what a clock adds."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return result, rows, (run.path / "model.safetensors").read_bytes()


class Scripted(StreamlinedTrainer):
    """Its validation metric by epoch is written in advance, and it keeps the weights of each epoch."""

    script = (0.5, 0.9, 0.4, 0.9)
    weights: tuple[dict, ...] = ()

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix == "eval":
            epoch = round(self.state.epoch)
            output.metrics[f"eval_{self.config.early_stopping_metric}"] = self.script[epoch - 1]
            Scripted.weights = (*Scripted.weights[: epoch - 1], copy.deepcopy(self.model.state_dict()))
        return output


class InterruptAtStep(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class NoteEpochs(TrainerCallback):
    def __init__(self):
        self.begun = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begun.append(round(state.epoch) + 1)


# Trained once


def test_a_finished_run_is_loaded_and_not_trained_again(config, tiny_data, monkeypatch):
    first = train_or_load(tiny_mlp, config, tiny_data)
    assert [row["epoch"] for row in first.history] == [1, 2, 3, 4]
    stamps = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}

    def forbidden(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(StreamlinedTrainer, "train", forbidden)
    second = train_or_load(tiny_mlp, replace(config, use_wandb=False, wandb_tags=("again",)), tiny_data)
    assert second == first
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == stamps
    with pytest.raises(AssertionError, match="trained again"):
        train_or_load(tiny_mlp, replace(config, seed=1), tiny_data)


def test_a_finished_run_keeps_its_four_files_and_no_checkpoint(config, tiny_data):
    run = train_or_load(tiny_mlp, config, tiny_data)
    assert sorted(file.name for file in run.path.iterdir()) == FILES
    assert run.path.parent == Path(config.output_dir)
    assert run.path.name.startswith("MLP-")


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_result_is_that_of_the_first_best_epoch(metric, config, tiny_data, monkeypatch):
    monkeypatch.setattr(Scripted, "script", (0.5, 0.9, 0.4, 0.9) if metric == "accuracy" else (0.5, 0.1, 0.4, 0.1))
    knobs = replace(config, early_stopping_metric=metric)
    run = train_or_load(tiny_mlp, knobs, tiny_data, trainer_class=Scripted)
    assert run.result["best_epoch"] == 2
    assert run.result["epochs"] == len(run.history) == 4
    assert run.result[f"val_{metric}"] == Scripted.script[1]
    for key in ("val_accuracy", "val_loss"):
        assert run.result[key] == run.history[1][key]
    stored = safetensors.torch.load_file(run.path / "model.safetensors")
    assert stored.keys() == Scripted.weights[1].keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in Scripted.weights[1].items())


def test_the_loaded_weights_give_the_test_accuracy_of_the_result(config, tiny_data):
    run = train_or_load(tiny_mlp, config, tiny_data)
    model = run.load_weights(tiny_mlp())
    assert not model.training
    train = tiny_data.train_images.double() / 255
    test = (tiny_data.test_images.double() / 255 - train.mean()) / train.std(correction=0)
    with torch.no_grad():
        logits = model.double()(test)
    accuracy = np.mean(logits.argmax(1).numpy() == tiny_data.test_labels.numpy())
    assert run.result["test_accuracy"] == pytest.approx(accuracy)
    assert run.result["test_loss"] == pytest.approx(F.cross_entropy(logits, tiny_data.test_labels).item(), rel=1e-5)
    assert run.result["parameters"] == 36 * 8 + 8 + 8 * 3 + 3


def test_weights_of_another_architecture_are_refused(config, tiny_data):
    run = train_or_load(tiny_mlp, config, tiny_data)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run.load_weights(MLP((9,), image_shape=(1, 6, 6), num_classes=3))


def test_building_with_a_seed_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = tiny_mlp().state_dict()
    torch.manual_seed(6)
    before = torch.random.get_rng_state()
    built = build_seeded(tiny_mlp, 5).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(built[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(build_seeded(tiny_mlp, 4).state_dict()["classifier.bias"], built["classifier.bias"])


def test_a_store_may_lie_under_a_path_with_spaces_and_letters_of_any_script(config, tiny_data, tmp_path, undisturbed):
    odd = replace(config, output_dir=str(tmp_path / "Läufe für 実験 'a' & [b]"))
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, odd, tiny_data, callbacks=(InterruptAtStep(2 * STEPS + 1),))
    run = train_or_load(tiny_mlp, odd, tiny_data)
    assert timeless(run) == timeless(undisturbed())
    assert load_run(run.path) == run


# What a run is

CHANGED = {
    "num_epochs": 5,
    "batch_size": 9,
    "learning_rate": 0.01,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
    "warmup_fraction": 0.1,
    "max_grad_norm": 1.0,
    "validation_split": 0.3,
    "max_train_images": 10,
    "early_stopping_patience": 3,
    "early_stopping_metric": "loss",
    "rotation_degrees": 0.0,
    "translation_fraction": 0.0,
    "horizontal_flip": True,
    "crop_padding": 1,
    "precision": "fp32",
    "seed": 1,
    "deterministic": True,
    "training_arguments": {"adam_beta1": 0.5},
}
INDIFFERENT = {
    "output_dir": "elsewhere",
    "checkpoint_seconds": 1.0,
    "device": "auto",
    "use_wandb": True,
    "wandb_project": "other",
    "wandb_group": "other",
    "wandb_tags": ("other",),
    "wandb_watch": True,
    "use_telegram_notifications": True,
    "telegram_additional_info": "other",
    "telegram_every_run": True,
    "telegram_bot_token": "1:other",
    "telegram_chat_id": "other",
}


def test_each_knob_either_makes_another_run_or_does_not():
    assert CHANGED.keys() | INDIFFERENT.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}


@pytest.mark.parametrize("knob", CHANGED)
def test_a_knob_that_matters_makes_another_run(knob, config, tiny_data):
    def always_the_same():
        model = tiny_mlp()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.1)
        return model

    other = replace(config, **{knob: CHANGED[knob]})
    assert run_path(always_the_same, other, tiny_data) != run_path(always_the_same, config, tiny_data)


@pytest.mark.parametrize("knob", INDIFFERENT)
def test_a_knob_that_only_says_where_and_to_whom_makes_no_other_run(knob, config, tiny_data):
    other = replace(config, **{knob: INDIFFERENT[knob]})
    assert run_path(tiny_mlp, other, tiny_data).name == run_path(tiny_mlp, config, tiny_data).name


@pytest.mark.parametrize("part", ["train_images", "test_images", "train_labels", "test_labels"])
def test_a_single_pixel_or_label_makes_another_run(part, config, tiny_data):
    tensor = getattr(tiny_data, part).clone()
    tensor.view(-1)[4] = (tensor.view(-1)[4] + 1) % 3
    other = replace(tiny_data, **{part: tensor})
    same = replace(tiny_data, **{part: getattr(tiny_data, part).clone()})
    assert run_path(tiny_mlp, config, other) != run_path(tiny_mlp, config, tiny_data)
    assert run_path(tiny_mlp, config, same) == run_path(tiny_mlp, config, tiny_data)


class WithFunction(MLP):
    def __init__(self, activation=torch.relu):
        super().__init__((8,), image_shape=(1, 6, 6), num_classes=3)
        self.activation = activation


def net(forward=None, base=tiny_mlp.func):
    """A class as a notebook may define it, always of the same name."""
    cls = type("Net", (base,), {"forward": forward} if forward else {})
    return lambda: cls((8,), image_shape=(1, 6, 6), num_classes=3)


def with_last_layer(*, constant: float):
    model = tiny_mlp()
    nn.init.constant_(model.classifier.weight, constant)
    return model


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: MLP((8,)), lambda: MLP((9,))),
        (lambda: MLP((8,)), lambda: MLP((8,), dropout=0.2)),
        (lambda: MLP((8,)), lambda: ResidualMLP((8,))),
        (lambda: ResidualMLP((8,)), lambda: ResidualMLP((8,), shortcut=False)),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU()), lambda: nn.Sequential(nn.Flatten(), nn.Tanh())),
        (lambda: nn.Sequential(nn.Linear(2, 2)), lambda: nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)),
        (partial(with_last_layer, constant=0.0), partial(with_last_layer, constant=0.1)),
        (net(lambda self, x: MLP.forward(self, x) * 2), net(lambda self, x: MLP.forward(self, x) * 3)),
        (
            net(base=type("Base", (MLP,), {"forward": lambda self, x: MLP.forward(self, x) * 2})),
            net(base=type("Base", (MLP,), {"forward": lambda self, x: MLP.forward(self, x) * 3})),
        ),
        (lambda: WithFunction(torch.relu), lambda: WithFunction(torch.tanh)),
    ],
    ids=["width", "dropout", "class", "shortcut", "layer", "frozen", "initial", "forward", "inherited", "function"],
)
def test_another_model_makes_another_run(one, other, config, tiny_data):
    assert run_path(one, config, tiny_data) != run_path(other, config, tiny_data)
    assert run_path(one, config, tiny_data) == run_path(one, config, tiny_data)


@pytest.mark.parametrize(
    "written_out",
    [
        lambda: MLP((128, 64), 0.1, (1, 28, 28), 10),
        lambda: MLP(num_classes=10, image_shape=[1, 28, 28], dropout=0.1, hidden_sizes=[128, 64]),
        partial(MLP, hidden_sizes=(128, 64)),
    ],
)
def test_defaults_that_are_written_out_make_no_other_run(written_out, config, digits):
    assert run_path(written_out, config, digits) == run_path(MLP, config, digits)
    full = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    assert run_path(MLP, TrainingConfig(**full), digits) == run_path(MLP, config, digits)


def test_a_run_is_found_again_by_another_process(config, tiny_data):
    class Net(MLP):
        def forward(self, images):
            sign = 1 if images.device.type in {"cpu", "cuda", "mps", "xpu", "hpu", "npu", "tpu", "meta"} else -1
            return sign * super().forward(images)

    def path():
        return os.getpid(), run_path(lambda: Net((8,), image_shape=(1, 6, 6), num_classes=3), config, tiny_data)

    # a set of strings has another order in each process
    (process, there), _ = side_by_side(joblib.delayed(path)() for _ in range(2))
    assert process != os.getpid()
    assert there == path()[1]


def test_another_trainer_makes_another_run(config, tiny_data):
    assert run_path(tiny_mlp, config, tiny_data, Scripted) != run_path(tiny_mlp, config, tiny_data)


# Interruptions


@pytest.mark.parametrize(
    ("step", "begun"),
    [(1, [1, 2, 3, 4]), (STEPS, [1, 2, 3, 4]), (2 * STEPS, [2, 3, 4]), (2 * STEPS + 3, [3, 4])],
    ids=["in the first epoch", "before the first checkpoint", "before the second", "in the third epoch"],
)
def test_an_interrupted_run_goes_on_where_it_was_and_ends_like_an_undisturbed_one(
    step, begun, config, tiny_data, undisturbed
):
    epochs = NoteEpochs()
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(InterruptAtStep(step),))
    assert load_run(run_path(tiny_mlp, config, tiny_data)) is None
    torch.rand(3)
    run = train_or_load(tiny_mlp, config, tiny_data, callbacks=(epochs,))
    assert epochs.begun == begun
    assert timeless(run) == timeless(undisturbed())
    assert sorted(file.name for file in run.path.iterdir()) == FILES


@pytest.mark.parametrize("lost", ["trainer_state.json", "half of trainer_state.json"])
def test_a_checkpoint_that_was_half_written_is_passed_over(lost, config, tiny_data, undisturbed):
    epochs = NoteEpochs()
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(InterruptAtStep(3 * STEPS + 1),))
    newest = run_path(tiny_mlp, config, tiny_data) / "checkpoints" / f"checkpoint-{3 * STEPS}"
    state = newest / "trainer_state.json"
    if lost == "trainer_state.json":
        state.unlink()
        (newest / "model.safetensors").write_bytes(b"")
    else:
        state.write_bytes(state.read_bytes()[:50])
    with pytest.warns(
        UserWarning,
        match=rf"checkpoint-{3 * STEPS} cannot be used: .*(trainer_state.json|model.safetensors) has .*set aside",
    ):
        run = train_or_load(tiny_mlp, config, tiny_data, callbacks=(epochs,))
    assert epochs.begun == [3, 4]
    assert (run.path / "set-aside" / f"checkpoint-{3 * STEPS}-1").is_dir()
    assert timeless(run) == timeless(undisturbed())


def interrupted_before_the_test(monkeypatch, *args, **kwargs):
    """A run whose training is over, and whose result is not written yet."""

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamlinedTrainer, "test", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_or_load(*args, **kwargs)


def test_a_run_that_is_interrupted_after_its_last_epoch_ends_the_same(config, tiny_data, undisturbed, monkeypatch):
    interrupted_before_the_test(monkeypatch, tiny_mlp, config, tiny_data, trainer_class=Scripted)
    run = train_or_load(tiny_mlp, config, tiny_data, trainer_class=Scripted)
    assert timeless(run) == timeless(undisturbed(Scripted))


def test_a_run_that_is_interrupted_after_its_early_stop_ends_the_same(config, tiny_data, undisturbed, monkeypatch):
    monkeypatch.setattr(Scripted, "script", (0.5, 0.4, 0.9, 0.9))
    knobs = replace(config, early_stopping_patience=1)
    interrupted_before_the_test(monkeypatch, tiny_mlp, knobs, tiny_data, trainer_class=Scripted)
    run = train_or_load(tiny_mlp, knobs, tiny_data, trainer_class=Scripted)
    assert timeless(run) == timeless(undisturbed(Scripted, early_stopping_patience=1))


def test_a_store_may_be_moved_between_interruption_and_resumption(
    config, tiny_data, undisturbed, monkeypatch, tmp_path
):
    interrupted_before_the_test(monkeypatch, tiny_mlp, config, tiny_data, trainer_class=Scripted)
    moved = replace(config, output_dir=str(tmp_path / "moved"))
    shutil.move(config.output_dir, moved.output_dir)
    run = train_or_load(tiny_mlp, moved, tiny_data, trainer_class=Scripted)
    assert timeless(run) == timeless(undisturbed(Scripted))


# Damage


def flip_a_byte(file: Path):
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-20])


def another_accuracy(file: Path):
    result = json.loads(file.read_bytes())
    file.write_text(json.dumps({**result, "test_accuracy": 0.123}))


DAMAGES = [
    ("model.safetensors", flip_a_byte),
    ("model.safetensors", cut_short),
    ("model.safetensors", Path.unlink),
    ("history.jsonl", flip_a_byte),
    ("history.jsonl", cut_short),
    ("history.jsonl", Path.unlink),
    ("identity.json", flip_a_byte),
    ("identity.json", Path.unlink),
    ("result.json", cut_short),
    ("result.json", lambda file: file.write_bytes(b"")),
    ("result.json", lambda file: file.write_bytes(b"\xff\xfe\x00")),
    ("result.json", lambda file: file.write_text("{}")),
    ("result.json", lambda file: file.write_text("null")),
    ("result.json", lambda file: file.write_text("[]")),
    ("result.json", lambda file: file.write_text('{"sha256": null}')),
    ("result.json", another_accuracy),
]
DAMAGE_IDS = [
    "flip",
    "cut",
    "lost",
    "flip",
    "cut",
    "lost",
    "flip",
    "lost",
    "cut",
    "empty",
    "binary",
    "{}",
    "null",
    "[]",
    "no sums",
    "edit",
]


@pytest.mark.parametrize(
    ("name", "damage"), DAMAGES, ids=[f"{d}-{n}" for (n, _), d in zip(DAMAGES, DAMAGE_IDS, strict=True)]
)
def test_a_damaged_run_is_reported_set_aside_and_trained_again(name, damage, config, tiny_data):
    before = train_or_load(tiny_mlp, config, tiny_data)
    expected = timeless(before)
    damage(before.path / name)
    damaged = {file.name: file.read_bytes() for file in before.path.iterdir()}

    with pytest.warns(UserWarning, match="The run is set aside as ") as caught:
        after = train_or_load(tiny_mlp, config, tiny_data)
    (message,) = [str(warning.message) for warning in caught]
    assert str(before.path / name) in message
    aside = before.path.with_name(before.path.name + ".damaged-1")
    assert str(aside) in message
    assert {file.name: file.read_bytes() for file in aside.iterdir()} == damaged
    assert timeless(after) == expected
    assert load_run(after.path) == after


def test_each_damaged_run_is_kept_under_a_number_of_its_own(config, tiny_data):
    for number in (1, 2):
        run = train_or_load(tiny_mlp, config, tiny_data)
        cut_short(run.path / "history.jsonl")
        with pytest.warns(UserWarning, match=rf"damaged-{number} and trained again"):
            train_or_load(tiny_mlp, config, tiny_data)
    assert len(list(Path(config.output_dir).glob("*.damaged-*"))) == 2


# Whole or not at all


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_put_in_its_place_leaves_no_result(name, config, tiny_data, undisturbed, monkeypatch):
    path = run_path(tiny_mlp, config, tiny_data)
    put = os.replace

    def full(source, target):
        if Path(target).name == name and Path(target).parent == path:
            raise OSError(28, "No space left on device")
        return put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            train_or_load(tiny_mlp, config, tiny_data)
    assert not (path / "result.json").exists()
    assert load_run(path) is None
    run = train_or_load(tiny_mlp, config, tiny_data)
    assert timeless(run) == timeless(undisturbed())
    assert sorted(file.name for file in path.iterdir()) == FILES


def test_wherever_the_writing_breaks_off_no_half_file_counts(config, tiny_data, undisturbed, monkeypatch):
    path = run_path(tiny_mlp, config, tiny_data)
    calls, limit = 0, 0
    sync = os.fsync

    def break_off(descriptor):
        nonlocal calls
        calls += 1
        if calls > limit:
            with contextlib.suppress(OSError):  # a folder is not cut
                os.ftruncate(descriptor, 7)  # what a full disk or a crash may leave
            raise KeyboardInterrupt
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", break_off)
    interruptions, run = 0, None
    while run is None and limit < 100:
        calls = 0
        try:
            run = train_or_load(tiny_mlp, config, tiny_data)
        except KeyboardInterrupt:
            interruptions += 1
            limit += 2
            assert load_run(path) is None
            for file in path.glob("*.json"):
                json.loads(file.read_bytes())
            for file in path.glob("*.safetensors"):
                safetensors.torch.load_file(file)
    assert interruptions >= 4  # identity, weights, history, result
    monkeypatch.undo()
    assert timeless(run) == timeless(undisturbed())


def test_what_another_process_left_half_written_is_no_result(config, tiny_data, undisturbed):
    path = run_path(tiny_mlp, config, tiny_data)
    path.mkdir(parents=True)
    (path / "result.json.999999.partial").write_bytes(b'{"test_accuracy": 1.0, "sha256": {}}')
    assert load_run(path) is None
    run = train_or_load(tiny_mlp, config, tiny_data)
    assert timeless(run) == timeless(undisturbed())


# Company


def test_two_processes_that_want_the_same_run_train_it_once(config, tiny_data, tmp_path):
    trainings = tmp_path / "trainings"

    class Noting(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            with open(trainings, "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.3)
            return super().train(*args, **kwargs)

    def wanted(number):
        (tmp_path / f"here-{number}").touch()
        deadline = time.monotonic() + 60
        while not (tmp_path / f"here-{1 - number}").exists():
            assert time.monotonic() < deadline, "the other process does not come"
            time.sleep(0.01)
        return os.getpid(), train_or_load(tiny_mlp, config, tiny_data, trainer_class=Noting)

    both = side_by_side(joblib.delayed(wanted)(number) for number in (0, 1))
    (one_process, one), (other_process, other) = both
    assert one_process != other_process
    (trained_in,) = trainings.read_text().split()
    assert int(trained_in) in (one_process, other_process)
    assert one == other
    assert load_run(one.path) == one


def scaled(**attributes):
    return lambda: type("Net", (MLP,), attributes)((4,), image_shape=(1, 6, 6), num_classes=3)


def gained(gain: float):
    return scaled(forward=lambda self, images, gain=gain: gain * MLP.forward(self, images))


def enclosed(constant: float):
    return scaled(forward=lambda self, images: constant * MLP.forward(self, images))


def decorated(factor: str):
    body = {"2": lambda self, x: MLP.forward(self, x) * 2, "3": lambda self, x: MLP.forward(self, x) * 3}[factor]
    return scaled(forward=torch.enable_grad()(body))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (scaled(scale=1), scaled(scale=5)),
        (gained(1.0), gained(2.0)),
        (enclosed(1.0), enclosed(2.0)),
        (decorated("2"), decorated("3")),
        (scaled(half=staticmethod(lambda x: x / 2)), scaled(half=staticmethod(lambda x: x / 3))),
        (scaled(size=property(lambda self: 1)), scaled(size=property(lambda self: 2))),
        (scaled(table={"a": 1}), scaled(table={"a": 2})),
    ],
    ids=["attribute", "default", "closure", "decorated", "static", "property", "dict"],
)
def test_another_piece_of_a_notebooks_code_makes_another_run(one, other, config, tiny_data):
    assert run_path(one, config, tiny_data) != run_path(other, config, tiny_data)
    assert run_path(one, config, tiny_data) == run_path(one, config, tiny_data)


def test_without_a_trainer_it_is_the_run_of_the_usual_one(tiny_data, tmp_path):
    config = TrainingConfig(batch_size=8, output_dir=str(tmp_path))
    build = partial(MLP, (4,), image_shape=tiny_data.image_shape, num_classes=tiny_data.num_classes)
    assert run_path(build, config, tiny_data) == run_path(build, config, tiny_data, StreamlinedTrainer)
