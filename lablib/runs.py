"""The run store: finished runs are loaded, interrupted ones resumed, new ones trained."""

import argparse
import copy
import io
import json
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm

from lablib.checkpoints import Interruption, contiguous_weights, delete_checkpoints, write_atomically
from lablib.config import TrainingConfig, num_processes, one_line, warn, warn_once
from lablib.data import ImageData, fixed_sample
from lablib.diagnostics import gradient_norms
from lablib.hardware import own_randomness
from lablib.identity import build_seeded, described_network, json_digest, run_identity, run_name, sha256
from lablib.metrics import are_probabilities, first_logits, summary

Key = tuple[str, int]  # a run's model and seed
PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "runs"  # runs in every checkout, without weights
_WEIGHTS = "model.safetensors"
_NOT_WHOLE = "a new copy with the trained weights gives different logits: what training changes must be in state_dict()"


@dataclass(frozen=True)
class Run:
    """A finished training; `path` has its measurements and, unless it is a published run, the best epoch's weights."""

    path: Path
    result: dict[str, Any]
    history: list[dict[str, float]] = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        return json.loads((self.path / "identity.json").read_bytes())

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Load the best epoch's weights into a model; return it in eval mode. ValueError if missing or incomplete."""
        if _NOT_WHOLE in self.result.get("notes", []):
            raise ValueError(f"the run {self.path.name} cannot be loaded: {_NOT_WHOLE}")
        if not (self.path / _WEIGHTS).exists():
            raise ValueError(f"the run {self.path.name} was published without its weights; train it with weights=True")
        model.load_state_dict(safetensors.torch.load_file(self.path / _WEIGHTS))
        return model.eval()

    def measured(self) -> dict[str, np.ndarray]:
        """Measured with the best weights: each test image's predicted class, `test_class` (int16), its probability,
        `test_confidence` (float16), and `validation_logits` (float16, images × classes) of `validation_images` (int64).
        `gradient_initial` and `gradient_trained` (float32, by layer, if any): see `diagnostics.gradient_norms`.
        """
        with np.load(self.path / "measured.npz") as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class TrainedModel:
    """The network of a finished run, loaded on demand, for example a teacher; its run identifies it."""

    run: Run
    build_model: Callable[[], nn.Module]

    def __identity__(self) -> dict[str, str]:
        return {"run": self.run.path.name}

    def load(self) -> nn.Module:
        """The network with its best weights, in eval mode. ValueError if they are missing or the code has changed."""
        model, described = described_network(self.build_model, self.run.result["seed"])
        if json_digest(described) != json_digest(self.run.identity["model"]):
            raise ValueError(f"the function that builds {described['class']} has changed since the run was trained")
        return self.run.load_weights(model)


@own_randomness()
def train_or_load(
    build_model: Callable[[], nn.Module],
    config: TrainingConfig,
    data: ImageData,
    *,
    trainer_class=None,
    callbacks: Sequence = (),
    weights: bool = False,
    identity: dict[str, Any] | None = None,
    bar: TextIO | None = None,
) -> Run:
    """Load a finished run from `output_dir` or the published ones, resume an interrupted one, or train a new one.

    `trainer_class` replaces StreamlinedTrainer: a class, or a `functools.partial` with a teacher. `weights` excludes
    published runs. A damaged run is trained again; if another process is training the run, this one waits. `bar`: a
    file for a progress bar. Raises as `run_identity` and the trainer, and RuntimeError if `identity` no longer holds.
    """
    now = run_identity(build_model, config, data, trainer_class, callbacks)
    if identity and (changed := [n for n in now if json_digest(now[n]) != json_digest(identity.get(n))]):
        advice = "restart Python if a module changed, and keep what training changes out of classes and globals"
        raise RuntimeError(f"the {' and '.join(changed)} of this run no longer match what was asked for: {advice}")
    trainer_class, callbacks = copy.deepcopy((trainer_class, callbacks)) if identity else (trainer_class, callbacks)
    path, together = Path(config.output_dir) / run_name(now), num_processes() > 1
    first = not together or config.to_training_arguments(str(path)).process_index == 0  # the arguments form the group
    key = path.name.rpartition("-")[0], config.seed
    shown = progress({key: path}, config.num_epochs, bar) if first and bar else nullcontext()
    with shown, FileLock(f"{path}.lock") if first else nullcontext():  # the system releases it when the process ends
        found = [find_run(path.name, config.output_dir, weights) if first else None]
        if together:
            torch.distributed.broadcast_object_list(found)  # fills the list in place
        if not found[0]:
            (path / "result.json").unlink(missing_ok=True)  # left by a damaged run
            _train(path, now, build_model, config, data, trainer_class, callbacks)
        if together:
            torch.distributed.barrier()
    return found[0] or load_run(path)


def attempt(key: Key, build_model, config, data, parent: int, wandb_mode="", **options):
    """Train a run of an experiment. Returns key, run, error and traceback; whatever does not apply is None."""
    Interruption.parent = parent if os.getppid() == parent else None  # a worker's training ends with its parent
    if wandb_mode and os.getpid() != parent:  # the parent may have changed it since this process began
        os.environ["WANDB_MODE"] = wandb_mode
    try:
        return key, train_or_load(build_model, config, data, **options), None, None
    except Exception as error:
        return key, None, one_line(error), traceback.format_exc(limit=-5)
    except KeyboardInterrupt:
        return key, None, None, None


def find_run(name: str, output_dir: str | Path, weights: bool = False) -> Run | None:
    """Find a finished run by name, in a store or, unless weights are needed, among the published ones; else None."""
    for folder in (output_dir,) if weights else (output_dir, PUBLISHED):
        run = load_run(Path(folder) / name)
        if run and (not weights or (run.path / _WEIGHTS).exists()):
            return run


def load_run(path: Path) -> Run | None:
    """Load a finished run; None if it is unfinished or, with a warning, if a file has changed since."""
    if not (path / "result.json").exists():
        return None
    try:
        result = json.loads((path / "result.json").read_bytes())
        written = result.pop("sha256")
        found = {name: sha256((path / name).read_bytes()) for name in written if name != "result"}
        found["result"] = json_digest(result)  # all of result.json except the checksums
        if changed := [name for name in found if found[name] != written[name]]:
            raise ValueError(f"{', '.join(changed)} changed after the run was finished")
        return Run(path, result, [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()])
    except Exception as error:
        warn_once(f"the run {path} is damaged and does not count: {one_line(error)}")
        return None


def _train(path: Path, identity, build_model, config, data, trainer_class, callbacks) -> None:
    from lablib.trainer import StreamlinedTrainer, TrainerCallback  # with transformers, which takes seconds

    class Reporter(TrainerCallback):  # lets others follow the run
        def on_evaluate(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                rows = "".join(json.dumps(row) + "\n" for row in trainer.history)
                write_atomically(path / "history.jsonl", rows.encode())

        on_train_begin = on_evaluate  # the file may be ahead of the checkpoint that a killed run resumes from

    given = trainer_class.keywords if isinstance(trainer_class, partial) else {}
    arguments = {name: model.load() for name, model in given.items() if isinstance(model, TrainedModel)}
    arguments |= {"config": config, "data": data, "callbacks": [*given.get("callbacks", ()), *callbacks, Reporter()]}
    arguments |= {"checkpoint_dir": str(path / "checkpoints"), "run_name": path.name}
    trainer = (trainer_class or StreamlinedTrainer)(build_seeded(build_model, config.seed), **arguments)
    trainer.train(resume_from_checkpoint=True)
    prediction = trainer.predict()
    if trainer.is_world_process_zero():
        files = {
            _WEIGHTS: safetensors.torch.save(contiguous_weights(trainer.model)),
            "history.jsonl": (path / "history.jsonl").read_bytes(),
            "identity.json": json.dumps(identity, indent=1).encode(),
            "measured.npz": _measured(trainer, prediction.predictions, partial(build_seeded, build_model, config.seed)),
        }
        result = {
            "model": type(trainer.model).__name__,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "dataset": data.name,
            "seed": config.seed,
            **summary(trainer.history, config.early_stopping_metric, prediction.metrics),
            "device": trainer.args.device.type,
            "precision": trainer.precision,
            "processes": trainer.args.world_size,
            "threads": torch.get_num_threads(),
            "versions": {n: trainer.environment[n] for n in ("torch", "transformers", "python", "lablib")},
            "notes": trainer.notes,
        }
        _write(path, result, files)
        delete_checkpoints(path / "checkpoints")


def _measured(trainer, logits, build: Callable[[], nn.Module]) -> bytes:
    device, train, validation = trainer.args.device, trainer.train_dataset, trainer.eval_dataset
    logits = torch.from_numpy(first_logits(logits)).double()
    confidence, predicted = (logits if are_probabilities(logits) else logits.softmax(1)).max(1)
    initial, copied = build().to(device), build().to(device)
    copied.load_state_dict(trainer.model.state_dict())
    shown = fixed_sample(len(validation), max(8, 1000 // trainer.data.num_classes))
    images = validation.__getitems__(shown)["images"].to(device)
    with torch.no_grad():
        answers, again = (first_logits(trainer.run_model(m, images)) for m in (trainer.model, copied.eval()))
    arrays = {
        "test_class": predicted.numpy().astype(np.int16),
        "test_confidence": confidence.numpy().astype(np.float16),
        "validation_images": shown.numpy(),
        "validation_logits": answers.cpu().numpy().astype(np.float16),
    }
    off = (again - answers).abs().mean() / answers.abs().mean()
    if off > (0.01 if trainer.precision == "fp32" else 0.1):  # rounding errors are far smaller
        trainer.notes.append(_NOT_WHOLE)
        warn(f"{type(copied).__name__}: {_NOT_WHOLE}")
    chosen = train.__getitems__(fixed_sample(len(train), 256))
    batch = trainer.prepare_images(chosen["images"].to(device), training=False), chosen["labels"].to(device)
    with suppress(RuntimeError):  # the model has no layers to measure
        for when, model in {"initial": initial, "trained": copied}.items():
            arrays[f"gradient_{when}"] = gradient_norms(model, batch, trainer.outputs)["rms"].to_numpy(np.float32)
    np.savez_compressed(content := io.BytesIO(), **arrays)
    return content.getvalue()


def _write(path: Path, result: dict[str, Any], files: dict[str, bytes]) -> None:
    """Write a run's files, then the result with their checksums, which marks the run as finished."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(path / name, content)
    sums = {"result": json_digest(result)} | {name: sha256(content) for name, content in files.items()}
    write_atomically(path / "result.json", json.dumps(result | {"sha256": sums}, indent=1).encode())


@contextmanager
def progress(paths: Mapping[Key, Path], num_epochs: int, file: TextIO | None = None):
    """Show one bar for all epochs of all runs; it reads the runs' files, so they may be trained anywhere."""

    def show():
        done = 0
        for (model, seed), path in paths.items():
            if (path / "result.json").exists():
                done += num_epochs  # even if it stopped early
                continue
            with suppress(OSError, ValueError, IndexError):  # nothing yet, or truncated by a power failure
                rows = [json.loads(row) for row in (path / "history.jsonl").read_text().splitlines()]
                done += len(rows)
                metrics = f"loss {rows[-1]['train_loss']:.3f}, validation {100 * rows[-1]['val_accuracy']:.1f} %"
                bar.set_postfix_str(f"{metrics} ({model}, seed {seed})", refresh=False)
        bar.update(done - bar.n)

    def watch():
        while not stop.wait(0.5):
            show()

    file = file or sys.stdout  # a notebook would show stderr as an error
    look = "{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
    pace = {"miniters": 0, "mininterval": 0.1 if file.isatty() else 10, "smoothing": 0}  # time left by mean speed
    bar = tqdm(total=num_epochs * len(paths), file=file, bar_format=look, **pace)
    show()
    bar.initial = bar.n  # epochs finished before do not count towards the speed
    stop, watcher = threading.Event(), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        show()
        bar.close()
        if isinstance(interrupt := sys.exception(), KeyboardInterrupt):  # its text ends the traceback
            interrupt.args = (f"interrupted at epoch {bar.n} of {bar.total}; run again to resume",)
            print(f"\n{interrupt}", file=file, flush=True)


def publish(run: Run, folder: Path | None = None) -> Path:
    """Copy a finished run without its weights, unless it is already published, and return the new path."""
    target = (folder or PUBLISHED) / run.path.name
    if not load_run(target):
        names = ("history.jsonl", "identity.json", "measured.npz")
        _write(target, run.result, {name: (run.path / name).read_bytes() for name in names})
    return target


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m lablib.runs list | publish | clean`"""
    parser = argparse.ArgumentParser(prog="python -m lablib.runs", description=__doc__)
    parser.add_argument("command", choices=["list", "publish", "clean"])
    parser.add_argument("output_dir", nargs="?", default="runs", type=Path, help="the run store (default: runs)")
    options = parser.parse_args(arguments)
    runs = {path: load_run(path) for path in sorted(options.output_dir.glob(f"*-{'[0-9a-f]' * 12}/"))}
    if options.command == "publish":
        for run in filter(None, runs.values()):
            print(publish(run))
    elif options.command == "clean":
        unfinished = [path for path, run in runs.items() if not run]
        print(f"{len(unfinished)} unfinished or damaged", *unfinished, sep="\n")
        if unfinished and input(f"Delete these {len(unfinished)}? [y/N] ") == "y":
            for path in unfinished:
                # not one that is being trained or was just finished; lock files stay, as a process may be waiting
                with suppress(Timeout), FileLock(f"{path}.lock", blocking=False):
                    if not load_run(path):
                        shutil.rmtree(path)
    else:
        rows = [{"run": path.name, "finished": bool(run), **(run.result if run else {})} for path, run in runs.items()]
        columns = ["run", "finished", "dataset", "seed", "epochs", "val_accuracy", "test_accuracy"]
        print(pd.DataFrame(rows, columns=columns).convert_dtypes().to_string(index=False, na_rep=""))


if __name__ == "__main__":
    main()
