"""`python -m lablib`, in this process and under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lablib import ResidualCNN, TrainingConfig, load_data, train_or_load
from lablib.__main__ import main

SMALL = ["--num-epochs", "1", "--max-train-images", "150", "--device", "cpu", "--image-size", "8"]


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command with some options, and gives what it prints last."""

    def run(*options: str) -> dict:
        main([*options, *SMALL, "--output-dir", str(tmp_path / "runs")])
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


@pytest.fixture
def refusal(tmp_path, capsys):
    """Runs the command with options that are not allowed, and gives the line that it prints last."""

    def refusal(*options: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main([*options, "--output-dir", str(tmp_path / "runs")])
        assert exit.value.code == 2
        assert not (tmp_path / "runs").exists()
        usage, *said = capsys.readouterr().err.splitlines()
        assert usage == "usage: python -m lablib MODEL [--option VALUE ...]"
        return " ".join(said)

    return refusal


def test_the_command_trains_the_run_that_the_same_config_loads(run, tmp_path):
    said = run("ResidualCNN", "--depth", "1", "--width", "4", "--shortcut", "False", "--horizontal-flip", "True")
    knobs = TrainingConfig(
        num_epochs=1, max_train_images=150, device="cpu", horizontal_flip=True, output_dir=str(tmp_path / "runs")
    )
    data = load_data("digits", image_size=8)
    loaded = train_or_load(lambda: ResidualCNN(1, 4, data.image_shape, 10, shortcut=False), knobs, data)
    assert said == {"path": str(loaded.path), **loaded.result}
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == [loaded.path.name]


def test_a_switch_may_stand_alone(run):
    alone = run("SimpleCNN", "--depth", "1", "--width", "2", "--horizontal-flip")
    assert alone == run("SimpleCNN", "--depth", "1", "--width", "2", "--horizontal-flip", "True")
    assert alone["path"] != run("SimpleCNN", "--depth", "1", "--width", "2", "--horizontal-flip", "False")["path"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MLP", "--batch-size", "many"], "argument --batch-size: should be a valid integer"),
        (["MLP", "--optimizer", "lion"], "argument --optimizer: should be 'adam', 'adamw' or 'sgd'"),
        (["MLP", "--horizontal-flip", "maybe"], "argument --horizontal-flip: should be a valid boolean"),
        (["MLP", "--depth", "2"], "argument --depth: MLP has none"),
        (["SimpleCNN"], "SimpleCNN needs --depth"),
        (["SimpleCNN", "--depth", "9"], "too small for depth 9"),
        (["MLP", "--data", "mnits"], "'mnits' is neither a known name (digits, mnist"),
        (["VGG"], "argument model: invalid choice: 'VGG'"),
    ],
)
def test_what_is_not_allowed_is_refused_with_its_reason(refusal, options, words):
    assert words in refusal(*options)


def test_a_token_in_the_chats_place_is_refused_and_not_shown(refusal):
    token = "123456:" + 35 * "A"
    assert token not in (said := refusal("MLP", "--telegram-chat-id", token))
    assert "argument --telegram-chat-id: " in said


def test_every_knob_is_an_option_with_its_comment_and_no_token_is(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--early-stopping-patience VALUE epochs without improvement; None or 0: never (default: 10)" in text
    assert "--depth VALUE SimpleCNN, ResidualCNN (required)" in text
    assert "--width VALUE SimpleCNN, ResidualCNN (default: 16)" in text
    assert "--telegram-chat-id" in text
    assert "token VALUE" not in text


def test_ctrl_c_leaves_a_checkpoint_and_one_line_that_says_how_to_resume(tmp_path):
    options = ["--num-epochs", "400", "--early-stopping-patience", "0", *SMALL[2:], "--output-dir", str(tmp_path)]
    command = [sys.executable, "-m", "lablib", "MLP", *options]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    while process.poll() is None and not list(tmp_path.glob("*/history.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    (history,) = tmp_path.glob("*/history.jsonl")
    assert (process.returncode, out, said) == (130, "", "interrupted; run the same command again to resume\n")
    assert list(history.parent.glob("checkpoints/checkpoint-*"))


def test_two_processes_train_a_run_from_the_command_line_and_one_loads_it(run, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "lablib"]
    options = ["MLP", "--hidden-sizes", "8", "--batch-size", "64"]
    process = subprocess.run(
        [*torchrun, *options, *SMALL, "--output-dir", tmp_path / "runs"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    together = json.loads(lines[0])
    assert together["processes"] == 2
    assert run(*options) == together
