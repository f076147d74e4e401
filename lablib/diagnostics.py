"""A model -> gradients by layer, angles between features, calibration, cost."""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


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
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to take gradients of")
    images, labels = batch
    with eval_mode(model), torch.enable_grad():
        logits = outputs(model, images) if outputs else model(images)
        loss = F.cross_entropy(logits[0] if isinstance(logits, tuple) else logits, labels)
        gradients = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    norms = [0.0 if gradient is None else gradient.cpu().double().norm().item() for gradient in gradients]
    table = pd.DataFrame({"layer": range(1, len(layers) + 1), "name": list(layers), "norm": norms})
    return table.assign(rms=table["norm"] / [weight.numel() ** 0.5 for weight in layers.values()])


@torch.no_grad()
def mean_angle(model: nn.Module, images: torch.Tensor) -> float:
    """How well a model's last hidden layer separates images: the mean angle between two of them, in degrees.

    `images` are the model's input, batch × channels × height × width, two or more. The features are the input of the
    last linear layer, computed in float64 without dropout; the model is not changed. Raises ValueError for fewer than
    two images or a model without a linear layer.
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
    index = np.ceil(confidence * bins).astype(int).clip(1, bins)
    table = pd.DataFrame({"high": index / bins, "confidence": confidence, "correct": np.asarray(correct, dtype=float)})
    by_bin = table.groupby("high", as_index=False)
    columns = {"images": ("confidence", "size"), "confidence": ("confidence", "mean"), "accuracy": ("correct", "mean")}
    table = by_bin.agg(**columns)
    table.insert(0, "low", (table["high"] * bins - 1).round() / bins)
    return table


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
    device = next(model.parameters()).device
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2  # it counts two operations


@torch.no_grad()
def latency(
    models: Mapping[str, nn.Module],
    image_shape: Sequence[int],
    batch_sizes: Sequence[int] = (1, 128),
    repeats: int = 10,
    rounds: int = 5,
    budget: float = 10,
) -> pd.DataFrame:
    """Median time of a forward pass in eval mode on one thread: model, batch, milliseconds, images_per_second, device.

    The models take turns for up to `rounds`, so that a busy machine slows all of them alike; a turn is one pass to warm
    up and up to `repeats` timed ones. There are fewer if all would not fit in `budget` (seconds), but at least one.
    Raises ValueError for fewer than one repeat or round.
    """
    if min(repeats, rounds) < 1:
        raise ValueError(f"repeats = {repeats} and rounds = {rounds}, but both must be whole numbers above 0")
    turns, times = list(product(batch_sizes, models)), defaultdict(list)
    threads, begin = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    try:
        for done in range(rounds):
            if done and (time.perf_counter() - begin) * (done + 1) / done > budget:
                break  # another round would not fit
            for batch, name in turns:
                images = torch.zeros(batch, *image_shape, device=next(models[name].parameters()).device)
                with eval_mode(models[name]):
                    times[name, batch] += _timed(models[name], images, repeats, budget / len(turns))
    finally:
        torch.set_num_threads(threads)
    rows = [(name, batch, 1e3 * statistics.median(seconds)) for (name, batch), seconds in times.items()]
    table = pd.DataFrame(rows, columns=["model", "batch", "milliseconds"])
    devices = [next(models[name].parameters()).device.type for name in table["model"]]
    return table.assign(images_per_second=1e3 * table["batch"] / table["milliseconds"], device=devices)


def _timed(model: nn.Module, images: torch.Tensor, repeats: int, budget: float) -> list[float]:
    """Seconds of each pass after the first, at least one and no more than fit in the budget."""
    ends, begin = [], time.perf_counter()
    while len(ends) < 2 or (len(ends) <= repeats and ends[-1] - begin < budget):
        model(images)
        if images.device.type != "cpu":
            torch.accelerator.synchronize()
        ends.append(time.perf_counter())
    return np.diff(ends).tolist()
