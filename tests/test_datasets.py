"""load_data: digits, torchvision's data sets, folders of images and their cache, and what each says when it cannot."""

import os
import re
import runpy
import shutil
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from lablib import datasets, load_data

GENERATOR = np.random.default_rng(0)
PHOTO = GENERATOR.integers(0, 256, (7, 5, 3), dtype=np.uint8)  # height × width × channels


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three training and two test PNGs of 5 × 7 pixels for each of two classes."""
    for place, count in (("train/cat", 3), ("train/dog", 3), ("test/cat", 2), ("test/dog", 2)):
        (tmp_path / "pets" / place).mkdir(parents=True)
        for index in range(count):
            pixels = GENERATOR.integers(0, 256, PHOTO.shape, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / place / f"{index}.png")
    return tmp_path / "pets"


def first_image(folder: Path, **options) -> np.ndarray:
    """The first training image as height × width × channels, or height × width if it is grey."""
    return load_data(folder, **options).train_images[0].permute(1, 2, 0).squeeze(-1).numpy()


def caches(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob(".lablib-*"))


def test_digits_and_mnist_are_those_of_the_published_runs(digits, mnist):
    assert digits.fingerprint == "abfa46b896d11bd16b4c457de4eabd4df67f9b7d78f546aeede4ea38f365cfdc"
    assert mnist.fingerprint == "76d07ada5d065bbf9916b349c494cb9db62a510dab361ead6c2bfdec041d0291"


PIXELS = GENERATOR.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8)
STORED = {  # as torchvision keeps them
    "MNIST": torch.from_numpy(PIXELS[:, 0]),
    "EMNIST": torch.from_numpy(PIXELS[:, 0].transpose(0, 2, 1)),
    "CIFAR-10": PIXELS.transpose(0, 2, 3, 1),
    "SVHN": PIXELS,
}


@pytest.mark.parametrize("name", STORED)
def test_images_come_upright_and_channels_first_and_are_scaled_and_coloured_as_torchvision_does_it(monkeypatch, name):
    fields = {"data": STORED[name], "labels" if name == "SVHN" else "targets": list(range(10)) * 2}
    fields |= {} if name == "SVHN" else {"classes": [f"{digit} - name" for digit in range(10)]}
    stub = type("Stub", (), {"__init__": lambda self, root, download, **part: self.__dict__.update(fields)})
    monkeypatch.setattr(torchvision.datasets, name.replace("-", ""), stub)
    data, is_grey = load_data(name), "MNIST" in name
    images = torch.from_numpy(PIXELS[:, :1] if is_grey else PIXELS)
    assert torch.equal(data.train_images, images)
    assert (data.test_labels.tolist(), data.class_names) == (list(range(10)) * 2, tuple("0123456789"))
    other = load_data(name, image_size=16, channels=3 if is_grey else 1).train_images
    oracle = transforms.grayscale_to_rgb(images) if is_grey else transforms.rgb_to_grayscale(images)
    oracle = transforms.resize(oracle, [16, 16])
    assert (other.int() - oracle.int()).abs().max() <= 1  # torchvision's versions round differently


def test_a_folder_that_is_named_as_a_data_set_is_asked_for_by_its_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename("digits")
    with pytest.raises(ValueError, match="'digits' is a known data set and also a folder here"):
        load_data("digits")
    assert load_data("./digits").class_names == ("cat", "dog")


def test_a_folder_is_read_as_torchvisions_image_folder_reads_it(folder, tmp_path):
    (deep := folder / "train" / "dog" / "10" / "deep").mkdir(parents=True)
    Image.fromarray(PHOTO).save(deep / "a.PNG")
    Image.fromarray(PHOTO[:, :, 0]).save(folder / "train" / "cat" / "10.png")  # grey among coloured ones
    (folder / "train" / "cat" / "linked").symlink_to(folder / "test" / "dog")
    with pytest.warns(UserWarning, match="pets: 2 of 4 test images are also in train/"):  # the linked ones
        data = load_data("pets", tmp_path)
    for part in ("train", "test"):
        oracle = torchvision.datasets.ImageFolder(folder / part, transforms.pil_to_tensor)
        assert torch.equal(getattr(data, f"{part}_images"), torch.stack([image for image, _ in oracle]))
        assert getattr(data, f"{part}_labels").tolist() == oracle.targets
        assert datasets.list_images(folder / part) == (oracle.classes, oracle.samples)
    assert (data.name, data.class_names, len(data.train_labels)) == ("pets", ("cat", "dog"), 10)


@pytest.mark.parametrize(
    ("shape", "size", "scaled", "channels"),  # height, width
    [((10, 30), (5, 5), (5, 15), 1), ((30, 10), (5, 5), (15, 5), 3), ((21, 30), (5, 10), (7, 10), 3)],
)
def test_a_folder_is_scaled_by_the_shorter_side_and_cropped_as_torchvision_does(folder, shape, size, scaled, channels):
    for path in folder.rglob("*.png"):
        Image.fromarray(GENERATOR.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    image = Image.open(folder / "train" / "cat" / "0.png").convert("L" if channels == 1 else "RGB")
    oracle = transforms.center_crop(transforms.resize(image, scaled), size)
    assert np.array_equal(first_image(folder, image_size=size, channels=channels), oracle)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_composited_on_white(folder, mode):
    alpha = GENERATOR.integers(0, 256, (7, 5, 1), dtype=np.uint8)
    image = Image.fromarray(np.dstack([PHOTO, alpha]) if mode != "P" else PHOTO).convert(mode)
    options = {"transparency": image.getpixel((0, 0))} if mode in ("P", "RGB") else {}  # a colour that is transparent
    image.save(folder / "train" / "cat" / "0.png", **options)
    with Image.open(folder / "train" / "cat" / "0.png") as image:
        *colours, alpha = np.moveaxis(np.asarray(image.convert("RGBA"), dtype=float), -1, 0)
    exact = np.dstack([alpha / 255 * colour + (255 - alpha) for colour in colours])
    assert alpha.min() < 128
    assert np.abs(first_image(folder) - exact).max() <= 1


def test_a_photo_is_turned_upright_as_its_exif_orientation_says(folder):
    exif, path = Image.Exif(), folder / "train" / "cat" / "0.png"
    exif[0x0112] = 6
    Image.fromarray(PHOTO).save(path, exif=exif)
    assert np.array_equal(datasets.read_image(path, None)[0], np.rot90(PHOTO, -1)[:, :, 0])


def test_hidden_files_and_those_that_are_not_images_are_passed_over(folder):
    Image.fromarray(PHOTO).save(folder / "train" / "cat" / "a.jfif")
    for name in (".checkpoints/1.png", "._0.png", "y.txt"):
        (path := folder / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image to Pillow")
    (folder / "train" / ".hidden").mkdir()
    assert load_data(folder).train_labels.tolist() == [0] * 4 + [1] * 3


def test_each_size_has_its_own_cache_which_is_announced_and_mapped_and_found_again(folder, monkeypatch, capsys):
    sizes = {"image_size": 8, "channels": 1}, {"image_size": 6}
    first = [load_data(folder, **size) for size in sizes]
    assert re.fullmatch(f"(decoding 10 images into {folder}/.lablib-\\w+.npy\n){{2}}", capsys.readouterr().out)
    assert all(isinstance(data._arrays[0], np.memmap) for data in first)
    monkeypatch.setattr(datasets, "ThreadPoolExecutor", None)
    again = [load_data(folder, **size) for size in sizes]
    assert [data.fingerprint for data in again] == [data.fingerprint for data in first]


def test_a_folder_that_changes_is_decoded_again(folder):
    image, before = folder / "train" / "cat" / "0.png", load_data(folder).fingerprint
    Image.fromarray(PHOTO).save(image)
    changed = load_data(folder).fingerprint
    image.rename(image.with_name("9.png"))
    assert len({before, changed, load_data(folder).fingerprint}) == 3


def test_an_image_that_is_replaced_by_one_of_the_same_size_and_time_is_seen(folder):
    image, prints = folder / "train" / "cat" / "a.bmp", []
    for pixels in (PHOTO, 255 - PHOTO):
        Image.fromarray(pixels).save(image)
        os.utime(image, (1, 1))
        prints.append(load_data(folder).fingerprint)
    assert prints[0] != prints[1]


def test_the_cache_of_a_folder_that_is_not_writable_is_in_the_temporary_folder(folder, tmp_path, monkeypatch):
    expected = load_data(folder).fingerprint
    (folder / caches(folder)[0]).unlink()
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert load_data(folder).fingerprint == expected
    assert (caches(folder), len(caches(tmp_path))) == ([], 1)


def test_decoding_needs_less_memory_than_the_images(folder):
    for index in range(600):
        Image.new("RGB", (8, 8)).save(folder / "train" / "cat" / f"{index}.jpg")
    tracemalloc.start()
    data = load_data(folder, image_size=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.train_images.nbytes / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: os.truncate(f / "train/cat/1.png", 100), "train/cat/1.png is damaged or not an image"),
        (lambda f: (f / "train/cat/photo.heic").write_bytes(b"ftypheic"), "train/cat/photo.heic is damaged or not an"),
        (lambda f: Image.fromarray(np.uint16(PHOTO[:, :, 0])).save(f / "test/cat/0.png"), "pixels of 16 or 32 bits"),
        (lambda f: Image.fromarray(PHOTO[1:]).save(f / "test/cat/x.png"), "cat/x.png differs in size from .*/0.png"),
        (lambda f: (f / "test/dog").rename(f / "test/wolf"), "the same classes; .*'dog'.* and .*'wolf'"),
        (lambda f: (f / "train").rename(f / "x"), r"two or more, not \[\]; .*lablib.datasets split`"),
    ],
)
def test_an_unfit_image_or_folder_is_named_and_no_cache_is_left(folder, change, words):
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_data(folder)
    assert caches(folder) == []


@pytest.fixture
def unsplit(tmp_path) -> Path:
    """20 pictures of cats, one in a subfolder, and 10 of dogs, each of its own colour."""
    for index in range(30):
        place = tmp_path / "all" / ("cat" if index < 20 else "dog") / ("deep" if index == 7 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (8 * index, 0, 0)).save(place / f"{index}.png")
    return tmp_path / "all"


def test_a_split_copies_each_image_to_one_part_and_each_class_in_proportion(unsplit, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets.py", "split", str(unsplit), "--test", "0.3"])
    runpy.run_path(datasets.__file__, run_name="__main__")
    assert f"wrote {unsplit}-split/test: 9 images of 2 classes\n" in capsys.readouterr().out
    data = load_data(f"{unsplit}-split")
    assert data.test_labels.bincount().tolist() == [6, 3]
    colours = torch.cat([data.test_images, data.train_images])[:, 0, 0, 0].tolist()
    assert sorted(colours) == [8 * index for index in range(30)] != colours
    assert len([*unsplit.rglob("*.png")]) == 30


@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        (lambda folder: folder.with_name("all-split").mkdir(), 0.2, "File exists: .*all-split"),
        (lambda folder: shutil.rmtree(folder / "dog"), 0.2, r"two or more, not \['cat'\]"),
        (lambda f: [(f / a).rename(f / b) for a, b in (("cat", "Training"), ("dog", "Testing"))], 0.2, "already"),
        (lambda folder: None, 0.03, "test_size = 1 should be greater or equal to the number of classes"),
    ],
)
def test_a_split_that_cannot_be_made_is_an_error_and_leaves_nothing(unsplit, change, share, words):
    change(unsplit)
    before = sorted(unsplit.parent.rglob("*"))
    with pytest.raises((ValueError, FileExistsError), match=words):
        datasets.split(unsplit, share)
    assert sorted(unsplit.parent.rglob("*")) == before
