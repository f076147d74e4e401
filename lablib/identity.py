"""What a run is: everything that changes its outcome, described by content, and the name that follows from it."""

import copyreg
import dataclasses
import dis
import hashlib
import inspect
import json
import logging
import os
import sys
import sysconfig
import time
import typing
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import cache, cached_property, partial, partialmethod
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, GenericAlias, MethodType, ModuleType, UnionType
from typing import Any

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.hardware import resolve_precision

_BEGAN = time.time()  # a file that is written later may not be what was imported
_SCHEME = 2  # increase it when a change to lablib means that stored runs no longer answer the same question
_OF_EVERY_MODULE = {*vars(nn.Module()), "_hub_mixin_config"}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_DESCRIBED_BY_REPR = (bytes, complex, range, PurePath, Enum, np.dtype, torch.dtype, torch.device, torch.memory_format)
_DESCRIBED_BY_REPR += (typing._Final, GenericAlias, UnionType)  # annotations
_NOT_THE_USERS = [os.path.realpath(path) for path in (sysconfig.get_path("stdlib"), Path(__file__).parent)]


def run_identity(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None, callbacks=()
) -> dict[str, Any]:
    """What is trained, on what, and how; not where, nor who is notified. `trainer_class=None`: StreamlinedTrainer.

    lablib's networks are identified by class, arguments and seed; any other, by the code of the function that
    builds it, its layers, their attributes and its initial weights. A callback whose `__identity__` returns None only
    watches: it changes no identity. Raises TypeError for what cannot be described by its content, and ValueError if two
    calls of `build_model` do not give two equal networks.
    """
    model, network = described_network(build_model, config.seed)
    effects = [content for content in describe(list(callbacks), "callbacks") if content is not None]
    return {
        "scheme": _SCHEME,
        "model": network,
        "data": describe(data, "data"),
        "config": describe(config, "config") | {"precision": resolve_precision(config, model)},
        "trainer": describe(trainer_class or "lablib.StreamlinedTrainer", "trainer_class"),
    } | ({"callbacks": effects} if effects else {})


def run_name(identity: dict[str, Any]) -> str:
    """`<model class>-<hash of the identity>`, the name of a run's folder."""
    return f"{identity['model']['class'].rpartition('.')[2]}-{json_digest(identity)[:12]}"


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with the initial weights that belong to a seed; the CPU's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model()


def sha256(content: bytes | np.ndarray) -> str:
    return hashlib.sha256(content).hexdigest()


def json_digest(content: Any) -> str:
    """SHA-256 over a value as JSON, whatever the order of its keys."""
    return sha256(json.dumps(content, sort_keys=True).encode())


# changes with each change to one of lablib's files
LABLIB_VERSION = json_digest([sha256(file.read_bytes()) for file in sorted(Path(__file__).parent.glob("*.py"))])[:12]


def _tensor(tensor: torch.Tensor) -> list:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return [str(tensor.dtype), list(tensor.shape), sha256(content)]


def described_network(build_model: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its initial weights, and its part of a run's identity. Raises as `run_identity` does."""
    model = build_seeded(build_model, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the function that builds the model returned {model!r}, which is not a torch.nn.Module")
    if hasattr(model, "_orig_mod"):
        raise TypeError("the model is compiled; instead of torch.compile, write TrainingConfig(torch_compile=True)")
    cls, name, known = type(model), type(model).__name__, _by_arguments(model)
    if known and cls is (build_model.func if type(build_model) is partial else build_model):
        return model, known  # as the class itself built it
    content, second = describe(model, name), build_seeded(build_model, seed)
    if _trained_parts(model) & _trained_parts(second) or json_digest(content) != json_digest(describe(second, name)):
        raise ValueError(
            f"two calls of the function that builds the {name} must give two equal networks that share no weights. "
            "Build the network in the function, or return copy.deepcopy(network); and draw what is random with torch, "
            "which has the run's seed, not with NumPy or random"
        )
    if known and content == describe(build_seeded(partial(cls, **known["arguments"]), seed), name):
        return model, known  # nothing was changed
    built_by = describe(build_model, "the function that builds the model")
    return model, {"class": name, "built_by": built_by, "content": content}


def _by_arguments(model: nn.Module) -> dict[str, Any] | None:
    """The class of one of lablib's networks, and the arguments that are not None; None for any other network."""
    if type(model).__module__ != "lablib.models" or not hasattr(model, "_hub_mixin_config"):
        return None
    arguments = {key: value for key, value in model._hub_mixin_config.items() if value is not None}
    return {"class": _installed(type(model)), "arguments": describe(arguments, "arguments")}


def _trained_parts(model: nn.Module) -> set[int]:
    """What a training changes in place: modules with tensors of their own, and the memory of trainable weights."""
    modules = {id(m) for m in model.modules() if m._parameters or m._buffers}
    return modules | {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad} - {0}


def describe(value: Any, where: str, _above: tuple[int, ...] = (), _seen: dict | None = None) -> Any:
    """A value as JSON, by its content: the same for equal values in every process.

    Functions are described by their bytecode: comments and docstrings do not change it, another layout rarely does, and
    another minor version of Python does.

    `where` names the value in an error. An object with a method `__identity__` is described by what that returns.
    Raises TypeError where the content cannot be told.
    """
    kind, seen = type(value), {} if _seen is None else _seen  # the functions and classes so far: each described once

    # the order of these calls numbers functions and classes, so it is part of the runs' names
    def inside(part: Any, name: str = "") -> Any:
        return describe(part, where + name, (*_above, id(value)), seen)

    if hasattr(kind, "__identity__"):
        return inside(value.__identity__())
    if isinstance(value, (FunctionType, type)):
        if id(value) in seen:
            return {"described": seen[id(value)][0]}
        seen[id(value)] = len(seen), value  # the reference keeps the id from being reused
        return _class(value, inside) if isinstance(value, type) else _function(value, inside)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return int(value) if value.is_integer() else value  # 4 and 4.0 are the same setting
    if isinstance(value, np.generic):
        return inside(value.item())
    if isinstance(value, _DESCRIBED_BY_REPR) and _installed(kind):
        return {"repr": repr(value)}
    if kind in (np.ndarray, np.memmap) and not value.dtype.hasobject:
        return [str(value.dtype), list(value.shape), sha256(np.ascontiguousarray(value))]
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if id(value) in _above:
        return {"above": len(_above) - _above.index(id(value))}
    if kind in (list, tuple) or (isinstance(value, tuple) and _installed(kind)):
        return [inside(item, f"[{number}]") for number, item in enumerate(value)]
    # the order of settings does not matter, that of steps might
    if kind is dict and all(isinstance(key, str) and not callable(item) for key, item in value.items()):
        return {key: inside(item, f"[{key!r}]") for key, item in sorted(value.items())}
    if kind in (set, frozenset):
        items = sorted(value, key=lambda item: json_digest(describe(item, where, (*_above, id(value)))))
        return {"set": [inside(item) for item in items]}  # numbered in the same order in every process
    if kind in (dict, OrderedDict):
        return [[inside(key), inside(item, f"[{key!r}]")] for key, item in value.items()]
    if isinstance(value, nn.Module):
        return _layers(value, inside)
    if isinstance(value, partial):
        return {"partial": inside(value.func), "with": [inside(value.args), inside(value.keywords)]}
    if isinstance(value, (staticmethod, classmethod, property, cached_property, MethodType)):
        parts = ("__self__", "__func__", "fget", "fset", "fdel", "func")
        return [kind.__name__, *(inside(getattr(value, part, None)) for part in parts)]
    if isinstance(value, BuiltinFunctionType):
        return [inside(value.__self__), f"{value.__module__}.{value.__name__}"]
    if isinstance(value, ModuleType) and _is_installed(value.__name__):
        return value.__name__
    if isinstance(value, logging.Logger):
        return {"logger": value.name}
    attributes, copied = getattr(value, "__dict__", {}), ()
    with suppress(Exception):  # a lock, an open file, what lies outside of Python
        copied = value.__reduce_ex__(4)  # what pickle would make of it
    if copied[:2] == (copyreg.__newobj__, (kind,)) and (copied[2] or {}) == attributes and not any(copied[3:]):
        held = {name: inside(item, f".{name}") for name, item in sorted(attributes.items())}
        return {"class": inside(kind), "attributes": held}
    raise TypeError(
        f"{where} is a {_installed(kind) or kind.__name__}, and its content cannot be described. Create it in "
        "the function that uses it, or give its owner an __identity__ method; instead of a module, import names from "
        "it; instead of a named tuple, write a dataclass"
    )


def _layers(model: nn.Module, inside: Callable) -> dict[str, Any]:
    """Classes and attributes of all modules, in order, with their hooks, what is frozen, and the weights' digest."""
    layers = []
    for name, module in model.named_modules(remove_duplicate=False):
        own, place = not all(map(_installed, type(module).__mro__)), f".{name}" if name else ""
        held = {n: v for n, v in vars(module).items() if n not in _OF_EVERY_MODULE and (own or n[0] != "_")}
        held |= {n: list(vars(module)[n].values()) for n in _HOOKS if vars(module)[n]}
        held = {n: inside(v, f"{place}.{n}") for n, v in sorted(held.items())}
        layers.append([name, inside(type(module), place), held])
    named = [*model.named_parameters()]
    frozen = [name for name, p in named if not p.requires_grad]
    marked = [name for name, p in named if p._backward_hooks or p._post_accumulate_grad_hooks or vars(p)]
    # buffers that are not saved included
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    weights = json_digest([[name, *_tensor(tensor)] for name, tensor in tensors])
    return {"layers": layers, "frozen": frozen, "marked": marked, "weights": weights}


def _class(cls: type, inside: Callable) -> Any:
    """The name of an installed class; of the user's own the bases and members."""
    if all(map(_installed, cls.__mro__)):
        return _installed(cls)
    added = ("__", "_abc_", "_hub_mixin_")  # by Python and the Hub, unless the user wrote a method so named
    members = {name: v for name, v in vars(cls).items() if not name.startswith(added) or _is_written(v, cls)}
    if dataclasses.is_dataclass(cls):
        members["fields"] = [[f.name, f.default, f.default_factory] for f in dataclasses.fields(cls)]
    members = {name: inside(value, f".{name}") for name, value in sorted(members.items())}
    return {"class": cls.__name__, "bases": inside(cls.__bases__), "members": members}


def _is_written(member: Any, cls: type) -> bool:
    function = inspect.unwrap(member)
    if isinstance(function, FunctionType):  # a dataclass's generated methods are from "<string>"
        generated = dataclasses.is_dataclass(cls) and function.__code__.co_filename == "<string>"
        return not generated and not _installed(function)
    return isinstance(function, (partial, partialmethod)) or _installed(type(function)) is None


def _function(function: FunctionType, inside: Callable) -> Any:
    """Of an installed function the name; of the user's own the code; of both, the values that it refers to."""
    code = function.__code__
    held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    if name := _installed(function):
        return {"function": name, "uses": inside(held)} if held else name
    module = sys.modules.get(function.__globals__.get("__name__"))
    file = Path(getattr(module, "__file__", None) or "")
    if str(file) == code.co_filename and file.exists() and file.stat().st_mtime > _BEGAN:
        now = []
        with suppress(SyntaxError):  # half written
            now = _codes(compile(file.read_bytes(), str(file), "exec", dont_inherit=True))
        if _bytecode(code) not in map(_bytecode, now):
            raise TypeError(f"{file} was changed after {function.__qualname__} was imported; restart Python")
    steps = [step for part in _codes(code) for step in dis.get_instructions(part)]
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    known = {n: v for n, v in function.__globals__.items() if n in names and not (n[:2] == n[-2:] == "__")}
    for level, parts, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":  # within the function
            with suppress(Exception):  # it may be guarded there
                module = __import__(step.argval, function.__globals__, None, parts.argval, level.argval)
                known |= {n: getattr(module, n) for n in parts.argval} if parts.argval else {step.argval: module}
    return {
        "code": json_digest(_bytecode(code)),
        "uses": {name: inside(value, f" -> {name}") for name, value in sorted((known | held).items())},
        "defaults": inside([function.__defaults__, function.__kwdefaults__]),
        "attributes": inside(vars(function)),
    }


def _codes(code: CodeType) -> list[CodeType]:
    """A code object and those within it."""
    return [code, *(inner for part in code.co_consts if isinstance(part, CodeType) for inner in _codes(part))]


def _bytecode(code: CodeType) -> list:
    """What a code object does: its arguments, its instructions and their exceptions; no docstring, no line numbers."""
    described = {CodeType: _bytecode, frozenset: lambda items: sorted(map(ascii, items))}
    steps = [[s.opname, described.get(type(s.argval), ascii)(s.argval)] for s in dis.get_instructions(code)]
    about = [["STORE_NAME", ascii(n)] for n in ("__doc__", "__firstlineno__", "__static_attributes__")]  # a class
    pairs = zip(steps, [*steps[1:], None], strict=True)
    steps = [step for step, following in pairs if step not in about and following not in about]
    starred = code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, starred]
    return [counts, code.co_varnames, steps, code.co_exceptiontable.hex()]


def _installed(thing: type | FunctionType) -> str | None:
    """The name of what Python, an installed package or lablib defines; None for what is the user's own."""
    # a decorator may have changed a function's `__module__`
    module = thing.__module__ if isinstance(thing, type) else thing.__globals__.get("__name__", "")
    shown = "lablib" if module.partition(".")[0] == "lablib" else module  # lablib's modules may move
    return f"{shown}.{thing.__qualname__}" if _is_installed(module) else None


@cache
def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    files = (getattr(sys.modules.get(name), "__file__", None) for name in (package, module))
    file = next(filter(None, files), "")
    return package != "__main__" and (package in sys.builtin_module_names or is_installed_file(file))


def is_installed_file(file: str) -> bool:
    """Whether a file belongs to Python, an installed package or lablib."""
    path = PurePath(os.path.realpath(file) if file else "")
    return bool({"site-packages", "dist-packages"} & {*path.parts}) or any(map(path.is_relative_to, _NOT_THE_USERS))
