import pandas as pd

from lablib.report import (
    by_depth,
    by_family,
    by_question,
    by_regime,
    markdown,
    readable_depth,
    readable_differences,
    readable_distillation,
    readable_prices,
    readable_regimes,
    readable_rules,
    with_ways,
)


def test_depths_become_columns_in_their_order_and_families_keep_theirs():
    table = pd.DataFrame(
        {
            "model": ["MLP-16", "MLP-2", "A-2", "A-16"],
            "test_accuracy_mean": [0.5, 0.98, 0.99, 0.123456],
            "test_accuracy_ci95": [0.01, 0.001, 0.002, 0.0],
        }
    )
    wide = by_depth(table)
    assert list(wide.columns) == [2, 16]
    assert list(wide.index) == ["MLP", "A"]
    assert wide.loc["MLP", 2] == "98.00 ± 0.10"
    assert wide.loc["A", 16] == "12.35 ± 0.00"


def test_where_there_is_no_interval_none_is_written():
    depth = pd.DataFrame({"model": ["MLP-2"], "test_accuracy_mean": [0.1135], "test_accuracy_ci95": [float("nan")]})
    assert by_depth(depth).loc["MLP", 2] == "11.35"
    row = {"schedule": "cosine", "depth": 2, "mean": 0.001, "ci95": float("nan"), "n": 1, "p_value": float("nan")}
    differences = readable_differences(pd.DataFrame([row]))
    assert differences.loc[2].tolist() == ["cosine", "+0.10", "–", 1]


def test_questions_become_columns_and_what_was_not_answered_a_dash():
    nan = float("nan")
    answers = [("the shortcut", 4, 0.0412, 0.01, 3), ("the shortcut", 2, -0.002, nan, 1), ("both", 4, 0.05, 0.002, 2)]
    wide = by_question(pd.DataFrame(answers, columns=["what", "depth", "mean", "ci95", "n"]))
    assert list(wide.columns) == ["the shortcut", "both", "n"]
    assert wide.loc[4].tolist() == ["+4.12 ± 1.00", "+5.00 ± 0.20", "3, 2"]
    assert wide.loc[2].tolist() == ["-0.20", "–", "1"]


def test_a_markdown_table_has_its_index_in_front():
    table = pd.DataFrame({"n": [5]}, index=pd.Index(["MLP-2"], name="model"))
    assert markdown(table) == "| model | n |\n| --- | --- |\n| MLP-2 | 5 |\n"


def test_a_distillations_table_has_roles_gain_and_reference():
    row = {"dataset": "tiny", "seeds": 3, "val_accuracy_mean": 0.8, "val_accuracy_std": 0.01, "epochs_mean": 9.0}
    row |= {"test_accuracy_std": 0.01, "test_accuracy_ci95": 0.02, "seconds_mean": 60.0, "parameters": 5}
    roles = {"ResidualCNN-4": ("teacher", 0.82), "ResidualCNN-2": ("baseline", 0.78), "Distilled-2": ("distilled", 0.8)}
    table = pd.DataFrame(
        [{"model": m, "role": role, "test_accuracy_mean": mean, **row} for m, (role, mean) in roles.items()]
    )
    nan = float("nan")
    table = table.assign(gain_mean=[nan, nan, 0.02], gain_ci95=[nan, nan, 0.004])
    readable = readable_distillation(table)
    assert readable["role"].tolist() == ["teacher", "baseline", "distilled"]
    assert readable["gain, points"].tolist() == ["", "", "+2.00 ± 0.40"]
    assert readable["reference"].tolist() == ["81.64 %", "78.33 %", "80.95 %"]
    assert readable["test accuracy"].tolist() == ["82.00 ± 2.00 %", "78.00 ± 2.00 %", "80.00 ± 2.00 %"]
    one_seed = readable_distillation(table.assign(gain_ci95=nan))
    assert one_seed["gain, points"].tolist() == ["", "", "+2.00"]


def test_the_rules_of_stopping_are_told_with_their_epochs_and_gains():
    nan = float("nan")
    columns = ["rule", "seeds", "gain_mean", "gain_ci95", "baseline_epoch", "baseline_val_accuracy"]
    columns += ["distilled_epoch", "distilled_val_accuracy"]
    rows = [("accuracy", 2, 0.004, 0.012, 40.5, 0.82, 46, 0.824), ("loss", 1, 0.021, nan, 19, 0.80, 47, 0.821)]
    readable = readable_rules(pd.DataFrame(rows, columns=columns))
    best = ["82.00 % (epoch 40)", "82.40 % (epoch 46)", "+0.40 ± 1.20", 2]
    assert readable.loc["highest validation accuracy"].tolist() == best
    assert readable.loc["lowest validation loss"].tolist() == ["80.00 % (epoch 19)", "82.10 % (epoch 47)", "+2.10", 1]


def test_ways_of_training_stand_side_by_side_without_the_comparison_of_one_network_with_itself():
    rows = [("the shortcut", "constant", 0.001, 0.02, 2), ("the shortcut", "cosine", -0.002, 0.01, 2)]
    rows += [
        ("the teacher", "constant", 0.007, float("nan"), 1),
        ("cosine rate and crops", "ResidualCNN-2", 0.02, 0.01, 2),
    ]
    table = by_regime(pd.DataFrame(rows, columns=["what", "where", "mean", "ci95", "n"]))
    assert table.index.name == "trained"
    assert list(table.columns) == ["the shortcut", "the teacher", "n"]
    assert table.loc["constant"].tolist() == ["+0.10 ± 2.00", "+0.70", "2, 1"]
    assert table.loc["cosine"].tolist() == ["-0.20 ± 1.00", "–", "2"]


def differences_by_way() -> pd.DataFrame:
    nan = float("nan")
    rows = [("4 stages less 2", "A", "constant", -0.005, 0.01, 2), ("4 stages less 2", "A", "cosine", 0.016, nan, 1)]
    rows += [("4 stages less 2", "B", "constant", 0.1, 0.02, 2)]
    rows += [("the shortcut", f"depth {depth}", "constant", depth / 1000, 0.01, 2) for depth in (2, 4)]
    rows += [("the shortcut", "depth 2", "cosine", 0.003, 0.02, 2), ("both", "depth 2", "cosine", 0.15, 0.01, 2)]
    return pd.DataFrame(rows, columns=["what", "where", "trained", "mean", "ci95", "n"])


def test_what_depth_is_worth_has_a_row_for_each_family_and_a_column_for_each_way():
    table = readable_depth(differences_by_way())
    assert table.index.name == "4 stages less 2"
    assert list(table.columns) == ["constant", "cosine", "n"]
    assert table.loc["A"].tolist() == ["-0.50 ± 1.00", "+1.60", "2, 1"]
    assert table.loc["B"].tolist() == ["+10.00 ± 2.00", "–", "2"]


def test_families_are_compared_by_depth_and_way():
    table = by_family(differences_by_way())
    assert table.index.tolist() == ["depth 2, constant", "depth 4, constant", "depth 2, cosine"]
    assert list(table.columns) == ["the shortcut", "both", "n"]
    assert table.loc["depth 4, constant"].tolist() == ["+0.40 ± 1.00", "–", "2"]
    assert table.loc["depth 2, cosine"].tolist() == ["+0.30 ± 2.00", "+15.00 ± 1.00", "2"]


def test_without_depths_to_compare_there_is_an_empty_table():
    table = differences_by_way()
    assert readable_depth(table[table["what"] != "4 stages less 2"]).empty
    assert by_family(table[table["what"] == "4 stages less 2"]).empty


def test_depths_stand_side_by_side_for_each_way_and_a_dash_where_there_is_no_run():
    rows = [("S-2", "constant", 0.5), ("R-2", "constant", 0.6), ("S-4", "constant", 0.7), ("S-4", "cosine", 0.8)]
    table = pd.DataFrame(rows, columns=["model", "regime", "test_accuracy_mean"]).assign(test_accuracy_ci95=0.01)
    wide = by_depth(with_ways(table))
    assert wide.index.tolist() == ["S, constant", "S, cosine", "R, constant"]
    assert wide.loc["S, constant"].tolist() == ["50.00 ± 1.00", "70.00 ± 1.00"]
    assert wide.loc["S, cosine"].tolist() == ["–", "80.00 ± 1.00"]


def test_the_same_network_has_a_row_for_each_way_of_training():
    row = {"model": "ResidualCNN-2", "dataset": "tiny", "seeds": 2, "val_accuracy_mean": 0.8, "val_accuracy_std": 0.01}
    row |= {"test_accuracy_ci95": 0.02, "epochs_mean": 9.0, "seconds_mean": 60.0, "parameters": 5}
    ways = [{**row, "test_accuracy_mean": 0.81, "regime": "constant"}]
    ways += [{**row, "test_accuracy_mean": 0.84, "regime": "cosine"}]
    readable = readable_regimes(pd.DataFrame(ways))
    assert readable.index.tolist() == ["ResidualCNN-2"] * 2
    assert readable["trained"].tolist() == ["constant", "cosine"]
    assert readable["test accuracy"].tolist() == ["81.00 ± 2.00 %", "84.00 ± 2.00 %"]


def test_ways_to_a_better_student_are_told_with_gain_and_cost():
    nan = float("nan")
    columns = ["student", "parameters", "multiply_adds", "epochs_mean", "val_accuracy_mean", "test_accuracy_mean"]
    columns += ["gain_mean", "gain_ci95", "seeds"]
    rows = [("as it is", 165_914, 12.34e6, 43.5, 0.82, 0.81389, nan, nan, 2)]
    rows += [
        ("taught", 165_914, 12.34e6, 56.0, 0.83, 0.82095, 0.00706, 0.0051, 2),
        ("wide", 2_600_000, 2e8, 30, 0.88, 0.87, 0.05, nan, 1),
    ]
    readable = readable_prices(pd.DataFrame(rows, columns=columns))
    assert readable.loc["as it is"].tolist() == ["82.00 %", "81.39 %", "", 2, "44", "165,914", "12.3"]
    assert readable.loc["taught"].tolist() == ["83.00 %", "82.09 %", "+0.71 ± 0.51", 2, "56", "165,914", "12.3"]
    assert readable.loc["wide", "gain, points"] == "+5.00"
