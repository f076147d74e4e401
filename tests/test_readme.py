import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from lablib.readme import by_depth_with_seeds, depth_by_way, distillation_table, filled, main, speed, tables

ROOT = Path(__file__).parent.parent


def test_the_readmes_tables_are_those_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text, ROOT / "results") == text


def test_the_readme_says_the_same_numbers_as_the_executed_notebooks():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    number = re.compile(r"(?<![\d.])[+-]?\d+\.\d\d(?: ± \d+\.\d\d)?(?!\d)")
    for title, notebook in (
        ("MLP", "Lab1_MLPs"),
        ("CNN", "Lab1_CNNs"),
        ("regimes", "Lab1_Regimes"),
        ("depth", "Lab1_Depth"),
    ):
        found = text[text.index(f"## What the {title} notebook found") :].split("\n## ")[0]
        found = re.sub(r"<!-- table: \w+_depth -->.*?<!-- end -->", "", found, flags=re.S)  # there it is a figure alone
        found = re.sub(r"^The reference gains .*$", "", found, flags=re.M)  # differences within the table above it
        numbers = set(number.findall(found))
        assert len(numbers) > 10
        outputs = [
            output["data"].get("text/markdown", output["data"].get("text/plain", ""))
            for cell in nbformat.read(ROOT / f"results/{notebook}.ipynb", as_version=4).cells
            for output in cell.get("outputs", [])
            if "data" in output
        ]
        assert numbers - set(number.findall("\n".join(outputs))) == set()


def test_every_link_and_image_of_the_readme_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(targets) >= 5
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert missing == []


def test_a_readme_that_differs_is_written_anew_and_found_by_the_check(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first_accuracy = re.search(r"\d\d\.\d\d ± ", text).group()
    (tmp_path / "README.md").write_text(text.replace(first_accuracy, "12.34 ± ", 1), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["--check"]) == 1
    assert "run `make readme`" in capsys.readouterr().out
    assert main([]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == text
    assert main(["--check"]) == 0


def test_a_missing_table_is_named_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks mlps_mnist\.csv.*; `make full` writes them"):
        tables(tmp_path)


def test_a_missing_benchmark_is_named_with_the_command_that_writes_it(tmp_path):
    for table in (ROOT / "results").glob("*.csv"):
        shutil.copy(table, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"lacks benchmark-cpu-2-cores\.json; `make bench` writes it on a machine of 2 cores"
    ):
        tables(tmp_path)


def test_speeds_are_those_of_the_fastest_variant_with_machine_and_date():
    def entry(rival, variant, *speeds):
        return {"rival": rival, "variant": variant, "train": list(speeds)}

    entries = [entry("student", "0 workers", 900, 1000, 5000), entry("student", "2 workers", 10, 20, 30)]
    entries += [entry("lablib", "one run, 2 threads", 4000.4), entry("lablib", "2 runs side by side", 6000)]
    machine = {"gpu": None, "processor": "A", "units": ["AMX"], "cores": 2, "versions": {"torch": "2.0"}}
    measured = {"machine": machine, "date": "2026-01-01", "rounds": 3, "cases": [{"name": "MLP-2", "entries": entries}]}
    table, line = speed(measured).strip().split("\n\n")
    assert table.splitlines()[-1] == "| MLP-2 | 1,000 | – | – | – | – | 4,000 | 6,000 |"
    assert line == "Measured on 2026-01-01 on A with AMX, 2 cores, PyTorch 2.0: the median of 3 epochs, in turns."


def test_a_readme_without_a_place_for_a_table_is_refused():
    with pytest.raises(ValueError, match=r"needs '<!-- table: findings -->' and '<!-- end -->' once; it has them 0×"):
        filled("nothing here", ROOT / "results")


def test_below_the_accuracies_by_depth_stand_the_seeds_and_the_precision():
    rows = [("S-2", "constant", 2, "bf16"), ("S-4", "constant", 2, "bf16"), ("S-2", "cosine", 1, "fp32")]
    table = pd.DataFrame(rows, columns=["model", "regime", "seeds", "precision"])
    accuracies, line = depth_by_way(table.assign(test_accuracy_mean=0.5, test_accuracy_ci95=0.01)).split("\n\n")
    assert accuracies.splitlines()[-1] == "| S, cosine | 50.00 ± 1.00 | – |"
    assert line == "n = 2, but 1 for S-2 (cosine); trained in bf16, but fp32 for S-2 (cosine).\n"


def test_a_distillation_is_told_beside_the_reference_with_its_gain():
    columns = ["model", "role", "test_accuracy_mean", "parameters", "seeds", "val_accuracy_mean", "epochs_mean"]
    rows = [("R-4", "teacher", 0.8164), ("R-2", "baseline", 0.8033), ("D-2", "distilled", 0.8095)]
    table = pd.DataFrame([(*row, 5, 3, 0.8, 9.0) for row in rows], columns=columns)
    table = table.assign(test_accuracy_ci95=0.01, seconds_mean=60.0, gain_mean=0.0062, gain_ci95=float("nan"))
    shown, line = distillation_table(table).split("\n\n")
    assert "seconds" not in shown
    assert line == (
        "The reference gains +2.62 points, ours +0.62: beside the reference our baseline lies +2.00, our distilled "
        "student +0.00, our teacher +0.00.\n"
    )


def test_below_the_accuracies_of_all_depths_stand_the_seeds():
    table = pd.DataFrame({"model": ["A-2", "A-4"], "seeds": [3, 3], "test_accuracy_mean": [0.5, 0.6]})
    shown, line = by_depth_with_seeds(table.assign(test_accuracy_ci95=0.01)).split("\n\n")
    assert shown.splitlines()[-1] == "| A | 50.00 ± 1.00 | 60.00 ± 1.00 |"
    assert line == "n = 3.\n"
