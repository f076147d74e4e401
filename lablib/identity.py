"""What a run is: everything that changes what it finds out, as JSON and as a hash."""

import hashlib
import json
from functools import partial
from types import CellType, CodeType, FunctionType
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
    model: nn.Module, config: TrainingConfig, data: ImageData, trainer_class: type | partial | None = None
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
    return {
        "class": type(model).__name__,
        "arguments": arguments if isinstance(arguments, dict) else None,
        "layers": repr(model),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "code": sorted(code),
        "initial_weights": None if without_weights(model) else weights_digest(model),
    }


def without_weights(model: nn.Module) -> bool:
    """Whether a model is an architecture only, on PyTorch's "meta" device."""
    return any(tensor.is_meta for tensor in model.state_dict().values())


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names and bytes of a model's parameters and buffers."""
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return weights.hexdigest()


def describe_trainer(trainer: type | partial | None) -> dict[str, Any]:
    """A trainer class by its name, and by its code if it is a notebook's own; of a partial one its arguments too.

    None is StreamlinedTrainer, which takes seconds to import, and to load a run it is not needed.
    """
    if trainer is None:
        return {"class": "StreamlinedTrainer", "code": None}
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
    """One digest for each of a class and its bases that is a notebook's own: its methods and class attributes."""
    classes = [c for c in cls.__mro__ if _is_own(c)]
    contents = [{n: _content(v) for n, v in vars(c).items() if not n.startswith("__") or callable(v)} for c in classes]
    return [_digest_of(sorted(content.items())) for content in contents if content]


def _attributes_digest(module: nn.Module) -> str:
    """The numbers, texts and functions that a module keeps, such as a factor or an activation."""
    public = {name: value for name, value in sorted(vars(module).items()) if name[0] != "_" and name != "training"}
    return _digest_of({name: _content(value) for name, value in public.items()})


def _content(value: Any, depth: int = 0) -> Any:
    """A value without what differs between two processes: addresses, files, line numbers, the order of sets."""
    if depth > 20:  # a function may refer to itself
        return "..."
    if isinstance(value, (staticmethod, classmethod)):
        return _content(value.__func__, depth + 1)
    if isinstance(value, property):
        return [_content(function, depth + 1) for function in (value.fget, value.fset, value.fdel)]
    if isinstance(value, FunctionType):
        enclosed = [_enclosed(cell) for cell in value.__closure__ or ()]
        parts = [
            value.__code__,
            value.__defaults__,
            value.__kwdefaults__,
            getattr(value, "__wrapped__", None),
            enclosed,
        ]
        return [_content(part, depth + 1) for part in parts]
    if isinstance(value, CodeType):
        constants = [_content(constant, depth + 1) for constant in value.co_consts]
        return [value.co_code.hex(), value.co_names, value.co_varnames, constants]
    if isinstance(value, dict):
        return sorted((str(key), _content(item, depth + 1)) for key, item in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_content(item, depth + 1)) for item in value)
    if isinstance(value, (tuple, list)):
        return [_content(item, depth + 1) for item in value]
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return value
    return getattr(value, "__name__", type(value).__name__)  # a qualified name is lost on the way to a worker


def _enclosed(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _digest_of(content: Any) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()
