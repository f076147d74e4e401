"""Weights & Biases: a training becomes a run there, and nothing of it can harm the training."""

import contextlib
import inspect
import io
import os
import secrets
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from lablib.files import write_atomically
from lablib.metrics import best_row, history
from lablib.resuming import VERSIONS
from lablib.services import ServiceCallback, harmless, learning_curves

# The fields of a TrainingConfig that are logged. All others stay here, whatever is added: among them are secrets.
LOGGED = (
    "num_epochs",
    "batch_size",
    "learning_rate",
    "optimizer",
    "weight_decay",
    "lr_schedule",
    "warmup_fraction",
    "max_grad_norm",
    "validation_split",
    "max_train_images",
    "early_stopping_patience",
    "early_stopping_metric",
    "rotation_degrees",
    "translation_fraction",
    "horizontal_flip",
    "crop_padding",
    "seed",
    "deterministic",
)
_BINS = 64  # of a histogram
_OFFLINE = "WANDB_MODE=offline keeps the run on this machine, without an account"
_NO_LOGIN = f"not logged in; `wandb login` in a terminal, or the variable WANDB_API_KEY, logs in, and {_OFFLINE}"
# W&B's own settings that hold text which nobody chose to log, and the longest waits for a network that is not there.
_SETTINGS = {
    "console": "off",  # what is printed
    "save_code": False,  # the notebook
    "disable_code": True,
    "disable_git": True,  # what is not committed
    "x_disable_meta": True,  # the command line
    "allow_val_change": True,  # a run may be resumed on another device
}
_UNLESS_SET = {"quiet": True, "init_timeout": 30, "finish_timeout": 60}  # seconds; by WANDB_QUIET, ...


class NotAvailableError(RuntimeError):
    """Weights & Biases cannot be used here as it is."""


class WandbCallback(ServiceCallback):
    """Makes one W&B run of each training of a trainer, which it names after the trainer's `run_name`.

    A run has the config (a list of named fields of it), model, data set and library versions; by epoch the metrics of
    `lablib.metrics.history`, with `wandb_watch` also histograms of the gradients and parameters in the epoch's last
    step; at its end the best epoch's validation result, the test result and the learning curves. A resumed training
    continues its run, whose id lies beside the checkpoints. A run that the user has open is left alone.
    """

    service = "Weights & Biases"

    def __init__(self, trainer):
        super().__init__(trainer)
        self.run = None
        self._left_behind = None  # what to put back once W&B is gone; None where it was there before

    @harmless
    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        start = time.perf_counter()
        try:
            self._begin(Path(args.output_dir) / "wandb_run_id", resumed=state.global_step > 0)
        finally:
            self.trainer._clock += time.perf_counter() - start  # the wait is not the training's
        self._steps = -(-len(train_dataloader) // args.gradient_accumulation_steps)  # an epoch
        self._histograms = {}

    def _begin(self, id_file: Path, resumed: bool):
        self._wandb = wandb = _installed_wandb()
        if "WANDB_SERVICE" not in os.environ and wandb.run is None:
            self._left_behind = sys.exit, sys.excepthook
        trainer, config = self.trainer, self.trainer.config
        mode = _mode(wandb)
        if not resumed or not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4).encode())
        try:
            self.run = wandb.init(
                project=config.wandb_project,
                group=config.wandb_group or trainer.data.name,
                tags=config.wandb_tags,
                name=trainer.run_name,
                id=id_file.read_text(),
                resume="allow",
                reinit="create_new",
                config=described(trainer),
                dir=None if os.environ.get("WANDB_DIR") else str(Path(config.output_dir).resolve()),
                mode=mode,
                settings=_settings(wandb),
            )
        except wandb.Error as error:
            raise NotAvailableError(f"{error} ({_OFFLINE})" if mode == "online" else str(error)) from error
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")
        if resumed:
            self.run.summary["error"] = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.run and self.trainer.config.wandb_watch and (state.global_step + 1) % self._steps == 0:
            self._watch()

    @harmless
    def _watch(self):
        for name, parameter in self.trainer.model.named_parameters():
            self._histograms[f"parameters/{name}"] = self._histogram(parameter)
            if parameter.grad is not None:
                self._histograms[f"gradients/{name}"] = self._histogram(parameter.grad)

    def _histogram(self, tensor: torch.Tensor):
        values = tensor.detach().float().flatten().cpu()
        if not values.isfinite().all():
            values = values[values.isfinite()]
        low, high = (edge.item() for edge in values.aminmax()) if len(values) else (0.0, 0.0)
        if low == high:
            low, high = low - 0.5, high + 0.5  # as NumPy does
        counts = torch.histc(values, _BINS, low, high)  # twice as fast as torch.histogram
        return self._wandb.Histogram(np_histogram=(counts.int().numpy(), np.linspace(low, high, _BINS + 1)))

    @harmless
    def on_evaluate(self, args, state, control, **kwargs):
        epoch = round(state.epoch)
        rows = history(state.log_history)
        if self.run and rows and rows[-1]["epoch"] == epoch:
            # The last epoch's row stays open: the learning curves will be in it.
            more, self._histograms = self._histograms, {}
            self.run.log(rows[-1] | more, step=epoch, commit=not control.should_training_stop)

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        if not self.run:
            return
        rows = history(state.log_history)
        test = self.test_result()  # the best epoch's weights are loaded by now
        result = {"epochs": len(rows)} | {k: test[k] for k in ("test_loss", "test_accuracy") if k in test}
        if rows:
            best = best_row(rows, self.trainer.config.early_stopping_metric)
            result |= {"best_epoch": best["epoch"]} | {f"best_{k}": best[k] for k in ("val_loss", "val_accuracy")}
            self.run.log({"learning_curves": self._curves(rows)}, step=rows[-1]["epoch"], commit=True)
        self.run.summary.update(result)
        self._finish(exit_code=0)

    def _curves(self, rows: list[dict]):
        from PIL import Image

        title = f"{self.trainer.run_name} on {self.trainer.data.name}"
        return self._wandb.Image(Image.open(io.BytesIO(learning_curves(rows, title))))

    @harmless
    def on_train_failed(self, error: BaseException) -> None:
        if self.run:
            self.run.summary["error"] = type(error).__name__  # its text may say more than is meant to leave
        self._finish(exit_code=1)

    def give_up(self) -> None:
        self._finish(exit_code=1)

    def _finish(self, exit_code: int):
        run, self.run = self.run, None
        try:
            if run:
                run.finish(exit_code=exit_code)
        finally:
            self._leave()

    def _leave(self):
        """End W&B's process and threads, unless it was here before or the user has a run by now."""
        left_behind, self._left_behind = self._left_behind, None
        if left_behind is None or getattr(self._wandb.setup(), "most_recent_active_run", None):
            return
        with contextlib.suppress(SystemExit):  # it exits if its process did not end well
            self._wandb.teardown()
        # It replaces both each time it starts, and would print the traceback of an error once for each.
        if type(getattr(sys.exit, "__self__", None)).__module__.startswith("wandb."):
            sys.exit = left_behind[0]
        if type(getattr(sys.excepthook, "__self__", None)).__module__.startswith("wandb."):
            sys.excepthook = left_behind[1]


def described(trainer) -> dict:
    """What W&B is told of a training before it begins."""
    config, model, data = trainer.config, trainer.model, trainer.data
    arguments = getattr(model, "_hub_mixin_config", None)
    return {
        **{name: getattr(config, name) for name in LOGGED},
        # of the further arguments numbers and switches only: a text may be a token
        **{k: v for k, v in config.training_arguments.items() if isinstance(v, (bool, int, float))},
        **{name: getattr(trainer, name) for name in ("temperature", "alpha") if hasattr(trainer, name)},
        "trainer": type(trainer).__name__,
        "precision": trainer.environment["precision"],
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "arguments": arguments if isinstance(arguments, dict) else {},
        },
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "image_shape": list(data.image_shape),
            "classes": list(data.class_names),
        },
        "versions": {name: trainer.environment[name] for name in VERSIONS} | {"wandb": version("wandb")},
    }


def _installed_wandb():
    try:
        import wandb

        wandb.init  # noqa: B018  # a folder named wandb, such as that of its runs, is a package to Python, too
    except (ImportError, AttributeError) as error:
        raise NotAvailableError(f"{error}; `pip install wandb` installs what is missing") from error
    return wandb


def _mode(wandb) -> str:
    """W&B's mode: from the environment as it is now, not as it was when W&B was set up. It asks for nothing.

    Raises NotAvailableError where there would be a question: online and not logged in.
    """
    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        return mode
    if wandb.run is not None:  # `wandb.login` would say nothing
        return "offline" if wandb.run.offline else mode
    if "prompt" in inspect.signature(wandb.login).parameters:
        logged_in = wandb.login(prompt=False, verify=False)
    else:
        logged_in = wandb.api.api_key is not None
    if not logged_in:
        raise NotAvailableError(_NO_LOGIN)
    return mode


def _settings(wandb):
    wanted = _SETTINGS | {k: v for k, v in _UNLESS_SET.items() if f"WANDB_{k.upper()}" not in os.environ}
    return wandb.Settings(**{k: v for k, v in wanted.items() if k in wandb.Settings.model_fields})
