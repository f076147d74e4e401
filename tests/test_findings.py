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
        "- Cosine way: **the distilled student is ahead of the baseline**: +2.00 ± 0.50 points (n = 3, p = 0.004)."
        in shown
    )
    unclear = clear | {"ci95": 0.03, "p_value": 0.2}
    shown = answers(findings(tables | {name: changed(tables[name], where, **unclear)}), "Can a small network")
    (line,) = [line for line in shown if line.startswith("- Cosine way")]
    assert "no difference is shown: +2.00 ± 3.00 points (n = 3, p = 0.200), an interval that holds 0" in line
    worse = clear | {"mean": -0.02}
    shown = answers(findings(tables | {name: changed(tables[name], where, **worse)}), "Can a small network")
    assert any("**the baseline is ahead of the distilled student**: -2.00 ± 0.50" in line for line in shown)


def test_with_fewer_than_three_seeds_nothing_is_printed_in_bold(tables):
    name, where = "regimes_cifar10-jpeg_differences", {"what": "the teacher", "where": "cosine"}
    two = changed(tables[name], where, mean=0.02, std=0.001, ci95=0.005, n=2, p_value=0.004)
    shown = answers(findings(tables | {name: two}), "Can a small network")
    assert (
        "- Cosine way: the distilled student is ahead of the baseline: +2.00 ± 0.50 points (n = 2, p = 0.004)." in shown
    )


def test_another_temperature_has_its_own_answer(tables):
    name, what = "regimes_cifar10-jpeg_differences", "the teacher, T = 3 and α = 0.2"
    others = tables[name][~tables[name]["what"].str.startswith("the teacher, ")]
    row = {"what": what, "where": "cosine", "mean": 0.02, "std": 0.001, "ci95": 0.005, "n": 3, "p_value": 0.004}
    shown = answers(findings(tables | {name: pd.concat([others, pd.DataFrame([row])])}), "Can a small network")
    assert shown[2] == (
        "- T = 3 and α = 0.2, cosine way: **the distilled student is ahead of the baseline**: "
        "+2.00 ± 0.50 points (n = 3, p = 0.004)."
    )
    assert len(answers(findings(tables | {name: others}), "Can a small network")) == len(shown) - 1


def test_another_learning_rate_has_its_own_answer(tables):
    name = "regimes_cifar10-jpeg_differences"
    others = tables[name][~tables[name]["what"].str.startswith("rate ")]
    row = {"what": "rate 0.01, not 0.001", "where": "cosine", "mean": -0.02, "ci95": 0.005, "n": 3, "p_value": 0.004}
    shown = answers(findings(tables | {name: pd.concat([others, pd.DataFrame([row])])}), "What helps the small")
    assert shown[1] == (
        "- The student in the cosine way, its learning rate to begin with: **0.001 is ahead of rate 0.01**: "
        "-2.00 ± 0.50 points (n = 3, p = 0.004)."
    )
    assert len(answers(findings(tables | {name: others}), "What helps the small")) == len(shown) - 1


def test_whether_a_level_gradient_is_enough_follows_from_the_deepest_networks(tables):
    name = "mlps_mnist_depth"
    nan = float("nan")
    near = changed(tables[name], {"model": "HeMLP-64"}, test_accuracy_mean=0.98, test_accuracy_ci95=0.01)
    once = changed(tables[name], {"model": "HeMLP-64"}, test_accuracy_ci95=nan, test_accuracy_std=nan, seeds=1)
    same = changed(tables[name], {"model": "HeMLP-64"}, test_accuracy_ci95=nan, test_accuracy_std=0.0)
    for table, not_enough in ((tables[name], True), (same, True), (near, False), (once, False)):
        line = answers(findings(tables | {name: table}), "Do shortcuts help a multi")[-1]
        gradient = "gradient that starts level, as He's initialisation makes it, is"
        assert line.endswith(
            f"A {gradient} not enough there." if not_enough else f"Whether a {gradient} enough there is not shown."
        )


def test_a_comparison_of_two_precisions_says_so(tables):
    name, partly = "depth_cifar10-jpeg", " (trained partly in bf16 and partly in fp32)"
    same, mixed = (tables[name].assign(precision="bf16") for _ in range(2))
    mixed.loc[mixed["model"] == "ResidualCNN-4", "precision"] = "fp32"
    for question, line in (("Is depth worth more", "ResidualCNN, 4 stages less 2"), ("Do they help", "Cosine way")):
        first, second = (answers(findings(tables | {name: table}), question)[-1] for table in (same, mixed))
        assert first.startswith(f"- {line}: ")
        assert second == first.replace(line, line + partly, 1)


def test_what_to_take_is_chosen_on_validation(tables):
    name = "depth_cifar10-jpeg"
    best = changed(tables[name], {"model": "SimpleCNN-3", "regime": "cosine"}, val_accuracy_mean=0.99)
    shown = answers(findings(tables | {name: best}), "What helps")[-1]
    assert shown.startswith("- To take, at width 16: SimpleCNN-3, cosine way, 98,970 parameters, ")


def test_one_seed_is_called_one_seed(tables):
    name, where = "depth_cifar10-jpeg_differences", {"what": "the shortcut", "where": "depth 4", "trained": "constant"}
    one = changed(tables[name], where, mean=0.01, std=float("nan"), ci95=float("nan"), n=1, p_value=float("nan"))
    shown = answers(findings(tables | {name: one}), "Do they help a convolutional")
    said = "ResidualCNN-4 against NoShortcut-4: +1.00 points (n = 1: one seed shows no spread)"
    assert any(line.startswith(f"- Constant way: {said}") for line in shown)


def test_what_falls_short_of_the_reference_is_named_and_counted(tables):
    name = "distillation_cifar10-jpeg"
    low = changed(tables[name], {"role": "teacher"}, test_accuracy_mean=0.5, test_accuracy_ci95=0.01, seeds=3)
    high = changed(tables[name], {"role": "teacher"}, test_accuracy_mean=0.9)
    question = "And beside the figures"
    within = changed(tables[name], {"role": "teacher"}, test_accuracy_mean=0.81, test_accuracy_ci95=0.01, seeds=3)
    shown, others, held = (answers(findings(tables | {name: t}), question) for t in (low, high, within))
    said = "teacher (cifar10-jpeg), {} ± 1.00 % (n = 3) beside 81.64 %"
    assert said.format("50.00") in next(line for line in shown if line.startswith("- Below:"))
    assert said.format("81.00") in next(line for line in held if line.startswith("- Below, with an interval that"))
    assert not any("teacher" in line for line in others)
    assert len({lines[0] for lines in (shown, held)}) == 1
    reached = [int(lines[0].removesuffix(" of them.").split()[-1]) for lines in (shown, others)]
    assert reached[1] == reached[0] + 1
    assert shown[0].startswith("- 11 of the 14 single runs have a counterpart here; our mean reaches ")


def test_a_figure_without_a_run_is_named_as_not_trained(tables):
    name = "cnns_wide_cifar10-jpeg"
    without = tables[name][tables[name]["model"] != "SimpleCNN-2"]
    shown = answers(findings(tables | {name: without}), "And beside the figures")
    assert shown[-1].startswith("- Not trained: SimpleCNN-2 at width 64, ")
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
