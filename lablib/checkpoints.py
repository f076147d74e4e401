"""Checkpoints that are whole or absent, and a trainer that resumes exactly from them after a signal or a crash."""

import json
import os
import platform
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lablib.config import NOT_IDENTITY, warn
from lablib.hardware import algorithms
from lablib.identity import LABLIB_VERSION, sha256

UNFINISHED = "unfinished"  # the folder in which a checkpoint is written before it gets its place
EPOCHS = "epochs"  # a file: how many epochs an unfinished run has completed, such as 1.5
_MANIFEST, _LAB, _WEIGHTS, _BEST = "manifest.json", "lablib_0.json", "model.safetensors", "best_model.safetensors"


def write_atomically(path: Path, content: bytes):
    """Write a file that appears whole or not at all, also if the process is killed."""
    partial = path.with_name(f"{path.name}.partial")  # always this name, so that a killed process leaves one at most
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def contiguous_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state_dict as contiguous clones, since safetensors refuses shared memory."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}


class Interruption:
    """A context manager that notes SIGINT and SIGTERM, so that a step can finish and a checkpoint be written.

    A second signal acts at once, except in a worker; one noted but not yet acted upon takes effect when the context
    ends. Only the main thread can handle signals; in another thread none is noted. Signals that are ignored (`nohup`)
    stay ignored.
    """

    parent: int | None = None  # process ID of a worker's parent; the training ends when that process does

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
        """Whether to stop: a signal came, `ask` was called, or the parent process ended."""
        if self._noted is None and self.parent is not None and os.getppid() != self.parent:
            self._noted = signal.SIGTERM
        return self._noted is not None

    def ask(self, number: int = signal.SIGINT, frame=None):
        """Ask to stop after this step; also the handler of the signals."""
        self._noted = number
        if self.parent is None:  # a notebook's workers get Ctrl-C, and soon after SIGTERM, as their parent ends
            self._restore_handlers()

    def leave(self):
        """Raise the exception that ends training; the signal may have reached another process."""
        raise SystemExit(128 + signal.SIGTERM) if self._noted == signal.SIGTERM else KeyboardInterrupt

    def _restore_handlers(self):
        while self._before:
            signal.signal(*self._before.popitem())


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first, not verified."""
    numbers = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    return [folder / f"checkpoint-{n}" for n in sorted((int(n) for n in numbers if n.isdigit()), reverse=True)]


def delete_checkpoints(folder: Path):
    """Delete what the trainer wrote to its folder; what a callback wrote there stays."""
    for path in (*checkpoints_in(folder), *folder.glob("damaged-checkpoint-*"), folder / UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):  # the store may be read-only
        (folder / EPOCHS).unlink(missing_ok=True)
        folder.rmdir()


def seal(written: Path, target: Path):
    """Turn a written folder into a checkpoint: add checksums, move it into place, keep only the newest two."""
    sums = {path.name: sha256(path.read_bytes()) for path in sorted(written.iterdir())}
    write_atomically(written / _MANIFEST, json.dumps(sums, indent=1).encode())
    shutil.rmtree(target, ignore_errors=True)
    os.replace(written, target)
    for old in checkpoints_in(target.parent)[2:]:
        shutil.rmtree(old)


class ResumableTrainer:
    """The half of `lablib.trainer.StreamlinedTrainer` that resumes as if it had never stopped.

    A checkpoint is written every `checkpoint_seconds` within an epoch, at the end of an epoch if the last one is at
    least `seconds_between_epochs` old, and on SIGINT and SIGTERM: the step is finished, then the process exits. Each
    holds all that the training depends on; the best weights are also kept in memory. Nothing is unpickled.

    `notes` lists what differs from the training that is resumed; `wandb_id` is resumed too. The other half has
    `config`, `before_training()`, the evaluations, `_since_last_log` (a `BatchMeter`) and `_clock` (when the training
    would have begun without pauses).
    """

    seconds_between_epochs = 60.0
    _evaluating_epoch = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, or resume from a checkpoint (a path, or True for the newest usable one), then load the best weights.

        Raises OSError if the path cannot be loaded or the folder is not writable, and ValueError if True finds none.
        """
        folder, path = Path(self.args.output_dir), resume_from_checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)  # of a process that was killed
        if path is True and not (path := self.newest_checkpoint()):
            raise ValueError(f"there is no checkpoint in {folder} to resume from; train without resuming")
        loaded = self._load(Path(path)) if path else None
        self.notes, self.wandb_id = [], secrets.token_hex(4)
        self._interruption, self._leaving, self._saved_at = Interruption(), False, time.monotonic()
        self._best_weights = None  # those of the best epoch so far
        self._evaluated_weights, self._evaluating_epoch = None, False  # of the evaluation at an epoch's end
        self._last_callback = None  # of a resumed training
        self._last_step = None  # the step after which `_maybe_log_save_evaluate` was called last
        with algorithms(self.config.deterministic), self._interruption:
            try:
                self.before_training()
                if loaded:
                    self._restore(*loaded)
                output = super().train(resume_from_checkpoint=path or None, **kwargs)
                if self._best_weights:
                    raise RuntimeError("the best weights were not loaded: lablib needs another version of transformers")
                return output
            except BaseException as error:
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_train_failed"):  # Weights & Biases and Telegram
                        callback.on_train_failed(error)
                raise
            finally:
                if self._last_callback:
                    self.remove_callback(self._last_callback)

    def newest_checkpoint(self) -> Path | None:
        """The newest usable checkpoint, or None; those that cannot be used are set aside with a warning."""
        folder = Path(self.args.output_dir)
        for path in checkpoints_in(folder) if self.is_world_process_zero() else ():
            try:
                self._load(path)
                break
            except OSError as error:
                shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
                path.rename(aside)
                warn(f"{path.name} cannot be used: {error}. It is set aside as {aside}.")
        self.accelerator.wait_for_everyone()
        return next(iter(checkpoints_in(folder)), None)

    @cached_property
    def environment(self) -> dict[str, str]:
        """What a resumed training should find unchanged: settings, versions, device, number of processes."""
        return {
            **{name: str(value) for name, value in vars(self.config).items() if name not in NOT_IDENTITY},
            **{name: version(name) for name in ("torch", "transformers")},
            "python": platform.python_version(),
            "lablib": LABLIB_VERSION,
            "precision": "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32",
            "device": self.args.device.type,
            "processes": str(self.args.world_size),
        }

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        # upstream calls this after each step, and once more when an epoch is over, so twice after its last step
        state, control = self.state, self.control
        after_step = self._last_step != state.global_step
        self._last_step = state.global_step
        if state.epoch == int(state.epoch) or control.should_training_stop:
            control.should_save = False  # `_determine_best_metric` decides after the evaluation
            if after_step:  # the call at the epoch's end logs and evaluates
                control.should_log = control.should_evaluate = False
        elif control.should_evaluate or control.should_log or control.should_epoch_stop:
            advice = "let it ask in on_epoch_end, or set max_train_images for shorter epochs"
            raise ValueError(f"a callback asks to evaluate, to log or to stop within an epoch; {advice}")
        elif self.args.world_size == 1 or state.global_step % 50 == 0:  # it takes time until all processes agree
            control.should_save |= self._is_time_to_save(self.config.checkpoint_seconds)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._leaving:
            self._interruption.leave()

    def _determine_best_metric(self, metrics, trial):
        better = super()._determine_best_metric(metrics, trial)
        evaluated, self._evaluated_weights = self._evaluated_weights, None
        if better:
            self._best_weights = evaluated or contiguous_weights(self.model)
        self.control.should_save = self._is_time_to_save(self.seconds_between_epochs)  # upstream: after every epoch
        return better

    def _is_time_to_save(self, seconds: float) -> bool:
        """Whether a signal came or the last checkpoint is that old; `_leaving` notes whether to end the training."""
        asked, old = self._interruption.asked, time.monotonic() - self._saved_at >= seconds
        if self.args.world_size > 1:  # all processes decide alike
            anywhere = self.accelerator.gather(torch.tensor([[asked, old]], device=self.args.device)).any(0)
            asked, old = anywhere.tolist()
        self._leaving = asked
        return asked or old

    def _finalize_training(self, *args, **kwargs):
        best, self._best_weights = self._best_weights, None
        self.state.best_model_checkpoint = None  # where upstream would load them from
        if best:
            self.model.load_state_dict(best)
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        args, state, folder = self.args, self.state, self.args.output_dir
        target, first = Path(folder, f"checkpoint-{state.global_step}"), self.is_world_process_zero()
        written = target.parent / UNFINISHED / target.name
        try:
            args.output_dir = str(written.parent)
            stateful = [c for c in (*self.callback_handler.callbacks, self.control) if hasattr(c, "from_state")]
            state.stateful_callbacks = type(state)(stateful_callbacks=stateful).stateful_callbacks  # as they are now
            super()._save_checkpoint(model, trial)
            saved = {"environment": self.environment, "notes": self.notes, "wandb_id": self.wandb_id}
            saved["progress"] = {"batches": self._since_last_log.batches(), "seconds": time.monotonic() - self._clock}
            saved["forgotten"] = sorted({type(c).__name__ for c in self.callback_handler.callbacks if _forgets(c)})
            saved["frozen"] = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            if first:
                (written / _LAB).write_text(json.dumps(saved))
                if hasattr(self.model, "config"):  # a model of transformers, whose weights upstream renames
                    safetensors.torch.save_file(contiguous_weights(self.model), written / _WEIGHTS)
                if self._best_weights:
                    safetensors.torch.save_file(self._best_weights, written / _BEST)
            self.accelerator.wait_for_everyone()
            if first:
                seal(written, target)
            self.accelerator.wait_for_everyone()
        except Exception as error:
            shutil.rmtree(written.parent, ignore_errors=True)
            what = f"({type(error).__name__}: {error}). Fix this and run again; earlier checkpoints are intact"
            raise OSError(f"{target} could not be written {what}") from error
        finally:
            args.output_dir = folder
        self._saved_at = time.monotonic()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, contiguous_weights(self.model) if state_dict is None else state_dict)

    def _load(self, checkpoint: Path) -> tuple[dict, dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The trainer's state, what this class saved, the last and the best weights. Raises OSError if damaged."""
        try:
            manifest = json.loads((checkpoint / _MANIFEST).read_bytes())
            if changed := [name for name, old in manifest.items() if sha256((checkpoint / name).read_bytes()) != old]:
                raise ValueError(f"checksum mismatch in {' and '.join(changed)}")
            state, saved = (json.loads((checkpoint / name).read_bytes()) for name in ("trainer_state.json", _LAB))
            weights = safetensors.torch.load_file(checkpoint / _WEIGHTS)
            best = safetensors.torch.load_file(checkpoint / _BEST) if _BEST in manifest else weights
            if best.keys() != self.model.state_dict().keys():
                raise ValueError("it holds the weights of another architecture")
            return state, saved, weights, best
        except Exception as error:
            raise OSError(f"{checkpoint} cannot be loaded: {type(error).__name__}: {error}") from error

    def _restore(self, state: dict, saved: dict, weights: dict[str, torch.Tensor], best: dict[str, torch.Tensor]):
        before, now = saved["environment"], self.environment
        notes, resumed = [], f"resumed at step {state['global_step']}"
        if changed := [name for name in before if before[name] != now.get(name)]:
            was, now_is = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (before, now))
            notes.append(f"started with {was}, {resumed} with {now_is}")
        if forgotten := ", ".join(saved["forgotten"]):
            advice = "derive the callback from transformers' ExportableState to keep them"
            notes.append(f"{resumed} without the attributes of {forgotten} as they were; {advice}")
        for note in notes:
            warn(f"{self.args.output_dir}: {note}; the result will carry this note")
        self.notes, self.wandb_id = [*saved["notes"], *notes], saved.get("wandb_id", self.wandb_id)
        self._last_callback = _set_back(weights, saved["frozen"])
        self.add_callback(self._last_callback)
        self._best_weights = best if state["best_global_step"] else None
        if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            self.args.num_train_epochs = int(state["epoch"])  # or another step would be made
        self._since_last_log.restore(saved["progress"]["batches"])
        self._clock = time.monotonic() - saved["progress"]["seconds"]


def _set_back(weights: dict[str, torch.Tensor], frozen: list[str]):
    """The last callback of a resumed training: undoes what others do to the model when it, or half an epoch, begins."""
    from transformers import TrainerCallback  # takes seconds, which loading a run saves

    class SetBack(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.load_state_dict(weights)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name not in frozen)

        def on_epoch_begin(self, args, state, control, model=None, **kwargs):
            if state.epoch % 1:  # the epoch began before the interruption
                self.on_train_begin(args, state, control, model)

    return SetBack()


def _forgets(callback) -> bool:
    """Whether a user's callback, of which no checkpoint holds a state, has attributes and does more than watch."""
    if type(callback).__module__.startswith(("lablib.", "transformers.")) or hasattr(callback, "from_state"):
        return False
    only_watches = hasattr(callback, "__identity__") and callback.__identity__() is None
    return bool(vars(callback)) and not only_watches
