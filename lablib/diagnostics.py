"""A model -> gradients by layer, angles between features, predictions, calibration."""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F


def gradient_norms(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], outputs: Callable | None = None
) -> pd.DataFrame:
    """Norm of the loss gradient by layer, from the input (layer 1) to the output.

    `batch` is images as the model takes them (float, batch × channels × height × width) and labels (batch). One row for
    each linear and convolutional layer's weight: layer, name, norm (Euclidean), rms (norm over the root of its size,
    so that layers of different sizes compare). The loss is the mean cross-entropy without dropout; the model stays as
    it was, its gradients too. `outputs(model, images)` gives the logits, or a tuple that begins with them, where
    `model(images)` does not. Raises ValueError if the model has no such layer.
    """
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    # a projection is the shortcut's, not a layer on the way through F
    layers = {name: weight for name, weight in layers.items() if not name.endswith(("projection", "downsample.0"))}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to take gradients of")
    images, labels = batch
    with eval_mode(model), torch.enable_grad():
        logits = outputs(model, images) if outputs else model(images)
        loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, labels)
        gradients = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    norms = [0.0 if gradient is None else gradient.cpu().double().norm().item() for gradient in gradients]
    return pd.DataFrame(
        {
            "layer": range(1, len(layers) + 1),
            "name": list(layers),
            "norm": norms,
            "rms": [norm / weight.numel() ** 0.5 for norm, weight in zip(norms, layers.values(), strict=True)],
        }
    )


@torch.no_grad()
def mean_angle(model: nn.Module, images: torch.Tensor) -> float:
    """How well a model's last hidden layer separates images: the mean angle between two of them, in degrees.

    `images` are the model's input, batch × channels × height × width, two or more. The features are the input of the
    last linear layer; 0 means that all images have the same direction there. Computed in float64, without dropout; the
    model is not changed. Raises ValueError for fewer than two images or a model without a linear layer.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or len(images) < 2:
        raise ValueError(f"an angle needs a linear layer and two images; there are {len(linear)} and {len(images)}")
    state = {name: tensor.detach().cpu() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    double = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    features = []
    hook = model.get_submodule(linear[-1]).register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        with eval_mode(model):
            functional_call(model, double, (images.cpu().double(),))
    finally:
        hook.remove()
    directions = F.normalize(features[0].flatten(1), dim=1)  # (batch, features)
    first, second = torch.triu_indices(len(images), len(images), offset=1)
    # the angle by its half's sine: an arc cosine loses small angles to rounding
    half_chord = (directions[first] - directions[second]).norm(dim=1) / 2
    return torch.rad2deg(2 * torch.asin(half_chord.clamp(max=1))).mean().item()


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 1000) -> torch.Tensor:
    """Probabilities (images × classes) of a model in eval mode for images as it takes them."""
    with eval_mode(model):
        return torch.cat([model(part).softmax(1) for part in images.split(batch_size)])


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
    confidence = np.asarray(confidence, dtype=float)
    bin_of = np.ceil(confidence * bins).astype(int).clip(1, bins) - 1
    table = pd.DataFrame({"bin": bin_of, "confidence": confidence, "correct": np.asarray(correct, dtype=float)})
    grouped = table.groupby("bin")
    return pd.DataFrame(
        {
            "low": [index / bins for index in grouped.groups],
            "high": [(index + 1) / bins for index in grouped.groups],
            "images": grouped.size().to_numpy(),
            "confidence": grouped["confidence"].mean().to_numpy(),
            "accuracy": grouped["correct"].mean().to_numpy(),
        }
    )


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Mean distance of confidence and accuracy over bins, weighted by images (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599): 0 for a classifier that is right as often as it says it will be."""
    table = calibration(confidence, correct, bins)
    distance = (table["confidence"] - table["accuracy"]).abs()
    return float((distance * table["images"]).sum() / table["images"].sum())
