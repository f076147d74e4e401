"""Checkpoints on disk: whole or absent, checked before they are used, and folders that cannot take them."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lablib.checkpoints import (
    MANIFEST,
    UNFINISHED,
    DamagedCheckpointError,
    check_room,
    checkpoints_in,
    discard_unfinished,
    failures_explained,
    newest_usable,
    seal,
    verify,
    write_atomically,
)

CONTENTS = {"model.safetensors": b"weights" * 100, "trainer_state.json": b"{}", "näme mit Leerzeichen": b""}


def write(folder: Path, step: int, keep: int = 9) -> Path:
    """A sealed checkpoint."""
    target = folder / f"checkpoint-{step}"
    (folder / UNFINISHED / target.name).mkdir(parents=True)
    for name, content in CONTENTS.items():
        (folder / UNFINISHED / target.name / name).write_bytes(content)
    seal(target, keep)
    return target


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Läufe 1" / "checkpoints"


def test_a_sealed_checkpoint_is_whole_and_replaces_one_of_the_same_step(folder):
    for _ in range(2):
        checkpoint = write(folder, 3)
        verify(checkpoint)
        assert {path.name for path in checkpoint.iterdir()} == {*CONTENTS, MANIFEST}
    discard_unfinished(folder)
    assert [*folder.iterdir()] == checkpoints_in(folder) == [checkpoint]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, "checkpoint-3, model.safetensors has changed since it was written"),
        ("model.safetensors", flip, "checkpoint-3, model.safetensors has changed since it was written"),
        ("trainer_state.json", Path.unlink, "checkpoint-3 cannot be read: .*trainer_state.json"),
        (MANIFEST, cut, "checkpoint-3 cannot be read: "),
        (MANIFEST, Path.unlink, f"checkpoint-3 cannot be read: .*{MANIFEST}"),
        (MANIFEST, lambda path: path.write_text("[1]"), "checkpoint-3 cannot be read: "),
    ],
)
def test_damage_is_named(name, damage, words, folder):
    checkpoint = write(folder, 3)
    damage(checkpoint / name)
    with pytest.raises(DamagedCheckpointError, match=words):
        verify(checkpoint)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used_if_there_is_one(folder):
    assert newest_usable(folder) is None
    before = write(folder, 9)
    for number in (1, 2):
        flip(write(folder, 10) / "model.safetensors")
        with pytest.warns(UserWarning, match=rf"checkpoint-10 cannot be used: .* aside as .*checkpoint-10-{number};"):
            assert newest_usable(folder) == before
    assert len([*(folder.parent / "set-aside").iterdir()]) == 2
    cut(before / MANIFEST)
    with pytest.warns(UserWarning, match=r"or from the beginning if there is none"):
        assert newest_usable(folder) is None


def test_the_newest_are_kept_by_number_and_not_by_name(folder):
    (folder / "checkpoint-of-mine").mkdir(parents=True)
    for step in (8, 9, 10, 100):
        write(folder, step, keep=2)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-100", "checkpoint-10"]
    assert (folder / "checkpoint-of-mine").is_dir()


def test_a_deletion_that_breaks_off_leaves_no_half_checkpoint_under_its_name(folder, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    write(folder, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write(folder, 2, keep=1)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"]
    discard_unfinished(folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "the disk fails")

    write_atomically(tmp_path / "result.json", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk fails"):
        write_atomically(tmp_path / "result.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("result.json", b"old")]


def test_a_disk_that_is_too_full_is_named_with_what_is_free_and_what_is_needed(folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    check_room(folder, 2**20)
    assert [*folder.iterdir()] == []
    words = rf"{folder} .*1 MiB are free, .* writes up to 300 MiB\): free some space, or choose another output_dir"
    with pytest.raises(OSError, match=words) as caught:
        check_room(folder, 300 * 2**20)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EROFS, "make it writable"), (errno.EEXIST, "make it writable"), (errno.ENOSPC, "free some space")],
)
def test_a_folder_that_cannot_be_written_to_is_named_with_the_reason(number, advice, folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    words = rf"{folder} cannot be written to \({os.strerror(number)}\): {advice}, or choose another output_dir"
    with pytest.raises(OSError, match=words):
        check_room(folder, 0)


@pytest.mark.parametrize(
    ("error", "number"),
    [(OSError(errno.ENOSPC, "No space left"), errno.ENOSPC), (RuntimeError("PytorchStreamWriter failed"), errno.EIO)],
)
def test_a_failed_write_says_which_why_what_is_safe_and_what_to_do(error, number, folder):
    before = write(folder, 3)
    (folder / UNFINISHED / "checkpoint-4").mkdir(parents=True)
    with (
        pytest.raises(OSError, match=r"checkpoint-4 could not be written \(.*(space|failed)") as caught,
        failures_explained(folder / "checkpoint-4", 5 * 2**20),
    ):
        raise error
    assert caught.value.errno == number
    assert "it takes 5 MiB, and " in str(caught.value)
    assert "Earlier checkpoints are intact: fix this, and run again to resume from the newest" in str(caught.value)
    assert [*folder.iterdir()] == [before]
