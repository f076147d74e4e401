"""`python -m lablib`: one run from the command line, as `torchrun -m lablib` on several processes."""

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

import lablib  # its names import PyTorch when they are used, so that Ctrl-C ends those seconds too
from lablib.config import TrainingConfig

MODELS = ("MLP", "ResidualMLP", "SimpleCNN", "ResidualCNN")
_FROM_THE_DATA = ("image_shape", "num_classes")
_NOT_OPTIONS = ("telegram_bot_token", "training_arguments")  # others would see the one, and the other is a dict
_FIELDS = [field for field in dataclasses.fields(TrainingConfig) if field.name not in _NOT_OPTIONS]
_SEVERAL = {"hidden_sizes": int, "wandb_tags": str}  # the type of each value of an option that takes several


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a run, or load it, and print its result as a line of JSON.

    Exits with status 2 where an option is not allowed, and with 130 after Ctrl-C.
    """
    is_first_process = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts
    try:
        parser = _parser()
        options = vars(parser.parse_args(arguments))
        try:
            config = TrainingConfig(**{field.name: options.pop(field.name) for field in _FIELDS})
            with config.to_training_arguments(config.output_dir).main_process_first():  # to download and decode once
                scale = {name: options.pop(name) for name in ("image_size", "channels")}
                data = lablib.load_data(options.pop("data"), options.pop("data_dir"), **scale)
            build_model = _model_builder(options.pop("model"), options, data)
            build_model()
        except (ValueError, OSError) as error:
            parser.error(str(error))
        run = lablib.train_or_load(build_model, config, data)
    except KeyboardInterrupt:
        if is_first_process:
            print("interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    if is_first_process:
        print(json.dumps({"path": str(run.path), **run.result}))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with the reason in one line; argparse would print the usage first."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    form, about = "%(prog)s MODEL [--option VALUE ...]", "Train one run, or load it if it is finished."
    parser = _Parser(prog="python -m lablib", usage=form, description=about)
    parser.add_argument("model", choices=MODELS)
    _add(parser, "data", str, "digits", "a data set's name, or a folder")
    _add(parser, "data_dir", str, "data", "where data sets lie")
    _add(parser, "image_size", int, None, "pixels to which images are scaled")
    _add(parser, "channels", int, None, "1: grey, 3: coloured")
    group = parser.add_argument_group("the networks' arguments")
    models = {model: inspect.signature(getattr(lablib, model)).parameters for model in MODELS}
    for name, parameter in {name: p for known in models.values() for name, p in known.items()}.items():
        if name not in _FROM_THE_DATA:
            default = "required" if parameter.default is parameter.empty else f"default: {parameter.default!r}"
            text = f"{', '.join(model for model in MODELS if name in models[model])} ({default})"
            _add(group, name, parameter.annotation, argparse.SUPPRESS, text)
    group = parser.add_argument_group("TrainingConfig")
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainingConfig), re.MULTILINE))
    for field in _FIELDS:
        _add(group, field.name, field.type, field.default, comments.get(field.name, ""))
    return parser


def _add(group, name: str, kind: Any, default: Any, text: str) -> None:
    """Add an option that pydantic reads as a type; argparse names it in the error."""

    def read(value: str):
        try:
            return TypeAdapter(_SEVERAL.get(name, kind)).validate_python(None if value == "None" else value)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(error.errors()[0]["msg"].removeprefix("Input ")) from None

    text = text if default is argparse.SUPPRESS else f"{text} (default: {default!r})".strip()
    more = {"nargs": "+"} if name in _SEVERAL else {"nargs": "?", "const": True} if kind is bool else {}
    more |= {"default": default, "metavar": "VALUE", "help": text.replace("%", "%%")}
    group.add_argument(_option(name), type=read, **more)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _model_builder(name: str, given: dict[str, Any], data: "lablib.ImageData") -> partial:
    """What builds a network for the images and classes of a data set. Raises ValueError for arguments it lacks."""
    known = inspect.signature(getattr(lablib, name)).parameters
    if unknown := sorted(given.keys() - known):
        raise ValueError(f"argument {_option(unknown[0])}: {name} has none")
    arguments = given | {"image_shape": data.image_shape, "num_classes": data.num_classes}
    if missing := [k for k, parameter in known.items() if parameter.default is parameter.empty and k not in arguments]:
        raise ValueError(f"{name} needs {_option(missing[0])}")
    return partial(getattr(lablib, name), **arguments)


if __name__ == "__main__":
    main()
