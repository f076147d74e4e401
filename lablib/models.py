"""The networks: images in (float, batch × channels × height × width), logits out (batch × classes); ONNX export."""

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn
from torchvision.models.resnet import BasicBlock

from lablib.checkpoints import write_atomically


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _checked_sizes(hidden_sizes: Sequence[int]) -> list[int]:
    sizes = list(hidden_sizes)
    if not sizes or not all(map(_positive, sizes)):
        raise ValueError(f"hidden_sizes = {hidden_sizes!r}, but it must be one or more whole numbers above 0")
    return sizes


class MLP(nn.Module, PyTorchModelHubMixin):
    """A plain multilayer perceptron: (Linear, ReLU, Dropout) for each hidden size, then a linear classifier.

    `image_shape` is (channels, height, width). `initialisation="he"` draws the weights as He et al. propose for ReLU
    (2015, https://arxiv.org/abs/1502.01852), with biases of 0; None leaves them as PyTorch draws them.
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
        sizes = [math.prod(image_shape), *_checked_sizes(hidden_sizes)]
        layers = []
        for in_features, out_features in pairwise(sizes):
            layers += [nn.Linear(in_features, out_features), nn.ReLU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)
        self.classifier = nn.Linear(sizes[-1], num_classes)
        for layer in (*self.hidden, self.classifier) if initialisation == "he" else ():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.hidden(images.flatten(1)))  # (batch, classes)


class ResidualBlock(nn.Module):
    """F(x) + x, with F = Linear, ReLU, Dropout, Linear (He et al. 2015, https://arxiv.org/abs/1512.03385).

    Nothing follows the sum, so that with F = 0 the block is the identity; a network puts a ReLU between its blocks.
    A linear layer without bias projects x where the widths differ; `shortcut=False` returns F(x).
    """

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.1, shortcut: bool = True):
        super().__init__()
        self.residual = nn.Sequential(
            nn.Linear(in_features, out_features), nn.ReLU(), nn.Dropout(dropout), nn.Linear(out_features, out_features)
        )
        self.shortcut = shortcut
        self.projection = nn.Identity()
        if shortcut and in_features != out_features:
            self.projection = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.residual(x) + self.projection(x) if self.shortcut else self.residual(x)


class ResidualMLP(nn.Module, PyTorchModelHubMixin):
    """A sequence of ResidualBlocks with a ReLU after each, one for each hidden size, then a linear classifier.

    `image_shape` is (channels, height, width); `shortcut=False` is the same network with its shortcuts cut.
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


def _checked_depth(depth: int, width: int, image_shape: Sequence[int]) -> None:
    for name, value in (("depth", depth), ("width", width)):
        if not _positive(value):
            raise ValueError(f"{name} = {value!r}, but it must be a whole number above 0")
    _check_size(image_shape[-2:], depth)


def _check_size(size: Sequence[int], depth: int) -> None:
    if min(size) < 2**depth:
        raise ValueError(
            f"images of {size[0]} × {size[1]} pixels are too small for depth {depth}, which halves them {depth} times; "
            f"the smallest are {2**depth} × {2**depth}"
        )


class _CNN(nn.Module):
    """Stem, stages, global average pooling, linear classifier; what SimpleCNN and ResidualCNN have in common."""

    def _build(self, stages: list[nn.Module], width: int, image_shape: Sequence[int], num_classes: int):
        self.stem = nn.Sequential(
            nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(width * 2 ** len(stages), num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        _check_size(images.shape[-2:], len(self.stages))
        features = self.stages(self.stem(images))  # (batch, width · 2^depth, height / 2^depth, width / 2^depth)
        return self.classifier(features.mean((2, 3)))  # (batch, classes)


class SimpleCNN(_CNN, PyTorchModelHubMixin):
    """A plain convolutional network: `depth` blocks (3 × 3 convolution, batch norm, ReLU) after a stem of `width`.

    Each block halves the resolution by its stride and doubles the channels. `image_shape` is (channels, height, width).
    Raises ValueError for images with a side of fewer than 2**depth pixels.
    """

    def __init__(self, depth: int, width: int = 16, image_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10):
        super().__init__()
        _checked_depth(depth, width, image_shape)
        channels = [width * 2**stage for stage in range(depth + 1)]
        stages = [
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in pairwise(channels)
        ]
        self._build(stages, width, image_shape, num_classes)


class PlainBlock(BasicBlock):
    """torchvision's BasicBlock with its shortcut cut: the same two convolutions and nothing added to them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(out)))


class ResidualCNN(_CNN, PyTorchModelHubMixin):
    """A residual network: `depth` stages of two torchvision BasicBlocks each after a stem of `width` channels.

    The first block of a stage halves the resolution and doubles the channels, with a 1 × 1 convolution and batch norm
    on its shortcut (He et al. 2015, https://arxiv.org/abs/1512.03385). `shortcut=False` is the same network with its
    shortcuts cut. Shape and errors as for `SimpleCNN`.
    """

    def __init__(
        self,
        depth: int,
        width: int = 16,
        image_shape: Sequence[int] = (3, 32, 32),
        num_classes: int = 10,
        shortcut: bool = True,
    ):
        super().__init__()
        _checked_depth(depth, width, image_shape)
        channels = [width * 2**stage for stage in range(depth + 1)]
        self._build([_stage(i, o, shortcut) for i, o in pairwise(channels)], width, image_shape, num_classes)


def _stage(in_channels: int, out_channels: int, shortcut: bool) -> nn.Sequential:
    if not shortcut:
        return nn.Sequential(PlainBlock(in_channels, out_channels, stride=2), PlainBlock(out_channels, out_channels))
    projection = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=2, bias=False), nn.BatchNorm2d(out_channels)
    )
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride=2, downsample=projection), BasicBlock(out_channels, out_channels)
    )


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | Path, image_shape: Sequence[int]) -> Path:
    """Write a model in eval mode and float32 as one ONNX file, which appears whole or not at all.

    Input `images` (float32, batch × channels × height × width, as the model takes them), output `logits` (batch ×
    classes), for batches of any size; `image_shape` is (channels, height, width). The model stays as it was. Needs the
    packages onnx and onnxscript. Raises ValueError for a shape that the model does not take or a model that depends on
    the batch size, and what `torch.onnx.export` raises where it fails.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        install = "python -m pip install --editable '.[onnx]' in the repository's root gets them"
        raise ImportError(f"export_onnx needs the packages onnx and onnxscript; {install}") from error
    if len(image_shape) != 3 or not all(map(_positive, image_shape)):
        what = "(channels, height, width), whole numbers above 0"
        raise ValueError(f"image_shape = {image_shape!r}, but it must be {what}")
    network = type(model).__name__
    exported = copy.deepcopy(model).cpu().float().eval()
    images = torch.zeros(2, *image_shape)  # a batch of 1 would be taken for a constant
    try:
        exported(images)
    except RuntimeError as error:
        raise ValueError(f"{network} takes no images of shape {tuple(image_shape)}: {error}") from error
    names = {"input_names": ["images"], "output_names": ["logits"]}
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(exported, (images,), **names, dynamic_shapes=shapes, dynamo=True, verbose=False)
    graph = program.model.graph
    if any([str(size) for size in value.shape[:1]] != ["batch"] for value in (*graph.inputs, *graph.outputs)):
        # the exporter would fix the batch size in silence
        raise ValueError(
            f"{network} does not give one row of logits per image for batches of any size; "
            "its forward must keep the first dimension of its images as it is"
        )
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, program.model_proto.SerializeToString())
    return path
