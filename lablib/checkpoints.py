"""Checkpoints that are either complete or absent, and signals that stop training after the current step."""

import io
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lablib.identity import sha256


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all, even if the process is killed. Raises OSError, naming the path."""
    partial = path.with_name(f"{path.name}.partial")  # a fixed name, so that killed processes leave at most one
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error}); fix this and run again") from error
    finally:
        partial.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint: a checksum, then the content from `torch.save`. Only the folder's newest two are kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, saved := io.BytesIO())
    write_atomically(path, sha256(saved.getvalue()).encode() + saved.getvalue())
    for old in checkpoints_in(path.parent)[2:]:
        old.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without executing any code in it. Raises OSError if it is missing or damaged."""
    try:
        checksum, saved = (content := path.read_bytes())[:64], content[64:]
        if sha256(saved).encode() != checksum:
            raise ValueError("it does not match its checksum")
        return torch.load(io.BytesIO(saved), map_location="cpu", weights_only=True)
    except Exception as error:
        raise OSError(f"{path} cannot be loaded: {type(error).__name__}: {error}") from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, unverified."""
    return sorted(folder.glob("checkpoint-*.pt"), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.split("-")[1].split(".")[0])


def delete_checkpoints(folder: Path, after: int = -1) -> None:
    """Delete a folder's checkpoints from steps later than `after`; files written by callbacks stay."""
    with suppress(OSError):  # the store may be read-only
        for path in folder.glob("checkpoint-*.pt*"):
            if _step(path) > after:
                path.unlink()
        folder.rmdir()


def contiguous_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a model's weights that are contiguous and share no memory, as safetensors requires."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}


class Interruption:
    """A context manager that records SIGINT and SIGTERM, so that the step can finish and a checkpoint be written.

    A second signal acts at once, except in a worker. A recorded signal that was not acted upon takes effect when the
    context ends. Only the main thread can handle signals. Signals that were ignored before (`nohup`) stay ignored.
    """

    parent: int | None = None  # process ID of a worker's parent; training stops when the parent ends

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)):
        self._signals, self._noted, self._before = signals, None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self.ask)
        return self

    def __exit__(self, kind, error, trace):
        self._restore_handlers()
        if self._noted == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        elif self._noted and error is None:
            raise KeyboardInterrupt

    @property
    def asked(self) -> bool:
        """Whether to stop: a signal arrived, `ask` was called, or the parent process ended."""
        if self._noted is None and self.parent is not None and os.getppid() != self.parent:
            self._noted = signal.SIGTERM
        return self._noted is not None

    def ask(self, number: int = signal.SIGINT, frame=None):
        """Ask to stop after this step; also the signal handler."""
        self._noted = number
        if self.parent is None:  # a notebook's workers get Ctrl-C, and SIGTERM soon after, when their parent ends
            self._restore_handlers()

    def leave(self):
        """Raise the exception that ends training, even if the signal reached another process."""
        raise SystemExit(128 + signal.SIGTERM) if self._noted == signal.SIGTERM else KeyboardInterrupt

    def _restore_handlers(self):
        while self._before:
            signal.signal(*self._before.popitem())
