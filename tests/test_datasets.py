"""load_data: digits, torchvision's data sets, folders of images and their cache, and what each says when it cannot."""

import io
import os
import re
import shutil
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as transforms

from lablib import datasets, load_data
from lablib.config import DATASET_NAMES

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


@pytest.mark.parametrize("name", DATASET_NAMES[1:])
def test_a_data_set_without_files_and_network_is_an_error_that_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setattr(urllib.request, "urlopen", Mock(side_effect=urllib.error.URLError("no network in a test")))
    with pytest.raises(OSError, match=rf"(?is)^{name} can be neither read from {tmp_path} nor downloaded .*no network"):
        load_data(name, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(({"name": "digits", "image_size": size}, "image_size = ") for size in (0, (28,), 28.0)),
        ({"name": "digits", "channels": 2}, "channels = 2"),
        ({"name": "fashion-mnst"}, "'fashion-mnst' is neither .*, fashionmnist, "),
    ],
)
def test_an_unknown_name_and_other_sizes_and_numbers_of_channels_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        load_data(**arguments)


def test_a_folder_that_is_named_as_a_data_set_is_asked_for_by_its_path(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    Path("data").mkdir()
    for place in ("./digits", "data/digits"):
        folder = folder.rename(place)
        with pytest.raises(ValueError, match=f"'digits' is a known data set and also a folder here; write '{place}'"):
            load_data("digits")
        assert load_data(place).class_names == ("cat", "dog")


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
    if mode == "LA":
        assert np.abs(first_image(folder, channels=1) - exact[:, :, 0]).max() <= 1


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, -1)])
def test_a_photo_is_turned_upright_as_its_exif_orientation_says(folder, orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in folder.rglob("*.png"):
        Image.fromarray(PHOTO + ("test" in path.parts)).save(path, exif=exif)
    assert np.array_equal(first_image(folder), np.rot90(PHOTO, turns))


def test_other_files_are_named_in_a_warning_and_hidden_ones_are_passed_over(folder):
    for name in ("a.jfif", "b.gif", "c.tif", "d.JPG"):
        Image.fromarray(PHOTO).save(folder / "train" / "cat" / name)
    for name in (".checkpoints/1.png", "._0.png", "x.heic", "y.txt"):
        (path := folder / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image to Pillow")
    for name in ("train/.hidden", "val"):
        (folder / name).mkdir()
    with pytest.warns(UserWarning, match="not") as warned:
        data = load_data(folder)
    heic, val = sorted(str(warning.message).replace(str(folder), "…") for warning in warned)
    assert heic == f"files that are not images are ignored: {Path('…/train/dog/x.heic')} and 1 more"
    assert val == f"{Path('…/val')} is not read; part of train/ serves as the validation set"
    assert len(data.train_labels) == 10


def test_each_size_has_its_own_cache_which_is_announced_and_mapped_and_found_again(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder.parent)
    sizes = {"image_size": 8, "channels": 1}, {"image_size": 6}
    first = [load_data("pets", **size) for size in sizes]
    announced = r"decoding 10 images into pets/.lablib-{}-\w+.npy \(0.0 MB\)\n"
    assert re.fullmatch(announced.format("8x8-grey") + announced.format("6x6-rgb"), capsys.readouterr().out)
    assert all(isinstance(data._arrays[0], np.memmap) for data in first)
    monkeypatch.delattr(datasets, "read_image")
    again = [load_data("pets", **size) for size in sizes]
    assert capsys.readouterr().out == ""
    assert [data.fingerprint for data in again] == [data.fingerprint for data in first]


def test_a_folder_that_changes_is_decoded_again(folder):
    image = folder / "train" / "cat" / "0.png"
    changes = [
        lambda: Image.fromarray(PHOTO).save(image),
        lambda: Image.fromarray(255 - PHOTO).save(folder / "test" / "dog" / "new.png"),
        lambda: image.rename(image.with_name("9.png")),
        lambda: (folder / "train" / "dog" / "1.png").unlink(),
    ]
    fingerprints = {load_data(folder).fingerprint}
    for number, change in enumerate(changes):
        change()
        fingerprints.add(load_data(folder).fingerprint)
        assert len(fingerprints) == number + 2


def test_clean_deletes_caches_and_unfinished_ones_and_says_how_large_they_were(folder, capsys):
    files = sorted(folder.rglob("*"))
    data = load_data(folder, image_size=200)
    copy, kept = data.train_images.clone(), caches(folder)
    (folder / f"{kept[0]}.1234").write_bytes(bytes(500_000))  # of a process that was killed
    capsys.readouterr()
    for deleted in ([*kept, f"{kept[0]}.1234"], []):
        datasets.main(["clean", str(folder)])
        *lines, total = capsys.readouterr().out.splitlines()
        assert lines == [f"deleted {folder / name}" for name in deleted]
        assert total == ("2 caches deleted, 1.7 MB" if deleted else "0 caches deleted, 0.0 MB")
    assert sorted(folder.rglob("*")) == files
    assert torch.equal(data.train_images, copy)  # still mapped
    with pytest.raises(SystemExit, match="2"):
        datasets.main(["clean", str(folder / "no such folder")])
    assert "no such folder" in capsys.readouterr().err


def test_a_damaged_cache_is_written_again(folder):
    first, (cache,) = load_data(folder).fingerprint, folder.glob(".lablib-*")
    content = cache.read_bytes()
    for damaged in (b"", content[:-7], content[::-1]):
        cache.unlink()  # it is mapped
        cache.write_bytes(damaged)
        assert load_data(folder).fingerprint == first
        assert cache.read_bytes() == content


def test_a_folder_that_cannot_be_written_to_is_decoded_into_memory(folder, monkeypatch, capsys):
    expected = load_data(folder).fingerprint
    (folder / caches(folder)[0]).unlink()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    assert load_data(folder).fingerprint == expected
    assert "(No space left on device); decoding into memory instead\n" in capsys.readouterr().out
    assert caches(folder) == []


def test_decoding_needs_less_memory_than_the_images(folder):
    for index in range(600):
        Image.new("RGB", (8, 8)).save(folder / "train" / "cat" / f"{index}.jpg")
    tracemalloc.start()
    data = load_data(folder, image_size=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < data.train_images.nbytes / 2


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


NOISE = GENERATOR.integers(0, 256, (64, 64, 3), dtype=np.uint8)  # large, so that a cut leaves the header whole
UNFIT = {
    "page.jpg": (b"<html>not found</html>", "is damaged or not an image"),
    "cut.jpg": (encoded(NOISE, "jpeg")[:-1500], "is damaged or not an image"),
    "0.bmp": (encoded(NOISE, "bmp")[:-1500], "is damaged or not an image"),  # the first one
    "deep.png": (encoded(np.full((7, 5), np.uint16(300)), "png"), "has pixels of 16 or 32 bits"),
    "narrow.png": (encoded(PHOTO[:, :3], "png"), "is 3 × 7 pixels, .*set image_size"),
}


@pytest.mark.parametrize("file", UNFIT)
def test_an_image_that_does_not_fit_is_named_and_no_cache_written(folder, file):
    content, words = UNFIT[file]
    (folder / "train" / "cat" / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{folder}/train/cat/{file} {words}"):
        load_data(folder)
    assert caches(folder) == []
    if file == "narrow.png":
        assert load_data(folder, image_size=32).image_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "test/dog").rename(folder / "test/wolf"), "only one .*'dog', 'wolf'"),
        (lambda folder: (folder / "train/fox").mkdir(), "no image in .*/train/fox"),
        (
            lambda folder: (folder / "train").rename(folder / "x"),
            "no folder train/.*datasets split .* makes .*-split with train/",
        ),
        (lambda folder: (folder / "test").rename(folder / "val"), "test needs a folder of images for each class"),
    ],
)
def test_train_and_test_need_the_same_two_classes_or_more_with_images(folder, change, words):
    change(folder)
    with pytest.raises(ValueError, match=words):
        load_data(folder)


@pytest.fixture
def unsplit(tmp_path) -> Path:
    """20 pictures of cats, one in a subfolder, and 10 of dogs, each of its own colour."""
    for index in range(30):
        place = tmp_path / "all" / ("cat" if index < 20 else "dog") / ("deep" if index == 7 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), (8 * index, 0, 0)).save(place / f"{index}.png")
    return tmp_path / "all"


def test_a_split_copies_each_image_to_one_part_and_each_class_in_proportion(unsplit, capsys):
    target, drawn = unsplit.with_name(f"{unsplit.name}-split"), []
    for seed in ("0", "0", "1"):
        datasets.main(["split", str(unsplit), "--test", "0.3", "--seed", seed])
        assert f"wrote {target}: 21 training and 9 test images of 2 classes\n" in capsys.readouterr().out
        data = load_data(target)
        assert data.test_labels.bincount().tolist() == [6, 3]
        colours = torch.cat([data.test_images, data.train_images])[:, 0, 0, 0]
        assert sorted(colours.tolist()) == [8 * index for index in range(30)]
        assert len([*unsplit.rglob("*.png")]) == 30
        drawn.append(colours[:9].tolist())
        shutil.rmtree(target)
    assert drawn[0] == drawn[1] != drawn[2]


def nested(folder):
    for number, image in enumerate(sorted(folder.rglob("*.png"))):
        (inner := folder / image.relative_to(folder).parts[0] / "ab"[number % 2]).mkdir(exist_ok=True)
        image.rename(inner / image.name)
    (folder / "cat" / "deep").rmdir()


@pytest.mark.parametrize(
    ("change", "share", "words"),
    [
        (lambda folder: folder.with_name(f"{folder.name}-split").mkdir(), "0.2", "exists; rename or delete it first"),
        (lambda folder: shutil.rmtree(folder / "dog"), "0.2", r"at least two; it has \['cat'\]"),
        (lambda f: [(f / a).rename(f / b) for a, b in (("cat", "train"), ("dog", "test"))], "0.2", "already"),
        (nested, "0.2", "all have the folders a, b; if these are the classes, rename the outer folders to train"),
        (lambda folder: None, "0.03", "cannot be split with a share of 0.03"),
        (lambda folder: None, "20", "cannot be split with a share of 20"),
    ],
)
def test_a_split_that_cannot_be_made_is_an_error_in_one_line_and_leaves_nothing(unsplit, change, share, words, capsys):
    change(unsplit)
    before = sorted(unsplit.parent.rglob("*"))
    with pytest.raises(SystemExit, match="2"):
        datasets.main(["split", str(unsplit), "--test", share])
    assert re.fullmatch(f"python -m lablib.datasets: .*{words}.*\n", capsys.readouterr().err)
    assert sorted(unsplit.parent.rglob("*")) == before
