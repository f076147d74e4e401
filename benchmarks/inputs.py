"""Images one by one, as the usual data sets give them: from PIL images, and from tensors with torchvision's v2."""

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2

from benchmarks.cases import EVALUATION_BATCH, SEED, VALIDATION_SPLIT, Case
from lablib.data import ImageData, stratified_split


def split(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and of the validation part, as lablib takes them."""
    return stratified_split(data.train_labels, VALIDATION_SPLIT, SEED)


def augmentation(case: Case, library) -> list:
    """The case's random transforms from torchvision's `transforms` or `transforms.v2`."""
    shift = case.translation_fraction
    translate = (shift, shift) if shift else None
    affine = library.RandomAffine(case.rotation_degrees, translate, interpolation=InterpolationMode.BILINEAR)
    return [library.RandomHorizontalFlip(), affine] if case.horizontal_flip else [affine]


class PILImages(Dataset):
    """(image, label) by index: a PIL image through torchvision's transforms, as in most tutorials.

    The images lie decoded in memory, which spares this rival the reading of files.
    """

    def __init__(self, case: Case, data: ImageData, indices: torch.Tensor, training: bool):
        mean, std = (statistic.tolist() for statistic in data.channel_statistics)
        to_pil = transforms.ToPILImage()
        self.images = [to_pil(data.train_images[index]) for index in indices]
        self.labels = data.train_labels[indices].tolist()
        random = augmentation(case, transforms) if training else []
        self.transform = transforms.Compose([*random, transforms.ToTensor(), transforms.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.transform(self.images[index]), self.labels[index]


class TensorImages(Dataset):
    """{"images", "labels"} by index: a uint8 tensor through torchvision's v2 transforms."""

    def __init__(self, case: Case, data: ImageData, indices: torch.Tensor, training: bool):
        mean, std = (statistic.tolist() for statistic in data.channel_statistics)
        self.images, self.labels = data.train_images[indices], data.train_labels[indices]
        random = augmentation(case, v2) if training else []
        self.transform = v2.Compose([*random, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        return {"images": self.transform(self.images[index]), "labels": self.labels[index]}


def pil_loaders(case: Case, data: ImageData, workers: int) -> tuple[DataLoader, DataLoader]:
    """Training and validation images in batches."""
    train, validation = split(data)
    how = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
    return (
        DataLoader(PILImages(case, data, train, training=True), case.batch_size, shuffle=True, **how),
        DataLoader(PILImages(case, data, validation, training=False), EVALUATION_BATCH, **how),
    )
