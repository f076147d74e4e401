"""One run, trained into the run store: begun, resumed, or loaded where it is finished."""

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import TrainerCallback

from lablib.checkpoints import contiguous_weights
from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.files import write_atomically
from lablib.identity import identity
from lablib.metrics import best_row, history
from lablib.processes import num_processes
from lablib.resuming import VERSIONS
from lablib.runs import Run, build_seeded, load_or_set_aside, load_run, locked, result_digest, run_path
from lablib.trainer import StreamlinedTrainer


def train_or_load(
    build_model: Callable[[], nn.Module],
    config: TrainingConfig,
    data: ImageData,
    *,
    trainer_class: type[StreamlinedTrainer] | partial | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
) -> Run:
    """Load a finished run from the store; resume an interrupted one; train a new one.

    `trainer_class` is another trainer than StreamlinedTrainer: its class, or a `functools.partial` with what else it
    needs, which the identity includes. A damaged run is reported by a warning, set aside and trained again. Where
    another process is at the same run, this one waits for it and loads what it finds.
    """
    path = run_path(build_model, config, data, trainer_class)
    task = (path, build_model, config, data, trainer_class, callbacks)
    if num_processes() > 1:
        return _train_or_load_together(*task)
    if run := load_or_set_aside(path):
        return run
    with locked(path):
        return load_or_set_aside(path) or _train(*task)


def _train_or_load_together(path: Path, build_model, config, *more) -> Run:
    """Where several processes train one run (`torchrun`), the first of them looks after the store."""
    first = config.to_training_arguments(str(path)).process_index == 0
    with locked(path) if first else nullcontext():
        finished = [first and load_or_set_aside(path) is not None]
        torch.distributed.broadcast_object_list(finished)
        if not finished[0]:
            _train(path, build_model, config, *more)
        torch.distributed.barrier()
    return load_run(path)


def _train(path: Path, build_model, config, data, trainer_class, callbacks) -> Run | None:
    checkpoints = path / "checkpoints"
    path.mkdir(parents=True, exist_ok=True)
    model = build_seeded(build_model, config.seed)
    described = json.dumps(identity(model, config, data, trainer_class), indent=1).encode()
    trainer = (trainer_class or StreamlinedTrainer)(
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
        "model.safetensors": safetensors.torch.save(contiguous_weights(trainer.model)),
        "history.jsonl": _json_lines(rows),
        "identity.json": described,
    }
    for name, content in files.items():
        write_atomically(path / name, content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    result["sha256"] = {"result": result_digest(result), **sums}
    write_atomically(path / "result.json", json.dumps(result, indent=1).encode())
    shutil.rmtree(checkpoints, ignore_errors=True)
    return load_run(path)


def _result(trainer: StreamlinedTrainer, rows: list[dict]) -> dict[str, Any]:
    config = trainer.config
    best = best_row(rows, config.early_stopping_metric)
    test = trainer.final_test()
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


def _json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
