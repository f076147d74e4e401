"""Leaving a training in good order: what asks it to end lets the step end first."""

import os
import signal
import threading
from collections.abc import Sequence

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_parent: int | None = None  # of a worker process: whose death ends its training


def leave_with(parent: int):
    """Let trainings of this process end when a parent process is gone; the process's own parent it has to be."""
    global _parent
    _parent = parent if os.getpid() != parent and os.getppid() == parent else None


class Interruption:
    """A context manager in which SIGINT and SIGTERM are noted, to be acted upon when the time is right.

    SIGINT is Ctrl-C and what a notebook's "interrupt the kernel" sends; SIGTERM is a shutdown's or a cluster's. The
    second signal acts at once, as it would without this. At the end of the context SIGINT that was noted and not acted
    upon raises KeyboardInterrupt, and SIGTERM does what it would have done, so that the process ends. Python lets only
    the main thread handle signals; elsewhere nothing is noted. Signals that are ignored (`nohup`) stay so.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS):
        self._signals, self._noted, self._before = signals, None, {}

    def __enter__(self):
        self._noted = None
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, trace):
        noted = self._noted
        self._restore_handlers()
        if noted == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        if noted == signal.SIGINT and error is None:
            raise KeyboardInterrupt

    @property
    def asked(self) -> bool:
        """Whether to leave."""
        if self._noted is None and _parent is not None and os.getppid() != _parent:
            self._noted = signal.SIGTERM
        return self._noted is not None

    def ask(self):
        """Leave as if a person had pressed Ctrl-C."""
        self._noted = self._noted or signal.SIGINT

    def leave(self):
        """Raise what ends the training if that was asked for."""
        if self.asked:
            raise KeyboardInterrupt if self._noted == signal.SIGINT else SystemExit(128 + self._noted)

    def _note(self, number, frame):
        if self._noted is None:
            self._noted = signal.Signals(number)
        else:
            self._restore_handlers()
            signal.raise_signal(number)

    def _restore_handlers(self):
        while self._before:
            signal.signal(*self._before.popitem())
