"""How lablib's cost grows with the number of images; each measurement in a process of its own, with one thread."""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch

from benchmarks.cases import VALIDATION_SPLIT, Case, load
from benchmarks.gate import peak_memory
from benchmarks.rivals import lablib_trainer


def measure(case: Case, sizes: Sequence[int]) -> dict:
    """Seconds and memory by number of training images."""
    rows = []
    for images in sizes:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            rows.append(process.submit(one_epoch, case, images).result())
    return {"case": case.name, "images": rows}


def one_epoch(case: Case, images: int) -> dict:
    """One epoch over so many training images, those of the data set over and over."""
    torch.set_num_threads(1)
    data = load(case, None)
    chosen = torch.arange(round(images / (1 - VALIDATION_SPLIT))) % len(data.train_labels)
    data = replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])
    data.channel_statistics  # noqa: B018 (computed once, like the loading of the data)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # on Linux a new peak is counted from here
    held = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trainer = lablib_trainer(case, data, folder, num_epochs=1)
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
