"""ImageData (uint8 images in memory or mapped from a file), its stratified split, and its batches."""

import hashlib
import warnings
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from lablib.config import warn_once

UNBALANCED = 5  # above this ratio of the largest to the smallest class, accuracy alone is misleading
_TENSORS = "train_images", "train_labels", "test_images", "test_labels"  # the fields of ImageData that hold tensors


@dataclass(frozen=True)
class ImageData:
    """Images (uint8, number × channels × height × width) and labels (int64), tensors or arrays; else ValueError."""

    name: str
    train_images: torch.Tensor = field(repr=False)
    train_labels: torch.Tensor = field(repr=False)
    test_images: torch.Tensor = field(repr=False)
    test_labels: torch.Tensor = field(repr=False)
    class_names: tuple[str, ...]

    def __post_init__(self):
        # through vars(), as the dataclass is frozen; tensors are not copied, so that changes to them are noticed
        vars(self).update(_arrays=[np.asanyarray(getattr(self, name)) for name in _TENSORS], _hashed_at=None)
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # a mapped array is not writable
            vars(self).update({name: torch.as_tensor(getattr(self, name)) for name in _TENSORS})
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            channels_last = images.ndim == 4 and images.shape[1] > 4 >= images.shape[3]
            if images.dtype != torch.uint8 or images.ndim != 4 or channels_last or images.shape[1:] != self.image_shape:
                given = f"not {images.dtype} of shape {tuple(images.shape)}"
                raise ValueError(f"{part} images must be torch.uint8, number × channels × height × width, {given}")
            classes = [*range(self.num_classes)]
            if labels.dtype != torch.int64 or len(labels) != len(images) or labels.unique().tolist() != classes:
                raise ValueError(f"{part} labels must be int64, one per image, all of 0 to {self.num_classes - 1}")

    @property
    def image_shape(self) -> tuple[int, int, int]:  # channels, height, width
        return tuple(self.train_images.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def imbalance(self) -> float:
        """The ratio of the largest to the smallest class, in training images."""
        counts = self.train_labels.bincount()
        return (counts.max() / counts.min()).item()

    def warn_if_unbalanced(self):
        if self.imbalance > UNBALANCED:
            largest = f"The largest class of {self.name} has {self.imbalance:.0f} times the images of the smallest"
            warn_once(f"{largest}; an experiment's table also shows the balanced accuracy, the mean over classes.")

    @cached_property
    def channel_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of each channel of the training images, on a scale from 0 to 1."""
        counts = torch.zeros(self.image_shape[0], 256, dtype=torch.float64)
        for images in self.train_images.split(1000):  # they may be on disk
            counts += torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts * values).sum(1) / counts.sum(1)
        variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
        return mean.float(), variance.sqrt().where(variance > 0, 1.0).float()  # a constant channel is divided by 1

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 images by the training images' statistics, for a model. ValueError for other images."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.image_shape:
            given = f"not {images.dtype} of shape {tuple(images.shape)}"
            raise ValueError(f"images must be torch.uint8, number × {' × '.join(map(str, self.image_shape))}, {given}")
        mean, std = (s.view(-1, 1, 1).to(images.device) for s in self.channel_statistics)
        return (images.float() / 255 - mean) / std

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all images, labels and class names. Notices in-place changes to tensors, not to NumPy arrays."""
        versions = [getattr(self, name)._version for name in _TENSORS]
        if versions != self._hashed_at:
            digest = hashlib.sha256(repr((self.image_shape, self.class_names)).encode())
            for array in self._arrays:
                digest.update(np.ascontiguousarray(array))
            vars(self).pop("channel_statistics", None)
            vars(self).update(_hashed_at=versions, _digest=digest.hexdigest())
        return self._digest

    def __identity__(self) -> list[str]:
        return [self.name, self.fingerprint]

    def __reduce__(self):
        # joblib shares an array with its workers instead of copying it, and recognises by `id` one it already shares
        return ImageData, (self.name, *self._arrays, self.class_names)


class ImageBatches(torch.utils.data.Dataset):
    """Whole batches by index: {"images": uint8, batch × channels × height × width; "labels": int64}."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor | None = None):
        self.images, self.labels = images, labels
        self.indices = (torch.arange(len(labels)) if indices is None else indices).to(images.device)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        chosen = self.indices[torch.as_tensor(positions).to(self.indices.device)]
        # index_select copies whole images; indexing with [] takes 20 times as long for uint8
        return {"images": self.images.index_select(0, chosen), "labels": self.labels.index_select(0, chosen)}


def fixed_sample(length: int, number: int) -> torch.Tensor:
    """At most `number` sorted indices below `length`: always the same, but random, as data may be sorted by class."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0))[:number].sort().values


def stratified_split(labels: torch.Tensor, validation_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted indices of training and validation images, stratified by class. ValueError for too small a class."""
    options = {"test_size": round(validation_split * len(labels)), "stratify": labels, "random_state": seed}
    try:
        train, validation = train_test_split(np.arange(len(labels)), **options)
    except ValueError as error:
        raise ValueError(f"{len(labels)} images cannot be split with a share of {validation_split}: {error}") from error
    absent = np.setdiff1d(labels, labels[validation])  # classes too small for their share get one image
    moved = np.array([np.random.default_rng(seed).choice(np.flatnonzero(labels == label)) for label in absent], int)
    return torch.from_numpy(np.setdiff1d(train, moved)), torch.from_numpy(np.union1d(validation, moved))


def stratified_subset(indices: torch.Tensor, labels: torch.Tensor, size: int | None, seed: int) -> torch.Tensor:
    """At most `size` of the indices, sorted and stratified by class. ValueError if a class is left without an image."""
    if size is None or size >= len(indices):
        return indices
    counts = labels[indices].bincount().tolist()
    shuffled = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(seed))]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # class by class, shuffled within each
    # each image's place in its class, from 0 to 1: the lowest places contain all classes in proportion
    places = torch.cat([(torch.arange(count) + 0.5) / count for count in counts])
    chosen = by_class[places.argsort(stable=True)[:size]].sort().values
    if len(labels[chosen].unique()) < len(counts):
        raise ValueError(f"max_train_images = {size} leaves a class without an image; use a larger number")
    return chosen
