from pathlib import Path

import pandas as pd
import pytest

from lablib.findings import findings, mostly

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def tables() -> dict[str, pd.DataFrame]:
    return {path.stem: pd.read_csv(path) for path in RESULTS.glob("*.csv")}


def answers(text: str, question: str) -> list[str]:
    """The lines below a question."""
    return text[text.index(f"**{question}") :].split("\n\n")[1].strip().splitlines()


def changed(table: pd.DataFrame, where: dict, **values) -> pd.DataFrame:
    """A table with other values in the one row that `where` describes."""
    table = table.copy()
    (row,) = table.index[(table[list(where)] == pd.Series(where)).all(axis=1)]
    for name, value in values.items():
        table.loc[row, name] = value
    return table


def test_a_difference_is_claimed_only_where_its_interval_excludes_zero(tables):
    name, where = "regimes_cifar10-jpeg_differences", {"what": "the teacher", "where": "cosine"}
    clear = {"mean": 0.02, "std": 0.001, "ci95": 0.005, "n": 3, "p_value": 0.004}
    shown = answers(findings(tables | {name: changed(tables[name], where, **clear)}), "Can a small network")
    assert (
        "- Cosine rate: **the taught student is ahead of the one alone**: +2.00 ± 0.50 points (n = 3, p = 0.004)."
        in shown
    )
    unclear = clear | {"ci95": 0.03, "p_value": 0.2}
    shown = answers(findings(tables | {name: changed(tables[name], where, **unclear)}), "Can a small network")
    (line,) = [line for line in shown if line.startswith("- Cosine rate")]
    assert "no difference is shown: +2.00 ± 3.00 points (n = 3, p = 0.200), an interval that holds 0" in line
    worse = clear | {"mean": -0.02}
    shown = answers(findings(tables | {name: changed(tables[name], where, **worse)}), "Can a small network")
    assert any("**the one alone is ahead of the taught student**: -2.00 ± 0.50" in line for line in shown)


def test_one_seed_is_called_one_seed(tables):
    name, where = "depth_cifar10-jpeg_differences", {"what": "the shortcut", "where": "depth 4", "trained": "constant"}
    one = changed(tables[name], where, mean=0.01, std=float("nan"), ci95=float("nan"), n=1, p_value=float("nan"))
    shown = answers(findings(tables | {name: one}), "Do they help a convolutional")
    said = "ResidualCNN-4 against NoShortcut-4: +1.00 points (n = 1: one seed shows no spread)"
    assert any(line.startswith(f"- Constant rate: {said}") for line in shown)


def test_what_falls_short_of_the_reference_is_named_and_counted(tables):
    name = "distillation_cifar10-jpeg"
    low = changed(tables[name], {"role": "teacher"}, test_accuracy_mean=0.5, test_accuracy_ci95=0.01, seeds=3)
    high = changed(tables[name], {"role": "teacher"}, test_accuracy_mean=0.9)
    question = "And beside the figures"
    shown, others = (answers(findings(tables | {name: table}), question)[0] for table in (low, high))
    assert "teacher (cifar10-jpeg), 50.00 ± 1.00 % (n = 3) beside 81.64 %" in shown
    assert "teacher" not in others
    reached = [int(text.removeprefix("- ").split()[0]) for text in (shown, others)]
    assert reached[1] == reached[0] + 1
    assert "of the 14" in shown


def test_a_figure_without_a_run_is_named_as_not_trained(tables):
    name = "cnns_wide_cifar10-jpeg"
    without = tables[name][tables[name]["model"] != "SimpleCNN-2"]
    shown = answers(findings(tables | {name: without}), "And beside the figures")
    assert shown[-1].startswith("- Not trained here at their width: SimpleCNN-2 (cifar10-jpeg)")
    assert not any("SimpleCNN-2" in line for line in shown[:-1])


def test_a_comparison_that_is_not_there_is_named(tables):
    name = "regimes_cifar10-jpeg_differences"
    without = tables[name][tables[name]["what"] != "the teacher"]
    with pytest.raises(
        ValueError, match=r"0 comparisons, and not one, with \{'what': 'the teacher', 'where': 'constant'\}"
    ):
        findings(tables | {name: without})


def test_what_is_usual_comes_first_and_what_is_not_with_its_names():
    assert mostly({"A": 2, "B": 2}) == "2"
    assert mostly({"A": 1, "B": 2, "C": 2, "D": 1, "E": 2}) == "2, but 1 for A, D"
    assert (
        mostly({"A": "bf16", "B": "fp32", "C": "bf16", "D": "bf16/fp32"}) == "bf16, but fp32 for B and bf16/fp32 for D"
    )
