"""Logs each run to Weights & Biases. If an optional service fails, training continues."""

import os

import httpx
from transformers import TrainerCallback

from lablib.config import one_line, warn
from lablib.metrics import summary

# The fields of a TrainingConfig that may leave this machine. An allow-list, since some of the others hold secrets.
LOGGED = [
    "num_epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "lr_schedule", "warmup_fraction",
    "max_grad_norm", "validation_split", "max_train_images", "early_stopping_patience", "early_stopping_metric",
    "rotation_degrees", "translation_fraction", "horizontal_flip", "crop_padding", "seed", "deterministic",
]  # fmt: skip
_PRIVATE = {"console": "off", "save_code": False, "disable_code": True, "disable_git": True, "x_disable_meta": True}
_ENVIRONMENT = ("torch", "transformers", "python", "precision", "device", "processes")
_TIMEOUT = 7.0  # seconds, for W&B's server to answer and for a run to begin


def harmless(method):
    """Decorate a service's method: its first error becomes a warning, and from then on the service does nothing."""

    def guarded(self, *args, **kwargs):
        try:
            if not self.broken:
                method(self, *args, **kwargs)
        except Exception as error:
            if not self.broken:  # another thread may have warned
                self.broken = True
                warn(f"{self.service}: {one_line(error)}; continuing without it")

    return guarded


def final_result(trainer) -> dict[str, float]:
    """The `summary` of a finished run once its best weights are loaded; without test metrics under `torchrun`."""
    test = trainer.test() if trainer.args.world_size == 1 else {}  # every process would have to take part
    return summary(trainer.history, trainer.config.early_stopping_metric, test)


class WandbCallback(TrainerCallback):
    """Creates a W&B run for each run, or continues a resumed one's; docs/services.md lists what is logged."""

    service, run = "Weights & Biases", None

    def __init__(self, trainer):
        self.trainer, self.broken = trainer, not trainer.is_world_process_zero()

    @harmless
    def on_train_begin(self, args, state, control, **kwargs):
        trainer, config, model, data = self.trainer, self.trainer.config, self.trainer.model, self.trainer.data
        if mode := mode_here():
            import wandb

            described = {name: getattr(config, name) for name in LOGGED}
            described |= {name: getattr(trainer, name) for name in ("temperature", "alpha") if hasattr(trainer, name)}
            described |= {name: trainer.environment[name] for name in _ENVIRONMENT}
            described |= {"trainer": type(trainer).__name__, "model": type(model).__name__}
            described["arguments"] = getattr(model, "_hub_mixin_config", None) or {}
            described["parameters"] = sum(p.numel() for p in model.parameters())
            described["data"] = {"name": data.name, "fingerprint": data.fingerprint, "classes": [*data.class_names]}
            self.run = wandb.init(
                project=config.wandb_project,
                group=config.wandb_group or data.name,
                name=trainer.run_name,
                id=trainer.wandb_id,
                resume="allow",
                reinit="create_new",  # leaves alone a run that the user has open
                config=described,
                dir=os.environ.get("WANDB_DIR", os.path.abspath(config.output_dir)),
                mode=mode,
                settings={**_PRIVATE, "quiet": True, "init_timeout": _TIMEOUT, "finish_timeout": 60},
            )

    @harmless
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.run and self.trainer.config.wandb_watch and self.trainer.is_last_step():
            from wandb import Histogram

            tensors = {f"parameters/{name}": p.detach() for name, p in model.named_parameters()}
            tensors |= {f"gradients/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
            histograms = {name: Histogram(t[t.isfinite()].float().cpu()) for name, t in tensors.items()}
            self.run.log(histograms, step=len(self.trainer.history) + 1)  # same row as `on_evaluate` logs

    @harmless
    def on_evaluate(self, args, state, control, **kwargs):
        if self.run:
            self.run.log(self.trainer.history[-1], step=len(self.trainer.history))

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        if self.run:
            self.run.summary.update({**final_result(self.trainer), "error": None})  # clears an earlier error
            self.run.finish(exit_code=0)

    @harmless
    def on_train_failed(self, error: BaseException) -> None:
        if self.run:
            self.run.summary.update({"error": type(error).__name__})  # the message may be private
            self.run.finish(exit_code=1)


def mode_here() -> str:
    """The W&B mode for all runs of an experiment; empty, with a warning, if W&B cannot be used. Never prompts."""
    try:
        import wandb

        settings = wandb.setup().settings
        mode = os.environ.get("WANDB_MODE", settings.mode)
        if mode not in ("offline", "disabled"):
            httpx.head(settings.base_url, timeout=_TIMEOUT, verify=False)  # W&B would retry for longer; sends no secret
            if not wandb.login(prompt=False, verify=False):
                raise RuntimeError("not logged in, or another run is open; run `wandb login` or set WANDB_API_KEY")
        return mode
    except Exception as error:
        warn(f"Weights & Biases: {one_line(error)}; WANDB_MODE=offline needs no account; continuing without it")
        return ""
