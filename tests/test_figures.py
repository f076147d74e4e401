"""Figures show the numbers that they were given: all of them, legibly, and no interval that means little."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats
from scripted import frame_of

from lablib import figures
from lablib.statistics import compare


@pytest.fixture(autouse=True)
def _the_labs_style_and_no_figure_left_open():
    with matplotlib.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def drawn(figure: Figure) -> list[Axes]:
    """The axes of a figure in which nothing is cut off and no legend covers data."""
    figure.canvas.draw()
    content, size = figure.get_tightbbox(), figure.get_size_inches()
    assert (content.min >= -0.02).all()
    assert (content.max <= size + 0.02).all()
    for legend in [*figure.legends, *(axis.get_legend() for axis in figure.axes)]:
        for axis in figure.axes if legend else []:
            assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    return figure.axes


TERMS = {"loss": 1, "soft_loss": 0.75, "hard_loss": 0.25}  # and their weights


def histories_of(models: dict[str, list[int]]) -> pd.DataFrame:
    """Noise for each model and seed, of so many epochs each; the best accuracy comes twice."""
    generator = np.random.default_rng(0)
    rows = [
        {"model": model, "seed": seed, "epoch": epoch, "val_accuracy": 0.9 if epoch in (2, 3) else 0.8}
        | {f"{part}_{term}": generator.uniform(0.1, 1) for part in ("train", "val") for term in TERMS}
        for model, lengths in models.items()
        for seed, length in enumerate(lengths)
        for epoch in range(1, length + 1)
    ]
    return pd.DataFrame(rows)


def seed_lines(axis: Axes) -> list[list[float]]:
    return sorted(line.get_ydata().tolist() for line in axis.get_lines() if len(line.get_xdata()))  # no legend's


def averages(axis: Axes) -> list:
    """The line of each family, in their order."""
    lines = [line for line in axis.get_lines() if len(line.get_xdata())]
    return [line for line in lines if "None" not in (line.get_marker(), line.get_linestyle())]


def bar_ends(axis: Axes, place: int) -> list[np.ndarray]:
    """Low and high end of each error bar of a family that can be seen."""
    container = [container for container in axis.containers if isinstance(container, ErrorbarContainer)][place]
    segments = [np.asarray(segment) for bars in container[2] for segment in bars.get_segments()]
    return [s for s in segments if len(s) and np.isfinite(s).all()]


def interval(values) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))


def test_loss_curves_are_one_whole_line_per_seed_on_a_logarithmic_axis_with_the_kept_epoch_marked():
    table = histories_of({"plain": [6, 4, 5], "residual": [3]})
    panels = {"both": ["plain", "residual"], "one": ["plain", "missing"]}
    figure = figures.loss_curves(table, "val_loss", "cifar10-jpeg", panels)
    axis, other = drawn(figure)
    assert seed_lines(axis) == sorted(part["val_loss"].tolist() for _, part in table.groupby(["model", "seed"]))
    kept = table[table["epoch"] == 2]  # the first of equals
    expected = sorted(kept[["epoch", "val_loss"]].to_numpy().tolist())
    np.testing.assert_allclose(sorted(axis.collections[0].get_offsets().tolist()), expected)
    assert (axis.get_yscale(), axis.get_ylim()) == ("log", other.get_ylim())
    assert "(n = 1 to 3)" in figure.get_suptitle()


def test_loss_terms_are_drawn_with_their_weights():
    table = histories_of({"student": [4, 3]})
    for axis, part in zip(drawn(figures.loss_terms(table, "cifar10-jpeg", 0.75)), ("train", "val"), strict=True):
        runs = [run for _, run in table.groupby("seed")]
        expected = sorted((w * run[f"{part}_{t}"]).tolist() for run in runs for t, w in TERMS.items())
        assert list(map(pytest.approx, seed_lines(axis))) == expected


ACCURACIES = {"plain-2": [0.8, 0.82, 0.85], "plain-8": [0.6, 0.7], "residual-2": [0.9], "residual-8": [0.9, 0.93, 0.92]}


def test_accuracy_by_depth_has_a_point_per_run_means_and_an_interval_from_three_seeds_on():
    panels = {"one": frame_of(ACCURACIES), "again": frame_of(ACCURACIES)}
    errors = {model: 100 * (1 - np.array(values)) for model, values in ACCURACIES.items()}
    for axis in drawn(figures.accuracy_by_depth(panels, "cifar10-jpeg")):
        dots = axis.collections[0].get_offsets()[:, 1]
        np.testing.assert_allclose(np.sort(dots), np.sort(np.concatenate(list(errors.values()))))
        plain, residual = averages(axis)
        np.testing.assert_allclose(plain.get_ydata(), [errors["plain-2"].mean(), errors["plain-8"].mean()])
        for place, model in enumerate(("plain-2", "residual-8")):
            (ends,) = bar_ends(axis, place)
            np.testing.assert_allclose(ends[:, 1], interval(errors[model]))
        assert len({(line.get_color(), line.get_linestyle()) for line in (plain, residual)}) == 2
        assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "8"]
        assert (plain.get_xdata() < residual.get_xdata()).all()  # no family hides another


def gradients_of(models: list[str]) -> pd.DataFrame:
    """Noise for each layer, before and after training, with two seeds."""
    layers = {model: range(1, int(model.split("-")[1]) + 2) for model in models}
    keys = [(m, s, when, i) for m in models for s in range(2) for when in ("initial", "trained") for i in layers[m]]
    table = pd.DataFrame(keys, columns=["model", "seed", "when", "layer"])
    return table.assign(rms=np.random.default_rng(0).uniform(0.1, 1, len(table)))


def test_gradient_ratios_stand_above_the_errors_of_the_same_depths():
    gradients = gradients_of(list(ACCURACIES))
    gradients.loc[(gradients["model"] == "plain-8") & (gradients["layer"] == 1), "rms"] = 0  # vanished: a gap
    above, below = drawn(figures.gradient_ratio(gradients, frame_of(ACCURACIES), "cifar10-jpeg", chance=0.1))
    assert above.get_yscale() == "log"
    rms = gradients.query("model == 'plain-2' and when == 'initial'")["rms"].to_numpy().reshape(2, 3)  # seeds × layers
    plain, residual = averages(above)
    np.testing.assert_allclose(plain.get_ydata(), [stats.gmean(rms[:, 0] / rms[:, 1]), 0])  # which is not drawn
    np.testing.assert_array_equal(residual.get_xdata(), averages(below)[1].get_xdata())
    assert any(line.get_ydata() == pytest.approx([90, 90]) for line in below.get_lines())


def test_gradient_norms_are_geometric_means_by_relative_position():
    gradients = gradients_of(["plain-2", "plain-4", "residual-2"])
    axes = drawn(figures.gradient_norms(gradients, "cifar10-jpeg"))
    rms = gradients.query("model == 'plain-2' and when == 'initial'").groupby("layer")["rms"].apply(stats.gmean)
    np.testing.assert_allclose(axes[0].get_lines()[0].get_xydata(), np.transpose([[0, 0.5, 1], rms]))
    assert len(axes) == 4


def test_accuracy_by_cost_puts_each_network_at_its_cost():
    costs = pd.DataFrame({"parameters": dict(zip(ACCURACIES, [10, 20, 30, 4000], strict=True))})
    (axis,) = drawn(figures.accuracy_by_cost(frame_of(ACCURACIES), costs, "cifar10-jpeg"))
    assert axis.get_xscale() == "log"
    expected = [[10, 100 * np.mean(ACCURACIES["plain-2"])], [20, 65]]
    np.testing.assert_allclose(averages(axis)[0].get_xydata(), expected)


@pytest.mark.parametrize("n", [2, 5])
def test_paired_differences_are_a_dot_per_seed_their_mean_and_an_interval_from_three_seeds_on(n):
    values = {"A": [0.91, 0.93, 0.95, 0.94, 0.96], "B": [0.9, 0.91, 0.915, 0.95, 0.92]}
    pairs = {"a rather long name of a comparison between two networks": ("A", "B"), "back": ("B", "A")}
    comparison = compare(frame_of({model: v[:n] for model, v in values.items()}), pairs)
    (axis,) = drawn(figures.paired_differences(comparison, "cifar10-jpeg", "A − B"))
    _, dots, mean = axis.get_lines()[:3]
    expected = 100 * np.subtract(values["A"][:n], values["B"][:n])
    np.testing.assert_allclose(dots.get_xdata(), expected)
    assert mean.get_xdata() == pytest.approx([expected.mean()])
    ends = [interval(expected)] if n >= 3 else []
    np.testing.assert_allclose([segment[:, 0] for segment in bar_ends(axis, 0)], ends)


def test_distillation_has_bars_from_0_and_a_line_per_seed_with_the_gain_in_the_title():
    values = {"Net-4": [0.84, 0.86, 0.85], "Net-2": [0.7, 0.74, 0.75], "Distilled-2": [0.72, 0.76, 0.79]}
    roles = {"teacher": "Net-4", "student alone": "Net-2", "distilled student": "Distilled-2"}
    figure = figures.distillation(frame_of(values), roles, "cifar10-jpeg", chance=0.1)
    left, right = drawn(figure)
    assert left.get_ylim()[0] == 0
    assert [bar.get_height() for bar in left.patches] == pytest.approx([85, 73, 100 * np.mean(values["Distilled-2"])])
    ends = [np.nanmin(line.get_ydata()) for line in left.get_lines()[:-1]]
    assert ends == pytest.approx([interval(100 * np.array(v))[0] for v in values.values()])
    np.testing.assert_allclose(seed_lines(right), [[84, 70, 72], [85, 75, 79], [86, 74, 76]])
    assert "distilled student − student alone: +2.67" in figure.get_suptitle()
    assert "1,000 parameters\n85.00" in left.get_xticklabels()[0].get_text()


def test_a_distillation_grid_marks_the_best_cell_and_the_used_one():
    cells = [(t, a, s, 0.5 + t / 100 + a / 10 + s / 50) for t in (1, 4, 8) for a in (0.1, 0.9) for s in (0, 1)]
    frame = pd.DataFrame(cells, columns=["temperature", "alpha", "seed", "val_accuracy"])
    figure = figures.distillation_grid(frame[1:], "cifar10-jpeg", (4, 0.9), alone=0.5)
    expected = ["54.00", "61.00", "56.00", "64.00\nused", "60.00", "68.00\nbest"]
    assert [text.get_text() for text in drawn(figure)[0].texts] == expected
    assert "n = 1 to 2" in figure.get_suptitle()


def test_reliability_draws_the_accuracy_of_bins_with_equally_many_images():
    confidence = np.linspace(0.4, 1, 150)
    right = pd.DataFrame({"model": "right", "confidence": confidence, "correct": True})
    half = pd.DataFrame({"model": "half", "confidence": confidence, "correct": [True, False] * 75})
    (axis,) = drawn(figures.reliability(pd.concat([right, half]), {"right": [0.3], "half": [0.2]}, "cifar10-jpeg"))
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.lines}
    assert lines["right: calibration error 30.00 % (1 seed)"] == [1] * 15
    assert lines["half: calibration error 20.00 % (1 seed)"] == [0.5] * 15


def test_a_confusion_matrix_writes_all_counts_and_colours_the_mistakes():
    matrix = np.array([[50, 1, 0], [2, 40, 3], [0, 7, 30]])
    axis, _ = drawn(figures.confusion_matrix(matrix, ("cat", "dog", "a long name"), "pictures"))
    assert [int(text.get_text()) for text in axis.texts] == matrix.flatten().tolist()
    np.testing.assert_array_equal(axis.collections[0].get_array(), [[0, 1, 0], [2, 0, 3], [0, 7, 0]])


def test_softened_predictions_are_the_likeliest_classes_with_a_bar_for_each_temperature():
    logits = torch.linspace(-3, 3, 12).flip(0).roll(5)[None]  # class 5 is the likeliest, then class 6
    answers = {T: (logits / T).softmax(1) for T in (1, 20)}
    names, pictures = [f"class {i}" for i in range(12)], torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    _, bars = drawn(figures.softened_predictions(pictures, ["class 7"], answers, names, "cifar10-jpeg"))
    order = [(5 + i) % 12 for i in range(10)]
    assert [label.get_text() for label in bars.get_xticklabels()] == [names[i] for i in order]
    expected = [answers[T][0, i].item() for T in answers for i in order]
    assert [bar.get_height() for bar in bars.patches] == pytest.approx(expected)
