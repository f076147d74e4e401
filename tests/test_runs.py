"""The run store: what survives interruptions, damage and company, and what is published."""

import contextlib
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, runs
from lablib.identity import run_identity, run_name
from lablib.runs import clean, load_run, publish, runs_table, train_or_load

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
FILES = ["history.jsonl", "identity.json", "measured.npz", "model.safetensors", "result.json"]

# with the mmap_mode of an experiment, whose worker processes these then are
side_by_side = joblib.Parallel(n_jobs=2, batch_size=1, mmap_mode="c")

tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)


@pytest.fixture
def config(tmp_path):
    return TrainingConfig(
        num_epochs=4, batch_size=8, validation_split=0.25, device="cpu", output_dir=str(tmp_path / "runs")
    )


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """A folder of published runs."""
    monkeypatch.setattr(runs, "PUBLISHED", tmp_path / "published")
    return tmp_path / "published"


@pytest.fixture
def undisturbed(config, tiny_data, tmp_path):
    """The same run in another store, where nothing happens to it."""

    def undisturbed(trainer_class=StreamlinedTrainer, **knobs):
        there = replace(config, output_dir=str(tmp_path / "undisturbed"), **knobs)
        return train_or_load(tiny_mlp, there, tiny_data, trainer_class=trainer_class)

    return undisturbed


def path_of(config, data, trainer_class=None) -> Path:
    return Path(config.output_dir, run_name(run_identity(tiny_mlp, config, data, trainer_class)))


def timeless(run):
    """All that a run found out, its weights as bytes, without what a clock adds."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return result, rows, *((run.path / name).read_bytes() for name in ("model.safetensors", "measured.npz"))


class Scripted(StreamlinedTrainer):
    """Its validation metric by epoch is written in advance."""

    script = (0.5, 0.9, 0.4, 0.9)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix == "eval":
            output.metrics[f"eval_{self.config.early_stopping_metric}"] = self.script[round(self.state.epoch) - 1]
        return output


class Watching(TrainerCallback):
    """It changes nothing of a result."""

    def __identity__(self):
        return None


class InterruptAtStep(Watching):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Noting(Watching):
    """Notes the epochs that are begun, and keeps the weights of each."""

    def __init__(self):
        self.begun, self.weights = [], []

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.begun.append(round(state.epoch) + 1)

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.weights.append(copy.deepcopy(model.state_dict()))


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


def test_a_finished_run_keeps_its_files_and_no_checkpoint(config, tiny_data):
    run = train_or_load(tiny_mlp, config, tiny_data)
    assert sorted(file.name for file in run.path.iterdir()) == FILES
    assert run.path.parent == Path(config.output_dir)
    assert run.path.name.startswith("MLP-")


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_result_is_that_of_the_first_best_epoch(metric, config, tiny_data, monkeypatch):
    monkeypatch.setattr(Scripted, "script", (0.5, 0.9, 0.4, 0.9) if metric == "accuracy" else (0.5, 0.1, 0.4, 0.1))
    knobs = replace(config, early_stopping_metric=metric)
    noting = Noting()
    run = train_or_load(tiny_mlp, knobs, tiny_data, trainer_class=Scripted, callbacks=[noting])
    assert run.result["best_epoch"] == 2
    assert run.result["epochs"] == len(run.history) == 4
    assert run.result[f"val_{metric}"] == Scripted.script[1]
    for key in ("val_accuracy", "val_loss"):
        assert run.result[key] == run.history[1][key]
    stored = safetensors.torch.load_file(run.path / "model.safetensors")
    assert stored.keys() == noting.weights[1].keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in noting.weights[1].items())


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


def test_a_store_may_lie_under_a_path_with_spaces_and_letters_of_any_script(config, tiny_data, tmp_path, undisturbed):
    odd = replace(config, output_dir=str(tmp_path / "Läufe für 実験 'a' & [b]"))
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, odd, tiny_data, callbacks=(InterruptAtStep(2 * STEPS + 1),))
    run = train_or_load(tiny_mlp, odd, tiny_data)
    assert timeless(run) == timeless(undisturbed())
    assert load_run(run.path) == run


# Interruptions


@pytest.mark.parametrize(
    ("step", "begun"),
    [(1, [1, 2, 3, 4]), (STEPS, [1, 2, 3, 4]), (2 * STEPS, [2, 3, 4]), (2 * STEPS + 3, [3, 4])],
    ids=["in the first epoch", "before the first checkpoint", "before the second", "in the third epoch"],
)
def test_an_interrupted_run_goes_on_where_it_was_and_ends_like_an_undisturbed_one(
    step, begun, config, tiny_data, undisturbed
):
    noting = Noting()
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(InterruptAtStep(step),))
    assert load_run(path_of(config, tiny_data)) is None
    torch.rand(3)
    run = train_or_load(tiny_mlp, config, tiny_data, callbacks=(noting,))
    assert noting.begun == begun
    assert timeless(run) == timeless(undisturbed())
    assert sorted(file.name for file in run.path.iterdir()) == FILES


@pytest.mark.parametrize("lost", ["trainer_state.json", "half of trainer_state.json"])
def test_a_checkpoint_that_was_half_written_is_passed_over(lost, config, tiny_data, undisturbed):
    noting = Noting()
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(InterruptAtStep(3 * STEPS + 1),))
    newest = path_of(config, tiny_data) / "checkpoints" / f"checkpoint-{3 * STEPS}"
    state = newest / "trainer_state.json"
    if lost == "trainer_state.json":
        state.unlink()
        (newest / "model.safetensors").write_bytes(b"")
    else:
        state.write_bytes(state.read_bytes()[:50])
    with pytest.warns(
        UserWarning,
        match=rf"checkpoint-{3 * STEPS} cannot be used: .*(trainer_state.json|model.safetensors).*set aside",
    ):
        run = train_or_load(tiny_mlp, config, tiny_data, callbacks=(noting,))
    assert noting.begun == [3, 4]
    assert (run.path / "set-aside" / f"checkpoint-{3 * STEPS}-1").is_dir()
    assert timeless(run) == timeless(undisturbed())


def interrupted_before_the_test(monkeypatch, *args, **kwargs):
    """A run whose training is over, and whose result is not written yet."""

    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StreamlinedTrainer, "predict_test", interrupt)
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


def better_accuracy(file: Path):
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"test_accuracy": 0.999}))


def containing(content: bytes):
    return lambda file: file.write_bytes(content)


DAMAGES = {
    **{f"{name}, {damage.__name__}": (name, damage) for name in FILES for damage in (flip_a_byte, cut_short)},
    **{f"{name}, missing": (name, Path.unlink) for name in FILES[:-1]},
    **{
        f"result.json, {c}": (FILES[-1], containing(c)) for c in (b"", b"\xff\xfe", b"null", b"[]", b'{"sha256": null}')
    },
    "result.json, edited": ("result.json", better_accuracy),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
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


# Whole or not at all


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_put_in_its_place_leaves_no_result(name, config, tiny_data, undisturbed, monkeypatch):
    path = path_of(config, tiny_data)
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
    path = path_of(config, tiny_data)
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


# Company


def test_two_processes_that_want_the_same_run_train_it_once(config, tiny_data, tmp_path):
    trainings = tmp_path / "trainings"

    class Slow(StreamlinedTrainer):
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
        return os.getpid(), train_or_load(tiny_mlp, config, tiny_data, trainer_class=Slow)

    both = side_by_side(joblib.delayed(wanted)(number) for number in (0, 1))
    (one_process, one), (other_process, other) = both
    assert one_process != other_process
    (trained_in,) = trainings.read_text().split()
    assert int(trained_in) in (one_process, other_process)
    assert one == other
    assert load_run(one.path) == one


def test_loading_runs_does_not_import_transformers():
    code = "import sys, lablib.runs; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Callbacks


def test_callbacks_are_called_those_in_a_partial_trainer_first(config, tiny_data):
    order = []

    class Telling(Watching):
        def __init__(self, name):
            self.name = name

        def on_train_begin(self, *args, **kwargs):
            order.append(self.name)

    trainer = partial(StreamlinedTrainer, callbacks=[Telling("partial")])
    run = train_or_load(tiny_mlp, config, tiny_data, trainer_class=trainer, callbacks=[Telling("argument")])
    assert order == ["partial", "argument"]
    assert run.path == path_of(config, tiny_data, partial(StreamlinedTrainer))


# Published runs


def test_a_published_run_is_found_without_its_weights_unless_these_are_needed(config, tiny_data, tmp_path, published):
    trained = train_or_load(tiny_mlp, config, tiny_data)
    assert publish(trained) == publish(trained) == published / trained.path.name
    elsewhere = replace(config, output_dir=str(tmp_path / "elsewhere"))
    run = train_or_load(tiny_mlp, elsewhere, tiny_data)
    assert run.path == published / trained.path.name
    assert sorted(file.name for file in run.path.iterdir()) == [name for name in FILES if name != "model.safetensors"]
    assert (run.result, run.history, run.has_weights) == (trained.result, trained.history, False)
    assert all((run.measured()[name] == array).all() for name, array in trained.measured().items())
    message = f"{run.path.name} .MLP on tiny, seed 0. was published without its weights. Train it .* weights=True"
    with pytest.raises(ValueError, match=message):
        run.load_weights(tiny_mlp())
    again = train_or_load(tiny_mlp, elsewhere, tiny_data, weights=True)
    assert timeless(again) == timeless(trained)


def test_what_was_measured_is_what_the_weights_give(config, tiny_data):
    run = train_or_load(tiny_mlp, config, tiny_data)
    model, measured = run.load_weights(tiny_mlp()), run.measured()
    with torch.no_grad():
        confidence, predicted = model(tiny_data.normalise(tiny_data.test_images)).softmax(1).max(1)
    assert measured["test_class"].tolist() == predicted.tolist()
    assert measured["test_confidence"] == pytest.approx(confidence.numpy(), abs=1e-3)
    assert measured["gradient_layers"].tolist() == ["hidden.0", "classifier"]
    assert (np.stack([measured["gradient_initial"], measured["gradient_trained"]]) > 0).all()


def test_a_published_run_of_ten_thousand_test_images_takes_at_most_60_kb(config):
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (10_020, 1, 6, 6), np.uint8), np.arange(10_020) % 10  # nothing to compress
    data = ImageData.from_arrays(
        "noise", images[:20], labels[:20], images[20:], labels[20:], class_names=(*"0123456789",)
    )
    knobs = replace(config, num_epochs=60, early_stopping_patience=None, validation_split=0.5, batch_size=20)
    run = train_or_load(partial(MLP, (8,), image_shape=(1, 6, 6)), knobs, data)
    files = publish(run).iterdir()
    assert len(run.history) == 60
    assert 20_000 < sum(file.stat().st_size for file in files) <= 60_000


def test_a_run_is_published_whole_or_not_at_all(config, tiny_data, published, monkeypatch):
    run = train_or_load(tiny_mlp, config, tiny_data)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            publish(run)
    assert list(published.iterdir()) == []


def test_a_damaged_published_run_is_passed_over_and_published_again(config, tiny_data, tmp_path, published):
    target = publish(train_or_load(tiny_mlp, config, tiny_data))
    cut_short(target / "measured.npz")
    with pytest.warns(UserWarning, match=r"measured.npz is damaged.* The published run is passed over"):
        run = train_or_load(tiny_mlp, replace(config, output_dir=str(tmp_path / "elsewhere")), tiny_data)
    assert run.has_weights
    assert load_run(publish(run)).result == run.result


# List and clean


def test_runs_are_listed_with_their_states_published_and_cleaned(config, tiny_data, capsys):
    finished, published, damaged = (train_or_load(tiny_mlp, replace(config, seed=s), tiny_data) for s in range(3))
    (published.path / "model.safetensors").unlink()
    runs._write_result(published.path, published.result, {})
    cut_short(damaged.path / "history.jsonl")
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, replace(config, seed=3), tiny_data, callbacks=[InterruptAtStep(2 * STEPS + 1)])
    table = runs_table(config.output_dir).sort_values("seed")
    states = dict(zip(table["run"], table["state"], strict=True))
    interrupted = path_of(replace(config, seed=3), tiny_data).name
    expected = {finished.path.name: "finished", published.path.name: "published", damaged.path.name: "damaged"}
    assert states == expected | {interrupted: "interrupted"}
    assert table["epochs"].tolist()[:3] == [4, 4, 2]
    assert "history.jsonl is damaged" in table["notes"].str.cat()

    runs.main(["publish", config.output_dir])
    assert "1 finished runs" in capsys.readouterr().out
    runs.main(["list", config.output_dir])
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 1
    assert clean(config.output_dir, ask=lambda question: "n") == []
    with runs._locked(Path(config.output_dir, interrupted)):
        assert clean(config.output_dir, ask=lambda question: "y") == [damaged.path.name]
    runs.main(["clean", config.output_dir, "--finished", "--yes"])
    assert runs_table(config.output_dir)["state"].tolist() == ["published"]
    with pytest.raises(SystemExit):
        runs.main(["list", __file__])
