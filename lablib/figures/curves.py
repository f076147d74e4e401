"""What changes by epoch, by layer, by depth: lines."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import offset_copy

from lablib.figures.style import DASHES, MARKERS, end_at_100
from lablib.statistics import summarise


def loss_curves(
    histories: pd.DataFrame,
    column: str,
    dataset: str,
    groups: Mapping[str, Sequence[str]] | None = None,
    figure: Figure | None = None,
) -> Figure:
    """A metric by epoch: the mean over seeds, and a band of one standard deviation where there are several.

    `histories` has the columns model, seed, epoch and `column`. `groups` names panels and the models in each. A mean
    ends where the first of its seeds ends, since beyond that it would be of other runs. An empty `figure` that is given
    is drawn into, such as one that pyplot does not show.
    """
    groups = groups or {"": list(histories["model"].unique())}
    size = (6.4 if len(groups) == 1 else 3.6 * len(groups) + 1, 4)
    figure = plt.figure(figsize=size) if figure is None else figure
    figure.set_size_inches(size)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False)
    for axis, (title, models) in zip(axes[0], groups.items(), strict=True):
        for model, color, dash in zip(models, cycle(sns.color_palette()), cycle(DASHES), strict=False):
            of_model = histories[histories["model"] == model]
            if of_model.empty:
                continue
            table = of_model.pivot(index="epoch", columns="seed", values=column).dropna()
            _mean_and_band(axis, table, f"{model} (n = {table.shape[1]})", color=color, linestyle=dash)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis.get_lines():
            axis.legend(fontsize="small")
    axes[0, 0].set_ylabel(_label(column))
    if column.endswith("loss"):
        axes[0, 0].set_ylim(bottom=0)
    several = histories.groupby("model")["seed"].nunique().max() > 1
    what = "mean over n seeds, band ± 1 standard deviation" if several else "one seed"
    figure.suptitle(f"{dataset}: {what}", fontsize="medium")
    return figure


def _mean_and_band(axis: Axes, table: pd.DataFrame, label: str, **line):
    """The mean of a table's columns (seeds) by its index (epochs), and a band of one standard deviation."""
    mean = table.mean(axis=1)
    axis.plot(mean.index, mean, label=label, **line)
    if table.shape[1] > 1:
        std = table.std(axis=1)
        axis.fill_between(mean.index, mean - std, mean + std, color=line["color"], alpha=0.2, linewidth=0)


def loss_terms(histories: pd.DataFrame, dataset: str, alpha: float) -> Figure:
    """What a distilled student minimises by epoch, in training and in validation: its two terms, weighted, and the sum.

    `histories` are those of one model, with the columns seed, epoch and train_ and val_ loss, soft_loss and hard_loss;
    the last two without their weights, `alpha` and 1 − `alpha`.
    """
    seeds = histories["seed"].nunique()
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4), sharey=True)
    terms = {"loss": ("total", 1.0), "soft_loss": ("teacher: α · T² · KL", alpha)}
    terms |= {"hard_loss": ("labels: (1 − α) · cross-entropy", 1 - alpha)}
    for axis, (part, title) in zip(axes, {"train": "training", "val": "validation"}.items(), strict=True):
        for (column, (label, weight)), color, dash in zip(terms.items(), sns.color_palette(), DASHES, strict=False):
            table = histories.pivot(index="epoch", columns="seed", values=f"{part}_{column}").dropna()
            _mean_and_band(axis, weight * table, label, color=color, linestyle=dash)
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("contribution to the loss (nats)")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(fontsize="small")
    band = ", band ± 1 standard deviation" if seeds > 1 else ""
    figure.suptitle(f"{dataset}: the distilled student's loss, α = {alpha:g}, n = {seeds}{band}", fontsize="medium")
    return figure


def _label(column: str) -> str:
    part, _, metric = column.partition("_")
    name = {"train": "training", "val": "validation", "test": "test"}.get(part, part)
    unit = " (cross-entropy, nats)" if metric == "loss" else ""
    return f"{name} {metric}{unit}"


def accuracy_by_depth(
    values: Mapping[str, Mapping[int, Sequence[float]]],
    dataset: str,
    chance: float | None = None,
    xlabel: str = "hidden layers or blocks",
) -> Figure:
    """Test accuracy against depth, a line a family: mean over seeds with the mean's 95 % interval.

    `values` gives for each family and depth the accuracies (fractions) of its seeds. With `chance`, the accuracy of
    guessing, the axis goes from 0 to 100 %; without it, it shows the range of the values. Families stand side by side
    at a depth, so that no bar hides another.
    """
    figure, axis = plt.subplots(figsize=(6.8, 4.2))
    for place, ((family, by_depth), color, dash, marker) in enumerate(
        zip(values.items(), cycle(sns.color_palette()), cycle(DASHES), cycle(MARKERS), strict=False)
    ):
        if not by_depth:
            continue  # all of its runs failed
        depths = sorted(by_depth)
        summaries = [summarise(by_depth[depth]) for depth in depths]
        means = [100 * s.mean for s in summaries]
        errors = [math.nan if s.ci95 is None else 100 * s.ci95 for s in summaries]  # nan: no bar
        seeds = _range_text([s.n for s in summaries])
        label = f"{family} (n = {seeds})"
        drawn = axis.errorbar(depths, means, errors, color=color, linestyle=dash, marker=marker, capsize=3, label=label)
        aside = offset_copy(axis.transData, figure, x=7 * (place - (len(values) - 1) / 2), units="points")
        for part in drawn.get_children():
            part.set_transform(aside)
    if chance is not None:
        axis.axhline(100 * chance, color="0.4", linewidth=1, linestyle=":")
        axis.text(0.01, 100 * chance, "guessing", va="bottom", color="0.4", transform=axis.get_yaxis_transform())
        axis.set_ylim(0, 103)
    else:
        end_at_100(axis)
    axis.set_xscale("log", base=2)
    ticks = sorted({depth for by_depth in values.values() for depth in by_depth})
    axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set(xlabel=xlabel, ylabel="test accuracy (%)")
    several = any(len(accuracies) > 1 for by_depth in values.values() for accuracies in by_depth.values())
    what = "mean over n seeds, bars: 95 % interval of the mean" if several else "one seed"
    axis.set_title(f"{dataset}: {what}", fontsize="medium")
    axis.legend(loc="best" if chance is None else "center left", fontsize="small")
    return figure


def runs_by_depth(panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], dataset: str) -> Figure:
    """Test accuracy against depth, a panel a way of training, a point a run, a line through each family's means.

    `panels` gives for each way, family and depth the accuracies (fractions) of the seeds. The panels share their axis,
    which shows the range of the values. Families stand side by side at a depth, so that no point hides another; a line
    has a gap where its family has no run.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(4.3 * len(panels) + 0.6, 4.2), sharey=True, squeeze=False)
    ticks = sorted({depth for values in panels.values() for by_depth in values.values() for depth in by_depth})
    for axis, (title, values) in zip(axes[0], panels.items(), strict=True):
        for place, ((family, by_depth), color, dash, marker) in enumerate(
            zip(values.items(), cycle(sns.color_palette()), cycle(DASHES), cycle(MARKERS), strict=False)
        ):
            if not by_depth:
                continue  # none of its runs is there
            aside = offset_copy(axis.transData, figure, x=6 * (place - (len(values) - 1) / 2), units="points")
            points = [(depth, 100 * accuracy) for depth in sorted(by_depth) for accuracy in by_depth[depth]]
            means = [(d, 100 * summarise(by_depth[d]).mean if d in by_depth else math.nan) for d in ticks]
            label = f"{family} (n = {_range_text([len(seeds) for seeds in by_depth.values()])})"
            drawn = axis.plot(*zip(*points, strict=True), marker, color=color, markersize=5, alpha=0.7)
            drawn += axis.plot(*zip(*means, strict=True), "_", color=color, linestyle=dash)
            for line in drawn:
                line.set_transform(aside)
            axis.plot([], [], marker=marker, markersize=5, color=color, linestyle=dash, label=label)
        axis.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        axis.margins(x=0.12)
        axis.set_xlabel("depth (stages)")
        axis.set_title(title, fontsize="medium")
        axis.legend(loc="lower right", fontsize="small")
    axes[0, 0].set_ylabel("test accuracy (%)")
    figure.suptitle(f"{dataset}: a point a run, lines through the means over n seeds", fontsize="medium")
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
                depths, sns.color_palette("viridis", len(depths)), cycle(DASHES), strict=False
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
