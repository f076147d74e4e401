"""Results -> figures."""

from lablib.figures.comparisons import accuracy_by_cost, distillation_bars, forest, heat_map, reliability
from lablib.figures.curves import accuracy_by_depth, gradient_norms, loss_curves, loss_terms, runs_by_depth
from lablib.figures.images import confusion_matrix, image_grid, softened_answers
from lablib.figures.style import save, use_style

__all__ = [
    "accuracy_by_cost",
    "accuracy_by_depth",
    "confusion_matrix",
    "distillation_bars",
    "forest",
    "gradient_norms",
    "heat_map",
    "image_grid",
    "loss_curves",
    "loss_terms",
    "reliability",
    "runs_by_depth",
    "save",
    "softened_answers",
    "use_style",
]
