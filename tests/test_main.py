"""`python -m lablib`, in this process and under torchrun."""

import dataclasses
import json
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
    said = run("ResidualCNN", "--depth", "1", "--width", "4", "--shortcut", "False", "--horizontal-flip", "True")
    settings = {"num_epochs": 1, "max_train_images": 150, "device": "cpu", "horizontal_flip": True}
    config, data = TrainingConfig(**settings, output_dir=tmp_path / "runs"), load_data("digits", image_size=8)
    loaded = train_or_load(lambda: ResidualCNN(1, 4, data.image_shape, 10, shortcut=False), config, data)
    assert said == {"path": str(loaded.path), **loaded.result}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MLP", "--batch-size", "many"], "argument --batch-size: invalid int value: 'many'"),
        (["MLP", "--batch-size", "0"], "batch_size = 0: batch_size should be greater than 0"),
        (["ResidualMLP", "--shortcut", "false"], "argument --shortcut: invalid literal_eval value: 'false'"),
        (["MLP", "--telegram-chat-id", TOKEN], "telegram_chat_id: String should match"),
        (["MLP", "--lr-schedule", "linear"], "argument --lr-schedule: invalid choice: 'linear'"),
        (["MLP", "--lr", "cosine"], "unrecognized arguments: --lr cosine"),
        (["SimpleCNN", "--depth", "9"], "too small for depth 9"),
        (["MLP", "--data", "mnits"], "'mnits' is neither a known name"),
        (["MLP", *SMALL, "--learning-rate", "1e20"], "NonFiniteLossError: validation loss is"),
    ],
)
def test_what_is_not_allowed_or_fails_is_said_in_one_line_without_a_token(options, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main([*options, "--output-dir", str(tmp_path / "runs")])
    (line,) = capsys.readouterr().err.splitlines() if refused.value.code == 2 else [refused.value.code]
    assert words in line
    assert TOKEN not in line


def test_every_knob_is_an_option_with_its_comment_and_no_token_is(capsys):
    with pytest.raises(SystemExit):
        main(["SimpleCNN", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "PATIENCE epochs without improvement; None or 0: never (default: 10)" in text
    assert "--width WIDTH (default: 16)" in text
    assert "--lr-schedule {constant,cosine} cosine falls to 0" in text
    names = [field.name for field in dataclasses.fields(TrainingConfig)]
    missing = [name for name in names if f" --{name.replace('_', '-')} " not in text]
    assert missing == ["telegram_bot_token"]


def test_a_bar_shows_the_epochs_and_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(tmp_path, capsys, monkeypatch):
    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:  # the first one of the second epoch
            signal.raise_signal(signal.SIGINT)
        return training_step(self, *args, **kwargs)

    training_step = StreamlinedTrainer.training_step
    monkeypatch.setattr(StreamlinedTrainer, "training_step", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["MLP", *SMALL, "--num-epochs", "4", "--batch-size", "80", "--output-dir", str(tmp_path)])
    out, said = capsys.readouterr()
    assert out == ""
    assert said.splitlines()[-1] == "interrupted at epoch 1 of 4; run again to resume"
    assert re.search(r"1/4 epochs \[.*, loss \d\.\d{3}, validation \d+\.\d % \(MLP, seed 0\)\]", said)
    assert list(tmp_path.glob("*/checkpoints/checkpoint-3.pt"))


def test_two_processes_train_a_run_from_the_command_line_and_one_loads_it(run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lablib"]
    options = ["MLP", "--hidden-sizes", "8", "--batch-size", "64"]
    command = [*torchrun, *options, *SMALL, "--output-dir", tmp_path / "runs"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-3000:]
    (line,) = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert json.loads(line)["processes"] == 2
    assert run(*options) == json.loads(line)
