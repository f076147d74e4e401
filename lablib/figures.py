"""Tables -> figures. Accuracies come as fractions and are drawn in percent; each figure names its data set and n."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.stats import gmean
from sklearn.calibration import CalibrationDisplay

from lablib.statistics import compare, gradient_ratios, labels, points, seeds_text, summarise, with_depth

LINES = "one line per seed, dot: best validation accuracy"
DOTS = "one point per run, mean and 95 % interval (three or more seeds)"
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}  # a legend that covers no data


def use_style():
    """Set the lab's look for all figures of a notebook."""
    style = {"figure.dpi": 110, "savefig.dpi": 150, "svg.hashsalt": "lablib"}  # the salt makes files reproducible
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"figure.titlesize": "medium", "axes.titlesize": "medium"}
    style |= {"legend.frameon": False, "legend.fontsize": "small"}
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", rc=style)


def save(figure: Figure, *paths: str | Path) -> Figure:
    """Write a figure to each path, in the format of its suffix and without a date, so that it is reproducible."""
    for path in paths:
        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        figure.set_layout_engine("none")  # keeps the present layout, which takes long to compute again
    return figure


def loss_curves(
    histories: pd.DataFrame, column: str, dataset: str, panels: Mapping[str, Sequence[str]] | None = None
) -> Figure:
    """A loss by epoch: the column "train_loss" or "val_loss". `panels` gives for each title its models."""
    what = {"train_loss": "training loss", "val_loss": "validation loss"}[column]
    panels = panels or {"": list(histories["model"].unique())}
    figure, axes = _row_of_axes(len(panels))
    for axis, (title, models) in zip(axes, panels.items(), strict=True):
        _line_per_seed(axis, histories[histories["model"].isin(models)], column, "model")
        axis.set(title=title, yscale="log")
    axes[0].set_ylabel(f"{what} (cross-entropy, nats)")
    _label_log(axes[0].yaxis)
    figure.suptitle(f"{dataset}: {what} ({_seeds(histories, 'model')})\n{LINES}")
    return figure


def loss_terms(histories: pd.DataFrame, dataset: str, alpha: float) -> Figure:
    """A distilled student's loss by epoch and its two terms, weighted by `alpha` and 1 − `alpha`."""
    figure, axes = _row_of_axes(2)
    for axis, part, title in zip(axes, ("train", "val"), ("training", "validation"), strict=True):
        terms = {
            "total": histories[f"{part}_loss"],
            "teacher: α · T² · KL": alpha * histories[f"{part}_soft_loss"],
            "labels: (1 − α) · cross-entropy": (1 - alpha) * histories[f"{part}_hard_loss"],
        }
        keys = ["seed", "epoch", "val_accuracy"]
        _line_per_seed(axis, histories[keys].assign(**terms).melt(keys, var_name="term"), "value", "term")
        axis.set_title(title)
    axes[0].set(ylabel="contribution to the loss (nats)", ylim=(0, None))
    figure.suptitle(f"{dataset}: the distilled student's loss, α = {alpha:g} ({_seeds(histories, 'model')})\n{LINES}")
    return figure


def _seeds(table: pd.DataFrame, *by: str) -> str:
    """Numbers of seeds by these columns, or of a comparison, in the tables' words; "n = 3 to 5" where they differ."""
    counts = table.groupby([*by])["seed"].nunique() if by else table["n"]
    low, high = counts.min(), counts.max()
    return f"n = {low} to {high}" if low < high else seeds_text(low)


def _row_of_axes(count: int) -> tuple[Figure, np.ndarray]:
    size = (max(6.8, 4.4 * count), 4.4)
    figure, axes = plt.subplots(1, count, figsize=size, sharey=True, squeeze=False, layout="constrained")
    return figure, axes[0]


def _line_per_seed(axis: Axes, table: pd.DataFrame, column: str, kind: str):
    """Values by epoch, a thin line per seed, a dot at the epoch whose weights are kept; looks and legend by `kind`."""
    table = table.reset_index(drop=True)
    look = {"x": "epoch", "y": column, "hue": kind, "palette": "colorblind", "ax": axis}
    sns.lineplot(table, **look, style=kind, units="seed", estimator=None, linewidth=1)
    best = table.loc[table.groupby([kind, "seed"])["val_accuracy"].idxmax()]
    sns.scatterplot(best, **look, hue_order=table[kind].unique(), legend=False, s=30, zorder=3)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.legend(**BELOW)


def _label_log(axis: Axis):
    """Plain numbers along a logarithmic axis, also where it spans less than a decade."""
    low, high = axis.get_view_interval()
    subs = (1,) if high > 300 * low else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=subs) if high > 4 * low else MaxNLocator(6))
    axis.set_major_formatter(EngFormatter(sep=" ") if high > 1e3 else "{x:g}")
    axis.set_minor_formatter(NullFormatter())


def accuracy_by_depth(frames: pd.DataFrame | Mapping[str, pd.DataFrame], dataset: str) -> Figure:
    """Test error by depth of models such as "ResidualMLP-8", a line per family through the means, a point per run.

    Several frames are panels, titled by their keys.
    """
    frames = {"": frames} if isinstance(frames, pd.DataFrame) else frames
    table = _with_place(pd.concat([frame.assign(panel=key) for key, frame in frames.items()], ignore_index=True))
    figure, axes = _row_of_axes(len(frames))
    for axis, title in zip(axes, frames, strict=True):
        _line_per_family(axis, table[table["panel"] == title], "place", "error", errorbar=_interval)
        axis.set_title(title)
    for axis in axes:  # once all are drawn, as they share a scale
        _label_errors(axis, table)
    figure.suptitle(f"{dataset}: test error by depth ({_seeds(table, 'panel', 'model')})\n{DOTS}")
    return figure


def gradient_ratio(gradients: pd.DataFrame, frame: pd.DataFrame, dataset: str, chance: float) -> Figure:
    """By depth, above: the ratio of `lablib.statistics.gradient_ratios` before training; below: the test error.

    The lines go through geometric means above and means below. A ratio of 0 leaves a gap. `chance` is the accuracy of
    guessing (a fraction).
    """
    ratios = gradient_ratios(gradients[gradients["when"] == "initial"])
    table = _with_place(frame).merge(ratios, "left", ["model", "seed"])
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.8, 7.4), sharex=True, layout="constrained")
    _line_per_family(above, table, "place", "ratio", estimator=gmean, errorbar=None)
    above.axhline(1, color="0.4", linewidth=1)
    above.set_yscale("log", nonpositive="mask")
    above.set(ylabel="gradient of the first layer /\nthat of the last hidden layer")
    above.get_legend().remove()
    below.axhline(100 * (1 - chance), color="0.4", linewidth=1, linestyle=":", label="guessing")
    _line_per_family(below, table, "place", "error", errorbar=_interval)
    below.legend(**BELOW, ncols=3)
    _label_errors(below, table)
    what = f"initial gradients, and test error, by depth ({_seeds(table, 'model')})"
    figure.suptitle(f"{dataset}: {what}\none point per run; geometric means above, means and 95 % intervals below")
    return figure


def accuracy_by_cost(frame: pd.DataFrame, costs: pd.DataFrame, dataset: str) -> Figure:
    """Test accuracy by cost. `costs` has the models as index and a column per panel, such as "parameters"."""
    table = _with_place(frame[["model", "seed", "test_accuracy"]]).join(costs, on="model")
    figure, axes = _row_of_axes(len(costs.columns))
    for axis, cost in zip(axes, costs, strict=True):
        _line_per_family(axis, table, cost, "accuracy", errorbar=_interval)
        means = table.groupby(["family", cost, "depth"], observed=True)["accuracy"].mean()
        best = means.groupby("depth").transform("max")
        for ((_, x, depth), value), top in zip(means.items(), best, strict=True):  # the best one's number stands above
            place = (7, 5 if value == top else -12)
            axis.annotate(str(depth), (x, value), place, textcoords="offset points", fontsize="small")
        axis.set(xscale="log", ylabel="test accuracy (%)")
        axis.margins(y=0.1)
        _label_log(axis.xaxis)
    what = f"test accuracy by cost (numbers: depth; {_seeds(table, 'model')})"
    figure.suptitle(f"{dataset}: {what}\n{DOTS}")
    return figure


def _with_place(frame: pd.DataFrame) -> pd.DataFrame:
    """The finished runs with percentages, family (categorical: alike in each panel), depth and place on the x axis."""
    table = with_depth(frame.dropna(subset="test_accuracy"))
    family = pd.Categorical(table["family"], table["family"].unique())
    beside = 0.09 * (family.codes - (len(family.categories) - 1) / 2)  # or points of several families would coincide
    place = table["depth"].rank(method="dense") - 1 + beside
    accuracy = 100 * table["test_accuracy"]
    return table.assign(family=family, place=place, accuracy=accuracy, error=100 - accuracy)


def _line_per_family(axis: Axes, table: pd.DataFrame, x: str, y: str, **average):
    """One point per run, and a line through averages. (Set a log scale afterwards: on one, seaborn averages logs.)"""
    look = {"x": x, "y": y, "hue": "family", "style": "family", "palette": "colorblind", "markers": True, "ax": axis}
    bars = {"err_style": "bars", "err_kws": {"capsize": 3}}
    sns.scatterplot(table, **look, legend=False, alpha=0.4, s=30)
    sns.lineplot(table, **look, **bars, **average, markersize=8)
    axis.legend(**BELOW)


def _interval(percentages: pd.Series) -> tuple[float, float]:
    """The ends of the mean's interval, which stay between 0 and 100; NaN where there is none."""
    summary = summarise(percentages)
    return tuple(np.clip([summary.mean - summary.ci95, summary.mean + summary.ci95], 0, 100))


def _label_errors(axis: Axes, table: pd.DataFrame):
    depths, most = sorted(table["depth"].unique()), axis.get_ylim()[1]
    axis.set_xticks(range(len(depths)), labels=depths)
    axis.set(xlabel="depth", ylabel="test error (%)", xlim=(-0.5, len(depths) - 0.5))
    if 0 < 10 * table["error"].min() < most:
        axis.set_yscale("log")
        _label_log(axis.yaxis)


def gradient_norms(gradients: pd.DataFrame, dataset: str) -> Figure:
    """Gradient by relative position of the layer: a column per family, a row for each `when`, a line per depth.

    `gradients` has one row per layer: model ("ResidualMLP-8"), seed, when, layer (from 1), rms.
    """
    table = with_depth(gradients.assign(rms=gradients["rms"].where(gradients["rms"] > 0)))  # on a logarithmic axis
    table["position"] = (table["layer"] - 1) / (table.groupby("model")["layer"].transform("max") - 1)
    look = {"x": "position", "y": "rms", "col": "family", "row": "when", "hue": "depth", "style": "depth"}
    look |= {"palette": sns.color_palette("viridis", table["depth"].nunique())}
    grid = sns.relplot(table, kind="line", **look, estimator=gmean, errorbar=None, legend="full", height=2.9)
    grid.set(yscale="log").set_titles("{col_name}, {row_name}")
    grid.set_axis_labels("layer (0: first, 1: last)", "gradient (RMS)")
    grid.figure.suptitle(f"{dataset}: loss gradient by layer, geometric mean over seeds ({_seeds(table, 'model')})")
    grid.tight_layout()
    return grid.figure


def paired_differences(comparison: pd.DataFrame, dataset: str, title: str) -> Figure:
    """A table of `lablib.statistics.compare`: for each row a dot per seed, and below them their mean and interval."""
    names = labels(comparison)
    width = 5.5 + 0.08 * max(map(len, names), default=0)  # inches
    figure, axis = plt.subplots(figsize=(width, 0.6 * len(names) + 1.8), layout="constrained")
    axis.axvline(0, color="0.4", linewidth=1)
    for place, row in enumerate(comparison.itertuples()):
        heights = place - np.linspace(0.3, 0, row.n)  # one for each seed, or equal differences would hide one another
        axis.plot([100 * value for value in row.by_seed.values()], heights, "o", color="C0", alpha=0.5)
        face = "black" if row.significant else "white"
        axis.errorbar(100 * row.mean, place + 0.15, xerr=100 * row.ci95, fmt="kD", mfc=face, ms=5, capsize=3)
    axis.set_yticks(range(len(names)), labels=names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    legend = "circle: one seed; diamond: mean, filled if significant; bar: 95 % interval"
    axis.set_xlabel(f"difference in test accuracy (percentage points)\n{legend}", fontsize="small")
    figure.suptitle(f"{dataset}: {title} ({_seeds(comparison)})")
    return figure


def distillation(frame: pd.DataFrame, names: Mapping[str, str], dataset: str, chance: float) -> Figure:
    """Test accuracy by role (teacher, student alone, distilled): bars and, in close-up, one line per seed."""
    parts = []
    for role, model in names.items():
        runs = frame[frame["model"] == model].dropna(subset="test_accuracy")
        if len(runs):
            accuracy = summarise(runs["test_accuracy"]).percent().replace(" (", "\n(")
            label = f"{role}\n{model}\n{runs['parameters'].iloc[0]:,.0f} parameters\n{accuracy}"
            parts.append(runs.assign(label=label, accuracy=100 * runs["test_accuracy"]))
    table = pd.concat(parts)
    by_seed = table.pivot(index="label", columns="seed", values="accuracy").loc[table["label"].unique()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    look = {"x": "label", "y": "accuracy", "hue": "label", "palette": "colorblind", "errorbar": _interval}
    look |= {"capsize": 0.1, "err_kws": {"linewidth": 1.5}}
    sns.barplot(table, **look, width=0.65, saturation=1, ax=left)
    left.axhline(100 * chance, color="0.2", linewidth=1, linestyle=":")
    left.set(ylim=(0, 101), title="mean (dotted: guessing)")
    sns.pointplot(table, **look, marker="_", markersize=28, ax=right)
    right.plot(range(len(by_seed)), by_seed, color="0.4", linewidth=1, marker=".")
    right.set_title("close up: one line per seed")
    for axis in (left, right):
        axis.set(xlabel="", ylabel="test accuracy (%)")
        axis.tick_params(axis="x", labelsize="x-small")
    teacher, alone, distilled = names  # the roles, in this order
    pairs = {"lead": (names[teacher], names[alone]), "gain": (names[distilled], names[alone])}
    gain = compare(frame, pairs).query("label == 'gain'").to_dict("records")
    what = f"{distilled} − {alone}: {points(gain[0])}" if gain else f"{distilled} and {alone} share no seed"
    figure.suptitle(f"{dataset}\n{what}")
    return figure


def distillation_grid(frame: pd.DataFrame, dataset: str, used: tuple[float, float], alone: float) -> Figure:
    """Mean validation accuracy by temperature and alpha; the best cell and the `used` one are marked.

    `frame` has temperature, alpha, seed and val_accuracy; `alone` is the accuracy without a teacher (a fraction).
    """
    frame = frame.dropna(subset="val_accuracy")  # failed runs
    table = 100 * frame.pivot_table(index="temperature", columns="alpha", values="val_accuracy")
    texts = table.map("{:.2f}".format)
    for mark, (temperature, alpha) in (("best", table.stack().idxmax()), ("used", used)):
        if temperature in table.index and alpha in table.columns:
            texts.loc[temperature, alpha] += f"\n{mark}"
    figure, axis = plt.subplots(layout="constrained")
    look = {"cmap": "Blues", "linewidths": 1, "cbar_kws": {"label": "validation accuracy (%)"}}
    sns.heatmap(table.rename(index="{:g}".format), annot=texts, fmt="", **look, ax=axis)
    axis.tick_params(axis="y", rotation=0)
    title = f"{dataset}, {_seeds(frame, 'temperature', 'alpha')}; without a teacher: {100 * alone:.2f} %"
    axis.set(xlabel="α, the weight of the teacher's term", ylabel="temperature T")
    figure.suptitle(title)
    return figure


def reliability(predictions: pd.DataFrame, errors: Mapping[str, Sequence[float]], dataset: str) -> Figure:
    """Accuracy by confidence, a line per model through 15 bins with equal numbers of images.

    `predictions` has one row per model, seed and test image: model, confidence, correct; `errors` has each model's
    calibration errors by seed.
    """
    figure, axis = plt.subplots(figsize=(6.8, 5.6), layout="constrained")
    for model, table in predictions.groupby("model", sort=False):
        name = f"{model}: calibration error {summarise(errors[model]).percent()}"
        look = {"n_bins": 15, "strategy": "quantile", "markersize": 4, "name": name, "ax": axis}
        CalibrationDisplay.from_predictions(table["correct"].astype(int), table["confidence"], **look)
    axis.set(xlabel="mean confidence", ylabel="accuracy")
    axis.legend(**BELOW)
    figure.suptitle(f"{dataset}, test set: accuracy by confidence\n(below the dotted line: overconfident)")
    return figure


def image_grid(
    images: torch.Tensor, titles: Sequence[str], columns: int = 8, title: str = "", size: float = 1.1
) -> Figure:
    """Images (uint8, or float from 0 to 255; images × channels × height × width), each with its title."""
    rows = max(1, -(-len(images) // columns))
    options = {"figsize": (size * columns, 1.35 * size * rows + 0.4), "squeeze": False, "layout": "constrained"}
    empty = {"frameon": False, "xticks": [], "yticks": []}
    figure, axes = plt.subplots(rows, columns, subplot_kw=empty, **options)
    for axis, image, text in zip(axes.flat, images, titles, strict=False):
        _show(axis, image, text)
    figure.suptitle(title)
    return figure


def _show(axis: Axes, image: torch.Tensor, title: str):
    picture = image.permute(1, 2, 0).squeeze(-1).float().clamp(0, 255) / 255
    axis.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title("\n".join(_short(line, 22) for line in title.split("\n")), fontsize="x-small", pad=2)
    axis.set_axis_off()


def _short(text: str, length: int) -> str:
    """The text, cut in the middle to `length` characters."""
    half = length // 2
    return text if len(text) <= length else f"{text[: length - half]}…{text[1 - half :]}"


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Images by true class (rows) and predicted class (columns), counted up to 25 classes; colours show mistakes."""
    side = np.clip(0.5 * len(class_names) + 1, 4, 14)
    figure, axis = plt.subplots(figsize=(side + 0.8, side), layout="constrained")
    counts = {"annot": matrix if len(class_names) <= 25 else False, "fmt": "d", "annot_kws": {"fontsize": "x-small"}}
    bar = {"label": "misclassified images", "ticks": MaxNLocator(integer=True)}
    names = [_short(name, 25) for name in class_names]
    mistakes = pd.DataFrame(matrix - np.diag(np.diag(matrix)), names, names)
    colours = {"cmap": "rocket_r", "vmin": 0, "vmax": max(1, mistakes.to_numpy().max()), "cbar_kws": bar}
    sns.heatmap(mistakes, **counts, **colours, square=True, ax=axis)
    axis.tick_params(axis="y", rotation=0)
    axis.set(xlabel="predicted", ylabel="true")
    figure.suptitle(title)
    return figure


def softened_predictions(
    images: torch.Tensor,
    titles: Sequence[str],
    softened: Mapping[float, torch.Tensor],
    names: Sequence[str],
    title: str,
) -> Figure:
    """A teacher's probabilities of the ten likeliest classes of each image, a bar for each temperature.

    `titles` are the true classes, `names` all classes; `softened` has probabilities (images × classes) by temperature.
    """
    options = {"squeeze": False, "width_ratios": [1, 5], "layout": "constrained"}
    figure, axes = plt.subplots(len(images), 2, figsize=(9, 0.6 + 1.6 * len(images)), **options)
    shown = [_short(name, 10) for name in names]
    for index, (picture, bars) in enumerate(axes):
        _show(picture, images[index], titles[index])
        table = pd.DataFrame({f"T = {T:g}": rows[index].tolist() for T, rows in softened.items()}, shown)
        table.nlargest(10, table.columns[0]).plot.bar(ax=bars, rot=0, fontsize="x-small", width=0.8, legend=False)
        bars.set(ylim=(0, 1), ylabel="probability")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=len(softened))
    figure.suptitle(title)
    return figure
