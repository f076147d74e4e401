"""Figures from tables. Accuracies are fractions, drawn in percent; each figure states its data set and n."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from scipy.stats import gmean
from sklearn.calibration import CalibrationDisplay

from lablib.statistics import compare, gradient_ratios, labels, points, seeds_text, summarise, with_depth

ACCURACY, ERROR = "test accuracy (%)", "test error (%)"
DOTS = "one point per run, mean and 95 % interval (three or more seeds)"
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}  # a legend that does not cover the data
GRID = {"squeeze": False, "layout": "constrained"}


def use_style():
    """Set the lab's look for all figures of a notebook."""
    style = {"figure.dpi": 110, "savefig.dpi": 150, "svg.hashsalt": "lablib"}  # the salt makes files reproducible
    style |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    style |= {"figure.titlesize": "medium", "axes.titlesize": "medium", "legend.fontsize": "small"}
    sns.set_theme(style="ticks", palette="colorblind", rc=style | {"legend.frameon": False, "errorbar.capsize": 3})


def save(figure: plt.Figure, *paths: str | Path) -> plt.Figure:
    """Write a figure to each path, in the format of its suffix; without a date, so that files are reproducible."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return figure


def loss_curves(histories: pd.DataFrame, column: str, dataset: str, panels: Mapping | None = None) -> plt.Figure:
    """A loss ("train_loss" or "val_loss") by epoch, one line per seed. `panels` maps each title to its models."""
    what = {"train_loss": "training loss", "val_loss": "validation loss", "loss": "weighted terms of the loss"}[column]
    panels = panels or {"": histories["model"].unique()}
    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 + 4.4 * len(panels), 4.4), sharey=True, **GRID)
    for axis, (title, models) in zip(axes.flat, panels.items(), strict=True):
        table = histories[histories["model"].isin(models)].reset_index(drop=True)
        look = {"x": "epoch", "y": column, "hue": "model", "palette": "colorblind", "ax": axis}
        sns.lineplot(table, **look, style="model", units="seed", estimator=None, linewidth=1)
        best = table.sort_values("val_accuracy", ascending=False, kind="stable").drop_duplicates(["model", "seed"])
        sns.scatterplot(best, **look, hue_order=table["model"].unique(), legend=False, s=30, zorder=3)
        axis.set(title=title, yscale="log", ylabel=f"{what} (nats)")
        _label_log(axis.yaxis)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(**BELOW)
    return _titled(figure, f"{dataset}: {what}", histories, "line: one seed; dot: best validation accuracy")


def loss_terms(histories: pd.DataFrame, dataset: str, alpha: float) -> plt.Figure:
    """A distilled student's loss by epoch, and its two terms weighted by `alpha` and 1 − `alpha`."""
    terms = {"total": (1, "loss"), "α · soft": (alpha, "soft_loss"), "(1 − α) · hard": (1 - alpha, "hard_loss")}
    lines, panels = [], {}
    for part, prefix in {"training": "train", "validation": "val"}.items():
        panels[part] = [f"{part}: {term}" for term in terms]
        for model, (weight, column) in zip(panels[part], terms.values(), strict=True):
            lines.append(histories.assign(model=model, loss=weight * histories[f"{prefix}_{column}"]))
    return loss_curves(pd.concat(lines), "loss", f"{dataset}, distilled student, α = {alpha:g}", panels)


def _titled(figure: plt.Figure, title: str, table: pd.DataFrame | None = None, note="", by=("model",)) -> plt.Figure:
    if table is not None:
        counts = table["n"] if "n" in table else table.groupby([*by])["seed"].nunique()
        low, high = counts.min(), counts.max()
        title += f" (n = {low} to {high})" if low < high else f" ({seeds_text(low)})"
    figure.suptitle(f"{title}\n{note}".strip())
    return figure


def accuracy_by_depth(frames: pd.DataFrame | Mapping[str, pd.DataFrame], dataset: str) -> plt.Figure:
    """Test error by depth, for models such as "ResidualMLP-8". Several frames get a panel each, titled by key."""
    frames = {"": frames} if isinstance(frames, pd.DataFrame) else frames
    tables = {title: _by_family(frame) for title, frame in frames.items()}
    figure, axes = plt.subplots(1, len(frames), figsize=(2.4 + 4.4 * len(frames), 4.4), sharey=True, **GRID)
    for axis, (title, table) in zip(axes.flat, tables.items(), strict=True):
        _line_per_family(axis, table, "place", ERROR, errorbar=_interval)
        axis.set_title(title)
    runs = pd.concat(tables, names=["panel"])
    return _titled(figure, f"{dataset}: test error by depth", runs, DOTS, by=["panel", "model"])


def gradient_ratio(gradients: pd.DataFrame, frame: pd.DataFrame, dataset: str, chance: float) -> plt.Figure:
    """By depth: initial `gradient_ratios` (a ratio of 0 leaves a gap) and test error. `chance`: guessing's accuracy."""
    ratios = gradient_ratios(gradients[gradients["when"] == "initial"])
    table = _by_family(frame).merge(ratios, "left", ["model", "seed"])
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.8, 7.4), sharex=True, layout="constrained")
    _line_per_family(above, table, "place", "ratio", estimator=gmean, errorbar=None)
    above.set_yscale("log", nonpositive="mask")
    above.set_ylabel("gradient of the first layer /\nthat of the last hidden layer")
    above.get_legend().remove()
    below.axhline(100 * (1 - chance), color="0.4", linewidth=1, linestyle=":", label="guessing")
    _line_per_family(below, table, "place", ERROR, errorbar=_interval)
    below.set_yscale("log")
    _label_log(below.yaxis)
    note = "one point per run; geometric means above, means and 95 % intervals below"
    return _titled(figure, f"{dataset}: initial gradients and test error by depth", table, note)


def accuracy_by_cost(frame: pd.DataFrame, costs: pd.DataFrame, dataset: str) -> plt.Figure:
    """Test accuracy by cost. `costs` has a row per model and a column per panel, such as "parameters"."""
    table = _by_family(frame[["model", "seed", "test_accuracy"]]).join(costs, on="model")
    figure, axes = plt.subplots(1, costs.shape[1], figsize=(2.4 + 4.4 * costs.shape[1], 4.4), sharey=True, **GRID)
    for axis, cost in zip(axes.flat, costs, strict=True):
        _line_per_family(axis, table, cost, ACCURACY, errorbar=_interval)
        axis.set_xscale("log")
        _label_log(axis.xaxis, EngFormatter())
    return _titled(figure, f"{dataset}: test accuracy by cost, deeper to the right", table, DOTS)


def _by_family(frame: pd.DataFrame) -> pd.DataFrame:
    table = with_depth(frame.dropna(subset="test_accuracy"))
    families, _ = pd.factorize(table["family"])
    place = table["depth"].rank(method="dense") - 1 + 0.09 * (families - families.max() / 2)  # families side by side
    accuracy = 100 * table["test_accuracy"]
    return table.assign(place=place, **{ACCURACY: accuracy, ERROR: 100 - accuracy})


def _line_per_family(axis: plt.Axes, table: pd.DataFrame, x: str, y: str, **average):
    """One point per run, and a line through averages. (Set log scales afterwards, or seaborn averages the logs.)"""
    look = {"x": x, "y": y, "hue": "family", "style": "family", "palette": "colorblind", "markers": True, "ax": axis}
    sns.scatterplot(table, **look, legend=False, alpha=0.4, s=30)
    sns.lineplot(table, **look, **average, err_style="bars", markersize=8)
    axis.legend(**BELOW, ncols=3)
    if x == "place":
        depths = sorted(table["depth"].unique())
        axis.set(xticks=range(len(depths)), xticklabels=depths, xlabel="depth")


def _interval(percentages: pd.Series) -> tuple[float, float]:
    summary = summarise(percentages)
    return tuple(np.clip([summary.mean - summary.ci95, summary.mean + summary.ci95], 0, 100))


def _label_log(axis, numbers="{x:g}"):
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 4 * low else MaxNLocator(5))
    axis.set_major_formatter(numbers)
    axis.set_minor_formatter("")


def gradient_norms(gradients: pd.DataFrame, dataset: str) -> plt.Figure:
    """Gradient by relative position of the layer, one line per depth; the table is from `Experiment.gradients()`."""
    table = with_depth(gradients.assign(rms=gradients["rms"].where(gradients["rms"] > 0))).astype({"depth": str})
    table["position"] = (table["layer"] - 1) / (table.groupby("model")["layer"].transform("max") - 1)
    look = {"x": "position", "y": "rms", "col": "family", "row": "when", "hue": "depth", "style": "depth"}
    grid = sns.relplot(table, kind="line", **look, palette="viridis", estimator=gmean, errorbar=None, height=2.9)
    grid.set(yscale="log").set_titles("{col_name}, {row_name}")
    _titled(grid.figure, f"{dataset}: loss gradient by layer, geometric mean over seeds", table)
    return grid.set_axis_labels("layer (0: first, 1: last)", "gradient (RMS)").tight_layout().figure


def paired_differences(comparison: pd.DataFrame, dataset: str, title: str) -> plt.Figure:
    """Plot a table of `lablib.statistics.compare`: a dot per seed for each row, with the mean and interval below."""
    figure, axis = plt.subplots(figsize=(9, 0.6 * len(comparison) + 1.8), layout="constrained")
    axis.axvline(0, color="0.4", linewidth=1)
    for place, row in enumerate(comparison.itertuples()):
        heights = place - np.linspace(0.3, 0, row.n)  # one per seed, or equal differences would hide each other
        axis.plot([100 * value for value in row.by_seed.values()], heights, "o", color="C0", alpha=0.5)
        axis.errorbar(100 * row.mean, place + 0.15, xerr=100 * row.ci95, fmt="kD", mfc="k" if row.significant else "w")
    axis.set(yticks=range(len(comparison)), yticklabels=labels(comparison), ylim=(len(comparison) - 0.5, -0.5))
    axis.set_xlabel("difference in test accuracy (percentage points)")
    note = "circle: one seed; diamond: mean, filled if significant; bar: 95 % interval"
    return _titled(figure, f"{dataset}: {title}", comparison, note)


def distillation(frame: pd.DataFrame, names: Mapping[str, str], dataset: str, chance: float) -> plt.Figure:
    """Test accuracy as bars, and a line per seed. `names`: role -> model, for teacher, student alone and distilled."""
    parts = []
    for role, model in names.items():
        runs = frame[frame["model"] == model]
        size, accuracy = runs["parameters"].iloc[0], runs["test_accuracy"]
        label = f"{role}\n{model}\n{size:,.0f} parameters\n{summarise(accuracy).percent()}"
        parts.append(pd.DataFrame({"": label, ACCURACY: 100 * accuracy, "seed": runs["seed"]}))
    table, look = pd.concat(parts), {"x": "", "y": ACCURACY}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    sns.barplot(table, **look, hue="", palette="colorblind", errorbar=_interval, capsize=0.1, ax=left)
    left.axhline(100 * chance, color="0.2", linewidth=1, linestyle=":")
    left.set_title("mean and 95 % interval (dotted: guessing)")
    sns.lineplot(table, **look, units="seed", estimator=None, marker="o", color="0.4", ax=right)
    right.set_title("close up: one line per seed")
    plt.setp([*left.get_xticklabels(), *right.get_xticklabels()], fontsize="x-small")
    (_, teacher), (alone, student), (distilled, taught) = names.items()
    both = compare(frame, {"lead": (teacher, student), "gain": (taught, student)}).set_index("label")  # adjusted p
    return _titled(figure, f"{dataset}\n{distilled} − {alone}: {points(both.loc['gain'])}")


def distillation_grid(frame: pd.DataFrame, dataset: str, used: tuple[float, float], alone: float) -> plt.Figure:
    """Mean validation accuracy by temperature and alpha, marking the best and `used`. `alone`: without a teacher."""
    means = 100 * frame.groupby(["temperature", "alpha"])["val_accuracy"].mean()
    texts = means.map("{:.2f}".format)
    texts[means.idxmax()] += "\nbest"
    if used in texts:
        texts[used] += "\nused"
    figure, axis = plt.subplots(layout="constrained")
    look = {"cmap": "Blues", "linewidths": 1, "cbar_kws": {"label": "validation accuracy (%)"}}
    sns.heatmap(means.unstack().rename("{:g}".format), annot=texts.unstack(), fmt="", **look, ax=axis)
    axis.set(xlabel="α, the weight of the teacher's term", ylabel="temperature T")
    axis.tick_params(axis="y", rotation=0)
    return _titled(figure, f"{dataset}; without a teacher: {100 * alone:.2f} %", frame, by=["temperature", "alpha"])


def reliability(predictions: pd.DataFrame, errors: Mapping[str, Sequence[float]], dataset: str) -> plt.Figure:
    """Accuracy by confidence. `predictions`: model, confidence, correct by image. `errors`: calibration, by model."""
    figure, axis = plt.subplots(figsize=(6.8, 5.6), layout="constrained")
    for model, table in predictions.groupby("model", sort=False):
        name = f"{model}: calibration error {summarise(errors[model]).percent()}"
        look = {"n_bins": 15, "strategy": "quantile", "markersize": 4, "name": name, "ax": axis}
        CalibrationDisplay.from_predictions(table["correct"].astype(int), table["confidence"], **look)
    axis.set(xlabel="mean confidence", ylabel="accuracy")
    axis.legend(**BELOW)
    return _titled(figure, f"{dataset}, test set: accuracy by confidence\n(below the dotted line: overconfident)")


def image_grid(images: torch.Tensor, titles: Sequence[str], columns=8, title="", size=1.1) -> plt.Figure:
    """Images (uint8, or float from 0 to 255; images × channels × height × width), each with its title."""
    rows = (len(images) - 1) // columns + 1
    figure, axes = plt.subplots(rows, columns, figsize=(size * columns, 1.35 * size * rows + 0.4), **GRID)
    plt.setp(axes, frame_on=False, xticks=[], yticks=[])
    for axis, image, text in zip(axes.flat, images, titles, strict=False):
        _show(axis, image, text)
    return _titled(figure, title)


def _show(axis: plt.Axes, image: torch.Tensor, title: str):
    axis.imshow(image.permute(1, 2, 0).clamp(0, 255).byte().numpy(), cmap="gray", vmin=0, vmax=255)
    axis.set_title("\n".join(line[:22] for line in title.split("\n")), fontsize="x-small", pad=2)
    axis.set_axis_off()


def confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], title: str) -> plt.Figure:
    """Images by true (rows) and predicted class (columns). Colours show mistakes, numbers only up to 25 classes."""
    figure, axis = plt.subplots(figsize=(7.8, 7), layout="constrained")
    mistakes = pd.DataFrame(matrix - np.diag(np.diag(matrix)), class_names, class_names)
    look = {"cmap": "rocket_r", "cbar_kws": {"label": "misclassified images"}, "annot_kws": {"fontsize": "x-small"}}
    sns.heatmap(mistakes, annot=matrix if len(matrix) <= 25 else None, fmt="d", **look, square=True, ax=axis)
    axis.set(xlabel="predicted", ylabel="true")
    return _titled(figure, title)


def softened_predictions(
    images: torch.Tensor, titles: Sequence[str], softened: dict[float, torch.Tensor], names: Sequence[str], title: str
) -> plt.Figure:
    """Each image and its ten likeliest classes. `softened`: temperature -> probabilities (images × classes `names`)."""
    figure, axes = plt.subplots(len(images), 2, figsize=(9, 0.6 + 1.6 * len(images)), width_ratios=[1, 5], **GRID)
    for index, (picture, bars) in enumerate(axes):
        _show(picture, images[index], titles[index])
        table = pd.DataFrame({f"T = {T:g}": rows[index].tolist() for T, rows in softened.items()}, names)
        table = table.nlargest(10, table.columns[0]).rename(lambda name: name[:10])
        table.plot.bar(ax=bars, rot=0, fontsize="x-small", width=0.8, ylim=(0, 1), ylabel="probability", legend=False)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower center", ncols=len(softened))
    return _titled(figure, title)
