"""Weights & Biases: each training becomes a run there. What goes wrong with an optional service harms no training."""

import contextlib
import functools
import os
import platform
import secrets
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback

from lablib.config import redacted
from lablib.metrics import best_row, history

# The fields of a TrainingConfig that are logged: a list of what may leave this machine, as others hold secrets.
LOGGED = [
    "num_epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "lr_schedule", "warmup_fraction",
    "max_grad_norm", "validation_split", "max_train_images", "early_stopping_patience", "early_stopping_metric",
    "rotation_degrees", "translation_fraction", "horizontal_flip", "crop_padding", "seed", "deterministic",
]  # fmt: skip
_PRIVATE = {
    "console": "off",  # not what is printed
    "disable_code": True,  # nor the notebook
    "disable_git": True,  # nor uncommitted changes
    "x_disable_meta": True,  # nor the command line
}
_unavailable = set()  # what failed in this process, so that the runs of an experiment wait and warn only once


class Harmless:
    """Something optional: the first error in one of its `@harmless` methods is a warning, and then they do nothing."""

    service = "the service"
    broken = False

    def fail(self, error: BaseException) -> None:
        """Say once what is wrong, and do nothing more."""
        if self.broken:
            return
        self.broken = True
        with contextlib.suppress(Exception):
            self.give_up()
        reason = redacted(str(error)) or type(error).__name__
        # without a line of somebody else's source below the message
        warnings.warn_explicit(f"{self.service}: {reason}; continuing without it", UserWarning, "lablib", 0)

    def give_up(self) -> None:
        """Let go of what the service holds."""


def harmless(method):
    """Decorate a method of a `Harmless` that may fail. It leaves PyTorch's random state as it was."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.broken:
            return
        with torch.random.fork_rng(devices=[]):
            try:
                method(self, *args, **kwargs)
            except Exception as error:
                self.fail(error)

    return guarded


class ServiceCallback(Harmless, TrainerCallback):
    """A callback that knows its trainer, and that hears of a failed training too; only the first process has it."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.broken = not trainer.is_world_process_zero()

    def on_train_failed(self, error: BaseException) -> None:
        """The training ended with an exception, which may be a KeyboardInterrupt."""

    def test_result(self) -> dict[str, float]:
        """Loss and accuracy on the test set; empty under `torchrun`, where every process would have to take part."""
        return self.trainer.test() if self.trainer.args.world_size == 1 else {}


class WandbCallback(ServiceCallback):
    """Makes a W&B run of each training, named after the trainer's `run_name`.

    It has the config (an allow-list), the metrics of `lablib.metrics.history` by epoch, W&B's system metrics, and a
    summary with the best epoch and the test result. With `wandb_watch`, each epoch has histograms of the parameters and
    gradients in its last step. A resumed training continues its run. A run that the user has open is left alone.
    """

    service = "Weights & Biases"
    run = None

    @harmless
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        start = time.perf_counter()
        self._steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)  # an epoch
        self._histograms = {}
        self._wandb, mode = _wandb_and_mode()
        login = os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_BASE_URL")
        attempt = hash((self._wandb, mode, self.trainer.config.wandb_project, login))
        if attempt in _unavailable:
            self.broken = True
            return
        try:
            self._begin(Path(args.output_dir) / "wandb_run_id", mode, resumed=state.global_step > 0)
        except Exception as error:
            _unavailable.add(attempt)
            hint = "; WANDB_MODE=offline keeps the run on this machine, without an account"
            raise RuntimeError(f"{error}{hint if self._wandb and mode != 'offline' else ''}") from error
        finally:
            self.trainer._clock += time.perf_counter() - start  # a run's seconds are those of its training

    def _begin(self, id_file: Path, mode: str | None, resumed: bool):
        if not self._wandb:
            raise RuntimeError("not installed; `pip install wandb` installs it")
        if not mode:
            raise RuntimeError("not logged in; run `wandb login` in a terminal or set WANDB_API_KEY")
        trainer, config = self.trainer, self.trainer.config
        if not resumed or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        patience = {"init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", 7)), "finish_timeout": 60}  # seconds
        self.run = self._wandb.init(
            project=config.wandb_project,
            group=config.wandb_group or trainer.data.name,
            tags=config.wandb_tags,
            name=trainer.run_name,
            id=id_file.read_text(),
            resume="allow",
            reinit="create_new",
            config=described(trainer),
            dir=os.environ.get("WANDB_DIR") or str(Path(config.output_dir).resolve()),
            mode=mode,
            settings=_PRIVATE | patience | {"quiet": True},
        )
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        if resumed:
            self.run.summary["error"] = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.run and self.trainer.config.wandb_watch and (state.global_step + 1) % self._steps == 0:
            self._watch()

    @harmless
    def _watch(self):
        parameters = dict(self.trainer.model.named_parameters())
        tensors = {f"parameters/{name}": parameter for name, parameter in parameters.items()}
        tensors |= {f"gradients/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        for name, tensor in tensors.items():
            values = tensor.detach().float().cpu().numpy().ravel()
            self._histograms[name] = self._wandb.Histogram(values[np.isfinite(values)])

    @harmless
    def on_evaluate(self, args, state, control, **kwargs):
        rows = history(state.log_history)
        if self.run and rows and rows[-1]["epoch"] == round(state.epoch):
            self.run.log(rows[-1] | self._histograms, step=rows[-1]["epoch"])

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        if self.run:
            rows, test = history(state.log_history), self.test_result()  # the best weights are loaded by now
            best = best_row(rows, self.trainer.config.early_stopping_metric)
            result = {f"best_{name}": best[name] for name in ("epoch", "val_loss", "val_accuracy")}
            result |= {name: test[name] for name in ("test_loss", "test_accuracy") if name in test}
            self._finish(0, epochs=len(rows), **result)

    @harmless
    def on_train_failed(self, error: BaseException) -> None:
        self._finish(1, error=type(error).__name__)  # its text may say more than is meant to leave

    def give_up(self) -> None:
        self._finish(1)

    def _finish(self, exit_code: int, **summary):
        if self.run:
            self.run.summary.update(summary)
            run, self.run = self.run, None
            run.finish(exit_code=exit_code)


def described(trainer) -> dict:
    """The config of a W&B run."""
    config, model, data = trainer.config, trainer.model, trainer.data
    return {
        **{name: getattr(config, name) for name in LOGGED},
        # of the further arguments numbers and switches only: a text may be a token
        **{k: v for k, v in config.training_arguments.items() if isinstance(v, (bool, int, float))},
        **{name: getattr(trainer, name) for name in ("temperature", "alpha") if hasattr(trainer, name)},
        "trainer": type(trainer).__name__,
        "precision": trainer.environment["precision"],
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "model": type(model).__name__,
        "arguments": getattr(model, "_hub_mixin_config", None) or {},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "classes": list(data.class_names)},
        "versions": {"python": platform.python_version()} | {k: version(k) for k in ("torch", "transformers", "wandb")},
    }


def _wandb_and_mode() -> tuple:
    """The package, or None, and its mode as the environment has it now; None if that is online without a login.

    It asks for nothing.
    """
    try:
        import wandb
        from wandb import init  # noqa: F401  # a folder of runs, named wandb, can be imported too
    except ImportError:
        return None, None
    settings = wandb.setup().settings
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if wandb.run:  # the user's; `wandb.login` would refuse
        return wandb, "offline" if wandb.run.offline else mode
    if mode in ("offline", "dryrun", "disabled"):
        return wandb, mode
    silent, settings.silent = settings.silent, True  # or it waits for the server to say who this is
    try:
        return wandb, mode if wandb.login(prompt=False, verify=False) else None
    finally:
        settings.silent = silent
