"""ResumableTrainer: a transformers.Trainer that resumes from a checkpoint as if it had never stopped."""

import json
import platform
import shutil
import time
import warnings
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from lablib.checkpoints import (
    DamagedCheckpointError,
    check_room,
    contiguous_weights,
    describe_failed_write,
    discard_unfinished,
    is_about_the_disk,
    keep_newest,
    newest_usable,
    own_memory,
    seal,
    unfinished,
    verify,
)
from lablib.distributed import DistributedTrainer
from lablib.interruption import SIGNALS, Interruption

VERSIONS = ("torch", "transformers", "python")

_BEST = "best_model.safetensors"
_COST = 0.01  # at most this part of the time goes into the checkpoints within an epoch
_STEPS_BETWEEN_DECISIONS = 50  # of several processes, which have to agree


class ResumableTrainer(DistributedTrainer):
    """Writes checkpoints that are complete or absent, hold all that the training depends on, and are verified on use.

    One is written after each epoch and, within an epoch, every `checkpoint_seconds`, or less often where that would
    take more than 1 % of the time. Each is self-contained: weights, optimizer, schedule, random states, position,
    history, early stopping's counter, and the best epoch's weights. SIGINT and SIGTERM finish the step, write a
    checkpoint and exit.

    `notes` lists what differs from the training that is resumed: versions, precision, device, number of processes.
    Nothing is unpickled. Subclasses add to `progress` and take it back in `restore_progress`.
    """

    checkpoint_seconds = 300.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        own_memory(self.model)
        self.notes: list[str] = []
        self._interruption = Interruption(() if self.args.world_size > 1 else SIGNALS)
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._writing = False
        self.add_callback(_CheckpointCallback(self._interruption, self.checkpoint_seconds))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, or resume from a checkpoint: a path, or True for the newest usable one.

        Raises DamagedCheckpointError for the path of a checkpoint that is damaged or cannot be loaded, ValueError if
        True finds none, and OSError if the checkpoint folder is not writable or has no room.
        """
        folder = Path(self.args.output_dir)
        check_room(folder, 3 * self._checkpoint_bytes())  # two are kept, and one is written
        if self.is_world_process_zero():
            discard_unfinished(folder)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self.newest_checkpoint()
            if resume_from_checkpoint is None:
                raise ValueError(f"there is no checkpoint in {folder} to go on from; train without resuming")
        self.notes, self._best_weights = [], None
        if resume_from_checkpoint:
            self._check(Path(resume_from_checkpoint))
        with self._interruption:
            try:
                self.before_training()
                if resume_from_checkpoint:
                    self._restore(Path(resume_from_checkpoint))
                return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
            except BaseException as error:
                self.training_failed(error)
                raise

    def newest_checkpoint(self) -> Path | None:
        """The newest usable checkpoint, or None; those that cannot be used are set aside."""
        chosen = [None]
        if self.is_world_process_zero():
            chosen = [newest_usable(Path(self.args.output_dir), self._check)]
        if self.args.world_size > 1:
            torch.distributed.broadcast_object_list(chosen)
        return chosen[0]

    def before_training(self) -> None:
        """Called before the training starts."""

    def progress(self) -> dict[str, Any]:
        """What a subclass needs in order to resume within an epoch, as JSON."""
        return {}

    def restore_progress(self, progress: list[dict[str, Any]]) -> None:
        """Restore what `progress` returned in each process that wrote the checkpoint."""

    def training_failed(self, error: BaseException) -> None:
        """Called when the training ends with an exception, including an interruption."""

    # Writing

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        target = folder / f"checkpoint-{self.state.global_step}"
        written = unfinished(folder) / target.name
        self._writing = True
        try:
            super()._save_checkpoint(model, trial)
            self._write_progress(written)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                seal(written, target)
                keep_newest(folder, max(2, self.args.save_total_limit or 2))
            self.accelerator.wait_for_everyone()
        except Exception as error:
            shutil.rmtree(unfinished(folder), ignore_errors=True)
            if not is_about_the_disk(error):
                raise
            raise describe_failed_write(error, target, self._checkpoint_bytes()) from error
        finally:
            self._writing = False
            if self._best_weights is not None:
                self.state.best_model_checkpoint = str(folder)  # each checkpoint in it has them

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, contiguous_weights(self.model) if state_dict is None else state_dict)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return str(unfinished(Path(folder))) if self._writing else folder

    def _write_progress(self, folder: Path):
        saved = {
            "environment": self.environment,
            "notes": self.notes,
            "progress": self.progress(),
        }
        (folder / f"lablib_{self.args.process_index}.json").write_text(json.dumps(saved))
        if self.is_world_process_zero() and self._best_weights and self.state.best_global_step < self.state.global_step:
            safetensors.torch.save_file(self._best_weights, folder / _BEST)

    def _determine_best_metric(self, metrics, trial):
        better = super()._determine_best_metric(metrics, trial)
        if better:
            self._best_weights = contiguous_weights(self.model)
        return better

    def _load_best_model(self):
        self.model.load_state_dict(self._best_weights)

    def _checkpoint_bytes(self) -> int:
        """The approximate size of a checkpoint: weights, the best epoch's weights, the optimizer's two moments."""
        return 4 * sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())) + 2**20

    @cached_property
    def environment(self) -> dict[str, str]:
        """What a resumed training should find unchanged: `VERSIONS`, precision, device, number of processes."""
        precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        here = {"precision": precision, "device": self.args.device.type, "processes": str(self.args.world_size)}
        return {name: version(name) for name in VERSIONS if name != "python"} | {
            "python": platform.python_version(),
            **here,
        }

    # Going on

    def _check(self, checkpoint: Path):
        """Raises DamagedCheckpointError for one that is damaged or that this model and these versions cannot load."""
        verify(checkpoint)
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_bytes())
            for file in ("lablib_0.json", *_progress_files(checkpoint)):
                json.loads((checkpoint / file).read_bytes())["progress"]
            expected = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
            for file in {"model.safetensors", _best_file(state)}:
                shapes = {name: tensor.shape for name, tensor in safetensors.torch.load_file(checkpoint / file).items()}
                if shapes != expected:
                    raise ValueError(f"{file} holds the weights of another architecture")
            with safe_globals():
                for file in ("optimizer.pt", "scheduler.pt", *(p.name for p in checkpoint.glob("rng_state*.pth"))):
                    torch.load(checkpoint / file, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise DamagedCheckpointError(f"{checkpoint} cannot be loaded: {type(error).__name__}: {reason}") from error

    def _restore(self, checkpoint: Path):
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        if state.get("best_global_step"):
            self._best_weights = safetensors.torch.load_file(checkpoint / _best_file(state))
        if epochs := _stopped_after(state):
            self.args.num_train_epochs = epochs  # or one more epoch would begin before the stop is noticed
        saved = [json.loads((checkpoint / name).read_bytes()) for name in _progress_files(checkpoint)]
        self.notes = saved[0]["notes"]
        self._compare({"processes": str(len(saved))} | saved[0]["environment"], checkpoint)
        self.restore_progress([of_process["progress"] for of_process in saved])

    def _compare(self, before: dict[str, str], checkpoint: Path):
        now = self.environment
        changed = [name for name in now if now[name] != before.get(name)]
        if changed:
            was, is_ = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (before, now))
            note = f"resumed at step {checkpoint.name.rpartition('-')[2]} with {is_}, begun with {was}"
            self.notes = [*self.notes, note]
            warnings.warn(f"{checkpoint}: {note}; the result will carry this note", stacklevel=4)

    def _init_training_state(self, *args, **kwargs):
        position = super()._init_training_state(*args, **kwargs)
        self.state.best_model_checkpoint = str(self.args.output_dir) if self._best_weights else None
        return position


class _CheckpointCallback(TrainerCallback):
    """Requests a checkpoint within an epoch when one is due, and exits after it if the user asked for that."""

    def __init__(self, interruption: Interruption, seconds: float):
        self.interruption, self.seconds = interruption, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.last, self.cost, self.asked_at = time.monotonic(), 0.0, None

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == round(state.epoch):
            return  # the epoch's own checkpoint follows, after its validation
        if self.interruption.asked or self._is_due(args, state):
            control.should_save = True
            self.asked_at = time.monotonic()

    def on_save(self, args, state, control, **kwargs):
        self.last = time.monotonic()
        if self.asked_at is not None:
            self.cost, self.asked_at = self.last - self.asked_at, None
        self.interruption.leave()

    def _is_due(self, args, state) -> bool:
        if args.world_size > 1 and state.global_step % _STEPS_BETWEEN_DECISIONS:
            return False
        due = time.monotonic() - self.last >= max(self.seconds, self.cost / _COST)
        if args.world_size > 1:
            decision = torch.tensor(due, device=args.device)
            torch.distributed.broadcast(decision, src=0)
            due = bool(decision)
        return due


def _progress_files(checkpoint: Path) -> list[str]:
    """One per process that wrote the checkpoint, in order."""
    return [f"lablib_{process}.json" for process in range(len(list(checkpoint.glob("lablib_*.json"))))]


def _best_file(state: dict) -> str:
    """The file with the best epoch's weights; the checkpoint of the best epoch itself needs no other."""
    later = (state.get("best_global_step") or 0) not in (0, state["global_step"])
    return _BEST if later else "model.safetensors"


def _stopped_after(state: dict) -> int | None:
    """The epochs after which a training had already stopped at its checkpoint; None if it had not."""
    control = state.get("stateful_callbacks", {}).get("TrainerControl", {}).get("args", {})
    return round(state["epoch"]) if control.get("should_training_stop") else None
