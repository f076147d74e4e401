"""Models side by side: each figure shows the numbers that it was given, and says how sure they are."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from drawing import bar_ends, drawn, interval_in_percent, legend_texts
from matplotlib.colors import to_rgb
from matplotlib.container import ErrorbarContainer
from matplotlib.patches import Rectangle
from scipy import stats

from lablib import figures
from lablib.diagnostics import calibration
from lablib.figures.style import lab_style
from lablib.statistics import Summary, summarise


def test_a_forest_shows_each_difference_with_its_interval_and_n_beside_no_difference():
    values = {"2 layers": [0.01, 0.02, 0.015], "8 layers": [-0.2, -0.1]}
    differences = {name: summarise(v) for name, v in values.items()} | {"16 layers": Summary(0.05, None, None, 1)}
    axis = drawn(figures.forest(differences, "tiny: residual less plain", "difference (percentage points)")).axes[0]
    assert axis.get_title() == "tiny: residual less plain"
    assert axis.get_xlabel() == "difference (percentage points), 95 % interval"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2 layers", "8 layers", "16 layers"]
    assert [text.get_text() for text in axis.texts] == ["+1.50, n = 3", "-15.00, n = 2", "+5.00, n = 1"]
    assert any(list(line.get_xdata()) == [0, 0] for line in axis.get_lines())
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top
    bars = [container[2] for container in axis.containers]
    for row, (value, (bar,)) in enumerate(zip(values.values(), bars[:2], strict=True)):
        interval = stats.t.interval(0.95, len(value) - 1, np.mean(value), stats.sem(value))
        np.testing.assert_allclose(bar.get_segments()[0], [[100 * end, row] for end in interval])
    assert bars[2] == ()
    axis = drawn(figures.forest({"16 layers": Summary(0.05, None, None, 1)}, "tiny", "points")).axes[0]
    assert axis.get_xlabel() == "points"  # one value has no interval to speak of


@pytest.mark.parametrize("name", ["two", "the teacher with another temperature, cosine way"])
def test_no_text_of_the_differences_is_cut_off(name):
    with plt.rc_context(lab_style()):
        differences = {name: summarise([0.01, 0.02])}
        title, xlabel = "cifar10-jpeg, width 16: what they add", "difference in test accuracy (points)"
        figure = drawn(figures.forest(differences, title, xlabel))
        (axis,) = figure.axes
        for text in (axis.title, axis.xaxis.label, *axis.get_yticklabels()):
            extent = text.get_window_extent()
            assert figure.bbox.x0 <= extent.x0
            assert extent.x1 <= figure.bbox.x1


# Accuracy by cost

ACCURACIES = {"plain": {2: [0.81, 0.83, 0.84], 1: [0.7, 0.74]}, "residual": {1: [0.75], 2: [0.85, 0.86]}}
NETWORKS = [(family, depth) for family in ACCURACIES for depth in (1, 2)]
COSTS = {
    "parameters": dict(zip(NETWORKS, [1e4, 2e5, 3e4, 4e6], strict=True)),
    "latency (ms)": dict(zip(NETWORKS, [0.5, 0.9, 1.5, 8.0], strict=True)),
}


def test_accuracy_by_cost_puts_each_network_at_its_cost_and_its_mean_in_percent():
    figure = drawn(figures.accuracy_by_cost(ACCURACIES, COSTS, "tiny"))
    assert [axis.get_xlabel() for axis in figure.axes] == ["parameters", "latency (ms)"]
    for axis, costs in zip(figure.axes, COSTS.values(), strict=True):
        assert axis.get_xscale() == "log"
        for container, family in zip(axis.containers, ACCURACIES, strict=True):
            expected = [[costs[family, depth], 100 * np.mean(ACCURACIES[family][depth])] for depth in (1, 2)]
            np.testing.assert_allclose(container[0].get_xydata(), expected)


def test_the_bars_of_accuracy_by_cost_are_scipys_intervals_and_one_seed_has_none():
    for axis in drawn(figures.accuracy_by_cost(ACCURACIES, COSTS, "tiny")).axes:
        plain, residual = axis.containers
        assert bar_ends(plain) == [pytest.approx(interval_in_percent(ACCURACIES["plain"][depth])) for depth in (1, 2)]
        assert bar_ends(residual) == [pytest.approx(interval_in_percent(ACCURACIES["residual"][2]))]


def test_accuracy_by_cost_writes_the_depth_beside_each_point_in_the_colour_of_its_family():
    for axis in drawn(figures.accuracy_by_cost(ACCURACIES, COSTS, "tiny")).axes:
        points = [tuple(point) for container in axis.containers for point in container[0].get_xydata()]
        assert [text.get_text() for text in axis.texts] == ["1", "2", "1", "2"]
        assert [text.xy for text in axis.texts] == [pytest.approx(point) for point in points]
        colors = [to_rgb(container[0].get_color()) for container in axis.containers]
        assert [to_rgb(text.get_color()) for text in axis.texts] == [color for color in colors for _ in range(2)]
        assert len(set(colors)) == 2
        assert len({container[0].get_linestyle() for container in axis.containers}) == 2
        assert len({container[0].get_marker() for container in axis.containers}) == 2


@pytest.mark.parametrize(
    ("values", "seeds"),
    [
        (ACCURACIES, "mean over seeds (n = 1 to 3), bars: 95 % interval"),
        ({"plain": {1: [0.7, 0.74], 2: [0.81, 0.83]}}, "mean over seeds (n = 2), bars: 95 % interval"),
        ({"plain": {1: [0.7]}}, "one seed"),
    ],
)
def test_accuracy_by_cost_names_the_data_set_families_and_n(values, seeds):
    figure = drawn(figures.accuracy_by_cost(values, COSTS, "tiny"))
    assert figure.get_suptitle() == f"tiny: {seeds}; numbers: depth"
    assert legend_texts(figure.axes[-1]) == list(values)
    assert figure.axes[0].get_ylabel() == "test accuracy (%)"
    assert len({axis.get_ylim() for axis in figure.axes}) == 1


def test_accuracy_by_cost_writes_large_costs_with_k_and_m():
    axis = drawn(figures.accuracy_by_cost(ACCURACIES, COSTS, "tiny")).axes[0]
    texts = {value: axis.xaxis.get_major_formatter()(value) for value in axis.get_xticks()}
    assert {value: texts[value] for value in (2e4, 5e5, 1e6)} == {2e4: "20 k", 5e5: "500 k", 1e6: "1 M"}
    milliseconds = figures.accuracy_by_cost(ACCURACIES, COSTS, "tiny").axes[1].xaxis.get_major_formatter()
    assert [milliseconds(value) for value in (0.5, 20)] == ["0.5", "20"]


def test_the_axis_of_accuracy_by_cost_ends_near_100_percent_where_an_interval_goes_beyond():
    values = {"plain": {1: [0.99, 1.0], 2: [0.9, 0.9, 0.91]}}
    assert interval_in_percent([0.99, 1.0])[1] > 105
    figure = drawn(figures.accuracy_by_cost(values, COSTS, "tiny"))
    for axis in figure.axes:
        assert 100 <= axis.get_ylim()[1] <= 101
        assert axis.get_ylim()[0] < 90


def test_the_axis_of_accuracy_by_cost_does_not_go_below_0_percent():
    values = {"plain": {1: [0.01, 0.05], 2: [0.3]}}
    assert interval_in_percent([0.01, 0.05])[0] < -20
    assert drawn(figures.accuracy_by_cost(values, COSTS, "tiny")).axes[0].get_ylim()[0] == 0


# Bars of a distillation

DISTILLATION = {
    "teacher, ResidualCNN-4": {0: 0.84, 1: 0.86, 2: 0.85},
    "baseline, ResidualCNN-1": {0: 0.70, 1: 0.74, 2: 0.75},
    "distilled": {0: 0.72, 1: 0.76, 2: 0.79},
}
PARAMETERS = {"teacher, ResidualCNN-4": 2_777_674, "baseline, ResidualCNN-1": 15_578, "distilled": 15_578}


def bars_for(values=DISTILLATION):
    return drawn(figures.distillation_bars(values, PARAMETERS, "tiny", chance=0.1))


def error_bars(axis) -> list[ErrorbarContainer]:
    return [container for container in axis.containers if isinstance(container, ErrorbarContainer)]


def test_distillation_bars_are_means_from_0_with_scipys_intervals_and_once_more_close_up():
    left, right = bars_for().axes
    means = [100 * np.mean(list(by_seed.values())) for by_seed in DISTILLATION.values()]
    assert [bar.get_height() for bar in left.patches] == pytest.approx(means)
    assert [bar.get_y() for bar in left.patches] == [0, 0, 0]
    assert left.get_ylim()[0] == 0
    assert [container[0].get_ydata()[0] for container in error_bars(right)] == pytest.approx(means)
    intervals = [interval_in_percent(list(by_seed.values())) for by_seed in DISTILLATION.values()]
    for axis in (left, right):
        ends = [end for container in error_bars(axis) for end in bar_ends(container)]
        assert ends == [pytest.approx(interval) for interval in intervals]
    assert len({to_rgb(bar.get_facecolor()) for bar in left.patches}) == 3
    assert [to_rgb(bar.get_facecolor()) for bar in left.patches] == [
        to_rgb(container[0].get_color()) for container in error_bars(right)
    ]


def test_distillation_bars_write_mean_and_interval_into_the_bars_and_the_parameters_below():
    left, right = bars_for().axes
    low, high = interval_in_percent([0.84, 0.86, 0.85])
    assert left.texts[0].get_text().split() == ["85.00", "%", "±", f"{(high - low) / 2:.2f}"]
    assert [text.get_text().split()[0] for text in left.texts] == ["85.00", "73.00", "75.67"]
    for bar, text in zip(left.patches, left.texts, strict=True):
        assert bar.get_x() < text.get_position()[0] < bar.get_x() + bar.get_width()
        assert 0 < text.get_position()[1] < bar.get_height()
    expected = ["teacher\nResidualCNN-4\n2,777,674 parameters", "baseline\nResidualCNN-1\n15,578 parameters"]
    for axis in (left, right):
        assert [label.get_text() for label in axis.get_xticklabels()] == [*expected, "distilled\n15,578 parameters"]


def test_distillation_bars_name_their_axis_data_set_and_n_and_mark_the_share_of_guessing():
    figure = bars_for()
    left, right = figure.axes
    assert figure.get_suptitle() == "tiny: mean over n = 3 seeds, error bars: 95 % interval of the mean"
    assert left.get_ylabel() == "test accuracy (%)"
    assert left.get_title() == "from 0 (dotted: guessing)"
    assert right.get_title() == "the same, close up (a thin line: one seed)"
    dotted = [line for line in left.get_lines() if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in dotted] == [pytest.approx([10, 10])]


def test_distillation_bars_join_what_belongs_to_one_seed_where_all_have_it():
    values = DISTILLATION | {"distilled": {2: 0.79, 3: 0.5, 0: 0.72}}
    right = bars_for(values).axes[1]
    seeds = [line for line in right.get_lines() if line.get_marker() == "."]
    assert [list(line.get_ydata()) for line in seeds] == [pytest.approx([84, 70, 72]), pytest.approx([85, 75, 79])]
    assert all(list(line.get_xdata()) == [0, 1, 2] for line in seeds)


def test_distillation_bars_of_one_seed_have_no_intervals_and_say_one_seed():
    figure = bars_for({name: {0: by_seed[0]} for name, by_seed in DISTILLATION.items()})
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == pytest.approx([84, 70, 72])
    assert error_bars(left) == []
    assert [bar_ends(container) for container in error_bars(right)] == [[], [], []]
    assert [text.get_text() for text in left.texts] == ["84.00 %", "70.00 %", "72.00 %"]
    assert figure.get_suptitle() == "tiny: one seed"


def test_distillation_bars_of_unequal_numbers_of_seeds_say_so():
    figure = bars_for(DISTILLATION | {"distilled": {0: 0.72}})
    assert figure.get_suptitle().startswith("tiny: mean over n = 1 to 3 seeds, ")
    assert [len(bar_ends(container)) for container in error_bars(figure.axes[1])] == [1, 1, 0]


def test_the_axes_of_distillation_bars_end_near_100_percent_where_an_interval_goes_beyond():
    values = DISTILLATION | {"teacher, ResidualCNN-4": {0: 0.99, 1: 1.0}}
    assert interval_in_percent([0.99, 1.0])[1] > 105
    left, right = bars_for(values).axes
    for axis in (left, right):
        assert 100 <= axis.get_ylim()[1] <= 101
    assert 0 < right.get_ylim()[0] < 70


def test_distillation_bars_draw_where_no_seed_is_common_to_all():
    right = bars_for(DISTILLATION | {"distilled": {7: 0.79}}).axes[1]
    assert not [line for line in right.get_lines() if line.get_marker() == "."]


# Heat map

GRID = pd.DataFrame([[70.5, 71.25], [72, 69], [68, 67.125]], index=[1.0, 4.0, 20.0], columns=[0.1, 0.9])
GRID = GRID.rename_axis(index="temperature", columns="weight")


def frames(marked) -> dict[str, Rectangle]:
    axis = drawn(figures.heat_map(GRID, "tiny", "accuracy (%)", marked)).axes[0]
    return {patch.get_label(): patch for patch in axis.patches}


def test_a_heat_map_writes_and_colours_the_numbers_of_its_table():
    figure = drawn(figures.heat_map(GRID, "tiny: grid", "validation accuracy (%)", {}))
    axis, bar = figure.axes
    assert [text.get_text() for text in axis.texts] == ["70.50", "71.25", "72.00", "69.00", "68.00", "67.12"]
    np.testing.assert_allclose(np.ravel(axis.collections[0].get_array()), GRID.to_numpy().ravel())
    assert (axis.get_ylabel(), axis.get_xlabel()) == ("temperature", "weight")
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1.0", "4.0", "20.0"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "0.9"]
    assert bar.get_ylabel() == "validation accuracy (%)"
    assert axis.get_title() == "tiny: grid"
    assert not axis.patches
    assert axis.get_legend() is None


@pytest.mark.parametrize("cell", [(row, column) for row in GRID.index for column in GRID.columns])
def test_a_heat_map_frames_the_marked_cell_around_its_own_number(cell):
    axis = drawn(figures.heat_map(GRID, "tiny", "accuracy (%)", {"best": cell})).axes[0]
    (frame,) = axis.patches
    inside = frame.get_window_extent()
    framed = [t.get_text() for t in axis.texts if inside.contains(*axis.transData.transform(t.get_position()))]
    assert framed == [f"{GRID.loc[cell]:.2f}"]
    assert not frame.get_fill()
    assert 0 < frame.get_width() < 1
    assert 0 < frame.get_height() < 1
    assert legend_texts(axis) == ["best"]


def test_two_marks_on_one_cell_are_told_apart_by_colour_dash_and_size():
    both = frames({"best": (4.0, 0.1), "used above": (4.0, 0.1)})
    assert list(both) == ["best", "used above"]
    outer, inner = both.values()
    assert to_rgb(outer.get_edgecolor()) != to_rgb(inner.get_edgecolor())
    assert outer.get_linestyle() != inner.get_linestyle()
    assert outer.get_x() < inner.get_x()
    assert inner.get_x() + inner.get_width() < outer.get_x() + outer.get_width()
    assert outer.get_y() < inner.get_y()
    assert inner.get_y() + inner.get_height() < outer.get_y() + outer.get_height()


@pytest.mark.parametrize("absent", [(3.0, 0.1), (4.0, 0.5), (0.1, 4.0)])
def test_a_mark_that_is_not_in_the_table_is_left_out_and_the_other_stays(absent):
    assert list(frames({"best": (20.0, 0.9), "used above": absent})) == ["best"]
    assert list(frames({"used above": absent, "best": (20.0, 0.9)})) == ["best"]
    axis = drawn(figures.heat_map(GRID, "tiny", "accuracy (%)", {"used above": absent})).axes[0]
    assert axis.get_legend() is None
    assert len(axis.texts) == 6


# Reliability

PROBABILITIES = torch.tensor([[0.6, 0.4], [0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])
CALIBRATION = {  # bins (0, 0.5] and (0.5, 1]: confidences 0.5, and 0.6, 0.8, 1.0
    "teacher": calibration(PROBABILITIES, torch.tensor([0, 0, 0, 1]), bins=2),
    "student": calibration(PROBABILITIES, torch.tensor([0, 1, 0, 0]), bins=2),
}
ERRORS = {"teacher": summarise([0.02, 0.04]), "student": Summary(0.0725, None, None, 1)}


def reliability():
    figure = drawn(figures.reliability(CALIBRATION, ERRORS, "tiny"))
    return figure, np.reshape(figure.axes, (2, 2))


def test_reliability_shows_accuracy_as_bars_over_the_bins_and_confidence_as_marks():
    _, panels = reliability()
    for axis, accuracies in zip(panels[0], ([0, 2 / 3], [1, 1]), strict=True):
        assert [bar.get_height() for bar in axis.patches] == pytest.approx(accuracies)
        assert [bar.get_x() + bar.get_width() / 2 for bar in axis.patches] == pytest.approx([0.25, 0.75])
        assert all(0.4 < bar.get_width() <= 0.5 for bar in axis.patches)
        confidence, diagonal = axis.get_lines()
        np.testing.assert_allclose(confidence.get_xydata(), [[0.5, 0.5], [0.8, 0.8]], rtol=1e-6)
        assert confidence.get_linestyle() == "None"
        np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])


def test_reliability_shows_the_share_of_images_of_each_bin_below():
    _, panels = reliability()
    for axis in panels[1]:
        assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.25, 0.75])
        assert [bar.get_x() + bar.get_width() / 2 for bar in axis.patches] == pytest.approx([0.25, 0.75])


def test_reliability_names_models_calibration_errors_and_n_and_gives_one_seed_no_interval():
    figure, panels = reliability()
    half_width = stats.t.ppf(0.975, 1) * stats.sem([0.02, 0.04])
    assert [axis.get_title() for axis in panels[0]] == [
        f"teacher\nECE 3.00 ± {100 * half_width:.2f} % (n = 2)",
        "student\nECE 7.25 % (n = 1)",
    ]
    assert figure.get_suptitle() == "tiny, test set: how far confidence can be trusted (all seeds together)"
    assert [axis.get_ylabel() for axis in panels[:, 0]] == ["accuracy", "share of images"]
    assert [axis.get_xlabel() for axis in panels[1]] == ["confidence"] * 2
    assert sorted(legend_texts(panels[0, 0])) == ["accuracy", "confidence"]
    for axis in panels[0]:
        assert (axis.get_xlim(), axis.get_ylim()) == ((0, 1), (0, 1))


def test_reliability_of_one_model_leaves_bins_without_images_empty():
    probabilities = torch.tensor([[0.95, 0.05], [0.42, 0.58], [0.45, 0.55]])
    table = calibration(probabilities, torch.tensor([0, 1, 0]), bins=10)
    above, below = drawn(figures.reliability({"net": table}, {"net": ERRORS["student"]}, "tiny")).axes
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in above.patches}
    assert bars == {0.55: pytest.approx(1 / 2), 0.95: pytest.approx(1)}
    assert [bar.get_height() for bar in below.patches] == pytest.approx([2 / 3, 1 / 3])
