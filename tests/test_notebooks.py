"""The notebooks, run as people run them: through papermill, with parameters of their own."""

import json
import os
import re
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from lablib.record import main
from papermill import inspect_notebook

ROOT = Path(__file__).parent.parent
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|work|tmp|opt|mnt|Users|content)/\w|[A-Z]:\\\\Users")
MLPS, CNNS, REGIMES, DEPTH = NOTEBOOKS = (
    "Lab1_MLPs.ipynb",
    "Lab1_CNNs.ipynb",
    "Lab1_Regimes.ipynb",
    "Lab1_Depth.ipynb",
)
TINY = ["-p", "epochs", "1", "-p", "seeds", "1", "-p", "jobs", "1"]
TINY_CNNS = [*TINY, "-p", "width", "2", "-p", "teacher_depth", "3", "-p", "grid_images", "100"]
TINY_CNNS += ["-y", "{depths: [2, 3], grid_temperatures: [1, 4], grid_alphas: [0.5]}"]
TINY_REGIMES = [*TINY, "-p", "width", "2", "-p", "wide", "3", "-p", "teacher_depth", "3"]
TINY_DEPTH = [*TINY, "-p", "width", "2", "-y", "depths: [3, 2]"]
ARGUMENTS = {MLPS: TINY, CNNS: TINY_CNNS, REGIMES: TINY_REGIMES, DEPTH: TINY_DEPTH}
FIGURES = {
    MLPS: {
        "first_mlp_train.png",
        "first_mlp_val.png",
        "comparison_mlp_residual_train.svg",
        "comparison_mlp_residual_val.svg",
        "gradient_norms.svg",
        "accuracy_by_depth.svg",
        "accuracy_by_depth.png",
        "gradient_norms.png",
        "mlp_residual_differences.png",
    },
    CNNS: {
        "cnn_comparison_train.svg",
        "cnn_comparison_val.svg",
        "cnn_accuracy_by_depth.png",
        "cnn_differences.png",
        "cnn_accuracy_by_cost.png",
        "teacher_answers.png",
        "distillation_terms.png",
        "knowledge_distl_result.png",
        "distillation_grid.png",
        "reliability.png",
    },
    REGIMES: {"regimes_val_accuracy.png", "regimes_differences.png"},
    DEPTH: {"depth_accuracy.png", "depth_gains.png"},
}
COLUMNS = (
    "model,dataset,parameters,seeds,val_accuracy_mean,val_accuracy_std,"
    "test_accuracy_mean,test_accuracy_std,test_accuracy_ci95,epochs_mean,seconds_mean"
)
TABLES = {
    MLPS: {
        "mlps_digits.csv": COLUMNS,
        "mlps_digits_cosine.csv": COLUMNS,
        "mlps_digits_depth.csv": COLUMNS,
        "mlps_digits_differences.csv": "schedule,depth,mean,std,ci95,n,p_value",
    },
    CNNS: {
        "cnns_digits.csv": f"{COLUMNS},width,depth",
        "cnns_digits_differences.csv": "what,depth,mean,std,ci95,n,p_value",
        "distillation_digits_rules.csv": "rule,seeds,gain_mean,gain_ci95,baseline_epoch,baseline_val_accuracy,"
        "distilled_epoch,distilled_val_accuracy",
        "distillation_digits.csv": f"{COLUMNS},width,depth,role,temperature,alpha,gain_mean,gain_ci95",
    },
    REGIMES: {
        "regimes_digits.csv": f"{COLUMNS},regime,width",
        "regimes_digits_differences.csv": "what,where,mean,std,ci95,n,p_value",
        "regimes_digits_prices.csv": "student,parameters,multiply_adds,epochs_mean,val_accuracy_mean,"
        "test_accuracy_mean,gain_mean,gain_ci95,seeds",
        "cnns_wide_digits.csv": f"{COLUMNS},width",
    },
    DEPTH: {
        "depth_digits.csv": f"{COLUMNS},regime,width,depth,precision",
        "depth_digits_differences.csv": "what,where,trained,mean,std,ci95,n,p_value",
    },
}


def papermill(notebook: str, folder: Path, *arguments: str) -> subprocess.Popen:
    """A running papermill, which keeps everything that it writes in a folder."""
    folders = {"output_dir": "runs", "figures_dir": "images", "results_dir": "results"}
    places = [part for name, below in folders.items() for part in ("-p", name, str(folder / below))]
    command = [sys.executable, "-m", "papermill", notebook, str(folder / "out.ipynb"), "--kernel", "python3"]
    return started([*command, *places, *arguments])


def started(command: list[str]) -> subprocess.Popen:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several run side by side
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=one_thread, **quiet)


def finished(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what it wrote to stderr.

    A kernel that never began is started once more: Jupyter looks for free ports and lets them go before the kernel
    takes them, so that two kernels which start at once may be given the same (papermill's issue 511).
    """
    try:
        _, said = process.communicate(timeout=600)
        if process.returncode and "Kernel died before replying to kernel_info" in said:
            process = started(process.args)
            _, said = process.communicate(timeout=600)
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[str, Path]:
    """All notebooks, side by side: the folder that each has written to."""
    folders = {notebook: tmp_path_factory.mktemp("notebook") for notebook in NOTEBOOKS}
    running = [papermill(notebook, folder, *ARGUMENTS[notebook]) for notebook, folder in folders.items()]
    for status, said in map(finished, running):
        assert status == 0, said[-3000:]
    return folders


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_it_runs_with_small_parameters_and_leaves_its_tables_and_figures(executed, notebook):
    figures = {path.name for path in (executed[notebook] / "images").iterdir()}
    assert figures >= FIGURES[notebook]
    tables = {path.name: path.read_text().splitlines()[0] for path in (executed[notebook] / "results").glob("*.csv")}
    assert tables == TABLES[notebook]


@pytest.mark.parametrize(
    ("notebook", "questions"),
    [
        (MLPS, ["Does the shortcut help?", "Is it the gradient?", "Recommendation for digits"]),
        (CNNS, ["Depth, parameters, or the shortcut?", "Does the teacher help?", "Recommendation for digits"]),
        (REGIMES, ["Does it hold?", "More channels", "Recommendation for digits"]),
        (DEPTH, ["What is depth worth?", "And the shortcut?", "Recommendation for digits"]),
    ],
)
def test_its_conclusions_are_computed_and_name_the_data_set(executed, notebook, questions):
    said = [
        output["data"]["text/markdown"]
        for cell in nbformat.read(executed[notebook] / "out.ipynb", as_version=4).cells
        for output in cell.get("outputs", [])
        if "text/markdown" in output.get("data", {})
    ]
    assert len(said) >= 5
    for question in questions:
        assert any(question in text and "digits" in text for text in said)
    assert any("n = 1" in text for text in said)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_it_warns_of_nothing(executed, notebook):
    cells = nbformat.read(executed[notebook] / "out.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_a_second_run_loads_every_run_and_changes_no_table(executed):
    def tables_and_runs():
        files = [path for folder in executed.values() for path in sorted(folder.glob("results/*.csv"))]
        stores = [path for folder in executed.values() for path in sorted(folder.glob("runs/*/result.json"))]
        assert len(stores) > 10
        return {path: path.read_bytes() for path in files}, {path: path.stat().st_mtime_ns for path in stores}

    before = tables_and_runs()
    running = [papermill(notebook, folder, *ARGUMENTS[notebook]) for notebook, folder in executed.items()]
    for status, said in map(finished, running):
        assert status == 0, said[-3000:]
    assert tables_and_runs() == before


def test_what_it_compares_comes_out_of_a_record_as_well_and_nothing_is_trained(executed, tmp_path):
    record = tmp_path / "runs.csv"
    assert main(["--output-dir", str(executed[REGIMES] / "runs"), "--out", str(record)]) == 0
    from_record = ["-p", "record", str(record), "-p", "train", "False"]
    status, said = finished(papermill(REGIMES, tmp_path, *ARGUMENTS[REGIMES], *from_record))
    assert status == 0, said[-3000:]
    assert not (tmp_path / "runs").exists()
    assert "regimes_val_accuracy.png" not in {path.name for path in (tmp_path / "images").iterdir()}  # no curves
    for name in TABLES[REGIMES]:
        trained, recorded = (pd.read_csv(folder / "results" / name) for folder in (executed[REGIMES], tmp_path))
        pd.testing.assert_frame_equal(recorded, trained, rtol=1e-4, check_dtype=False)


WRONG = {
    "a word for a number": (MLPS, ["-p", "epochs", "two"], "epochs = 'two': write a whole number"),
    "no epochs": (MLPS, ["-p", "epochs", "0"], "epochs = 0: write a whole number from 1"),
    "a misspelt data set": (MLPS, ["-p", "dataset", "mnits"], "did you mean 'mnist'?"),
    "a misspelt parameter": (MLPS, ["-p", "epoch", "3"], "there is no parameter 'epoch'. Did you mean 'epochs'?"),
    "an alpha above 1": (CNNS, ["-p", "alpha", "1.5"], "alpha = 1.5: write a number from 0 to 1"),
    "a teacher that is not trained": (CNNS, ["-p", "teacher_depth", "5"], "teacher_depth = 5: write one of 2, 3, 4"),
    "a padding below 0": (REGIMES, ["-p", "crop_padding", "-1"], "crop_padding = -1: write a whole number from 0"),
    "a family that is not there": (
        REGIMES,
        ["-y", "wide_families: [VGG]"],
        "write a list of one or more, each one of 'Simple",
    ),
    "a wide network too deep": (REGIMES, ["-y", "wide_depths: [6]"], "too small for depth 6"),
    "a record that is not there": (DEPTH, ["-p", "record", "none.csv"], "there is no record none.csv"),
    "nothing to show and no training": (
        DEPTH,
        ["-p", "train", "False", "-p", "record", ""],
        "nor a record has one of these runs: write train = True",
    ),
    "no teacher in the record": (
        REGIMES,
        ["-p", "train", "False"],
        "nor results/runs.csv has one: write train = True",
    ),
    "a word for yes or no": (DEPTH, ["-p", "train", "no"], "write True or False; with papermill: -p train True"),
    "more depth than pixels": (CNNS, ["-p", "image_size", "8"], "too small for depth 4"),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, tuple[int, str, Path]]:
    """Exit status, what it said, and the folder that it might have written to; four at a time."""
    folders = {name: tmp_path_factory.mktemp("wrong") for name in WRONG}
    with ThreadPool(4) as pool:
        answers = pool.map(
            lambda name: finished(papermill(WRONG[name][0], folders[name], *WRONG[name][1])), list(WRONG)
        )
    return {name: (*answer, folders[name]) for name, answer in zip(WRONG, answers, strict=True)}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_stops_it_before_anything_is_trained(refused, name):
    status, said, folder = refused[name]
    assert status != 0
    assert WRONG[name][2] in said
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_parameters_cell_is_tagged_and_explained(notebook):
    cells = nbformat.read(ROOT / notebook, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    names = [line.split(":")[0] for line in cell.source.splitlines()]
    assert list(inspect_notebook(str(ROOT / notebook))) == names  # as papermill reads them
    assert names[0] == "dataset"
    assert {"data_dir", "epochs", "batch_size", "learning_rate", "seeds", "jobs"} <= set(names)
    assert {"output_dir", "figures_dir", "results_dir"} <= set(names)
    assert ("lr_schedule" in names) is (notebook in {MLPS, CNNS})  # the others compare both schedules
    assert ("depths" in names) is (notebook in {CNNS, DEPTH})
    if notebook != MLPS:
        assert {"width", "crop_padding"} <= set(names)
    if notebook in {CNNS, REGIMES}:
        assert {"temperature", "alpha", "teacher_depth", "student_depth"} <= set(names)
    if notebook in {REGIMES, DEPTH}:
        assert {"rotation_degrees", "record", "train"} <= set(names)


@pytest.mark.parametrize("path", [*NOTEBOOKS, *(str(p.relative_to(ROOT)) for p in ROOT.glob("results/*.ipynb"))])
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
