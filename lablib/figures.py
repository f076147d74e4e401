"""Results -> figures."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lablib.statistics import Summary, summarise

_MARKERS = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
_STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "lablib",  # the same figure gives the same file
    "savefig.dpi": 150,
}


def use_style():
    """Set the lab's look for all figures of a notebook, with colours that colour-blind readers tell apart."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc=_STYLE)


def save(figure: Figure, *paths: str | Path) -> Figure:
    """Write a figure to each path, in the format of its suffix, without a date, so that it is reproducible."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return figure


def loss_curves(
    histories: pd.DataFrame, column: str, dataset: str, groups: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """A metric by epoch: the mean over seeds, and a band of one standard deviation where there are several.

    `histories` has the columns model, seed, epoch and `column`. `groups` names panels and the models in each. A mean
    ends where the first of its seeds ends, since beyond that it would be of other runs.
    """
    groups = groups or {"": list(histories["model"].unique())}
    width = 6.4 if len(groups) == 1 else 3.6 * len(groups) + 1
    figure, axes = plt.subplots(1, len(groups), figsize=(width, 4), sharey=True, squeeze=False)
    for axis, (title, models) in zip(axes[0], groups.items(), strict=True):
        for model, color, dash in zip(models, cycle(sns.color_palette()), cycle(_DASHES), strict=False):
            of_model = histories[histories["model"] == model]
            if of_model.empty:
                continue
            table = of_model.pivot(index="epoch", columns="seed", values=column).dropna()
            mean = table.mean(axis=1)
            axis.plot(mean.index, mean, linestyle=dash, color=color, label=f"{model} (n = {table.shape[1]})")
            if table.shape[1] > 1:
                std = table.std(axis=1)
                axis.fill_between(mean.index, mean - std, mean + std, color=color, alpha=0.2, linewidth=0)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_lines():
            axis.legend(fontsize="small")
    axes[0, 0].set_ylabel(_label(column))
    if column.endswith("loss"):
        axes[0, 0].set_ylim(bottom=0)
    figure.suptitle(f"{dataset}: mean over n seeds, band ± 1 standard deviation", fontsize="medium")
    return figure


def _label(column: str) -> str:
    part, _, metric = column.partition("_")
    name = {"train": "training", "val": "validation", "test": "test"}.get(part, part)
    unit = " (cross-entropy, nats)" if metric == "loss" else ""
    return f"{name} {metric}{unit}"


def accuracy_by_depth(values: Mapping[str, Mapping[int, Sequence[float]]], dataset: str, chance: float) -> Figure:
    """Test accuracy against depth, a line a family: mean over seeds with the mean's 95 % interval.

    `values` gives for each family and depth the accuracies (fractions) of its seeds; `chance` is that of guessing.
    """
    figure, axis = plt.subplots(figsize=(6.8, 4.2))
    for (family, by_depth), color, dash, marker in zip(
        values.items(), cycle(sns.color_palette()), cycle(_DASHES), cycle(_MARKERS), strict=False
    ):
        depths = sorted(by_depth)
        summaries = [summarise(by_depth[depth]) for depth in depths]
        means = [100 * s.mean for s in summaries]
        errors = [math.nan if s.ci95 is None else 100 * s.ci95 for s in summaries]  # nan: no bar
        seeds = _range_text([s.n for s in summaries])
        label = f"{family} (n = {seeds})"
        axis.errorbar(depths, means, errors, color=color, linestyle=dash, marker=marker, capsize=3, label=label)
    axis.axhline(100 * chance, color="0.4", linewidth=1, linestyle=":")
    axis.text(0.01, 100 * chance, "guessing", va="bottom", color="0.4", transform=axis.get_yaxis_transform())
    axis.set_xscale("log", base=2)
    ticks = sorted({depth for by_depth in values.values() for depth in by_depth})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axis.set_ylim(0, 103)
    axis.set(xlabel="hidden layers or blocks", ylabel="test accuracy (%)")
    axis.set_title(f"{dataset}: mean over n seeds, bars: 95 % interval of the mean", fontsize="medium")
    axis.legend(loc="center left", fontsize="small")
    return figure


def _range_text(counts: list[int]) -> str:
    return str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def gradient_norms(norms: pd.DataFrame, dataset: str, column: str = "rms") -> Figure:
    """Gradient by layer, a panel a moment, a line a model and depth.

    `norms` has the columns moment, model, depth, seed, layer and `column`. Layers are drawn by their relative position,
    0 the first and 1 the last, so that networks of different depths compare. Lines are geometric means over seeds;
    where a gradient is 0 there is none.
    """
    moments = list(norms["moment"].unique())
    families = list(norms["model"].unique())
    depths = sorted(norms["depth"].unique())
    figure, axes = plt.subplots(
        len(moments), len(families), figsize=(2.8 * len(families) + 1, 3.0 * len(moments)), sharey=True, squeeze=False
    )
    for row, moment in zip(axes, moments, strict=True):
        for axis, family in zip(row, families, strict=True):
            for depth, color, dash in zip(
                depths, sns.color_palette("viridis", len(depths)), cycle(_DASHES), strict=False
            ):
                part = norms.query("moment == @moment and model == @family and depth == @depth")
                if part.empty:
                    continue
                logarithms = np.log(part[column].where(part[column] > 0))  # 0 has none: a gap
                mean = np.exp(logarithms.groupby(part["layer"]).mean())
                position = (mean.index - 1) / max(1, mean.index.max() - 1)
                axis.plot(position, mean, linestyle=dash, color=color, label=f"{depth}")
            axis.set_yscale("log")
            axis.set_title(f"{family}, {moment}", fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("position (0: first layer, 1: last)")
    for axis in axes[:, 0]:
        axis.set_ylabel("gradient, root mean square" if column == "rms" else "gradient norm")
    axes[0, -1].legend(title="layers or blocks", fontsize="x-small", title_fontsize="x-small", loc="best")
    seeds = norms["seed"].nunique()
    figure.suptitle(f"{dataset}: loss gradient by layer, geometric mean, n = {seeds}", fontsize="medium")
    return figure


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
        picture = image.permute(1, 2, 0).squeeze(-1).float().clamp(0, 255) / 255
        axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        if titles:
            axis.set_title(titles[index], fontsize="x-small", pad=2)
    figure.suptitle(title, fontsize="medium")
    return figure


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


def forest(differences: Mapping[str, Summary], title: str, xlabel: str) -> Figure:
    """Differences with their 95 % intervals, one a row, beside the line of no difference."""
    figure, axis = plt.subplots(figsize=(6.4, 0.6 * len(differences) + 1.4))
    for row, difference in enumerate(differences.values()):
        error = None if difference.ci95 is None else 100 * difference.ci95
        color = sns.color_palette()[0]
        axis.errorbar(100 * difference.mean, row, xerr=error, fmt="o", capsize=4, color=color)
        axis.annotate(
            f"{100 * difference.mean:+.2f}, n = {difference.n}",
            (100 * difference.mean, row), (0, 7), textcoords="offset points", ha="center", fontsize="x-small",
        )  # fmt: skip
    axis.set_ylim(len(differences) - 0.5, -0.7)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(differences)), labels=list(differences))
    axis.set_xlabel(xlabel)
    axis.set_title(title, fontsize="medium")
    return figure
