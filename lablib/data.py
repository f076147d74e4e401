"""A name or a folder -> ImageData (uint8 tensors in memory); and its parts: training, validation, test."""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset, Sampler

_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


@dataclass(frozen=True)
class ImageData:
    """A classification data set in memory.

    Images are uint8, images × channels × height × width; labels are int64 class numbers, images.
    Raises ValueError where shapes, types or labels do not fit together, or a class has no image.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple[str, ...]

    def __post_init__(self):
        for part in ("train", "test"):
            self._check_part(part, getattr(self, f"{part}_images"), getattr(self, f"{part}_labels"))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise ValueError(
                f"{self.name}: the training images are {tuple(self.train_images.shape[1:])} and the test images "
                f"{tuple(self.test_images.shape[1:])} (channels, height, width); they must be of one size, "
                "as load_data(..., image_size=32, channels=3) makes them"
            )
        if len(self.class_names) < 2:
            raise ValueError(f"{self.name} has {len(self.class_names)} class; a classifier needs at least two")

    def _check_part(self, part: str, images: torch.Tensor, labels: torch.Tensor):
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"{self.name}: the {part} images are {images.dtype} of shape {tuple(images.shape)}; "
                f"they must be torch.uint8, images × channels × height × width{_conversion(images)}"
            )
        if 0 in images.shape[1:]:
            raise ValueError(
                f"{self.name}: the {part} images have no pixels: their channels, height and width are "
                f"{tuple(images.shape[1:])}, and each must be 1 or more"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{self.name}: the {part} labels are {labels.dtype} of shape {tuple(labels.shape)}; "
                f"they must be torch.int64, one for each of the {len(images)} images; "
                "torch.as_tensor(labels).long() makes such of whole numbers"
            )
        counts = np.bincount(labels.clamp(min=0).numpy(), minlength=len(self.class_names))
        if len(counts) > len(self.class_names) or (len(labels) and labels.min() < 0):
            raise ValueError(
                f"{self.name}: the {part} labels go from {labels.min()} to {labels.max()}, "
                f"but there are {len(self.class_names)} classes, so they must be 0 to {len(self.class_names) - 1}"
            )
        for name, count in zip(self.class_names, counts, strict=True):
            if count == 0:
                raise ValueError(
                    f"{self.name}: class {name!r} has no {part} images; each class needs some; "
                    "add images, or take the class out and number the others anew"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)"""
        return tuple(self.train_images.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def channel_statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the training images by channel, on the scale 0 to 1."""
        counts = torch.zeros(len(self.train_images[0]), 256, dtype=torch.float64)
        for images in self.train_images.split(
            max(1, 2**21 // self.train_images[0].numel())
        ):  # they may lie on the disk
            pixels = images.transpose(0, 1).flatten(1)  # (channels, pixels of all images)
            counts += torch.stack([torch.bincount(channel, minlength=256) for channel in pixels])
        values = torch.arange(256, dtype=torch.float64) / 255
        mean = (counts * values).sum(1) / counts.sum(1)
        variance = (counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)
        std = variance.sqrt().where(variance > 0, 1.0)  # a constant channel stays what it is
        return mean.float(), std.float()

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images as a model takes them: float, shifted and scaled by the training images' statistics."""
        mean, std = (s.view(-1, 1, 1) for s in self.channel_statistics)
        return (images.float() / 255 - mean) / std

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every image, label and class name: two data sets with the same one are the same."""
        digest = hashlib.sha256(repr((self.image_shape, self.class_names)).encode())
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def __identity__(self) -> list[str]:
        return [self.name, self.fingerprint]

    @classmethod
    def from_arrays(cls, name: str, *arrays: np.ndarray, class_names: tuple[str, ...] = ()) -> "ImageData":
        """From NumPy arrays, in the order of the fields; those that are mapped from a file stay there."""
        data = cls(name, *map(_tensor, arrays), class_names)
        data.__dict__["_arrays"] = dict(zip(_TENSORS, arrays, strict=True))
        return data

    def __getstate__(self):
        # As arrays, joblib hands the images to its worker processes in a shared memory map instead of copying them.
        return {k: self._arrays[k] if isinstance(v, torch.Tensor) else v for k, v in self._fields.items()} | {
            "fingerprint": self.fingerprint
        }

    def __setstate__(self, state):
        for name, value in state.items():
            self.__dict__[name] = _tensor(value) if isinstance(value, np.ndarray) else value

    @property
    def _fields(self) -> dict:
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    @cached_property
    def _arrays(
        self,
    ) -> dict[str, np.ndarray]:  # kept, since joblib recognises an array that it has seen by its identity
        return {k: v.numpy() for k, v in self._fields.items() if isinstance(v, torch.Tensor)}


def _conversion(images: torch.Tensor) -> str:
    """How images of another type become uint8, as the end of an error's message."""
    if not isinstance(images, torch.Tensor):
        return "; torch.from_numpy(images) makes a tensor of an array"
    if images.dtype == torch.uint8:
        return "; images.unsqueeze(1) gives grey images their channel" if images.ndim == 3 else ""
    if images.is_floating_point() and not (finite := images.isfinite()).all():
        bad = [name for name, found in (("NaN", images.isnan()), ("infinite values", images.isinf())) if found.any()]
        number = int((~finite).reshape(len(images), -1).any(1).sum())
        return f". {number} of them hold {' and '.join(bad)}: repair or leave out these first"
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0, 0)
    if (images.is_floating_point() or images.dtype == torch.bool) and low >= 0 and high <= 1:
        return "; write (255 * images).round().to(torch.uint8) for values from 0 to 1 as these are"
    if low >= 0 and high <= 255:
        return "; write images.round().to(torch.uint8) for values from 0 to 255 as these are"
    return f"; scale these from {low:g} to {high:g} to 0 to 255, and write images.round().to(torch.uint8)"


def _tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # nobody writes to it
        return torch.from_numpy(array)


class ImageBatches(Dataset):
    """Some images of a data set by index; `__getitems__` gives a whole batch at once.

    A batch is {"images": uint8, batch × channels × height × width; "labels": int64, batch}.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor | None = None):
        self.images, self.labels = images, labels
        self.indices = torch.arange(len(labels)) if indices is None else indices
        self.indices = self.indices.to(images.device)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        chosen = self.indices[torch.as_tensor(positions).to(self.indices.device)]
        # index_select copies whole images; indexing with [] takes 20 times as long for uint8
        return {"images": self.images.index_select(0, chosen), "labels": self.labels.index_select(0, chosen)}


class ShuffledBatches(Sampler):
    """Batches of positions as tensors, in another order each epoch, which the seed and the epoch decide.

    It is the order of accelerate's `SeedableRandomSampler`, without a Python number for each image.
    """

    def __init__(self, length: int, batch_size: int, seed: int):
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, 0
        self.drop_last, self.sampler = False, self  # what accelerate asks a batch sampler for

    def set_epoch(self, epoch: int):
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.length, generator=generator).split(self.batch_size)
        self.epoch += 1


def stratified_split(labels: torch.Tensor, validation_split: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and of the validation part, sorted; each class is shared out alike.

    Raises ValueError where a class has too few images to be in both parts.
    """
    classes, counts = labels.unique(return_counts=True)
    error = ValueError(
        f"{len(labels)} images, {counts.min()} of the rarest of {len(classes)} classes, cannot be split with "
        f"validation_split = {validation_split}: each part needs an image of each class; add images or change it"
    )
    num_validation = round(validation_split * len(labels))
    if counts.min() < 2 or num_validation < len(classes) or len(labels) - num_validation < len(classes):
        raise error
    parts = train_test_split(
        np.arange(len(labels)), test_size=num_validation, stratify=labels.numpy(), random_state=seed
    )
    train, validation = (torch.from_numpy(np.sort(part)) for part in parts)
    if any(len(labels[part].unique()) < len(classes) for part in (train, validation)):
        raise error
    return train, validation


def stratified_subset(indices: torch.Tensor, labels: torch.Tensor, size: int | None, seed: int) -> torch.Tensor:
    """At most `size` of some indices, sorted, each class with its share; all of them if size is None.

    `labels` are those of the whole set. Raises ValueError for a size that leaves a class without an image.
    """
    if size is None or size >= len(indices):
        return indices
    classes, counts = labels[indices].unique(return_counts=True)
    shares = counts.double() * size / len(indices)
    sizes = shares.floor().long()
    largest_rests = (shares - sizes).argsort(descending=True, stable=True)[: size - int(sizes.sum())]
    sizes[largest_rests] += 1
    if sizes.min() < 1:
        raise ValueError(
            f"max_train_images = {size} of {len(indices)} training images in {len(classes)} classes leaves a class "
            "without an image; write a larger number, or None for all"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, count in zip(classes, sizes.tolist(), strict=True):
        of_class = indices[labels[indices] == label]
        chosen.append(of_class[torch.randperm(len(of_class), generator=generator)[:count]])
    return torch.cat(chosen).sort().values
