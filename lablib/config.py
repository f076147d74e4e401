"""TrainingConfig: every knob of a run, checked when it is made."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lablib.processes import leave_group_at_exit, num_processes
from lablib.secret import Secret, looks_like_a_token

if TYPE_CHECKING:  # transformers takes seconds to import; only a training needs it
    from transformers import TrainingArguments

OPTIMIZERS = ("adam", "adamw", "sgd")
LR_SCHEDULES = ("constant", "cosine")
EARLY_STOPPING_METRICS = ("accuracy", "loss")
PRECISIONS = ("auto", "fp32", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")

# Further fields of transformers.TrainingArguments that are known to work here; dataloader_drop_last in training only.
TRAINING_ARGUMENTS = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_drop_last", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "ddp_timeout", "disable_tqdm",
    "eval_accumulation_steps", "gradient_accumulation_steps", "log_level", "lr_scheduler_kwargs", "max_steps",
    "save_total_limit", "torch_compile", "torch_compile_backend", "torch_compile_mode",
)  # fmt: skip
# TrainingConfig's field -> the arguments that it sets.
_SET_BY = {
    "batch_size": ("per_device_train_batch_size", "per_device_eval_batch_size", "auto_find_batch_size"),
    "checkpoint_seconds": ("save_strategy", "save_steps", "save_only_model"),
    "deterministic": ("full_determinism",), "device": ("use_cpu",),
    "early_stopping_metric": ("metric_for_best_model", "greater_is_better", "load_best_model_at_end"),
    "learning_rate": ("learning_rate",), "lr_schedule": ("lr_scheduler_type",), "max_grad_norm": ("max_grad_norm",),
    "num_epochs": ("num_train_epochs",), "optimizer": ("optim", "optim_args"), "output_dir": ("output_dir",),
    "precision": ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "seed": ("seed", "data_seed"),
    "use_wandb": ("report_to",), "warmup_fraction": ("warmup_steps",), "weight_decay": ("weight_decay",),
}  # fmt: skip
_REASONS = {
    "but early stopping and history need one log and one validation per epoch": (
        "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "logging_strategy", "logging_steps",
    ),
    "but an evaluation needs the logits of all images at once": (
        "eval_do_concat_batches", "include_for_metrics", "batch_eval_metrics", "prediction_loss_only",
    ),
    "but a resumed training would no longer be exact": (
        "ignore_data_skip", "restore_callback_states_from_checkpoint", "train_sampling_strategy",
    ),
    "but the lab's batches are images and labels": ("remove_unused_columns", "label_names"),
    "but a loss that is not finite ends the training": ("logging_nan_inf_filter",),
    "which would do nothing: the trainer's `losses` make the loss": ("label_smoothing_factor",),
} | {f"which TrainingConfig sets by its field {name}": arguments for name, arguments in _SET_BY.items()}  # fmt: skip
_REFUSED_ARGUMENTS = {name: reason for reason, names in _REASONS.items() for name in names}

# What has no influence on the science of a run: who is told about it, and where its files lie.
NOT_IDENTITY = (
    "output_dir",
    "checkpoint_seconds",
    "device",
    "use_wandb",
    "wandb_project",
    "wandb_group",
    "wandb_tags",
    "wandb_watch",
    "use_telegram_notifications",
    "telegram_additional_info",
    "telegram_every_run",
    "telegram_bot_token",
    "telegram_chat_id",
)


@dataclass(kw_only=True, frozen=True)
class TrainingConfig:
    """Every knob of one run.

    Raises ValueError when it is made with a value that is not allowed, naming the field, the value and what is allowed.
    To change a knob, make another config: `dataclasses.replace(config, seed=1)`.
    """

    num_epochs: int = 60  # at most; early stopping may end a run sooner
    batch_size: int = 256  # images, of all processes together
    learning_rate: float = 1e-3
    optimizer: str = "adam"  # or "adamw", or "sgd" with momentum 0.9
    weight_decay: float = 0.0  # as the optimizer defines it: L2 for adam and sgd, decoupled for adamw
    lr_schedule: str = "constant"  # or "cosine", which falls to 0 over num_epochs
    warmup_fraction: float = 0.0  # part of all steps in which the rate rises linearly from 0
    max_grad_norm: float | None = None  # None: gradients are not clipped
    validation_split: float = 0.1  # part of the training set, stratified by class
    max_train_images: int | None = None  # train on no more than this many of the rest, the classes' shares kept
    early_stopping_patience: int | None = 10  # epochs without improvement; None or 0: never
    early_stopping_metric: str = "accuracy"  # on the validation part; it also chooses the best epoch
    rotation_degrees: float = 10.0  # an angle from [-r, r] an image
    translation_fraction: float = 0.1  # a shift of up to this part of the height and of the width
    horizontal_flip: bool = False
    crop_padding: int = 0  # pixels of 0 put around an image, of which a piece of its old size is then cut out at random
    precision: str = "auto"  # "bf16" is autocast; "auto" takes it for convolutions where the hardware is fast at it
    device: str = "auto"  # cuda, else mps, else cpu
    seed: int = 0  # split, initial weights, order of the images, augmentation, dropout
    deterministic: bool = False  # the same bits each time on a GPU too, which takes longer; a CPU gives them anyway
    output_dir: str = "runs"  # the run store
    checkpoint_seconds: float = 300.0  # at most, between two checkpoints within an epoch; each epoch ends with one
    use_wandb: bool = False
    wandb_project: str = "residual-and-distillation-lab"
    wandb_group: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_watch: bool = False  # also log histograms of gradients and parameters, which takes time
    use_telegram_notifications: bool = False
    telegram_additional_info: str = ""
    telegram_every_run: bool = False  # a message for each run of an experiment too, not only one at its end
    telegram_bot_token: Secret | str | None = None  # None: from the environment, TELEGRAM_BOT_TOKEN; kept as a Secret
    telegram_chat_id: str | int | None = None  # None: from the environment, TELEGRAM_CHAT_ID
    training_arguments: dict[str, Any] = field(default_factory=dict)  # those of TRAINING_ARGUMENTS

    def __post_init__(self):
        self._check_credentials()  # before anything that may show the config
        if isinstance(self.wandb_tags, list):
            object.__setattr__(self, "wandb_tags", tuple(self.wandb_tags))
        if isinstance(self.output_dir, Path):
            object.__setattr__(self, "output_dir", str(self.output_dir))
        self._check_int("num_epochs", 1)
        self._check_int("batch_size", 1)
        self._check_number("learning_rate", "a number above 0", lambda x: x > 0)
        self._check_choice("optimizer", OPTIMIZERS)
        self._check_number("weight_decay", "a number of at least 0", lambda x: x >= 0)
        self._check_choice("lr_schedule", LR_SCHEDULES)
        self._check_number("warmup_fraction", "a number from 0 to below 1", lambda x: 0 <= x < 1)
        if self.max_grad_norm is not None:
            self._check_number("max_grad_norm", "None or a number above 0", lambda x: x > 0)
        self._check_number("validation_split", "a number above 0 and below 1", lambda x: 0 < x < 1)
        if self.max_train_images is not None:
            self._check_int("max_train_images", 1, "None or ")
        if self.early_stopping_patience is not None:
            self._check_int("early_stopping_patience", 0, "None, or ")
            if self.early_stopping_patience == 0:
                object.__setattr__(self, "early_stopping_patience", None)
        self._check_choice("early_stopping_metric", EARLY_STOPPING_METRICS)
        self._check_number("rotation_degrees", "a number from 0 to 180", lambda x: 0 <= x <= 180)
        self._check_number("translation_fraction", "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self._check_bool("horizontal_flip")
        self._check_int("crop_padding", 0)
        self._check_choice("precision", PRECISIONS)
        self._check_choice("device", DEVICES)
        self._check_int("seed", 0)
        if self.seed >= 2**32:
            raise self._error("seed", "a whole number below 2**32")
        self._check_bool("deterministic")
        self._check_text("output_dir")
        self._check_number("checkpoint_seconds", "a number above 0", lambda x: x > 0)
        self._check_bool("use_wandb")
        self._check_text("wandb_project")
        if self.wandb_group is not None:
            self._check_text("wandb_group", "None or ")
        if not isinstance(self.wandb_tags, tuple) or not all(isinstance(tag, str) for tag in self.wandb_tags):
            raise self._error("wandb_tags", "a tuple or list of strings")
        self._check_bool("wandb_watch")
        self._check_bool("use_telegram_notifications")
        self._check_bool("telegram_every_run")
        if not isinstance(self.telegram_additional_info, str):
            raise self._error("telegram_additional_info", "a string")
        self._check_training_arguments()

    def _error(self, name: str, allowed: str) -> ValueError:
        return ValueError(f"TrainingConfig: {name} = {getattr(self, name)!r}, but {name} must be {allowed}")

    def _check_int(self, name: str, least: int, also: str = ""):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self._error(name, f"{also}a whole number of at least {least}")

    def _check_number(self, name: str, allowed: str, holds):
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self._error(name, allowed)
        if not holds(value):
            raise self._error(name, allowed)
        object.__setattr__(self, name, float(value))  # 1 and 1.0 are one config

    def _check_choice(self, name: str, choices: tuple[str, ...]):
        if getattr(self, name) not in choices:
            raise self._error(name, f"one of {_listed(choices)}")

    def _check_bool(self, name: str):
        if not isinstance(getattr(self, name), bool):
            raise self._error(name, "True or False")

    def _check_text(self, name: str, also: str = ""):
        if not isinstance(getattr(self, name), str) or not getattr(self, name):
            raise self._error(name, f"{also}a string that is not empty")

    def _check_credentials(self):
        token, chat = self.telegram_bot_token, self.telegram_chat_id
        if isinstance(token, str) and token:
            object.__setattr__(self, "telegram_bot_token", Secret(token))
        elif token is not None and not isinstance(token, Secret):
            if token:
                object.__setattr__(self, "telegram_bot_token", "…")  # whatever it is, no error shows it
            raise self._error("telegram_bot_token", "None or a string that is not empty")
        if isinstance(chat, str) and looks_like_a_token(chat):
            object.__setattr__(self, "telegram_chat_id", "…")
            raise ValueError("TrainingConfig: telegram_chat_id looks like a bot's token; it is the number of a chat")
        if chat is not None and (isinstance(chat, bool) or not isinstance(chat, (str, int)) or chat == ""):
            raise self._error("telegram_chat_id", "None, or the number or name of a chat")

    def _check_training_arguments(self):
        if not isinstance(self.training_arguments, dict):
            raise self._error("training_arguments", "a dict of transformers.TrainingArguments fields")
        for name in self.training_arguments:
            if name not in TRAINING_ARGUMENTS:
                close = difflib.get_close_matches(str(name), TRAINING_ARGUMENTS, n=1, cutoff=0.8)
                hint = f"did you mean {close[0]!r}?" if close else f"it takes {_listed(TRAINING_ARGUMENTS)}"
                reason = _REFUSED_ARGUMENTS.get(name, f"which is not tested with this lab; {hint}")
                raise ValueError(f"TrainingConfig: training_arguments has {name!r}, {reason}")

    def _own_arguments(self, output_dir: str, bf16: bool) -> dict[str, Any]:
        schedule = self.lr_schedule
        if schedule == "constant" and self.warmup_fraction:
            schedule = "constant_with_warmup"
        return {
            "output_dir": output_dir,
            "num_train_epochs": self.num_epochs,
            "per_device_train_batch_size": self.batch_size // num_processes(),
            "per_device_eval_batch_size": -(-max(self.batch_size, 1000) // num_processes()),
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": schedule,
            "warmup_steps": self.warmup_fraction,  # below 1 it is a fraction of all steps
            "max_grad_norm": self.max_grad_norm or 0.0,
            "seed": self.seed,
            "data_seed": self.seed,
            "bf16": bf16,
            "use_cpu": self.device == "cpu" or (self.device == "auto" and not _has_accelerator()),
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{self.early_stopping_metric}",
            "greater_is_better": self.early_stopping_metric == "accuracy",
            "logging_nan_inf_filter": False,  # the trainer stops on a loss that is not finite instead
            "remove_unused_columns": False,
        }

    def to_training_arguments(self, output_dir: str, *, bf16: bool = False) -> "TrainingArguments":
        """The same knobs as `transformers.TrainingArguments`; checkpoints go to `output_dir`.

        `training_arguments` come last, and win over the lab's defaults.
        Raises ValueError where several processes (`torchrun`) cannot share a batch out evenly.
        """
        from transformers import TrainingArguments

        if self.batch_size % num_processes():
            raise self._error("batch_size", f"a multiple of the number of processes, which is {num_processes()}")
        defaults = {
            "save_total_limit": 2,
            "restore_callback_states_from_checkpoint": True,  # or the patience would start anew on resume
            "disable_tqdm": True,
            "report_to": "none",
            "log_level": "error",
            "dataloader_pin_memory": False,  # the images are on the device already
            "ddp_find_unused_parameters": False,
        }
        if num_processes() > 1:
            leave_group_at_exit()
        return TrainingArguments(**self._own_arguments(output_dir, bf16), **{**defaults, **self.training_arguments})

    def identity(self) -> dict[str, Any]:
        """The knobs that change a run's outcome, without those that are off (None, False, 0 or empty).

        So a knob that is added later, and off by default, changes no run's name.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_IDENTITY}
        return {name: value for name, value in values.items() if value}

    __identity__ = identity


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _listed(choices: tuple[str, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)
