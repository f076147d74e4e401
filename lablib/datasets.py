"""Load ImageData by name or from a folder; `python -m lablib.datasets split` splits a folder into train/ and test/."""

import argparse
import hashlib
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets, transforms

from lablib.config import warn
from lablib.data import ImageData, stratified_split

_TORCHVISION = ("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10")
_NAMES = {name.lower(): name for name in ("digits", *_TORCHVISION)}
Place = str | os.PathLike
Size = tuple[int, int] | None  # height and width in pixels


def load_data(
    name: Place, data_dir: Place = "data", *, image_size: int | Size = None, channels: int | None = None
) -> ImageData:
    """Load a data set by name, or from a folder that contains `train/<class>/` and `test/<class>/`.

    `digits` is scikit-learn's, at 28 × 28 by default; others are torchvision's, downloaded to `data_dir`. `image_size`
    (pixels, or height and width) rescales images; `channels` is 1 (grey) or 3 (colour, the default for folders). A
    folder is decoded once, to a file in it or in the temporary folder. ValueError for a bad name, folder or image.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}, but it must be None, 1 or 3")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and not (len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError(f"image_size = {image_size!r}, but it must be one or two positive numbers of pixels")
    known, data_dir = _NAMES.get(str(name).lower().replace("-", "")), os.path.expanduser(data_dir)
    places = os.path.join(".", os.path.expanduser(name)), os.path.join(data_dir, name)
    folder = next(filter(os.path.isdir, places), None)
    if known and folder and os.path.isdir(f"{folder}/train"):
        raise ValueError(f"{name!r} is a known data set and also a folder here; write {folder!r} for the folder")
    if known == "digits":
        return _digits(size or (28, 28), channels or 1)
    if known:
        return _from_torchvision(known, data_dir, size, channels)
    if folder:
        return _from_folder(Path(folder), size, channels or 3)
    names = ", ".join(_NAMES)
    raise ValueError(f"dataset = {name!r} is neither a known name ({names}) nor a folder with train/ and test/")


def _digits(size: tuple[int, int], channels: int) -> ImageData:
    scans = load_digits()  # 8 × 8 pixels, 17 grey levels
    pixels = torch.from_numpy(scans.images).float().unsqueeze(1) * (255 / 16)
    scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    images, labels = scaled.round().to(torch.uint8).repeat(1, channels, 1, 1), torch.from_numpy(scans.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=scans.target, random_state=0)
    return ImageData("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _from_torchvision(name: str, data_dir: str, size: Size, channels: int | None) -> ImageData:
    tensors = []
    for part in ("train", "test"):
        options = {"split": part} if name in ("SVHN", "STL10") else {"train": part == "train"}
        options |= {"split": "balanced"} if name == "EMNIST" else {}
        dataset = getattr(datasets, name)(data_dir, download=True, **options)
        images = torch.as_tensor(dataset.data)  # grey: no channels; colour: channels last or first
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(images.shape.index(3), 1)
        images = images.mT if name == "EMNIST" else images  # its files are transposed
        if channels not in (None, images.shape[1]):
            images = images.repeat(1, 3, 1, 1) if channels == 3 else transforms.functional.rgb_to_grayscale(images)
        images = transforms.functional.resize(images, [*(size or images.shape[2:])])
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        tensors += [images.contiguous(), torch.as_tensor(labels).long()]
    classes = getattr(dataset, "classes", range(10))
    return ImageData(name, *tensors, tuple(str(label).split(" - ")[0] for label in classes))  # MNIST says "7 - seven"


def list_images(folder: Place) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes, and each image's path and label, as ImageFolder, without hidden files. ValueError for one class."""
    folder = Path(os.path.expanduser(folder))
    classes = sorted(place.name for place in folder.glob("[!.]*/"))
    if len(classes) < 2:
        advice = "try `python -m lablib.datasets split`"
        raise ValueError(f"{folder} needs one folder of images per class, two or more, not {classes}; {advice}")
    extensions = (*datasets.folder.IMG_EXTENSIONS, ".jfif", ".gif", ".heic")  # HEIC is an error rather than ignored
    images = datasets.folder.make_dataset(folder, {name: label for label, name in enumerate(classes)}, extensions)
    return classes, [(path, label) for path, label in images if os.sep + "." not in path.removeprefix(str(folder))]


def _from_folder(folder: Path, size: Size, channels: int) -> ImageData:
    (classes, train), (test_classes, test) = (list_images(folder / part) for part in ("train", "test"))
    if classes != test_classes:
        raise ValueError(f"{folder}: train/ and test/ need the same classes; they have {classes} and {test_classes}")
    paths, labels = zip(*train, *test, strict=True)
    files = [(path, os.stat(path)) for path in paths]
    versions = [
        (path.removeprefix(str(folder)), file.st_size, file.st_mtime_ns, file.st_ctime_ns) for path, file in files
    ]
    key = hashlib.sha256(repr((os.path.realpath(folder), size, channels, versions)).encode()).hexdigest()[:16]
    cache = Path(folder if os.access(folder, os.W_OK) else tempfile.gettempdir(), f".lablib-{key}.npy")
    if not cache.exists():
        _decode(paths, cache, lambda path: read_image(path, size, channels))
    images, labels, first_test = np.load(cache, mmap_mode="r"), np.array(labels), len(train)
    arrays = images[:first_test], labels[:first_test], images[first_test:], labels[first_test:]
    seen = {hash(image.tobytes()) for image in arrays[0]}
    if leaked := sum(hash(image.tobytes()) in seen for image in arrays[2]):
        warn(f"{folder}: {leaked:,} of {len(test):,} test images are also in train/")
    return ImageData(Path(os.path.abspath(folder)).name, *arrays, tuple(classes))


def _decode(paths: tuple[str, ...], cache: Path, read) -> None:
    print(f"decoding {len(paths):,} images into {cache}", flush=True)
    shape = (len(paths), *read(paths[0]).shape)
    with tempfile.TemporaryDirectory(prefix=".lablib-", dir=cache.parent) as scratch, ThreadPoolExecutor() as pool:
        with open(Path(scratch, cache.name), "wb") as file:  # not memory-mapped: a full disk would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for path, image in zip(paths, pool.map(read, paths), strict=True):
                if image.shape != shape[1:]:
                    raise ValueError(f"{path} differs in size from {paths[0]}; set image_size")
                file.write(image)
        os.replace(file.name, cache)  # so it is complete or absent


def read_image(path: Place, size: Size, channels: int = 3) -> np.ndarray:
    """Read an image as `load_data` does from a folder: uint8, channels × height × width.

    EXIF orientation is applied, and transparency is composited on white. The image is scaled to cover `size` (height,
    width) and cropped about its centre; None keeps its size. Raises ValueError for a file that cannot be used.
    """
    try:
        with Image.open(path) as image:
            mode, image = image.mode, ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"{path} is damaged or not an image ({error}); replace or delete it") from error
    if mode[0] in "IF":  # Pillow would clip values above 255
        raise ValueError(f"{path} has pixels of 16 or 32 bits (mode {mode}); save it with 8 bits per channel")
    image = ImageOps.fit(image, size[::-1] if size else image.size, Image.Resampling.BILINEAR)
    return transforms.functional.pil_to_tensor(image).contiguous().numpy()


def split(folder: Place, test: float = 0.2) -> None:
    """Copy the images of FOLDER/<class>/ to FOLDER-split: a share `test` of each class to test/, the rest to train/."""
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    classes, images = list_images(folder)
    if {"train", "test"} <= {name.lower().removesuffix("ing") for name in classes}:  # also Training and Testing
        raise ValueError(f"{folder} is already split; name its two folders train and test")
    parts = stratified_split(torch.tensor([label for _, label in images]), test, seed=0)
    target = folder.with_name(f"{folder.name}-split")
    target.mkdir()
    for part, indices in zip(("train", "test"), parts, strict=True):
        for path, _ in (images[index] for index in indices):
            copy = target / part / os.path.relpath(path, folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
        print(f"wrote {target / part}: {len(indices):,} images of {len(classes)} classes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m lablib.datasets")
    command = parser.add_subparsers(required=True, metavar="split").add_parser("split", help=split.__doc__)
    command.add_argument("folder", help="contains one folder of images per class")
    command.add_argument("--test", type=float, default=0.2, help="the share that goes to test/ (default: 0.2)")
    split(**vars(parser.parse_args()))
