"""What a person sees while runs are trained, on a terminal and in a log."""

import io
import os
import re
import sys
import threading
import time

import pytest

from lablib.progress import RunProgress


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def drawn(self) -> list[str]:
        """Each state that a line was given, in order."""
        return [line.strip() for line in re.split(r"\r|\n|\x1b\[A", self.getvalue()) if line.strip()]


@pytest.fixture
def streams(monkeypatch):
    """Replace stdout and stderr: (stdout, stderr), both terminals or both not."""

    def streams(terminal: bool) -> tuple[Stream, Stream]:
        out, err = Stream(terminal), Stream(terminal)
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        return out, err

    return streams


@pytest.fixture
def paths(tmp_path):
    return {f"MLP, seed {seed}": tmp_path / f"MLP-{seed}" for seed in range(3)}


def write_history(path, epochs: int, age_seconds: float = -1.0):
    """A history file as a run writes it; by default a second younger than now, as clocks of file systems are coarse."""
    path.mkdir(exist_ok=True)
    (path / "history.jsonl").write_text("".join(f'{{"epoch": {epoch + 1}}}\n' for epoch in range(epochs)))
    stamp = time.time() - age_seconds
    os.utime(path / "history.jsonl", (stamp, stamp))


def wait_for(stream: Stream, *words: str) -> str:
    """The first drawn line that has all the words."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in stream.drawn():
            if all(word in line for word in words):
                return line
        time.sleep(0.01)
    raise AssertionError(f"no line with {words} among {stream.drawn()}")


def quick(paths, num_epochs=5, **more) -> RunProgress:
    """Looks every 10 ms and may draw as often, where a log is spared by pauses of seconds."""
    progress = RunProgress(paths, num_epochs, interval_seconds=0.01, **more)
    progress.runs.mininterval = 0.0
    return progress


def test_a_log_gets_one_line_on_stdout_with_the_finished_runs_and_the_epoch_of_the_current_one(streams, paths):
    out, err = streams(terminal=False)
    with quick(paths, finished=1):
        assert "1/4" in wait_for(out, "runs")
        write_history(paths["MLP, seed 0"], 2)
        assert "1/4" in wait_for(out, "MLP, seed 0 epoch 2/5")
        write_history(paths["MLP, seed 0"], 3)
        wait_for(out, "MLP, seed 0 epoch 3/5")
        write_history(paths["MLP, seed 1"], 1)
        wait_for(out, "MLP, seed 0 epoch 3/5; MLP, seed 1 epoch 1/5")
        assert "\n" not in out.getvalue()
    assert out.getvalue().count("\n") == 1
    assert err.getvalue() == ""


def test_a_log_goes_on_showing_epochs_after_a_run_is_finished(streams, paths):
    out, _ = streams(terminal=False)
    with quick(paths) as progress:
        write_history(paths["MLP, seed 0"], 5)
        wait_for(out, "MLP, seed 0 epoch 5/5", "0/3")
        progress.finished("MLP, seed 0")
        wait_for(out, "1/3")
        write_history(paths["MLP, seed 1"], 1)
        line = wait_for(out, "MLP, seed 1 epoch 1/5")
        assert "1/3" in line
        assert "seed 0" not in line


def test_the_line_of_a_log_ends_with_all_runs_finished_and_none_running(streams, paths):
    out, _ = streams(terminal=False)
    with quick(paths) as progress:
        for name, path in paths.items():
            write_history(path, 4)
            progress.finished(name)
    assert "3/3" in out.drawn()[-1]
    assert "epoch" not in out.drawn()[-1]


def test_a_log_is_spared_by_pauses_of_seconds(streams, paths):
    out, _ = streams(terminal=False)
    with RunProgress(paths, 5, interval_seconds=0.001):
        for epochs in range(1, 6):
            write_history(paths["MLP, seed 0"], epochs)
            time.sleep(0.02)
        assert len(out.drawn()) == 1


def test_a_terminal_gets_two_bars_on_stderr(streams, paths):
    out, err = streams(terminal=True)
    with quick(paths, num_epochs=10, finished=1) as progress:
        write_history(paths["MLP, seed 0"], 2)
        assert "2/10 epochs" in wait_for(err, "MLP, seed 0: ", "20%")
        write_history(paths["MLP, seed 2"], 7)
        assert "9/20 epochs" in wait_for(err, "MLP, seed 0, MLP, seed 2: ", "45%")
        progress.finished("MLP, seed 0")
        wait_for(err, "runs", "2/4")
        assert "7/10 epochs" in wait_for(err, "MLP, seed 2: ", "70%")
    assert "\x1b[A" in err.getvalue()  # the cursor goes up from the second bar to the first
    assert "2/4" in err.drawn()[-1]
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_the_history_of_an_earlier_session_is_not_shown_as_running(terminal, streams, paths):
    write_history(paths["MLP, seed 0"], 3, age_seconds=60)
    out, err = streams(terminal)
    with quick(paths):
        write_history(paths["MLP, seed 1"], 1)
        wait_for(err if terminal else out, "MLP, seed 1")
        assert "MLP, seed 0" not in out.getvalue() + err.getvalue()
        write_history(paths["MLP, seed 0"], 4)
        wait_for(err if terminal else out, "MLP, seed 0")


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_passes_through_and_leaves_no_thread_behind(terminal, streams, paths):
    streams(terminal)
    before = set(threading.enumerate())
    watchers = []

    def fail():
        with quick(paths):
            watchers.extend(t for t in threading.enumerate() if t not in before and "TMonitor" not in repr(t))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(watchers) == 1
    assert not watchers[0].is_alive()
