"""The networks: images in (float, batch × channels × height × width), logits out (batch × classes)."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


def _checked_sizes(hidden_sizes: Sequence[int]) -> list[int]:
    sizes = list(hidden_sizes)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"hidden_sizes = {hidden_sizes!r}, but it must be one or more whole numbers above 0")
    return sizes


class MLP(nn.Module, PyTorchModelHubMixin):
    """A plain multilayer perceptron: (Linear, ReLU, Dropout) for each hidden size, then a linear classifier.

    `image_shape` is (channels, height, width). Raises ValueError for hidden sizes that are no positive whole numbers.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        dropout: float = 0.1,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
    ):
        super().__init__()
        sizes = [math.prod(image_shape), *_checked_sizes(hidden_sizes)]
        layers = []
        for in_features, out_features in pairwise(sizes):
            layers += [nn.Linear(in_features, out_features), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(images.flatten(1)))  # (batch, classes)


class ResidualBlock(nn.Module):
    """F(x) + x, with F = Linear, ReLU, Dropout, Linear (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Nothing follows the sum, so that with F = 0 the block is the identity; a network puts a ReLU between its blocks.
    Where the widths differ, x is projected by a linear layer without bias.
    `shortcut=False` leaves x away and keeps the rest, for comparison.
    """

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.1, shortcut: bool = True):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Linear(in_features, out_features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(out_features, out_features),
        )
        self.shortcut = shortcut
        self.projection = nn.Identity()
        if shortcut and in_features != out_features:
            self.projection = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.shortcut:
            return self.residual(x)
        return self.residual(x) + self.projection(x)


class ResidualMLP(nn.Module, PyTorchModelHubMixin):
    """A sequence of ResidualBlocks with a ReLU after each, one for each hidden size, then a linear classifier.

    `image_shape` is (channels, height, width); `shortcut=False` is the same network with its shortcuts cut.
    Raises ValueError for hidden sizes that are no positive whole numbers.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        dropout: float = 0.1,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        shortcut: bool = True,
    ):
        super().__init__()
        sizes = [math.prod(image_shape), *_checked_sizes(hidden_sizes)]
        self.blocks = nn.ModuleList(ResidualBlock(i, o, dropout, shortcut) for i, o in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)  # (batch, features)
        for block in self.blocks:
            x = block(x).relu()
        return self.classifier(x)  # (batch, classes)
