"""The run store: a finished run is loaded, an interrupted one resumed, a new one trained."""

import argparse
import copy
import io
import json
import os
import shutil
import sys
import threading
import time
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

from lablib.checkpoints import EPOCHS, Interruption, contiguous_weights, delete_checkpoints, write_atomically
from lablib.config import TrainingConfig, num_processes, one_line, warn
from lablib.data import ImageData, fixed_sample
from lablib.diagnostics import gradient_norms
from lablib.hardware import own_randomness
from lablib.identity import build_seeded, is_installed_file, json_digest, run_identity, run_name, sha256
from lablib.metrics import are_probabilities, first_logits, summary

Key = tuple[str, int]  # a run's model and seed

PUBLISHED = Path(__file__).resolve().parents[1] / "results" / "runs"  # runs that every checkout has, without weights
_WEIGHTS = "model.safetensors"
_NOT_WHOLE = (  # stored results are recognised by these words: do not change them
    "a new copy with the trained weights gives different logits, so it cannot be loaded. Whatever training changes "
    "must be in state_dict(), like parameters and persistent buffers"
)


class DamagedRunError(OSError):
    """A file of a finished run is missing or does not match its checksum."""


@dataclass(frozen=True)
class Run:
    """A finished training; `path` holds what was measured and, unless it was published, the best epoch's weights."""

    path: Path
    result: dict[str, Any]
    history: list[dict[str, float]] = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """The run's identity, as `run_identity` returned it."""
        return json.loads((self.path / "identity.json").read_bytes())

    @property
    def has_weights(self) -> bool:
        return (self.path / _WEIGHTS).exists()

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Put the best epoch's weights into a model of the run's architecture and return it in eval mode.

        Raises ValueError if the run was published without its weights, or they are not all of the network.
        """
        if lost := [note for note in self.result.get("notes", []) if note.endswith(_NOT_WHOLE)]:
            raise ValueError(lost[0])
        if not self.has_weights:
            which = "{model} on {dataset}, seed {seed}".format(**self.result)
            raise ValueError(
                f"the run {self.path.name} ({which}) was published without its weights. Train it to have them: call "
                "experiment or train_or_load with weights=True for this network and seed"
            )
        model.load_state_dict(safetensors.torch.load_file(self.path / _WEIGHTS))
        model.eval()  # a user's `train()` may return None
        return model

    def measured(self) -> dict[str, np.ndarray]:
        """What was measured with the best weights.

        `test_class` (int16) and `test_confidence` (float16): the predicted class of each test image and its
        probability. `validation_logits` (float16, images × classes): the logits of some validation images, those at the
        places `validation_images` (int64). `gradient_initial` and `gradient_trained` (float32): root mean square of the
        gradient by layer over some training images, see `diagnostics.gradient_norms`; missing if the model has no
        linear or convolutional layers.
        """
        with np.load(self.path / "measured.npz") as arrays:
            return dict(arrays)


@dataclass(frozen=True)
class TrainedModel:
    """The network of a finished run, loaded when it is needed: a teacher that is identified by its run."""

    run: Run
    build_model: Callable[[], nn.Module]

    def __identity__(self) -> dict[str, str]:
        return {"run": self.run.path.name}

    def load(self) -> nn.Module:
        """The network with the best epoch's weights, in eval mode. Raises ValueError if they were not kept."""
        return self.run.load_weights(build_seeded(self.build_model, self.run.result["seed"]))


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
    """Load a finished run, from `output_dir` or from the published ones; resume an interrupted one; train a new one.

    `build_model` builds a new network at each call. `trainer_class` replaces StreamlinedTrainer: a class, or a
    `functools.partial` with what else the class needs, such as a teacher. Pass new `callbacks` to each call: they
    keep what they collected. With `weights`, a published run, which has none, does not count. A damaged run is reported
    by a warning, set aside as `NAME.damaged`, and trained again. Where another process trains the same run, this one
    waits and loads what it finds. `bar` is a file that gets a progress bar, such as sys.stderr. Raises as
    `run_identity` and the trainer do, and RuntimeError if `identity`, what `run_identity` gave before or in another
    process, is not that of the arguments here and now.
    """
    now = run_identity(build_model, config, data, trainer_class, callbacks)
    asked = identity or now
    if changed := [part for part in asked | now if json_digest(asked.get(part)) != json_digest(now.get(part))]:
        raise RuntimeError(
            f"the {' and '.join(changed)} of this run no longer match what was asked for: restart Python if a module "
            "was changed; keep what training changes out of classes and global variables; and for a callback that "
            "only watches, define `__identity__` so that it returns None"
        )
    path, together = Path(config.output_dir) / run_name(now), num_processes() > 1
    if not together and (run := find_run(path.name, config.output_dir, weights)):
        return run
    # of several processes (`torchrun`) the first looks after the store; the arguments make them a group
    first = not together or config.to_training_arguments(str(path)).process_index == 0
    key, ended = (path.name.rpartition("-")[0], config.seed), set()
    shown = progress({key: path}, config.num_epochs, ended, bar) if first and bar else nullcontext()
    with shown, _locked(path) if first else nullcontext():
        # another process may have been faster; a list, since that is what can be broadcast
        found = [find_run(path.name, config.output_dir, weights) if first else None]
        if first and not found[0]:
            if _row(path)["state"] == "damaged":
                shutil.rmtree(aside := f"{path}.damaged", ignore_errors=True)
                path.rename(aside)
            (path / "result.json").unlink(missing_ok=True)  # of a run without its weights
        if together:
            torch.distributed.broadcast_object_list(found)  # in place: all get the first one's
        if not found[0]:
            _train(path, now, build_model, config, data, trainer_class, callbacks)
        if together:
            torch.distributed.barrier()
        ended.add(key)
    return found[0] or load_run(path)


def attempt(key: Key, build_model, config, data, parent: int, wandb_mode="", **options):
    """Train one of an experiment's runs: its key, and the run or its error; neither if a worker was interrupted."""
    Interruption.parent = parent if os.getppid() == parent else None  # a worker's training ends with its parent
    if wandb_mode and os.getpid() != parent:  # the parent's may be another than when this process began
        os.environ["WANDB_MODE"] = wandb_mode
    try:
        options = copy.deepcopy(options)  # a trainer and callbacks of its own, as a run in a worker has
        return key, train_or_load(build_model, config, data, **options), None
    except Exception as error:
        return key, None, described_error(error)
    except KeyboardInterrupt:
        if os.getpid() == parent:
            raise
        return key, None, None


def described_error(error: Exception) -> tuple[str, list[traceback.FrameSummary], str]:
    """An error in one line, the user's own frames that led to it, and its full message."""
    described = partial(traceback.TracebackException.from_exception, lookup_lines=False)
    # the lines are looked up where they are shown: a notebook's cells are known in its own process only
    frames = [frame for e in (error.__cause__, error) if e for frame in described(e).stack]
    own = [frame for frame in frames if not is_installed_file(frame.filename)]
    return one_line(error), (own or frames)[-3:], "".join(traceback.format_exception_only(error))


def find_run(name: str, output_dir: str | Path, weights: bool = False) -> Run | None:
    """A finished run by its name, from a store or, unless weights are needed, from the published ones; or None.

    A damaged one does not count, and is reported by a warning.
    """
    for folder in (output_dir,) if weights else (output_dir, PUBLISHED):
        try:
            if (run := load_run(Path(folder) / name)) and (run.has_weights or not weights):
                delete_checkpoints(run.path / "checkpoints")  # its process ended before
                return run
        except DamagedRunError as error:
            warn(f"{error}. Another copy is loaded, or the run is set aside and trained again.")
    return None


def load_run(path: Path) -> Run | None:
    """A finished run, or None if it is not finished. Raises DamagedRunError if its files are not what was written."""
    file = path / "result.json"
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_bytes())
        sums = result.pop("sha256")
        if sums.pop("result") != json_digest(result):  # all of result.json but the checksums
            raise ValueError("it does not match its checksum")
        for name, digest in sums.items():
            file = path / name
            if digest != sha256(file.read_bytes()):
                raise ValueError("it does not match its checksum")
        rows = (path / "history.jsonl").read_text().splitlines()
        return Run(path, result, [json.loads(row) for row in rows])
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise DamagedRunError(f"{file} is damaged: {error}") from error


def _locked(path: Path):
    """A context manager that holds a run's lock; the system releases it when the process ends, however it ends."""
    lock = FileLock(f"{path}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is training run {path.name}; waiting for it to finish", flush=True)
        return lock.acquire()


def _train(path: Path, identity, build_model, config, data, trainer_class, callbacks) -> None:
    from transformers import TrainerCallback  # takes seconds, which loading a run saves

    from lablib.trainer import StreamlinedTrainer

    class Reporter(TrainerCallback):  # for whoever watches the run
        reported = 0.0

        def on_evaluate(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                write_atomically(path / "history.jsonl", _json_lines(trainer.history))

        on_train_begin = on_evaluate  # the file may be ahead of the checkpoint from which a killed run resumes

        def on_step_end(self, args, state, control, **kwargs):
            if state.is_world_process_zero and time.monotonic() - self.reported > 1:
                with suppress(OSError):  # no training should fail for its progress bar
                    write_atomically(path / "checkpoints" / EPOCHS, str(state.epoch).encode())
                self.reported = time.monotonic()

    arguments = {"config": config, "data": data, "callbacks": [*callbacks, Reporter()]}
    arguments |= {"checkpoint_dir": str(path / "checkpoints"), "run_name": path.name}
    given = trainer_class.keywords if isinstance(trainer_class, partial) else {}
    if twice := sorted(given.keys() & arguments):
        raise ValueError(f"trainer_class must not set {', '.join(twice)}; pass callbacks as the argument `callbacks`")
    arguments |= {name: model.load() for name, model in given.items() if isinstance(model, TrainedModel)}
    trainer = (trainer_class or StreamlinedTrainer)(build_seeded(build_model, config.seed), **arguments)
    trainer.train(resume_from_checkpoint=trainer.newest_checkpoint())
    prediction = trainer.predict_test()
    if trainer.is_world_process_zero():
        files = {
            _WEIGHTS: safetensors.torch.save(contiguous_weights(trainer.model)),
            "history.jsonl": _json_lines(trainer.history),
            "identity.json": json.dumps(identity, indent=1).encode(),
            "measured.npz": _measured(trainer, prediction.predictions, partial(build_seeded, build_model, config.seed)),
        }
        _write(path, _result(trainer, prediction.metrics), files)
        delete_checkpoints(path / "checkpoints")


def _result(trainer, test: dict[str, float]) -> dict[str, Any]:
    return {
        "model": type(trainer.model).__name__,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "dataset": trainer.data.name,
        "seed": trainer.config.seed,
        **summary(trainer.history, trainer.config.early_stopping_metric, test),
        "device": trainer.args.device.type,
        "precision": trainer.precision,
        "processes": trainer.args.world_size,
        "threads": torch.get_num_threads(),
        "versions": {n: trainer.environment[n] for n in ("torch", "transformers", "python", "lablib")},
    } | ({"notes": trainer.notes} if trainer.notes else {})


def _measured(trainer, logits, build: Callable[[], nn.Module]) -> bytes:
    """The file of `Run.measured`; `build` builds the network with its initial weights."""
    device, train, validation = trainer.args.device, trainer.train_dataset, trainer.eval_dataset
    logits = torch.from_numpy(first_logits(logits)).double()
    confidence, predicted = (logits if are_probabilities(logits) else logits.softmax(1)).max(1)
    shown = fixed_sample(len(validation), max(8, 1000 // trainer.data.num_classes))
    initial, reloaded = build().to(device), build().to(device)
    answers = _logits(trainer, trainer.model, shown)
    arrays = {
        "test_class": predicted.numpy().astype(np.int16),
        "test_confidence": confidence.numpy().astype(np.float16),
        "validation_images": shown.numpy(),
        "validation_logits": answers.cpu().numpy().astype(np.float16),
    }
    reloaded.load_state_dict(trainer.model.state_dict())
    off = (_logits(trainer, reloaded.eval(), shown) - answers).abs().mean()
    chosen = train.__getitems__(fixed_sample(len(train), 256))
    batch = trainer.prepare_images(chosen["images"].to(device), training=False), chosen["labels"].to(device)
    if off > (0.01 if trainer.precision == "fp32" else 0.1) * answers.abs().mean():  # rounding is far less
        trainer.notes.append(f"{type(reloaded).__name__}: {_NOT_WHOLE}")
        warn(trainer.notes[-1])
    else:
        with suppress(RuntimeError):  # a model without layers to measure
            for when, model in {"initial": initial, "trained": reloaded}.items():
                arrays[f"gradient_{when}"] = gradient_norms(model, batch, trainer.outputs)["rms"].to_numpy(np.float32)
    np.savez_compressed(content := io.BytesIO(), **arrays)
    return content.getvalue()


def _logits(trainer, model: nn.Module, validation_images: torch.Tensor) -> torch.Tensor:
    """Images × classes, for some of the validation images."""
    images = trainer.eval_dataset.__getitems__(validation_images)["images"].to(trainer.args.device)
    with torch.no_grad():
        return first_logits(trainer.run_model(model, images))


def _write(path: Path, result: dict[str, Any], files: dict[str, bytes]) -> None:
    """Write a run's files, and last the result with their checksums, which makes it a finished one."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(path / name, content)
    sums = {"result": json_digest(result)} | {name: sha256(content) for name, content in files.items()}
    write_atomically(path / "result.json", json.dumps(result | {"sha256": sums}, indent=1).encode())


def _json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@contextmanager
def progress(paths: Mapping[Key, Path], num_epochs: int, ended: set[Key], file: TextIO | None = None):
    """One bar over all epochs of all runs, with time left and latest metrics; after Ctrl-C, where it stopped.

    `paths` maps each run to its folder; the caller adds a finished run to `ended`. The bar reads files in the store, so
    it also works for runs in other processes and on other machines.
    """

    def show():
        over = set(ended)  # a run that stopped early counts in full
        running = [(*_reached(path), key) for key, path in paths.items() if key not in over]
        epochs = num_epochs * len(over) + sum(epochs for epochs, _, _ in running)
        _, last, (model, seed) = max(running, key=lambda run: run[0], default=(0, {}, ("", 0)))
        if last:
            metrics = f"loss {last['train_loss']:.3f}, validation {100 * last['val_accuracy']:.1f} %"
            bar.set_postfix_str(f"{metrics} ({model}, seed {seed})", refresh=False)
        bar.initial = min(bar.initial, epochs)  # a resumed run may start before the epoch it had reached
        bar.update(epochs - bar.n)

    def watch():
        while not stop.wait(0.5):
            show()

    terminal = sys.stderr.isatty()
    file = file or (sys.stderr if terminal else sys.stdout)
    begun = sum(_reached(path)[0] for path in paths.values())
    look = "{percentage:3.0f}%|{bar:8}| {n:.1f}/{total_fmt} epochs [{elapsed}<{remaining}{postfix}]"
    pace = {"miniters": 0, "mininterval": 0.1 if terminal else 10, "smoothing": 0}  # time left from the mean speed
    bar = tqdm(total=num_epochs * len(paths), initial=begun, file=file, bar_format=look, **pace)
    stop, watcher = threading.Event(), threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        show()
        bar.close()
        if isinstance(interrupt := sys.exception(), KeyboardInterrupt):  # its text is a traceback's last line
            interrupt.args = (f"interrupted at epoch {int(bar.n)} of {bar.total}; run again to resume",)
            print(f"\n{interrupt}", file=file, flush=True)


def _reached(path: Path) -> tuple[float, dict]:
    """The epochs that an unfinished run has completed, and the metrics of the last full one."""
    epochs, rows, last = 0.0, [], {}
    with suppress(OSError, ValueError):  # not written yet, already deleted, or cut off when the power failed
        rows = (path / "history.jsonl").read_text().splitlines()
        last = json.loads(rows[-1]) if rows else {}
        epochs = float((path / "checkpoints" / EPOCHS).read_text())
    return max(epochs, len(rows)), last


def publish(run: Run, folder: Path | None = None) -> Path:
    """Copy a finished run without its weights, unless it is there already, and return its new path.

    Raises DamagedRunError if a file has changed since it was written.
    """
    target = (folder or PUBLISHED) / run.path.name
    with suppress(DamagedRunError):
        if load_run(target):
            return target
    load_run(run.path)
    names = ("history.jsonl", "identity.json", "measured.npz")
    _write(target, run.result, {name: (run.path / name).read_bytes() for name in names})
    return target


def runs_table(output_dir: str | Path) -> pd.DataFrame:
    """One row per run of a store; accuracies are fractions.

    The state is "finished", "published" (finished, without weights), "unfinished" (a process trains it, or it failed or
    was interrupted and resumes when it is asked for again) or "damaged" (`notes` says why).
    """
    paths = sorted(Path(output_dir).glob(f"*-{'[0-9a-f]' * 12}*/"))
    columns = ["run", "state", "dataset", "seed", "epochs", "val_accuracy", "test_accuracy", "mib", "notes"]
    return pd.DataFrame([_row(path) for path in paths], columns=columns)


def _row(path: Path) -> dict[str, Any]:
    row = {"run": path.name}
    with suppress(OSError):  # a checkpoint is being replaced
        row["mib"] = sum(file.stat().st_size for file in path.rglob("*")) / 2**20
    try:
        run = load_run(path)
    except DamagedRunError as error:
        return row | {"state": "damaged", "notes": str(error)}
    if run is None:
        if last := _reached(path)[1]:  # none in its first epoch
            row |= {"epochs": last["epoch"], "val_accuracy": last["val_accuracy"]}
        return row | {"state": "unfinished"}
    return row | run.result | {"state": "finished" if run.has_weights else "published"}


def clean(output_dir: str | Path, finished: bool = False, ask: Callable[[str], str] = input) -> list[str]:
    """Delete the unfinished and damaged runs of a store if `ask` answers yes, and return their names.

    With `finished` the finished ones too. A run in training stays, and so do the lock files: they are empty, and
    a process that waits for one would not notice that another has been made.
    """
    unwanted = ["unfinished", "damaged", "finished"] if finished else ["unfinished", "damaged"]
    table, gone = runs_table(output_dir).query("state in @unwanted"), []
    print(table[["run", "state", "mib"]].to_string(index=False) if len(table) else "nothing to delete")
    if len(table) and ask(f"Delete these {len(table)}? [y/N] ").strip().lower() in ("y", "yes"):
        for path in map(Path(output_dir).joinpath, table["run"]):
            with suppress(Timeout), FileLock(f"{path}.lock", blocking=False):
                if _row(path)["state"] in unwanted:  # it may have changed meanwhile
                    shutil.rmtree(path)
                    gone.append(path.name)
        print(f"{len(gone)} of {len(table)} deleted")
    return gone


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m lablib.runs list | publish | clean`"""
    parser = argparse.ArgumentParser(prog="python -m lablib.runs", description=__doc__)
    parser.add_argument("command", choices=["list", "publish", "clean"])
    parser.add_argument("output_dir", nargs="?", default="runs", type=os.path.expanduser, help="the run store (runs)")
    parser.add_argument("--finished", action="store_true", help="clean: delete finished runs too")
    options = parser.parse_args(arguments)
    if not Path(options.output_dir).is_dir():
        parser.exit(2, f"{parser.prog}: there is no folder {options.output_dir}\n")
    if options.command == "clean":
        clean(options.output_dir, options.finished)
        return
    table = runs_table(options.output_dir)
    if options.command == "publish":
        for name in table.query("state == 'finished'")["run"]:
            publish(load_run(Path(options.output_dir, name)))
        table = runs_table(PUBLISHED)
    print(table.convert_dtypes().to_string(index=False, na_rep="") if len(table) else "no runs")


if __name__ == "__main__":
    main()
