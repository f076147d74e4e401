"""Means, intervals and paired differences against scipy; tables of experiments made by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lablib import Experiment, TrainingConfig
from lablib.runs import Run
from lablib.statistics import (
    PairedDifference,
    Summary,
    differences,
    differences_table,
    paired_difference,
    readable_table,
    recommend,
    results_table,
    save_table,
    summarise,
    summarise_differences,
)

VALUES = [0.981, 0.984, 0.979, 0.988, 0.983]
OTHERS = [0.976, 0.985, 0.971, 0.979, 0.981]


def by_seed(values, start=0):
    return dict(enumerate(values, start))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_summary_is_scipys_t_interval(n):
    summary = summarise(VALUES[:n])
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(VALUES[:n]), scale=stats.sem(VALUES[:n]))
    assert summary.n == n
    assert summary.mean == pytest.approx(np.mean(VALUES[:n]))
    assert summary.std == pytest.approx(np.std(VALUES[:n], ddof=1))
    assert summary.mean - summary.ci95 == pytest.approx(low)
    assert summary.mean + summary.ci95 == pytest.approx(high)


def test_the_text_of_a_summary_is_its_mean_and_interval_in_percent():
    assert Summary(0.98349, 0.0011, 0.00123, 5).percent() == "98.35 ± 0.12 % (n = 5)"


def test_one_seed_shows_no_spread_neither_0_nor_nan():
    summary = summarise([0.98])
    assert summary == Summary(0.98, None, None, 1)
    assert summary.percent() == "98.00 % (n = 1: one seed shows no spread)"


@pytest.mark.parametrize("values", [[], [0.9, math.nan], [0.9, math.inf], [[0.9, 0.8]]])
def test_no_values_or_values_that_are_not_finite_are_refused(values):
    with pytest.raises(ValueError, match="a summary needs one or more finite values; it got") as caught:
        summarise(values)
    assert str(values) in str(caught.value)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_paired_difference_is_scipys_paired_t_test(n):
    difference = paired_difference(by_seed(VALUES[:n]), by_seed(OTHERS[:n]))
    oracle = stats.ttest_rel(VALUES[:n], OTHERS[:n])
    interval = oracle.confidence_interval(0.95)
    assert difference.n == n
    assert difference.p_value == pytest.approx(oracle.pvalue)
    assert difference.mean - difference.ci95 == pytest.approx(interval.low)
    assert difference.mean + difference.ci95 == pytest.approx(interval.high)
    assert difference.excludes_zero == (oracle.pvalue < 0.05)


def test_the_order_of_the_two_turns_the_sign_and_nothing_else():
    there, back = (paired_difference(by_seed(a), by_seed(b)) for a, b in ((VALUES, OTHERS), (OTHERS, VALUES)))
    assert there.mean == pytest.approx(-back.mean)
    assert (there.ci95, there.p_value) == pytest.approx((back.ci95, back.p_value))


def test_only_seeds_that_both_have_are_compared_each_with_its_own():
    first = {3: 0.9, 1: 0.8, 2: 0.7, 9: 0.1}
    second = {1: 0.75, 2: 0.69, 3: 0.88, 8: 1.0}
    difference = paired_difference(first, second)
    oracle = stats.ttest_rel([0.8, 0.7, 0.9], [0.75, 0.69, 0.88])
    assert difference.n == 3
    assert difference.p_value == pytest.approx(oracle.pvalue)
    assert difference.mean == pytest.approx(0.08 / 3)


def test_no_seed_in_common_is_refused_with_the_seeds_of_both():
    with pytest.raises(ValueError, match=r"no seed in common: \[0, 1\] and \[2, 3\]; train both with the same seeds"):
        paired_difference(by_seed([0.9, 0.8]), by_seed([0.9, 0.8], start=2))


def test_a_difference_of_differences_is_that_of_the_seeds_that_all_have():
    first, second = {0: 0.9, 1: 0.8, 2: 0.5}, {0: 0.7, 1: 0.65, 3: 0.1}
    assert differences(first, second) == pytest.approx({0: 0.2, 1: 0.15})
    assert differences(first, {7: 0.5}) == {}
    of_both = differences(differences(first, second), {0: 0.05, 1: 0.1})
    oracle = stats.ttest_1samp([0.15, 0.05], 0)
    assert summarise_differences(of_both).p_value == pytest.approx(oracle.pvalue)
    assert summarise_differences(of_both).mean == pytest.approx(0.1)
    with pytest.raises(ValueError, match="one or more finite values"):
        summarise_differences({})


def test_the_difference_of_one_seed_has_no_spread_and_no_p_value_and_excludes_nothing():
    difference = paired_difference({0: 0.9}, {0: 0.8})
    assert (difference.std, difference.ci95, difference.p_value, difference.n) == (None, None, None, 1)
    assert difference.mean == pytest.approx(0.1)
    assert difference.points() == "+10.00 points (n = 1: one seed shows no spread)"
    assert difference.excludes_zero is False


@pytest.mark.parametrize(
    ("mean", "ci95", "p_value", "text"),
    [
        (0.0025, 0.001, 0.0031, "+0.25 ± 0.10 points (n = 5, p = 0.003)"),
        (-0.0025, 0.001, 0.00099, "-0.25 ± 0.10 points (n = 5, p < 0.001)"),
        (0.0025, 0.01, 0.52, "+0.25 ± 1.00 points (n = 5, p = 0.520)"),
    ],
)
def test_the_text_of_a_difference_has_its_sign_its_interval_and_its_p_value(mean, ci95, p_value, text):
    assert PairedDifference(mean, 0.01, ci95, 5, p_value).points() == text


@pytest.mark.parametrize(
    ("mean", "ci95", "excludes"), [(0.02, 0.01, True), (-0.02, 0.01, True), (0.01, 0.02, False), (0.01, 0.01, False)]
)
def test_an_interval_excludes_zero_when_it_lies_on_one_side(mean, ci95, excludes):
    assert PairedDifference(mean, 0.01, ci95, 5, 0.01).excludes_zero is excludes


def test_a_verdict_says_no_more_than_the_interval():
    ahead = PairedDifference(0.02, 0.01, 0.01, 5, 0.01)
    assert ahead.verdict("residual", "plain") == f"**residual is ahead of plain**: {ahead.points()}."
    behind = PairedDifference(-0.02, 0.01, 0.01, 5, 0.01)
    assert behind.verdict("residual", "plain") == f"**plain is ahead of residual**: {behind.points()}."
    unclear = PairedDifference(0.02, 0.01, 0.03, 5, 0.2)
    assert "between residual and plain no difference is shown: +2.00 ± 3.00" in unclear.verdict("residual", "plain")
    single = paired_difference({0: 0.9}, {0: 0.8}).verdict("residual", "plain")
    assert single == "residual against plain: +10.00 points (n = 1: one seed shows no spread)."


def test_equal_results_are_no_difference():
    difference = paired_difference(by_seed(VALUES), by_seed(VALUES))
    assert (difference.mean, difference.ci95, difference.p_value) == (0, None, None)
    assert not difference.excludes_zero


def test_a_difference_that_is_the_same_for_each_seed_shows_no_spread():
    # 0.25 exactly, and 3 of 360 test images up to rounding
    for less in (0.25, 3 / 360):
        first = by_seed([342 / 360, 345 / 360, 347 / 360])
        difference = paired_difference(first, {seed: value - less for seed, value in first.items()})
        assert difference.mean == pytest.approx(less)
        assert not difference.excludes_zero
        assert (difference.ci95, difference.p_value) == (None, None)
        assert difference.points().endswith("points (n = 3: all the same, which shows no spread)")


def fake_run(model: str, seed: int, test_accuracy: float, **changes) -> Run:
    result = {
        "model": model,
        "parameters": 1234,
        "dataset": "tiny",
        "seed": seed,
        "val_accuracy": test_accuracy + 0.01,
        "test_accuracy": test_accuracy,
        "epochs": 10 + seed,
        "seconds": 2.0 + seed,
    }
    return Run(Path("runs") / f"{model}-{seed}", result | changes, [])


def fake_experiment(data, runs, failures=None, models=("plain", "residual"), seeds=(0, 1, 2)) -> Experiment:
    return Experiment(data, TrainingConfig(), dict.fromkeys(models, object), seeds, runs, failures or {})


def full_runs():
    runs = {("plain", seed): fake_run("plain", seed, VALUES[seed]) for seed in range(3)}
    return runs | {("residual", s): fake_run("residual", s, OTHERS[s], parameters=99) for s in range(3)}


COLUMNS = [
    "model", "dataset", "parameters", "seeds", "val_accuracy_mean", "val_accuracy_std", "test_accuracy_mean",
    "test_accuracy_std", "test_accuracy_ci95", "epochs_mean", "seconds_mean",
]  # fmt: skip


def test_a_table_has_a_row_a_model_with_what_pandas_finds_in_its_results(tiny_data):
    runs = full_runs()
    table = results_table(fake_experiment(tiny_data, runs))
    assert list(table.columns) == COLUMNS
    assert list(table["model"]) == ["plain", "residual"]
    assert list(table["dataset"]) == ["tiny", "tiny"]
    assert list(table["parameters"]) == [1234, 99]
    assert list(table["seeds"]) == [3, 3]
    results = pd.DataFrame([{**run.result, "model": name} for (name, _), run in runs.items()]).groupby("model")
    for key in ("val_accuracy", "test_accuracy"):
        np.testing.assert_allclose(table[f"{key}_mean"], results[key].mean())
        np.testing.assert_allclose(table[f"{key}_std"], results[key].std())
    np.testing.assert_allclose(table["epochs_mean"], results["epochs"].mean())
    np.testing.assert_allclose(table["seconds_mean"], results["seconds"].mean())
    expected = stats.t.ppf(0.975, 2) * results["test_accuracy"].sem()
    np.testing.assert_allclose(table["test_accuracy_ci95"], expected)


def test_a_table_of_one_seed_leaves_the_spread_empty(tiny_data):
    runs = {("plain", 0): fake_run("plain", 0, 0.9)}
    table = results_table(fake_experiment(tiny_data, runs, models=("plain",), seeds=(0,)))
    assert table.loc[0, "test_accuracy_mean"] == 0.9
    spread = table.loc[0, ["val_accuracy_std", "test_accuracy_std", "test_accuracy_ci95"]]
    assert spread.isna().all()


def test_a_failed_run_is_in_the_table_and_the_others_are_counted(tiny_data):
    runs = full_runs()
    del runs["residual", 1]
    table = results_table(fake_experiment(tiny_data, runs, {("residual", 1): "ValueError: loss is nan"}))
    assert list(table.columns) == [*COLUMNS, "failed"]
    assert list(table["failed"]) == ["", "seed 1: ValueError: loss is nan"]
    assert list(table["seeds"]) == [3, 2]
    assert table.loc[1, "test_accuracy_mean"] == pytest.approx((OTHERS[0] + OTHERS[2]) / 2)


def test_a_model_without_a_finished_run_keeps_its_row_with_every_error(tiny_data):
    runs = {key: run for key, run in full_runs().items() if key[0] == "plain"}
    failures = {("residual", seed): "RuntimeError: out of memory" for seed in (0, 2)}
    table = results_table(fake_experiment(tiny_data, runs, failures))
    row = table.set_index("model").loc["residual"]
    assert row["failed"] == "seed 0: RuntimeError: out of memory; seed 2: RuntimeError: out of memory"
    assert row.drop(["dataset", "failed"]).isna().all()
    assert table.loc[0, "parameters"] == 1234


def test_a_table_of_failures_alone_can_be_made(tiny_data):
    table = results_table(fake_experiment(tiny_data, {}, {("plain", 0): "ValueError: x"}, models=("plain",)))
    assert table.loc[0, "failed"] == "seed 0: ValueError: x"
    assert table["seeds"].isna().all()


def test_a_saved_table_is_read_back_with_its_numbers(tiny_data, tmp_path):
    table = results_table(fake_experiment(tiny_data, full_runs()))
    assert save_table(table, tmp_path / "new" / "table.csv") is table
    loaded = pd.read_csv(tmp_path / "new" / "table.csv")
    assert list(loaded.columns) == COLUMNS
    assert list(loaded["model"]) == ["plain", "residual"]
    numbers = table.select_dtypes("number").columns
    pd.testing.assert_frame_equal(loaded[numbers], table[numbers], check_dtype=False, rtol=1e-15, atol=0)


def test_differences_become_rows_with_the_parts_of_their_keys():
    difference = paired_difference(by_seed(VALUES), by_seed(OTHERS))
    one_seed = paired_difference({0: 0.9}, {0: 0.8})
    table = differences_table({("a", 2): difference, ("b", 4): one_seed}, ["what", "depth"])
    assert list(table.columns) == ["what", "depth", "mean", "std", "ci95", "n", "p_value"]
    first = [difference.mean, difference.std, difference.ci95, difference.n, difference.p_value]
    assert table.loc[0].tolist() == ["a", 2, *first]
    assert table.loc[1, ["std", "ci95", "p_value"]].isna().all()
    assert list(differences_table({}, ["what", "depth"]).columns) == list(table.columns)


def ranked(*rows: tuple) -> pd.DataFrame:
    """A table of model, parameters, validation mean and standard deviation over 4 seeds, and test mean."""
    columns = ["model", "parameters", "val_accuracy_mean", "val_accuracy_std", "test_accuracy_mean"]
    return pd.DataFrame(rows, columns=columns).astype({"parameters": "Int64"}).assign(seeds=4)


@pytest.mark.parametrize(("second_best", "choice"), [(0.9451, "small"), (0.9449, "large")])
def test_the_smallest_model_within_a_standard_error_of_the_best_is_recommended(second_best, choice):
    # the standard error of the best is 0.01 / 2
    table = ranked(("large", 900, 0.95, 0.01, 0.5), ("small", 100, second_best, 0.3, 0.4), ("tiny", 10, 0.9, 0.2, 0.99))
    assert recommend(table) == choice


def test_a_recommendation_does_not_look_at_the_test_set():
    table = ranked(("good", 100, 0.95, 0.01, 0.1), ("lucky", 100, 0.90, 0.01, 1.0))
    assert recommend(table) == "good"


def test_a_single_run_is_not_recommended_where_others_have_several():
    table = ranked(("steady", 100, 0.94, 0.01, 0.9), ("once", 10, 0.95, float("nan"), 0.9))
    assert recommend(table) == "once"
    table["seeds"] = [3, 1]
    assert recommend(table) == "steady"
    table["seeds"] = [9, 2]  # one more or less makes no candidate
    assert recommend(table) == "once"


def test_with_one_seed_the_best_is_recommended_and_failures_never(tiny_data):
    runs = {("plain", 0): fake_run("plain", 0, 0.9), ("residual", 0): fake_run("residual", 0, 0.91, parameters=9999)}
    assert recommend(results_table(fake_experiment(tiny_data, runs, seeds=(0,)))) == "residual"
    del runs["residual", 0]
    failures = {("residual", 0): "ValueError: x"}
    assert recommend(results_table(fake_experiment(tiny_data, runs, failures, seeds=(0,)))) == "plain"
    nothing = results_table(fake_experiment(tiny_data, {}, failures, seeds=(0,)))
    with pytest.raises(ValueError, match="no model has a finished run, so there is none to recommend"):
        recommend(nothing)


def test_a_readable_table_has_percent_with_intervals_and_a_reference_where_there_is_one(tiny_data):
    table = results_table(fake_experiment(tiny_data, full_runs()))
    readable = readable_table(table, {"residual": 0.9871})
    interval = 100 * stats.t.ppf(0.975, 2) * stats.sem(VALUES[:3])
    assert readable.loc["plain", "test accuracy"] == f"{100 * np.mean(VALUES[:3]):.2f} ± {interval:.2f} %"
    assert readable.loc["plain", "validation accuracy"] == f"{100 * np.mean(VALUES[:3]) + 1:.2f} %"
    assert list(readable["reference"]) == ["", "98.71 %"]
    assert list(readable["parameters"]) == ["1,234", "99"]
    assert [str(n) for n in readable["n"]] == ["3", "3"]
    assert list(readable["epochs"]) == ["11", "11"]
    assert "reference" not in readable_table(table).columns


def test_a_readable_table_shows_failures_and_one_seed_without_an_interval(tiny_data):
    failures = {("plain", 1): "ValueError: x", ("residual", 0): "RuntimeError: y"}
    runs = {("plain", 0): fake_run("plain", 0, 0.9)}
    readable = readable_table(results_table(fake_experiment(tiny_data, runs, failures, seeds=(0, 1))))
    assert readable.loc["plain", "test accuracy"] == "90.00 %"
    assert readable.loc["plain", "failed"] == "seed 1: ValueError: x"
    assert str(readable.loc["plain", "n"]) == "1"
    assert readable.loc["residual", "test accuracy"] == "failed: seed 0: RuntimeError: y"
    assert readable.loc["residual", "parameters"] == ""


def test_equal_values_show_no_spread():
    summary = summarise([0.1135, 0.1135, 0.1135])
    assert summary.ci95 is None
    assert summary.percent() == "11.35 % (n = 3: all the same, which shows no spread)"


def test_of_joined_tables_only_the_one_with_failures_tells_of_them():
    row = {"model": "a", "seeds": 1, "val_accuracy_mean": 0.8, "test_accuracy_mean": 0.8, "test_accuracy_ci95": None}
    row |= {"epochs_mean": 3.0, "seconds_mean": 5.0, "parameters": 7}
    failing = pd.DataFrame([row | {"model": "b", "failed": "seed 1: OSError"}])
    readable = readable_table(pd.concat([pd.DataFrame([row]), failing], ignore_index=True))
    assert readable["failed"].to_dict() == {"a": "", "b": "seed 1: OSError"}
