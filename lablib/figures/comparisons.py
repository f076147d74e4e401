"""Models side by side: differences, costs, gains, calibration."""

import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lablib.figures.style import DASHES, HALO, MARKERS, end_at_100
from lablib.statistics import Summary, summarise


def forest(differences: Mapping[str, Summary], title: str, xlabel: str) -> Figure:
    """Differences, one a row, beside the line of no difference; where n > 1, with their 95 % intervals."""
    width = max(6.4, 4.5 + 0.08 * max(map(len, differences), default=0))  # inches; room for the texts beside long names
    figure, axis = plt.subplots(figsize=(width, 0.6 * len(differences) + 1.4))
    for row, difference in enumerate(differences.values()):
        error = None if difference.ci95 is None else 100 * difference.ci95
        color = sns.color_palette()[0]
        axis.errorbar(100 * difference.mean, row, xerr=error, fmt="o", capsize=4, color=color)
        axis.annotate(
            f"{100 * difference.mean:+.2f}, n = {difference.n}",
            (100 * difference.mean, row), (0, 7), textcoords="offset points", ha="center", fontsize="x-small",
            path_effects=[HALO],
        )  # fmt: skip
    axis.set_ylim(len(differences) - 0.5, -0.7)
    axis.margins(x=0.15)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(range(len(differences)), labels=list(differences))
    intervals = any(difference.ci95 is not None for difference in differences.values())
    axis.set_xlabel(f"{xlabel}, 95 % interval" if intervals else xlabel)
    axis.set_title(title, fontsize="medium")
    return figure


def accuracy_by_cost(
    values: Mapping[str, Mapping[int, Sequence[float]]],
    costs: Mapping[str, Mapping[tuple[str, int], float]],
    dataset: str,
) -> Figure:
    """Test accuracy against what a network costs, a panel a cost, a line a family, a point a depth, named beside it.

    `values` gives for each family and depth the accuracies (fractions) of its seeds; `costs` for each axis label the
    cost by family and depth, drawn on a logarithmic scale.
    """
    figure, axes = plt.subplots(1, len(costs), figsize=(4.6 * len(costs) + 0.6, 4.2), sharey=True, squeeze=False)
    for axis, (label, by_network) in zip(axes[0], costs.items(), strict=True):
        for (family, by_depth), color, dash, marker, offset in zip(
            values.items(),
            cycle(sns.color_palette()),
            cycle(DASHES),
            cycle(MARKERS),
            cycle(((6, -11), (-11, -11), (6, 5))),
            strict=False,
        ):
            depths = sorted(by_depth)
            x = [by_network[family, depth] for depth in depths]
            summaries = [summarise(by_depth[depth]) for depth in depths]
            means = [100 * s.mean for s in summaries]
            errors = [math.nan if s.ci95 is None else 100 * s.ci95 for s in summaries]
            axis.errorbar(x, means, errors, color=color, linestyle=dash, marker=marker, capsize=3, label=family)
            for position, mean, depth in zip(x, means, depths, strict=True):
                axis.annotate(
                    str(depth), (position, mean), offset, textcoords="offset points", fontsize="x-small", color=color,
                    path_effects=[HALO],
                )  # fmt: skip
        axis.margins(x=0.09, y=0.09)  # room for the depths beside the points
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(_short))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(axis="x", labelsize="small")
        axis.set_xlabel(label)
    axes[0, 0].set_ylabel("test accuracy (%)")
    end_at_100(axes[0, 0])
    axes[0, -1].legend(loc="lower right", fontsize="small")  # more costly networks are seldom worse
    n = sorted({len(accuracies) for by_depth in values.values() for accuracies in by_depth.values()})
    seeds = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}"
    what = f"mean over seeds ({seeds}), bars: 95 % interval" if n[-1] > 1 else "one seed"
    figure.suptitle(f"{dataset}: {what}; numbers: depth", fontsize="medium")
    return figure


def _short(value: float, position: int) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g} M"
    return f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"


def distillation_bars(
    values: Mapping[str, Mapping[int, float]], parameters: Mapping[str, int], dataset: str, chance: float
) -> Figure:
    """Teacher, baseline and distilled student: accuracy as bars from 0, and again close up, a line a seed.

    `values` gives for each network the test accuracies (fractions) by seed, in the order of the bars, `parameters` the
    number of its parameters; a name may have two parts ("teacher, ResidualCNN-4"). Error bars are 95 % intervals.
    """
    summaries = {name: summarise(list(by_seed.values())) for name, by_seed in values.items()}
    positions = range(len(values))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.4, 4.4))
    colors = sns.color_palette()
    for position, (name, summary) in enumerate(summaries.items()):
        error = None if summary.ci95 is None else 100 * summary.ci95
        left.bar(position, 100 * summary.mean, width=0.65, yerr=error, capsize=5, color=colors[position], label=name)
        spread = "" if error is None else f"\n± {error:.2f}"
        text = f"{100 * summary.mean:.2f} %{spread}"
        left.text(position, 45 * summary.mean, text, ha="center", color="white", weight="bold", fontsize="small")
        right.errorbar(position, 100 * summary.mean, error, fmt="_", markersize=26, capsize=5, color=colors[position])
    left.axhline(100 * chance, color="0.4", linewidth=1, linestyle=":")
    left.set_ylim(0, 101)
    left.set(ylabel="test accuracy (%)", title="from 0 (dotted: guessing)")
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values.values())))
    for seed in seeds:
        right.plot(
            positions, [100 * by_seed[seed] for by_seed in values.values()], color="0.45", linewidth=1, marker=".",
        )  # fmt: skip
    right.set(title="the same, close up (a thin line: one seed)")
    right.margins(x=0.2)
    end_at_100(right)
    ticks = [name.replace(", ", "\n") + f"\n{parameters[name]:,} parameters" for name in values]
    for axis in (left, right):
        axis.set_xticks(positions, labels=ticks)
        axis.tick_params(axis="x", labelsize="x-small")
        axis.title.set_fontsize("small")
        axis.grid(axis="x", visible=False)
    n = sorted({summary.n for summary in summaries.values()})
    what = f"mean over {_seeds(n)}, error bars: 95 % interval of the mean" if n[-1] > 1 else "one seed"
    figure.suptitle(f"{dataset}: {what}", fontsize="medium")
    return figure


def _seeds(n: Sequence[int]) -> str:
    return f"n = {n[0]} seeds" if len(n) == 1 else f"n = {n[0]} to {n[-1]} seeds"


def heat_map(table: pd.DataFrame, title: str, label: str, marked: Mapping[str, tuple[float, float]]) -> Figure:
    """A table of percentages as colours with their numbers, rows and columns by its index's and columns' names.

    `marked` frames cells by their (row, column), with the names that explain the frames in the legend.
    """
    figure, axis = plt.subplots(figsize=(1.15 * table.shape[1] + 2.6, 0.7 * table.shape[0] + 2.2))
    sns.heatmap(table, annot=True, fmt=".2f", cmap="viridis", ax=axis, cbar_kws={"label": label}, linewidths=1)
    for (name, (row, column)), color, dash in zip(marked.items(), ("white", "red"), ("-", "--"), strict=False):
        if row in table.index and column in table.columns:
            corner = (table.columns.get_loc(column), table.index.get_loc(row))
            inset = 0.05 if dash == "-" else 0.1
            axis.add_patch(
                Rectangle(
                    (corner[0] + inset, corner[1] + inset), 1 - 2 * inset, 1 - 2 * inset, fill=False, edgecolor=color,
                    linestyle=dash, linewidth=2.5, label=name,
                )
            )  # fmt: skip
    if axis.patches:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, facecolor="0.6", frameon=True)
    axis.tick_params(axis="y", rotation=0)
    axis.set_title(title, fontsize="medium")
    return figure


def reliability(tables: Mapping[str, pd.DataFrame], errors: Mapping[str, Summary], dataset: str) -> Figure:
    """Reliability diagrams, a panel a model: accuracy by confidence above, and the share of images below.

    `tables` are those of `lablib.diagnostics.calibration`, `errors` the expected calibration errors over seeds. A bar
    below the diagonal is a network that is right less often than it says.
    """
    figure, axes = plt.subplots(
        2, len(tables), figsize=(3.1 * len(tables) + 0.6, 4.4), sharex=True, sharey="row", squeeze=False,
        height_ratios=[3, 1],
    )  # fmt: skip
    for column, (name, table) in enumerate(tables.items()):
        above, below = axes[:, column]
        width = (table["high"] - table["low"]) * 0.92
        centre = (table["high"] + table["low"]) / 2
        above.bar(centre, table["accuracy"], width=width, color=sns.color_palette()[0], label="accuracy")
        above.plot(table["confidence"], table["confidence"], linestyle="", marker="_", color="0.2", label="confidence")
        above.plot([0, 1], [0, 1], color="0.4", linestyle=":", linewidth=1)
        below.bar(centre, table["images"] / table["images"].sum(), width=width, color="0.6")
        error = errors[name]
        spread = "" if error.ci95 is None else f" ± {100 * error.ci95:.2f}"
        above.set_title(f"{name}\nECE {100 * error.mean:.2f}{spread} % (n = {error.n})", fontsize="small")
        below.set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of images")
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].legend(fontsize="x-small", loc="upper left")
    figure.suptitle(f"{dataset}, test set: how far confidence can be trusted (all seeds together)", fontsize="medium")
    return figure
