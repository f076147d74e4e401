"""Every figure draws, and shows the numbers that it was given."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
import torch
from matplotlib.colors import to_rgb
from scipy import stats

from lablib import figures
from lablib.statistics import Summary, summarise


@pytest.fixture(autouse=True)
def _the_labs_style_and_no_figure_left_open():
    with matplotlib.rc_context():
        figures.use_style()
        yield
    plt.close("all")


def drawn(figure):
    """The figure, after everything in it has been rendered once."""
    figure.canvas.draw()
    return figure


def legend_texts(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def histories(models: dict[str, list[int]]) -> pd.DataFrame:
    """Noise for each model and seed, of so many epochs each."""
    generator = np.random.default_rng(0)
    rows = [
        {"model": model, "seed": seed, "epoch": epoch, "val_loss": generator.random(), "val_accuracy": 0.9}
        for model, lengths in models.items()
        for seed, length in enumerate(lengths)
        for epoch in range(1, length + 1)
    ]
    return pd.DataFrame(rows)


def by_epoch(table: pd.DataFrame, model: str, epochs: int) -> np.ndarray:
    """val_loss, seeds × epochs."""
    parts = [part.sort_values("epoch")["val_loss"] for _, part in table[table["model"] == model].groupby("seed")]
    return np.stack([part.to_numpy()[:epochs] for part in parts])


def test_the_style_takes_the_colours_that_colour_blind_readers_tell_apart():
    assert sns.color_palette() == sns.color_palette("colorblind")


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


def test_accuracy_by_depth_names_its_axes_data_set_depths_and_the_share_of_guessing():
    axis = drawn(figures.accuracy_by_depth(ACCURACIES, "tiny", chance=0.1)).axes[0]
    assert axis.get_xlabel() == "hidden layers or blocks"
    assert axis.get_ylabel() == "test accuracy (%)"
    assert axis.get_title() == "tiny: mean over n seeds, bars: 95 % interval of the mean"
    assert legend_texts(axis) == ["plain (n = 2 to 3)", "residual (n = 1 to 3)"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "8"]
    assert [text.get_text() for text in axis.texts] == ["guessing"]
    assert any(list(line.get_ydata()) == [10, 10] for line in axis.get_lines())


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


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_grid_shows_every_image_with_its_title(channels, dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, channels, 4, 6), generator=generator, dtype=torch.uint8)
    titles = [f"image {index}" for index in range(5)]
    figure = drawn(figures.image_grid(images.to(dtype), titles, columns=3, title="tiny: mistakes"))
    assert figure.get_suptitle() == "tiny: mistakes"
    assert len(figure.axes) == 6
    assert [axis.get_title() for axis in figure.axes] == [*titles, ""]
    shown = [axis.get_images()[0] for axis in figure.axes[:5]]
    assert not figure.axes[5].get_images()
    for image, picture in zip(images, shown, strict=True):
        expected = image.permute(1, 2, 0).numpy() / 255
        np.testing.assert_allclose(picture.get_array(), expected.squeeze(-1) if channels == 1 else expected, atol=1e-6)
        assert picture.get_clim() == (0, 1)


def test_an_image_grid_needs_no_titles_and_clips_what_is_out_of_range():
    images = torch.tensor([-20.0, 100.0, 300.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    figure = drawn(figures.image_grid(images))
    shown = [axis.get_images()[0].get_array() for axis in figure.axes[:3]]
    np.testing.assert_allclose([picture[0, 0] for picture in shown], [0, 100 / 255, 1], atol=1e-6)
    assert len(figure.axes) == 8


def test_a_confusion_matrix_writes_all_counts_and_colours_the_mistakes():
    matrix = np.array([[50, 1, 0], [2, 40, 3], [0, 7, 30]])
    figure = drawn(figures.confusion_matrix(matrix, ("cat", "dog", "fox"), "tiny: seed 0"))
    axis, bar = figure.axes
    assert [int(text.get_text()) for text in axis.texts] == matrix.flatten().tolist()
    colours = axis.collections[0].get_array()
    np.testing.assert_array_equal(np.reshape(colours, (3, 3)), [[0, 1, 0], [2, 0, 3], [0, 7, 0]])
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("predicted", "true")
    assert bar.get_ylabel() == "mistaken images"
    assert axis.get_title() == "tiny: seed 0"
    for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "fox"]


def test_a_forest_shows_each_difference_with_its_interval_and_n_beside_no_difference():
    values = {"2 layers": [0.01, 0.02, 0.015], "8 layers": [-0.2, -0.1]}
    differences = {name: summarise(v) for name, v in values.items()} | {"16 layers": Summary(0.05, None, None, 1)}
    axis = drawn(figures.forest(differences, "tiny: residual less plain", "difference (percentage points)")).axes[0]
    assert axis.get_title() == "tiny: residual less plain"
    assert axis.get_xlabel() == "difference (percentage points)"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2 layers", "8 layers", "16 layers"]
    assert [text.get_text() for text in axis.texts] == ["+1.50, n = 3", "-15.00, n = 2", "+5.00, n = 1"]
    assert any(list(line.get_xdata()) == [0, 0] for line in axis.get_lines())
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first on top
    bars = [container[2] for container in axis.containers]
    for row, (value, (bar,)) in enumerate(zip(values.values(), bars[:2], strict=True)):
        interval = stats.t.interval(0.95, len(value) - 1, np.mean(value), stats.sem(value))
        np.testing.assert_allclose(bar.get_segments()[0], [[100 * end, row] for end in interval])
    assert bars[2] == ()


def test_save_writes_png_and_svg_and_makes_the_folder(tmp_path):
    figure = figures.forest({"a": summarise([0.1, 0.2])}, "tiny", "points")
    png, svg = tmp_path / "new" / "forest.png", tmp_path / "new" / "forest.svg"
    assert figures.save(figure, png, str(svg)) is figure
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert b"<svg" in svg.read_bytes()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_figure_saved_or_drawn_twice_is_the_same_file(tmp_path, suffix):
    paths = [tmp_path / f"{name}.{suffix}" for name in ("first", "again", "anew")]
    table = histories({"plain": [3, 3], "residual": [3]})
    figures.save(figures.loss_curves(table, "val_loss", "tiny"), *paths[:2])
    figures.save(figures.loss_curves(table, "val_loss", "tiny"), paths[2])
    first, again, anew = (path.read_bytes() for path in paths)
    assert first == again
    assert first == anew
    figures.save(figures.loss_curves(table, "val_loss", "other"), paths[2])
    assert paths[2].read_bytes() != first


def test_depths_and_models_are_told_apart_by_six_line_styles():
    names = [f"model {index}" for index in range(6)]
    axis = figures.loss_curves(histories({name: [2] for name in names}), "val_loss", "tiny").axes[0]
    assert len({(line.get_linestyle(), str(line._dash_pattern)) for line in axis.get_lines()}) == 6


def test_an_image_grid_without_images_is_an_empty_figure():
    figure = drawn(figures.image_grid(torch.zeros(0, 1, 4, 4), [], title="tiny: nothing wrong"))
    assert figure.get_suptitle() == "tiny: nothing wrong"
    assert not any(axis.get_images() for axis in figure.axes)
