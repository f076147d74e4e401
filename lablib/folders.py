"""A folder of images in train/<class>/ and test/<class>/ -> ImageData, through a cache beside them."""

import contextlib
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image

from lablib.data import ImageData
from lablib.files import write_atomically

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}

Size = tuple[int, int] | None  # height, width


def load_folder(folder: Path, size: Size, channels: int | None) -> ImageData:
    """Decode a folder's images in parallel, or take them from the cache if nothing has changed since.

    The cache is a file in the folder, known by the name, size and time of each image. Where it cannot be written the
    images are decoded each time. Raises as `lablib.sources.load_data` says.
    """
    names = _class_names(folder)
    by_class = {(part, name): _image_files(folder / part / name) for part in ("train", "test") for name in names}
    key = hashlib.sha256(repr((size, channels, by_class)).encode()).hexdigest()[:16]
    cache = folder / f".lablib-{key}.safetensors"
    images = _cached(cache)
    if images is None:
        paths = [folder / part / name / file for (part, name), files in by_class.items() for file, *_ in files]
        images = _read_all(paths, size, channels)
        _keep(cache, images)
    labels = torch.cat([torch.full((len(by_class[p, n]),), names.index(n)) for p, n in by_class])
    split = sum(len(files) for (part, _), files in by_class.items() if part == "train")
    return ImageData(folder.name, images[:split], labels[:split], images[split:], labels[split:], tuple(names))


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
    for index, image in enumerate(images):
        if image.size != images[0].size:
            raise ValueError(
                f"images of different sizes: {describe(0)} is {images[0].width} × {images[0].height} and "
                f"{describe(index)} is {image.width} × {image.height} pixels; "
                "scale them to one size, or let load_data(..., image_size=32) do it"
            )
    pixels = np.stack([np.asarray(image) for image in images])
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(pixels))


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


def _cached(cache: Path) -> torch.Tensor | None:
    try:
        return safetensors.torch.load_file(cache)["images"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None


def _keep(cache: Path, images: torch.Tensor):
    with contextlib.suppress(OSError):  # a folder that cannot be written is read again the next time
        write_atomically(cache, safetensors.torch.save({"images": images}))
        for old in cache.parent.glob(".lablib-*.safetensors"):
            if old != cache:
                old.unlink()


def _read_all(paths: list[Path], size: Size, channels: int | None) -> torch.Tensor:
    def read(path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()  # or nothing but the header would be read before the file is closed
                mode, ready = image.mode, prepared(image, size, channels)
        except Exception as error:  # Pillow's decoders raise many kinds
            raise OSError(f"{path} is damaged or no image ({error}); replace or delete it") from error
        if mode[0] in "IF":  # Pillow would cut off what is above 255
            raise ValueError(
                f"{path} has pixels of 16 or 32 bits (Pillow's mode {mode!r}); scale them to 0 to 255 and save the "
                "image with 8 bits a channel"
            )
        return ready

    with ThreadPoolExecutor() as pool:  # decoding runs outside of Python's lock
        return stacked(list(pool.map(read, paths)), lambda index: str(paths[index]))
