"""README and docs: their code runs, their links lead somewhere, and what they say of the code and results is true."""

import ast
import json
import re
import runpy
import textwrap
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from PIL import Image

import lablib
from lablib import MLP, TrainingConfig, experiment
from lablib.statistics import save_table

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lablib"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REPORT = runpy.run_path(str(ROOT / "tools" / "report.py"))
BLOCK = re.compile(r"^ *```python *(.*?)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


def blocks():
    for page in PAGES:
        text = page.read_text("utf-8")
        for block in BLOCK.finditer(text):
            line = text[: block.start()].count("\n") + 1
            yield pytest.param(*block.groups(), id=f"{page.name}:{line}")


@pytest.mark.filterwarnings("ignore:Couldn't detect a suitable IP address")  # dask, without a network
@pytest.mark.filterwarnings("ignore:Port 8787 is already in use")  # by another cluster
@pytest.mark.parametrize(("options", "code"), [*blocks()])
def test_a_block_of_python_runs_by_itself(options, code, tmp_path, monkeypatch, capsys):
    if options == "no-run":
        pytest.skip("needs Colab or a bot")
    rng = np.random.default_rng(0)
    for place in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (folder := tmp_path / "photos-split" / place).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "block.py").write_text(textwrap.dedent(code), "utf-8")
    runpy.run_path("block.py", run_name="__main__")
    assert (tmp_path / "runs").exists() or capsys.readouterr().out


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "results").glob("*.md")], ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short_and_linked_from_the_readme(page):
    assert len(page.read_text("utf-8").split()) <= (1800 if page.name == "README.md" else 900)
    assert page.name == "README.md" or f"](docs/{page.name})" in (ROOT / "README.md").read_text("utf-8")


MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}


def imported(module: str) -> set[str]:
    """The other modules of lablib that a module imports, at any time."""
    names = []
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["lablib"] * node.level + [node.module or ""]
            names += [".".join([*filter(None, base), alias.name]) for alias in node.names]
    parts = [name.split(".")[1] for name in names if name.startswith("lablib.")]
    return {lablib._MODULES.get(part, part) for part in parts} & MODULES - {module}


def test_the_readme_lists_every_module_once_and_each_imports_only_from_those_above():
    """So no imports go in a circle either."""
    text = (ROOT / "README.md").read_text("utf-8")
    rows = re.findall(r"^(\w+)\.py  ", text[text.index("## The code") :], re.MULTILINE)
    assert sorted(rows) == sorted(MODULES)
    pairs = [(name, other) for name in rows for other in imported(name)]
    assert len(pairs) > 25
    assert [(name, other) for name, other in pairs if rows.index(name) <= rows.index(other)] == []


def test_the_speed_in_the_readme_is_that_of_the_benchmark():
    times = {"student": [], "tight": []}
    for case in json.loads((ROOT / "results" / "benchmark-cpu-2-cores.json").read_text())["cases"]:
        rates = [(e["rival"], median(e["train"])) for e in case["entries"] if "2 runs" not in e["variant"]]
        best = {name: max(rate for rival, rate in rates if rival == name) for name in ("lablib", *times)}
        times = {name: [*ratios, best["lablib"] / best[name]] for name, ratios in times.items()}
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert all(f"{min(ratios):.1f} to {max(ratios):.1f} times as fast" in readme for ratios in times.values())


def test_the_tables_and_numbers_are_those_of_the_results_and_no_number_begins_a_line():
    assert REPORT["main"](["--check"]) == 0
    # Markdown would take such a line for HTML, and end the paragraph there
    assert not re.search(r"^ *<!--.*<!--", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)


def test_every_published_table_and_figure_has_a_caption():
    captions = (ROOT / "tools" / "captions.toml").read_text("utf-8")
    figures = {path.with_suffix("").name for path in (ROOT / "images").iterdir()}
    tables = {path.stem for path in (ROOT / "results").glob("*.csv") if "dataset" in path.read_text().split("\n")[0]}
    assert [name for name in sorted(figures | tables) if name not in captions] == []


def test_a_report_fills_in_what_is_published(tiny_data, tmp_path):
    shape = {"image_shape": tiny_data.image_shape, "num_classes": tiny_data.num_classes}
    config = TrainingConfig(num_epochs=1, batch_size=12, device="cpu", validation_split=0.25, output_dir=str(tmp_path))
    networks = {"MLP-2": partial(MLP, (4,), **shape), "MLP-4": partial(MLP, (4, 4), **shape)}
    runs, root = experiment(networks, config, tiny_data, seeds=3), tmp_path / "lab"
    runs.table({"MLP-2": 0.5}, save_to=root / "results" / "mlps_mnist.csv")
    save_table(runs.compare("MLP-4", "MLP-2").table, root / "results" / "mlps_mnist_differences.csv")
    (root / "images").mkdir()
    (root / "images" / "accuracy_by_depth.png").touch()
    (root / "README.md").write_text(
        "A <!--mlps_mnist: MLP-2-->0 %<!--end--> and <!--mlps_mnist_differences: MLP-4 − MLP-2--><!--end-->.\n"
        "<!--table mlps_mnist: test accuracy, n-->\nold\n<!--end-->\n"
        "<!--figure accuracy_by_depth.png: Accuracy-->\n<!--end-->\n"
    )
    assert [REPORT["main"](arguments, root) for arguments in (["--check"], [], ["--check"])] == [1, 0, 0]
    text, page = (path.read_text("utf-8") for path in (root / "README.md", root / "results" / "README.md"))
    interval = runs.table().loc["MLP-2", "test accuracy"]
    assert f"-->{100 * np.mean([*runs.values('MLP-2').values()]):.2f}" in text
    assert f"| MLP-2 | {interval} | 3 |" in text
    change = np.mean([runs.values("MLP-4")[seed] - runs.values("MLP-2")[seed] for seed in range(3)])
    change = f"{100 * change:+.2f}".replace("-", "−")
    assert f"-->{change}" in text
    assert '<img src="images/accuracy_by_depth.png" alt="Accuracy"' in text
    assert f"{interval} | 50.00 % | 3 |" in page
    assert f"| MLP-4 − MLP-2 | {change}" in page
    assert "](../images/accuracy_by_depth.png)" in page
    (root / "README.md").write_text("<!--mlps_mnist: MLP-3--><!--end-->")
    with pytest.raises(KeyError, match="MLP-3"):
        REPORT["main"]([], root)
