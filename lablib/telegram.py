"""Messages to a Telegram chat when a run or an experiment ends or fails."""

import json
import logging
import os
import re
import threading
import time
from contextlib import AbstractContextManager, suppress

import httpx
from pydantic import SecretStr
from transformers import TrainerCallback

from lablib.config import one_line, redacted, warn
from lablib.tracking import final_result, harmless

for _name in ("httpx", "httpcore.connection", "httpcore.http11"):  # they log the URL, which contains the token
    logging.getLogger(_name).addFilter(lambda record: "/bot" not in record.getMessage())


class TelegramNotifier:
    """Sends a bot's messages to a chat, by default those in TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID.

    Raises RuntimeError if either is wrong, and ConnectionError if Telegram gives no useful answer.
    """

    base_url = "https://api.telegram.org"
    timeout = 8.0  # seconds for each of three attempts
    pause = 2.0  # seconds before the second attempt; twice as long before the third

    def __init__(self, bot_token: str | SecretStr | None = None, chat_id: str | int | None = None):
        token = bot_token.get_secret_value() if isinstance(bot_token, SecretStr) else bot_token
        token = (token or os.environ.get("TELEGRAM_BOT_TOKEN", "")).strip()
        self.chat_id = str(chat_id or os.environ.get("TELEGRAM_CHAT_ID", "")).strip()
        if not (re.fullmatch(r"\d+:[\w-]{30,}", token, re.ASCII) and self.chat_id):  # `redacted` removes such a token
            raise RuntimeError("set TELEGRAM_BOT_TOKEN to a token such as 123456789:AAq7… and TELEGRAM_CHAT_ID")
        self._url = SecretStr(f"{self.base_url}/bot{token}/")

    def check(self) -> str:
        """Ask Telegram which bot the token belongs to, and return its name in a sentence."""
        bot = self._call("getMe")
        return f"The token belongs to {bot['first_name']} (@{bot['username']})."

    def send_message(self, text: str) -> None:
        """Send plain text, cut to 4000 characters: Telegram refuses more than 4096, and counts emoji twice."""
        self._call("sendMessage", text=text[:4000])

    def _call(self, method: str, **fields: str) -> dict:
        options = {"data": {"chat_id": self.chat_id, **fields}, "timeout": self.timeout, "trust_env": False}
        for attempt in range(3):  # retry what may succeed later
            time.sleep(attempt * self.pause)
            try:
                reply = json.loads(redacted(httpx.post(self._url.get_secret_value() + method, **options).text))
            except Exception as error:  # its text would show the URL
                reply = {"description": f"no answer ({type(error).__name__})"}
            if reply.get("ok"):
                return reply["result"]
            if new := reply.get("parameters", {}).get("migrate_to_chat_id"):
                warn(f"Telegram: the group has a new chat ID; set TELEGRAM_CHAT_ID to {new}")
                options["data"]["chat_id"] = self.chat_id = str(new)
            elif reply.get("error_code") in (400, 401, 403, 404):
                raise RuntimeError(f"{reply['description']}; check TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID")
        raise ConnectionError(reply["description"])


class _Messages:
    """Sends the outcome of a run or an experiment. At the start, a thread checks that Telegram accepts the token."""

    service, broken = "Telegram", False

    @harmless
    def __init__(self, subject, name: str = "Experiment"):
        self.subject, self.name = subject, f"{name} on {subject.data.name}"
        self.notifier = TelegramNotifier(subject.config.telegram_bot_token, subject.config.telegram_chat_id)
        threading.Thread(target=self._check, name="telegram check", daemon=True).start()

    @harmless
    def _check(self):
        with suppress(ConnectionError):  # the message at the end may still get through
            self.notifier.check()

    def send(self, error: BaseException | None, lines: list[str]) -> None:
        outcome = f"failed with {one_line(error)}" if error else "finished"
        lines = [f"{self.name}: {outcome}", self.subject.config.telegram_additional_info, *lines]
        self.notifier.send_message(redacted("\n".join(filter(None, lines))))


class TelegramCallback(_Messages, TrainerCallback):
    """Sends a run's result when it ends or, if it fails, the error and the epoch."""

    def __init__(self, trainer):
        self.broken = not trainer.is_world_process_zero()
        super().__init__(trainer, trainer.run_name)

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        self.send(None, [f"{name}: {value:.6g}" for name, value in final_result(self.subject).items()])

    @harmless
    def on_train_failed(self, error: BaseException):
        self.send(error, [f"after {self.subject.state.epoch or 0:.1f} of {self.subject.config.num_epochs} epochs"])


class ExperimentMessages(_Messages, AbstractContextManager):
    """A context manager around an experiment's training that sends its outcome; the runs send nothing."""

    @harmless
    def __exit__(self, kind, error, trace):
        result, total = self.subject, len(self.subject.models) * len(self.subject.seeds)
        lines = [f"runs: {len(result.runs)} of {total} finished, {len(result.failures)} failed"]
        found = {name: result.values(name).values() for name in result.models}
        lines += [f"{name}: test accuracy {sum(v) / len(v):.2%} (n = {len(v)})" for name, v in found.items() if v]
        lines += [f"failed: {name}, seed {seed}: {line}" for (name, seed), line in result.failures.items()]
        self.send(error, lines)
