"""`python -m lablib`: one run from the command line, as `torchrun -m lablib` on several processes."""

import argparse
import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args, get_origin

import lablib  # imports PyTorch only when a name is used: those seconds fall within main, which handles Ctrl-C
from lablib.config import TrainingConfig, one_line

MODELS = ("MLP", "ResidualMLP", "SimpleCNN", "ResidualCNN")
_NOT_OPTIONS = ("telegram_bot_token", "image_shape", "num_classes")  # secret, of the data
_SETTINGS = inspect.signature(TrainingConfig).parameters
_IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a run, or load it, and print its result as a line of JSON.

    Exits with status 2 for an unknown or missing option or choice, 1 for any other unsuitable value or a training that
    fails, and 130 after Ctrl-C.
    """
    try:
        run = _run(vars(_parser().parse_args(arguments)))
    except KeyboardInterrupt as interrupt:
        if _IS_FIRST_PROCESS and not interrupt.args:
            print("interrupted before training began", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"python -m lablib: {one_line(error)}" if _IS_FIRST_PROCESS else 1)
    if _IS_FIRST_PROCESS:
        print(json.dumps({"path": str(run.path), **run.result}))


def _run(options: dict[str, Any]) -> "lablib.Run":
    """Train a run with a progress bar, or load it."""
    config = TrainingConfig(**{name: options.pop(name) for name in _SETTINGS if name not in _NOT_OPTIONS})
    with config.to_training_arguments(config.output_dir).main_process_first():  # to download and decode once
        scale = {name: options.pop(name) for name in ("image_size", "channels")}
        data = lablib.load_data(options.pop("data"), options.pop("data_dir"), **scale)
    fitting = {"image_shape": data.image_shape, "num_classes": data.num_classes}
    build_model = partial(getattr(lablib, options.pop("model")), **options, **fitting)  # the rest are its own
    if _IS_FIRST_PROCESS:
        data.warn_if_unbalanced()
    return lablib.train_or_load(build_model, config, data, bar=sys.stderr if _IS_FIRST_PROCESS else None)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Exit with the reason in one line; argparse would print the usage first."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m lablib", description="Train one run, or load it if it is finished.")
    models = parser.add_subparsers(dest="model", metavar="MODEL", required=True, help=", ".join(MODELS))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainingConfig), re.MULTILINE))
    for name in MODELS:
        options = models.add_parser(name, usage="%(prog)s [--option VALUE ...]", allow_abbrev=False)
        _add(options, "data", "digits", "a data set's name, or a folder")
        _add(options, "data_dir", "data", "where data sets are read from, or downloaded to")
        _add(options, "image_size", None, "size in pixels to scale the images to")
        _add(options, "channels", None, "1: grey, 3: colour")
        for p in (*inspect.signature(getattr(lablib, name)).parameters.values(), *_SETTINGS.values()):
            if p.name not in _NOT_OPTIONS:
                _add(options, p.name, p.default, comments.get(p.name, ""), p.annotation)
    return parser


def _add(parser: argparse.ArgumentParser, name: str, default: Any, text: str, kind: Any = None) -> None:
    """Add an option. What receives its value checks it."""
    more = {"choices": get_args(kind)} if get_origin(kind) is Literal else {"metavar": "VALUE"}
    if isinstance(default, bool):
        more |= {"nargs": "?", "const": True}
    elif isinstance(default, tuple):
        more |= {"nargs": "+"}
    more |= {"required": True} if default is inspect.Parameter.empty else {"default": default}
    text = f"{text} ({'required' if 'required' in more else f'default: {default!r}'})".strip().replace("%", "%%")
    read = str if isinstance(default, str) or kind == (str | None) else _value
    parser.add_argument("--" + name.replace("_", "-"), type=read, help=text, **more)


def _value(text: str) -> Any:
    """A number, True, False or None as Python reads it; any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    main()
