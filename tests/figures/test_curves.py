"""Lines by epoch, layer and depth show the numbers that they were given."""

import numpy as np
import pandas as pd
import pytest
from drawing import bar_ends, by_epoch, drawn, histories, interval_in_percent, legend_texts
from matplotlib.colors import to_rgb
from scipy import stats

from lablib import figures


def test_loss_curves_are_the_means_over_seeds_to_the_end_of_the_shortest():
    table = histories({"plain": [6, 4, 5], "residual": [3]})
    axis = drawn(figures.loss_curves(table.sample(frac=1, random_state=0), "val_loss", "tiny")).axes[0]
    plain, residual = axis.get_lines()
    np.testing.assert_array_equal(plain.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(plain.get_ydata(), by_epoch(table, "plain", 4).mean(0))
    np.testing.assert_array_equal(residual.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(residual.get_ydata(), by_epoch(table, "residual", 3)[0])


def test_the_band_of_loss_curves_is_one_standard_deviation_and_one_seed_has_none():
    table = histories({"plain": [4, 4, 4], "residual": [4]})
    axis = drawn(figures.loss_curves(table, "val_loss", "tiny")).axes[0]
    assert len(axis.collections) == 1
    corners = axis.collections[0].get_paths()[0].vertices
    values = by_epoch(table, "plain", 4)
    mean, std = values.mean(0), values.std(0, ddof=1)
    for epoch in range(4):
        heights = corners[corners[:, 0] == epoch + 1, 1]
        assert heights.min() == pytest.approx(mean[epoch] - std[epoch])
        assert heights.max() == pytest.approx(mean[epoch] + std[epoch])


def test_loss_curves_name_their_axes_data_set_models_and_n():
    figure = drawn(figures.loss_curves(histories({"plain": [3, 3], "residual": [3]}), "val_loss", "tiny"))
    axis = figure.axes[0]
    assert axis.get_xlabel() == "epoch"
    assert axis.get_ylabel() == "validation loss (cross-entropy, nats)"
    assert legend_texts(axis) == ["plain (n = 2)", "residual (n = 1)"]
    assert figure.get_suptitle() == "tiny: mean over n seeds, band ± 1 standard deviation"
    assert all(tick == round(tick) for tick in axis.get_xticks())
    accuracy = figures.loss_curves(histories({"plain": [3]}), "val_accuracy", "tiny")
    assert accuracy.axes[0].get_ylabel() == "validation accuracy"
    assert accuracy.get_suptitle() == "tiny: one seed"


def test_loss_curves_tell_models_apart_by_colour_and_by_dash():
    axis = figures.loss_curves(histories({name: [2] for name in "abcd"}), "val_loss", "tiny").axes[0]
    lines = axis.get_lines()
    assert len({to_rgb(line.get_color()) for line in lines}) == 4
    assert len({line.get_linestyle() for line in lines}) == 4


def test_groups_of_loss_curves_are_panels_of_one_height():
    table = histories({name: [3, 3] for name in "abc"})
    figure = drawn(figures.loss_curves(table, "val_loss", "tiny", {"2 layers": ["a"], "4 layers": ["c", "b"]}))
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["2 layers", "4 layers"]
    assert legend_texts(left) == ["a (n = 2)"]
    assert legend_texts(right) == ["c (n = 2)", "b (n = 2)"]
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), by_epoch(table, "c", 3).mean(0))
    assert left.get_ylim() == right.get_ylim()
    assert right.get_xlabel() == "epoch"


def test_loss_curves_leave_no_model_out():
    names = [f"model {index}" for index in range(12)]
    axis = figures.loss_curves(histories({name: [2] for name in names}), "val_loss", "tiny").axes[0]
    assert legend_texts(axis) == [f"{name} (n = 1)" for name in names]


def test_a_panel_whose_models_all_failed_is_empty_and_no_more():
    figure = drawn(figures.loss_curves(histories({"a": [2]}), "val_loss", "tiny", {"1": ["a"], "2": ["failed"]}))
    assert len(figure.axes[0].get_lines()) == 1
    assert not figure.axes[1].get_lines()


def test_depths_and_models_are_told_apart_by_six_line_styles():
    names = [f"model {index}" for index in range(6)]
    axis = figures.loss_curves(histories({name: [2] for name in names}), "val_loss", "tiny").axes[0]
    assert len({(line.get_linestyle(), str(line._dash_pattern)) for line in axis.get_lines()}) == 6


ALPHA = 0.75
TERMS = ["total", "teacher: α · T² · KL", "labels: (1 − α) · cross-entropy"]


def distillation_history(lengths: list[int]) -> pd.DataFrame:
    """A distilled student's loss by seed and epoch: terms that are noise, and their weighted sum."""
    generator = np.random.default_rng(0)
    rows = []
    for seed, length in enumerate(lengths):
        for epoch in range(1, length + 1):
            row = {"seed": seed, "epoch": epoch}
            for part in ("train", "val"):
                soft, hard = generator.uniform(1, 2, 2)
                row |= {f"{part}_soft_loss": soft, f"{part}_hard_loss": hard}
                row[f"{part}_loss"] = ALPHA * soft + (1 - ALPHA) * hard
            rows.append(row)
    return pd.DataFrame(rows)


def test_loss_terms_are_drawn_with_their_weights_so_that_they_add_up_to_the_total():
    table = distillation_history([4, 3])
    figure = drawn(figures.loss_terms(table.sample(frac=1, random_state=0), "tiny", ALPHA))
    for axis, part in zip(figure.axes, ("train", "val"), strict=True):
        total, soft, hard = axis.get_lines()
        of_both = table[table["epoch"] <= 3].groupby("epoch")  # where the first of the seeds ends
        for line, column, weight in ((total, "loss", 1), (soft, "soft_loss", 0.75), (hard, "hard_loss", 0.25)):
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(line.get_ydata(), weight * of_both[f"{part}_{column}"].mean())
        np.testing.assert_allclose(soft.get_ydata() + hard.get_ydata(), total.get_ydata())


def test_the_bands_of_loss_terms_are_one_standard_deviation_of_the_weighted_term():
    table = distillation_history([3, 3, 3])
    axis = drawn(figures.loss_terms(table, "tiny", ALPHA)).axes[1]
    assert len(axis.collections) == 3
    hard = 0.25 * table.pivot(index="epoch", columns="seed", values="val_hard_loss")
    corners = axis.collections[2].get_paths()[0].vertices
    for epoch in (1, 2, 3):
        heights = corners[corners[:, 0] == epoch, 1]
        assert heights.min() == pytest.approx(hard.loc[epoch].mean() - hard.loc[epoch].std())
        assert heights.max() == pytest.approx(hard.loc[epoch].mean() + hard.loc[epoch].std())


@pytest.mark.parametrize(
    ("seeds", "title"),
    [
        (1, "tiny: the distilled student's loss, α = 0.75, n = 1"),
        (2, "tiny: the distilled student's loss, α = 0.75, n = 2, band ± 1 standard deviation"),
    ],
)
def test_loss_terms_name_their_parts_alpha_and_n_and_speak_of_a_band_only_where_there_is_one(seeds, title):
    figure = drawn(figures.loss_terms(distillation_history([3] * seeds), "tiny", ALPHA))
    left, right = figure.axes
    assert figure.get_suptitle() == title
    assert [len(axis.collections) for axis in figure.axes] == [0 if seeds == 1 else 3] * 2
    assert [left.get_title(), right.get_title()] == ["training", "validation"]
    assert [left.get_xlabel(), right.get_xlabel()] == ["epoch", "epoch"]
    assert left.get_ylabel() == "contribution to the loss (nats)"
    assert legend_texts(right) == TERMS
    assert [line.get_label() for line in left.get_lines()] == TERMS
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] == 0
    for axis in figure.axes:
        assert len({to_rgb(line.get_color()) for line in axis.get_lines()}) == 3
        assert len({line.get_linestyle() for line in axis.get_lines()}) == 3


ACCURACIES = {"plain": {2: [0.91, 0.93, 0.95], 8: [0.5, 0.7]}, "residual": {8: [0.9, 0.94, 0.92], 2: [0.96]}}


def test_accuracy_by_depth_is_the_mean_with_scipys_interval_in_percent():
    axis = drawn(figures.accuracy_by_depth(ACCURACIES, "tiny", chance=0.1)).axes[0]
    containers = {container.get_label(): container for container in axis.containers}
    assert list(containers) == ["plain (n = 2 to 3)", "residual (n = 1 to 3)"]
    line, _, (bars,) = containers["plain (n = 2 to 3)"]
    assert list(line.get_xdata()) == [2, 8]
    assert list(line.get_ydata()) == pytest.approx([93, 60])
    for (bottom, top), values in zip(bars.get_segments(), ACCURACIES["plain"].values(), strict=True):
        interval = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([bottom[1], top[1]], 100 * np.array(interval))
    assert list(containers["residual (n = 1 to 3)"][0].get_ydata()) == pytest.approx([96, 92])


def test_accuracy_by_depth_gives_one_seed_no_interval():
    axis = drawn(figures.accuracy_by_depth({"plain": {2: [0.9], 4: [0.9, 0.8]}}, "tiny", chance=0.1)).axes[0]
    _, caps, (bars,) = axis.containers[0]
    assert sum(len(segment) > 0 and np.isfinite(segment).all() for segment in bars.get_segments()) == 1
    for cap in caps:
        assert np.isfinite(np.asarray(cap.get_ydata(), dtype=float)).sum() == 1
    assert drawn(figures.accuracy_by_depth({"plain": {2: [0.9]}}, "tiny")).axes[0].get_title() == "tiny: one seed"


def test_accuracy_by_depth_names_its_axes_data_set_depths_and_the_share_of_guessing():
    axis = drawn(figures.accuracy_by_depth(ACCURACIES, "tiny", chance=0.1)).axes[0]
    assert axis.get_xlabel() == "hidden layers or blocks"
    assert axis.get_ylabel() == "test accuracy (%)"
    assert axis.get_title() == "tiny: mean over n seeds, bars: 95 % interval of the mean"
    assert legend_texts(axis) == ["plain (n = 2 to 3)", "residual (n = 1 to 3)"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "8"]
    assert [text.get_text() for text in axis.texts] == ["guessing"]
    assert any(list(line.get_ydata()) == [10, 10] for line in axis.get_lines())


NEAR = {"plain": {1: [0.81, 0.83], 4: [0.80, 0.82]}, "residual": {1: [0.84, 0.85], 4: [0.86]}}


def test_accuracy_by_depth_without_the_share_of_guessing_shows_the_range_of_the_values_alone():
    axis = drawn(figures.accuracy_by_depth(NEAR, "tiny")).axes[0]
    ends = [end for container in axis.containers for bar in bar_ends(container) for end in bar]
    assert len(ends) == 6
    low, high = axis.get_ylim()
    assert low < min(ends) < max(ends) < high
    assert high - low < 1.3 * (max(ends) - min(ends))
    assert not axis.texts
    assert len(axis.containers) == 2
    assert {line for line in axis.get_lines() if line.get_linestyle() != "None"} == {c[0] for c in axis.containers}
    whole = drawn(figures.accuracy_by_depth(NEAR, "tiny", chance=0.1)).axes[0]
    assert whole.get_ylim() == (0, 103)


def test_accuracy_by_depth_without_the_share_of_guessing_shows_the_same_points_and_bars():
    zoomed, whole = (drawn(figures.accuracy_by_depth(NEAR, "tiny", chance)).axes[0] for chance in (None, 0.1))
    for one, other in zip(zoomed.containers, whole.containers, strict=True):
        np.testing.assert_array_equal(one[0].get_xydata(), other[0].get_xydata())
        assert bar_ends(one) == bar_ends(other)
    first = [pytest.approx(tuple(interval_in_percent(values))) for values in NEAR["plain"].values()]
    assert bar_ends(zoomed.containers[0]) == first


def test_accuracy_by_depth_puts_families_side_by_side_and_the_middle_one_at_its_depth():
    same = {family: {2: [0.8, 0.9], 4: [0.7, 0.9]} for family in ("a", "b", "c")}
    axis = drawn(figures.accuracy_by_depth(same, "tiny")).axes[0]
    places = []
    for line, _, (bars,) in axis.containers:
        points = line.get_transform().transform(line.get_xydata())[:, 0]
        ends = [bars.get_transform().transform(segment)[:, 0] for segment in bars.get_segments()]
        np.testing.assert_allclose(np.transpose(ends), [points, points])  # a bar goes through its point
        places.append(points * 72 / axis.figure.dpi)
    depths = axis.transData.transform([(2, 0), (4, 0)])[:, 0] * 72 / axis.figure.dpi
    np.testing.assert_allclose(places, [depths - 7, depths, depths + 7])


def test_accuracy_by_depth_takes_another_name_for_what_depth_is():
    axis = figures.accuracy_by_depth(NEAR, "tiny", xlabel="depth (stages)").axes[0]
    assert axis.get_xlabel() == "depth (stages)"
    assert figures.accuracy_by_depth(NEAR, "tiny").axes[0].get_xlabel() == "hidden layers or blocks"


def test_the_zoomed_axis_of_accuracy_by_depth_ends_near_100_percent_where_an_interval_goes_beyond():
    values = {"plain": {1: [0.99, 1.0], 2: [0.98, 0.99]}}
    assert interval_in_percent([0.99, 1.0])[1] > 105
    axis = drawn(figures.accuracy_by_depth(values, "tiny")).axes[0]
    assert 100 <= axis.get_ylim()[1] <= 103


def test_accuracy_by_depth_draws_the_others_where_all_runs_of_a_family_failed():
    axis = drawn(figures.accuracy_by_depth(NEAR | {"failed": {}}, "tiny")).axes[0]
    assert legend_texts(axis)[:2] == ["plain (n = 2)", "residual (n = 1 to 2)"]
    assert list(axis.containers[1][0].get_ydata()) == pytest.approx([84.5, 86])


WAYS = {
    "constant": {"plain": {2: [0.7, 0.72], 4: [0.8]}, "residual": {4: [0.85, 0.81], 2: [0.8, 0.84]}},
    "cosine": {"plain": {3: [0.9]}, "residual": {}},
}


def test_runs_by_depth_has_a_point_a_run_and_a_line_through_the_means():
    left, right = drawn(figures.runs_by_depth(WAYS, "tiny")).axes
    points, means, _, residual_points, residual_means, _ = left.get_lines()
    np.testing.assert_allclose(points.get_xydata(), [(2, 70), (2, 72), (4, 80)])
    np.testing.assert_allclose(means.get_xydata(), [(2, 71), (3, np.nan), (4, 80)])  # a gap
    np.testing.assert_allclose(residual_points.get_xydata(), [(2, 80), (2, 84), (4, 85), (4, 81)])
    np.testing.assert_allclose(residual_means.get_xydata(), [(2, 82), (3, np.nan), (4, 83)])
    assert points.get_linestyle() == "None"
    assert points.get_color() == means.get_color() != residual_means.get_color()
    assert means.get_linestyle() != residual_means.get_linestyle()
    np.testing.assert_allclose(right.get_lines()[0].get_xydata(), [(3, 90)])


def test_runs_by_depth_names_ways_families_and_n_and_leaves_out_a_family_without_runs():
    figure = drawn(figures.runs_by_depth(WAYS, "tiny"))
    left, right = figure.axes
    assert [left.get_title(), right.get_title()] == ["constant", "cosine"]
    assert legend_texts(left) == ["plain (n = 1 to 2)", "residual (n = 2)"]
    assert legend_texts(right) == ["plain (n = 1)"]
    assert figure.get_suptitle() == "tiny: a point a run, lines through the means over n seeds"
    assert left.get_ylabel() == "test accuracy (%)"
    assert left.get_xlabel() == right.get_xlabel() == "depth (stages)"
    for axis in (left, right):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "3", "4"]


def test_runs_by_depth_shows_all_points_of_both_panels_on_one_axis_with_families_side_by_side():
    figure = drawn(figures.runs_by_depth(WAYS, "tiny"))
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 70 < 90 < left.get_ylim()[1]
    lines = left.get_lines()
    places = [line.get_transform().transform([(2, 80)])[0, 0] * 72 / figure.dpi for line in (lines[0], lines[3])]
    assert places[1] - places[0] == pytest.approx(6)


def gradient_table(depths=(2, 3), moments=("before training", "after training")) -> pd.DataFrame:
    generator = np.random.default_rng(0)
    rows = [
        {"moment": moment, "model": model, "depth": depth, "seed": seed, "layer": layer, "norm": 7.0}
        for moment in moments
        for model in ("plain", "residual")
        for depth in depths
        for seed in range(3)
        for layer in range(1, depth + 2)
    ]
    return pd.DataFrame(rows).assign(rms=10 ** generator.uniform(-6, 0, len(rows)))


def test_gradient_norms_are_geometric_means_over_seeds_by_relative_position():
    table = gradient_table()
    figure = drawn(figures.gradient_norms(table.sample(frac=1, random_state=0).sort_values("moment"), "tiny"))
    panels = {axis.get_title(): axis for axis in figure.axes}
    assert set(panels) == {
        f"{model}, {when} training" for model in ("plain", "residual") for when in ("before", "after")
    }
    for title, axis in panels.items():
        model, moment = title.split(", ")
        assert axis.get_yscale() == "log"
        for line, depth in zip(axis.get_lines(), (2, 3), strict=True):
            part = table[(table["moment"] == moment) & (table["model"] == model) & (table["depth"] == depth)]
            expected = [stats.gmean(part.loc[part["layer"] == layer, "rms"]) for layer in range(1, depth + 2)]
            np.testing.assert_allclose(line.get_ydata(), expected)
            np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1, depth + 1))


def test_gradient_norms_name_axes_data_set_depths_and_n():
    figure = drawn(figures.gradient_norms(gradient_table(), "tiny"))
    assert figure.get_suptitle() == "tiny: loss gradient by layer, geometric mean, n = 3"
    assert [axis.get_xlabel() for axis in figure.axes[2:]] == ["position (0: first layer, 1: last)"] * 2
    assert figure.axes[0].get_ylabel() == "gradient, root mean square"
    legend = figure.axes[1].get_legend()
    assert legend.get_title().get_text() == "layers or blocks"
    assert legend_texts(figure.axes[1]) == ["2", "3"]
    norm = figures.gradient_norms(gradient_table(), "tiny", column="norm")
    assert norm.axes[0].get_ylabel() == "gradient norm"
    np.testing.assert_allclose(norm.axes[0].get_lines()[0].get_ydata(), 7)


def test_a_gradient_of_0_is_a_gap():
    table = gradient_table(depths=(2,), moments=("before training",))
    table.loc[(table["model"] == "plain") & (table["layer"] == 1), "rms"] = 0.0
    line = drawn(figures.gradient_norms(table, "tiny")).axes[0].get_lines()[0]
    assert np.isnan(line.get_ydata()[0])
    assert (line.get_ydata()[1:] > 0).all()
