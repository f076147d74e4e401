"""Tables -> figures. Accuracies come as fractions and are drawn in percent; each figure names its data set and n."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import gmean

from lablib.statistics import compare, gradient_ratios, labels, points, summarise, with_depth

DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
MARKERS = ("o", "s", "^", "D", "v", "P")
CAPTION = "one point per run, mean and 95 % interval (from three seeds on)"
MIN_IMAGES = 30  # in a bin of a reliability diagram: the accuracy of fewer says little


def use_style():
    """Set the lab's look for all figures of a notebook."""
    style = {
        "figure.dpi": 110,
        "savefig.dpi": 150,
        "svg.hashsalt": "lablib",  # the same figure gives the same file
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlesize": "medium",
        "figure.titlesize": "medium",
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "legend.fontsize": "small",
    }
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc=style)


def save(figure: Figure, *paths: str | Path) -> Figure:
    """Write a figure to each path, in the format of its suffix and without a date, so that it is reproducible."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return figure


def loss_curves(
    histories: pd.DataFrame, column: str, dataset: str, panels: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """A column of the histories by epoch, one line per seed, a dot at the epoch whose weights are kept.

    `histories` also has model, seed, epoch, val_accuracy; `panels` gives for each title its models.
    """
    panels = panels or {"": list(histories["model"].unique())}
    figure, axes = _row_of_axes(len(panels))
    part, metric = column.split("_", 1)
    what = {"train": "training", "val": "validation"}[part] + f" {metric}"
    for axis, (title, models) in zip(axes, panels.items(), strict=True):
        axis.set(title=title, yscale="log" if metric.endswith("loss") else "linear")
        table = histories[histories["model"].isin(models)]
        if not table.empty:
            seeds = table.groupby("model")["seed"].nunique()
            names = {model: f"{model} (n = {seeds[model]})" for model in models if model in seeds}
            table = table.assign(model=table["model"].map(names)).reset_index(drop=True)
            best = table.loc[table.groupby(["model", "seed"])["val_accuracy"].idxmax()]
            _line_per_seed(axis, table, column, "model", list(names.values()))
            look = {"hue": "model", "hue_order": list(names.values()), "palette": _colors(len(names)), "legend": False}
            sns.scatterplot(best, x="epoch", y=column, **look, s=30, zorder=3, ax=axis)
    axes[0].set_ylabel(f"{what} (cross-entropy, nats)" if metric == "loss" else what)
    if metric.endswith("loss"):
        _label_log(axes[0].yaxis)
    figure.suptitle(f"{dataset}: {what}\none line per seed, dot: best validation accuracy")
    return figure


def loss_terms(histories: pd.DataFrame, dataset: str, alpha: float) -> Figure:
    """A distilled student's loss by epoch and its two terms, weighted by `alpha` and 1 − `alpha`, one line per seed."""
    soft, hard = "teacher: α · T² · KL", "labels: (1 − α) · cross-entropy"
    terms = {"total": ("loss", 1), soft: ("soft_loss", alpha), hard: ("hard_loss", 1 - alpha)}
    figure, axes = _row_of_axes(2)
    for axis, (part, title) in zip(axes, {"train": "training", "val": "validation"}.items(), strict=True):
        tables = [
            histories[["seed", "epoch"]].assign(term=term, value=weight * histories[f"{part}_{column}"])
            for term, (column, weight) in terms.items()
        ]
        _line_per_seed(axis, pd.concat(tables, ignore_index=True), "value", "term", list(terms))
        axis.set_title(title)
    axes[0].set(ylabel="contribution to the loss (nats)", ylim=(0, None))
    n = histories["seed"].nunique()
    figure.suptitle(f"{dataset}: the distilled student's loss, α = {alpha:g}, one line per seed (n = {n})")
    return figure


def _colors(count: int) -> list:
    return sns.color_palette("colorblind", count)


def _row_of_axes(count: int) -> tuple[Figure, np.ndarray]:
    size = (max(6.8, 4.4 * count), 4.4)
    figure, axes = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, axes[0]


def _line_per_seed(axis: Axes, table: pd.DataFrame, column: str, kind: str, order: list[str]):
    """Values by epoch, one thin line per seed; colours, dashes and the legend by the column `kind`."""
    look = {"hue": kind, "hue_order": order, "style": kind, "style_order": order, "palette": _colors(len(order))}
    sns.lineplot(table, x="epoch", y=column, **look, units="seed", estimator=None, linewidth=1, ax=axis)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(axis)


def _legend_below(axis: Axes):
    entries = len(axis.get_legend_handles_labels()[1])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2 if entries > 3 else 1)


def _label_log(axis: Axis):
    """Plain numbers along a logarithmic axis, also where it spans less than a decade."""
    low, high = axis.get_view_interval()
    subs = (1,) if high > 300 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=subs) if high > 10 * low else MaxNLocator(6))
    axis.set_major_formatter(EngFormatter(sep=" ") if high > 1e3 else "{x:g}")
    axis.set_minor_formatter(NullFormatter())


def accuracy_by_depth(
    frames: pd.DataFrame | Mapping[str, pd.DataFrame], dataset: str, chance: float | None = None, xlabel: str = "depth"
) -> Figure:
    """Test error by depth of models such as "ResidualMLP-8", a line per family through the means, a point per run.

    Several frames are panels, titled by their keys; `chance` is the accuracy of guessing (a fraction).
    """
    frames = {"": frames} if isinstance(frames, pd.DataFrame) else frames
    table = with_depth(pd.concat(frames, names=["panel"]).reset_index("panel").reset_index(drop=True))
    figure, axes = _row_of_axes(len(frames))
    for axis, title in zip(axes, frames, strict=True):
        _error_by_depth(axis, table[table["panel"] == title], table, chance)
        axis.set(xlabel=xlabel, title=title)
        _legend_below(axis)
    axes[0].set_ylabel("test error (%)")
    figure.suptitle(f"{dataset}: test error by depth\n{CAPTION}")
    return figure


def gradient_ratio(
    gradients: pd.DataFrame, frame: pd.DataFrame, dataset: str, chance: float | None = None, xlabel: str = "depth"
) -> Figure:
    """By depth, above: the ratio of `lablib.statistics.gradient_ratios` before training; below: the test error.

    The lines go through the geometric means above and the means below. A ratio of 0 leaves a gap.
    """
    errors, ratios = with_depth(frame), with_depth(gradient_ratios(gradients[gradients["moment"] == "initial"]))
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.8, 7.4), sharex=True, layout="constrained")
    above.set(yscale="log", ylabel="gradient of the first layer /\nthat of the last hidden layer")
    _by_depth(
        above,
        ratios.assign(value=ratios["ratio"].where(ratios["ratio"] > 0)),
        errors,
        lambda values: (gmean(values), np.nan, np.nan),
    )
    above.axhline(1, color="0.4", linewidth=1, linestyle=":")
    _error_by_depth(below, errors, errors, chance)
    below.set(xlabel=xlabel, ylabel="test error (%)")
    _legend_below(below)
    figure.suptitle(f"{dataset}: gradients before training, test error after it, by depth")
    return figure


def accuracy_by_cost(frame: pd.DataFrame, costs: pd.DataFrame, dataset: str) -> Figure:
    """Test accuracy by cost. `costs` has the models as index and a column per panel, such as "parameters"."""
    table = with_depth(frame[["model", "seed", "test_accuracy"]])
    figure, axes = _row_of_axes(len(costs.columns))
    for axis, cost in zip(axes, costs, strict=True):
        placed = table.assign(x=table["model"].map(costs[cost]), value=100 * table["test_accuracy"])
        axis.set(xscale="log", xlabel=cost)
        _line_per_family(axis, placed, table["family"].unique(), _mean_and_interval)
        for (x, depth), value in placed.groupby(["x", "depth"])["value"].mean().items():
            axis.annotate(str(depth), (x, value), (7, -10), textcoords="offset points", fontsize="small")
        axis.margins(y=0.1)
        _label_log(axis.xaxis)
        _legend_below(axis)
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle(f"{dataset}: test accuracy by cost (numbers: depth)\n{CAPTION}")
    return figure


def _error_by_depth(axis: Axes, table: pd.DataFrame, whole: pd.DataFrame, chance: float | None):
    errors = 100 * (1 - whole["test_accuracy"])
    logarithmic = errors.min() > 0 and errors.max() > 10 * errors.min()
    axis.set_yscale("log" if logarithmic else "linear")
    _by_depth(axis, table.assign(value=100 * (1 - table["test_accuracy"])), whole, _mean_and_interval)
    if chance is not None:
        axis.axhline(100 * (1 - chance), color="0.4", linewidth=1, linestyle=":")
        where = {"xycoords": axis.get_yaxis_transform(), "textcoords": "offset points"}
        axis.annotate("guessing", (0.01, 100 * (1 - chance)), (0, 3), **where, color="0.4", fontsize="small")
    if logarithmic:
        _label_log(axis.yaxis)


def _by_depth(axis: Axes, table: pd.DataFrame, whole: pd.DataFrame, average: Callable):
    """Values by depth; families and depths look and lie as in `whole`, whose other rows are in other panels."""
    depths = sorted(whole["depth"].unique())
    _line_per_family(axis, table.assign(x=table["depth"].map(depths.index)), whole["family"].unique(), average, 0.09)
    axis.set_xticks(range(len(depths)), labels=depths)


def _line_per_family(axis: Axes, table: pd.DataFrame, families: Sequence[str], average: Callable, spread: float = 0):
    """`value` by `x`, one point per run, and a line through each family's averages; `spread` keeps families apart.

    `average` gives for some values their centre and the ends of its interval.
    """
    for index, look in enumerate(zip(families, cycle(_colors(10)), cycle(DASHES), cycle(MARKERS), strict=False)):
        family, color, dash, marker = look
        part = table[table["family"] == family].dropna(subset="value")
        if part.empty:
            continue  # none of its runs finished
        shift = spread * (index - (len(families) - 1) / 2)
        by_x = part.groupby("x")["value"]
        centre, low, high = np.transpose([average(values) for _, values in by_x])
        axis.plot(part["x"] + shift, part["value"], marker, color=color, markersize=4, alpha=0.4)
        line = {"color": color, "linestyle": dash, "marker": marker, "label": f"{family} ({_n(by_x.count())})"}
        axis.errorbar(by_x.count().index + shift, centre, [centre - low, high - centre], **line, capsize=3)


def _n(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def _mean_and_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean of percentages and the ends of its interval, which stay between 0 and 100; NaN where there is none."""
    summary = summarise(values)
    return summary.mean, *np.clip([summary.mean - summary.ci95, summary.mean + summary.ci95], 0, 100)


def gradient_norms(gradients: pd.DataFrame, dataset: str) -> Figure:
    """Gradient by relative position of the layer: a column per family, a row per moment, a line per depth.

    `gradients` has one row per layer: model ("ResidualMLP-8"), seed, moment, layer (from 1), rms.
    """
    table = with_depth(gradients)
    table["position"] = (table["layer"] - 1) / (table.groupby("model")["layer"].transform("max") - 1)
    grid = sns.relplot(
        table[table["rms"] > 0], kind="line", x="position", y="rms", col="family", row="moment", hue="depth",
        style="depth", palette="viridis", estimator=gmean, errorbar=None, height=2.9, aspect=0.95,
    )  # fmt: skip
    grid.set(yscale="log").set_titles("{col_name}, {row_name}")
    grid.set_axis_labels("layer (0: first, 1: last)", "gradient (root mean square)")
    n = _n(table.groupby("model")["seed"].nunique())
    grid.figure.suptitle(f"{dataset}: loss gradient by layer, geometric mean over seeds ({n})")
    grid.tight_layout()
    return grid.figure


def paired_differences(comparison: pd.DataFrame, dataset: str, title: str) -> Figure:
    """A table of `lablib.statistics.compare`: for each row a dot per seed, and below them their mean and interval."""
    names = [f"{label} (n = {n})" for label, n in zip(labels(comparison), comparison["n"], strict=True)]
    width = 5.5 + 0.08 * max(map(len, names), default=0)  # inches
    figure, axis = plt.subplots(figsize=(width, 0.6 * len(names) + 1.8), layout="constrained")
    axis.axvline(0, color="0.4", linewidth=1)
    for place, row in enumerate(comparison.itertuples()):
        dots = 100 * np.array([*row.by_seed.values()])
        axis.plot(dots, [place - 0.1] * row.n, "o", color=_colors(1)[0], alpha=0.5)
        face = "black" if row.significant else "white"
        mean = {"fmt": "D", "color": "black", "markerfacecolor": face, "markersize": 5, "capsize": 3}
        axis.errorbar(100 * row.mean, place + 0.15, xerr=100 * row.ci95, **mean)
    axis.set_yticks(range(len(names)), labels=names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.margins(x=0.08)
    legend = "circle: one seed; diamond: mean, filled if significant; bar: 95 % interval"
    axis.set_xlabel(f"difference in test accuracy (percentage points)\n{legend}", fontsize="small")
    figure.suptitle(f"{dataset}: {title}")
    return figure


def distillation(frame: pd.DataFrame, names: Mapping[str, str], dataset: str, chance: float) -> Figure:
    """Accuracy as bars, and one line per seed close up, of the models by role: teacher, student alone, distilled."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    accuracies = 100 * frame.pivot(index="seed", columns="model", values="test_accuracy")
    accuracies = accuracies.reindex(columns=names.values())
    parameters = frame.groupby("model")["parameters"].first().reindex(names.values())
    for place, color in enumerate(_colors(3)):
        values = accuracies.iloc[:, place].dropna()  # a teacher may be the student itself
        if values.empty:
            continue  # none of its runs finished
        mean, low, high = _mean_and_interval(values)
        left.bar(place, mean, width=0.65, yerr=[[mean - low], [high - mean]], capsize=4, color=color)
        text = f"{mean:.2f} %\nn = {len(values)}"
        left.text(place, mean / 2, text, ha="center", va="center", color="white", weight="bold")
        right.errorbar(place, mean, [[mean - low], [high - mean]], fmt="_", markersize=28, capsize=4, color=color)
    left.axhline(100 * chance, color="0.2", linewidth=1, linestyle=":")
    left.set(ylim=(0, 101), ylabel="test accuracy (%)", title="mean (dotted: guessing)")
    right.plot(range(len(names)), accuracies.T, color="0.4", linewidth=1, marker=".")
    rows = zip(names.items(), parameters, strict=True)
    ticks = [f"{role}\n{model}\n{number:,.0f} parameters" for (role, model), number in rows]
    for axis in (left, right):
        axis.set_xticks(range(len(names)), labels=ticks, fontsize="x-small")
        axis.grid(axis="x", visible=False)
    right.margins(x=0.15)
    right.set_title("close up: one line per seed")
    _, alone, distilled = names
    gain = compare(frame, {"gain": (names[distilled], names[alone])}).to_dict("records")
    what = f"{distilled} − {alone}: {points(gain[0])}" if gain else f"{distilled} and {alone} share no seed"
    figure.suptitle(f"{dataset}\n{what}")
    return figure


def distillation_grid(
    frame: pd.DataFrame, dataset: str, used: tuple[float, float] | None = None, alone: float | None = None
) -> Figure:
    """Mean validation accuracy by temperature and alpha; frames mark the best cell and the `used` one.

    `frame` has temperature, alpha, seed and val_accuracy; `alone` is the accuracy without a teacher (a fraction).
    """
    table = 100 * frame.pivot_table(index="temperature", columns="alpha", values="val_accuracy")
    rows, columns = table.shape
    figure, axis = plt.subplots(figsize=(max(5.6, columns + 2.4), 0.65 * rows + 2.4), layout="constrained")
    sns.heatmap(table, annot=True, fmt=".2f", cmap="Blues", linewidths=1, ax=axis,
                cbar_kws={"label": "validation accuracy (%)"})  # fmt: skip
    marked = {"best": (table.stack().idxmax(), "white", "-", 0.05), "used": (used, "red", "--", 0.11)}
    for name, (cell, color, dash, inset) in marked.items():
        if cell and cell[0] in table.index and cell[1] in table.columns:
            corner = table.columns.get_loc(cell[1]) + inset, table.index.get_loc(cell[0]) + inset
            look = {"edgecolor": color, "linestyle": dash, "linewidth": 2.5, "label": name}
            axis.add_patch(Rectangle(corner, 1 - 2 * inset, 1 - 2 * inset, fill=False, **look))
    axis.tick_params(axis="y", rotation=0)
    axis.set(xlabel="α, the weight of the teacher's term", ylabel="temperature T")
    figure.legend(loc="outside lower center", ncols=2, facecolor="0.6", frameon=True)
    n = _n(frame.groupby(["temperature", "alpha"])["seed"].nunique())
    axis.set_title(f"{dataset}, {n}" + ("" if alone is None else f"; without a teacher: {100 * alone:.2f} %"))
    return figure


def reliability(tables: Mapping[str, pd.DataFrame], errors: Mapping[str, Sequence[float]], dataset: str) -> Figure:
    """Accuracy by confidence, and the share of images below, one column per model.

    `tables` are those of `lablib.diagnostics.calibration`; `errors` the expected calibration error of each seed.
    """
    size = (max(6.4, 3.1 * len(tables) + 0.6), 4.8)
    options = {"sharex": True, "sharey": "row", "squeeze": False, "height_ratios": [3, 1], "layout": "constrained"}
    figure, axes = plt.subplots(2, len(tables), figsize=size, **options)
    for (above, below), (name, table) in zip(axes.T, tables.items(), strict=True):
        bars = {"width": table["high"] - table["low"], "align": "edge", "edgecolor": "white"}
        below.bar(table["low"], table["images"] / table["images"].sum(), color="0.6", **bars)
        above.bar(table["low"], table["accuracy"].where(table["images"] >= MIN_IMAGES), **bars)
        above.plot([0, 1], [0, 1], color="0.2", linestyle=":", linewidth=1)
        above.set_title(f"{name}\ncalibration error {summarise(errors[name]).percent()}", fontsize="small")
        below.set_xlabel("confidence")
    axes[0, 0].set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), ylabel="accuracy")
    axes[1, 0].set_ylabel("share of\nimages")
    title = f"{dataset}, test set: a bar below the dotted line is overconfident"
    figure.suptitle(f"{title}\n(bins of {MIN_IMAGES} images or more)")
    return figure


def image_grid(
    images: torch.Tensor, titles: Sequence[str] | None = None, columns: int = 8, title: str = "", size: float = 1.1
) -> Figure:
    """Images (uint8, or float from 0 to 255; images × channels × height × width), each with its title."""
    rows = max(1, -(-len(images) // columns))
    height = size * (1.35 if titles else 1.05) * rows + (0.4 if title else 0)
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, height), squeeze=False, layout="constrained")
    for axis in axes.flat[len(images) :]:
        axis.set_axis_off()
    for axis, image, text in zip(axes.flat, images, titles or [""] * len(images), strict=False):
        _show(axis, image)
        axis.set_title(text, fontsize="x-small", pad=2)
    figure.suptitle(title)
    return figure


def _show(axis: Axes, image: torch.Tensor):
    picture = image.permute(1, 2, 0).squeeze(-1).float().clamp(0, 255) / 255
    axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Counts of images, true classes in rows and predicted ones in columns; the colours show the mistakes only."""
    side = max(4.0, 0.5 * len(class_names) + 1)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    sns.heatmap(
        matrix - np.diag(np.diag(matrix)), annot=matrix, fmt="d", cmap="rocket_r", square=True, ax=axis,
        cbar_kws={"label": "misclassified images", "ticks": MaxNLocator(integer=True)},
        xticklabels=class_names, yticklabels=class_names, annot_kws={"fontsize": "x-small"},
    )  # fmt: skip
    axis.tick_params(axis="y", rotation=0)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    return figure


def softened_answers(
    images: torch.Tensor,
    labels: Sequence[str],
    answers: Mapping[float, torch.Tensor],
    class_names: Sequence[str],
    title: str,
    shown: int = 10,
) -> Figure:
    """A teacher's probabilities of the `shown` likeliest classes: one row per image, one column per temperature.

    `labels` are the true classes' names, `answers` probabilities (images × classes) by temperature.
    """
    size = (1.9 + 2.5 * len(answers), 0.9 + 1.75 * len(images))
    ratios = [1, *[1.4] * len(answers)]
    options = {"figsize": size, "squeeze": False, "width_ratios": ratios, "layout": "constrained"}
    figure, axes = plt.subplots(len(images), len(ratios), **options)
    for index, (picture, *panels) in enumerate(axes):
        _show(picture, images[index])
        picture.set_title(labels[index], fontsize="small")
        order = next(iter(answers.values()))[index].argsort(descending=True)[:shown].sort().values.tolist()
        names = [class_names[i] for i in order]
        colors = [_colors(2)[name == labels[index]] for name in names]
        for axis, (temperature, probabilities) in zip(panels, answers.items(), strict=True):
            axis.barh(names, probabilities[index][order].tolist(), color=colors)
            axis.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
            axis.tick_params(labelsize="xx-small", length=0, labelleft=axis is panels[0])
            axis.grid(axis="y", visible=False)
            axis.set_title(f"T = {temperature:g}" if index == 0 else "", fontsize="small")
            axis.set_xlabel("probability" if index == len(images) - 1 else "", fontsize="small")
    figure.suptitle(title)
    return figure
