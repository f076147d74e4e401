"""Measure a model: gradients by layer, calibration, cost."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.models.resnet import BasicBlock

from lablib.hardware import untouched
from lablib.metrics import first_logits
from lablib.models import ResidualBlock


def gradient_norms(model: nn.Module, batch: tuple, outputs: Callable = nn.Module.__call__) -> pd.DataFrame:
    """Root mean square of each layer's loss gradient, from input to output: a table of layer (from 1), name and rms.

    `batch`: the model's input images (float, batch × channels × height × width) and labels (batch). The table has the
    weights of all linear and convolutional layers that are called and not frozen, except projections on shortcuts.
    The loss is the mean cross-entropy in eval mode. `outputs(model, images)` returns the logits, or a tuple that
    begins with them. The model is left unchanged. Raises RuntimeError if there is no layer to measure.
    """
    shortcuts = [m.projection for m in model.modules() if isinstance(m, ResidualBlock)]
    shortcuts += [m.downsample[0] for m in model.modules() if isinstance(m, BasicBlock) and m.downsample]
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    found = {name: m for name, m in model.named_modules() if isinstance(m, kinds) and m not in shortcuts}
    called = []  # names, in the order of the calls
    images, labels = batch
    with untouched(model), torch.enable_grad(), parametrize.cached():  # or a parametrised weight is new at each access
        model.eval()
        for name, layer in found.items():
            layer.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        loss = F.cross_entropy(first_logits(outputs(model, images.clone())), labels)
        weights = {name: found[name].weight for name in called if found[name].weight.requires_grad}
        gradients = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
    rms = [gradient.cpu().double().norm().item() / gradient.numel() ** 0.5 for gradient in gradients]
    return pd.DataFrame({"layer": range(1, len(rms) + 1), "name": list(weights), "rms": rms})


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[bool], bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over bins of equal width, weighted by number of images (Guo et al. 2017,
    https://arxiv.org/abs/1706.04599). Per image: the predicted class's probability and whether that class is right.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=float)
    gaps = pd.Series(confidence - correct).groupby(np.ceil(confidence * bins)).sum()
    return float(gaps.abs().sum() / len(confidence))


def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiply-adds of matrix products, convolutions and attention for one image of (channels, height, width)."""
    from torch.utils.flop_counter import FlopCounterMode  # a quarter of a second to import

    # with gradients, attention is not fused and therefore counted
    with untouched(model), torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model.eval()
        model(next(model.parameters()).new_zeros(1, *image_shape))
    return counter.get_total_flops() // 2  # the counter counts a multiply-add as two
