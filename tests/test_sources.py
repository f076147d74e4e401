"""load_data: digits, torchvision's layout on disk, folders of images, and what each says when it cannot."""

import gzip
import hashlib
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as transforms

from lablib import load_data
from lablib.sources import DATASET_NAMES

CLASSES = ("cat", "dog", "fox")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in a test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_folder(root, channels: int = 1, size=(7, 5)) -> dict[str, list[np.ndarray]]:
    """A data set of PNGs; returns the pixels (height × width, × 3 if coloured) in the order of class and file name."""
    generator = np.random.default_rng(0)
    written = {"train": [], "test": []}
    for part, per_class in (("train", 3), ("test", 2)):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 256, (*size, 3)[: 2 + (channels == 3)], dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
                written[part].append(pixels)
    return written


def idx_bytes(array: np.ndarray) -> bytes:
    """The format of MNIST's files: type, dimensions and shape, then the numbers, all big-endian."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    header = bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_mnist(data_dir, monkeypatch, class_name="MNIST", packed=True, unpacked=True) -> dict[str, np.ndarray]:
    """Small files in MNIST's format, whose checksums torchvision takes for the right ones."""
    generator = np.random.default_rng(0)
    raw = data_dir / class_name / "raw"
    raw.mkdir(parents=True)
    arrays, resources = {}, []
    for part, count in (("train", 40), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in arrays.items():
        content = gzip.compress(idx_bytes(array))
        resources.append((f"{name}.gz", hashlib.md5(content, usedforsecurity=False).hexdigest()))
        if packed:
            (raw / f"{name}.gz").write_bytes(content)
        if unpacked:
            (raw / name).write_bytes(idx_bytes(array))
    monkeypatch.setattr(getattr(torchvision.datasets, class_name), "resources", resources)
    return arrays


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_digits_are_28_by_28_grey_images_of_ten_classes(digits):
    assert digits.name == "digits"
    assert digits.image_shape == (1, 28, 28)
    assert digits.class_names == tuple("0123456789")
    assert (len(digits.train_labels), len(digits.test_labels)) == (1437, 360)
    labels = torch.cat([digits.train_labels, digits.test_labels])
    assert torch.bincount(labels).tolist() == np.bincount(load_digits().target).tolist()


def test_digits_use_the_whole_range_of_grey_and_are_the_same_each_time(digits):
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert load_data("digits").fingerprint == digits.fingerprint


def test_digits_at_their_own_size_are_the_scans_each_with_its_label():
    data, scans = load_data("digits", image_size=8), load_digits()
    images = torch.cat([data.train_images, data.test_images])[:, 0].numpy()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    expected = np.round(scans.images * 255 / 16).astype(np.uint8)
    found = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
    assert found == sorted((image.tobytes(), int(label)) for image, label in zip(expected, scans.target, strict=True))


def test_digits_scale_to_32_by_32_in_three_channels():
    data = load_data("digits", image_size=32, channels=3)
    assert data.image_shape == (3, 32, 32)
    assert torch.equal(data.train_images[:, 0], data.train_images[:, 2])
    small = load_data("digits", image_size=8).test_images[:30, 0].float().numpy()
    oracle = np.stack([Image.fromarray(scan).resize((32, 32), Image.Resampling.BILINEAR) for scan in small])
    # the oracle begins with scans that are rounded already
    assert np.abs(data.test_images[:30, 0].numpy() - oracle).max() <= 1


def test_mnist_is_torchvisions(mnist, request):
    root = request.config.rootpath / "data"
    for part, train in (("train", True), ("test", False)):
        oracle = torchvision.datasets.MNIST(root, train=train)
        assert torch.equal(getattr(mnist, f"{part}_images"), oracle.data[:, None])
        assert torch.equal(getattr(mnist, f"{part}_labels"), oracle.targets)
    assert mnist.class_names == tuple("0123456789")
    assert mnist.image_shape == (1, 28, 28)


@pytest.mark.parametrize("class_name", ["MNIST", "FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("unpacked", [True, False])
def test_files_in_mnists_format_load_packed_or_not(tmp_path, monkeypatch, class_name, unpacked):
    arrays = write_mnist(tmp_path, monkeypatch, class_name, unpacked=unpacked)
    data = load_data(class_name.lower(), tmp_path)
    assert np.array_equal(data.train_images[:, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(data.test_images[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert np.array_equal(data.test_labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.name == class_name


class _Stub:
    """Stands in for one of torchvision's data sets: some attributes, or items to decode."""

    def __init__(self, items=None, **attributes):
        self.items = items
        self.__dict__ |= attributes

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_coloured_pixels_become_channels_first(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    stub = _Stub(data=pixels, targets=[0, 1, 2, 0, 1, 2], classes=["plane", "car", "bird"])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *args, **kwargs: stub)
    data = load_data("CIFAR-10")
    assert data.image_shape == (3, 32, 32)
    assert data.train_images[4, 2, 7, 9] == pixels[4, 7, 9, 2]
    assert data.train_labels.tolist() == stub.targets
    assert data.class_names == ("plane", "car", "bird")


def test_pixels_that_are_channels_first_stay_so_and_classes_without_names_are_numbered(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    stub = _Stub(data=pixels, labels=np.array([0, 1, 2, 0, 1, 2]))
    monkeypatch.setattr(torchvision.datasets, "SVHN", lambda *args, **kwargs: stub)
    data = load_data("svhn")
    assert np.array_equal(data.train_images, pixels)
    assert data.class_names == ("0", "1", "2")


def test_a_data_set_that_decodes_its_images_is_scaled_to_one_size_or_names_two_that_differ(monkeypatch):
    items = [(Image.new("RGB", (8, 6), (200, 0, 0)), 0), (Image.new("RGB", (10, 6), (0, 0, 200)), 1)]
    monkeypatch.setattr(torchvision.datasets, "Flowers102", lambda *args, **kwargs: _Stub(items))
    data = load_data("flowers102", image_size=(4, 5))
    assert data.image_shape == (3, 4, 5)
    assert data.train_images[:, :, 0, 0].tolist() == [[200, 0, 0], [0, 0, 200]]
    with pytest.raises(ValueError, match="image 0 is 8 × 6 and Flowers102, image 1 is 10 × 6 pixels"):
        load_data("flowers102")


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_loads_with_its_pixels_and_labels(tmp_path, channels, as_path):
    written = write_folder(tmp_path / "animals", channels)
    data = load_data(tmp_path / "animals") if as_path else load_data("animals", tmp_path)
    assert data.name == "animals"
    assert data.class_names == CLASSES
    assert data.image_shape == (channels, 7, 5)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test_labels.tolist() == [0, 0, 1, 1, 2, 2]
    for part in ("train", "test"):
        images = getattr(data, f"{part}_images").permute(0, 2, 3, 1).squeeze(-1)
        assert np.array_equal(images, np.stack(written[part]))


def test_grey_images_among_coloured_ones_become_coloured(tmp_path):
    written = write_folder(tmp_path, channels=1)
    Image.new("RGB", (5, 7), (10, 20, 30)).save(tmp_path / "train" / "cat" / "1.png")
    data = load_data(tmp_path)
    assert data.image_shape == (3, 7, 5)
    assert data.train_images[1, :, 0, 0].tolist() == [10, 20, 30]
    for channel in range(3):
        assert np.array_equal(data.train_images[0, channel], written["train"][0])


def test_other_files_in_a_folder_are_left_alone(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "README.md").write_text("no class")
    assert len(load_data(tmp_path).train_labels) == 9


def test_image_size_scales_a_folder_as_pillow_does(tmp_path):
    written = write_folder(tmp_path, channels=3)
    data = load_data(tmp_path, image_size=(14, 6))
    assert data.image_shape == (3, 14, 6)
    oracle = Image.fromarray(written["train"][4]).resize((6, 14), Image.Resampling.BILINEAR)
    assert np.array_equal(data.train_images[4].permute(1, 2, 0), np.asarray(oracle))


def test_channels_turns_a_folder_grey_or_coloured_as_pillow_does(tmp_path):
    coloured = write_folder(tmp_path / "coloured", channels=3)
    grey = load_data(tmp_path / "coloured", channels=1)
    assert np.array_equal(grey.train_images[2, 0], np.asarray(Image.fromarray(coloured["train"][2]).convert("L")))
    written = write_folder(tmp_path / "grey", channels=1)
    data = load_data(tmp_path / "grey", channels=3)
    assert np.array_equal(data.test_images[5].permute(1, 2, 0), np.stack([written["test"][5]] * 3, -1))


def test_size_and_channels_convert_mnists_files_as_torchvision_does(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path, monkeypatch)
    data = load_data("mnist", tmp_path, image_size=32, channels=3)
    oracle = transforms.resize(torch.from_numpy(arrays["t10k-images-idx3-ubyte"])[:, None], [32, 32], antialias=True)
    assert data.image_shape == (3, 32, 32)
    # torchvision rounds one grey level apart for one channel and for three
    assert (data.test_images.int() - oracle.int()).abs().max() <= 1


def test_names_are_read_without_regard_to_case_dashes_and_underscores(digits):
    assert load_data("Digits").fingerprint == digits.fingerprint
    assert load_data("DIG-ITS").fingerprint == digits.fingerprint


def test_an_unknown_name_lists_the_known_ones_and_suggests_one(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'fashionmnist'") as caught:
        load_data("fashion-mnst", tmp_path)
    message = str(caught.value)
    assert "dataset = 'fashion-mnst' is neither a known name nor a folder" in message
    assert all(name in message for name in DATASET_NAMES)
    assert message.endswith(". A folder needs train/<class>/ and test/<class>/ in it.")
    with pytest.raises(ValueError, match="neither a known name nor a folder") as caught:
        load_data("xyzzy!", tmp_path)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("channels", [0, 2, 4, "3"])
def test_other_numbers_of_channels_are_refused(channels):
    with pytest.raises(ValueError, match=f"channels = {channels!r}, but it must be None, 1 or 3"):
        load_data("digits", channels=channels)


@pytest.mark.parametrize("size", [0, -4, (28,), (28, 0), (1, 2, 3), "28", (28.0, 28.0), 28.0])
def test_an_image_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match=r", but it must be a number of pixels above 0, or two$") as caught:
        load_data("digits", image_size=size)
    assert f"image_size = {size!r}" in str(caught.value)


def test_without_files_and_network_mnist_says_what_it_looked_for_and_where(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist", tmp_path)
    message = str(caught.value)
    for part in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        assert f"{part}-idx" in message
    assert str(tmp_path / "MNIST" / "raw") in message
    assert "downloading it failed" in message
    assert "no network in a test" in message
    assert message.endswith("). Put the files there or connect to a network; dataset = 'digits' needs neither")


@pytest.mark.parametrize("name", [name for name in DATASET_NAMES if name != "digits"])
def test_every_known_name_says_so_when_its_files_and_the_network_are_missing(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"(?s)is not at hand: looked for .*'digits' needs neither") as caught:
        load_data(name, tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_digits_need_no_network_and_no_files(tmp_path):
    assert load_data("digits", tmp_path / "missing").num_classes == 10


@pytest.mark.parametrize("class_name", ["MNIST", "FashionMNIST"])
def test_a_damaged_packed_file_is_named(tmp_path, monkeypatch, class_name):
    write_mnist(tmp_path, monkeypatch, class_name, unpacked=False)
    damaged = tmp_path / class_name / "raw" / "t10k-images-idx3-ubyte.gz"
    truncate(damaged)
    with pytest.raises(
        OSError, match=f"cannot be read, since one of its files is damaged: {damaged}. Delete that file"
    ) as caught:
        load_data(class_name.lower(), tmp_path)
    assert not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_damaged_unpacked_file_is_named(tmp_path, monkeypatch, name, packed):
    write_mnist(tmp_path, monkeypatch, packed=packed)
    damaged = tmp_path / "MNIST" / "raw" / name
    truncate(damaged)
    with pytest.raises(OSError, match="is damaged") as caught:
        load_data("mnist", tmp_path)
    assert not isinstance(caught.value, FileNotFoundError)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("options", [{}, {"channels": 3}, {"image_size": 8}])
def test_a_truncated_image_is_named(tmp_path, suffix, options):
    write_folder(tmp_path, channels=3)
    damaged = tmp_path / "test" / "fox" / f"damaged.{suffix}"
    # large enough for the cut to go through the pixels and leave the header whole
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for path in (damaged, *tmp_path.rglob("*.png")):
        Image.fromarray(pixels).save(path)
    truncate(damaged)
    with pytest.raises(OSError, match=r"is damaged or no image \(.+\); replace or delete it") as caught:
        load_data(tmp_path, **options)
    assert str(damaged) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    write_folder(tmp_path)
    (tmp_path / "train" / "dog" / "9.png").write_bytes(content)
    with pytest.raises(OSError, match=r"is damaged or no image \(.+\); replace or delete it") as caught:
        load_data(tmp_path)
    assert str(tmp_path / "train" / "dog" / "9.png") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("9.ppm", b"P6\n2x 2\n255\n" + bytes(12)),  # a ValueError of Pillow's
        (
            "9.bmp",
            b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + b"\0\0\0\x10" * 2 + b"\1\0\x18\0" + bytes(24),
        ),  # too large
        ("9.jpg", bytes(100)),
    ],
)
def test_a_file_that_pillow_refuses_in_another_way_is_named_too(tmp_path, name, content):
    write_folder(tmp_path)
    (tmp_path / "train" / "dog" / name).write_bytes(content)
    with pytest.raises(OSError, match=r"is damaged or no image \(.+\); replace or delete it") as caught:
        load_data(tmp_path)
    assert str(tmp_path / "train" / "dog" / name) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "pixels"), [("deep.png", np.full((7, 5), 300, np.uint16)), ("deep.tiff", np.full((7, 5), 0.5, np.float32))]
)
def test_an_image_of_more_than_8_bits_is_refused_instead_of_cut_off(tmp_path, file, pixels):
    write_folder(tmp_path)
    Image.fromarray(pixels).save(tmp_path / "test" / "cat" / file)
    words = r"has pixels of 16 or 32 bits .*\); scale them to 0 to 255 and save the image with 8 bits a channel"
    with pytest.raises(ValueError, match=words) as caught:
        load_data(tmp_path)
    assert str(tmp_path / "test" / "cat" / file) in str(caught.value)


@pytest.mark.parametrize("part", ["train", "test"])
def test_an_empty_class_is_named(tmp_path, part):
    write_folder(tmp_path)
    for path in (tmp_path / part / "dog").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"class 'dog' is empty: no image in .*; add images or delete the folder"
    ) as caught:
        load_data(tmp_path)
    assert str(tmp_path / part / "dog") in str(caught.value)


def test_images_of_different_sizes_are_named_with_their_sizes_and_a_way_out(tmp_path):
    write_folder(tmp_path)
    Image.new("L", (6, 9)).save(tmp_path / "train" / "fox" / "1.png")
    with pytest.raises(ValueError, match="images of different sizes") as caught:
        load_data(tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'train' / 'cat' / '0.png'} is 5 × 7" in message
    assert f"{tmp_path / 'train' / 'fox' / '1.png'} is 6 × 9 pixels" in message
    instead = "pixels; scale them to one size, or have it done: image_size=32 (in a shell --image-size 32)"
    assert message.endswith(instead)
    assert load_data(tmp_path, image_size=32).image_shape == (1, 32, 32)


def test_a_folder_with_one_class_is_refused(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.new("L", (5, 7)).save(tmp_path / part / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"has 1 class folder \(\['cat'\]\); a classifier needs at least two"):
        load_data(tmp_path)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_without_train_or_test_is_refused(tmp_path, part):
    write_folder(tmp_path)
    (tmp_path / part).rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=f"has no folder '{part}'") as caught:
        load_data(tmp_path)
    assert str(caught.value).endswith("; a data set needs train/<class>/ and test/<class>/ with images")


@pytest.mark.parametrize("part", ["train", "test"])
def test_classes_that_only_one_part_has_are_named(tmp_path, part):
    write_folder(tmp_path)
    (tmp_path / part / "fox").rename(tmp_path / part / "wolf")
    words = (
        r"train and test must have the same classes, but only one of them has \['fox', 'wolf'\]; add or delete these"
    )
    with pytest.raises(ValueError, match=words):
        load_data(tmp_path)


def test_a_damaged_file_of_cifar_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", no_network)
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    (folder / "data_batch_3").write_bytes(b"half of it")
    with pytest.raises(OSError, match="is damaged") as caught:
        load_data("cifar10", tmp_path)
    assert str(folder / "data_batch_3") in str(caught.value)
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"looked for data_batch_1, .*test_batch in .*cifar-10-batches-py"):
        load_data("cifar10", tmp_path)


def no_network(self):
    raise OSError("no network")


def test_emnists_files_are_not_taken_for_mnists(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.EMNIST, "download", no_network)
    with pytest.raises(FileNotFoundError) as caught:
        load_data("emnist", tmp_path)
    assert "train-images" not in str(caught.value)
