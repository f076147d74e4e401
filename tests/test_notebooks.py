"""The notebooks, run with other parameters, injected as papermill does."""

import json
import os
import re
import subprocess
import sys
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from papermill import inspect_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from tools.published import CIFAR_RECIPES, MNIST_RECIPES, Lab, main

ROOT = Path(__file__).parent.parent
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|opt|mnt|Users|content)/\w|[A-Z]:\\\\Users")
MLPS, CNNS = NOTEBOOKS = ("Lab1_MLPs.ipynb", "Lab1_CNNs.ipynb")

SHORT = {"epochs": 1, "batch_size": 128, "seeds": 1, "jobs": 1, "precision": "fp32"}
SHORT_CNNS = {"width": 2, "cosine_epochs": 1, "cosine_learning_rate": 0.01, "grid_images": 100, "grid_seeds": 1}
GRID = {"grid_temperatures": [2, 4, 8], "grid_alphas": [0.5, 0.7, 0.9]}
FIGURES = {  # of the specification
    MLPS: {"first_mlp_train.png", "first_mlp_val.png"} | {f"comparison_mlp_residual_{p}.svg" for p in ("train", "val")},
    CNNS: {"cnn_comparison_train.svg", "cnn_comparison_val.svg", "knowledge_distl_result.png"},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """All published runs but the wide ones in small, on digits, as tools/published.py trains them."""
    folder = tmp_path_factory.mktemp("published")
    short = {"num_epochs": 1, "batch_size": 128, "precision": "fp32"}
    recipes = {
        "mnist_recipes": {name: replace(recipe, **short) for name, recipe in MNIST_RECIPES.items()},
        "cifar_recipes": {n: replace(recipe, **short, horizontal_flip=False) for n, recipe in CIFAR_RECIPES.items()},
    }
    sizes = {"seeds": 1, "width": 2, "grid_images": 100}
    lab = Lab("Digits", "digits", str(folder / "runs"), folder / "published", **sizes, **recipes)
    assert main(["--only", *"ABCEFG"], lab) == 0
    return folder / "runs"


def trained(store: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in store.glob("*/result.json")}


def execute(notebook: str, **parameters):
    """Run a notebook's code in this process, with the parameters that papermill would put there."""
    injected = parameterize_notebook(load_notebook_node(str(ROOT / notebook)), parameters)
    _, *cells = (cell.source for cell in injected.cells if cell.cell_type == "code")  # the first is for Colab
    namespace = {"In": cells}
    with plt.rc_context(), chdir(ROOT):
        for cell in cells:
            exec(cell, namespace)
            plt.close("all")


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_it_asks_for_the_published_runs_leaves_tables_and_figures_and_never_warns(notebook, store, tmp_path, capsys):
    before = trained(store)
    assert len(before) > 60
    parameters = SHORT if notebook == MLPS else SHORT | SHORT_CNNS | GRID
    places = {name: str(tmp_path / name) for name in ("figures_dir", "results_dir")}
    execute(notebook, **parameters, **places, output_dir=str(store))
    assert trained(store) == before
    assert {path.name for path in (tmp_path / "figures_dir").iterdir()} >= FIGURES[notebook]
    assert len(list((tmp_path / "results_dir").glob("*.csv"))) >= 3
    assert capsys.readouterr().err == ""


def test_a_student_may_be_its_own_teacher_at_a_single_depth(store, tmp_path):
    places = {name: str(tmp_path / name) for name in ("figures_dir", "results_dir")} | {"output_dir": str(store)}
    single = {"depths": [2], "teacher_depth": 2, "alpha": 1.0, "grid_temperatures": [2.0], "grid_alphas": [0.5]}
    execute(CNNS, **SHORT, **SHORT_CNNS, **single, **places)
    assert len(list((tmp_path / "results_dir").glob("*.csv"))) >= 3


WRONG = {
    "an alpha above 1": (CNNS, {"alpha": 1.5}, "alpha = 1.5: alpha should be less than or equal to 1"),
    "a temperature above 1000": (CNNS, {"temperature": 2e3}, "temperature = 2000.0: temperature should be less"),
    "too few images for a class": (CNNS, {"grid_images": 5}, "grid_images = 5 leaves a class without an image"),
    "an unknown data set": (MLPS, {"dataset": "emnits"}, "dataset = 'emnits' is neither a known name"),
    "a teacher that is not trained": (CNNS, {"teacher_depth": 5}, "teacher_depth = 5"),
    "more depth than pixels": (CNNS, {"image_size": 8}, "too small for depth 4"),
}


@pytest.mark.parametrize(("notebook", "parameters", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_parameter_stops_it_before_anything_is_trained(notebook, parameters, words, tmp_path):
    with pytest.raises(ValueError, match=re.escape(words)):
        execute(notebook, **parameters, output_dir=str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_papermill_reads_every_parameter_and_none_is_a_secret(notebook):
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = [line.split(":")[0] for line in cell.source.splitlines()]
    assert list(inspect_notebook(str(ROOT / notebook))) == names
    assert not [name for name in names if re.search("token|key|secret|chat", name)]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_on_colab_the_first_cell_fetches_and_installs_the_lab_once_and_keeps_pytorch(notebook, tmp_path):
    commands = {"git": "mkdir -p lab/.git lab/lablib", "pip": '[ "$1" != list ] || printf "torch==1+cu\\nnumpy==2\\n"'}
    (tmp_path / "bin").mkdir()
    for name, does in commands.items():
        command = tmp_path / "bin" / name
        command.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/log\n{does}\n')
        command.chmod(0o755)
    cell = next(cell.source for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code")
    code = f"""
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell({cell!r}).raise_error()  # elsewhere
sys.modules["google.colab"] = sys
shell.run_cell({cell!r}).raise_error()
shell.run_cell({cell!r}).raise_error()  # again, in the lab's folder
"""
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    cloned, listed, installed = (tmp_path / "log").read_text().splitlines()
    assert cloned.startswith("git clone --depth 1 https://github.com/")
    assert listed.startswith("pip list")
    assert installed == "pip install --quiet --constraint .git/installed.txt --editable ."
    assert (tmp_path / "lab" / ".git" / "installed.txt").read_text() == "torch==1+cu\n"


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*.ipynb")), ids=lambda path: path.name)
def test_an_executed_notebook_has_the_code_of_its_source_and_no_error_or_widget(path):
    source = ROOT / f"{path.stem.partition('_width')[0]}.ipynb"
    code = []
    for notebook in (source, path):
        content = json.loads(notebook.read_text())
        cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
        assert "widgets" not in content["metadata"]
        code.append(["".join(c["source"]) for c in cells if "injected-parameters" not in c["metadata"].get("tags", [])])
    assert code[0] == code[1]


@pytest.mark.parametrize("pattern", ["*.ipynb", "results/*.*", "images/*.svg", "*.md", "lablib/*.py", "Makefile"])
def test_no_committed_text_has_a_path_of_one_machine(pattern):
    assert [
        str(path) for path in ROOT.glob(pattern) if MACHINE_PATH.search(path.read_text().replace("/content/lab", ""))
    ] == []
