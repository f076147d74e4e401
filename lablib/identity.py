"""What a run is: everything that changes what it finds out, as JSON and as a hash."""

import hashlib
import json
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData

_SCHEME = 1  # raise it when a change to lablib means that the runs in a store answer another question
_VERSIONED = ("torch", "torchvision", "transformers", "lablib")  # code that a release, not a notebook, changes


def identity(model: nn.Module, config: TrainingConfig, data: ImageData, trainer_class: type) -> dict[str, Any]:
    """What is trained (with its initial weights), on what, how; not who is told of it, nor where it runs."""
    described = {
        "scheme": _SCHEME,
        "trainer": describe_class(trainer_class),
        "model": describe_model(model),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "config": config.identity(),
    }
    return json.loads(json.dumps(described, default=str))


def digest(described: dict[str, Any]) -> str:
    """The short hash of an identity."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]


def describe_model(model: nn.Module) -> dict[str, Any]:
    """Class, constructor arguments where they are known, layers, code and initial weights of a model.

    The code counts where it is a notebook's own, so that a changed `forward` is another run. The weights count since a
    function that builds a model may initialise it in its own way.
    """
    arguments = getattr(model, "_hub_mixin_config", None)
    classes = {type(module) for module in model.modules()}
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "class": type(model).__name__,
        "arguments": arguments if isinstance(arguments, dict) else None,
        "layers": repr(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "code": sorted(filter(None, map(_code_digest, classes))),
        "initial_weights": weights.hexdigest(),
    }


def describe_class(cls: type) -> dict[str, Any]:
    """A class by its name, and by its code if it is a notebook's own."""
    return {"class": cls.__name__, "code": _code_digest(cls)}


def _code_digest(cls: type) -> str | None:
    if cls.__module__.partition(".")[0] in _VERSIONED:
        return None
    functions = {name: f.__code__ for name, f in vars(cls).items() if isinstance(f, FunctionType)}
    return hashlib.sha256(repr(sorted((n, _content(c)) for n, c in functions.items())).encode()).hexdigest()


def _content(code: CodeType) -> tuple:
    """A function's instructions, names and constants, without its file and line numbers."""
    constants = tuple(_content(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code.hex(), code.co_names, code.co_varnames, constants
