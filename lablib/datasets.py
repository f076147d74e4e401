"""A name or a folder -> ImageData; `python -m lablib.datasets` splits a folder of images, or deletes its caches."""

import argparse
import hashlib
import os
import shutil
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import functional as F

from lablib.config import locate_data
from lablib.data import ImageData, stratified_split


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike = "data",
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load a data set by its name, or a folder with `train/<class>/` and `test/<class>/` in it.

    `digits` ships with scikit-learn, here scaled to 28 × 28; the other names are torchvision's, read from `data_dir` or
    downloaded there. `image_size` (pixels, or height and width) scales all images, `channels` (1 or 3) makes them grey
    or coloured. A folder, whose images are coloured by default, is read by `list_images` and `read_image` and decoded
    once into a file in it, or in the system's temporary folder if it is not writable, and mapped from there.
    Raises ValueError for an unsuitable name, folder or image, OSError for files that cannot be read.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}, but it must be None, 1 or 3")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    found = locate_data(name, data_dir)
    if isinstance(found, Path):
        return _from_folder(found, size, channels or 3)
    if found == "digits":
        return _digits(size or (28, 28), channels or 1)
    return _from_torchvision(found, os.path.expanduser(data_dir), size, channels)


def _digits(size: tuple[int, int], channels: int) -> ImageData:
    """1,797 scans of 8 × 8 pixels and 17 grey levels; a fixed fifth of them is the test set."""
    scans = load_digits()
    pixels = torch.from_numpy(scans.images).float().unsqueeze(1) * (255 / 16)
    scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    images, labels = scaled.round().to(torch.uint8).repeat(1, channels, 1, 1), torch.from_numpy(scans.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=scans.target, random_state=0)
    return ImageData("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _from_torchvision(name: str, data_dir: str, size, channels) -> ImageData:
    tensors = []
    for part in ("train", "test"):
        options = {"split": part} if name in ("SVHN", "STL10") else {"train": part == "train"}
        options |= {"split": "balanced"} if name == "EMNIST" else {}
        dataset = getattr(datasets, name)(data_dir, download=True, **options)
        images = torch.as_tensor(dataset.data)  # grey without channels, coloured with channels last or first
        images = images.unsqueeze(1) if images.ndim == 3 else images.movedim(images.shape.index(3), 1)
        if name == "EMNIST":  # its files are transposed
            images = images.transpose(2, 3)
        if channels not in (None, images.shape[1]):
            images = images.repeat(1, 3, 1, 1) if channels == 3 else F.rgb_to_grayscale(images)
        if size is not None:
            images = F.resize(images, list(size), antialias=True)
        labels = dataset.labels if hasattr(dataset, "labels") else dataset.targets
        tensors += [images.contiguous(), torch.as_tensor(labels).long()]
    classes = getattr(dataset, "classes", range(10))
    return ImageData(name, *tensors, tuple(str(label).split(" - ")[0] for label in classes))  # MNIST says "7 - seven"


def list_images(folder: str | os.PathLike) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes of a folder of class folders, and each image's path and label, in the order in which they are loaded.

    As torchvision's ImageFolder, but without hidden files.
    Raises ValueError for fewer than two classes, FileNotFoundError for one without images.
    """
    folder = Path(os.path.expanduser(folder))
    classes = sorted(place.name for place in folder.glob("[!.]*/"))
    if len(classes) < 2:
        advice = "`python -m lablib.datasets split FOLDER` makes train/ and test/ from one folder per class"
        raise ValueError(f"{folder} needs folders of images, one per class, at least two; it has {classes}; {advice}")
    extensions = (*IMG_EXTENSIONS, ".jfif", ".gif", ".heic")  # HEIC is found, so that it is an error and not ignored
    images = make_dataset(folder, {name: label for label, name in enumerate(classes)}, extensions)
    return classes, [(path, label) for path, label in images if os.sep + "." not in path.removeprefix(str(folder))]


def _from_folder(folder: Path, size, channels: int) -> ImageData:
    (classes, train), (test_classes, test) = (list_images(folder / part) for part in ("train", "test"))
    if classes != test_classes:
        raise ValueError(f"{folder}: train/ and test/ need the same classes; they have {classes} and {test_classes}")
    paths, labels = zip(*train, *test, strict=True)
    images, labels = _decoded(folder, paths, size, channels), np.array(labels)
    arrays = images[: len(train)], labels[: len(train)], images[len(train) :], labels[len(train) :]
    seen = {hash(image.tobytes()) for image in arrays[0]}
    if leaked := sum(hash(image.tobytes()) in seen for image in arrays[2]):
        warnings.warn(f"{folder}: {leaked:,} of {len(test):,} test images are also in train/", stacklevel=3)
    return ImageData(Path(os.path.abspath(folder)).name, *arrays, tuple(classes))


def _decoded(folder: Path, paths: tuple[str, ...], size, channels: int) -> np.ndarray:
    """Images × channels × height × width, mapped from a file, which is written unless these images have one."""
    versions = [(path.removeprefix(str(folder)), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr(("read_image, version 1", size, channels, versions)).encode()).hexdigest()[:16]
    cache = Path(folder if os.access(folder, os.W_OK) else tempfile.gettempdir(), f".lablib-{key}.npy")
    if cache.exists():
        return np.load(cache, mmap_mode="r")
    read = partial(read_image, size=size, channels=channels)
    shape = (len(paths), *read(paths[0]).shape)
    print(f"decoding {len(paths):,} images into {cache}", flush=True)
    with tempfile.TemporaryDirectory(prefix=".lablib-", dir=cache.parent) as scratch, ThreadPoolExecutor() as pool:
        with open(Path(scratch, cache.name), "wb") as file:  # not mapped, since a full disk would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(paths), 128):  # given all paths at once, the pool would outrun the disk
                images = [*pool.map(read, paths[start : start + 128])]
                if others := {image.shape for image in images} - {shape[1:]}:
                    raise ValueError(f"{folder} has images of shapes {shape[1:]} and {others.pop()}; set image_size")
                file.writelines(images)
        os.replace(file.name, cache)
    return np.load(cache, mmap_mode="r")


def read_image(path: str | os.PathLike, size: tuple[int, int] | None, channels: int = 3) -> np.ndarray:
    """An image as `load_data` reads it from a folder: uint8, channels × height × width.

    EXIF orientation is applied and transparency composited on white. `size` is (height, width) or None: the shorter
    side is scaled to it, the longer one cropped about its centre.
    Raises ValueError for a file that is damaged, not an image, or of more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            mode, image = image.mode, ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"{path} is damaged or not an image ({error}); replace or delete it") from error
    if mode[0] in "IF":  # Pillow cuts off what is above 255
        raise ValueError(f"{path} has pixels of 16 or 32 bits (mode {mode}); save it with 8 bits per channel")
    if size is not None:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.atleast_3d(np.asarray(image)).transpose(2, 0, 1))


def split(folder: str | os.PathLike, test: float = 0.2) -> None:
    """Copy the images of a folder of class folders to FOLDER-split, the share `test` of each class to its `test/`.

    Raises ValueError for an unsuitable folder or share, FileExistsError if FOLDER-split exists.
    """
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
    parser = argparse.ArgumentParser(prog="python -m lablib.datasets")
    parser.add_argument("command", choices=["split", "clean"])
    parser.add_argument("folder", help="split: one with a folder per class; clean: one with train/ and test/")
    parser.add_argument("--test", type=float, default=0.2, help="split: the share that goes to test/ (default: 0.2)")
    options = parser.parse_args()
    if options.command == "split":
        split(options.folder, options.test)
    else:  # an experiment that uses one of these files would fail in its next run
        for cache in Path(options.folder).glob(".lablib-*"):
            cache.unlink() if cache.is_file() else shutil.rmtree(cache)  # a folder is left by a process that was killed
            print(f"deleted {cache}")
