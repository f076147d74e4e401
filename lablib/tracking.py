"""Weights & Biases: each training becomes a run there, and nothing that goes wrong with it harms the training."""

import os
import platform
import secrets
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lablib.metrics import best_row, history
from lablib.services import ServiceCallback, harmless

# The fields of a TrainingConfig that are logged: a list of what may leave this machine, as others hold secrets.
LOGGED = [
    "num_epochs", "batch_size", "learning_rate", "optimizer", "weight_decay", "lr_schedule", "warmup_fraction",
    "max_grad_norm", "validation_split", "max_train_images", "early_stopping_patience", "early_stopping_metric",
    "rotation_degrees", "translation_fraction", "horizontal_flip", "crop_padding", "seed", "deterministic",
]  # fmt: skip
_OFFLINE = "WANDB_MODE=offline keeps the run on this machine, without an account"
_NO_LOGIN = f"not logged in; run `wandb login` in a terminal or set WANDB_API_KEY, or {_OFFLINE}"
_PRIVATE = {
    "console": "off",  # not what is printed
    "disable_code": True,  # nor the notebook
    "disable_git": True,  # nor uncommitted changes
    "x_disable_meta": True,  # nor the command line
}
_UNLESS_SET = {"quiet": True, "init_timeout": 7, "finish_timeout": 60}  # seconds; overridden by WANDB_INIT_TIMEOUT, ...
_unavailable = set()  # what failed in this process, so that the runs of an experiment wait and warn only once


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
        self._steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)  # an epoch
        self._histograms = {}
        self._wandb = _installed_wandb()
        mode = self._wandb and _mode(self._wandb)
        settings = [os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_BASE_URL")]
        way = (self._wandb, mode, self.trainer.config.wandb_project, *settings)
        if way in _unavailable:
            self.broken = True
            return
        try:
            self._begin(Path(args.output_dir) / "wandb_run_id", mode, resumed=state.global_step > 0)
        except Exception:
            _unavailable.add(way)
            raise

    def _begin(self, id_file: Path, mode: str | None, resumed: bool):
        if mode is None:
            raise RuntimeError(_NO_LOGIN if self._wandb else "not installed; `pip install wandb` installs it")
        trainer, config = self.trainer, self.trainer.config
        if not resumed or not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
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
            settings=_PRIVATE | {k: v for k, v in _UNLESS_SET.items() if f"WANDB_{k.upper()}" not in os.environ},
        )
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        if resumed:
            self.run.summary["error"] = None

    @harmless
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.run and self.trainer.config.wandb_watch and (state.global_step + 1) % self._steps == 0:
            for name, parameter in self.trainer.model.named_parameters():
                self._histograms[f"parameters/{name}"] = self._histogram(parameter)
                if parameter.grad is not None:
                    self._histograms[f"gradients/{name}"] = self._histogram(parameter.grad)

    def _histogram(self, tensor: torch.Tensor):
        values = tensor.detach().float().cpu().numpy().ravel()
        return self._wandb.Histogram(values[np.isfinite(values)])

    @harmless
    def on_evaluate(self, args, state, control, **kwargs):
        rows = history(state.log_history)
        if self.run and rows and rows[-1]["epoch"] == round(state.epoch):
            self.run.log(rows[-1] | self._histograms, step=rows[-1]["epoch"])

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        if self.run:
            rows, test = history(state.log_history), self.test_result()  # the best weights are loaded by now
            result = {"epochs": len(rows)} | {k: test[k] for k in ("test_loss", "test_accuracy") if k in test}
            if rows:
                best = best_row(rows, self.trainer.config.early_stopping_metric)
                result |= {"best_epoch": best["epoch"]} | {f"best_{k}": best[k] for k in ("val_loss", "val_accuracy")}
            self.run.summary.update(result)
            self._finish(exit_code=0)

    @harmless
    def on_train_failed(self, error: BaseException) -> None:
        if self.run:
            self.run.summary["error"] = type(error).__name__  # its text may say more than is meant to leave
            self._finish(exit_code=1)

    def give_up(self) -> None:
        if self.run:
            self._finish(exit_code=1)

    def _finish(self, exit_code: int):
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


def _installed_wandb():
    try:
        import wandb
        from wandb import init  # noqa: F401  # a folder of runs, named wandb, can be imported too
    except ImportError:
        return None
    return wandb


def _mode(wandb) -> str | None:
    """W&B's mode, as the environment has it now; None if that is online and there is no login. Asks for nothing."""
    settings = wandb.setup().settings
    mode = os.environ.get("WANDB_MODE") or settings.mode
    if wandb.run:  # the user's; `wandb.login` would refuse
        return "offline" if wandb.run.offline else mode
    if mode in ("offline", "dryrun", "disabled"):
        return mode
    silent, settings.silent = settings.silent, True  # or it waits for the server to say who this is
    try:
        return mode if wandb.login(prompt=False, verify=False) else None
    finally:
        settings.silent = silent
