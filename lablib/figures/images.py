"""Pictures with what is said about them, and who is mistaken for whom."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def image_grid(
    images: torch.Tensor, titles: Sequence[str] | None = None, columns: int = 8, title: str = "", size: float = 1.1
) -> Figure:
    """Images (uint8, or float from 0 to 255; images × channels × height × width) in a grid, each with its title."""
    rows = max(1, -(-len(images) // columns))
    height = size * (1.35 if titles else 1.05) * rows + (0.4 if title else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, height), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (axis, image) in enumerate(zip(axes.flat, images, strict=False)):
        _show(axis, image)
        if titles:
            axis.set_title(titles[index], fontsize="x-small", pad=2)
    figure.suptitle(title, fontsize="medium")
    return figure


def _show(axis: Axes, image: torch.Tensor):
    picture = image.permute(1, 2, 0).squeeze(-1).float().clamp(0, 255) / 255
    axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Counts of images, true classes in rows and predicted ones in columns; the colours show the mistakes only."""
    mistakes = matrix - np.diag(np.diag(matrix))
    side = max(4.0, 0.5 * len(class_names) + 1)
    figure, axis = plt.subplots(figsize=(side + 0.8, side))
    sns.heatmap(
        mistakes, annot=matrix, fmt="d", cmap="rocket_r", square=True, ax=axis,
        cbar_kws={"label": "mistaken images", "ticks": MaxNLocator(integer=True)},
        xticklabels=class_names, yticklabels=class_names, annot_kws={"fontsize": "x-small"},
    )  # fmt: skip
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_title(title, fontsize="medium")
    return figure


def softened_answers(
    images: torch.Tensor,
    labels: Sequence[str],
    answers: Mapping[float, torch.Tensor],
    class_names: Sequence[str],
    title: str,
    shown: int = 10,
) -> Figure:
    """What a teacher says of some images at several temperatures: an image a row, a temperature a column.

    `images` as for `image_grid`, `labels` their true classes' names, `answers` probabilities (images × classes) by
    temperature. The bars are the `shown` classes that the teacher finds likeliest, the true one in another colour.
    """  # fmt: skip
    figure, axes = plt.subplots(
        len(images), 1 + len(answers), figsize=(1.9 + 2.5 * len(answers), 0.9 + 1.75 * len(images)), squeeze=False,
        width_ratios=[1, *[1.4] * len(answers)],
    )  # fmt: skip
    palette = sns.color_palette()
    for index, row in enumerate(axes):
        _show(row[0], images[index])
        row[0].set_title(labels[index], fontsize="small")
        order = next(iter(answers.values()))[index].argsort(descending=True)[:shown].sort().values.tolist()
        names = [class_names[i] for i in order]
        colors = [palette[1] if name == labels[index] else palette[0] for name in names]
        for axis, (temperature, probabilities) in zip(row[1:], answers.items(), strict=True):
            axis.barh(names, probabilities[index][order].tolist(), color=colors)
            axis.set_xlim(0, 1)
            axis.invert_yaxis()
            axis.tick_params(labelsize="xx-small", length=0)
            axis.grid(axis="y", visible=False)
            if index == 0:
                axis.set_title(f"T = {temperature:g}", fontsize="small")
            if index == len(images) - 1:
                axis.set_xlabel("probability", fontsize="small")
            if axis is not row[1]:
                axis.set_yticklabels([])
    figure.suptitle(title, fontsize="medium")
    return figure
