"""Each error and warning of lablib is asserted by its words: by the longest piece of its text without a value in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def is_message(call: ast.Call) -> bool:
    """Whether a call makes an error, in whatever way it is raised then, or a warning."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name.endswith(("Error", "_error")) or name == "warn"


def pieces(node: ast.AST) -> list[str]:
    """The literal texts in an expression, but for those that only format a value."""
    if isinstance(node, ast.Constant):
        lines = node.value.splitlines() if isinstance(node.value, str) else []
        return [line.strip(" .,:;()") for line in lines]
    if isinstance(node, (ast.FormattedValue, ast.Call)):
        return []
    return [piece for child in ast.iter_child_nodes(node) for piece in pieces(child)]


def longest_pieces(source: str) -> list[tuple[int, str]]:
    """Line and longest literal piece of each message in a module; a message without any is another one's."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and is_message(node)]
    found = [(call.lineno, [p for argument in call.args for p in pieces(argument)]) for call in calls]
    return [(line, max(texts, key=len)) for line, texts in found if any(texts)]


def texts_of_tests() -> str:
    """Every string in the tests, as it is and without the backslashes of a regular expression."""
    sources = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_*.py"))]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join([*strings, *(re.sub(r"\\(\W)", r"\1", text) for text in strings)])


def test_the_longest_piece_of_a_message_is_found_wherever_the_message_is_made():
    source = """
error = ValueError(f"x = {x:.1f}, but {', '.join(names)} must be " "above 0" + (f"; see {y}" if y else ""))
warnings.warn("it is late", stacklevel=2)
raise self._error("seed", "a whole number")
raise TypeError
raise OSError(text) from error
"""
    assert longest_pieces(source) == [(2, "must be above 0"), (3, "it is late"), (4, "a whole number")]


MODULES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("lablib/**/*.py"))]


@pytest.mark.parametrize("module", MODULES)
def test_every_message_is_asserted_by_its_words(module):
    asserted = texts_of_tests()
    source = (ROOT / module).read_text(encoding="utf-8")
    missing = [f"{module}:{line}: {piece}" for line, piece in longest_pieces(source) if piece not in asserted]
    assert not missing, "no test asserts the words of\n" + "\n".join(missing)
