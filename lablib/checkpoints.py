"""Checkpoints on disk: sealed when complete, verified before use, the newest two kept."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lablib.files import sync_folder, write_atomically

MANIFEST = "manifest.json"
_PREFIX = "checkpoint-"
_LEFTOVER = "unfinished"
_SIGNS_OF_THE_DISK = ("PytorchStreamWriter", "inline_container", "iostream", "IoError", "I/O error")


class DamagedCheckpointError(OSError):
    """A checkpoint has changed since it was written, or cannot be loaded."""


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


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written before it is sealed."""
    return folder / _LEFTOVER


def discard_unfinished(folder: Path):
    """Delete what a process left behind that was killed while writing or deleting a checkpoint."""
    for path in folder.glob(f"{_LEFTOVER}*"):
        shutil.rmtree(path)


def seal(written: Path, target: Path):
    """Turn a written folder into a checkpoint: flush it, add a manifest of sizes and checksums, move it into place."""
    manifest = {}
    for path in sorted(path for path in written.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        manifest[path.relative_to(written).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_atomically(written / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(written)
    if target.exists():
        _delete(target)
    os.replace(written, target)
    sync_folder(target.parent)


def verify(checkpoint: Path):
    """Compare a checkpoint with its manifest. Raises DamagedCheckpointError, naming the file that differs."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        for name, written in manifest.items():
            path = checkpoint / name
            if (size := path.stat().st_size) != written["bytes"]:
                raise DamagedCheckpointError(f"{path} has {size} bytes and not {written['bytes']}")
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                    raise DamagedCheckpointError(f"{path} is not what was written")
    except DamagedCheckpointError:
        raise
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{error.filename} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"{checkpoint} cannot be read: {error!r}") from error


def newest_usable(folder: Path, check: Callable[[Path], None] = verify) -> Path | None:
    """The newest checkpoint that passes a check, or None; damaged ones are set aside with a warning."""
    for path in checkpoints_in(folder):
        try:
            check(path)
        except DamagedCheckpointError as error:
            aside = set_aside(path)
            warnings.warn(
                f"{path.name} cannot be used: {error}. It is set aside as {aside}; the training goes on from the "
                "checkpoint before it, or from the beginning if there is none.",
                stacklevel=2,
            )
        else:
            return path
    return None


def set_aside(checkpoint: Path) -> Path:
    """Move a checkpoint out of the way, to be looked at; returns its new path."""
    folder = checkpoint.parent.parent / "set-aside"
    folder.mkdir(exist_ok=True)
    number = 1
    while (aside := folder / f"{checkpoint.name}-{number}").exists():
        number += 1
    checkpoint.rename(aside)
    return aside


def keep_newest(folder: Path, number: int):
    """Delete all checkpoints but the newest ones."""
    for path in checkpoints_in(folder)[number:]:
        _delete(path)


def check_room(folder: Path, num_bytes: int):
    """Make a folder and check that it is writable and has room. Raises OSError with the reason and what to do."""
    what = f"the folder {folder} cannot be written to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"lablib")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free some space" if error.errno == errno.ENOSPC else "make it writable"
        raise OSError(error.errno, f"{what} ({reason}): {advice}, or write another output_dir") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {folder} has {_mebibytes(free)} free, but this training writes up to "
            f"{_mebibytes(num_bytes)}: free some space, or write another output_dir",
        )


def is_about_the_disk(error: Exception) -> bool:
    """Whether writing failed because of the disk; PyTorch and safetensors say so only in the message."""
    return isinstance(error, OSError) or any(sign in str(error) for sign in _SIGNS_OF_THE_DISK)


def describe_failed_write(error: Exception, target: Path, num_bytes: int) -> OSError:
    """The error to raise for a failed write: which checkpoint, why, what is safe, what to do."""
    free = _mebibytes(shutil.disk_usage(target.parent).free)
    return OSError(
        getattr(error, "errno", None) or errno.EIO,
        f"{target} could not be written ({error}); it takes {_mebibytes(num_bytes)}, and there is {free} of room. "
        "The checkpoints before it are whole: mend that, and run again to go on from the newest",
    )


def _delete(checkpoint: Path):
    leftover = checkpoint.with_name(f"{_LEFTOVER}-{checkpoint.name}")  # never half a checkpoint under its name
    os.replace(checkpoint, leftover)
    shutil.rmtree(leftover)


def _mebibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.3g} MiB"
