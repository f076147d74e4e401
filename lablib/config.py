"""Every setting of a run (`TrainingConfig`) and every parameter of a notebook, checked before anything else happens."""

import atexit
import dataclasses
import difflib
import functools
import gc
import inspect
import numbers
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:  # transformers takes seconds to import; only a training needs it
    from transformers import TrainingArguments

# Annotations for a notebook's parameters have names because papermill's help can read no others.
Count = Annotated[int, Field(ge=1, le=10_000)]
Natural = Annotated[int, Field(ge=0)]
Counts = Annotated[list[Count], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[list[Share], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, le=1000)]  # beyond it no rate or temperature makes sense
Temperatures = Annotated[list[Positive], Field(min_length=1)]

_Above0 = Annotated[float, Field(gt=0)]
_Whole = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]
_Patience = Annotated[Natural | None, AfterValidator(lambda epochs: epochs or None)]
_Text = Annotated[str, Field(min_length=1)]
_Folder = Annotated[_Text, BeforeValidator(lambda p: os.path.expanduser(p) if isinstance(p, (str, os.PathLike)) else p)]
_Chat = Annotated[str, Field(pattern=r"^(-?\d+|@\w+)$")]  # a number or a name; it is shown, so a token is refused
_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True)
_TOKEN = re.compile(r"\d+(?::|%3[Aa])[\w-]{30,}")

DATASET_NAMES = ("digits", "MNIST", "FashionMNIST", "KMNIST", "EMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10")

# What has no influence on a run's outcome: where it runs, where its files lie, and who is notified.
NOT_IDENTITY = (
    "output_dir", "checkpoint_seconds", "device", "use_wandb", "wandb_project", "wandb_group", "wandb_watch",
    "use_telegram_notifications", "telegram_additional_info", "telegram_bot_token", "telegram_chat_id",
)  # fmt: skip

_PRIVATE = ("telegram_bot_token", "telegram_chat_id")  # no error shows what they hold
_PLAINER = {  # type of a pydantic error -> plainer words for it
    "bool_type": "should be True or False",
    "list_type": "should be a list; with papermill: -y '{name}: [{items}]'",
    "string_pattern_mismatch": "should be the number of a chat, or its @name",
}


def redacted(text: str) -> str:
    """A text from elsewhere, without whatever looks like a bot's token."""
    return _TOKEN.sub("…", text)


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message, without tokens; further lines may be a traceback."""
    return ": ".join([type(error).__name__, *redacted(str(error)).splitlines()[:1]])[:500]


def warn(text: str) -> None:
    """Warn the user without showing a source line, which would be lablib's own or one of an unrelated file."""
    warnings.warn_explicit(text, UserWarning, "lablib", 0)


warn_once = functools.cache(warn)


def _with_plain_errors(cls: type) -> type:
    """Let a pydantic dataclass raise a ValueError with one line for each wrong argument."""
    validate = cls.__init__

    @functools.wraps(validate)
    def __init__(self, *args, **values):
        # NumPy's numbers as Python's
        values = {n: v.item() if isinstance(v, numbers.Number) and hasattr(v, "item") else v for n, v in values.items()}
        try:
            validate(self, *args, **values)
        except ValidationError as error:
            known = [field.name for field in dataclasses.fields(cls)]
            faults = {fault["loc"][0]: fault for fault in error.errors(include_input=False)}  # the last one of each
            lines = [f"{cls.__name__}: {_line(fault, values, known)}" for fault in faults.values()]
            raise ValueError("\n".join(lines)) from None

    cls.__init__ = __init__
    return cls


def _line(fault: dict, values: dict[str, Any], known: list[str]) -> str:
    """One of pydantic's errors in words: the argument, its value, and what is allowed."""
    name, *place = fault["loc"]
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}"
        return f"there is no parameter {name!r}. {hint}"
    shown = "" if name in _PRIVATE else f"{name} = {values[name]!r}: "
    item = f"[{place[0]}]" if place and isinstance(place[0], int) else ""
    plainer = _PLAINER.get(fault["type"], "").format(name=name, items=str(values.get(name)).strip("[]"))
    message = plainer or fault["msg"].removeprefix("Input ")
    return f"{shown}{name}{item} {message[0].lower()}{message[1:]}"


@_with_plain_errors
@dataclass(kw_only=True, frozen=True, config=_CHECKED)
class TrainingConfig:
    """Every setting of one run.

    Raises ValueError for an unknown field or a value that is not allowed, and says what is allowed.
    To change a setting, make another config: `dataclasses.replace(config, seed=1)`. In a notebook, `TrainingConfig??`
    shows what each setting means.
    """

    num_epochs: _Whole = 60  # at most; early stopping may end a run sooner
    batch_size: _Whole = 256  # images, of all processes together
    learning_rate: _Above0 = 1e-3
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"  # sgd has momentum 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # L2 for adam and sgd, decoupled for adamw
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine falls to 0 over num_epochs
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of all steps, in which the rate rises linearly from 0
    max_grad_norm: _Above0 | None = None  # None: gradients are not clipped
    validation_split: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the training set, stratified by class
    max_train_images: _Whole | None = None  # train on at most this many of the rest, class proportions kept
    early_stopping_patience: _Patience = 10  # epochs without improvement; None or 0: never
    early_stopping_metric: Literal["accuracy", "loss"] = "accuracy"  # of validation; also selects the best epoch
    rotation_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0  # each image by an angle from [-r, r]
    translation_fraction: Share = 0.1  # shift by up to this fraction of the height and of the width
    horizontal_flip: bool = False  # each image with probability 1/2
    crop_padding: Natural = 0  # zero padding in pixels, followed by a random crop to the original size
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 or fp16 for convolutions if faster here
    torch_compile: bool = False  # compile the network first, for seconds or minutes; it may pay off on a GPU
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    seed: _Seed = 0  # split, initial weights, order of the images, augmentation, dropout
    deterministic: bool = False  # bitwise reproducible on a GPU too, but slower; a CPU always is
    output_dir: _Folder = "runs"  # the run store
    checkpoint_seconds: _Above0 = 300.0  # between checkpoints within an epoch; at the end of an epoch, 60 are enough
    use_wandb: bool = False  # log to Weights & Biases
    wandb_project: _Text = "residual-and-distillation-lab"
    wandb_group: _Text | None = None  # None: the data set's name
    wandb_watch: bool = False  # also log histograms of gradients and parameters, which takes time
    use_telegram_notifications: bool = False  # when a run or an experiment ends
    telegram_additional_info: str = ""
    telegram_bot_token: Annotated[SecretStr, Field(min_length=1)] | None = None  # None: TELEGRAM_BOT_TOKEN is read
    telegram_chat_id: int | _Chat | None = None  # None: TELEGRAM_CHAT_ID is read from the environment

    def __identity__(self) -> dict[str, Any]:
        """The settings that change a run's outcome, without those that are off (None, False, 0 or empty).

        Thus a setting that is added later and off by default changes no run's name.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in NOT_IDENTITY}
        return {name: value for name, value in values.items() if value}

    def to_training_arguments(self, output_dir: str) -> "TrainingArguments":
        """What `transformers.Trainer` and callbacks need of it as `TrainingArguments`; checkpoints go to `output_dir`.

        Raises ValueError if the batch size, of all processes together, is no multiple of their number.
        """
        import torch
        from transformers import TrainingArguments

        if self.batch_size % num_processes():
            reason = f"it should be a multiple of the number of processes, which is {num_processes()}"
            raise ValueError(f"TrainingConfig: batch_size = {self.batch_size}, but {reason}")
        if num_processes() > 1:
            atexit.register(_leave_group)
        return TrainingArguments(
            output_dir=output_dir,
            num_train_epochs=self.num_epochs,
            per_device_train_batch_size=self.batch_size // num_processes(),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            lr_scheduler_type="constant_with_warmup" if self.lr_schedule == "constant" else "cosine",
            warmup_steps=self.warmup_fraction,  # below 1 it is a fraction of all steps
            max_grad_norm=self.max_grad_norm or 0.0,
            seed=self.seed,
            use_cpu=self.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            eval_strategy="epoch",
            save_strategy="epoch",
            logging_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model=f"eval_{self.early_stopping_metric}",
            greater_is_better=self.early_stopping_metric == "accuracy",
            report_to="none",
            log_level="error",
            disable_tqdm=True,
        )


# as help() and JupyterLab show it: without pydantic's bounds
_kinds, _parameters = get_type_hints(TrainingConfig), inspect.signature(TrainingConfig).parameters.values()
TrainingConfig.__signature__ = inspect.Signature([p.replace(annotation=_kinds[p.name]) for p in _parameters])


def check_parameters(namespace: dict[str, Any]) -> None:
    """Refuse parameters that do not fit their annotation, or unknown ones; `namespace` is the notebook's `globals()`.

    A name is unknown if papermill injected it (`-p epoch 3`) and the cell tagged `parameters` does not annotate it.
    Raises ValueError with every fault and what is allowed; if there is none, also for a `dataset` that `locate_data`
    does not find in the `data_dir`.
    """
    annotations = namespace.get("__annotations__", {})
    if not annotations:
        raise ValueError("the notebook has no annotated parameters; run its cell tagged 'parameters' first")
    cells = [cell for cell in namespace.get("In", []) if cell.lstrip().startswith("# Parameters")]  # as papermill does
    injected = {name for cell in cells for name in re.findall(r"^(\w+) = ", cell, re.MULTILINE)}
    fields = dataclasses.make_dataclass("parameters", annotations.items(), kw_only=True)
    parameters = _with_plain_errors(dataclass(fields, config=_CHECKED))
    parameters(**{name: namespace[name] for name in [*annotations, *sorted(injected - annotations.keys())]})
    if "dataset" in annotations:
        locate_data(namespace["dataset"], namespace.get("data_dir", "data"))


def locate_data(name: str | os.PathLike, data_dir: str | os.PathLike = "data") -> str | Path:
    """Which data set `lablib.load_data` would load: one of `DATASET_NAMES`, or a folder. Raises ValueError if none."""
    name, data_dir = os.path.expanduser(name), os.path.expanduser(data_dir)
    known = {each.lower(): each for each in DATASET_NAMES}.get(name.lower().replace("-", "").replace("_", ""))
    folders = [os.path.join(place, name) for place in (".", data_dir) if name and Path(place, name).is_dir()]
    if same := [folder for folder in folders if known and Path(folder, "train").is_dir()]:
        raise ValueError(f"{name!r} is a known data set and also a folder here; write {same[0]!r} for the folder")
    if not known and not folders:
        names = ", ".join(DATASET_NAMES).lower()
        raise ValueError(f"dataset = {name!r} is neither a known name ({names}) nor a folder with train/ and test/")
    return known or Path(folders[0])


def enter_project_root() -> None:
    """Change to the project's root if a notebook was opened below it, so that its paths mean the same from anywhere."""
    here = Path.cwd()
    os.chdir(next((folder for folder in (here, *here.parents) if (folder / "lablib" / "__init__.py").exists()), here))


def num_processes() -> int:
    """How many processes train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _leave_group() -> None:
    """Leave `torch.distributed`'s group, or Gloo's threads may outlive Python and abort the process at its end.

    Not after an error, as the others might wait then. See https://github.com/pytorch/pytorch/pull/179291.
    """
    import torch

    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.unfreeze()
        gc.collect()  # trainers in cycles hold the group, and with it its threads
        torch.distributed.destroy_process_group()
