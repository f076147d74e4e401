"""The look of the lab's figures, and their files."""

from pathlib import Path
from typing import Any

import seaborn as sns
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 4)))
HALO = withStroke(linewidth=3, foreground="white")  # keeps small text legible where it lies on a line
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


def lab_style() -> dict[str, Any]:
    """The same look for `matplotlib.rc_context`: for some figures, and no others."""
    colors = cycler(color=sns.color_palette("colorblind"))
    return {**sns.plotting_context("notebook"), **sns.axes_style("ticks"), **_STYLE, "axes.prop_cycle": colors}


def save(figure: Figure, *paths: str | Path) -> Figure:
    """Write a figure to each path, in the format of its suffix, without a date, so that it is reproducible."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    return figure


def end_at_100(axis: Axes):
    """Let no axis of percentages go beyond 100 because an interval does, nor below 0."""
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, 0), min(high, 101))
