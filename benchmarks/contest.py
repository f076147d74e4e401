"""A contest: the rivals train a case in turns, epoch by epoch, and their speeds are collected."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

from benchmarks.cases import Case
from benchmarks.gate import Contestant, Epoch
from benchmarks.rivals import RIVALS


@dataclass
class Entry:
    """A way of running a rival: its processes (more than one train side by side), the threads of each."""

    rival: str
    variant: str
    processes: list[Contestant]
    threads: int | None = None
    train: list[float] = field(default_factory=list)  # images/s of each round
    epoch: list[float] = field(default_factory=list)  # images/s of each round, the validation's time included
    peak_memory: int = 0
    waits: int | None = None  # for the GPU, in an epoch's training

    def run_round(self):
        for process in self.processes:
            process.begin_epoch(self.threads)
        epochs = [process.end_epoch() for process in self.processes]
        train, epoch = speeds(epochs)
        self.train.append(train)
        self.epoch.append(epoch)
        self.peak_memory = sum(epoch.peak_memory for epoch in epochs)

    def count_waits(self):
        """An epoch more, as counting takes time."""
        self.processes[0].begin_epoch(self.threads, count_waits=True)
        self.waits = self.processes[0].end_epoch().waits

    def summary(self) -> dict:
        first = self.processes[0]
        usual = first.warm_up.images / max(self.train)
        return {
            "rival": self.rival,
            "title": RIVALS[self.rival].title,
            "variant": self.variant,
            "images": first.warm_up.images,
            "train": [round(speed) for speed in self.train],
            "epoch": [round(speed) for speed in self.epoch],
            "waits": self.waits,
            "peak_memory_mib": round(self.peak_memory / 2**20),
            "seconds_to_first_step": round(first.seconds_to_first_step, 1),
            "warm_up_seconds": round(max(0, first.warm_up.trained - first.warm_up.begun - usual), 1),
        }


def speeds(epochs: Sequence[Epoch]) -> tuple[float, float]:
    """Images/s of epochs that went side by side, from the first one's begin to the last one's end.

    The first figure ends with the training, the second one with the validation; both count the training images.
    """
    images = sum(epoch.images for epoch in epochs)
    begun = min(epoch.begun for epoch in epochs)
    train = images / (max(epoch.trained for epoch in epochs) - begun)
    return train, images / (max(epoch.validated for epoch in epochs) - begun)


def race(
    case: Case, rivals: Sequence[str], rounds: int, jobs: int, on_gpu: bool = False, images: int | None = None
) -> dict:
    """Each rival's summary, variant by variant; `images` is an epoch of every rival in place of the case's own."""
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())

        def start(name: str, workers: int = 0) -> Contestant:
            rival = RIVALS[name]
            number = images or (case.slow_images if rival.one_by_one else None if on_gpu else case.fast_images)
            task = {"case": case, "images": number, "workers": workers, "output_dir": tempfile.mkdtemp(dir=scratch)}
            contestant = Contestant(rival.function, **task)
            stack.callback(contestant.stop)
            return contestant

        entries = _entries(case, rivals, jobs, on_gpu, start)
        for number in range(rounds):
            turn = number * max(1, len(entries) // rounds) % len(entries)
            for entry in entries[turn:] + entries[:turn]:
                entry.run_round()
        for entry in entries if on_gpu else ():
            entry.count_waits()
        return asdict(case) | {"entries": [entry.summary() for entry in entries]}


def _entries(case: Case, rivals: Sequence[str], jobs: int, on_gpu: bool, start) -> list[Entry]:
    """The student lab comes with 0 and 2 workers; the other loaders take the number that is faster in a trial epoch."""
    entries = []
    workers = 0
    if "student" in rivals:
        students = {number: start("student", number) for number in (0, 2)}
        entries += [Entry("student", f"{number} workers", [process]) for number, process in students.items()]
        workers = min(students, key=lambda number: _trial_seconds(students[number]))
    for name in rivals:
        if name in ("transformers", "lightning"):
            entries.append(Entry(name, f"{workers} workers", [start(name, workers)]))
    threads = {"one run": None} if on_gpu else _threads(case)
    if "tight" in rivals:
        process = start("tight")
        entries += [Entry("tight", said, [process], number) for said, number in threads.items()]
    if "lablib" in rivals:
        processes = [start("lablib") for _ in range(jobs)]
        entries += [Entry("lablib", said, processes[:1], number) for said, number in threads.items()]
        if jobs > 1:
            share = None if on_gpu else max(1, (os.cpu_count() or 1) // jobs)
            entries.append(Entry("lablib", f"{jobs} runs side by side", processes, share))
    return entries


def _trial_seconds(process: Contestant) -> float:
    process.begin_epoch()
    epoch = process.end_epoch()
    return epoch.trained - epoch.begun


def _threads(case: Case) -> dict[str, int]:
    """Small linear layers may be faster with one thread; convolutions never are."""
    cores = os.cpu_count() or 1
    return {f"one run, {n} thread{'s' * (n > 1)}": n for n in ((cores,) if case.convolutional else (1, cores))}
