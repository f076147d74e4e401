"""Weights & Biases: each run is logged there. If an optional service fails, training continues."""

import functools
import os
import time
from pathlib import Path

import httpx
import torch
from transformers import TrainerCallback

from lablib.config import redacted, warn
from lablib.metrics import summary

# The fields of a TrainingConfig that are logged: an allow-list of what may leave this machine; others hold secrets.
LOGGED = [
    "num_epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "lr_schedule", "warmup_fraction",
    "max_grad_norm", "validation_split", "max_train_images", "early_stopping_patience", "early_stopping_metric",
    "rotation_degrees", "translation_fraction", "horizontal_flip", "crop_padding", "seed", "deterministic",
]  # fmt: skip
_ENVIRONMENT = ("torch", "transformers", "python", "precision", "device", "processes")
_SETTINGS = {
    "console": "off",  # what is printed stays here
    "disable_code": True,  # and the notebook
    "disable_git": True,  # and uncommitted changes
    "x_disable_meta": True,  # and the command line
    "finish_timeout": 60,  # seconds
    "quiet": True,
}
_OFFLINE = "; WANDB_MODE=offline keeps the run on this machine and needs no account"


class Harmless:
    """An optional service: an error in a `@harmless` method becomes a warning, after which all of them do nothing."""

    service = "Weights & Biases"  # or what a subclass says
    broken = False

    def fail(self, error: BaseException) -> None:
        """Say once what is wrong, and do nothing more."""
        if not self.broken:
            self.broken = True
            warn(f"{self.service}: {redacted(str(error)) or type(error).__name__}; continuing without it")


def harmless(method):
    """Decorate a method of a `Harmless` that may fail. It leaves PyTorch's random state as it was."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if not self.broken:
            with torch.random.fork_rng(devices=[]):
                try:
                    method(self, *args, **kwargs)
                except Exception as error:
                    self.fail(error)

    return guarded


def final_result(trainer) -> dict[str, float]:
    """The `summary` of a finished run, whose best weights are loaded by now; under `torchrun` without test metrics."""
    test = trainer.test() if trainer.args.world_size == 1 else {}  # in which every process would have to take part
    result = summary(trainer.history, trainer.config.early_stopping_metric, test)
    return {name.replace("val_", "best_val_"): value for name, value in result.items()}


class WandbCallback(Harmless, TrainerCallback):
    """Makes a W&B run for each run, named after the trainer's `run_name`.

    It has the config (an allow-list), the metrics of `lablib.metrics.history` by epoch, W&B's system metrics, and a
    summary with the best epoch and the test result. With `wandb_watch`, each epoch has histograms of the parameters and
    gradients in its last step. A resumed training continues its run. A run that the user has open is left alone.
    """

    run = None

    def __init__(self, trainer):
        self.trainer, self.broken = trainer, not trainer.is_world_process_zero()

    @harmless
    def on_train_begin(self, args, state, control, **kwargs):
        import wandb

        began = time.perf_counter()
        trainer, config = self.trainer, self.trainer.config
        mode, self._histograms = _mode(), {}
        self.run = wandb.init(
            project=config.wandb_project,
            group=config.wandb_group or trainer.data.name,
            name=trainer.run_name,
            id=trainer.wandb_id,
            resume="allow",
            reinit="create_new",
            config=wandb_config(trainer),
            dir=os.environ.get("WANDB_DIR") or str(Path(config.output_dir).resolve()),
            mode=mode,
            settings=_SETTINGS | {"init_timeout": _timeout()},
        )
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        trainer._clock += time.perf_counter() - began  # a run's seconds are those of its training

    @harmless
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not (self.run and self.trainer.config.wandb_watch and self.trainer.is_last_step()):
            return
        from wandb import Histogram

        for name, parameter in self.trainer.model.named_parameters():
            for kind, tensor in {"parameters": parameter, "gradients": parameter.grad}.items():
                if tensor is not None:
                    values = tensor.detach().float().cpu().flatten()
                    self._histograms[f"{kind}/{name}"] = Histogram(values[values.isfinite()])

    @harmless
    def on_evaluate(self, args, state, control, **kwargs):
        if self.run:
            row = self.trainer.history[-1]
            self.run.log(row | self._histograms, step=row["epoch"])

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        self._finish(0, **final_result(self.trainer), error=None)  # clears the one of an earlier interruption

    @harmless
    def on_train_failed(self, error: BaseException) -> None:
        """Mark the run with the type of the error only: its message may contain private information."""
        self._finish(1, error=type(error).__name__)

    def _finish(self, exit_code: int, **summary):
        if self.run:
            self.run.summary.update(summary)
            run, self.run = self.run, None
            run.finish(exit_code=exit_code)


def wandb_config(trainer) -> dict:
    """The config of a W&B run."""
    config, model, data = trainer.config, trainer.model, trainer.data
    return {
        **{name: getattr(config, name) for name in LOGGED},
        **{name: getattr(trainer, name) for name in ("temperature", "alpha") if hasattr(trainer, name)},
        **{name: trainer.environment[name] for name in _ENVIRONMENT},
        "trainer": type(trainer).__name__,
        "model": type(model).__name__,
        "arguments": getattr(model, "_hub_mixin_config", None) or {},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {"name": data.name, "fingerprint": data.fingerprint, "classes": list(data.class_names)},
    }


def mode_here() -> str:
    """W&B's mode, for all runs of an experiment; empty, after a warning, if W&B cannot be used."""
    try:
        return _mode()
    except Exception as error:
        Harmless().fail(error)
        return ""


def _mode() -> str:
    """W&B's mode in the current environment. Never prompts; raises an error if W&B cannot be used."""
    import wandb

    if wandb.run:  # the user's; `wandb.login` would refuse
        return wandb.run.settings.mode
    settings = wandb.setup().settings
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        return mode
    silent, settings.silent = settings.silent, True  # otherwise it asks the server who this is, and waits
    try:
        logged_in = wandb.login(prompt=False, verify=False)
    finally:
        settings.silent = silent
    if not logged_in:
        raise RuntimeError(f"not logged in; run `wandb login` in a terminal or set WANDB_API_KEY{_OFFLINE}")
    try:  # W&B itself would try for longer; nothing is sent, so no certificate is needed
        httpx.head(settings.base_url, timeout=_timeout(), verify=False)
    except httpx.HTTPError as error:
        raise RuntimeError(f"no answer from {settings.base_url} ({type(error).__name__}){_OFFLINE}") from None
    return mode


def _timeout() -> float:
    return float(os.environ.get("WANDB_INIT_TIMEOUT", 7))  # seconds
