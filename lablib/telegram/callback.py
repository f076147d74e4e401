"""When messages are sent: at the end of a training and of an experiment, and where one fails."""

import contextlib
import json
import math
import time
import warnings
from functools import cached_property
from pathlib import Path

from lablib.checkpoints import checkpoints_in
from lablib.metrics import best_row, history
from lablib.secret import redacted
from lablib.services import ServiceCallback, harmless, learning_curves
from lablib.telegram import messages
from lablib.telegram.notifier import TelegramNotifier


class TelegramCallback(ServiceCallback):
    """Sends a training's result with its learning curves at the end; if it fails, where and why."""

    service = "Telegram"

    def __init__(self, trainer):
        super().__init__(trainer)
        self._epoch = 0  # the one that is being trained
        self._ended = False

    @cached_property
    def notifier(self) -> TelegramNotifier:
        config = self.trainer.config
        return TelegramNotifier(config.telegram_bot_token, config.telegram_chat_id)

    @property
    def _title(self) -> str:
        return f"{type(self.trainer.model).__name__} on {self.trainer.data.name}"

    @harmless
    def on_train_begin(self, args, state, control, **kwargs):
        self._epoch, self._ended = 0, False
        _ = self.notifier  # if the credentials are missing, it is said now

    def on_epoch_begin(self, args, state, control, **kwargs):
        self._epoch = math.floor(state.epoch + 1e-6) + 1

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        self._ended = True
        trainer, rows = self.trainer, history(state.log_history)
        result = self.test_result()  # with the best epoch's weights, which are loaded by now
        picture = None
        if rows:
            best = best_row(rows, trainer.config.early_stopping_metric)
            result |= {"best_epoch": best["epoch"], "epochs": len(rows), "val_accuracy": best["val_accuracy"]}
            result["seconds"] = rows[-1]["seconds"]
            picture = learning_curves(rows, self._title)
        text = messages.of_run(self._title, trainer.run_name, result, trainer.config.telegram_additional_info)
        self.notifier.send_report(text, picture)

    @harmless
    def on_train_failed(self, error: BaseException):
        if self._ended:  # someone interrupts the sending, for example
            return
        trainer, config = self.trainer, self.trainer.config
        text = messages.of_failed_run(
            f"{self._title}: training {messages.outcome(error)}",
            trainer.run_name,
            messages.place(self._epoch, config.num_epochs),
            messages.described(error),
            _checkpoint_epoch(trainer.args.output_dir),
            config.telegram_additional_info,
        )
        self.notifier.send_message(text)


class ExperimentMessages:
    """Sends what became of an experiment when it ends, and of each of its runs if the config asks for that.

    It is a context manager around the experiment, in the process that called it: the runs send nothing themselves, so
    that they need no credentials wherever they are. Where nothing was trained and nothing failed, nothing is sent.
    """

    def __init__(self, experiment):
        self._experiment, self._config = experiment, experiment.config
        self._notifier: TelegramNotifier | None = None
        self._began = time.time()
        self._pending: dict[tuple[str, int], Path] = {}
        self._ended: set[tuple[str, int]] = set()

    def __enter__(self):
        self._harmlessly(self._log_in)
        return self

    def __exit__(self, kind, error, trace):
        if error is not None:
            self._harmlessly(self._send_stopped, error)
        elif self._pending or self._experiment.failures:
            self._harmlessly(self._send_finished)

    def begin(self, pending: dict[tuple[str, int], Path]):
        """Note which runs (model, seed) are to be trained, and their places in the store."""
        self._pending = dict(pending)

    def run_ended(self, key: tuple[str, int]):
        """Note that one of them is finished or failed."""
        if self._config.telegram_every_run and key not in self._ended:
            self._harmlessly(self._send_run, key)
        self._ended.add(key)

    def _log_in(self):
        self._notifier = TelegramNotifier(self._config.telegram_bot_token, self._config.telegram_chat_id)

    def _send_finished(self):
        experiment, seconds = self._experiment, time.time() - self._began
        loaded = len(experiment.runs.keys() - self._pending.keys())
        text = messages.of_experiment(experiment, loaded, seconds, self._info)
        self._notifier.send_report(text, messages.experiment_curves(experiment))

    def _send_stopped(self, error: BaseException):
        begun = [key for key, path in self._pending.items() if key not in self._ended and self._has_begun(path)]
        places = [f"{name}, seed {seed}: {self._place(self._pending[name, seed])}" for name, seed in begun]
        seconds = time.time() - self._began
        text = messages.of_stopped_experiment(self._experiment, error, places, seconds, self._info)
        self._notifier.send_message(text)

    def _send_run(self, key: tuple[str, int]):
        path, title = self._pending[key], f"{key[0]} on {self._experiment.data.name}, seed {key[1]}"
        if run := self._experiment.runs.get(key):
            text = messages.of_run(title, path.name, run.result, self._info)
            self._notifier.send_report(text, learning_curves(run.history, title))
            return
        error, after = self._experiment.failures[key], _checkpoint_epoch(path / "checkpoints")
        headline = f"{title}: training failed"
        text = messages.of_failed_run(headline, path.name, self._place(path), error, after, self._info)
        self._notifier.send_message(text)

    def _has_begun(self, path: Path) -> bool:
        """Whether a run's training was begun by this experiment; clocks of file systems are coarse."""
        file = path / "identity.json"
        return file.exists() and file.stat().st_mtime > self._began - 1

    def _place(self, path: Path) -> str:
        return messages.place(int(_checkpoint_epoch(path / "checkpoints")) + 1, self._config.num_epochs)

    @property
    def _info(self) -> str:
        return self._config.telegram_additional_info

    def _harmlessly(self, action, *arguments):
        """Do something that may fail: one warning then, and nothing more is sent."""
        if self._notifier is None and action != self._log_in:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._notifier = None
            reason = redacted(str(error)) or type(error).__name__
            warnings.warn(f"Telegram: {reason}; the experiment goes on without it", stacklevel=4)


def _checkpoint_epoch(folder: str | Path) -> float:
    """After how many epochs the last checkpoint in a folder was written; 0 if there is none."""
    for path in checkpoints_in(Path(folder)):
        with contextlib.suppress(OSError, ValueError):
            return json.loads((path / "trainer_state.json").read_bytes())["epoch"]
    return 0
