"""A name or a folder -> ImageData."""

import difflib
import hashlib
import itertools
import os
import time
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms import functional as F

from lablib.data import ImageData

_CLASSES = ("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10")
_TORCHVISION = {name.lower(): name for name in _CLASSES}
DATASET_NAMES = ("digits", *_TORCHVISION)


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike = "data",
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load a data set by its name, or a folder with `train/<class>/` and `test/<class>/` in it.

    `digits` ships with scikit-learn and is scaled up to 28 × 28. The other names are torchvision's, read from
    `data_dir` in torchvision's layout and downloaded there if they are missing; EMNIST is turned upright. `image_size`
    (pixels, or height and width) scales every image; `channels` (1 or 3) makes them grey or coloured.

    A folder is read as torchvision's ImageFolder reads it, without hidden files. EXIF orientation is applied and
    transparency composited on white. The pixels are mapped from a file in the folder, `.lablib-32x32-rgb-<key>.npy`,
    with a key of the images' names, sizes and times. Files with an old key are deleted when a new one is written,
    unless they were loaded within a day. If the folder is not writable, its images are decoded into memory.

    Raises ValueError for an unknown name, or an argument or a folder that does not fit, and OSError naming files that
    are damaged, or missing and cannot be downloaded.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}, but it must be None, 1 or 3")
    size = image_size if image_size is None or isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if size is not None and not (len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)):
        raise ValueError(f"image_size = {image_size!r}, but it must be a number of pixels above 0, or two")
    key = str(name).lower().replace("-", "").replace("_", "")
    if key == "digits":
        return _digits(size or (28, 28), channels or 1)
    if key in _TORCHVISION:
        return _from_torchvision(_TORCHVISION[key], Path(data_dir), size, channels)
    for folder in (Path(name), Path(data_dir) / name):
        if folder.is_dir():
            return _from_folder(folder.absolute(), size, channels)
    close = difflib.get_close_matches(key, DATASET_NAMES, n=1)
    raise ValueError(
        f"dataset = {str(name)!r} is neither a known name nor a folder"
        + (f"; did you mean {close[0]!r}?" if close else ";")
        + f" Known names: {', '.join(DATASET_NAMES)}. A folder needs train/<class>/ and test/<class>/ in it."
    )


def _digits(size: tuple[int, int], channels: int) -> ImageData:
    """1,797 scans of 8 × 8 pixels and 17 grey levels; a fixed fifth of them is the test set."""
    scans = load_digits()
    pixels = torch.from_numpy(scans.images).float().unsqueeze(1) * (255 / 16)
    scaled = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    images, labels = scaled.round().to(torch.uint8).repeat(1, channels, 1, 1), torch.from_numpy(scans.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=scans.target, random_state=0)
    return ImageData("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _from_torchvision(name: str, data_dir: Path, size, channels) -> ImageData:
    tensors, dataset_class = [], getattr(datasets, name)
    for part in ("train", "test"):
        arguments = {"split": part} if name in ("SVHN", "STL10") else {"train": part == "train"}
        if name == "EMNIST":
            arguments["split"] = "balanced"
        try:
            dataset = dataset_class(str(data_dir), download=True, **arguments)
        except Exception as error:
            raise _unreadable(name, data_dir, error) from error
        images = torch.as_tensor(dataset.data)
        if images.ndim == 3:  # grey, without channels
            images = images.unsqueeze(1)
        elif images.shape[-1] == 3:  # channels last
            images = images.movedim(-1, 1)
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


def _unreadable(name: str, data_dir: Path, error: Exception) -> OSError:
    """Says which files torchvision needs, and where."""
    dataset_class = getattr(datasets, name)
    if name == "SVHN":
        where, files = data_dir, [dataset_class.split_list[part][1:] for part in ("train", "test")]  # name, MD5 sum
    elif hasattr(dataset_class, "train_list"):
        where, files = data_dir / dataset_class.base_folder, dataset_class.train_list + dataset_class.test_list
    else:
        where = data_dir / name / "raw"
        files = [("gzip.zip", dataset_class.md5)] if name == "EMNIST" else dataset_class.resources
    bad = [file for file, md5 in files if not datasets.utils.check_integrity(where / file, md5)]
    return OSError(
        f"{name} can be neither read from {where} nor downloaded ({type(error).__name__}: {error}). Missing or damaged "
        f"there: {', '.join(bad) or 'an unpacked file'}. Put good copies there and delete unpacked ones, or connect to "
        "a network; dataset = 'digits' needs neither"
    )


def _from_folder(folder: Path, size, channels) -> ImageData:
    names, test_names = (sorted(place.name for place in (folder / part).glob("[!.]*/")) for part in ("train", "test"))
    if len(names) < 2 or names != test_names:
        raise ValueError(
            f"{folder} needs train/<class>/ and test/<class>/ with the same classes, at least two; train has "
            f"{len(names)}, test {len(test_names)}, and only one of them has {sorted({*names} ^ {*test_names})}"
        )
    paths, labels, others, split = [], [], [], 0
    for part, (number, name) in itertools.product(("train", "test"), enumerate(names)):
        walk = sorted(os.walk(folder / part / name, followlinks=True))  # in the order of ImageFolder
        files = [os.path.join(place, file) for place, _, found in walk for file in sorted(found)]
        files = [file for file in files if os.sep + "." not in file.removeprefix(str(folder))]  # none that is hidden
        images = [file for file in files if has_file_allowed_extension(file, (*IMG_EXTENSIONS, ".jfif", ".gif"))]
        if not images:
            raise ValueError(f"class {name!r} is empty: no image in {folder / part / name}; add some or delete it")
        others += sorted({*files} - {*images})
        paths += images
        labels += [number] * len(images)
        split += len(images) if part == "train" else 0
    if others:
        warnings.warn(f"{len(others)} files are ignored, since they are not images: {others[0]}", stacklevel=3)
    status = [(path.removeprefix(str(folder)), (s := os.stat(path)).st_size, s.st_mtime_ns) for path in paths]
    key = hashlib.sha256(repr(status).encode()).hexdigest()[:16]
    kind = ("x".join(map(str, size)) if size else "anysize", {None: "anycolour", 1: "grey", 3: "rgb"}[channels])
    images = _pixels(paths, size, channels, folder / f".lablib-{'-'.join(kind)}-{key}.npy")
    labels = np.array(labels, dtype=np.int64)
    parts = images[:split], labels[:split], images[split:], labels[split:]
    return ImageData.from_arrays(folder.name, *parts, class_names=tuple(names))


def _pixels(paths: list[str], size, channels, cache: Path) -> np.ndarray:
    """Images × channels × height × width, mapped from the cache; with `channels` None, 1 if all images are grey."""
    with suppress(OSError, ValueError, EOFError):  # absent or damaged
        images = np.load(cache, mmap_mode="r")
        with suppress(OSError):
            os.utime(cache)  # in use, see _write
        return images
    if channels is None:
        channels = 1 if all(map(_is_grey, paths)) else 3
    shape = _decode(paths[0], size, channels).shape

    def decoded() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), 128):  # a pool that is given all paths would outrun the disk
                some = paths[start : start + 128]
                yield from pool.map(lambda path: _decode(path, size, channels, shape), some)

    try:
        _write(cache, (len(paths), *shape), decoded())
        return np.load(cache, mmap_mode="r")
    except UnidentifiedImageError:
        raise
    except OSError:  # the folder is not writable, or the disk is full
        return np.fromiter(decoded(), np.dtype((np.uint8, shape)), len(paths))


def _write(cache: Path, shape: tuple[int, ...], images: Iterator[np.ndarray]):
    partial_file = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial_file, "wb") as file:  # not through a map: a full disk would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.writelines(images)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_file, cache)
    finally:
        partial_file.unlink(missing_ok=True)
    for old in cache.parent.glob(f"{cache.name.rpartition('-')[0]}-*"):
        with suppress(OSError):
            if old.stat().st_mtime < time.time() - 24 * 60 * 60:  # joblib's workers open caches by name at any time
                old.unlink()


def _is_grey(path: str) -> bool | None:
    with suppress(Exception), Image.open(path) as image:  # what is damaged fails, with its name, in _decode
        return image.mode in ("1", "L", "LA")


def _decode(path: str, size, channels: int, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """An image as a viewer shows it, channels × height × width."""
    try:
        with Image.open(path) as image:
            mode, image = image.mode, ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UnidentifiedImageError(f"{path} is damaged or no image ({error}); replace or delete it") from error
    if mode[0] in "IF":  # Pillow cuts off what is above 255
        raise ValueError(f"{path} has pixels of 16 or 32 bits (mode {mode}); save it with 8 bits a channel")
    if size is not None:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    if shape not in (None, pixels.shape):
        raise ValueError(
            f"images of different sizes: the first is {shape[2]} × {shape[1]} and {path} is {image.width} × "
            f"{image.height} pixels; scale them with image_size=32 (in a shell --image-size 32)"
        )
    return np.ascontiguousarray(pixels)
