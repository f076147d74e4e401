"""`python -m lablib`, in this process and under torchrun."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from lablib import ResidualCNN, StreamlinedTrainer, TrainingConfig, load_data, train_or_load
from lablib.__main__ import main

TOKEN = "123456:" + 35 * "A"
SMALL = ["--num-epochs", "1", "--max-train-images", "150", "--device", "cpu", "--image-size", "8"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with some options, and gives what it prints last."""

    def run(*options: str) -> dict:
        main([*options, *SMALL, "--output-dir", str(tmp_path / "runs")])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def test_the_command_trains_the_run_that_the_same_config_loads(run, tmp_path):
    said = run("ResidualCNN", "--depth", "1", "--width", "4", "--shortcut", "False", "--horizontal-flip")
    knobs = TrainingConfig(
        num_epochs=1, max_train_images=150, device="cpu", horizontal_flip=True, output_dir=str(tmp_path / "runs")
    )
    data = load_data("digits", image_size=8)
    loaded = train_or_load(lambda: ResidualCNN(1, 4, data.image_shape, 10, shortcut=False), knobs, data)
    assert said == {"path": str(loaded.path), **loaded.result}
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == [loaded.path.name]


def test_unbalanced_classes_are_named(run, monkeypatch):
    monkeypatch.setattr("lablib.data.UNBALANCED", 1)
    with pytest.warns(UserWarning, match="The largest class of digits has 1 times the images of the smallest"):
        run("MLP")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MLP", "--batch-size", "many"], "batch_size = 'many': batch_size should be a valid integer"),
        (["MLP", "--horizontal-flip", "false"], "horizontal_flip = 'false': horizontal_flip should be True or False"),
        (["MLP", "--telegram-chat-id", TOKEN], "telegram_chat_id should be the number of a chat"),
        (["MLP", "--lr-schedule", "linear"], "argument --lr-schedule: invalid choice: 'linear'"),
        (["MLP", "--lr", "cosine"], "unrecognized arguments: --lr cosine"),
        (["SimpleCNN"], "are required: --depth"),
        (["SimpleCNN", "--depth", "9"], "too small for depth 9"),
        (["MLP", "--data", "mnits"], "'mnits' is neither a known name"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line_with_its_reason_and_no_token(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main([*options, "--output-dir", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()
    (line,) = (capsys.readouterr().err if refused.value.code == 2 else refused.value.code).splitlines()
    assert words in line
    assert TOKEN not in line


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--precision", "fp16", "ValueError: precision = 'fp16' needs a CUDA GPU"),
        ("--learning-rate", "1e20", "NonFiniteLossError: the evaluation loss is"),
    ],
)
def test_a_training_that_fails_says_why_in_one_line(option, value, words, run):
    with pytest.raises(SystemExit, match=rf"^python -m lablib: {words}") as caught:
        run("MLP", option, value)
    assert "\n" not in caught.value.code


def test_every_knob_is_an_option_with_its_comment_and_no_token_is(capsys):
    with pytest.raises(SystemExit):
        main(["SimpleCNN", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--early-stopping-patience VALUE epochs without improvement; None or 0: never (default: 10)" in text
    assert "--depth VALUE (required) --width VALUE (default: 16)" in text
    assert "--lr-schedule {constant,cosine} cosine falls to 0" in text
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    missing = [name for name in names if f" --{name.replace('_', '-')} " not in text]
    assert missing == ["telegram_bot_token"]


def test_a_bar_shows_the_epochs_and_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(tmp_path, capsys, monkeypatch):
    training_step = StreamlinedTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:  # the first one of the second epoch
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(StreamlinedTrainer, "training_step", interrupted)
    options = ["--num-epochs", "4", "--batch-size", "80", *SMALL[2:], "--output-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="130"):
        main(["MLP", *options])
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines()[-1] == "interrupted at epoch 1 of 4; run again to resume"
    assert re.search(r"1\.\d/4 epochs \[.*, loss \d\.\d{3}, validation \d+\.\d % \(MLP, seed 0\)\]", said)
    assert list(tmp_path.glob("*/checkpoints/checkpoint-3.pt"))


def test_two_processes_train_a_run_from_the_command_line_and_one_loads_it(run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lablib"]
    options = ["MLP", "--hidden-sizes", "8", "--batch-size", "64"]
    command = [*torchrun, *options, *SMALL, "--output-dir", tmp_path / "runs"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    together = json.loads(lines[0])
    assert together["processes"] == 2
    assert run(*options) == together
