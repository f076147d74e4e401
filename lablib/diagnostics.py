"""A model -> gradients by layer, calibration, cost."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F


def gradient_norms(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], outputs: Callable | None = None
) -> pd.DataFrame:
    """Norm of the loss gradient by layer, from the input (layer 1) to the output.

    `batch` is images as the model takes them (float, batch × channels × height × width) and labels (batch). One row for
    each linear and convolutional layer's weight: layer, name, norm (Euclidean), rms (norm over the root of its size).
    The loss is the mean cross-entropy without dropout; the model and its gradients stay as they were.
    `outputs(model, images)` gives the logits, or a tuple that begins with them, where `model(images)` does not.
    Raises ValueError if the model has no such layer.
    """
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    # a projection is the shortcut's, not a layer on the way through F
    layers = {name: weight for name, weight in layers.items() if not name.endswith(("projection", "downsample.0"))}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layers to measure")
    images, labels = batch
    with eval_mode(model), torch.enable_grad():
        logits = outputs(model, images) if outputs else model(images)
        loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, labels)
        gradients = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    norms = [0.0 if gradient is None else gradient.cpu().double().norm().item() for gradient in gradients]
    table = pd.DataFrame({"layer": range(1, len(layers) + 1), "name": list(layers), "norm": norms})
    return table.assign(rms=table["norm"] / [weight.numel() ** 0.5 for weight in layers.values()])


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """Eval mode; afterwards each module is in its earlier mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def calibration(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> pd.DataFrame:
    """Confidence against accuracy, for a reliability diagram; one row per non-empty bin of equal width.

    For each image the probability of the predicted class, and whether that is the right one. Columns: low, high (the
    bin's ends; an image on an end belongs to the bin below), images, confidence and accuracy (means in the bin).
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    ends = np.linspace(0, 1, bins + 1)
    index = np.searchsorted(ends, confidence).clip(1, bins)
    table = pd.DataFrame({"low": ends[index - 1], "high": ends[index], "confidence": confidence, "correct": correct})
    columns = {"images": ("confidence", "size"), "confidence": ("confidence", "mean"), "accuracy": ("correct", "mean")}
    return table.groupby(["low", "high"], as_index=False).agg(**columns)


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by images (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599): 0 for a classifier that is right as often as it says it will be."""
    table = calibration(confidence, correct, bins)
    return float(np.average((table["confidence"] - table["accuracy"]).abs(), weights=table["images"]))


@torch.no_grad()
def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiplications with an addition for one image of (channels, height, width), by `torch.utils.flop_counter`.

    Normalisation, activations and pooling are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a quarter of a second to import

    device = next(model.parameters()).device
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2  # it counts two operations
