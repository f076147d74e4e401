"""A rival's process, and the gate in its training loop: it trains one epoch when it is told to, and reports the times.

A rival keeps its training going for ever, as its library does it, and passes the gate at three moments of each
epoch: `begin`, where it waits for its turn; `trained`; `validated`. So nobody's epochs pay for the start of a training,
and the rivals' epochs can take turns.
"""

import contextlib
import importlib
import os
import sys
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from benchmarks.isolated import leave


class Epoch(NamedTuple):
    """Moments of the machine's clock, seconds; numbers of images; the memory's peak so far, bytes."""

    begun: float
    trained: float
    validated: float
    images: int
    peak_memory: int


class Gate:
    """The worker's end. The first epoch, which warms up, needs no leave to begin."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._epochs = 0
        self.images = 0  # training images an epoch, for the rival to say

    def begin(self):
        if self._epochs:
            self._wait()
        self._begun = time.monotonic()

    def _wait(self):
        import torch

        try:
            threads = self._connection.recv()
        except EOFError:
            sys.exit()  # out of the library's training loop, whose data loaders are then closed
        if threads:
            torch.set_num_threads(threads)

    def first_step(self):
        """To be called after the first step of the first epoch."""
        self._connection.send(time.monotonic())

    def trained(self):
        _synchronise()
        self._trained = time.monotonic()

    def validated(self):
        _synchronise()
        self._epochs += 1
        epoch = Epoch(self._begun, self._trained, time.monotonic(), self.images, peak_memory())
        self._connection.send(epoch)


class Contestant:
    """The other end: a rival's process. `rival` is a function's "module:name", called with the gate and `task`."""

    def __init__(self, rival: str, environment: dict[str, str], **task):
        self._connection, theirs = get_context("spawn").Pipe()
        self._process = get_context("spawn").Process(target=_work, args=(rival, theirs, task))
        started = time.monotonic()
        with _environment(environment):
            self._process.start()
        theirs.close()
        self.seconds_to_first_step = self._receive() - started
        self.warm_up: Epoch = self._receive()

    def begin_epoch(self, threads: int | None = None):
        self._connection.send(threads)

    def end_epoch(self) -> Epoch:
        return self._receive()

    def _receive(self):
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("a rival's process ended; its error stands above") from None

    def stop(self):
        self._connection.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(rival: str, connection: Connection, task: dict):
    module, _, name = rival.partition(":")
    try:
        getattr(importlib.import_module(module), name)(Gate(connection), **task)
    except SystemExit:
        leave()


@contextlib.contextmanager
def _environment(more: dict[str, str]):
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _synchronise():
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def peak_memory() -> int:
    """The most memory that this process held at one time, with what its children hold for themselves now; bytes."""
    import psutil

    children = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            children += child.memory_full_info().uss
    return _own_peak() + children


def _own_peak() -> int:
    with contextlib.suppress(OSError):  # Linux; its ru_maxrss would count the parent's memory before the exec
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
