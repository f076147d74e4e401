"""What a run is: everything that changes what it finds out, as JSON and as a hash."""

import hashlib
import json
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData

_SCHEME = 1  # raise it when a change to lablib means that the runs in a store answer another question
_VERSIONED = (
    "builtins",
    "torch",
    "torchvision",
    "transformers",
    "huggingface_hub",
    "lablib",
)  # code that changes with a release, not in a notebook


def identity(
    model: nn.Module, config: TrainingConfig, data: ImageData, trainer_class: type | partial
) -> dict[str, Any]:
    """What is trained (with its initial weights), on what, how; not who is told of it, nor where it runs."""
    described = {
        "scheme": _SCHEME,
        "trainer": describe_trainer(trainer_class),
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

    The code counts where it is a notebook's own, so that a changed `forward` is another run; with it count the plain
    attributes of such modules. The weights count since a function that builds a model may initialise it in its own way.
    """
    arguments = getattr(model, "_hub_mixin_config", None)
    own = [module for module in model.modules() if _is_own(type(module))]
    code = {digest for module in own for digest in [*_code_digests(type(module)), _attributes_digest(module)]}
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "class": type(model).__name__,
        "arguments": arguments if isinstance(arguments, dict) else None,
        "layers": repr(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "code": sorted(code),
        "initial_weights": weights.hexdigest(),
    }


def describe_trainer(trainer: type | partial) -> dict[str, Any]:
    """A trainer class by its name, and by its code if it is a notebook's own; of a partial one its arguments too."""
    cls, arguments = (trainer.func, trainer.keywords) if isinstance(trainer, partial) else (trainer, {})
    described = {"class": cls.__name__, "code": sorted(_code_digests(cls)) or None}
    if arguments:
        described["arguments"] = {
            name: describe_model(value) if isinstance(value, nn.Module) else _content(value)
            for name, value in sorted(arguments.items())
        }
    return described


def _is_own(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _VERSIONED


def _code_digests(cls: type) -> list[str]:
    """One digest for each of a class and its bases that is a notebook's own."""
    classes = [c for c in cls.__mro__ if _is_own(c)]
    functions = [{n: _content(f.__code__) for n, f in vars(c).items() if isinstance(f, FunctionType)} for c in classes]
    return [_digest_of(sorted(named.items())) for named in functions if named]


def _attributes_digest(module: nn.Module) -> str:
    """The numbers, texts and functions that a module keeps, such as a factor or an activation."""
    public = {name: value for name, value in sorted(vars(module).items()) if name[0] != "_" and name != "training"}
    return _digest_of({name: _content(value) for name, value in public.items()})


def _content(value: Any) -> Any:
    """A value without what differs between two processes: addresses, files, line numbers, the order of sets."""
    if isinstance(value, FunctionType):
        return _content(value.__code__)
    if isinstance(value, CodeType):
        constants = tuple(_content(constant) for constant in value.co_consts)
        return value.co_code.hex(), value.co_names, value.co_varnames, constants
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_content(item)) for item in value)
    if isinstance(value, (tuple, list)):
        return [_content(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _digest_of(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()
