"""The settings of a run (`TrainingConfig`) and the parameters of a notebook, checked before anything else happens."""

import atexit
import dataclasses
import difflib
import functools
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, SecretStr, ValidationError
from pydantic.dataclasses import dataclass

# The annotations of a notebook's parameters have names because papermill's help cannot read any others.
Count = Annotated[int, Field(ge=1, le=10_000)]
Natural = Annotated[int, Field(ge=0)]
Counts = Annotated[list[Count], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[list[Share], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, le=1000)]  # no larger rate or temperature makes sense
Temperatures = Annotated[list[Positive], Field(min_length=1)]

_Folder = Annotated[str, BeforeValidator(lambda p: os.path.expanduser(p) if isinstance(p, (str, os.PathLike)) else p)]
_Chat = Annotated[str, Field(pattern=r"^(-?\d+|@\w+)$")]  # a number or a name; it may be shown, so a token is refused
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
NOT_IDENTITY = (  # settings that do not define a run
    "output_dir", "checkpoint_seconds", "device", "use_wandb", "wandb_project", "wandb_group", "wandb_watch",
    "use_telegram_notifications", "telegram_additional_info", "telegram_bot_token", "telegram_chat_id",
)  # fmt: skip


def redacted(text: str) -> str:
    """The text with anything that looks like a bot's token removed."""
    return re.sub(r"\d+(?::|%3[Aa])[\w-]{30,}", "…", text)


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message, without tokens; later lines may be a traceback."""
    return ": ".join([type(error).__name__, *redacted(str(error)).splitlines()[:1]])[:500]


def warn(text: str) -> None:
    """Warn without showing a source line, which would come from lablib or an unrelated file."""
    warnings.warn_explicit(text, UserWarning, "lablib", 0)


warn_once = functools.cache(warn)


def _checked(cls: type) -> type:
    """A frozen pydantic dataclass whose ValueError has one line per wrong field and shows no secret values."""
    cls = dataclass(cls, kw_only=True, frozen=True, config=_CHECKED)
    validate, known = cls.__init__, [field.name for field in dataclasses.fields(cls)]

    def __init__(self, **values):
        try:
            validate(self, **values)
        except ValidationError as error:
            lines = {}  # only the last fault of each field
            for fault in error.errors():
                name = fault["loc"][0]
                shown = name if name.startswith("telegram") else f"{name} = {values[name]!r}"
                lines[name] = f"{cls.__name__}: {shown}: {fault['msg'].replace('Input', name, 1)}"
                if name not in known:
                    close = difflib.get_close_matches(name, known, n=1) or known
                    lines[name] = f"{cls.__name__}: there is no parameter {name!r}; did you mean {' or '.join(close)}?"
            raise ValueError("\n".join(lines.values())) from None

    cls.__init__ = __init__
    return cls


@_checked
class TrainingConfig:
    """All settings of one run. ValueError says which values are allowed. `dataclasses.replace` changes a setting."""

    num_epochs: PositiveInt = 60  # at most; early stopping may end a run sooner
    batch_size: PositiveInt = 256  # images, over all processes together
    learning_rate: PositiveFloat = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"  # sgd has momentum 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # L2 for adam and sgd, decoupled for adamw
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 over num_epochs
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of all steps, while the rate rises linearly from 0
    max_grad_norm: PositiveFloat | None = None  # None: gradients are not clipped
    validation_split: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the training set, stratified by class
    max_train_images: PositiveInt | None = None  # train on at most this many of the rest, in the same class proportions
    early_stopping_patience: Natural | None = 10  # epochs without improvement; None or 0: never
    early_stopping_metric: Literal["accuracy", "loss"] = "accuracy"  # on validation; also selects the best epoch
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0  # rotate each image by an angle from [-r, r]
    translation_fraction: Share = 0.1  # shift by up to this fraction of height and width
    horizontal_flip: bool = False  # mirror each image with probability 1/2
    crop_padding: Natural = 0  # pad with this many zero pixels, then crop randomly to the original size
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 for CNNs if faster here, else fp32
    torch_compile: bool = False  # compile first, which takes up to minutes and may pay off on a GPU
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # for the split, weights, image order, augmentation and dropout
    deterministic: bool = False  # bitwise reproducible on a GPU too, but slower; CPUs always are
    output_dir: _Folder = "runs"  # the run store
    checkpoint_seconds: PositiveFloat = 300.0  # between checkpoints within an epoch; at an epoch's end, 60
    use_wandb: bool = False  # log to Weights & Biases
    wandb_project: str = "residual-and-distillation-lab"
    wandb_group: str | None = None  # None: the data set's name
    wandb_watch: bool = False  # also log histograms of gradients and parameters (slower)
    use_telegram_notifications: bool = False  # send a message when a run or an experiment ends
    telegram_additional_info: str = ""
    telegram_bot_token: Annotated[SecretStr, Field(min_length=1)] | None = None  # None: read TELEGRAM_BOT_TOKEN
    telegram_chat_id: int | _Chat | None = None  # None: read TELEGRAM_CHAT_ID from the environment

    def __identity__(self) -> dict[str, Any]:
        """The settings that define a run, except those that are off: adding a setting that is off renames no run."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_IDENTITY}
        return {name: value for name, value in values.items() if value}

    def to_training_arguments(self, output_dir: str):
        """The `TrainingArguments`. Raises ValueError if the batch size is not a multiple of the number of processes."""
        import torch
        from transformers import TrainingArguments  # takes seconds, and only training needs it

        batch_size, processes = self.batch_size, num_processes()
        if batch_size % processes:
            raise ValueError(f"batch_size = {batch_size} must be a multiple of the number of processes, {processes}")
        if processes > 1:
            atexit.register(_leave_group, torch.distributed)
        return TrainingArguments(
            output_dir=output_dir,
            num_train_epochs=self.num_epochs,
            per_device_train_batch_size=batch_size // processes,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type="constant_with_warmup" if self.lr_schedule == "constant" else "cosine",
            warmup_steps=self.warmup_fraction,  # below 1 it is a fraction of all steps
            seed=self.seed,
            use_cpu=self.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            **dict.fromkeys(["eval_strategy", "save_strategy", "logging_strategy"], "epoch"),
            load_best_model_at_end=True,
            metric_for_best_model=f"eval_{self.early_stopping_metric}",
            report_to="none",
            log_level="error",
            disable_tqdm=True,
        )


def check_parameters(namespace: dict[str, Any]) -> None:
    """Raise ValueError if a parameter in a notebook's `globals()` is misspelt (`-p epoch 3`) or has a bad value."""
    annotations = namespace["__annotations__"]
    cells = [cell for cell in namespace.get("In", []) if cell.lstrip().startswith("# Parameters")]  # as papermill does
    injected = re.findall(r"^(\w+) = ", "\n".join(cells), re.MULTILINE)
    check = _checked(type("parameters", (), {"__annotations__": annotations}))
    check(**{name: namespace[name] for name in [*annotations, *injected]})


def enter_project_root() -> None:
    """Change to the project's root if a notebook was opened below it, so that its paths mean the same everywhere."""
    here = Path.cwd()
    os.chdir(next((folder for folder in (here, *here.parents) if (folder / "lablib" / "__init__.py").exists()), here))


def num_processes() -> int:
    """How many processes train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _leave_group(distributed) -> None:
    """Leave the process group: its threads could outlive Python and abort the process (PyTorch pull request 179291)."""
    if distributed.is_initialized() and not hasattr(sys, "last_value"):  # after an error the other processes might wait
        distributed.destroy_process_group()
