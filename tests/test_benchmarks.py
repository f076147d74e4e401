"""The benchmarks: the harness runs, and the rivals do the same work."""

import getpass
import json
import platform
import warnings
from multiprocessing import Pipe
from pathlib import Path
from statistics import median

import pytest
import torch

from benchmarks import machine
from benchmarks.__main__ import main
from benchmarks.cases import Case, load
from benchmarks.gate import Gate
from benchmarks.inputs import SingleImages, split
from benchmarks.rivals import lablib_trainer

DIGITS = {"dataset": "digits", "batch_size": 64, "slow_images": 256, "fast_images": 256}
CASE = Case("MLP-2", "MLP", {"hidden_sizes": (16,)}, translation_fraction=0.1, **DIGITS)
FLIPPED = Case("SimpleCNN-1", "SimpleCNN", {"depth": 1, "width": 4}, horizontal_flip=True, **DIGITS)


def test_two_rivals_take_turns_and_are_measured_and_named_but_no_places_or_hosts(tmp_path, monkeypatch):
    options = ["--cases", "MLP-2", "--rivals", "tight", "lablib", "--rounds", "2", "--jobs", "1", "--no-growth"]
    monkeypatch.setattr("benchmarks.__main__.CASES", (CASE,))
    main([*options, "--out", str(tmp_path)])
    name = f"benchmark-{machine.device_slug(machine.describe())}"
    measured, page = ((tmp_path / f"{name}.{kind}").read_text() for kind in ("json", "md"))
    entries = json.loads(measured)["cases"][0]["entries"]
    assert {entry["rival"] for entry in entries} == {"tight", "lablib"}
    for entry in entries:
        assert len(entry["train"]) == len(entry["epoch"]) == 2
        assert all(0 < epoch <= train for train, epoch in zip(entry["train"], entry["epoch"], strict=True))  # rounded
        assert entry["images"] in (255, 256)  # a tenth of 284 is for validation
        assert entry["peak_memory_mib"] > 100
        assert entry["seconds_to_first_step"] > 0
    for word in (str(Path.cwd()), str(Path.home()), "/tmp", platform.node(), f"/{getpass.getuser()}/"):
        assert word not in measured + page
    assert all(f"{median(entry['train']):,.0f} (" in page for entry in entries)


@pytest.mark.parametrize("case", [CASE, FLIPPED], ids=lambda case: case.name)
@pytest.mark.parametrize("pil", [True, False])
def test_the_rivals_see_images_of_the_same_distribution_and_the_same_ones_in_validation(case, pil, tmp_path):
    data = load(case, None)
    train, validation = split(data)
    trainer = lablib_trainer(case, data, str(tmp_path))
    theirs = SingleImages(case, data, validation, training=False, pil=pil)[5]["images"]
    ours = trainer.prepare_images(data.train_images[validation], training=False)[5]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    single = SingleImages(case, data, train, training=True, pil=pil)
    theirs = torch.stack([single[index]["images"] for index in range(len(train))])
    ours = trainer.prepare_images(data.train_images[train], training=True)
    assert theirs.shape == ours.shape
    torch.testing.assert_close(theirs.mean(), ours.mean(), atol=0.02, rtol=0)
    torch.testing.assert_close(theirs.std(), ours.std(), atol=0.02, rtol=0)
    averages = theirs.mean(0) - ours.mean(0)  # of each pixel over all images
    assert averages[:, 2:-2, 2:-2].abs().max() < 0.15  # at the rim PIL interpolates differently


def test_the_waits_for_the_gpu_are_those_of_one_epochs_training(monkeypatch):
    modes, (ours, theirs) = [], Pipe()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    gate = Gate(theirs)
    for count_waits in (False, True, False):
        ours.send((None, count_waits))
    for waits in (None, None, 2, None):  # the first epoch begins unasked
        gate.begin()
        for message in ("called a synchronizing CUDA operation", "something else") * 2 if waits else ():
            warnings.warn(message, stacklevel=1)
        gate.trained()
        gate.validated()
        assert ours.recv().waits == waits
    assert modes == ["warn", "default"]
