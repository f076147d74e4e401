"""A folder of images in train/<class>/ and test/<class>/ -> ImageData, through a cache beside them."""

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from lablib.data import ImageData

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

_CHUNK = 2**24  # bytes of pixels that are decoded before they are written
_IN_MEMORY = 0.25  # the part of the free memory that a data set may fill

Size = tuple[int, int] | None  # height, width


def load_folder(folder: Path, size: Size, channels: int | None) -> ImageData:
    """Decode a folder's images in parallel, or take them from the cache if nothing has changed since.

    The cache is a file of pixels in the folder, known by the name, size and time of each image. Images that would fill
    more than a quarter of the free memory stay in that file: it is mapped, and the system reads from it what a batch
    needs. Where it cannot be written the images are decoded each time. Raises as `lablib.sources.load_data` says.
    """
    names = _class_names(folder)
    by_class = {(part, name): _image_files(folder / part / name) for part in ("train", "test") for name in names}
    key = hashlib.sha256(repr((size, channels, by_class)).encode()).hexdigest()[:16]
    cache = folder / f".lablib-{key}.npy"
    images = _cached(cache)
    if images is None:
        paths = [folder / part / name / file for (part, name), files in by_class.items() for file, *_ in files]
        images = _read_all(paths, size, channels, cache)
    labels = np.repeat([names.index(name) for _, name in by_class], [len(files) for files in by_class.values()])
    split = sum(len(files) for (part, _), files in by_class.items() if part == "train")
    return ImageData.from_arrays(
        folder.name, images[:split], labels[:split], images[split:], labels[split:], class_names=tuple(names)
    )


def prepared(image: Image.Image, size: Size, channels: int | None) -> Image.Image:
    """An image scaled to a size and made grey or coloured, where that is asked for."""
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image if size is None else image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def stacked(images: list[Image.Image], describe: Callable[[int], str]) -> torch.Tensor:
    """Images of one size -> uint8, images × channels × height × width; with a coloured one among them all get colours.

    Raises ValueError that says, by `describe(index)`, which two are of different sizes.
    """
    if len({image.mode for image in images}) > 1:
        images = [image.convert("RGB") for image in images]
    _check_sizes([image.size for image in images], describe)
    return torch.from_numpy(_pixels(images))


def _pixels(images: list[Image.Image]) -> np.ndarray:
    pixels = np.stack([np.asarray(image) for image in images])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels)


def _check_sizes(sizes: list[tuple[int, int]], describe: Callable[[int], str]):
    for index, (width, height) in enumerate(sizes):
        if (width, height) != sizes[0]:
            raise ValueError(
                f"images of different sizes: {describe(0)} is {sizes[0][0]} × {sizes[0][1]} and "
                f"{describe(index)} is {width} × {height} pixels; "
                "scale them to one size, or have it done: image_size=32 (in a shell --image-size 32)"
            )


def _class_names(folder: Path) -> list[str]:
    for part in ("train", "test"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(
                f"{folder} has no folder {part!r}; a data set needs train/<class>/ and test/<class>/ with images"
            )
    names, test_names = (
        sorted(entry.name for entry in (folder / part).iterdir() if entry.is_dir() and entry.name[0] != ".")
        for part in ("train", "test")
    )
    if names != test_names:
        only = sorted(set(names) ^ set(test_names))
        raise ValueError(
            f"{folder}: train and test must have the same classes, but only one of them has {only}; "
            "add or delete these folders"
        )
    if len(names) < 2:
        raise ValueError(f"{folder}/train has {len(names)} class folder ({names}); a classifier needs at least two")
    return names


def _image_files(place: Path) -> list[tuple[str, int, int]]:
    """Name, bytes and time (nanoseconds) of each image in a folder, in the order of their names."""
    with os.scandir(place) as entries:
        files = [entry for entry in entries if entry.name[0] != "."]  # such as ._1.jpg, which is no image
        images = [entry for entry in files if os.path.splitext(entry.name)[1].lower() in _IMAGE_SUFFIXES]
    if not images:
        raise ValueError(f"class {place.name!r} is empty: no image in {place}; add images or delete the folder")
    status = {entry.name: entry.stat() for entry in images}
    return [(name, status[name].st_size, status[name].st_mtime_ns) for name in sorted(status)]


def _cached(cache: Path) -> np.ndarray | None:
    """The images in a cache, mapped where they are too large for the memory; None if there is no whole cache."""
    try:
        images = np.load(cache, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return np.array(images) if _fit_in_memory(images.nbytes) else images


def _fit_in_memory(num_bytes: int) -> bool:
    return num_bytes <= _IN_MEMORY * psutil.virtual_memory().available


def _read_all(paths: list[Path], size: Size, channels: int | None, cache: Path) -> np.ndarray:
    """Decode images into memory, or straight into the cache if they are too large for that."""
    shape = (len(paths), *_shape(paths, size, channels))
    step = max(1, _CHUNK // math.prod(shape[1:]))
    chunks = _decoded(paths, size, shape[1], step)
    if _fit_in_memory(math.prod(shape)):
        images = np.empty(shape, dtype=np.uint8)
        for start, chunk in zip(range(0, len(images), step), chunks, strict=True):
            images[start : start + step] = chunk
        with contextlib.suppress(OSError):  # a folder that cannot be written is read again the next time
            _write(cache, shape, [images])
        return images
    try:
        _write(cache, shape, chunks)
    except OSError as error:
        gibibytes = math.prod(shape) / 2**30
        raise OSError(
            f"the {gibibytes:.3g} GiB of pixels of {cache.parent} do not fit in memory, and their cache cannot be "
            f"written there ({error}); make room or the folder writable, or write a smaller image_size"
        ) from error
    return np.load(cache, mmap_mode="r")


def _write(cache: Path, shape: tuple[int, ...], chunks: Iterable[np.ndarray]):
    beside = cache.with_name(f"{cache.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, cache)
    finally:
        beside.unlink(missing_ok=True)
    for old in cache.parent.glob(".lablib-*"):
        if old != cache and old.suffix != ".partial":
            old.unlink()


def _shape(paths: list[Path], size: Size, channels: int | None) -> tuple[int, int, int]:
    """(channels, height, width) of all images; with a coloured one among them all get colours."""
    if size is not None and channels is not None:
        return channels, *size
    with ThreadPoolExecutor() as pool:
        headers = list(pool.map(_header, paths))
    if size is None:
        _check_sizes([size for _, size in headers], lambda index: str(paths[index]))
        size = headers[0][1][::-1]
    return channels or (1 if all(mode == "L" for mode, _ in headers) else 3), *size


def _decoded(paths: list[Path], size: Size, channels: int, step: int) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor() as pool:  # decoding runs outside of Python's lock
        for start in range(0, len(paths), step):
            yield _pixels(list(pool.map(lambda path: _read(path, size, channels), paths[start : start + step])))


def _header(path: Path) -> tuple[str, tuple[int, int]]:
    try:
        with Image.open(path) as image:
            return image.mode, image.size
    except Exception as error:
        raise _damaged(path, error) from error


def _read(path: Path, size: Size, channels: int) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()  # or nothing but the header would be read before the file is closed
            mode, ready = image.mode, prepared(image, size, channels)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise _damaged(path, error) from error
    if mode[0] in "IF":  # Pillow would cut off what is above 255
        raise ValueError(
            f"{path} has pixels of 16 or 32 bits (Pillow's mode {mode!r}); scale them to 0 to 255 and save the "
            "image with 8 bits a channel"
        )
    return ready


def _damaged(path: Path, error: Exception) -> OSError:
    return OSError(f"{path} is damaged or no image ({error}); replace or delete it")
