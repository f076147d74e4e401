"""The notebook, run as people run it: through papermill, with parameters of their own."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = "Lab1_MLPs.ipynb"
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|opt|mnt|Users|content)/\w|[A-Z]:\\\\Users")
TINY = ["-p", "epochs", "1", "-p", "seeds", "1", "-p", "jobs", "1"]


def papermill(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess:
    folders = {"output_dir": "runs", "figures_dir": "images", "results_dir": "results"}
    places = [part for name, folder in folders.items() for part in ("-p", name, str(tmp_path / folder))]
    command = [sys.executable, "-m", "papermill", NOTEBOOK, str(tmp_path / "out.ipynb"), "--kernel", "python3"]
    return subprocess.run([*command, *places, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebook")
    result = papermill(folder, *TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_it_runs_with_small_parameters_and_leaves_its_tables_and_figures(executed):
    figures = {path.name for path in (executed / "images").iterdir()}
    assert figures >= {
        "first_mlp_train.png",
        "first_mlp_val.png",
        "comparison_mlp_residual_train.svg",
        "comparison_mlp_residual_val.svg",
        "gradient_norms.svg",
        "accuracy_by_depth.svg",
        "accuracy_by_depth.png",
        "gradient_norms.png",
        "mlp_residual_differences.png",
    }
    tables = {path.name for path in (executed / "results").iterdir()}
    assert tables >= {
        "mlps_digits.csv",
        "mlps_digits_cosine.csv",
        "mlps_digits_depth.csv",
        "mlps_digits_differences.csv",
    }
    header = (executed / "results" / "mlps_digits.csv").read_text().splitlines()[0]
    assert header == (
        "model,dataset,parameters,seeds,val_accuracy_mean,val_accuracy_std,"
        "test_accuracy_mean,test_accuracy_std,test_accuracy_ci95,epochs_mean,seconds_mean"
    )


def test_its_conclusions_are_computed_and_name_the_data_set(executed):
    notebook = nbformat.read(executed / "out.ipynb", as_version=4)
    said = [
        output["data"]["text/markdown"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert len(said) >= 5
    assert any("Does the shortcut help?" in text and "digits" in text and "n = 1" in text for text in said)


def test_a_second_run_loads_every_run_and_changes_no_table(executed):
    before = {path: path.read_bytes() for path in (executed / "results").iterdir()}
    stores = {path: path.stat().st_mtime_ns for path in (executed / "runs").glob("*/result.json")}
    result = papermill(executed, *TINY)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {path: path.read_bytes() for path in (executed / "results").iterdir()} == before
    assert {path: path.stat().st_mtime_ns for path in (executed / "runs").glob("*/result.json")} == stores


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "epochs", "two"], "epochs = 'two': write a whole number"),
        (["-p", "epochs", "0"], "epochs = 0: write a whole number from 1"),
        (["-p", "dataset", "mnits"], "did you mean 'mnist'?"),
        (["-p", "epoch", "3"], "there is no parameter 'epoch'. Did you mean 'epochs'?"),
    ],
)
def test_a_wrong_parameter_stops_it_before_anything_is_trained(tmp_path, arguments, words):
    result = papermill(tmp_path, *arguments)
    assert result.returncode != 0
    assert words in result.stderr
    assert not (tmp_path / "runs").exists()


def test_the_parameters_cell_is_tagged_and_explained():
    notebook = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = [line.split(":")[0] for line in cell.source.splitlines()]
    assert names[0] == "dataset"
    assert {"data_dir", "epochs", "batch_size", "learning_rate", "lr_schedule", "seeds", "jobs"} <= set(names)
    assert {"output_dir", "figures_dir"} <= set(names)


@pytest.mark.parametrize("path", [NOTEBOOK, *(str(p.relative_to(ROOT)) for p in ROOT.glob("results/*.ipynb"))])
def test_a_committed_notebook_is_free_of_absolute_paths_and_of_errors(path):
    text = (ROOT / path).read_text()
    notebook = json.loads(text)
    assert "widgets" not in notebook["metadata"]
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert all(output["output_type"] != "error" for output in outputs)
    assert not MACHINE_PATH.search(text)


@pytest.mark.parametrize("pattern", ["results/*.csv", "images/*.svg", "*.md", "lablib/*.py", "Makefile"])
def test_no_committed_text_has_a_path_of_one_machine(pattern):
    assert [
        str(path) for path in ROOT.glob(pattern) if MACHINE_PATH.search(path.read_text().replace("/content/lab", ""))
    ] == []
