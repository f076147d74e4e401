"""The run store: a run is trained once, kept under its identity, and loaded from then on."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import nn
from transformers import TrainerCallback

from lablib.checkpoints import check_room
from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.files import write_atomically
from lablib.identity import digest, identity
from lablib.metrics import best_row, history
from lablib.processes import num_processes
from lablib.resuming import VERSIONS
from lablib.trainer import StreamlinedTrainer


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


def run_path(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=StreamlinedTrainer
) -> Path:
    """The folder of a run: `<output_dir>/<model class>-<hash of the identity>`."""
    described = identity(build_seeded(build_model, config.seed), config, data, trainer_class)
    return Path(config.output_dir) / f"{described['model']['class']}-{digest(described)}"


def load_run(path: Path) -> Run | None:
    """A finished run, or None if it is not finished. Raises DamagedRunError if its files are not what was written."""
    try:
        result = json.loads((path / "result.json").read_bytes())
        sums = dict(result.pop("sha256"))
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{path / 'result.json'} is damaged: {error!r}") from error
    if sums.pop("result", None) != _result_digest(result):
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


def train_or_load(
    build_model: Callable[[], nn.Module],
    config: TrainingConfig,
    data: ImageData,
    *,
    trainer_class: type[StreamlinedTrainer] | partial = StreamlinedTrainer,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Run:
    """Load a finished run from the store; resume an interrupted one; train a new one.

    A trainer that needs more arguments is given as a `functools.partial` with them, which the identity includes.
    A damaged run is reported by a warning, set aside and trained again. Where another process is at the same run,
    this one waits for it and loads what it finds.
    """
    path = run_path(build_model, config, data, trainer_class)
    task = (path, build_model, config, data, trainer_class, callbacks)
    if num_processes() > 1:
        return _train_or_load_together(*task)
    if run := load_or_set_aside(path):
        return run
    with _locked(path):
        return load_or_set_aside(path) or _train(*task)


def _train_or_load_together(path: Path, build_model, config, *more) -> Run:
    """Where several processes train one run (`torchrun`), the first of them looks after the store."""
    first = config.to_training_arguments(str(path)).process_index == 0
    with _locked(path) if first else nullcontext():
        finished = [first and load_or_set_aside(path) is not None]
        torch.distributed.broadcast_object_list(finished)
        if not finished[0]:
            _train(path, build_model, config, *more)
        torch.distributed.barrier()
    return load_run(path)


def load_or_set_aside(path: Path) -> Run | None:
    """A finished run, or None; a damaged one is reported by a warning and moved out of the way."""
    try:
        run = load_run(path)
    except DamagedRunError:
        with _locked(path):
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
def _locked(path: Path):
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


def _train(path: Path, build_model, config, data, trainer_class, callbacks) -> Run | None:
    checkpoints = path / "checkpoints"
    path.mkdir(parents=True, exist_ok=True)
    model = build_seeded(build_model, config.seed)
    described = json.dumps(identity(model, config, data, trainer_class), indent=1).encode()
    trainer = trainer_class(
        model,
        config=config,
        data=data,
        callbacks=[*callbacks, _HistoryWriter(path)],
        checkpoint_dir=str(checkpoints),
        run_name=path.name,
    )
    first = trainer.is_world_process_zero()
    if first:
        for leftover in path.glob("*.partial"):  # of a process that was killed
            leftover.unlink()
        write_atomically(path / "identity.json", described)
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
    rows = history(trainer.state.log_history)
    result = _result(trainer, rows)
    if not first:
        return None
    files = {
        "model.safetensors": safetensors.torch.save(
            {name: tensor.contiguous().cpu() for name, tensor in trainer.model.state_dict().items()}
        ),
        "history.jsonl": _json_lines(rows),
        "identity.json": described,
    }
    for name, content in files.items():
        write_atomically(path / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    result["sha256"] = {"result": _result_digest(result), **sums}
    write_atomically(path / "result.json", json.dumps(result, indent=1).encode())
    shutil.rmtree(checkpoints, ignore_errors=True)
    return load_run(path)


def _result(trainer: StreamlinedTrainer, rows: list[dict]) -> dict[str, Any]:
    config = trainer.config
    best = best_row(rows, config.early_stopping_metric)
    test = trainer.test()
    return {
        "model": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "dataset": trainer.data.name,
        "seed": config.seed,
        "val_accuracy": best["val_accuracy"],
        "val_loss": best["val_loss"],
        "test_accuracy": test["test_accuracy"],
        "test_loss": test["test_loss"],
        "best_epoch": best["epoch"],
        "epochs": len(rows),
        "seconds": rows[-1]["seconds"],
        "device": trainer.args.device.type,
        "precision": trainer.environment["precision"],
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "versions": {name: trainer.environment[name] for name in VERSIONS},
    } | ({"notes": trainer.notes} if trainer.notes else {})


class _HistoryWriter(TrainerCallback):
    """Keeps history.jsonl up to date in each epoch, for whoever watches the run."""

    def __init__(self, path: Path):
        self.path = path / "history.jsonl"

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomically(self.path, _json_lines(history(state.log_history)), sync=False)


def _result_digest(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
