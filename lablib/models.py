"""The networks, from images (float, batch × `image_shape`: channels, height, width) to logits (batch × classes)."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation


class _Saved(PyTorchModelHubMixin):
    """Adds `save_pretrained`, and `from_pretrained`, which refuses the weights of a different network."""

    def __new__(cls, *args, **kwargs):
        json.dumps([args, kwargs])  # TypeError for NumPy scalars: the mixin, and so a run, would record the default
        return super().__new__(cls, *args, **kwargs)

    @classmethod
    def _from_pretrained(cls, **arguments):
        return super()._from_pretrained(**arguments | {"strict": True})


class MLP(nn.Module, _Saved):
    """A plain multilayer perceptron: (Linear, ReLU, Dropout) for each hidden size, then a linear classifier.

    `initialisation="he"` draws weights for ReLU and zeroes biases (He et al. 2015, https://arxiv.org/abs/1502.01852).
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        dropout: float = 0.1,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        initialisation: str | None = None,
    ):
        super().__init__()
        if initialisation not in (None, "he"):
            raise ValueError(f'initialisation = {initialisation!r}, but it must be None or "he"')
        sizes = [math.prod(image_shape), *hidden_sizes]
        self.hidden = nn.Sequential()
        for in_features, out_features in pairwise(sizes):
            self.hidden.extend([nn.Linear(in_features, out_features), nn.ReLU(), nn.Dropout(dropout)])
        self.classifier = nn.Linear(sizes[-1], num_classes)
        if initialisation == "he":
            for layer in (*self.hidden[::3], self.classifier):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(images.flatten(1)))  # (batch, classes)


class ResidualBlock(nn.Module):
    """F(x) + x, projecting x if the widths differ; or only F(x) (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.1, shortcut: bool = True):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Linear(in_features, out_features), nn.ReLU(), nn.Dropout(dropout), nn.Linear(out_features, out_features)
        )
        self.shortcut = shortcut
        projected = shortcut and in_features != out_features
        self.projection = nn.Linear(in_features, out_features, bias=False) if projected else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.projection(x) if self.shortcut else self.residual(x)


class ResidualMLP(nn.Module, _Saved):
    """Like `MLP`, but with a ResidualBlock and a ReLU for each hidden size, then a linear classifier."""

    def __init__(
        self,
        hidden_sizes: Sequence[int] = (128, 64),
        dropout: float = 0.1,
        image_shape: Sequence[int] = (1, 28, 28),
        num_classes: int = 10,
        shortcut: bool = True,
    ):
        super().__init__()
        sizes = [math.prod(image_shape), *hidden_sizes]
        self.blocks = nn.ModuleList(ResidualBlock(i, o, dropout, shortcut) for i, o in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.flatten(1)  # (batch, features)
        for block in self.blocks:
            x = block(x).relu()
        return self.classifier(x)  # (batch, classes)


class SimpleCNN(nn.Module, _Saved):
    """A stem of `width` channels and `depth` stages (3 × 3 convolution, batch norm, ReLU), then a linear classifier.

    Each stage halves the resolution and doubles the channels. Raises ValueError for sides shorter than 2**depth pixels.
    """

    def __init__(
        self, depth: int = 2, width: int = 16, image_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10
    ):
        super().__init__()
        if min(image_shape[1:]) < 2**depth:
            raise ValueError(f"images of {image_shape[1]} × {image_shape[2]} pixels are too small for depth {depth}")
        channels = [width * 2**number for number in range(depth + 1)]
        stages = [self._stage(i, o) for i, o in pairwise(channels)]  # first: a seed's weights depend on the order
        self.stem = Conv2dNormActivation(image_shape[0], width)  # 3 × 3 convolution without bias, batch norm, ReLU
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels[-1], num_classes)

    def _stage(self, inplanes: int, planes: int) -> nn.Module:
        return Conv2dNormActivation(inplanes, planes, stride=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.stages(self.stem(images))  # (batch, width · 2^depth, height / 2^depth, width / 2^depth)
        return self.classifier(features.mean((2, 3)))  # (batch, classes)


class PlainBlock(BasicBlock):
    """torchvision's BasicBlock without the shortcut: the same two convolutions, with nothing added to their output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class ResidualCNN(SimpleCNN):
    """Like `SimpleCNN`, but each stage is two BasicBlocks (He et al. 2015, https://arxiv.org/abs/1512.03385).

    The shortcut of a stage's first block has a 1 × 1 convolution and batch norm; `shortcut=False` removes shortcuts.
    """

    def __init__(
        self,
        depth: int = 2,
        width: int = 16,
        image_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        shortcut: bool = True,
    ):
        self.shortcut = shortcut  # `_stage` needs it
        super().__init__(depth, width, image_shape, num_classes)

    def _stage(self, inplanes: int, planes: int) -> nn.Module:
        block = BasicBlock if self.shortcut else PlainBlock
        projection = Conv2dNormActivation(inplanes, planes, 1, 2, activation_layer=None) if self.shortcut else None
        return nn.Sequential(block(inplanes, planes, 2, projection), block(planes, planes))
