"""A name -> ImageData: scikit-learn's digits, torchvision's data sets, or a folder."""

import difflib
import os
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from lablib.data import ImageData
from lablib.folders import load_folder, prepared, stacked

# name -> torchvision's class, and what it calls its two parts
_TRAIN_FLAG = ({"train": True}, {"train": False})
_SPLIT_NAME = ({"split": "train"}, {"split": "test"})
_TORCHVISION = {
    "mnist": ("MNIST", *_TRAIN_FLAG),
    "fashionmnist": ("FashionMNIST", *_TRAIN_FLAG),
    "kmnist": ("KMNIST", *_TRAIN_FLAG),
    "emnist": ("EMNIST", {"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "usps": ("USPS", *_TRAIN_FLAG),
    "cifar10": ("CIFAR10", *_TRAIN_FLAG),
    "cifar100": ("CIFAR100", *_TRAIN_FLAG),
    "svhn": ("SVHN", *_SPLIT_NAME),
    "stl10": ("STL10", *_SPLIT_NAME),
    "gtsrb": ("GTSRB", *_SPLIT_NAME),
    "dtd": ("DTD", *_SPLIT_NAME),
    "food101": ("Food101", *_SPLIT_NAME),
    "flowers102": ("Flowers102", *_SPLIT_NAME),
    "fgvcaircraft": ("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train"}, {"split": "val"}),
    "country211": ("Country211", *_SPLIT_NAME),
    "pcam": ("PCAM", *_SPLIT_NAME),
    "renderedsst2": ("RenderedSST2", *_SPLIT_NAME),
}
DATASET_NAMES = ("digits", *_TORCHVISION)


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike = "data",
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load a data set by its name, or a folder with `train/<class>/` and `test/<class>/` in it.

    `digits` ships with scikit-learn and is scaled up to 28 × 28; the other names are torchvision's, read from
    `data_dir` in torchvision's layout and downloaded there if they are missing. `image_size` (pixels, or height and
    width) scales every image, `channels` (1 or 3) makes them grey or coloured; without them images stay as they are.

    Raises ValueError for an unknown name or an argument or folder that does not fit, FileNotFoundError where files are
    missing and cannot be downloaded, and OSError naming a damaged file.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}, but it must be None, 1 or 3")
    size = image_size if image_size is None or isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if size is not None and not (len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)):
        raise ValueError(f"image_size = {image_size!r}, but it must be a number of pixels above 0, or two")
    key = str(name).lower().replace("-", "").replace("_", "")
    if key == "digits":
        return _load_digits(size or (28, 28), channels or 1)
    if key in _TORCHVISION:
        return _load_torchvision(key, Path(data_dir), size, channels)
    for folder in (Path(name), Path(data_dir) / name):
        if folder.is_dir():
            return load_folder(folder, size, channels)
    close = difflib.get_close_matches(key, DATASET_NAMES, n=1)
    raise ValueError(
        f"dataset = {str(name)!r} is neither a known name nor a folder"
        + (f"; did you mean {close[0]!r}?" if close else ";")
        + f" Known names: {', '.join(DATASET_NAMES)}. A folder needs train/<class>/ and test/<class>/ in it."
    )


def _load_digits(size: tuple[int, int], channels: int) -> ImageData:
    """1,797 scans of 8 × 8 pixels and 17 grey levels; a fixed fifth of them is the test set."""
    scans = load_digits()
    pixels = torch.from_numpy(scans.images).float().unsqueeze(1) * (255 / 16)
    scaled = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    images = scaled.round().to(torch.uint8).repeat(1, channels, 1, 1)
    labels = torch.from_numpy(scans.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=scans.target, random_state=0)
    return ImageData(
        "digits", images[train], labels[train], images[test], labels[test], tuple(str(c) for c in scans.target_names)
    )


def _load_torchvision(key: str, data_dir: Path, size, channels) -> ImageData:
    class_name, train_arguments, test_arguments = _TORCHVISION[key]
    dataset_class = getattr(torchvision.datasets, class_name)
    parts, names = [], None
    for arguments in (train_arguments, test_arguments):
        try:
            dataset = dataset_class(str(data_dir), **arguments, download=True)
        except Exception as error:
            raise _missing_or_damaged(class_name, data_dir, error) from error
        parts += _dataset_tensors(dataset, class_name, size, channels)
        names = names or getattr(dataset, "classes", None)
    names = names or range(int(parts[1].max()) + 1)
    return ImageData(class_name, *parts, tuple(str(n).split(" - ")[0] for n in names))  # MNIST says "7 - seven"


def _missing_or_damaged(class_name: str, data_dir: Path, error: Exception) -> Exception:
    where, files = _expected_files(class_name, data_dir)
    if damaged := _first_damaged(where, files):
        return OSError(
            f"{class_name} in {where} cannot be read, since one of its files is damaged: {damaged}. Delete that file "
            f"and put a good copy there ({type(error).__name__}: {error})"
        )
    looked_for = ", ".join(name for name, _ in files) or "its files"
    return FileNotFoundError(
        f"{class_name} is not at hand: looked for {looked_for} in {where}, and downloading it failed "
        f"({type(error).__name__}: {error}). Put the files there or connect to a network; "
        "dataset = 'digits' needs neither"
    )


def _expected_files(class_name: str, data_dir: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Where torchvision keeps a data set, and the names and MD5 sums of its files, as far as its class tells them."""
    cls = getattr(torchvision.datasets, class_name)
    if hasattr(cls, "train_list"):  # CIFAR and STL
        return data_dir / cls.base_folder, [(name, md5) for name, md5 in [*cls.train_list, *cls.test_list]]
    if class_name == "SVHN":
        return data_dir, [tuple(cls.split_list[part][1:]) for part in ("train", "test")]
    if hasattr(cls, "resources") and class_name != "EMNIST":  # EMNIST inherits MNIST's list and has other files
        return data_dir / class_name / "raw", list(cls.resources)
    return data_dir, []


def _first_damaged(where: Path, files: list[tuple[str, str]]) -> Path | None:
    for name, md5 in files:
        file, unpacked = where / name, where / name.removesuffix(".gz")
        if file.exists() and not torchvision.datasets.utils.check_integrity(str(file), md5):
            return file
        if unpacked != file and unpacked.exists():
            try:
                torchvision.datasets.mnist.read_sn3_pascalvincent_tensor(str(unpacked))
            except Exception:
                return unpacked
    return None


def _dataset_tensors(dataset, name: str, size, channels) -> list[torch.Tensor]:
    """Images and labels of a torchvision data set."""
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    pixels = getattr(dataset, "data", None)
    if labels is None or pixels is None:
        pictures, labels = [], []
        for index in range(len(dataset)):
            image, label = dataset[index]
            pictures.append(prepared(image, size, channels))
            labels.append(label)
        images = stacked(pictures, lambda i: f"{name}, image {i}")
    else:
        pixels = torch.as_tensor(pixels)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)  # (images, 1, height, width)
        elif pixels.shape[-1] == 3:
            pixels = pixels.permute(0, 3, 1, 2)  # from images × height × width × channels
        images = _converted(pixels.contiguous(), size, channels)
    return [images, torch.as_tensor(labels).long()]


def _converted(images: torch.Tensor, size, channels) -> torch.Tensor:
    """uint8 images of another size or number of channels."""
    if channels == 3 and images.shape[1] == 1:
        images = images.repeat(1, 3, 1, 1)
    elif channels == 1 and images.shape[1] == 3:
        images = torchvision.transforms.functional.rgb_to_grayscale(images)
    if size is not None and tuple(images.shape[2:]) != tuple(size):
        images = torchvision.transforms.functional.resize(images, list(size), antialias=True)
    return images
