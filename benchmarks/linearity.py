"""How lablib's cost grows with images, epochs and runs; each measurement in a process of its own, with one thread."""

import contextlib
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.cases import VALIDATION_SPLIT, Case, build, load
from benchmarks.gate import peak_memory
from benchmarks.isolated import isolated
from benchmarks.rivals import lablib_config


def measure(case: Case, images: tuple[int, ...], epochs: tuple[int, ...], runs: tuple[int, ...]) -> dict:
    """Seconds and memory by number of images, of epochs, of runs; the others are one each, of `images[1]` images."""
    return {
        "case": case.name,
        "images": [isolated(with_images, case, number) for number in images],
        "epochs": [isolated(with_epochs_and_runs, case, images[1], number, 1) for number in epochs],
        "runs": [isolated(with_epochs_and_runs, case, images[1], 1, number) for number in runs],
    }


def with_images(case: Case, images: int) -> dict:
    """One epoch over so many training images, those of the data set over and over."""
    import torch

    from lablib import StreamlinedTrainer

    torch.set_num_threads(1)
    data = _repeated(load(case, None), images)
    data.channel_statistics  # noqa: B018 (computed once, like the loading of the data)
    held = start_of_a_new_peak()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = StreamlinedTrainer(_network(case, data), lablib_config(case, 1), data, checkpoint_dir=folder)
        trainer.train()
        seconds = time.perf_counter() - start
    row = next(entry for entry in trainer.state.log_history if "seconds" in entry)
    return {
        "images": len(trainer.train_dataset),
        "seconds": round(seconds, 2),
        "training_seconds": round(row["seconds"], 2),
        "data_mib": round((data.train_images.nbytes + data.train_labels.nbytes) / 2**20),
        "more_memory_mib": round((peak_memory() - held) / 2**20),
    }


def with_epochs_and_runs(case: Case, images: int, epochs: int, runs: int) -> dict:
    """An experiment of some runs one after another, of some epochs each."""
    import torch

    from lablib import experiment

    torch.set_num_threads(1)
    data = load(case, images)
    models = {case.name: partial(_network, case, data)}
    with tempfile.TemporaryDirectory() as folder:
        config = lablib_config(case, 1, output_dir=folder, max_train_images=1_000)
        experiment(models, config, data, seeds=[1_000])  # what a process pays once
        start = time.perf_counter()
        experiment(models, lablib_config(case, epochs, output_dir=folder), data, seeds=range(runs))
        seconds = time.perf_counter() - start
    return {"epochs": epochs, "runs": runs, "images": images, "seconds": round(seconds, 2)}


def start_of_a_new_peak() -> int:
    """The memory that is held, bytes; on Linux a new peak is counted from here."""
    import psutil

    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def _repeated(data, images: int):
    import torch

    total = round(images / (1 - VALIDATION_SPLIT))
    chosen = torch.arange(total) % len(data.train_labels)
    return replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


def _network(case: Case, data):
    return build(case, data.image_shape, data.num_classes)
