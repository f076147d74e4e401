"""A model -> what it is like inside: the gradients by layer, and what it predicts."""

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F


def gradient_norms(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> pd.DataFrame:
    """Norm of the loss gradient by layer, from the input (layer 1) to the output.

    `batch` is images as the model takes them (float, batch × channels × height × width) and labels (batch). One row for
    each linear and convolutional layer's weight: layer, name, norm (Euclidean), rms (norm over the root of its size,
    so that layers of different sizes compare). The loss is the mean cross-entropy without dropout; the model stays as
    it was, its gradients too. Raises ValueError if the model has no such layer.
    """
    layers = {n: m.weight for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))}
    # a projection is the shortcut's, not a layer on the way through F
    layers = {name: weight for name, weight in layers.items() if not name.endswith(("projection", "downsample.0"))}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolutional layer to take gradients of")
    images, labels = batch
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), labels)
            gradients = torch.autograd.grad(loss, list(layers.values()), allow_unused=True)
    finally:
        model.train(training)
    norms = [0.0 if gradient is None else gradient.double().norm().item() for gradient in gradients]
    return pd.DataFrame(
        {
            "layer": range(1, len(layers) + 1),
            "name": list(layers),
            "norm": norms,
            "rms": [norm / weight.numel() ** 0.5 for norm, weight in zip(norms, layers.values(), strict=True)],
        }
    )


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 1000) -> torch.Tensor:
    """Probabilities (images × classes) of a model in eval mode for images as it takes them."""
    training = model.training
    model.eval()
    try:
        return torch.cat([model(part).softmax(1) for part in images.split(batch_size)])
    finally:
        model.train(training)
