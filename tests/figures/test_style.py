"""The lab's look, and the files of its figures."""

import pytest
import seaborn as sns
from drawing import histories

from lablib import figures
from lablib.statistics import summarise


def test_the_style_takes_the_colours_that_colour_blind_readers_tell_apart():
    assert sns.color_palette() == sns.color_palette("colorblind")


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
