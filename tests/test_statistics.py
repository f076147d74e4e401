"""Means, intervals and paired differences against scipy; tables of runs made by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scripted import frame_of

from lablib import statistics
from lablib.statistics import compare, compare_effects, results_table, summarise

VALUES = [0.981, 0.984, 0.979, 0.988, 0.983]
OTHERS = [0.976, 0.985, 0.971, 0.979, 0.981]
SAME = "the same for every seed, so there is no interval"
NONE = "No significant difference between A and B"
GAIN = "+1.00 ± 0.25 points (n = 3, adjusted p = 0.0033)"


def only(comparison: pd.DataFrame) -> dict:
    (row,) = comparison.to_dict("records")
    return row


@pytest.mark.parametrize("n", [3, 5])
def test_a_summary_is_scipys_t_interval(n):
    mean, std, ci95, count = summary = summarise(VALUES[:n])
    low, high = stats.t.interval(0.95, n - 1, loc=np.mean(VALUES[:n]), scale=stats.sem(VALUES[:n]))
    assert (count, mean, std) == (n, pytest.approx(np.mean(VALUES[:n])), pytest.approx(np.std(VALUES[:n], ddof=1)))
    assert (mean - ci95, mean + ci95) == pytest.approx((low, high))
    assert summary.percent() == f"{100 * mean:.2f} ± {50 * (high - low):.2f} % (n = {n})"


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.98], "98.00 % (1 seed)"), ([0.98, 0.99], "98.50 % (n = 2)"), ([342 / 360] * 3, "95.00 % (n = 3)")],
)
def test_fewer_than_three_seeds_or_equal_values_give_no_interval(values, text):
    assert summarise(values).percent() == text


def test_only_seeds_that_both_models_finished_are_compared_by_scipys_paired_t_test():
    frame = frame_of({"A": VALUES, "B": OTHERS}).sample(frac=1, random_state=0)
    frame = frame[(frame["model"] != "B") | (frame["seed"] != 0)]
    frame.loc[(frame["model"] == "A") & (frame["seed"] == 4), "test_accuracy"] = math.nan
    row = only(compare(frame, {"it": ("A", "B")}))
    oracle = stats.ttest_rel(VALUES[1:4], OTHERS[1:4])
    interval = oracle.confidence_interval(0.95)
    assert row["by_seed"] == pytest.approx({seed: VALUES[seed] - OTHERS[seed] for seed in (1, 2, 3)})
    assert (row["n"], row["p_value"], row["p_adjusted"]) == (3, pytest.approx(oracle.pvalue), row["p_value"])
    assert (row["mean"] - row["ci95"], row["mean"] + row["ci95"]) == pytest.approx((interval.low, interval.high))
    assert row["significant"] == (oracle.pvalue < 0.05)
    assert only(compare(frame, {"it": ("A", "B")}, metric="val_accuracy"))["n"] == 4


def test_the_p_values_of_a_question_are_corrected_for_their_number_as_benjamini_and_hochberg_do():
    # effects of 0.02, 0.012 and 0.001, with the same spread
    spread = np.array([-0.01, -0.005, 0, 0.005, 0.01])
    accuracies = {"base": [0.9] * 5} | {f"net-{i}": 0.9 + m + spread for i, m in enumerate((0.02, 0.012, 0.001))}
    pairs = {name: (f"net-{name[-1]}", "base") for name in ("net 0", "net 1", "net 2", "it, depth 0", "it, depth 2")}
    table = compare(frame_of(accuracies), pairs)
    p = table["p_value"].to_numpy()
    by_hand = [min(3 * p[0], 3 / 2 * p[1], p[2]), min(3 / 2 * p[1], p[2]), p[2], min(2 * p[0], p[2]), p[2]]
    np.testing.assert_allclose(table["p_adjusted"], by_hand)
    assert list(table["significant"]) == [True, p[1] * 3 / 2 < 0.05, False, True, False]
    assert statistics.points(table.loc[0]).endswith(f"adjusted p = {by_hand[0]:.2g})")
    table.insert(0, "recipe", "ours")
    assert statistics.labels(table) == [f"ours, {name}" for name in pairs]


def test_pairs_whose_models_or_common_seeds_are_missing_are_left_out():
    frame = pd.concat([frame_of({"A": VALUES, "B": OTHERS}), frame_of({"C": [0.9]}).assign(seed=7)])
    table = compare(frame, {"a": ("A", "nowhere"), "b": ("A", "C"), "c": ("A", "B")})
    assert list(table["label"]) == ["c"]
    empty = compare(frame, {"a": ("A", "nowhere")})
    assert list(empty.columns) == list(table.columns)
    assert statistics.verdicts(empty) == "Nothing to compare."
    assert compare_effects(empty, table).empty


def test_effects_are_compared_by_seed_where_both_tables_have_the_label():
    first = compare(frame_of({"A": VALUES, "B": OTHERS}), {"2": ("A", "B"), "4": ("B", "A")})
    second = compare(frame_of({"A": OTHERS[:4], "C": VALUES[:4][::-1]}), {"2": ("A", "C")})
    table = compare_effects(first, second)
    row = only(table)
    expected = (np.subtract(VALUES, OTHERS)[:4]) - np.subtract(OTHERS[:4], VALUES[:4][::-1])
    assert list(row["by_seed"].values()) == pytest.approx(list(expected))
    assert row["p_value"] == pytest.approx(stats.ttest_1samp(expected, 0).pvalue)
    assert (row["label"], row["first"], row["second"]) == ("2", "A − B", "A − C in the other experiment")
    assert statistics.verdict(row | {"significant": True, "mean": -0.01}).startswith("**A − B is smaller than A − C in")
    readable = statistics.effects_table({"first": first, "change": table})
    assert readable.loc["2", "first"] == f"{100 * first['mean'][0]:+.2f} ± {100 * first['ci95'][0]:.2f} (n = 5)"
    assert readable.loc["4", "change"] == ""


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ([0.91, 0.92, 0.93], [0.90, 0.911, 0.919], f"**A is better than B**: {GAIN}."),
        ([0.90, 0.911, 0.919], [0.91, 0.92, 0.93], f"**B is better than A**: {GAIN}."),
        ([0.91, 0.92, 0.93], [0.92, 0.90, 0.92], f"{NONE}: +0.67 ± 3.79 points (n = 3, adjusted p = 0.53)."),
        ([0.91, 0.92], [0.90, 0.91], "A − B: +1.00 points (n = 2), too few seeds to tell."),
        ([0.95, 0.96, 0.9], [0.94, 0.95, 0.89], f"A − B: +1.00 points (n = 3), {SAME}."),
    ],
)
def test_a_verdict_says_no_more_than_the_interval(first, second, text):
    row = only(compare(frame_of({"A": first, "B": second}), {"it": ("A", "B")}))
    assert statistics.verdict(row) == text


def test_a_table_has_one_row_per_model_with_what_pandas_finds_in_its_runs(tmp_path):
    frame = frame_of({"plain": VALUES, "residual": OTHERS[:3], "few": OTHERS[:2]})
    table = results_table(frame, {"residual": 0.9871})
    assert table[["model", "n"]].to_numpy().tolist() == [["plain", 5], ["residual", 3], ["few", 2]]
    runs = frame.groupby("model", sort=False)
    for metric in ("val_accuracy", "test_accuracy"):
        np.testing.assert_allclose(table[f"{metric}_mean"], runs[metric].mean())
        np.testing.assert_allclose(table[f"{metric}_std"], runs[metric].std())
    half = [stats.t.ppf(0.975, n - 1) * stats.sem(values) for n, values in ((5, VALUES), (3, OTHERS[:3]))]
    np.testing.assert_allclose(table["test_accuracy_ci95"], [*half, math.nan])
    statistics.save_table(table, tmp_path / "new" / "table.csv")
    loaded = pd.read_csv(tmp_path / "new" / "table.csv")
    pd.testing.assert_frame_equal(loaded, table, check_dtype=False, rtol=1e-15, atol=0)
    assert (readable := statistics.readable_table(loaded)).columns.name == "tiny"
    texts = ["1,000", f"{100 * np.mean(VALUES) + 1:.2f} %", f"{100 * np.mean(VALUES):.2f} ± {100 * half[0]:.2f} %", ""]
    assert list(readable.loc["plain"]) == [*texts, "5", "12", "1,002"]
    assert readable.loc["residual", "reference"] == "98.71 %"
    with pytest.raises(ValueError, match="two runs of a model have the same seed"):
        results_table(pd.concat([frame, frame]))


def test_failed_and_missing_runs_show_in_the_tables_and_the_others_count():
    frame = frame_of({"plain": VALUES[:3], "broken": [math.nan] * 2, "absent": [math.nan]}, error=None)
    frame.loc[frame["model"] == "broken", "error"] = "ValueError: x"
    frame.loc[2, ["test_accuracy", "val_accuracy", "error"]] = [math.nan, math.nan, "OSError: y"]
    table = results_table(frame)
    assert table[["n", "error"]].to_numpy().tolist() == [[2, "OSError: y"], [0, "ValueError: x"], [0, ""]]
    readable = statistics.readable_table(table)
    assert list(readable.loc["plain", ["parameters", "failed"]]) == ["1,000", "OSError: y"]
    assert list(readable.loc["broken", ["test accuracy", "n", "failed"]]) == ["", "0", "ValueError: x"]
    cells = frame_of({"T = 2, α = 0.5": [math.nan, 0.9], "MLP": [0.7]})
    assert statistics.with_knobs(cells)[["temperature", "alpha", "seed"]].to_numpy().tolist() == [[2, 0.5, 1]]


@pytest.mark.parametrize(
    ("rows", "choice"),
    [  # model, parameters, validation mean and standard deviation, n; the standard error of the best is 0.005
        ([("large", 900, 0.95, 0.01, 4), ("small", 100, 0.9451, 0.3, 4), ("tiny", 10, 0.9, 0.2, 4)], "small"),
        ([("large", 900, 0.95, 0.01, 4), ("small", 100, 0.9449, 0.3, 4), ("tiny", 10, 0.9, 0.2, 4)], "large"),
        ([("worse", 100, 0.949, 0.01, 4), ("better", 100, 0.95, 0.01, 4)], "better"),
        ([("steady", 100, 0.94, 0.01, 3), ("lucky", 10, 0.95, math.nan, 1)], "steady"),
        ([("two", 100, 0.94, 0.01, 2)], "none: every model has fewer than 3 finished runs"),
    ],
)
def test_the_smallest_model_within_a_standard_error_of_the_best_is_recommended(rows, choice):
    table = pd.DataFrame(rows, columns=["model", "parameters", "val_accuracy_mean", "val_accuracy_std", "n"])
    assert statistics.recommend(table) == choice


def test_gradient_ratios_are_of_the_first_to_the_last_hidden_layer_by_run():
    runs = {"model": ["net-2"] * 6 + ["dead-2"] * 3, "seed": [0, 0, 0, 1, 1, 1, 0, 0, 0], "when": "initial"}
    ratios = statistics.gradient_ratios(pd.DataFrame(runs | {"rms": [1.0, 4, 9, 2, 4, 9, 0, 0, 9]}))
    np.testing.assert_allclose(ratios["ratio"], [0.25, 0.5, math.nan])
    assert list(statistics.with_depth(ratios)["family"]) == ["net", "net", "dead"]
