"""A notebook's parameters, checked before anything else happens."""

import ast
import difflib
import os
from pathlib import Path
from typing import Annotated, Any, get_origin

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

# Names for the annotations of a parameters cell: papermill's help can read no others.
Count = Annotated[int, Field(ge=1, le=10_000)]
Natural = Annotated[int, Field(ge=0)]
Counts = Annotated[list[Count], Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[list[Share], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positives = Annotated[list[Positive], Field(min_length=1)]


def check_parameters(namespace: dict[str, Any]) -> None:
    """Refuse parameters that do not fit their annotation, or unknown ones; `namespace` is the notebook's `globals()`.

    Unknown are names that papermill injected (`-p epoch 3`) and that no annotated line of the cell tagged `parameters`
    has. Raises ValueError that lists every fault and says what is allowed.
    """
    annotations = namespace.get("__annotations__", {})
    if not annotations:
        raise ValueError("the notebook has no annotated parameters; run its cell tagged 'parameters' first")
    faults = [_unknown(name, annotations) for name in sorted(_injected_names(namespace)) if name not in annotations]
    for name, kind in annotations.items():
        try:
            TypeAdapter(kind, config=ConfigDict(strict=True)).validate_python(namespace[name])
        except ValidationError as error:
            faults.append(_fault(name, namespace[name], kind, error))
    if faults:
        raise ValueError("the notebook's parameters cannot be used:\n- " + "\n- ".join(faults))


def _injected_names(namespace: dict[str, Any]) -> set[str]:
    """Names assigned in the cells that papermill injected; it starts each with the comment `# Parameters`."""
    injected = [source for source in namespace.get("In", []) if source.lstrip().startswith("# Parameters")]
    nodes = [node for source in injected for node in ast.walk(ast.parse(source))]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _unknown(name: str, annotations: dict) -> str:
    close = difflib.get_close_matches(name, annotations, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"there is no parameter {name!r}.{hint} There are: {', '.join(annotations)}"


def _fault(name: str, value: Any, kind: Any, error: ValidationError) -> str:
    first = error.errors()[0]
    place = "".join(f"[{part}]" for part in first["loc"])
    message = first["msg"].removeprefix("Input ")
    text = f"{name} = {value!r}: {name}{place} {message[0].lower()}{message[1:]}"
    base = getattr(kind, "__origin__", kind)
    if isinstance(value, str) and base is bool:
        text += f"; with papermill: -p {name} True, with a capital T"
    elif isinstance(value, str) and (base is list or get_origin(base) is list):
        text += f"; with papermill: -y '{name}: [2, 4]'"
    return text


def enter_project_root() -> None:
    """Change to the project's root if a notebook was opened below it, so that its paths mean the same from anywhere."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "lablib" / "__init__.py").exists():
            os.chdir(folder)
            return
