"""TrainingConfig: every knob of a run, checked when it is made."""

import atexit
import dataclasses
import difflib
import functools
import gc
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic.dataclasses import dataclass

from lablib.parameters import Natural, Positive, Share

if TYPE_CHECKING:  # transformers takes seconds to import; only a training needs it
    from transformers import TrainingArguments

Optimizer = Literal["adam", "adamw", "sgd"]
LRSchedule = Literal["constant", "cosine"]
Metric = Literal["accuracy", "loss"]
Precision = Literal["auto", "fp32", "bf16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
_Whole = Annotated[int, Field(ge=1)]
_Text = Annotated[str, Field(min_length=1)]
_Folder = Annotated[_Text, BeforeValidator(lambda p: os.path.expanduser(p) if isinstance(p, (str, os.PathLike)) else p)]
_Tags = Annotated[tuple[str, ...], BeforeValidator(lambda tags: tuple(tags) if isinstance(tags, list) else tags)]
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
_TOKEN = re.compile(r"\d+(?::|%3[Aa])[\w-]{30,}")

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

# What has no influence on a run's outcome: where it runs, where its files lie, and who is told of it.
NOT_IDENTITY = (
    "output_dir", "checkpoint_seconds", "device", "use_wandb", "wandb_project", "wandb_group", "wandb_tags",
    "wandb_watch", "use_telegram_notifications", "telegram_additional_info", "telegram_every_run",
    "telegram_bot_token", "telegram_chat_id",
)  # fmt: skip


def redacted(text: str) -> str:
    """A text from elsewhere, without whatever looks like a bot's token."""
    return _TOKEN.sub("…", text)


def _with_plain_errors(cls: type) -> type:
    """Let a pydantic dataclass raise a ValueError of a line a fault: the field, its value, and what is allowed."""
    validate = cls.__init__

    @functools.wraps(validate)
    def __init__(self, *args, **knobs):
        try:
            validate(self, *args, **knobs)
        except ValidationError as error:
            first = {fault["loc"][0]: fault["msg"] for fault in reversed(error.errors(include_input=False))}
            lines = [f"{cls.__name__}: {_fault(name, knobs, first[name])}" for name in reversed(first)]
            raise ValueError("\n".join(lines)) from None

    cls.__init__ = __init__
    return cls


def _fault(name: Any, knobs: dict[str, Any], message: str) -> str:
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        return f"there is no field {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"use one of {known}")
    shown = "" if name.startswith(("telegram_bot", "telegram_chat")) else f" = {knobs[name]!r}"
    message = message.removeprefix("Input ").removeprefix("Value error, ")
    return f"{name}{shown}, but {name} {message[0].lower()}{message[1:]}"


@_with_plain_errors
@dataclass(kw_only=True, frozen=True, config=_CHECKED)
class TrainingConfig:
    """Every knob of one run.

    Raises ValueError for an unknown field or a value that is not allowed, and says what is allowed.
    To change a knob, make another config: `dataclasses.replace(config, seed=1)`.
    """

    num_epochs: _Whole = 60  # at most; early stopping may end a run sooner
    batch_size: _Whole = 256  # images, of all processes together
    learning_rate: Positive = 1e-3
    optimizer: Optimizer = "adam"  # or "adamw", or "sgd" with momentum 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # L2 for adam and sgd, decoupled for adamw
    lr_schedule: LRSchedule = "constant"  # or "cosine", which falls to 0 over num_epochs
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of all steps, in which the rate rises linearly from 0
    max_grad_norm: Positive | None = None  # None: gradients are not clipped
    validation_split: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the training set, stratified by class
    max_train_images: _Whole | None = None  # train on no more than this many of the rest, the classes' shares kept
    early_stopping_patience: Natural | None = 10  # epochs without improvement; None or 0: never
    early_stopping_metric: Metric = "accuracy"  # on the validation part; it also chooses the best epoch
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0  # each image by an angle from [-r, r]
    translation_fraction: Share = 0.1  # a shift of up to this part of the height and of the width
    horizontal_flip: bool = False
    crop_padding: Natural = 0  # pixels of 0 put around an image, of which a piece of the old size is cut out at random
    precision: Precision = "auto"  # "bf16" is autocast; "auto" takes it for convolutions if that is faster here
    device: Device = "auto"  # cuda, else mps, else cpu
    seed: Annotated[int, Field(ge=0, lt=2**32)] = (
        0  # split, initial weights, order of the images, augmentation, dropout
    )
    deterministic: bool = False  # the same bits each time on a GPU too, which takes longer; a CPU gives them anyway
    output_dir: _Folder = "runs"  # the run store
    checkpoint_seconds: Positive = 300.0  # at most, between two checkpoints within an epoch; each epoch ends with one
    use_wandb: bool = False
    wandb_project: _Text = "residual-and-distillation-lab"
    wandb_group: _Text | None = None
    wandb_tags: _Tags = ()
    wandb_watch: bool = False  # also log histograms of gradients and parameters, which takes time
    use_telegram_notifications: bool = False
    telegram_additional_info: str = ""
    telegram_every_run: bool = False  # a message for each run of an experiment too, not only one at its end
    telegram_bot_token: Annotated[SecretStr, Field(min_length=1)] | None = None  # None: TELEGRAM_BOT_TOKEN is read
    telegram_chat_id: _Text | int | None = None  # None: TELEGRAM_CHAT_ID is read from the environment
    training_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)  # those of TRAINING_ARGUMENTS

    @field_validator("early_stopping_patience")
    @classmethod
    def _off(cls, patience: int | None) -> int | None:
        return patience or None

    @field_validator("telegram_chat_id", mode="before")
    @classmethod
    def _is_no_token(cls, chat: Any) -> Any:
        if isinstance(chat, str) and _TOKEN.search(chat):
            raise ValueError("looks like a bot's token; it is the number of a chat")
        return chat

    @field_validator("training_arguments")
    @classmethod
    def _are_known_to_work(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        for name in arguments.keys() - {*TRAINING_ARGUMENTS}:
            close = difflib.get_close_matches(name, TRAINING_ARGUMENTS, n=1, cutoff=0.8)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(TRAINING_ARGUMENTS)}"
            raise ValueError(
                f"has {name!r}, " + _REFUSED_ARGUMENTS.get(name, f"which is not tested with this lab; {hint}")
            )
        return arguments

    def identity(self) -> dict[str, Any]:
        """The knobs that change a run's outcome, without those that are off (None, False, 0 or empty).

        So a knob that is added later, and off by default, changes no run's name.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_IDENTITY}
        return {name: value for name, value in values.items() if value}

    __identity__ = identity

    def to_training_arguments(self, output_dir: str, *, bf16: bool = False) -> "TrainingArguments":
        """The same knobs as `transformers.TrainingArguments`; checkpoints go to `output_dir`.

        Raises ValueError where several processes (`torchrun`) cannot share a batch out evenly.
        """
        import torch
        from transformers import TrainingArguments

        processes = num_processes()
        if self.batch_size % processes:
            raise ValueError(
                f"TrainingConfig: batch_size = {self.batch_size}, but batch_size should be a multiple of the number of "
                f"processes, which is {processes}"
            )
        if processes > 1:
            leave_group_at_exit()
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        warmed_up = {"constant": "constant_with_warmup"}.get(self.lr_schedule, self.lr_schedule)
        defaults = {
            "save_total_limit": 2,
            "disable_tqdm": True,
            "log_level": "error",
            "ddp_find_unused_parameters": False,
        }
        return TrainingArguments(
            output_dir=output_dir,
            num_train_epochs=self.num_epochs,
            per_device_train_batch_size=self.batch_size // processes,
            per_device_eval_batch_size=-(-max(self.batch_size, 1000) // processes),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type=warmed_up if self.warmup_fraction else self.lr_schedule,
            warmup_steps=self.warmup_fraction,  # below 1 it is a fraction of all steps
            max_grad_norm=self.max_grad_norm or 0.0,
            seed=self.seed,
            data_seed=self.seed,
            bf16=bf16,
            use_cpu=self.device == "cpu" or (self.device == "auto" and not accelerated),
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=f"eval_{self.early_stopping_metric}",
            greater_is_better=self.early_stopping_metric == "accuracy",
            restore_callback_states_from_checkpoint=True,  # or the patience would start again on resume
            report_to="none",
            logging_nan_inf_filter=False,  # the trainer stops on a loss that is not finite instead
            remove_unused_columns=False,
            dataloader_pin_memory=False,  # the images are on the device already
            **{**defaults, **self.training_arguments},
        )


def num_processes() -> int:
    """How many processes train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this one writes the files and speaks to people."""
    return int(os.environ.get("RANK", 0)) == 0


@functools.cache
def leave_group_at_exit():
    """Let this process leave `torch.distributed`'s group when it ends, unless by an error: the others might wait then.

    Gloo's threads would outlive Python otherwise, and one that lets go of a tensor so late aborts the process
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    atexit.register(_leave_group)


def _leave_group():
    import torch

    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()  # trainers in cycles hold the group, and with it its threads
        torch.distributed.destroy_process_group()
