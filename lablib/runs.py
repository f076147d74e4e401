"""The run store: a finished run under its identity, which is loaded if it is what was written."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import nn

from lablib.checkpoints import check_room
from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.identity import digest, identity


class DamagedRunError(OSError):
    """A file of a finished run is missing or is not what was written."""


@dataclass(frozen=True)
class Run:
    """One finished training: its result, its history by epoch, and its best weights in `path`."""

    path: Path
    result: dict[str, Any]
    history: list[dict[str, float]]

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Put the best epoch's weights into a model of the run's architecture and return it in eval mode."""
        model.load_state_dict(safetensors.torch.load_file(self.path / "model.safetensors"))
        return model.eval()


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with the initial weights that belong to a seed; the CPU's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model()


def run_path(build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None) -> Path:
    """The folder of a run: `<output_dir>/<model class>-<hash of the identity>`; None is StreamlinedTrainer."""
    return Path(config.output_dir) / run_name(run_identity(build_model, config, data, trainer_class))


def run_identity(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None
) -> dict[str, Any]:
    """What a run is, see `lablib.identity`."""
    return identity(build_seeded(build_model, config.seed), config, data, trainer_class)


def run_name(described: dict[str, Any]) -> str:
    """The folder's name of the run that is described so."""
    return f"{described['model']['class']}-{digest(described)}"


def load_run(path: Path) -> Run | None:
    """A finished run, or None if it is not finished. Raises DamagedRunError if its files are not what was written."""
    try:
        result = json.loads((path / "result.json").read_bytes())
        sums = dict(result.pop("sha256"))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{path / 'result.json'} is damaged: {error!r}") from error
    if sums.pop("result", None) != result_digest(result):
        raise DamagedRunError(f"{path / 'result.json'} is damaged: it is not what was written")
    for name, expected in sums.items():
        try:
            content = (path / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedRunError(f"{path / name} is missing") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise DamagedRunError(f"{path / name} is damaged: it is not what was written")
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return Run(path, result, rows)


def load_or_set_aside(path: Path) -> Run | None:
    """A finished run, or None; a damaged one is reported by a warning and moved out of the way."""
    try:
        run = load_run(path)
    except DamagedRunError:
        with locked(path):
            return _load_or_rename(path)
    if run:
        shutil.rmtree(path / "checkpoints", ignore_errors=True)  # where the process ended before it could
    return run


def _load_or_rename(path: Path) -> Run | None:
    try:
        return load_run(path)  # another process may have been faster
    except DamagedRunError as error:
        number = 1
        while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
            number += 1
        path.rename(aside)
        warnings.warn(f"{error}. The run is set aside as {aside} and trained again.", stacklevel=4)
        return None


@contextmanager
def locked(path: Path):
    """Hold a run's lock; the system releases it when the process ends, however it ends."""
    check_room(path.parent, 0)
    lock = FileLock(path.with_name(path.name + ".lock"), is_singleton=True)  # one process may take it twice
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is at the run {path.name}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def result_digest(result: dict[str, Any]) -> str:
    """The checksum of a result, which stands in its file."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
