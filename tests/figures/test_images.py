"""Pictures, confusions and softened answers show what they were given."""

import numpy as np
import pytest
import seaborn as sns
import torch
from drawing import drawn
from matplotlib.colors import to_rgb

from lablib import figures


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


def test_an_image_grid_without_images_is_an_empty_figure():
    figure = drawn(figures.image_grid(torch.zeros(0, 1, 4, 4), [], title="tiny: nothing wrong"))
    assert figure.get_suptitle() == "tiny: nothing wrong"
    assert not any(axis.get_images() for axis in figure.axes)


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


CLASSES = ("ant", "bee", "cat", "dog")
LOGITS = torch.tensor([[4.0, 1.0, 0.5, 3.0], [0.0, 2.0, 5.0, 1.0]])
TEACHER = {T: (LOGITS / T).softmax(1) for T in (1, 20)}
PICTURES = torch.arange(2 * 3 * 16, dtype=torch.uint8).view(2, 3, 4, 4)


def softened(shown: int = 10, answers=TEACHER):
    """The panels of two images, image × (picture, temperatures); of class dog, which it mistakes for ant, and cat."""
    figure = drawn(figures.softened_answers(PICTURES, ["dog", "cat"], answers, CLASSES, "tiny: teacher", shown))
    return figure, np.reshape(figure.axes, (2, 1 + len(answers)))


def bars_of(axis) -> dict[str, float]:
    """Lengths of horizontal bars by their names, from top to bottom; the names are those of the axis' units."""
    names = {position: name for name, position in axis.yaxis.units._mapping.items()}
    middles = [(round(bar.get_y() + bar.get_height() / 2), bar.get_width()) for bar in axis.patches]
    return {names[position]: width for position, width in sorted(middles)}


def test_softened_answers_are_the_probabilities_of_each_image_at_each_temperature():
    _, panels = softened()
    for image in range(2):
        for column, temperature in enumerate((1, 20), start=1):
            bars = bars_of(panels[image, column])
            assert list(bars) == list(CLASSES)
            assert list(bars.values()) == pytest.approx(TEACHER[temperature][image].tolist())
            assert panels[image, column].get_xlim() == (0, 1)
            assert panels[image, column].get_ylim()[0] > panels[image, column].get_ylim()[1]  # the first class on top


def test_softened_answers_colour_the_true_class_and_no_other():
    _, panels = softened()
    for image, true in enumerate((3, 2)):
        for axis in panels[image, 1:]:
            colors = [to_rgb(bar.get_facecolor()) for bar in axis.patches]
            assert colors[true] == to_rgb(sns.color_palette()[1])
            assert {color for index, color in enumerate(colors) if index != true} == {to_rgb(sns.color_palette()[0])}


def test_softened_answers_show_the_likeliest_classes_only_the_same_at_all_temperatures():
    _, panels = softened(shown=2)
    assert [list(bars_of(axis)) for axis in panels[0, 1:]] == [["ant", "dog"]] * 2
    assert [list(bars_of(axis)) for axis in panels[1, 1:]] == [["bee", "cat"]] * 2
    assert list(bars_of(panels[1, 2]).values()) == pytest.approx(TEACHER[20][1, 1:3].tolist())


def test_softened_answers_show_the_pictures_with_their_true_classes_and_name_the_temperatures():
    figure, panels = softened()
    assert figure.get_suptitle() == "tiny: teacher"
    assert [axis.get_title() for axis in panels[:, 0]] == ["dog", "cat"]
    for axis, image in zip(panels[:, 0], PICTURES, strict=True):
        np.testing.assert_allclose(axis.get_images()[0].get_array(), image.permute(1, 2, 0).numpy() / 255, atol=1e-6)
    assert [axis.get_title() for axis in panels[0, 1:]] == ["T = 1", "T = 20"]
    assert [axis.get_xlabel() for axis in panels[1, 1:]] == ["probability"] * 2
    for first, second in panels[:, 1:]:
        assert [label.get_text() for label in first.get_yticklabels()] == list(CLASSES)
        assert not any(label.get_text() for label in second.get_yticklabels())


def test_softened_answers_of_one_image_at_one_temperature_are_one_row():
    one = {0.5: TEACHER[1][:1]}
    figure = drawn(figures.softened_answers(PICTURES[:1], ["dog"], one, CLASSES, "tiny"))
    picture, answers = figure.axes
    assert len(picture.get_images()) == 1
    assert answers.get_title() == "T = 0.5"
    assert answers.get_xlabel() == "probability"
    assert list(bars_of(answers).values()) == pytest.approx(TEACHER[1][0].tolist())
