"""`python -m lablib`: one run from the command line; `torchrun -m lablib` uses several processes."""

import argparse
import ast
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Literal, get_args, get_origin, get_type_hints

import lablib  # imports PyTorch only when a name is used, so within main, which handles Ctrl-C
from lablib.config import TrainingConfig, one_line

MODELS = ("MLP", "ResidualMLP", "SimpleCNN", "ResidualCNN")
_NOT_OPTIONS = ("telegram_bot_token", "image_shape", "num_classes")  # a secret; taken from the data
_READ = {int: int, int | None: int, float: float, float | None: float, Sequence[int]: int, bool: ast.literal_eval}
_IS_FIRST_PROCESS = os.environ.get("RANK", "0") == "0"  # of those that torchrun starts


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a run's result as JSON. The exit status is 2 for a wrong option, 130 after Ctrl-C, 1 for other errors."""
    try:
        options = vars(_parser().parse_args(arguments))
        config = TrainingConfig(**{f.name: options.pop(f.name) for f in fields(TrainingConfig) if f.name in options})
        with config.to_training_arguments(config.output_dir).main_process_first():  # download and decode once
            scale = {name: options.pop(name) for name in ("image_size", "channels")}
            data = lablib.load_data(options.pop("data"), options.pop("data_dir"), **scale)
        data.warn_if_unbalanced()
        network = getattr(lablib, options.pop("model"))  # the remaining options belong to it
        build_model = partial(network, **options, image_shape=data.image_shape, num_classes=data.num_classes)
        run = lablib.train_or_load(build_model, config, data, bar=sys.stderr if _IS_FIRST_PROCESS else None)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        sys.exit(f"python -m lablib: {one_line(error)}")
    if _IS_FIRST_PROCESS:
        print(json.dumps({"path": str(run.path), **run.result}))


def _parser() -> argparse.ArgumentParser:
    name, silent = "python -m lablib", argparse.SUPPRESS  # no usage line before an error
    parser = argparse.ArgumentParser(name, silent, "MODEL [--option VALUE ...]: train a run, or load it if finished.")
    models = parser.add_subparsers(prog=name, dest="model", metavar="MODEL", required=True, help=", ".join(MODELS))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainingConfig), re.MULTILINE))
    kinds = get_type_hints(TrainingConfig)
    for name in MODELS:
        options = models.add_parser(name, usage=silent, allow_abbrev=False)
        options.add_argument("--data", default="digits", help="a data set's name, or a folder (default: digits)")
        options.add_argument("--data-dir", default="data", help="folder of downloaded data sets (default: data)")
        options.add_argument("--channels", type=int, help="1: grey, 3: colour")
        options.add_argument("--image-size", type=int, help="size in pixels to scale the images to")
        for p in (*inspect.signature(getattr(lablib, name)).parameters.values(), *fields(TrainingConfig)):
            if p.name not in _NOT_OPTIONS:
                kind = kinds.get(p.name) or p.annotation
                choices = (True, False) if kind is bool else get_args(kind) if get_origin(kind) is Literal else None
                text = f"{comments.get(p.name, '')} (default: {p.default})"
                more = {"nargs": "+"} if kind == Sequence[int] else {"choices": choices}
                flag, read = "--" + p.name.replace("_", "-"), _READ.get(kind, str)
                options.add_argument(flag, type=read, default=p.default, help=text, **more)
    return parser


if __name__ == "__main__":
    main()
