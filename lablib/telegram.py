"""Messages to a Telegram chat when a training or an experiment ends or fails."""

import contextlib
import io
import logging
import os
import queue
import re
import threading
import time
import warnings
from datetime import timedelta
from functools import cached_property

import httpcore  # noqa: F401  # its loggers exist from here on
import httpx
import pandas as pd
from matplotlib.figure import Figure

from lablib.metrics import best_row, history
from lablib.secret import Secret, redacted
from lablib.services import Harmless, ServiceCallback, harmless

_RUN_LINES = {
    "best_epoch": "best epoch: {best_epoch} of {epochs}",
    "val_accuracy": "validation accuracy: {val_accuracy:.2%}",
    "test_accuracy": "test accuracy: {test_accuracy:.2%}",
    "seconds": "duration: {seconds:.0f} s",
}
_WHERE = "in the environment or in Colab's secrets"
_THREAD = "telegram"

for _name in [name for name in logging.root.manager.loggerDict if name.startswith(("httpx", "httpcore"))]:
    # they log the URL, and the token is part of it
    logging.getLogger(_name).addFilter(lambda record: record.threadName != _THREAD)


class TelegramError(RuntimeError):
    """A message was refused or cannot be sent; `status` is the HTTP status, None if there was no answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class TelegramNotifier:
    """Sends a bot's messages to a chat.

    Token and chat come from the arguments, else from TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in the environment, else
    from Colab's secrets. Raises TelegramError if they are missing or malformed, and if a message is refused or does not
    get through within `deadline` seconds.
    """

    deadline = 60.0  # seconds for a request with all its attempts
    pause = 1.0  # seconds before the second attempt; doubled for each further one

    def __init__(
        self,
        bot_token: str | Secret | None = None,
        chat_id: str | int | None = None,
        base_url: str = "https://api.telegram.org",
        timeout: float = 10,  # seconds for one attempt
    ):
        token = bot_token.reveal() if isinstance(bot_token, Secret) else bot_token
        token = str(token or _credential("TELEGRAM_BOT_TOKEN")).strip()
        self.chat_id = str(chat_id or _credential("TELEGRAM_CHAT_ID")).strip()
        if not re.fullmatch(r"\d+:[\w-]+", token, re.ASCII):
            raise TelegramError(f"set TELEGRAM_BOT_TOKEN to your bot's token, 123456:AAq7… {_WHERE}")
        if not re.fullmatch(r"-?\d+|@\w+", self.chat_id):
            raise TelegramError(f"set TELEGRAM_CHAT_ID to a chat's number or @name {_WHERE}")
        self._token = Secret(token)
        self.base_url, self.timeout, self._migrated = base_url, timeout, False

    def __repr__(self) -> str:
        return f"TelegramNotifier(bot_token={self._token!r}, chat_id={self.chat_id!r})"

    def check(self) -> str:
        """Ask Telegram whose token this is; the answer names the bot."""
        bot = self._call("getMe")
        return redacted(f"The token is that of {bot.get('first_name')} (@{bot.get('username')}).")

    def send_message(self, text: str) -> None:
        """Send plain text; what exceeds 4096 characters is cut off."""
        self._call("sendMessage", text=_cut(text, 4096))

    def send_report(self, text: str, png: bytes | None = None) -> None:
        """Send text with a picture, as one message if it fits; a chat that refuses pictures gets the text."""
        in_one = png is not None and text == _cut(text, 1024)
        if not in_one:
            self.send_message(text)
        if png is None:
            return
        try:
            return self._call("sendPhoto", png, caption=text if in_one else "")
        except TelegramError as error:
            if error.status != 400 or not in_one:
                raise
        self.send_message(text)

    def _call(self, method: str, png: bytes | None = None, **fields: str) -> dict:
        """The result of one of the Bot API's methods; what is temporary is tried again."""
        if not self._token.reveal():
            raise TelegramError(
                "the bot's token stayed in the process that was told it; "
                "set TELEGRAM_BOT_TOKEN in this one's environment"
            )
        until, pause = time.monotonic() + self.deadline, self.pause
        while not (reply := self._attempt(method, png, fields, until - time.monotonic())).get("ok"):
            status, parameters = reply.get("error_code"), reply.get("parameters") or {}
            new = parameters.get("migrate_to_chat_id")
            if new and not self._migrated:  # once: a server may answer so to the new number too
                self.chat_id, self._migrated = str(new), True
                warnings.warn(f"Telegram: the group has a new number, set TELEGRAM_CHAT_ID to {new}", stacklevel=4)
                continue
            wait = max(pause, parameters.get("retry_after", 0))
            if (status not in (None, 429) and status < 500) or time.monotonic() + wait > until:
                hint = "; is TELEGRAM_BOT_TOKEN right?" if status in (401, 404) else ""
                description = redacted(reply.get("description", "").replace(self._token.reveal(), "…"))
                raise TelegramError(f"{status or ''} {description[:200]}{hint}".strip(), status)
            time.sleep(wait)
            pause *= 2
        return reply.get("result")

    def _attempt(self, method: str, png: bytes | None, fields: dict, seconds: float) -> dict:
        """The Bot API's reply to one request; other problems take the same form, as httpx's errors hold the URL."""
        replies = queue.SimpleQueue()

        def post():
            reply = {"description": "no connection"}
            try:
                url = f"{self.base_url}/bot{self._token.reveal()}/{method}"
                data, files = {"chat_id": self.chat_id, **fields}, {"photo": ("picture.png", png)} if png else None
                response = httpx.post(url, data=data, files=files, timeout=self.timeout, trust_env=False)
                reply = {"description": "not an answer of the Bot API", "error_code": response.status_code}
                reply |= response.json()
            except Exception as error:
                reply["description"] += f" ({type(error).__name__})"
            replies.put(reply)

        # in a thread that may be left behind, as httpx's timeout ends neither a name look-up nor a dripping answer
        threading.Thread(target=post, name=_THREAD, daemon=True).start()
        try:
            return replies.get(timeout=max(seconds, 0.001))
        except queue.Empty:
            return {"description": f"no answer within {self.deadline:g} seconds"}


class _Messenger(Harmless):
    """What the messages of a training and of an experiment share: the chat of their `config`."""

    service = "Telegram"

    @cached_property
    def notifier(self) -> TelegramNotifier:
        return TelegramNotifier(self.config.telegram_bot_token, self.config.telegram_chat_id)

    def check_credentials(self):
        """Raise TelegramError for malformed ones; meanwhile a thread asks whether Telegram knows the token."""

        def ask(notifier: TelegramNotifier):
            try:
                notifier.check()
            except TelegramError as error:
                if error.status in (401, 404):  # with other problems, the messages may get through later
                    self.fail(error)

        threading.Thread(target=ask, args=(self.notifier,), name="telegram check", daemon=True).start()

    def send(self, title: str, outcome: str, lines: list[str], table: pd.DataFrame | None = None):
        """Send a text, and the learning curves in a table."""
        info = self.config.telegram_additional_info
        text = "\n".join([f"{title}: {outcome}", *([info] if info else []), *lines])
        png = None if table is None or table.empty else learning_curves(table, title)
        self.notifier.send_report(redacted(text), png)

    def send_run(self, title: str, name: str, result: dict, rows: list[dict]):
        """Send what came of a training."""
        lines = [line.format(**result) for key, line in _RUN_LINES.items() if key in result]
        self.send(title, "training finished", [f"run: {name}", *lines], pd.DataFrame(rows))


class TelegramCallback(_Messenger, ServiceCallback):
    """Sends a training's result and learning curves when it ends; if it fails, where and why."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.config, self._training = trainer.config, False
        self._title = f"{type(trainer.model).__name__} on {trainer.data.name}"

    @harmless
    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True
        self.check_credentials()

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        result, rows = self.test_result(), history(state.log_history)  # the best weights are loaded by now
        if rows:
            best = best_row(rows, self.config.early_stopping_metric)
            result |= best | {"best_epoch": best["epoch"], "epochs": len(rows), "seconds": rows[-1]["seconds"]}
        self.send_run(self._title, self.trainer.run_name, result, rows)

    @harmless
    def on_train_failed(self, error: BaseException):
        if self._training:  # or somebody interrupted the sending
            epochs = f"after {self.trainer.state.epoch or 0:.1f} of {self.config.num_epochs} epochs"
            lines = [f"run: {self.trainer.run_name}", epochs, _line(error)]
            self.send(self._title, f"training {_outcome(error)}", lines)


class ExperimentMessages(_Messenger):
    """Sends what became of an experiment, and with `telegram_every_run` of each run; a context manager around it.

    The runs themselves send nothing, so that worker processes need no credentials. `experiment` has `config`, `data`,
    `models`, `seeds`; by (model, seed) its `runs` (with `path`, `result`, `history`) and `failures` (texts);
    `values(model)`, the test accuracies by seed; and `histories()`, one table. If nothing was trained and nothing
    failed, nothing is sent.
    """

    def __init__(self, experiment):
        self.experiment, self.config = experiment, experiment.config
        self._pending, self._sent, self._began = set(), set(), time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error or self._pending or self.experiment.failures:
            self._ended(error)

    @harmless
    def begin(self, pending):
        """Note the runs, as (model, seed), that are going to be trained."""
        self._pending = set(pending)
        self.check_credentials()

    @harmless
    def run_ended(self, key: tuple[str, int]):
        """A run is finished or failed: send that, if the config asks for it."""
        if not self.config.telegram_every_run or key in self._sent:
            return
        self._sent.add(key)
        title = f"{key[0]} on {self.experiment.data.name}, seed {key[1]}"
        if run := self.experiment.runs.get(key):
            self.send_run(title, run.path.name, run.result, run.history)
        else:
            self.send(title, "training failed", [self.experiment.failures[key]])

    @harmless
    def _ended(self, error: BaseException | None):
        result, done = self.experiment, len(self.experiment.runs)
        loaded, failed = len(result.runs.keys() - self._pending), len(result.failures)
        left = len(result.models) * len(result.seeds) - done - failed
        lines = [
            f"runs: {done - loaded} trained, {loaded} loaded, {failed} failed, {left} unfinished",
            f"duration: {timedelta(seconds=round(time.monotonic() - self._began))}",
            *([_line(error), "Started again, it resumes where it stopped."] if error else []),
        ]
        for name, values in ((name, result.values(name).values()) for name in result.models):
            lines += [f"{name}: test accuracy {sum(values) / len(values):.2%} (n = {len(values)})"] if values else []
        lines += [f"failed: {name}, seed {seed}: {line}" for (name, seed), line in result.failures.items()]
        self.send(f"Experiment on {result.data.name}", _outcome(error), lines, result.histories())


def learning_curves(table: pd.DataFrame, title: str) -> bytes:
    """Loss and accuracy by epoch as a PNG; of several models (a column "model"), validation, averaged over seeds."""
    png, figure = io.BytesIO(), Figure(figsize=(9, 3.6), layout="constrained")  # no pyplot, so no notebook shows it
    for axis, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        if "model" in table:
            curves = table.pivot_table(f"val_{metric}", "epoch", "model", sort=False).add_prefix("validation, ")
        else:
            curves = table.set_index("epoch")[[f"train_{metric}", f"val_{metric}"]]
        curves.plot(ax=axis, style=".-", colormap="cividis", logy=metric == "loss", ylabel=metric)
    figure.suptitle(title)
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _outcome(error: BaseException | None) -> str:
    return "finished" if error is None else "failed" if isinstance(error, Exception) else "interrupted"


def _line(error: BaseException) -> str:
    """An error's type and the first line of its text; further lines may be a traceback."""
    return ": ".join([type(error).__name__, *redacted(str(error)).splitlines()[:1]])[:500]


def _cut(text: str, limit: int) -> str:
    """A text of at most so many UTF-16 units, in which Telegram counts."""
    units = text.encode("utf-16-le", "replace")
    kept = units if len(units) <= 2 * limit else units[: 2 * limit - 2] + "…".encode("utf-16-le")
    return kept.decode("utf-16-le", "ignore")


def _credential(name: str) -> str:
    """From the environment, or from Colab's secrets."""
    text = os.environ.get(name, "")
    with contextlib.suppress(Exception):  # this is not Colab, or there is no such secret
        from google.colab import userdata

        text = text or userdata.get(name)
    return text
