"""A notebook's parameters, checked before anything else happens."""

import ast
import difflib
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, get_args, get_origin

_EXAMPLES = {int: "a whole number such as 3", float: "a number such as 0.001", str: "a string"}
_EXAMPLES |= {bool: "True or False", list: "a list such as [2, 4, 8]"}


@dataclass(frozen=True)
class Between:
    """The numbers from `low` to `high`, both allowed."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high


def check_parameters(namespace: dict[str, Any], **allowed: Container) -> None:
    """Refuse parameters of the wrong type, out of range, or unknown; `namespace` is the notebook's `globals()`.

    Known are the annotated names of the cell tagged `parameters`, each of the type of its annotation. `allowed` gives
    for some of them what they may be: a range, `Between` two numbers, or a collection of values. Unknown are names that
    papermill injected (`-p epoch 3`) and the cell does not have.

    Raises ValueError that lists every fault and says what to write instead.
    """
    annotations = namespace.get("__annotations__", {})
    if not annotations:
        raise ValueError("the notebook has no annotated parameters; run its cell tagged 'parameters' first")
    faults = [_unknown(name, annotations) for name in sorted(_injected_names(namespace)) if name not in annotations] + [
        fault for name, kind in annotations.items() if (fault := _fault(name, namespace[name], kind, allowed))
    ]
    if faults:
        raise ValueError("the notebook's parameters cannot be used:\n- " + "\n- ".join(faults))


def _injected_names(namespace: dict[str, Any]) -> set[str]:
    """Names assigned in the cells that papermill injected; it starts each with the comment `# Parameters`."""
    names = set()
    for source in namespace.get("In", []):
        if source.lstrip().startswith("# Parameters"):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
    return names


def _unknown(name: str, annotations: dict) -> str:
    close = difflib.get_close_matches(name, annotations, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no parameter {name!r}.{hint} There are: {', '.join(annotations)}"


def _fault(name: str, value: Any, kind: type, allowed: dict[str, Container]) -> str | None:
    base = get_origin(kind) or kind
    wanted = _wanted(base, allowed.get(name))
    fits = _is_a(value, base)
    values = value if fits and base is list else [value]
    if base is list and get_args(kind):
        fits = fits and all(_is_a(v, get_args(kind)[0]) for v in values)
    if fits and name in allowed:
        fits = len(values) > 0 and all(type(v) is not bool and v in allowed[name] for v in values)
    if fits:
        return None
    hint = ""
    if isinstance(value, str) and base is bool:
        hint = f"; with papermill: -p {name} True, with a capital T"
    elif isinstance(value, str) and base is list:
        example = "[0.5, 1]" if isinstance(allowed.get(name), Between) else "[2, 4, 8]"
        hint = f"; with papermill: -y '{name}: {example}'"
    return f"{name} = {value!r}: write {wanted}{hint}"


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _wanted(base: type, allowed: Container | None) -> str:
    if isinstance(allowed, range):
        text = f"a whole number from {allowed.start} to {allowed.stop - 1}"
    elif isinstance(allowed, Between):
        text = f"a number from {allowed.low:g} to {allowed.high:g}"
    elif allowed is not None:
        text = "one of " + ", ".join(repr(value) for value in allowed)
    else:
        return _EXAMPLES.get(base, f"a value of type {base.__name__}")
    return f"a list of one or more, each {text}" if base is list else text
