"""What a run is: everything that changes its outcome, described by content, and the name that follows from it."""

import ast
import hashlib
import json
import linecache
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cached_property, partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodDescriptorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.hardware import resolve_bf16

_SCHEME = 2  # raise it when a change to lablib makes the runs in a store answer another question
_STANDARD_LIBRARY = os.path.realpath(sysconfig.get_path("stdlib")) + os.sep
_LABLIB = os.path.dirname(os.path.realpath(__file__)) + os.sep
_OF_EVERY_MODULE = {*vars(nn.Module()), "_hub_mixin_config"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LITERALS = (complex, bytes, range, slice, torch.dtype, torch.device, torch.memory_format, type(...))


def run_identity(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None, callbacks=()
) -> dict[str, Any]:
    """What is trained, on what, and how; not where it runs, nor who is told of it. None is StreamlinedTrainer.

    One of lablib's networks is known by its class, arguments and seed; any other by the source of the function that
    builds it, its layers, their attributes and its initial weights.
    Raises TypeError for what cannot be described by its content, and ValueError as `build_seeded` does.
    """
    model = _built_twice(build_model, config.seed)
    precision = {"precision": "bf16" if resolve_bf16(config, model) else "fp32"}
    described = {
        "scheme": _SCHEME,
        "model": _network(model, build_model, config.seed),
        "data": describe(data, "data"),
        "config": describe(config, "config") | precision,
        "trainer": "lablib.StreamlinedTrainer" if trainer_class is None else describe(trainer_class, "trainer_class"),
    }
    if callbacks:
        described["callbacks"] = describe(list(callbacks), "callbacks")
    return described


def run_name(described: dict[str, Any]) -> str:
    """`<model class>-<hash of the identity>`, the name of a run's folder."""
    return f"{described['model']['class'].rpartition('.')[2]}-{_digest(described)[:12]}"


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a model with the initial weights that belong to a seed; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, types and bytes of a model's parameters and buffers, unsaved buffers included."""
    digest = hashlib.sha256()
    for name, tensor in _tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _built_twice(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    first, second = build_seeded(build_model, seed), build_seeded(build_model, seed)
    if not isinstance(first, nn.Module):
        raise TypeError(f"the function that builds the model returned {first!r}, which is no torch.nn.Module")
    if first is second or {id(t) for _, t in _tensors(first)} & {id(t) for _, t in _tensors(second)}:
        raise ValueError(
            f"the function that builds the {type(first).__name__} returned parts of an existing network. It must build "
            "a new one at each call, or each seed would continue the training of the one before: build the network in "
            "the function, or return copy.deepcopy(network)"
        )
    if weights_digest(first) != weights_digest(second):
        raise ValueError(
            f"two calls of the function that builds the {type(first).__name__} gave different weights with seed {seed}."
            " Draw initial weights with torch, whose generator the seed sets, not with NumPy or random"
        )
    return first


def _network(model: nn.Module, build_model: Callable[[], nn.Module], seed: int) -> dict[str, Any]:
    described = describe(model, type(model).__name__)
    arguments = getattr(model, "_hub_mixin_config", None)
    if _origin(type(model)) == "lablib" and isinstance(arguments, dict):
        untouched = build_seeded(partial(type(model), **arguments), seed)
        if described == describe(untouched, ""):
            given = {name: value for name, value in arguments.items() if value is not None}
            return {"class": _name(type(model)), "arguments": describe(given, "arguments")}
    return {"class": type(model).__name__, "built_by": describe(build_model, "the function that builds it")} | described


def describe(value: Any, where: str, _above: tuple[int, ...] = ()) -> Any:
    """A value as JSON, by its content: the same for equal values in every process and on Python 3.11 to 3.13.

    `where` names the value in an error. An object with a method `__identity__` is described by what that returns.
    Raises TypeError where the content cannot be told.
    """

    def inside(part: Any, name: str) -> Any:
        return describe(part, f"{where}{name}", (*_above, id(value)))

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float, np.number, np.bool_)):
        number = value.item() if isinstance(value, np.generic) else value
        return int(number) if isinstance(number, float) and number.is_integer() else number  # 4 and 4.0 are one
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, _LITERALS):
        return repr(value)
    if id(value) in _above:  # it refers to itself
        return "..."
    if hasattr(value, "__identity__") and not isinstance(value, type):
        return inside(value.__identity__(), "")
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        return [str(value.dtype), list(value.shape), _sha256(value.view(-1).view(torch.uint8).numpy())]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), list(value.shape), _sha256(np.ascontiguousarray(value))]
    if isinstance(value, dict):
        items = [(inside(key, ""), inside(item, f"[{key!r}]")) for key, item in value.items()]
        if all(isinstance(key, str) for key, _ in items):
            return dict(sorted(items))
        return sorted(items, key=json.dumps)
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
        return [inside(item, f"[{number}]") for number, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((inside(item, "") for item in value), key=json.dumps)
    if isinstance(value, partial):
        return {"partial": inside(value.func, ""), "with": [inside(value.args, ""), inside(value.keywords, "")]}
    if isinstance(value, MethodType):
        return [inside(value.__func__, ""), inside(value.__self__, "")]
    if isinstance(value, (staticmethod, classmethod)):
        return inside(value.__func__, "")
    if isinstance(value, property):
        return [inside(function, "") for function in (value.fget, value.fset, value.fdel)]
    if isinstance(value, BuiltinFunctionType):
        return _name(value)
    if isinstance(value, cached_property) or hasattr(value, "cache_info"):
        return inside(getattr(value, "func", None) or value.__wrapped__, "")
    if isinstance(value, FunctionType):
        return _function(value, where, inside)
    if isinstance(value, type):
        return _class(value, inside)
    if isinstance(value, nn.Module):
        return _layers(value, inside)
    if not any(
        isinstance(member, MethodDescriptorType) for c in type(value).__mro__[:-1] for member in vars(c).values()
    ):
        slots = [name for c in type(value).__mro__ for name in getattr(c, "__slots__", ()) if hasattr(value, name)]
        held = getattr(value, "__dict__", {}) | {name: getattr(value, name) for name in slots if name[:2] != "__"}
        return {"class": inside(type(value), "")} | {n: inside(v, f".{n}") for n, v in sorted(held.items())}
    raise TypeError(
        f"{where} is a {_name(type(value))}, which cannot be described by its content, so that a run with another one "
        "would be taken for the same. Use numbers, texts, lists, dicts, dataclasses, arrays, tensors, modules, or "
        "functions with source; or give its class a method __identity__ that returns such values"
    )


def _layers(model: nn.Module, inside: Callable) -> dict[str, Any]:
    """Classes and attributes of all modules, what hooks them, what is frozen, and the digest of the weights."""
    layers = {}
    for name, module in model.named_modules():
        own = _origin(type(module)) is None
        held = {n: v for n, v in vars(module).items() if n not in _OF_EVERY_MODULE and (own or n[0] != "_")}
        held |= {hooks: list(getattr(module, hooks).values()) for hooks in _HOOKS if getattr(module, hooks, None)}
        place = f".{name}" if name else ""
        attributes = {n: inside(value, f"{place}.{n}") for n, value in sorted(held.items())}
        layers[name] = [inside(type(module), place), attributes]
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return {"layers": layers, "frozen": frozen, "weights": weights_digest(model)}


def _class(cls: type, inside: Callable) -> Any:
    """The name of an installed class; of the user's own the members, those of its own bases included."""
    if _origin(cls):
        return _name(cls)
    own = [c for c in cls.__mro__ if _origin(c) is None]
    members = {}
    for c in reversed(own):
        for name, value in vars(c).items():
            generated = isinstance(value, FunctionType) and value.__code__.co_filename.startswith(
                "<string>"
            )  # dataclass
            kept = isinstance(value, (FunctionType, staticmethod, classmethod)) or not name.startswith(("__", "_abc_"))
            if (
                kept
                and not generated
                and not name.startswith("_hub_mixin")
                and type(value).__name__ != "member_descriptor"
            ):
                members[f"{c.__name__}.{name}"] = inside(value, f".{name}")
    return {"class": cls.__name__, "bases": [_name(c) for c in cls.__mro__ if _origin(c)], "members": members}


def _function(function: FunctionType, where: str, inside: Callable) -> Any:
    """The name of an installed function; of the user's own the source, and the values that it refers to."""
    code = function.__code__
    if origin := _origin_of_file(code.co_filename):
        wrapped = getattr(function, "__wrapped__", None)  # torch.no_grad() around a user's function, for instance
        name = f"{origin}.{function.__qualname__}"
        return name if wrapped is None else [origin, inside(wrapped, "")]
    node = _definition(code)
    if node is None:
        raise TypeError(
            f"{where} is the function {function.__qualname__}, whose source cannot be found, so that a run with another "
            "one would be taken for the same. Define it in a file or in a notebook's cell"
        )
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    used = {name: _content(cell) for name, cell in cells.items() if name != "__class__"}
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & _global_names(code)
    used |= {name: function.__globals__[name] for name in names if name in function.__globals__}
    defaults = [function.__defaults__, function.__kwdefaults__]
    return {
        "source": _sha256(json.dumps(_canonical(node)).encode()),
        "uses": {name: inside(value, f" -> {name}") for name, value in sorted(used.items())},
        "defaults": inside(defaults, ""),
    }


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _global_names(code: CodeType) -> set[str]:
    nested = (_global_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return {*code.co_names}.union(*nested)


def _definition(code: CodeType) -> ast.AST | None:
    """The syntax tree of the function or lambda that a code object was compiled from."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)
    try:
        nodes = list(ast.walk(ast.parse("".join(lines))))
    except SyntaxError:
        return None
    if code.co_name != "<lambda>":
        named = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and n.name == code.co_name]
        return next(
            (n for n in named if min(part.lineno for part in (n, *n.decorator_list)) == code.co_firstlineno), None
        )
    lambdas = [n for n in nodes if isinstance(n, ast.Lambda) and n.lineno <= code.co_firstlineno <= n.end_lineno]
    for line, end_line, column, end_column in code.co_positions():  # of the instructions: several may be on a line
        if None not in (line, end_line, column, end_column) and (line, column) != (end_line, end_column):
            lambdas = [
                n
                for n in lambdas
                if (n.lineno, n.col_offset) <= (line, column)
                and (end_line, end_column) <= (n.end_lineno, n.end_col_offset)
            ]
    return max(lambdas, key=lambda n: (n.lineno, n.col_offset), default=None)  # the innermost


def _canonical(node: Any) -> Any:
    """A syntax tree without layout, comments and docstrings, and without what differs between versions of Python."""
    if isinstance(node, list):
        return [_canonical(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")}
    body = fields.get("body")
    if isinstance(body, list) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        fields["body"] = body[1:]
    return [type(node).__name__, {name: _canonical(value) for name, value in fields.items() if value not in (None, [])}]


def _origin(cls: type) -> str | None:
    """The package of an installed class; None if it is the user's own."""
    if cls.__module__.partition(".")[0] in sys.builtin_module_names:
        return cls.__module__ if cls.__module__ != "__main__" else None
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return _origin_of_file(file) if file else None


def _origin_of_file(file: str) -> str | None:
    path = os.path.realpath(file)
    if path.startswith(_LABLIB):
        return "lablib"
    parts = PurePath(path).parts
    for packages in ("site-packages", "dist-packages"):
        if packages in parts:
            return parts[parts.index(packages) + 1]
    if path.startswith(_STANDARD_LIBRARY):
        return PurePath(path).relative_to(_STANDARD_LIBRARY).parts[0].removesuffix(".py")
    return "python" if file.startswith("<frozen") else None


def _name(thing: Any) -> str:
    """The name of a class or function; an installed one's begins with its package, wherever in that it lies."""
    module = (thing.__module__ or "builtins").partition(".")[0]
    own = isinstance(thing, type) and _origin(thing) is None
    return thing.__name__ if own else f"{module}.{thing.__qualname__}"


def _digest(described: dict[str, Any]) -> str:
    return _sha256(json.dumps(described, sort_keys=True).encode())


def _sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()
