"""The README's picture of the code is true: every module stands in it, and imports go down."""

import ast
import re
import textwrap
from functools import partial
from pathlib import Path

from lablib import MLP, TrainingConfig, experiment

ROOT = Path(__file__).parent.parent


def places() -> dict[str, int]:
    """Each module's place in the README's table: from top to bottom, and in a row from left to right."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|[^|]*\|([^|]+)\|", text[text.index("## The code") :], re.MULTILINE)
    names = re.findall(r"`(\w+)(?:\.py|/)`", "".join(rows))
    return {name: place for place, name in enumerate(names)}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "lablib").parts[0].removesuffix(".py")


def imports() -> set[tuple[str, str]]:
    """Pairs of modules of which the first imports the second, at any time; not those for annotations alone."""
    found = set()
    for path in (ROOT / "lablib").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "lablib":
                inside = node.module.split(".")[1:2]
                found |= {(module_of(path), name) for name in inside or [alias.name for alias in node.names]}
    return {(importer, imported) for importer, imported in found if importer not in (imported, "__init__")}


def test_every_module_has_its_place_in_the_readme():
    modules = {module_of(path) for path in (ROOT / "lablib").rglob("*.py")} - {"__init__"}
    assert modules == set(places())


def test_imports_go_down():
    place, pairs = places(), imports()
    assert len(pairs) > 50
    assert [(a, b) for a, b in sorted(pairs) if place[a] >= place[b]] == []


def snippets() -> list[str]:
    """The README's Python, without a notebook's commands for the shell."""
    found = re.findall(
        r"```python\n(.*?)^ *```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    return [re.sub(r"^( *)[!%].*$", r"\1pass", textwrap.dedent(code), flags=re.MULTILINE) for code in found]


def test_what_the_readmes_code_imports_is_there():
    assert len(snippets()) >= 4
    for code in snippets():
        statements = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        statements = [node for node in statements if "google.colab" not in ast.unparse(node)]
        exec(compile(ast.Module(statements, []), "README.md", "exec"), {})


def test_the_readmes_loss_trains(tiny_data, tmp_path):
    code = next(code for code in snippets() if "def losses" in code)
    config = TrainingConfig(num_epochs=1, batch_size=12, device="cpu", validation_split=0.25, output_dir=str(tmp_path))
    shape = {"image_shape": tiny_data.image_shape, "num_classes": tiny_data.num_classes}
    given = {
        "experiment": experiment,
        "config": config,
        "data": tiny_data,
        "networks": {"mine": partial(MLP, (4,), **shape)},
    }
    exec(code, given)
    assert len(given["runs"].runs) == 3
    plain = experiment(given["networks"], config, tiny_data, range(3))
    assert given["runs"].values("mine", "val_loss") != plain.values("mine", "val_loss")
