"""The run store: a finished run is loaded, an interrupted one resumed, a new one trained.

python -m lablib.runs list       what lies in runs/ and in results/runs/
python -m lablib.runs publish    copy the finished runs of runs/ to results/runs/, without their weights
python -m lablib.runs clean      delete interrupted and damaged runs, after asking; --finished: all of them
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import nn

from lablib.checkpoints import check_room, contiguous_weights, own_memory, write_atomically
from lablib.config import TrainingConfig, num_processes
from lablib.data import ImageData
from lablib.diagnostics import gradient_norms
from lablib.identity import build_seeded, run_identity, run_name
from lablib.metrics import best_row, history

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "runs"  # runs that every checkout has, without weights
_WEIGHTS = "model.safetensors"
_GRADIENT_IMAGES = 256
_COLUMNS = ["run", "state", "dataset", "seed", "epochs", "val_accuracy", "test_accuracy", "mib", "notes"]


class DamagedRunError(OSError):
    """A file of a finished run is missing or is not what was written."""


@dataclass(frozen=True)
class Run:
    """One finished training: its result, its history by epoch, and in `path` what was measured and the best weights.

    A published run has no weights.
    """

    path: Path
    result: dict[str, Any]
    history: list[dict[str, float]]

    def __identity__(self) -> str:
        return self.path.name

    @property
    def has_weights(self) -> bool:
        return (self.path / _WEIGHTS).exists()

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Put the best epoch's weights into a model of the run's architecture and return it in eval mode.

        Raises ValueError if the run was published without its weights.
        """
        if not self.has_weights:
            raise ValueError(
                f"the run {self.path.name} ({self.result['model']} on {self.result['dataset']}, seed "
                f"{self.result['seed']}) was published without its weights. Train it to have them: call experiment or "
                "train_or_load with weights=True for this network and seed"
            )
        own_memory(model)
        model.load_state_dict(safetensors.torch.load_file(self.path / _WEIGHTS))
        return model.eval()

    def measured(self) -> dict[str, np.ndarray]:
        """What was measured with the best weights.

        `test_class` (int16) and `test_confidence` (float16): the predicted class of each test image and its
        probability. `answers` (float16, images × classes): the logits of the first validation images.
        `gradient_initial`, `gradient_trained` (float32) and `gradient_layers`: see `diagnostics.gradient_norms`, the
        root mean square by layer over the first training images, before and after the training.
        """
        with np.load(self.path / "measured.npz") as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class TrainedModel:
    """The network of a finished run, loaded when it is needed: a teacher that is known by its run."""

    run: Run
    build_model: Callable[[], nn.Module]

    def __identity__(self) -> dict[str, str]:
        return {"run": self.run.path.name}

    def load(self) -> nn.Module:
        """The network with the best epoch's weights, in eval mode. Raises ValueError if they were not kept."""
        return self.run.load_weights(build_seeded(self.build_model, self.run.result["seed"]))


def train_or_load(
    build_model: Callable[[], nn.Module],
    config: TrainingConfig,
    data: ImageData,
    *,
    trainer_class=None,
    callbacks: Sequence = (),
    weights: bool = False,
    identity: dict[str, Any] | None = None,
) -> Run:
    """Load a finished run, from `output_dir` or from the published ones; resume an interrupted one; train a new one.

    `build_model` builds the network anew at each call. `trainer_class` is another trainer than StreamlinedTrainer: its
    class, or a `functools.partial` with what else it needs, such as a teacher. With `weights` a published run, which
    has none, does not count. A damaged run is reported by a warning, set aside and trained again. Where another process
    trains the same run, this one waits and loads what it finds. `identity` is what `run_identity` gave for the same
    arguments, where that is known. Raises as `run_identity` and the trainer do.
    """
    trainer_class, callbacks = separate_callbacks(trainer_class, callbacks)
    described = identity or run_identity(build_model, config, data, trainer_class, callbacks)
    name = run_name(described)
    path = Path(config.output_dir) / name
    task = (path, described, build_model, config, data, trainer_class, callbacks)
    if num_processes() > 1:
        return _train_or_load_together(weights, *task)
    if run := find_run(name, config.output_dir, weights):
        return run
    with _locked(path):
        return find_run(name, config.output_dir, weights) or _train(*task)


def find_run(name: str, output_dir: str | Path, weights: bool = False) -> Run | None:
    """A finished run by its name, from a store or, unless weights are needed, from the published ones; or None."""
    path = Path(output_dir) / name
    try:
        run = load_run(path)
    except DamagedRunError:
        with _locked(path):
            run = _load_or_set_aside(path)
    if run:
        shutil.rmtree(path / "checkpoints", ignore_errors=True)  # the process may have ended before it could
    if run or weights:
        return run
    try:
        return load_run(PUBLISHED / name)
    except DamagedRunError as error:
        warnings.warn(f"{error}. The published run is passed over.", stacklevel=3)
        return None


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
    for name, digest in sums.items():
        try:
            content = (path / name).read_bytes()
        except FileNotFoundError as error:
            raise DamagedRunError(f"{path / name} is missing") from error
        if _sha256(content) != digest:
            raise DamagedRunError(f"{path / name} is damaged: it is not what was written")
    rows = (path / "history.jsonl").read_text().splitlines()
    return Run(path, result, [json.loads(row) for row in rows])


def _load_or_set_aside(path: Path) -> Run | None:
    try:
        return load_run(path)  # another process may have been faster
    except DamagedRunError as error:
        asides = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
        aside = path.rename(next(aside for aside in asides if not aside.exists()))
        warnings.warn(f"{error}. The run is set aside as {aside} and trained again.", stacklevel=4)
        return None


@contextmanager
def _locked(path: Path):
    """Hold a run's lock; the system releases it when the process ends, however it ends."""
    check_room(path.parent, 0)
    lock = FileLock(f"{path}.lock", is_singleton=True)  # one process may take it twice
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is at the run {path.name}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def separate_callbacks(trainer_class, callbacks: Sequence) -> tuple[Any, list]:
    """The trainer without the callbacks that a `partial` of it holds, and all callbacks."""
    if not isinstance(trainer_class, partial):
        return trainer_class, list(callbacks)
    others = dict(trainer_class.keywords)
    callbacks = [*others.pop("callbacks", ()), *callbacks]
    return partial(trainer_class.func, *trainer_class.args, **others), callbacks


def _train_or_load_together(weights: bool, path: Path, described, build_model, config, *more) -> Run:
    """Where several processes train one run (`torchrun`), the first of them looks after the store."""
    first = config.to_training_arguments(str(path)).process_index == 0
    with _locked(path) if first else nullcontext():
        found = [first and find_run(path.name, config.output_dir, weights)]
        torch.distributed.broadcast_object_list(found)
        if not found[0]:
            _train(path, described, build_model, config, *more)
        torch.distributed.barrier()
    return found[0] or load_run(path)


def _train(path: Path, described, build_model, config, data, trainer_class, callbacks) -> Run | None:
    from lablib.trainer import StreamlinedTrainer  # seconds, which loading a run does without

    path.mkdir(parents=True, exist_ok=True)
    trainer = _with_teachers(trainer_class or StreamlinedTrainer)(
        build_seeded(build_model, config.seed),
        config=config,
        data=data,
        callbacks=[*callbacks, _history_writer(path)],
        checkpoint_dir=str(path / "checkpoints"),
        run_name=path.name,
    )
    identity = json.dumps(described, indent=1).encode()
    first = trainer.is_world_process_zero()
    if first:
        for leftover in path.glob("*.partial"):  # of a process that was killed
            leftover.unlink()
        write_atomically(path / "identity.json", identity)  # tells what is trained here, should it be interrupted
    initial = _gradients(trainer, "initial")
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
    rows, prediction = history(trainer.state.log_history), trainer.predict_test()
    result = _result(trainer, rows, prediction.metrics)
    if not first:
        return None
    files = {
        _WEIGHTS: safetensors.torch.save(contiguous_weights(trainer.model)),
        "history.jsonl": _json_lines(rows),
        "identity.json": identity,
        "measured.npz": _measured(trainer, prediction, initial | _gradients(trainer, "trained")),
    }
    for name, content in files.items():
        write_atomically(path / name, content)
    _write_result(path, result, {name: _sha256(content) for name, content in files.items()})
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    return load_run(path)


def _with_teachers(trainer_class):
    """A `partial` trainer with its TrainedModels loaded."""
    given = trainer_class.keywords if isinstance(trainer_class, partial) else {}
    return partial(trainer_class, **{n: model.load() for n, model in given.items() if isinstance(model, TrainedModel)})


def _result(trainer, rows: list[dict], test: dict[str, float]) -> dict[str, Any]:
    config = trainer.config
    best = best_row(rows, config.early_stopping_metric)
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
        "versions": {name: trainer.environment[name] for name in ("torch", "transformers", "python")},
    } | ({"notes": trainer.notes} if trainer.notes else {})


def _gradients(trainer, moment: str) -> dict[str, np.ndarray]:
    """`gradient_norms` of a trainer's model in its present state; nothing for a model without such layers."""
    batch = trainer.train_dataset.__getitems__(range(min(_GRADIENT_IMAGES, len(trainer.train_dataset))))
    images = trainer.prepare_images(batch["images"].to(trainer.args.device), training=False)
    with torch.random.fork_rng(devices=[]):
        try:
            table = gradient_norms(trainer.model, (images, batch["labels"].to(images.device)), trainer.outputs)
        except ValueError:
            return {}
    return {f"gradient_{moment}": table["rms"].to_numpy(np.float32), "gradient_layers": table["name"].to_numpy(str)}


def _measured(trainer, prediction, gradients: dict[str, np.ndarray]) -> bytes:
    logits = prediction.predictions
    logits = torch.from_numpy(logits[0] if isinstance(logits, tuple) else logits)
    confidence, predicted = logits.double().softmax(1).max(1)
    number = min(len(trainer.eval_dataset), max(8, 1000 // logits.shape[1]))
    _, answers, _ = trainer.prediction_step(trainer.model, trainer.eval_dataset.__getitems__(range(number)), False)
    answers = answers[0] if isinstance(answers, tuple) else answers
    content = io.BytesIO()
    np.savez_compressed(
        content,
        test_class=predicted.numpy().astype(np.int16),
        test_confidence=confidence.numpy().astype(np.float16),
        answers=answers.float().cpu().numpy().astype(np.float16),
        **gradients,
    )
    return content.getvalue()


def _write_result(path: Path, result: dict[str, Any], sums: dict[str, str]) -> None:
    """What makes a run a finished one, so that it is written last."""
    content = result | {"sha256": {"result": _result_digest(result), **sums}}
    write_atomically(path / "result.json", json.dumps(content, indent=1).encode())


def _result_digest(result: dict[str, Any]) -> str:
    return _sha256(json.dumps(result, sort_keys=True).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _history_writer(path: Path):
    """A callback that keeps history.jsonl up to date in each epoch, for whoever watches the run."""
    from transformers import TrainerCallback

    class HistoryWriter(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                write_atomically(path / "history.jsonl", _json_lines(history(state.log_history)), sync=False)

    return HistoryWriter()


def publish(run: Run, folder: Path | None = None) -> Path:
    """Copy a finished run without its weights, whole or not at all, unless it is there already; its new place."""
    folder = folder or PUBLISHED
    target, beside = folder / run.path.name, folder / f".{run.path.name}.{os.getpid()}"
    try:
        if load_run(target):
            return target
    except DamagedRunError:
        shutil.rmtree(target)
    sums = json.loads((run.path / "result.json").read_bytes())["sha256"]
    sums = {name: digest for name, digest in sums.items() if name not in ("result", _WEIGHTS)}
    beside.mkdir(parents=True)
    try:
        for name in sums:
            shutil.copyfile(run.path / name, beside / name)
        _write_result(beside, run.result, sums)
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def runs_table(output_dir: str | Path) -> pd.DataFrame:
    """One row a run of a store; accuracies are fractions.

    The state is "finished", "published" (finished, without weights), "training" (a process holds its lock),
    "interrupted" (it resumes when it is asked for again), "damaged" (`notes` says why) or "set aside" (a damaged one
    that was trained again). Raises NotADirectoryError if `output_dir` is a file.
    """
    store = Path(output_dir)
    if store.is_file():
        raise NotADirectoryError(f"{store} is a file; a run store is a folder, such as runs")
    rows = []
    for path in sorted({file.parent for file in store.glob(f"*-{'[0-9a-f]' * 12}*/*.json")}):
        held = _is_held(path)  # asked first: a run that ends in between is then finished
        row = {"run": path.name, "mib": sum(file.stat().st_size for file in path.rglob("*")) / 2**20} | _found(path)
        rows.append(row | ({"state": "training"} if held and row["state"] == "interrupted" else {}))
    return pd.DataFrame(rows, columns=_COLUMNS)


def _found(path: Path) -> dict[str, Any]:
    """The state of a run that no process trains, and what is known of it."""
    if ".damaged-" in path.name:
        return {"state": "set aside", "notes": ""}
    try:
        if run := load_run(path):
            state = "finished" if run.has_weights else "published"
            return run.result | {"state": state, "notes": "; ".join(run.result.get("notes", []))}
        described, rows = json.loads((path / "identity.json").read_bytes()), path / "history.jsonl"
        epochs = len(rows.read_bytes().splitlines()) if rows.exists() else 0
        known = {"dataset": described["data"][0], "seed": described["config"].get("seed", 0), "epochs": epochs}
        return known | {"state": "interrupted", "notes": ""}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {"state": "damaged", "notes": str(error)}


def _is_held(path: Path) -> bool:
    try:
        with FileLock(f"{path}.lock", blocking=False) if Path(f"{path}.lock").exists() else nullcontext():
            return False
    except (Timeout, OSError):  # held, or another user's
        return True


def clean(output_dir: str | Path, finished: bool = False, ask: Callable[[str], str] = input) -> list[str]:
    """List the interrupted, damaged and set-aside runs of a store, delete them if `ask` answers yes, and return them.

    With `finished` the finished ones too. A run in training stays, and so do the lock files: they are empty, and
    a process that waits for one would not notice that another has been made.
    """
    unwanted = {"interrupted", "damaged", "set aside"} | ({"finished"} if finished else set())
    table = runs_table(output_dir)
    table = table[table["state"].isin(unwanted)]
    print(table[["run", "state", "epochs", "mib"]].to_string(index=False))
    question = f"Delete these {len(table)}, {table['mib'].sum():.1f} MiB? [y/N] "
    gone = []
    for name in table["run"] if len(table) and ask(question).strip().lower() in ("y", "yes") else ():
        path = Path(output_dir, name)
        try:
            with FileLock(f"{path}.lock", blocking=False):
                if _found(path)["state"] in unwanted:  # still
                    shutil.rmtree(path)
                    gone.append(name)
        except (Timeout, OSError) as error:
            print(f"{name} is left alone: {error}")
    print(f"{len(gone)} of {len(table)} deleted")
    return gone


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m lablib.runs", description="The run store.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in {
        "list": "what lies in a store, and what is published",
        "publish": "copy the finished runs to results/runs/, without their weights",
        "clean": "delete interrupted and damaged runs, after asking",
    }.items():
        command = commands.add_parser(name, help=what, description=what)
        command.add_argument("output_dir", nargs="?", default="runs", help="the run store (runs)")
    command.add_argument("--finished", action="store_true", help="delete finished runs too")
    command.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    try:
        table = runs_table(options.output_dir)
    except NotADirectoryError as error:
        parser.error(str(error))
    if options.command == "list":
        print(pd.concat([table, runs_table(PUBLISHED)]).to_string(index=False))
    elif options.command == "clean":
        clean(options.output_dir, options.finished, (lambda _: "yes") if options.yes else input)
    else:
        finished = table.loc[table["state"] == "finished", "run"]
        for name in finished:
            publish(load_run(Path(options.output_dir, name)))
        print(f"{len(finished)} finished runs of {options.output_dir} are in {PUBLISHED}")


if __name__ == "__main__":
    main(sys.argv[1:])
