"""The run store: a run is trained once, kept under its identity, and loaded from then on."""

import hashlib
import json
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from torch import nn
from transformers import TrainerCallback

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.files import write_atomically
from lablib.identity import digest, identity
from lablib.metrics import best_row, history
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
    path.mkdir(parents=True, exist_ok=True)
    with _lock(path):
        return load_or_set_aside(path) or _train(path, build_model, config, data, trainer_class, callbacks)


def load_or_set_aside(path: Path) -> Run | None:
    """A finished run, or None; a damaged one is reported by a warning and moved out of the way."""
    try:
        return load_run(path)
    except DamagedRunError:
        with _lock(path):
            return _load_or_rename(path)


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


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"), is_singleton=True)  # one process may take it twice


def _train(path: Path, build_model, config, data, trainer_class, callbacks) -> Run:
    path.mkdir(parents=True, exist_ok=True)
    model = build_seeded(build_model, config.seed)
    described = identity(model, config, data, trainer_class)
    write_atomically(path / "identity.json", json.dumps(described, indent=1).encode())
    checkpoints = path / "checkpoints"
    trainer = trainer_class(
        model,
        config=config,
        data=data,
        callbacks=[*callbacks, _HistoryWriter(path)],
        checkpoint_dir=str(checkpoints),
        run_name=path.name,
    )
    trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints))
    rows = history(trainer.state.log_history)
    files = {
        "model.safetensors": safetensors.torch.save(
            {name: tensor.contiguous().cpu() for name, tensor in trainer.model.state_dict().items()}
        ),
        "history.jsonl": _json_lines(rows),
        "identity.json": (path / "identity.json").read_bytes(),
    }
    for name, content in files.items():
        write_atomically(path / name, content)
    result = _result(trainer, rows)
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
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("lablib", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


class _HistoryWriter(TrainerCallback):
    """Keeps history.jsonl up to date in each epoch, for whoever watches the run."""

    def __init__(self, path: Path):
        self.path = path / "history.jsonl"

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_atomically(self.path, _json_lines(history(state.log_history)), sync=False)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json is the last of its files).

    It names the checkpoint of the best epoch by a path; that is brought up to date, as the store may have been moved.
    """
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        best = folder / Path(state["best_model_checkpoint"] or path).name
        if not (best / "model.safetensors").exists():
            continue
        write_atomically(
            path / "trainer_state.json", json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2).encode()
        )
        return str(path)
    return None


def _result_digest(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
