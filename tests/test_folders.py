import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lablib import MLP, TrainingConfig, experiment, folders, load_data
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
    assert [cache for cache in caches(folder) if cache.suffix == ".npy"] == []


def test_the_cache_is_no_image_and_no_class(folder):
    load_data(folder)
    assert load_data(folder).class_names == ("cat", "dog")
    assert len(load_data(folder).train_labels) == 6


def test_what_begins_with_a_dot_is_neither_class_nor_image(folder):
    before = load_data(folder)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "test" / "cat" / "._0.png").write_bytes(b"what a Mac leaves behind")
    assert load_data(folder).fingerprint == before.fingerprint


# More than fits into memory


def is_mapped(data) -> bool:
    return isinstance(data._arrays["train_images"], np.memmap)


def test_images_that_are_too_many_for_the_memory_stay_on_the_disk_and_are_the_same(folder, monkeypatch):
    in_memory = load_data(folder)
    assert not is_mapped(in_memory)
    monkeypatch.setattr(folders, "_IN_MEMORY", 0)
    again = load_data(folder)
    (cache,) = caches(folder)
    cache.unlink()
    monkeypatch.setattr(folders, "_CHUNK", 3 * 60)  # bytes: three images
    decoded = load_data(folder)
    for data in (again, decoded):
        assert is_mapped(data)
        assert data.fingerprint == in_memory.fingerprint
        assert all(
            torch.equal(*both) for both in zip(data.channel_statistics, in_memory.channel_statistics, strict=True)
        )
    assert len(caches(folder)) == 1


def test_runs_side_by_side_on_images_that_stay_on_the_disk_are_those_of_images_in_memory(folder, tmp_path, monkeypatch):
    def train(store: str):
        knobs = TrainingConfig(
            num_epochs=2, batch_size=2, validation_split=0.4, device="cpu", output_dir=str(tmp_path / store)
        )
        models = {"mlp": lambda: MLP((4,), image_shape=(3, 5, 4), num_classes=2)}
        return experiment(models, knobs, load_data(folder), seeds=(0, 1), jobs=2)

    in_memory = train("memory")
    monkeypatch.setattr(folders, "_IN_MEMORY", 0)
    mapped = train("mapped")
    assert is_mapped(mapped.data)
    assert not mapped.failures
    assert mapped.values("mlp") == in_memory.values("mlp")
    assert mapped.values("mlp", "val_loss") == in_memory.values("mlp", "val_loss")


def test_too_many_images_without_room_for_their_cache_are_refused(folder, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "_IN_MEMORY", 0)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=r"GiB of pixels of .*pets do not fit in memory, and their cache cannot be"
    ) as error:
        load_data(folder)
    assert "No space left on device" in str(error.value)
    assert "make room or the folder writable, or write a smaller image_size" in str(error.value)
    assert caches(folder) == []


LIMITED = """
import resource, sys, torch
from pathlib import Path
from lablib import MLP, StreamlinedTrainer, TrainingConfig, load_data
torch.set_num_threads(1)
torch.manual_seed(0)

def own_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmData")))

limit = 430 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (own_memory() + limit, resource.RLIM_INFINITY))
data = load_data(sys.argv[1], image_size=360, channels=3)
assert data.train_images.nbytes > limit, data.train_images.nbytes
config = TrainingConfig(num_epochs=1, batch_size=4, rotation_degrees=0, translation_fraction=0, device="cpu")
trainer = StreamlinedTrainer(MLP((8,), image_shape=data.image_shape, num_classes=2), config, data)
trainer.train()
print(trainer.test()["test_accuracy"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of a process's own memory is Linux's")
def test_a_folder_larger_than_the_memory_it_is_given_trains(tmp_path):
    """490 MB of pixels with 450 MB of memory: solid colours, so that they are small files."""
    for part, count in (("train", 1200), ("test", 60)):
        for name, shade in (("dark", 60), ("light", 190)):
            place = tmp_path / "large" / part / name
            place.mkdir(parents=True)
            for index in range(count // 2):
                Image.new("RGB", (36, 36), (shade + index % 30,) * 3).save(place / f"{index}.jpg")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "large")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stderr[-2000:]
    assert float(process.stdout.split()[-1]) > 0.9
