"""ResumableTrainer: a transformers.Trainer that resumes from a checkpoint as if it had never stopped."""

import json
import platform
import time
import warnings
from functools import cached_property
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_pt_utils import safe_globals

from lablib import checkpoints
from lablib.checkpoints import SIGNALS, UNFINISHED, DamagedCheckpointError, Interruption, contiguous_weights

_WEIGHTS, _BEST = "model.safetensors", "best_model.safetensors"
_COST = 0.01  # at most this part of the time goes into the checkpoints within an epoch
_STEPS_BETWEEN_DECISIONS = 50  # of several processes, which have to agree


class ResumableTrainer(transformers.Trainer):
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
        checkpoints.own_memory(self.model)
        self.notes: list[str] = []
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._interruption = Interruption(() if self.args.world_size > 1 else SIGNALS)
        self.add_callback(_CheckpointCallback(self._interruption, self.checkpoint_seconds))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train, or resume from a checkpoint: a path, or True for the newest usable one.

        Raises DamagedCheckpointError for the path of a checkpoint that is damaged or cannot be loaded, ValueError if
        True finds none, and OSError if the checkpoint folder is not writable or has no room.
        """
        folder, path = Path(self.args.output_dir), resume_from_checkpoint
        checkpoints.check_room(folder, 3 * self._checkpoint_bytes())  # two are kept, and one is written
        if self.is_world_process_zero():
            checkpoints.discard_unfinished(folder)
        if path is True and not (path := self.newest_checkpoint()):
            raise ValueError(f"there is no checkpoint in {folder} to resume from; train without resuming")
        loaded = self._load(Path(path)) if path else None
        self.notes, self._best_weights = [], None
        with self._interruption:
            try:
                self.before_training()
                if loaded:
                    self._restore(*loaded)
                return super().train(resume_from_checkpoint=path or None, **kwargs)
            except BaseException as error:
                self.training_failed(error)
                raise

    def newest_checkpoint(self) -> Path | None:
        """The newest usable checkpoint, or None; those that cannot be used are set aside."""
        chosen = [None]
        if self.is_world_process_zero():
            chosen = [checkpoints.newest_usable(Path(self.args.output_dir), self._load)]
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

    @cached_property
    def environment(self) -> dict[str, str]:
        """What a resumed training should find unchanged: versions, precision, device, number of processes."""
        return {
            **{name: version(name) for name in ("torch", "transformers")},
            "python": platform.python_version(),
            "precision": "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32",
            "device": self.args.device.type,
            "processes": str(self.args.world_size),
        }

    def _save_checkpoint(self, model, trial):
        args, state, folder = self.args, self.state, self.args.output_dir
        target = Path(folder, f"checkpoint-{state.global_step}")
        written = Path(folder, UNFINISHED, target.name)
        with checkpoints.failures_explained(target, self._checkpoint_bytes()):
            args.output_dir = str(written.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                args.output_dir = folder
            saved = {"environment": self.environment, "notes": self.notes, "progress": self.progress()}
            (written / f"lablib_{args.process_index}.json").write_text(json.dumps(saved))
            first = self.is_world_process_zero()
            if first and self._best_weights and state.best_global_step < state.global_step:
                safetensors.torch.save_file(self._best_weights, written / _BEST)
            self.accelerator.wait_for_everyone()
            if first:
                checkpoints.seal(target, keep=max(2, args.save_total_limit or 2))
            self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, contiguous_weights(self.model) if state_dict is None else state_dict)

    def _determine_best_metric(self, metrics, trial):
        better = super()._determine_best_metric(metrics, trial)
        if better:
            self._best_weights = contiguous_weights(self.model)
        return better

    def _load_best_model(self):
        self.model.load_state_dict(self._best_weights)
        self.state.best_model_checkpoint = self.args.output_dir  # each checkpoint in it has them

    def _checkpoint_bytes(self) -> int:
        """The approximate size of a checkpoint: weights, the best epoch's weights, the optimizer's two moments."""
        return 4 * sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())) + 2**20

    def _load(self, checkpoint: Path) -> tuple[dict, list[tuple], dict[str, torch.Tensor]]:
        """The trainer's state, what each process had saved, and the best weights.

        Raises DamagedCheckpointError if it is damaged, or if this model and these versions cannot load it.
        """
        checkpoints.verify(checkpoint)
        try:
            state = json.loads((checkpoint / "trainer_state.json").read_bytes())
            processes = range(len([*checkpoint.glob("lablib_*.json")]) or 1)
            saved = [json.loads((checkpoint / f"lablib_{process}.json").read_bytes()) for process in processes]
            later = (state["best_global_step"] or 0) not in (0, state["global_step"])
            expected = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
            for file in (_WEIGHTS, _BEST) if later else (_WEIGHTS,):
                best = safetensors.torch.load_file(checkpoint / file)
                if {name: tensor.shape for name, tensor in best.items()} != expected:
                    raise ValueError(f"{file} holds the weights of another architecture")
            random_states = (path.name for path in checkpoint.glob("rng_state*.pth"))
            with safe_globals():
                for file in ("optimizer.pt", "scheduler.pt", *random_states):
                    torch.load(checkpoint / file, map_location="cpu", weights_only=True)
            return state, [itemgetter("environment", "notes", "progress")(one) for one in saved], best
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise DamagedCheckpointError(f"{checkpoint} cannot be loaded: {type(error).__name__}: {reason}") from error

    def _restore(self, state: dict, saved: list[tuple], best: dict[str, torch.Tensor]):
        environments, notes, progress = zip(*saved, strict=True)
        self.notes, before, now = notes[0], environments[0], self.environment
        if changed := [name for name in now if now[name] != before.get(name)]:
            was, is_ = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (before, now))
            self.notes = [*self.notes, f"resumed at step {state['global_step']} with {is_}, begun with {was}"]
            warnings.warn(f"{self.args.output_dir}: {self.notes[-1]}; the result will carry this note", stacklevel=3)
        if state["best_global_step"]:
            self._best_weights = best
        if state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]:
            self.args.num_train_epochs = round(state["epoch"])  # or another epoch begins before the stop is noticed
        self.restore_progress([*progress])


class _CheckpointCallback(TrainerCallback):
    """Requests a checkpoint within an epoch when one is due, and exits after it if the user asked for that."""

    def __init__(self, interruption: Interruption, seconds: float):
        self.interruption, self.seconds = interruption, seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.last, self.cost, self.asked_at = time.monotonic(), 0.0, None
        if state.best_global_step:
            state.best_model_checkpoint = args.output_dir  # or `_load_best_model` would not be called

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
