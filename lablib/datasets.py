"""A name or a folder -> ImageData; `python -m lablib.datasets` splits a folder of images, or deletes its caches."""

import argparse
import hashlib
import math
import os
import shlex
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

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

_PIXELS = "centre crop"  # in the key of a cache: change it when read_image gives other pixels for the same file


def load_data(
    name: str | os.PathLike,
    data_dir: str | os.PathLike = "data",
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> ImageData:
    """Load a data set by its name, or a folder with `train/<class>/` and `test/<class>/` in it.

    `digits` ships with scikit-learn and is scaled up to 28 × 28. The other names are torchvision's, read from
    `data_dir` or downloaded there; EMNIST is turned upright. `image_size` (pixels, or height and width) scales every
    image, and `channels` (1 or 3) makes them grey or coloured.

    A folder is read as torchvision's ImageFolder reads it, without hidden files, in colour unless `channels` is 1; EXIF
    orientation is applied and transparency composited on white. `image_size` keeps the aspect ratio there: the shorter
    side is scaled, the longer one cropped about its centre. The pixels are mapped from a file that is written to the
    folder and that `clean` deletes, or decoded into memory if the folder is not writable.

    Raises ValueError for an unsuitable argument, folder or image, OSError for files that cannot be read.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}, but it must be None, 1 or 3")
    size = image_size if image_size is None or isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if size is not None and not (len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
        raise ValueError(f"image_size = {image_size!r}, but it must be a number of pixels above 0, or two")
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
        try:
            dataset = getattr(datasets, name)(data_dir, download=True, **options)
        except Exception as error:
            failed = f"{name} can be neither read from {data_dir} nor downloaded ({type(error).__name__}: {error})"
            advice = "replace damaged files there, or connect to a network; dataset = 'digits' needs neither"
            raise OSError(f"{failed}; {advice}") from error
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


def list_images(folder: str | os.PathLike) -> tuple[list[str], list[tuple[str, int]]]:
    """The classes of a folder of class folders, and each image's path and label, in the order in which they are loaded.

    Warns of other visible files. Raises ValueError for fewer than two classes, or one without images.
    """
    folder = Path(os.path.expanduser(folder))
    classes = sorted(place.name for place in folder.glob("[!.]*/"))
    if len(classes) < 2:
        raise ValueError(f"{folder} needs a folder of images for each class, at least two; it has {classes}")
    labels = {name: label for label, name in enumerate(classes)}
    files = make_dataset(folder, labels, is_valid_file=lambda path: True, allow_empty=True)
    files = [(path, label) for path, label in files if os.sep + "." not in path.removeprefix(str(folder))]  # not hidden
    images = [(path, label) for path, label in files if path.lower().endswith((*IMG_EXTENSIONS, ".jfif", ".gif"))]
    if empty := labels.keys() - {classes[label] for _, label in images}:
        raise ValueError(f"no image in {folder / min(empty)}; add some or delete the folder")
    if others := {*files} - {*images}:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"files that are not images are ignored: {min(others)[0]}{more}", stacklevel=5)
    return classes, images


def _from_folder(folder: Path, size, channels: int) -> ImageData:
    if not (folder / "train").is_dir():
        command = shlex.join([sys.executable, "-m", "lablib.datasets", "split", str(folder)])
        advice = f"from one folder per class, `{command}` makes {folder.name}-split with train/ and test/"
        raise ValueError(f"{folder} has no folder train/; {advice}")
    (classes, train), (test_classes, test) = (list_images(folder / part) for part in ("train", "test"))
    if classes != test_classes:
        wrong = sorted({*classes} ^ {*test_classes})
        raise ValueError(f"{folder}: train/ and test/ need the same classes; these are in only one of them: {wrong}")
    for unread in (path for path in folder.iterdir() if path.name in ("val", "valid", "validation")):
        warnings.warn(f"{unread} is not read; part of train/ serves as the validation set", stacklevel=3)
    paths, labels = zip(*train, *test, strict=True)
    labels = np.array(labels, dtype=np.int64)
    files = ((path.removeprefix(str(folder)), os.stat(path)) for path in paths)
    versions = [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in files]
    key = hashlib.sha256(repr((_PIXELS, versions)).encode()).hexdigest()[:16]
    kind = f"{'x'.join(map(str, size)) if size else 'anysize'}-{'grey' if channels == 1 else 'rgb'}"
    images = _pixels(paths, size, channels, folder / f".lablib-{kind}-{key}.npy")
    seen = {hash(image.tobytes()) for image in images[: len(train)]}
    if leaked := sum(hash(image.tobytes()) in seen for image in images[len(train) :]):
        text = f"{leaked:,} of {len(test):,} test images are also in train/, which inflates test accuracy"
        warnings.warn(f"{folder}: {text}", stacklevel=3)
    arrays = images[: len(train)], labels[: len(train)], images[len(train) :], labels[len(train) :]
    return ImageData(Path(os.path.abspath(folder)).name, *arrays, tuple(classes))


def _pixels(paths: Sequence[str], size, channels: int, cache: Path) -> np.ndarray:
    """Images × channels × height × width, mapped from the cache."""
    with suppress(OSError, ValueError, EOFError):  # absent or damaged
        return np.load(cache, mmap_mode="r")
    image_shape = read_image(paths[0], size, channels).shape
    shape = (len(paths), *image_shape)
    print(f"decoding {len(paths):,} images into {cache} ({math.prod(shape) / 1e6:.1f} MB)", flush=True)
    unfinished = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}")

    def decoded() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), 128):  # given all paths at once, the pool would outrun the disk
                some = paths[start : start + 128]
                yield from pool.map(lambda path: read_image(path, size, channels, image_shape), some)

    try:
        with open(unfinished, "wb") as file:  # not through a map, since a full disk would kill the process
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.writelines(decoded())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, cache)
        return np.load(cache, mmap_mode="r")
    except OSError as error:
        print(f"{cache.parent} cannot be written to ({error.strerror}); decoding into memory instead", flush=True)
        return np.fromiter(decoded(), np.dtype((np.uint8, image_shape)), len(paths))
    finally:
        unfinished.unlink(missing_ok=True)


def read_image(
    path: str | os.PathLike, size: tuple[int, int] | None, channels: int = 3, shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """An image as `load_data` reads it from a folder: uint8, channels × height × width.

    `size` is (height, width), None keeps the image's own; `shape`, if given, is what the result must have.
    Raises ValueError for a file that is damaged, not an image, of more than 8 bits, or of another shape.
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
    pixels = np.atleast_3d(np.asarray(image)).transpose(2, 0, 1)
    if shape not in (None, pixels.shape):
        raise ValueError(f"{path} is {image.width} × {image.height} pixels, unlike the others; set image_size")
    return np.ascontiguousarray(pixels)


def split(folder: str | os.PathLike, test: float = 0.2, seed: int = 0) -> None:
    """Copy the images of a folder of class folders to `train/` and `test/` in a new folder, named FOLDER-split.

    `test` is the share of each class that goes to `test/`. Raises ValueError for an unsuitable folder or share, and
    FileExistsError if FOLDER-split exists.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    target = folder.with_name(f"{folder.name}-split")
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; rename or delete it first")
    classes, images = list_images(folder)
    if {"train", "test"} <= {*classes}:
        raise ValueError(f"{folder} is already split: it contains train/ and test/")
    inner = [sorted(place.name for place in (folder / name).glob("[!.]*/")) for name in classes]
    direct = any(Path(path).parent.parent == folder for path, _ in images)
    if not direct and len(inner[0]) > 1 and inner.count(inner[0]) == len(classes):  # such as Training/ and Testing/
        same = f"{', '.join(classes)} in {folder} all have the folders {', '.join(inner[0])}"
        advice = "rename the outer folders to train and test; otherwise put the images of each class into one folder"
        raise ValueError(f"{same}; if these are the classes, {advice}")
    training, tested = stratified_split(torch.tensor([label for _, label in images]), test, seed)
    with TemporaryDirectory(prefix=".split-", dir=folder.parent) as scratch:  # so that the target is never half full
        for part, indices in {"train": training, "test": tested}.items():
            for index in indices:
                place = Path(scratch, target.name, part, os.path.relpath(images[index][0], folder))
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(images[index][0], place)
        os.rename(Path(scratch, target.name), target)
    print(f"wrote {target}: {len(training):,} training and {len(tested):,} test images of {len(classes)} classes")


def clean(folder: str | os.PathLike) -> None:
    """Delete the caches that `load_data` wrote to a folder, including those of interrupted calls.

    An experiment that is using them would fail in its next run. Raises OSError if there is no such folder.
    """
    caches = sorted(path for path in Path(os.path.expanduser(folder)).iterdir() if path.match(".lablib-*.npy*"))
    megabytes = sum(cache.stat().st_size for cache in caches) / 1e6
    for cache in caches:
        cache.unlink()
        print(f"deleted {cache}")
    print(f"{len(caches)} caches deleted, {megabytes:.1f} MB")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lablib.datasets")
    about = "split: copy a folder's images to train/ and test/ in FOLDER-split; clean: delete load_data's caches"
    parser.add_argument("command", choices=["split", "clean"], help=about)
    parser.add_argument("folder", help="split: one with a folder per class; clean: one with train/ and test/")
    parser.add_argument("--test", type=float, default=0.2, help="split: the share that goes to test/ (default: 0.2)")
    parser.add_argument("--seed", type=int, default=0, help="split: seed of the random draw (default: 0)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "clean":
            clean(options.folder)
        else:
            split(options.folder, options.test, options.seed)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
