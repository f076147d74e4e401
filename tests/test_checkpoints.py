"""Checkpoints on the disk: whole or not there, checked before they are used, and folders that cannot take them."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from lablib.checkpoints import (
    MANIFEST,
    DamagedCheckpointError,
    check_room,
    checkpoints_in,
    describe_failed_write,
    discard_unfinished,
    keep_newest,
    newest_usable,
    seal,
    unfinished,
    verify,
)

CONTENTS = {"model.safetensors": b"weights" * 100, "trainer_state.json": b"{}", "näme mit Leerzeichen": b""}


def write(folder: Path, step: int) -> Path:
    """A sealed checkpoint."""
    written = unfinished(folder) / f"checkpoint-{step}"
    written.mkdir(parents=True)
    for name, content in CONTENTS.items():
        (written / name).write_bytes(content)
    target = folder / f"checkpoint-{step}"
    seal(written, target)
    return target


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "Läufe 1" / "checkpoints"


def test_a_sealed_checkpoint_is_whole_and_says_what_it_holds(folder):
    checkpoint = write(folder, 3)
    verify(checkpoint)
    assert {path.name for path in checkpoint.iterdir()} == {*CONTENTS, MANIFEST}
    manifest = json.loads((checkpoint / MANIFEST).read_bytes())
    assert {name: entry["bytes"] for name, entry in manifest.items()} == {k: len(v) for k, v in CONTENTS.items()}
    assert checkpoints_in(folder) == [checkpoint]


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(folder):
    write(folder, 3)
    again = write(folder, 3)
    verify(again)
    discard_unfinished(folder)
    assert list(folder.iterdir()) == [again]


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("model.safetensors", cut, r"model.safetensors has 699 bytes and not 700"),
        ("model.safetensors", flip, r"model.safetensors is not what was written"),
        ("trainer_state.json", Path.unlink, r"trainer_state.json is missing"),
        (MANIFEST, cut, r"checkpoint-3 cannot be read: "),
        (MANIFEST, Path.unlink, rf"{MANIFEST} is missing"),
        (MANIFEST, lambda path: path.write_text("[1]"), r"checkpoint-3 cannot be read: "),
    ],
)
def test_damage_is_named(name, damage, words, folder):
    checkpoint = write(folder, 3)
    damage(checkpoint / name)
    with pytest.raises(DamagedCheckpointError, match=words):
        verify(checkpoint)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_set_aside(folder):
    before, damaged = write(folder, 9), write(folder, 10)
    flip(damaged / "model.safetensors")
    with pytest.warns(UserWarning, match=r"checkpoint-10 cannot be used: .*not what was written.*set aside as"):
        assert newest_usable(folder) == before
    assert [path.name for path in (folder.parent / "set-aside").iterdir()] == ["checkpoint-10-1"]
    cut(write(folder, 10) / "model.safetensors")
    with pytest.warns(UserWarning, match=r"set aside as .*checkpoint-10-2"):
        assert newest_usable(folder) == before


def test_without_a_whole_checkpoint_there_is_none(folder):
    assert newest_usable(folder) is None
    cut(write(folder, 1) / MANIFEST)
    with pytest.warns(
        UserWarning, match=r"the training goes on from the checkpoint before it, or from the beginning if there is none"
    ):
        assert newest_usable(folder) is None


def test_the_newest_are_kept_by_number_and_not_by_name(folder):
    for step in (8, 9, 10, 100):
        write(folder, step)
    (folder / "checkpoint-of-mine").mkdir()
    keep_newest(folder, 2)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-100", "checkpoint-10"]
    assert (folder / "checkpoint-of-mine").is_dir()


def test_a_deletion_that_breaks_off_leaves_no_half_checkpoint_under_its_name(folder, monkeypatch):
    write(folder, 1), write(folder, 2)

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_newest(folder, 1)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"]
    discard_unfinished(folder)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


# Folders that cannot take them


def test_a_folder_with_room_is_made_and_left_empty(folder):
    check_room(folder, 1)
    assert list(folder.iterdir()) == []


def test_a_disk_that_is_too_full_is_named_with_what_is_free_and_what_is_needed(folder, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30 - 2**20, 2**20))
    check_room(folder, 2**20)
    with pytest.raises(OSError, match=r"free some space, or write another output_dir") as caught:
        check_room(folder, 300 * 2**20)
    assert f"the disk of {folder} has 1 MiB free, but this training writes up to 300 MiB" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(
        OSError, match=r"runs cannot be written to \((File exists|Not a directory)\): make it writable, or"
    ):
        check_room(tmp_path / "runs", 0)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.EROFS, "make it writable"), (errno.EACCES, "make it writable"), (errno.ENOSPC, "free")],
)
def test_a_folder_that_cannot_be_written_to_is_named_with_the_reason(number, advice, folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=advice) as caught:
        check_room(folder, 0)
    assert f"the folder {folder} cannot be written to ({os.strerror(number)})" in str(caught.value)
    assert "or write another output_dir" in str(caught.value)


def test_a_write_that_fails_says_which_why_and_that_the_others_are_safe(folder):
    folder.mkdir(parents=True)
    error = describe_failed_write(OSError(errno.ENOSPC, "No space left"), folder / "checkpoint-4", 5 * 2**20)
    assert error.errno == errno.ENOSPC
    assert str(folder / "checkpoint-4") in str(error)
    assert "No space left" in str(error)
    assert "it takes 5 MiB" in str(error)
    safe = " of room. The checkpoints before it are whole: mend that, and run again to go on from the newest"
    assert str(error).endswith(safe)
    assert describe_failed_write(RuntimeError("writer failed"), folder / "checkpoint-4", 0).errno == errno.EIO
