"""What is trained: the networks, their data and their augmentation, the same for every rival."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lablib import models
from lablib.data import ImageData, stratified_subset
from lablib.datasets import load_data

VALIDATION_SPLIT = 0.1
LEARNING_RATE = 1e-3
EVALUATION_BATCH = 1000  # images, as lablib takes them
SEED = 0


@dataclass(frozen=True)
class Case:
    """A network on a data set.

    An epoch of the benchmark is a part of the training set that takes a rival some seconds: `slow_images` for those
    that prepare image by image, `fast_images` for those that prepare a batch at once; None is all of them.
    """

    name: str
    network: str  # a class of lablib.models
    arguments: dict = field(hash=False)
    dataset: str
    batch_size: int
    slow_images: int | None
    fast_images: int | None
    rotation_degrees: float = 10.0
    translation_fraction: float = 0.0
    horizontal_flip: bool = False

    @property
    def convolutional(self) -> bool:
        return self.network.endswith("CNN")


_MNIST = {"dataset": "mnist", "batch_size": 256, "translation_fraction": 0.1}
_CIFAR = {"dataset": "data/cifar10-jpeg", "batch_size": 128, "horizontal_flip": True}
_EIGHT = (128, 128, 64, 64, 32, 32, 16, 16)

CASES = (
    Case("MLP-2", "MLP", {"hidden_sizes": (128, 64)}, slow_images=10_240, fast_images=None, **_MNIST),
    Case("ResidualMLP-8", "ResidualMLP", {"hidden_sizes": _EIGHT}, slow_images=10_240, fast_images=30_720, **_MNIST),
    Case("SimpleCNN-2", "SimpleCNN", {"depth": 2, "width": 16}, slow_images=5_120, fast_images=12_800, **_CIFAR),
    Case("ResidualCNN-2", "ResidualCNN", {"depth": 2, "width": 16}, slow_images=2_560, fast_images=5_120, **_CIFAR),
    Case("ResidualCNN-4", "ResidualCNN", {"depth": 4, "width": 16}, slow_images=1_280, fast_images=2_560, **_CIFAR),
)


def load(case: Case, images: int | None) -> ImageData:
    """The case's data, with about this many training images besides the validation images; None: all."""
    form = {"image_size": 32, "channels": 3} if case.convolutional else {}
    data = load_data(case.dataset, **form)
    if images is None:
        return data
    wanted = round(images / (1 - VALIDATION_SPLIT))
    chosen = stratified_subset(torch.arange(len(data.train_labels)), data.train_labels, wanted, SEED)
    return replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def build(case: Case, data: ImageData) -> nn.Module:
    """The network with the weights that every rival begins with."""
    torch.manual_seed(SEED)
    network = getattr(models, case.network)
    return network(**case.arguments, image_shape=data.image_shape, num_classes=data.num_classes)
