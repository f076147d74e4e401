"""Images one by one, as the usual data sets give them: from PIL images, or from tensors with torchvision's v2."""

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_pil_image

from benchmarks.cases import EVALUATION_BATCH, SEED, VALIDATION_SPLIT, Case
from lablib.data import ImageData, stratified_split


def split(data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the training and of the validation part, as lablib takes them."""
    return stratified_split(data.train_labels, VALIDATION_SPLIT, SEED)


class SingleImages(Dataset):
    """{"images", "labels"} by index: an image through torchvision's transforms.

    With `pil` they are PIL images, as in most tutorials; decoded in memory, which spares this rival reading files.
    Otherwise they are uint8 tensors, for the transforms of v2.
    """

    def __init__(self, case: Case, data: ImageData, indices: torch.Tensor, training: bool, pil: bool):
        images, library = data.train_images[indices], transforms if pil else v2
        self.images = [to_pil_image(image) for image in images] if pil else images
        self.labels = data.train_labels[indices].tolist()
        shift, random = case.translation_fraction, []
        if training:
            translate = (shift, shift) if shift else None
            random = [library.RandomAffine(case.rotation_degrees, translate, interpolation=InterpolationMode.BILINEAR)]
        if training and case.horizontal_flip:
            random.insert(0, library.RandomHorizontalFlip())
        to_float = transforms.ToTensor() if pil else v2.ToDtype(torch.float32, scale=True)
        mean, std = (statistic.tolist() for statistic in data.channel_statistics)
        self.transform = library.Compose([*random, to_float, library.Normalize(mean, std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"images": self.transform(self.images[index]), "labels": self.labels[index]}


def pil_loaders(case: Case, data: ImageData, workers: int) -> tuple[DataLoader, DataLoader]:
    """Training and validation images in batches."""
    train, validation = split(data)
    how = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
    return (
        DataLoader(SingleImages(case, data, train, training=True, pil=True), case.batch_size, shuffle=True, **how),
        DataLoader(SingleImages(case, data, validation, training=False, pil=True), EVALUATION_BATCH, **how),
    )
