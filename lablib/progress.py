"""Progress of many runs: one bar over the runs, one within those that are being trained."""

import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from lablib.config import is_first_process


class RunProgress:
    """A context manager that shows how many runs are finished and how far the current ones are.

    It watches the history files of the run store, so it works for runs in other processes and on other machines too.
    A terminal gets two bars. A notebook and a log get one line with the same content, as neither can draw two.
    """

    def __init__(self, paths: dict[str, Path], num_epochs: int, finished: int = 0, interval_seconds: float = 0.5):
        self.paths, self.num_epochs, self.interval_seconds = paths, num_epochs, interval_seconds
        total = finished + len(paths)
        stream = sys.stderr if sys.stderr.isatty() else sys.stdout
        common = {"file": stream, "dynamic_ncols": stream.isatty(), "ncols": None if stream.isatty() else 90}
        common["disable"] = not is_first_process()
        pause = 0.1 if stream.isatty() else 5.0  # seconds between two lines of a log
        self.runs = tqdm(
            total=total, initial=finished, desc="runs", unit="run", mininterval=pause, miniters=0, smoothing=0, **common
        )
        self.within = None
        if stream.isatty():
            bar = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} epochs"
            self.within = tqdm(total=num_epochs, desc="waiting", bar_format=bar, leave=False, **common)
        self._started = time.time()
        self._done: set[str] = set()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._watcher.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._watcher.join()
        if self.within is not None:
            self.within.close()
        self.runs.set_postfix_str("")
        self.runs.close()

    def finished(self, name: str):
        """Count a run as finished."""
        self._done.add(name)
        self.runs.update()

    def _watch(self):
        while not self._stop.wait(self.interval_seconds):
            running = {name: epochs for name in self.paths if (epochs := self._epochs(name))}
            if not running:
                continue
            names, epochs = ", ".join(running), sum(running.values())
            if self.within is None:
                of = self.num_epochs
                self.runs.set_postfix_str("; ".join(f"{n} epoch {e}/{of}" for n, e in running.items()), refresh=False)
                self.runs.update(0)
            else:
                self.within.total, self.within.n = self.num_epochs * len(running), epochs
                self.within.set_description_str(names)

    def _epochs(self, name: str) -> int:
        """How many epochs a run has behind it in this session; 0 for one that has not begun or is finished."""
        if name in self._done:
            return 0
        try:
            file = self.paths[name] / "history.jsonl"
            return len(file.read_text().splitlines()) if file.stat().st_mtime >= self._started else 0
        except OSError:
            return 0
