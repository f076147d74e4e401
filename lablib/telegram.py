"""Messages to a Telegram chat when a run or an experiment ends or fails."""

import contextlib
import logging
import os
import re
import threading
import time
from datetime import timedelta
from functools import cached_property

import httpx
from pydantic import SecretStr
from transformers import TrainerCallback

from lablib.config import one_line, redacted, warn
from lablib.tracking import Harmless, final_result, harmless

_WHERE = "in the environment or in Colab's secrets"

for _name in ("httpx", "httpcore.connection", "httpcore.http11"):  # they log the URL, and the token is part of it
    logging.getLogger(_name).addFilter(lambda record: "/bot" not in record.getMessage())


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

    base_url = "https://api.telegram.org"
    timeout = 10.0  # seconds for one attempt
    deadline = 30.0  # seconds for a request with all its attempts
    pause = 1.0  # seconds before the second attempt; doubled for each further one

    def __init__(self, bot_token: str | SecretStr | None = None, chat_id: str | int | None = None):
        token = bot_token.get_secret_value() if isinstance(bot_token, SecretStr) else bot_token
        token = str(token or _credential("TELEGRAM_BOT_TOKEN")).strip()
        self.chat_id = str(chat_id or _credential("TELEGRAM_CHAT_ID")).strip()
        if not re.fullmatch(r"\d+:[\w-]+", token, re.ASCII):
            raise TelegramError(f"set TELEGRAM_BOT_TOKEN to your bot's token, such as 123456:AAq7…, {_WHERE}")
        if not re.fullmatch(r"-?\d+|@\w+", self.chat_id):
            raise TelegramError(f"set TELEGRAM_CHAT_ID to a chat's number or @name {_WHERE}")
        self._token = SecretStr(token)

    def check(self) -> str:
        """Ask Telegram whose token this is; the answer names the bot."""
        bot = self._call("getMe")
        return redacted(f"The token belongs to {bot.get('first_name')} (@{bot.get('username')}).")

    def send_message(self, text: str) -> None:
        """Send plain text, cut off after 4000 characters; Telegram refuses more than 4096 and counts emoji twice."""
        self._call("sendMessage", text=text if len(text) <= 4000 else f"{text[:4000]}…")

    def _call(self, method: str, **fields: str) -> dict:
        """The result of one of the Bot API's methods; temporary failures are retried."""
        until, pause = time.monotonic() + self.deadline, self.pause
        while not (reply := self._attempt(method, fields, until - time.monotonic())).get("ok"):
            status, parameters = reply.get("error_code"), reply.get("parameters") or {}
            if (new := str(parameters.get("migrate_to_chat_id", self.chat_id))) != self.chat_id:
                warn(f"Telegram: the group has a new chat ID; set TELEGRAM_CHAT_ID to {new}")
                self.chat_id = new
                continue
            wait = max(pause, parameters.get("retry_after", 0))
            temporary = status in (None, 429) or status >= 500
            if not temporary or time.monotonic() + wait > until:
                hint = "; is TELEGRAM_BOT_TOKEN right?" if status in (401, 404) else ""
                said = redacted(reply["description"].replace(self._token.get_secret_value(), "…"))[:200]
                raise TelegramError(f"{status or ''} {said}{hint}".strip(), status)
            time.sleep(wait)
            pause *= 2
        return reply["result"]

    def _attempt(self, method: str, fields: dict[str, str], seconds: float) -> dict:
        """The Bot API's reply to one request, or a failure in the same form: httpx's errors would show the URL."""
        url = f"{self.base_url}/bot{self._token.get_secret_value()}/{method}"
        content, timeout = {"chat_id": self.chat_id, **fields}, min(self.timeout, max(seconds, 0.01))
        reply = {"description": "no connection"}
        try:
            response = httpx.post(url, data=content, timeout=timeout, trust_env=False)
            reply = {"description": "not a Bot API response", "error_code": response.status_code}
            return reply | response.json()
        except Exception as error:
            return reply | {"description": f"{reply['description']} ({type(error).__name__})"}


class _Messenger(Harmless):
    """What messages about a training and about an experiment have in common: the chat in their `config`."""

    service = "Telegram"

    @cached_property
    def notifier(self) -> TelegramNotifier:
        return TelegramNotifier(self.config.telegram_bot_token, self.config.telegram_chat_id)

    @harmless
    def check_credentials(self) -> None:
        """Say if they are missing or malformed; a thread finds out whether Telegram accepts the token."""
        threading.Thread(target=self._ask, args=(self.notifier,), name="telegram check", daemon=True).start()

    def _ask(self, notifier: TelegramNotifier):
        try:
            notifier.check()
        except TelegramError as error:
            if error.status in (401, 404):  # after any other problem, the messages may still get through
                self.fail(error)

    def send(self, what: str, error: BaseException | None, lines: list[str]) -> None:
        """Send the outcome of a run or an experiment, followed by details."""
        outcome = "finished" if error is None else "failed" if isinstance(error, Exception) else "interrupted"
        lines = [f"{what} {outcome}", self.config.telegram_additional_info, *lines]
        self.notifier.send_message(redacted("\n".join(filter(None, lines))))


class TelegramCallback(_Messenger, TrainerCallback):
    """Sends a run's result when it ends; if it fails, where and why."""

    def __init__(self, trainer):
        self.trainer, self.config, self.broken = trainer, trainer.config, not trainer.is_world_process_zero()
        self._what = f"{type(trainer.model).__name__} on {trainer.data.name}: training"
        self._run = f"run: {trainer.run_name}"

    def on_train_begin(self, args, state, control, **kwargs):
        self.check_credentials()

    @harmless
    def on_train_end(self, args, state, control, **kwargs):
        result = final_result(self.trainer).items()
        lines = [f"{k.replace('_', ' ')}: {v:{'.2%' if 'accuracy' in k else '.6g'}}" for k, v in result]
        self.send(self._what, None, [self._run, *lines])

    @harmless
    def on_train_failed(self, error: BaseException):
        epochs = f"after {self.trainer.state.epoch or 0:.1f} of {self.config.num_epochs} epochs"
        self.send(self._what, error, [self._run, epochs, one_line(error)])


class ExperimentMessages(_Messenger):
    """Sends the outcome of an experiment, as a context manager around its training.

    The runs themselves send nothing, so worker processes need no credentials.
    """

    def __init__(self, experiment):
        self.experiment, self.config = experiment, experiment.config
        self._loaded, self._began = len(experiment.runs), time.monotonic()

    __enter__ = _Messenger.check_credentials

    @harmless
    def __exit__(self, kind, error, trace):
        result = self.experiment
        total = len(result.models) * len(result.seeds)
        lines = [
            f"runs: {len(result.runs)} of {total} finished ({self._loaded} loaded), {len(result.failures)} failed",
            f"duration: {timedelta(seconds=round(time.monotonic() - self._began))}",
        ]
        if error:
            lines += [one_line(error), "Run it again to continue where it stopped."]
        for name in result.models:
            if values := result.values(name).values():
                lines.append(f"{name}: test accuracy {sum(values) / len(values):.2%} (n = {len(values)})")
        lines += [f"failed: {name}, seed {seed}: {line}" for (name, seed), line in result.failures.items()]
        self.send(f"Experiment on {result.data.name}:", error, lines)


def _credential(name: str) -> str:
    """From the environment, or from Colab's secrets."""
    if text := os.environ.get(name):
        return text
    with contextlib.suppress(Exception):  # this is not Colab, or there is no such secret
        from google.colab import userdata

        return userdata.get(name)
    return ""
