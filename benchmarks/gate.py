"""A rival's process, and the gate in its training loop: it trains one epoch when it is told to, and reports the times.

A rival trains for ever, as its library does it, and passes the gate at three moments of each epoch: `begin`, where it
waits for its turn; `trained`; `validated`. So no epoch includes the start of a training, and rivals can take turns.
"""

import contextlib
import resource
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Epoch(NamedTuple):
    """Moments of the machine's clock, seconds; numbers of images; the memory's peak so far, bytes."""

    begun: float
    trained: float
    validated: float
    images: int
    peak_memory: int
    waits: int | None  # of the training for the GPU, where they were counted


class Gate:
    """The worker's end. The first epoch, which warms up, needs no leave to begin."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._is_warm, self._counted = False, None
        self.images = 0  # training images an epoch, for the rival to say

    def begin(self):
        if self._is_warm:
            try:
                threads, count_waits = self._connection.recv()
            except EOFError:
                sys.exit()  # out of the library's training loop, whose data loaders are then closed
            if threads:
                torch.set_num_threads(threads)
            if count_waits:
                self._counted = warnings.catch_warnings(record=True, action="always")
                self._warned = self._counted.__enter__()
                torch.cuda.set_sync_debug_mode("warn")
        self._begun, self._waits = time.monotonic(), None

    def trained(self):
        if self._counted:
            torch.cuda.set_sync_debug_mode("default")
            self._waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in self._warned)
            self._counted = self._counted.__exit__()
        self._trained = _finished()

    def validated(self):
        self._is_warm = True
        moments = self._begun, self._trained, _finished()
        self._connection.send(Epoch(*moments, self.images, peak_memory(), self._waits))


class Contestant:
    """The other end: a rival's process, in which the function is called with the gate and `task`."""

    def __init__(self, rival: Callable, **task):
        self._connection, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_work, args=(rival, theirs, task))
        started = time.monotonic()
        self._process.start()
        theirs.close()
        self.seconds_to_first_step = self.end_epoch() - started
        self.warm_up: Epoch = self.end_epoch()

    def begin_epoch(self, threads: int | None = None, count_waits: bool = False):
        self._connection.send((threads, count_waits))

    def end_epoch(self) -> Epoch:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("a rival's process ended; its error stands above") from None

    def stop(self):
        self._connection.close()
        self._process.join(20)
        self._process.kill()  # if it is still there
        self._process.join()


def _work(rival: Callable, connection: Connection, task: dict):
    def tell(*_):
        first_step.remove()
        connection.send(time.monotonic())

    first_step = register_optimizer_step_post_hook(tell)
    rival(Gate(connection), **task)


def _finished() -> float:
    """Now, when the device has done what it was told to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic()


def peak_memory() -> int:
    """The most memory that this process held at one time, with what its children hold for themselves now; bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with contextlib.suppress(OSError):  # on Linux, where ru_maxrss would count the parent's memory before the exec
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            peak += child.memory_full_info().uss
    return peak
