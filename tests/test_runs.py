"""The run store: what survives interruptions, damage and company, and what is published."""

import io
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from outcomes import timeless
from scripted import At, Scripted
from torch.nn import functional as F

from lablib import MLP, StreamlinedTrainer, TrainingConfig, runs, stratified_split
from lablib.diagnostics import gradient_norms
from lablib.identity import build_seeded, run_identity, run_name
from lablib.runs import load_run, publish, train_or_load

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
FILES = ["history.jsonl", "identity.json", "measured.npz", "model.safetensors", "result.json"]

tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
CONFIG = TrainingConfig(num_epochs=4, batch_size=8, validation_split=0.25, device="cpu")


@pytest.fixture
def config(tmp_path):
    return replace(CONFIG, output_dir=str(tmp_path / "Läufe für 実験 'a' & [b]"))


@pytest.fixture(autouse=True)
def published(tmp_path, monkeypatch):
    """A folder of published runs."""
    monkeypatch.setattr(runs, "PUBLISHED", tmp_path / "published")
    return runs.PUBLISHED


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """A finished run, to be copied."""
    return train_or_load(tiny_mlp, replace(CONFIG, output_dir=str(tmp_path_factory.mktemp("runs"))), tiny_data)


def test_a_finished_run_keeps_its_files_and_is_loaded_instead_of_trained_again(config, tiny_data, monkeypatch):
    first = train_or_load(tiny_mlp, config, tiny_data)
    assert [row["epoch"] for row in first.history] == [1, 2, 3, 4]
    assert first.path.parent == Path(config.output_dir)
    assert sorted(file.name for file in first.path.iterdir()) == FILES
    stamps = {file: file.stat().st_mtime_ns for file in first.path.iterdir()}
    monkeypatch.delattr(StreamlinedTrainer, "__init__")
    assert train_or_load(tiny_mlp, replace(config, wandb_group="again"), tiny_data) == first
    assert {file: file.stat().st_mtime_ns for file in first.path.iterdir()} == stamps


def test_a_network_that_keeps_something_outside_of_its_state_dict_is_noted_and_not_loaded(config, tiny_data):
    class Scaled(MLP):  # by 5 % in the end, which is not saved
        scale = 1.0

        def forward(self, images):
            self.scale = 1.05 if self.training else self.scale
            return super().forward(images) * self.scale

    build = partial(Scaled, (8,), **tiny_mlp.keywords)
    with pytest.warns(UserWarning, match="Scaled: a new copy with the trained weights gives different logits"):
        run = train_or_load(build, config, tiny_data)
    with pytest.raises(ValueError, match=f"{run.path.name} cannot be loaded: a new copy"):
        run.load_weights(build())


def test_the_result_is_that_of_the_first_best_epoch(config, tiny_data, monkeypatch):
    monkeypatch.setattr(Scripted, "script", (0.5, 0.9, 0.4, 0.9))
    run, of_epoch_2, of_epoch_1 = (
        train_or_load(tiny_mlp, replace(config, num_epochs=epochs), tiny_data, trainer_class=Scripted)
        for epochs in (4, 2, 1)
    )
    assert (run.result["best_epoch"], run.result["epochs"], len(run.history)) == (2, 4, 4)
    assert run.result.items() >= {key: run.history[1][key] for key in ("val_accuracy", "val_loss")}.items()
    assert timeless(run)["weights"] == timeless(of_epoch_2)["weights"] != timeless(of_epoch_1)["weights"]


def test_the_loaded_weights_give_what_was_measured(finished, tiny_data):
    run, measured = finished, finished.measured()
    model = run.load_weights(tiny_mlp())
    assert not model.training
    train = tiny_data.train_images.double() / 255
    test = (tiny_data.test_images.double() / 255 - train.mean()) / train.std(correction=0)
    with torch.no_grad():
        logits = model.double()(test)
    confidence, predicted = logits.softmax(1).max(1)
    accuracy = np.mean(predicted.numpy() == tiny_data.test_labels.numpy())
    assert run.result["test_accuracy"] == pytest.approx(accuracy)
    assert run.result["test_loss"] == pytest.approx(F.cross_entropy(logits, tiny_data.test_labels).item(), rel=1e-5)
    assert run.result["parameters"] == 36 * 8 + 8 + 8 * 3 + 3
    assert measured["test_class"].tolist() == predicted.tolist()
    assert measured["test_confidence"] == pytest.approx(confidence.numpy(), abs=1e-3)
    split, _ = stratified_split(tiny_data.train_labels, 0.25, seed=0)
    batch = tiny_data.normalise(tiny_data.train_images[split]), tiny_data.train_labels[split]
    for moment, network in {"initial": build_seeded(tiny_mlp, 0), "trained": model.float()}.items():
        assert measured[f"gradient_{moment}"] == pytest.approx(gradient_norms(network, batch)["rms"], rel=1e-4)


def test_a_run_that_is_interrupted_after_its_training_and_moved_ends_the_same(config, tiny_data, monkeypatch, tmp_path):
    monkeypatch.setattr(Scripted, "script", (0.5, 0.4, 0.9, 0.9))
    knobs = replace(config, early_stopping_patience=1)
    undisturbed = train_or_load(tiny_mlp, knobs, tiny_data, trainer_class=Scripted)
    elsewhere, moved = (replace(knobs, output_dir=str(tmp_path / name)) for name in ("elsewhere", "moved"))
    with monkeypatch.context() as patch:
        patch.setattr("lablib.runs._measured", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_or_load(tiny_mlp, elsewhere, tiny_data, trainer_class=Scripted)
    shutil.move(elsewhere.output_dir, moved.output_dir)
    run = train_or_load(tiny_mlp, moved, tiny_data, trainer_class=Scripted)
    assert timeless(run) == timeless(undisturbed)


DAMAGES = {
    **{f"{name}, flipped": (name, lambda c: c[:-5] + bytes([c[-5] ^ 1]) + c[-4:]) for name in FILES},
    **{f"{name}, missing": (name, None) for name in FILES[:-1]},
    "result.json, empty": ("result.json", lambda c: b""),
    "result.json, edited": ("result.json", lambda c: c.replace(b'"test_accuracy": ', b'"test_accuracy": 1')),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_is_reported_and_trained_again(name, damage, config, tiny_data, finished):
    path = Path(shutil.copytree(finished.path, Path(config.output_dir, finished.path.name)))
    content = (path / name).read_bytes()
    (path / name).unlink()
    if damage:
        (path / name).write_bytes(damage(content))
    with pytest.warns(UserWarning, match=re.escape(f"the run {path} is damaged and does not count: ")):
        after = train_or_load(tiny_mlp, config, tiny_data)
    assert (after, timeless(after)) == (load_run(path), timeless(finished))


def test_a_published_run_is_found_without_its_weights_unless_these_are_needed(config, tiny_data, finished, published):
    assert publish(finished) == publish(finished) == published / finished.path.name
    run = train_or_load(tiny_mlp, config, tiny_data)
    assert run.path == published / finished.path.name
    assert sorted(file.name for file in run.path.iterdir()) == [name for name in FILES if name != "model.safetensors"]
    assert (run.result, run.history) == (finished.result, finished.history)
    with pytest.raises(ValueError, match=f"{run.path.name} was published without its weights; train it"):
        run.load_weights(tiny_mlp())
    assert timeless(train_or_load(tiny_mlp, config, tiny_data, weights=True)) == timeless(finished)


def test_runs_are_listed_published_and_cleaned(config, tiny_data, capsys, finished, published, monkeypatch):
    store, other = Path(config.output_dir), replace(config, seed=1)
    good, damaged, without_weights = "MLP-000000000000", "MLP-000000000001", publish(finished, store).name
    for name in (good, damaged):
        shutil.copytree(finished.path, store / name)
    os.truncate(store / damaged / "history.jsonl", 99)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, other, tiny_data, callbacks=[At(2 * STEPS + 1, Mock(side_effect=KeyboardInterrupt))])
    unfinished = run_name(run_identity(tiny_mlp, other, tiny_data))
    with pytest.warns(UserWarning, match=f"{damaged} is damaged"):
        runs.main(["list", str(store)])
    states = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:])
    assert states == {good: "True", without_weights: "True", damaged: "False", unfinished: "False"}
    runs.main(["publish", str(store)])
    assert {path.name for path in published.iterdir()} == {good, without_weights}
    for answer, held, gone in (("n", "", set()), ("y", unfinished, {damaged}), ("y", "", {damaged, unfinished})):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        with FileLock(store / f"{held}.lock"):
            runs.main(["clean", str(store)])
        assert {path.name for path in store.iterdir() if path.is_dir()} == {*states} - gone


def test_the_bar_shows_the_epochs_and_metrics_that_the_files_tell(tmp_path):
    row, history = '{"train_loss": 0.5, "val_accuracy": 0.75}\n', tmp_path / "history.jsonl"
    history.write_text(3 * row)
    with runs.progress({("MLP", 0): tmp_path}, 4, file := io.StringIO()):
        history.write_text(2 * row)  # a killed run resumes earlier
    said = file.getvalue().rpartition("\r")[2].strip()
    assert "2/4 epochs" in said
    assert said.endswith(", loss 0.500, validation 75.0 % (MLP, seed 0)]")
    assert len(said.partition(" (MLP")[0]) <= 80
