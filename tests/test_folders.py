import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lablib import MLP, TrainingConfig, folders, load_data
from lablib.runs import run_path


@pytest.fixture
def folder(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "pets" / part / name
            place.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(generator.integers(0, 256, (5, 4, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return tmp_path / "pets"


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob(".lablib-*"))


def decoding(monkeypatch) -> list[int]:
    calls, read_all = [], folders._read_all

    def counted(paths, *arguments):
        calls.append(len(paths))
        return read_all(paths, *arguments)

    monkeypatch.setattr(folders, "_read_all", counted)
    return calls


def test_a_second_load_decodes_nothing_and_gives_the_same_data(folder, monkeypatch):
    calls = decoding(monkeypatch)
    first, second = load_data(folder), load_data(folder)
    assert calls == [10]
    assert second.fingerprint == first.fingerprint
    assert torch.equal(first.train_images, second.train_images)


@pytest.mark.parametrize("change", ["content", "new", "gone", "renamed"])
def test_a_folder_that_changes_is_decoded_anew_and_its_old_cache_goes(folder, monkeypatch, change):
    calls = decoding(monkeypatch)
    before = load_data(folder)
    image = folder / "train" / "cat" / "0.png"
    if change == "content":
        Image.fromarray(np.zeros((5, 4, 3), dtype=np.uint8)).save(image)
        os.utime(image, ns=(time.time_ns(), time.time_ns() + 1))
    elif change == "new":
        Image.fromarray(np.zeros((5, 4, 3), dtype=np.uint8)).save(folder / "train" / "dog" / "new.png")
    elif change == "gone":
        image.unlink()
    else:
        image.rename(image.with_name("9.png"))
    after = load_data(folder)
    assert len(calls) == 2
    assert after.fingerprint != before.fingerprint
    assert len(caches(folder)) == 1


def test_a_run_on_a_folder_that_has_changed_is_another_run(folder):
    def path():
        return run_path(lambda: MLP((4,), image_shape=(3, 5, 4), num_classes=2), TrainingConfig(), load_data(folder))

    before = path()
    assert path() == before
    image = folder / "train" / "cat" / "0.png"
    content = image.read_bytes()
    Image.fromarray(np.zeros((5, 4, 3), dtype=np.uint8)).save(image)
    os.utime(image, ns=(time.time_ns(), time.time_ns() + 1))
    assert path() != before
    image.write_bytes(content)
    os.utime(image, ns=(time.time_ns(), time.time_ns() + 2))
    assert path() == before  # it is the pixels that count


def test_another_size_is_another_cache(folder, monkeypatch):
    calls = decoding(monkeypatch)
    assert load_data(folder, image_size=8).image_shape == (3, 8, 8)
    assert load_data(folder, image_size=6).image_shape == (3, 6, 6)
    assert load_data(folder, image_size=6, channels=1).image_shape == (1, 6, 6)
    assert len(calls) == 3


@pytest.mark.parametrize("damage", [b"", b"\x10\x00\x00\x00\x00\x00\x00\x00not json", None])
def test_a_damaged_cache_is_rebuilt(folder, monkeypatch, damage):
    first = load_data(folder)
    (cache,) = caches(folder)
    content = cache.read_bytes()
    cache.write_bytes(content[:-7] if damage is None else damage)
    calls = decoding(monkeypatch)
    assert load_data(folder).fingerprint == first.fingerprint
    assert calls == [10]
    assert cache.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_left_out(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    data = load_data(folder)
    assert data.image_shape == (3, 5, 4)
    assert [cache for cache in caches(folder) if cache.suffix == ".safetensors"] == []


def test_the_cache_is_no_image_and_no_class(folder):
    load_data(folder)
    assert load_data(folder).class_names == ("cat", "dog")
    assert len(load_data(folder).train_labels) == 6


def test_what_begins_with_a_dot_is_neither_class_nor_image(folder):
    before = load_data(folder)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / "cat" / "._0.png").write_bytes(b"what a Mac leaves behind")
    assert load_data(folder).fingerprint == before.fingerprint
