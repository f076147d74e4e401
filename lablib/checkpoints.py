"""What lets a training stop at any moment: folders that are whole or absent, and signals that let a step finish."""

import errno
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from torch import nn

UNFINISHED = "unfinished"  # the folder in which a checkpoint is written before it is sealed
MANIFEST = "manifest.json"
SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PREFIX = "checkpoint-"
_SIGNS_OF_THE_DISK = ("PytorchStreamWriter", "inline_container", "iostream", "IoError", "I/O error")

_parent: int | None = None  # of a worker process, whose training ends with it


class DamagedCheckpointError(OSError):
    """A checkpoint has changed since it was written, or cannot be loaded."""


def write_atomically(path: Path, content: bytes, sync: bool = True):
    """Write a file that appears whole or not at all; `sync` waits until it is on the disk."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)


def _sync_folder(path: Path):
    if os.name == "posix":  # Windows cannot open a folder, and need not
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_room(folder: Path, num_bytes: int):
    """Make a folder and check that it is writable and has room. Raises OSError with the reason and what to do."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"lablib")
            file.flush()
            os.fsync(file.fileno())
        if (free := shutil.disk_usage(folder).free) < num_bytes:
            raise OSError(errno.ENOSPC, f"{_mib(free)} are free, but this training writes up to {_mib(num_bytes)}")
    except OSError as error:
        advice = "free some space" if error.errno == errno.ENOSPC else "make it writable"
        reason = f"the folder {folder} cannot be written to ({error.strerror or error})"
        raise OSError(error.errno, f"{reason}: {advice}, or choose another output_dir") from error


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.3g} MiB"


def contiguous_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state_dict as contiguous clones on its device, which safetensors accepts.

    It refuses tensors that share memory (one block used three times) or are not contiguous (transposed, channels last).
    Raises TypeError for an entry that is not a tensor.
    """
    weights = model.state_dict()
    for name, value in weights.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name!r} in its state_dict() is a {type(value).__name__} and not a tensor")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}


def own_memory(model: nn.Module):
    """Give expanded weights and buffers memory of their own; PyTorch can neither update nor load them otherwise."""
    for tensor in (*model.parameters(), *model.buffers()):
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, not verified."""
    numbered = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(_PREFIX)), reverse=True)


def seal(target: Path, keep: int):
    """Turn what was written in `UNFINISHED` into a checkpoint, and delete all but the newest `keep`.

    It is flushed, gets a manifest of sizes and checksums, and is moved into place.
    """
    written, manifest = target.parent / UNFINISHED / target.name, {}
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
        manifest[path.relative_to(written).as_posix()] = _fingerprint(path)
    write_atomically(written / MANIFEST, json.dumps(manifest, indent=1).encode())
    if target.exists():
        _delete(target)
    os.replace(written, target)
    _sync_folder(target.parent)
    for path in checkpoints_in(target.parent)[keep:]:
        _delete(path)


def verify(checkpoint: Path):
    """Compare a checkpoint with its manifest. Raises DamagedCheckpointError, naming the file that differs."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        changed = [name for name, written in manifest.items() if _fingerprint(checkpoint / name) != written]
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{checkpoint} cannot be read: {error}") from error
    if changed:
        raise DamagedCheckpointError(f"in {checkpoint}, {' and '.join(changed)} has changed since it was written")


def _fingerprint(path: Path) -> dict[str, int | str]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def newest_usable(folder: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest checkpoint that passes a check, or None; damaged ones are set aside with a warning."""
    for path in checkpoints_in(folder):
        try:
            check(path)
            return path
        except DamagedCheckpointError as error:
            (others := folder.parent / "set-aside").mkdir(exist_ok=True)
            places = (others / f"{path.name}-{number}" for number in count(1))
            aside = path.rename(next(place for place in places if not place.exists()))
            what = f"{path.name} cannot be used: {error}. It is set aside as {aside}; training resumes from"
            warnings.warn(f"{what} the checkpoint before it, or from the beginning if there is none.", stacklevel=2)
    return None


def discard_unfinished(folder: Path):
    """Delete what a process left behind that was killed while writing or deleting a checkpoint."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path)


def _delete(checkpoint: Path):
    leftover = checkpoint.with_name(f"{UNFINISHED}-{checkpoint.name}")  # never half a checkpoint under its name
    os.replace(checkpoint, leftover)
    shutil.rmtree(leftover)


@contextmanager
def failures_explained(target: Path, num_bytes: int):
    """Discard a checkpoint that cannot be written; if the disk is why, say which, why, what is safe, what to do."""
    try:
        yield
    except Exception as error:
        shutil.rmtree(target.parent / UNFINISHED, ignore_errors=True)
        # PyTorch and safetensors say only in the message that it is the disk
        if not isinstance(error, OSError) and not any(sign in str(error) for sign in _SIGNS_OF_THE_DISK):
            raise
        room = f"it takes {_mib(num_bytes)}, and {_mib(shutil.disk_usage(target.parent).free)} are free"
        advice = "Earlier checkpoints are intact: fix this, and run again to resume from the newest"
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"{target} could not be written ({error}); {room}. {advice}") from error


def leave_with(parent: int):
    """Let the trainings of this worker process end when its parent is gone; it has to be the parent's own child."""
    global _parent
    _parent = parent if os.getpid() != parent and os.getppid() == parent else None


class Interruption:
    """A context manager that notes SIGINT and SIGTERM, so that a step can finish and a checkpoint be written.

    SIGINT is Ctrl-C or a notebook's "interrupt the kernel"; SIGTERM comes from a shutdown or a cluster. A second signal
    acts at once, and one that was noted but not acted upon acts when the context ends. Only the main thread can handle
    signals; in another thread none is noted. Signals that are ignored (`nohup`) stay ignored.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS):
        self._signals, self._noted, self._before = signals, None, {}

    def __enter__(self):
        self._noted = None
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, trace):
        self._restore_handlers()
        if self._noted == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        if self._noted == signal.SIGINT and error is None:
            raise KeyboardInterrupt

    @property
    def asked(self) -> bool:
        """Whether to leave."""
        if self._noted is None and _parent is not None and os.getppid() != _parent:
            self._noted = signal.SIGTERM
        return self._noted is not None

    def ask(self):
        """Leave as if a person had pressed Ctrl-C."""
        self._note(self._noted or signal.SIGINT)

    def leave(self):
        """Raise what ends the training if that was asked for."""
        if self.asked:
            raise KeyboardInterrupt if self._noted == signal.SIGINT else SystemExit(128 + self._noted)

    def _note(self, number, frame=None):
        self._noted = signal.Signals(number)
        self._restore_handlers()

    def _restore_handlers(self):
        while self._before:
            signal.signal(*self._before.popitem())
