"""`python -m lablib`: one run from the command line, as `torchrun -m lablib` on several processes."""

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

import lablib  # imports PyTorch only when a name is used: those seconds fall within main, which handles Ctrl-C
from lablib.config import TrainingConfig, one_line

MODELS = ("MLP", "ResidualMLP", "SimpleCNN", "ResidualCNN")
_NOT_OPTIONS = ("telegram_bot_token", "image_shape", "num_classes")  # secret, of the data
_SETTINGS = inspect.signature(TrainingConfig).parameters
_SEVERAL = {"hidden_sizes": int}  # the type of each value of an option that takes several
_IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a run, or load it, and print its result as a line of JSON.

    Exits with status 2 for an invalid option, 1 if the training cannot begin or fails, and 130 after Ctrl-C.
    """
    try:
        parser = _parser()
        options = vars(parser.parse_args(arguments))
        try:
            config = TrainingConfig(**{name: options.pop(name) for name in _SETTINGS if name not in _NOT_OPTIONS})
            with config.to_training_arguments(config.output_dir).main_process_first():  # to download and decode once
                scale = {name: options.pop(name) for name in ("image_size", "channels")}
                data = lablib.load_data(options.pop("data"), options.pop("data_dir"), **scale)
            fitting = {"image_shape": data.image_shape, "num_classes": data.num_classes}
            build_model = partial(getattr(lablib, options.pop("model")), **options, **fitting)  # the rest are its own
            build_model()
        except (ValueError, OSError) as error:
            parser.error(str(error))
        run = _train(build_model, config, data)
    except KeyboardInterrupt:
        if _IS_FIRST_PROCESS:
            print("interrupted before training began", file=sys.stderr)
        sys.exit(130)
    if _IS_FIRST_PROCESS:
        print(json.dumps({"path": str(run.path), **run.result}))


def _train(build_model: partial, config: TrainingConfig, data: "lablib.ImageData") -> "lablib.Run":
    """Train a run with a progress bar, or load it."""
    from lablib import identity, runs, trainer  # with PyTorch

    try:
        name = identity.run_name(identity.run_identity(build_model, config, data))
        key, ended = (build_model.func.__name__, config.seed), set()
        watched = _IS_FIRST_PROCESS and not runs.find_run(name, config.output_dir)
        if _IS_FIRST_PROCESS:
            data.warn_if_unbalanced()
        bar = runs.progress({key: Path(config.output_dir, name)}, config.num_epochs, ended, sys.stderr)
        with bar if watched else nullcontext():
            run = runs.train_or_load(build_model, config, data)
            ended.add(key)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, trainer.SanityCheckError, trainer.NonFiniteLossError) as error:
        sys.exit(f"python -m lablib: {one_line(error)}" if _IS_FIRST_PROCESS else 1)
    return run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with the reason in one line; argparse would print the usage first."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lablib", description="Train one run, or load it if it is finished.")
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True, help=", ".join(MODELS))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainingConfig), re.MULTILINE))
    for name in MODELS:
        options = models.add_parser(name, usage="%(prog)s [--option VALUE ...]", allow_abbrev=False)
        _add(options, "data", str, "digits", "a data set's name, or a folder")
        _add(options, "data_dir", str, "data", "where data sets are read from, or downloaded to")
        _add(options, "image_size", int, None, "size in pixels to scale the images to")
        _add(options, "channels", int, None, "1: grey, 3: colour")
        for parameter in (*inspect.signature(getattr(lablib, name)).parameters.values(), *_SETTINGS.values()):
            if parameter.name not in _NOT_OPTIONS:
                kind = TrainingConfig.__annotations__.get(parameter.name, parameter.annotation)  # with its bounds
                _add(options, parameter.name, kind, parameter.default, comments.get(parameter.name, ""))
    return parser


def _add(parser: argparse.ArgumentParser, name: str, kind: Any, default: Any, text: str) -> None:
    """Add an option that pydantic reads as a type; argparse names it in the error."""

    def read(value: str):
        try:
            return TypeAdapter(_SEVERAL.get(name, kind)).validate_python(None if value == "None" else value)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(error.errors()[-1]["msg"].removeprefix("Input ")) from None

    needed = default is inspect.Parameter.empty
    choices = ", ".join(get_args(kind)) if get_origin(kind) is Literal else ""
    text = "; ".join(filter(None, [choices, text]))
    text = f"{text} ({'required' if needed else f'default: {default!r}'})".strip().replace("%", "%%")
    more = {"nargs": "+"} if name in _SEVERAL else {"nargs": "?", "const": True} if kind is bool else {}
    more |= {"required": True} if needed else {"default": default}
    parser.add_argument("--" + name.replace("_", "-"), type=read, metavar="VALUE", help=text, **more)


if __name__ == "__main__":
    main()
