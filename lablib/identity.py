"""A run's identity: everything that changes its outcome, described by content, and the name derived from it."""

import dis
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.hardware import resolve_precision

_SCHEME = 2  # increase it when a change to lablib makes stored runs incomparable with new ones
_FILES = sorted(Path(__file__).parent.glob("*.py"))
LABLIB_VERSION = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()[:12]
_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]  # dicts whose keys count up within a process


def run_identity(
    build_model: Callable[[], nn.Module], config: TrainingConfig, data: ImageData, trainer_class=None, callbacks=()
) -> dict[str, Any]:
    """What is trained, on what data, and how; not where or who is notified. `trainer_class=None`: StreamlinedTrainer.

    A callback whose `__identity__` returns None is left out: it only observes. Raises TypeError for what cannot
    be described by its content, and ValueError if two calls of `build_model` do not build two equal networks.
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
    """Build a model with the initial weights of a seed, without changing the CPU's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model()


def sha256(content: Any) -> str:
    return hashlib.sha256(content).hexdigest()


def json_digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())


def described_network(build_model: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A network with its initial weights, and its part of a run's identity (class and arguments if it is lablib's)."""
    model = build_seeded(build_model, seed)
    cls, name, known = type(model), type(model).__name__, None
    if cls.__module__ == "lablib.models" and hasattr(model, "_hub_mixin_config"):
        arguments = {key: value for key, value in model._hub_mixin_config.items() if value is not None}
        known = {"class": f"lablib.{name}", "arguments": describe(arguments, "arguments")}
        if cls is (build_model.func if type(build_model) is partial else build_model):
            return model, known
    content, second = describe(model, name), build_seeded(build_model, seed)
    memory = [{t.data_ptr() for t in (*net.parameters(), *net.buffers())} - {0} for net in (model, second)]
    if set.intersection(*memory) or json_digest(content) != json_digest(describe(second, name)):
        advice = "build it there; draw with torch, not NumPy or random; compile with TrainingConfig.torch_compile"
        raise ValueError(f"two calls that build the {name} must give equal networks that share no tensor: {advice}")
    if known and content == describe(build_seeded(partial(cls, **known["arguments"]), seed), name):
        return model, known  # nothing was changed
    return model, {"class": name, "built_by": describe(build_model, "build_model"), "content": content}


def describe(value: Any, where: str, _seen: dict | None = None) -> Any:
    """Describe a value by its content or its `__identity__`, as JSON. Raises TypeError, naming `where`, on failure."""
    kind, seen = type(value), {} if _seen is None else _seen  # each object is described once
    inside = partial(describe, _seen=seen)
    if hasattr(kind, "__identity__"):
        return inside(value.__identity__(), where)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return int(value) if value.is_integer() else value  # 4 and 4.0 are the same setting
    if kind is bytes:
        return {"bytes": sha256(value)}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        return [str(value.dtype), [*value.shape], value.requires_grad, bool(value._backward_hooks), sha256(content)]
    if kind in (np.ndarray, np.memmap) and not value.dtype.hasobject:
        return [str(value.dtype), [*value.shape], sha256(np.ascontiguousarray(value))]
    if kind in (list, tuple):
        return [inside(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if kind in (set, frozenset):
        return {"set": sorted((describe(item, where, dict(seen)) for item in value), key=json_digest)}
    if kind is dict:  # the order of settings does not matter, but that of steps might
        if all(isinstance(key, str) and not callable(item) for key, item in value.items()):
            return {key: inside(item, f"{where}[{key!r}]") for key, item in sorted(value.items())}
        return [[inside(key, where), inside(item, f"{where}[{key!r}]")] for key, item in value.items()]
    if isinstance(value, ModuleType) and _is_installed(value.__name__):
        return value.__name__
    if id(value) in seen:
        return {"described": seen[id(value)][0]}
    seen[id(value)] = len(seen), value  # the reference keeps the id from being reused
    if isinstance(value, FunctionType):
        return inside(_function(value), where)
    if isinstance(value, type):
        added = ("__", "_abc_", "_hub_mixin_")  # added by Python and the Hub; methods count
        members = {k: v for k, v in sorted(vars(value).items()) if callable(v) or not k.startswith(added)}
        return _installed(value) or inside({"bases": value.__bases__, "members": members}, where)
    if isinstance(value, partial):
        return {"partial": inside(value.func, where), "with": inside([value.args, value.keywords], where)}
    if isinstance(value, (property, staticmethod, classmethod, cached_property, MethodType)):
        parts = ("__self__", "__func__", "fget", "fset", "fdel", "func")
        return inside([kind, *(getattr(value, part, None) for part in parts)], where)
    if isinstance(value, nn.Module):
        attributes = {name: held for name, held in vars(value).items() if name != "_flat_weight_refs"}
        attributes |= {name: [*attributes[name].values()] for name in _HOOKS}
        return inside({"class": kind, "attributes": attributes}, where)
    try:  # what pickle would store
        stored = value.__reduce_ex__(4)
    except Exception as error:  # a lock, an open file, something outside Python
        advice = "create it in the function that uses it, or give the class of its owner an __identity__ method"
        raise TypeError(f"{where} is a {kind.__name__}, which cannot be described by its content; {advice}") from error
    if isinstance(stored, str):  # a name
        stored = kind, stored, getattr(value, "__wrapped__", getattr(value, "__module__", None))
    return inside(dict(zip(("call", "arguments", "state", "items", "entries"), stored, strict=False)), where)


def _function(function: FunctionType) -> Any:
    closure = [cell.cell_contents for cell in function.__closure__ or ()]
    if name := _installed(function):
        return [name, closure] if closure else name
    steps = _steps(function.__code__)
    names = {argument for step, argument in steps if step in ("LOAD_GLOBAL", "LOAD_NAME")} - {"__name__"}
    used = {name: value for name, value in sorted(function.__globals__.items()) if name in names}
    state = [closure, function.__defaults__, function.__kwdefaults__, vars(function)]
    return {"code": sha256(ascii(steps).encode()), "globals": used, "state": state}


def _steps(code: CodeType) -> list[tuple[str, Any]]:
    steps = [("ARGUMENTS", inspect.getargs(code)), ("EXCEPTIONS", code.co_exceptiontable)]
    for step in dis.get_instructions(code):  # without comments, docstrings and line numbers
        argument = sorted(step.argval, key=ascii) if isinstance(step.argval, frozenset) else step.argval
        steps += _steps(argument) if isinstance(argument, CodeType) else [(step.opname, argument)]
    return steps


def _installed(thing: type | FunctionType) -> str | None:
    """The name of what Python, packages or lablib define, else None; decorators may change a `__module__`."""
    modules = [c.__module__ for c in getattr(thing, "__mro__", ())] or [thing.__globals__.get("__name__", "")]
    shown = "lablib" if modules[0].startswith("lablib.") else modules[0]  # lablib's modules may move
    return f"{shown}.{thing.__qualname__}" if all(map(_is_installed, modules)) else None


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    file = os.path.realpath(getattr(sys.modules.get(package), "__file__", None) or "/")
    if package in sys.stdlib_module_names:  # unless a user's file has that name
        return file == "/" or file.startswith(os.path.realpath(os.path.dirname(os.__file__)))
    return package == "lablib" or (package != "__main__" and ("site-packages" in file or "dist-packages" in file))
