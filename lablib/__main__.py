"""`python -m lablib`: one run from the command line, as `torchrun -m lablib` on several processes."""

import argparse
import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lablib import models
from lablib.config import TrainingConfig, is_first_process
from lablib.data import ImageData
from lablib.datasets import load_data
from lablib.distillation import KnowledgeDistillationTrainer
from lablib.runs import TrainedModel, load_run, train_or_load
from lablib.trainer import StreamlinedTrainer

MODELS = {cls.__name__: cls for cls in (models.MLP, models.ResidualMLP, models.SimpleCNN, models.ResidualCNN)}
_NOT_OPTIONS = ("telegram_bot_token", "training_arguments")  # others would see the one, and the other is a dict
_FROM_THE_DATA = ("image_shape", "num_classes")
_NETWORK = sorted({n for cls in MODELS.values() for n in inspect.signature(cls).parameters} - {*_FROM_THE_DATA})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a run, or load it, and print its result as a line of JSON. Exits with 2 where an option is not allowed."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    try:
        knobs = {name: options[name] for name in _knobs() if options[name] is not None}
        config = TrainingConfig(**knobs)
        with config.to_training_arguments(config.output_dir).main_process_first():  # to download and decode once
            data = load_data(
                options["data"], options["data_dir"], image_size=options["image_size"], channels=options["channels"]
            )
        build_model = _model_builder(options, data)
        build_model()
        trainer_class = _trainer(options)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    run = train_or_load(build_model, config, data, trainer_class=trainer_class)
    if is_first_process():
        print(json.dumps({"path": str(run.path), **run.result}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lablib", description="Train one run, or load it if it is finished."
    )
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", default="digits", help="a data set's name, or a folder (default: digits)")
    parser.add_argument("--data-dir", default="data", help="where data sets lie (default: data)")
    parser.add_argument("--image-size", type=_literal, help="pixels to which images are scaled")
    parser.add_argument("--channels", type=_literal, help="1: grey, 3: coloured")
    network = parser.add_argument_group("the model's arguments, each of the models that have it")
    for name in _NETWORK:
        several = {"nargs": "+"} if name == "hidden_sizes" else {}
        network.add_argument("--" + name.replace("_", "-"), type=_literal, metavar="VALUE", **several)
    distillation = parser.add_argument_group("distillation")
    distillation.add_argument("--teacher", type=Path, metavar="FOLDER", help="a finished run of one of these models")
    distillation.add_argument("--temperature", type=_literal, default=4.0)
    distillation.add_argument("--alpha", type=_literal, default=0.7, help="the weight of the teacher's term")
    training = parser.add_argument_group("TrainingConfig")
    for name, (default, comment) in _knobs().items():
        read = str if isinstance(default, str) else _literal
        text = f"{comment} (default: {default!r})".strip().replace("%", "%%")
        alone = {"nargs": "?", "const": True} if isinstance(default, bool) else {}  # --use-wandb says it all
        training.add_argument("--" + name.replace("_", "-"), type=read, metavar="VALUE", help=text, **alone)
    return parser


def _knobs() -> dict[str, tuple]:
    """The config's fields that are options, each with its default and the comment that stands beside it."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(TrainingConfig), re.MULTILINE))
    fields = [field for field in dataclasses.fields(TrainingConfig) if field.name not in _NOT_OPTIONS]
    return {field.name: (field.default, comments.get(field.name, "")) for field in fields}


def _literal(text: str):
    """A number, True, False, None or a tuple as Python writes it; else the text, which will be refused or fit."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _model_builder(options: dict, data: ImageData) -> partial:
    """What builds the model that is asked for, for the images and classes of a data set."""
    model = MODELS[options["model"]]
    parameters = {k: v for k, v in inspect.signature(model).parameters.items() if k not in _FROM_THE_DATA}
    given = {name: options[name] for name in _NETWORK if options[name] is not None}
    if unknown := given.keys() - parameters:
        raise ValueError(f"{model.__name__} has no {_listed(unknown)}; it has {_listed(parameters)}")
    if missing := {k for k, v in parameters.items() if v.default is v.empty} - given.keys():
        raise ValueError(f"{model.__name__} needs {_listed(missing)}")
    return partial(model, **given, image_shape=data.image_shape, num_classes=data.num_classes)


def _listed(names) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in sorted(names))


def _trainer(options: dict) -> type[StreamlinedTrainer] | partial:
    if options["teacher"] is None:
        return StreamlinedTrainer
    knobs = {"temperature": options["temperature"], "alpha": options["alpha"]}
    return partial(KnowledgeDistillationTrainer, teacher=_teacher(options["teacher"]), **knobs)


def _teacher(path: Path) -> TrainedModel:
    """The network of a finished run."""
    run = load_run(path)
    if run is None:
        raise ValueError(f"teacher = {path}, but there is no finished run")
    described = json.loads((path / "identity.json").read_bytes())["model"]
    name = described["class"].removeprefix("lablib.")
    if name not in MODELS or "arguments" not in described:
        raise ValueError(f"teacher = {path} is a {name}, but it must be one of {', '.join(MODELS)}")
    return TrainedModel(run, partial(MODELS[name], **described["arguments"]))


if __name__ == "__main__":
    main()
