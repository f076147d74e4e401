"""What the tests of figures share: made-up results, and looks into what was drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats


def drawn(figure: Figure) -> Figure:
    """The figure, after everything in it has been rendered once."""
    figure.canvas.draw()
    return figure


def legend_texts(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def interval_in_percent(values: Sequence[float]) -> np.ndarray:
    """Both ends of the mean's 95 % interval, by scipy."""
    return 100 * np.array(stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values)))


def bar_ends(container: ErrorbarContainer) -> list[tuple[float, float]]:
    """Bottom and top of each error bar that can be seen."""
    segments = [np.asarray(segment) for bars in container[2] for segment in bars.get_segments()]
    return [(s[0, 1], s[1, 1]) for s in segments if len(s) and np.isfinite(s).all()]


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
