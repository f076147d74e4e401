"""What a run is: everything that changes its outcome, described by content, and the name that follows from it."""

import ast
import copyreg
import dataclasses
import dis
import hashlib
import inspect
import json
import linecache
import logging
import os
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from enum import Enum
from functools import _lru_cache_wrapper, cache, cached_property, lru_cache, partial
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, NoneType
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.hardware import resolve_bf16

_SCHEME = 2  # raise it when a change to lablib makes the runs in a store answer another question
_OF_EVERY_MODULE = {*vars(nn.Module()), "_hub_mixin_config"}


def run_identity(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None, callbacks=()
) -> dict[str, Any]:
    """What is trained, on what, and how; not where it runs, nor who is told of it. None is StreamlinedTrainer.

    One of lablib's networks is known by its class, arguments and seed; any other by the source of the function that
    builds it, its layers, their attributes and its initial weights. A callback whose `__identity__` returns None only
    watches, and makes no other run. Raises TypeError for what cannot be described by its content, and ValueError if two
    calls of `build_model` do not give two equal networks.
    """
    model, network = _network(build_model, config.seed)
    precision = {"precision": "bf16" if resolve_bf16(config, model) else "fp32"}
    described = {
        "scheme": _SCHEME,
        "model": network,
        "data": describe(data, "data"),
        "config": describe(config, "config") | precision,
        "trainer": "lablib.StreamlinedTrainer" if trainer_class is None else describe(trainer_class, "trainer_class"),
    }
    if acting := [content for content in describe(list(callbacks), "callbacks") if content is not None]:
        described["callbacks"] = acting
    return described


def run_name(described: dict[str, Any]) -> str:
    """`<model class>-<hash of the identity>`, the name of a run's folder."""
    digest = _sha256(json.dumps(described, sort_keys=True).encode())
    return f"{described['model']['class'].rpartition('.')[2]}-{digest[:12]}"


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with the initial weights that belong to a seed; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of a model's parameters and buffers, unsaved buffers included."""
    digest = hashlib.sha256()
    for tensors in (model.named_parameters, model.named_buffers):
        for name, tensor in tensors(remove_duplicate=False):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _network(build_model: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its initial weights, and its description. Raises ValueError if a second call gives another one."""
    model, second = build_seeded(build_model, seed), build_seeded(build_model, seed)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the function that builds the model returned {model!r}, which is no torch.nn.Module")
    name = type(model).__name__
    if _trained_parts(model) & _trained_parts(second):
        raise ValueError(
            f"the function that builds the {name} returned parts of an existing network. It must build "
            "a new one at each call, or each seed would continue the training of the one before: build the network in "
            "the function, or return copy.deepcopy(network)"
        )
    described = describe(model, name)
    if described != describe(second, name):
        raise ValueError(
            f"two calls of the function that builds the {name} gave different weights or attributes with seed {seed}. "
            "Draw what is random with torch, whose generator the seed sets, not with NumPy or random"
        )
    if _origin(type(model)) == "lablib" and hasattr(model, "_hub_mixin_config"):
        arguments = {name: value for name, value in model._hub_mixin_config.items() if value is not None}
        if described == describe(build_seeded(partial(type(model), **arguments), seed), name):  # nothing was changed
            return model, {"class": _name(type(model)), "arguments": describe(arguments, "arguments")}
    builder = describe(build_model, "the function that builds the model")
    return model, {"class": name, "built_by": builder, "content": described}


def _trained_parts(model: nn.Module) -> set[int]:
    """What a training changes in place: modules with tensors of their own, and the memory of trainable weights."""
    modules = {id(m) for m in model.modules() if m._parameters or m._buffers}
    return modules | {p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad} - {0}


def describe(value: Any, where: str, _above: tuple[int, ...] = (), _code: dict | None = None) -> Any:
    """A value as JSON, by its content: the same for equal values in every process and on Python 3.11 to 3.13.

    `where` names the value in an error. An object with a method `__identity__` is described by what that returns.
    Raises TypeError where the content cannot be told.
    """
    code = {} if _code is None else _code  # the functions and classes so far, each of which is described once

    def inside(part: Any, name: str = "", unordered: bool = False) -> Any:
        return describe(part, where + name, (*_above, id(value)), dict(code) if unordered else code)

    if hasattr(type(value), "__identity__"):
        return inside(value.__identity__())
    if isinstance(value, (FunctionType, type)):
        if id(value) in code:
            return {"described": code[id(value)][0]}
        code[id(value)] = len(code), value  # which keeps it, and so its id
    elif id(value) in _above:
        return {"above": len(_above) - _above.index(id(value))}
    if content := _CONTENT.get(type(value)):
        return content(value, inside)
    for kind, content in _CONTENT_BY_KIND.items():
        if isinstance(value, kind):
            return content(value, inside)
    if (held := _pickled(value)) is None:
        raise TypeError(
            f"{where} is a {_name(type(value))}, which cannot be described by its content, so that a run with another "
            "one would be taken for the same. Make it in the function that uses it, or give the object that holds it a "
            "method __identity__ that returns numbers, texts, lists, dicts, arrays or tensors"
        )
    attributes, *rest = held
    attributes = {n: inside(v, f".{n}") for n, v in sorted(attributes.items())}
    return {"class": inside(type(value)), "attributes": attributes, "content": inside(rest)}


def _number(value: float, inside: Callable) -> float:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 4 and 4.0 are one


def _array(value: np.ndarray, inside: Callable) -> list:
    content = inside(value.tolist()) if value.dtype.hasobject else _sha256(np.ascontiguousarray(value))
    return [str(value.dtype), list(value.shape), content]


def _mapping(value: dict, inside: Callable) -> Any:
    if all(isinstance(key, str) for key in value):
        return {key: inside(item, f"[{key!r}]") for key, item in sorted(value.items())}
    items = [[inside(key, "", True), inside(item, f"[{key!r}]", True)] for key, item in value.items()]
    return sorted(items, key=json.dumps)


def _sequence(value: list | tuple, inside: Callable) -> list:
    return [inside(item, f"[{number}]") for number, item in enumerate(value)]


def _set(value: set | frozenset, inside: Callable) -> list:
    return sorted((inside(item, "", True) for item in value), key=json.dumps)


def _path(value: PurePath, inside: Callable) -> str:
    """Relative to the working directory where it lies in that, so that a project may be moved."""
    return (value.relative_to(Path.cwd()) if value.is_relative_to(Path.cwd()) else value).as_posix()


def _layers(model: nn.Module, inside: Callable) -> dict[str, Any]:
    """Classes and attributes of all modules, what hooks them, what is frozen, and the digest of the weights."""
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own, place = _is_own(type(module)), f".{name}" if name else ""
        held = {n: v for n, v in vars(module).items() if n not in _OF_EVERY_MODULE and (own or n[0] != "_")}
        held |= {n: list(hooks.values()) for n, hooks in vars(module).items() if n.endswith("_hooks") and hooks}
        layers[name] = [inside(type(module), place), {n: inside(v, f"{place}.{n}") for n, v in sorted(held.items())}]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {"layers": layers, "frozen": frozen, "weights": weights_digest(model)}


def _class(cls: type, inside: Callable) -> Any:
    """The name of an installed class; of the user's own the bases and members."""
    if not _is_own(cls):
        return _name(cls)
    members = {name: value for name, value in vars(cls).items() if _is_written(name, value)}
    if issubclass(cls, Enum):
        members |= {name: member.value for name, member in cls.__members__.items()}
    if dataclasses.is_dataclass(cls):
        members["fields"] = [[f.name, f.default, f.default_factory] for f in dataclasses.fields(cls)]
    members = {name: inside(value, f".{name}") for name, value in sorted(members.items())}
    return {"class": cls.__name__, "bases": inside(cls.__bases__), "members": members}


def _is_written(name: str, member: Any) -> bool:
    """Whether the user wrote a member of a class: Python, dataclasses and enums add their own."""
    if name.startswith("_") and name.endswith("_"):
        function = inspect.unwrap(getattr(member, "__func__", member))
        own = isinstance(function, FunctionType) and not _origin_of_file(function.__code__.co_filename)
        return own and _definition(function.__code__) is not None
    return not name.startswith(("_abc_", "_hub_mixin_")) and not isinstance(member, MemberDescriptorType)


def _function(function: FunctionType, inside: Callable) -> Any:
    """Of an installed function the name; of the user's own the source; of both, the values that it refers to."""
    code = function.__code__
    cells = dict(zip(code.co_freevars, map(_cell_content, function.__closure__ or ()), strict=True))
    if origin := _origin_of_file(code.co_filename):
        name = f"{origin}.{function.__qualname__}"
        return {"function": name, "uses": inside(cells)} if cells else name
    node = _definition(code)
    if node is None:
        raise TypeError(
            f"the source of the function {function.__qualname__} is not in {code.co_filename}, so that a run with "
            "another one would be taken for the same. Define it in a file or in a notebook's cell"
        )
    known = function.__globals__ | cells
    names = {name: known[name] for name in _global_names(code) | cells.keys() if name in known and name[:2] != "__"}
    used = {}
    for part in ast.walk(node):
        if isinstance(part, (ast.Name, ast.Attribute)):
            used |= _looked_up(ast.unparse(part).split("."), names)
    return {
        "source": _sha256(json.dumps(_canonical(node)).encode()),
        "uses": {name: inside(value, f" -> {name}") for name, value in sorted(used.items())},
        "defaults": inside([function.__defaults__, function.__kwdefaults__]),
        "attributes": inside(vars(function)),
    }


def _looked_up(path: list[str], names: dict[str, Any]) -> dict[str, Any]:
    """The value of a name, or of a dotted name into a module of the user's own; nothing for such a module itself."""
    name, value = path[0], names.get(path[0])
    for attribute in path[1:]:
        if _is_own_module(value):
            name, value = f"{name}.{attribute}", getattr(value, attribute, None)
    return {name: value} if path[0] in names and not _is_own_module(value) else {}


def _is_own_module(value: Any) -> bool:
    return isinstance(value, ModuleType) and _origin(value) is None


def _cell_content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _global_names(code: CodeType) -> set[str]:
    loaded = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return loaded.union(*(_global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


def _definition(code: CodeType) -> ast.AST | None:
    """The syntax tree of the function or lambda that a code object was compiled from."""
    linecache.checkcache(code.co_filename)
    nodes = _syntax("".join(linecache.getlines(code.co_filename)))
    if code.co_name != "<lambda>":
        named = (n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == code.co_name)
        return next((n for n in named if code.co_firstlineno == min(p.lineno for p in (n, *n.decorator_list))), None)
    # several lambdas may be on a line: it is the innermost whose body has all instructions
    places = [
        ((p[0], p[2]), (p[1], p[3])) for p in code.co_positions() if None not in p and (p[0], p[2]) != (p[1], p[3])
    ]
    around = [
        n
        for n in nodes
        if isinstance(n, ast.Lambda)
        and n.lineno == code.co_firstlineno
        and all(_start(n.body) <= start and end <= (n.body.end_lineno, n.body.end_col_offset) for start, end in places)
    ]
    if not places and len(around) > 1:  # a constant's place is not known on Python 3.12
        return None
    return max(around, key=_start, default=None)


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset


@lru_cache(maxsize=64)
def _syntax(text: str) -> list[ast.AST]:
    """All nodes of a file or cell."""
    try:
        return list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return []


def _canonical(node: Any) -> Any:
    """A syntax tree without layout, comments and docstrings, and without what differs between versions of Python."""
    if isinstance(node, list):
        return [_canonical(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")}
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty texts
        fields["values"] = [part for part in node.values if getattr(part, "value", None) != ""]
    body = fields.get("body")
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        fields["body"] = body[1:]
    return [type(node).__name__, {name: _canonical(value) for name, value in fields.items() if value not in (None, [])}]


def _pickled(value: Any) -> tuple | None:
    """What pickle would keep of an object: its attributes, and the rest; None if that would not tell its content."""
    if isinstance(value, ModuleType) and _origin(value):
        return {}, value.__name__
    if isinstance(value, _ONLY_A_STATE):
        return None
    reduce = copyreg.dispatch_table.get(type(value), lambda value: value.__reduce_ex__(4))
    try:
        reduced = reduce(value)
    except Exception:  # locks, open files, what lies outside of Python
        return None
    if isinstance(reduced, str):  # a function in C, a dtype
        return {}, f"{getattr(value, '__module__', None)}.{reduced}"
    _, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
    attributes, state = (state, None) if isinstance(state, dict) else ({}, state)
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # of a class with __slots__
        attributes, state = (state[0] or {}) | state[1], None
    computed = (name for name in attributes if isinstance(getattr(type(value), name, None), cached_property))
    attributes = {name: attributes[name] for name in attributes.keys() - computed}
    return attributes, arguments, state, list(items or ()), dict(pairs or ())


def _is_own(cls: type) -> bool:
    """Whether a class, or one that it inherits from, is the user's."""
    return any(_origin(base) is None for base in cls.__mro__)


def _origin(thing: type | ModuleType) -> str | None:
    """The package of an installed class or module; None if it is the user's own."""
    name = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    package = name.partition(".")[0]
    if package == "__main__":
        return None
    if package in sys.builtin_module_names:
        return package
    files = (getattr(sys.modules.get(module), "__file__", None) for module in (name, package))
    return next((_origin_of_file(file) for file in files if file), None)


@cache
def _origin_of_file(file: str) -> str | None:
    if file.startswith("<"):  # a cell; or a part of Python that is frozen into it
        return "python" if file.startswith("<frozen") else None
    path = PurePath(os.path.realpath(file))
    if path.is_relative_to(_LABLIB):
        return "lablib"
    for packages in ("site-packages", "dist-packages"):
        if packages in path.parts:
            return path.parts[path.parts.index(packages) + 1]
    if path.is_relative_to(_STANDARD_LIBRARY):
        return path.relative_to(_STANDARD_LIBRARY).parts[0].removesuffix(".py")
    return None


def _name(cls: type) -> str:
    """The name of a class; an installed one's begins with its package, wherever in that it lies."""
    return f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}" if _origin(cls) else cls.__name__


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


_LABLIB = os.path.dirname(os.path.realpath(__file__))
_STANDARD_LIBRARY = os.path.realpath(sysconfig.get_path("stdlib"))
_ONLY_A_STATE = (  # what they hold says nothing about what they will do, or changes while a run is trained
    Iterator,
    logging.Filterer,
    np.random.BitGenerator,
    np.random.Generator,
    np.random.RandomState,
    random.Random,
    torch.Generator,
)
_CONTENT = {
    **dict.fromkeys((NoneType, bool, str), lambda value, inside: value),
    **dict.fromkeys((int, float), _number),
    bytes: lambda value, inside: ["bytes", _sha256(value)],
    **dict.fromkeys((np.ndarray, np.memmap), _array),
    dict: _mapping,
    list: _sequence,
    **dict.fromkeys((set, frozenset), _set),
}
_CONTENT_BY_KIND = {
    (np.number, np.bool_): lambda value, inside: inside(value.item()),
    torch.Tensor: lambda value, inside: [str(value.dtype), list(value.shape), _sha256(_bytes(value))],
    tuple: _sequence,
    PurePath: _path,
    Enum: lambda value, inside: [inside(type(value)), value.name, inside(value.value)],
    nn.Module: _layers,
    type: _class,
    FunctionType: _function,
    MethodType: lambda value, inside: [inside(value.__func__), inside(value.__self__)],
    partial: lambda value, inside: {
        "partial": inside(value.func),
        "with": [inside(value.args), inside(value.keywords)],
    },
    property: lambda value, inside: [inside(value.fget), inside(value.fset), inside(value.fdel)],
    (staticmethod, classmethod): lambda value, inside: inside(value.__func__),
    _lru_cache_wrapper: lambda value, inside: inside(value.__wrapped__),
    cached_property: lambda value, inside: inside(value.func),
    ReferenceType: lambda value, inside: inside(value()),
}
