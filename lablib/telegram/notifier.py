"""The HTTP side: a synchronous client of Telegram's Bot API that shows its token to nobody else."""

import functools
import logging
import math
import os
import queue
import ssl
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httpx

from lablib.secret import Secret, looks_like_a_token, redacted

MESSAGE_LENGTH, CAPTION_LENGTH = 4096, 1024  # what Telegram takes, in UTF-16 units
_CUT = "\n… (cut)"
_HINTS = {
    400: "is TELEGRAM_CHAT_ID right?",
    401: "is TELEGRAM_BOT_TOKEN right?",
    403: "a bot may write to those only who wrote to it first",
    404: "is TELEGRAM_BOT_TOKEN right?",
}


class TelegramError(RuntimeError):
    """A message was not taken, or cannot be sent; `status` is the answer's HTTP status if there was an answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class TelegramNotifier:
    """Sends messages of a bot to a chat.

    What is not given comes from TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in the environment, else from Colab's secrets.
    Limits (429), faults of the server and of the connection are waited out; no call takes more than `deadline` seconds.
    Raises TelegramError if the token or the chat is missing, and if a message is not taken.
    """

    deadline = 60.0  # seconds for a call with all its attempts
    pause = 1.0  # seconds before the second attempt, twice as long before each further one

    def __init__(
        self,
        bot_token: str | Secret | None = None,
        chat_id: str | int | None = None,
        base_url: str = "https://api.telegram.org",
        timeout: float = 10,
    ):
        given = bot_token.reveal() if isinstance(bot_token, Secret) else bot_token
        token = (given or _found("TELEGRAM_BOT_TOKEN") or "").strip()
        chat = str(chat_id or _found("TELEGRAM_CHAT_ID") or "").strip()
        missing = [name for name, text in (("TELEGRAM_BOT_TOKEN", token), ("TELEGRAM_CHAT_ID", chat)) if not text]
        if missing:
            both = " and ".join(missing)
            raise TelegramError(f"set {both} in the environment, or as secrets of that name in Colab")
        if not all(sign.isascii() and (sign.isalnum() or sign in ":_-") for sign in token):
            raise TelegramError("TELEGRAM_BOT_TOKEN holds signs that no bot's token has; copy it anew from @BotFather")
        if looks_like_a_token(chat):
            raise TelegramError("TELEGRAM_CHAT_ID looks like a bot's token; it is the number of a chat")
        if not base_url.startswith(("https://", "http://")):
            raise TelegramError("base_url must begin with https:// or http://")
        self._token, self.chat_id = Secret(token), chat
        self.base_url, self.timeout = base_url.rstrip("/"), timeout

    def __repr__(self) -> str:
        return f"TelegramNotifier(bot_token={self._token!r}, chat_id={self.chat_id!r})"

    def check(self) -> str:
        """Ask Telegram whose the token is; the answer names the bot."""
        bot = self._call("getMe", time.monotonic() + self.deadline)
        name, username = (self._clean(str(bot.get(key, "?"))) for key in ("first_name", "username"))
        return f"The token is that of {name} (@{username})."

    def send_message(self, text: str) -> None:
        """Send plain text; what is beyond 4096 characters is cut, with a mark."""
        self._send_message(text, time.monotonic() + self.deadline)

    def send_photo(self, png: bytes, caption: str = "") -> None:
        """Send a picture; what is beyond 1024 characters of the caption is cut, with a mark."""
        self._send_photo(png, caption, time.monotonic() + self.deadline)

    def send_report(self, text: str, png: bytes | None = None) -> None:
        """Send text with a picture, as one message where it fits; a chat that takes no pictures gets the text."""
        until = time.monotonic() + self.deadline
        if png is None or _length(text) > CAPTION_LENGTH:
            self._send_message(text, until)
            if png is not None:
                self._send_photo(png, "", until)
            return
        refused = False
        try:
            self._send_photo(png, text, until)
        except TelegramError as error:
            if error.status != HTTPStatus.BAD_REQUEST:
                raise
            refused = True
        if refused:
            self._send_message(text, until)

    def _send_message(self, text: str, until: float) -> None:
        self._call("sendMessage", until, {"text": _cut(self._clean(text), MESSAGE_LENGTH)})

    def _send_photo(self, png: bytes, caption: str, until: float) -> None:
        fields = {"caption": _cut(self._clean(caption), CAPTION_LENGTH)}
        self._call("sendPhoto", until, fields, {"photo": ("picture.png", png, "image/png")})

    def _call(self, method: str, until: float, fields: dict | None = None, files: dict | None = None) -> dict[str, Any]:
        """What the Bot API answers to one of its methods, asked again while there is hope and time."""
        self._reveal()
        if fields is not None:
            fields = {"chat_id": self.chat_id, **fields}
        pause, problem = self.pause, f"no answer within {self.deadline:g} seconds"
        while not (answer := self._attempt(method, until, fields, files)).ok:
            problem = answer.problem or problem
            wait = max(pause, answer.retry_after)
            if not answer.again or time.monotonic() + wait >= until:
                raise TelegramError(problem, answer.status)
            time.sleep(wait)
            pause *= 2
        return answer.result

    def _attempt(self, method: str, until: float, fields: dict | None, files: dict | None) -> "_Answer":
        """One request, in a thread that is left behind at the deadline: neither a name server nor drops end it."""
        seconds = max(until - time.monotonic(), 0.001)
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()

        def exchange():
            _quiet.here = True
            answers.put(self._exchange(method, min(self.timeout, seconds), fields, files))

        for name in list(logging.root.manager.loggerDict):
            if name.split(".")[0] in ("httpx", "httpcore"):
                logging.getLogger(name).addFilter(_not_of_an_exchange)  # their records hold the URL, so the token
        threading.Thread(target=exchange, name="telegram", daemon=True).start()
        try:
            return answers.get(timeout=seconds)
        except queue.Empty:
            return _Answer()

    def _exchange(self, method: str, timeout: float, fields: dict | None, files: dict | None) -> "_Answer":
        # No error leaves this method as an exception: one from httpx knows the URL, and would be another's context.
        url = f"{self.base_url}/bot{self._reveal()}/{method}"
        try:
            with httpx.Client(verify=_tls(), timeout=timeout, follow_redirects=False, trust_env=False) as client:
                return self._understood(client.post(url, data=fields, files=files))
        except httpx.UnsupportedProtocol as error:
            return _Answer(problem=self._clean(str(error)))
        except httpx.TransportError as error:
            return _Answer(again=True, problem=f"no connection ({type(error).__name__}: {self._clean(str(error))})")
        except Exception as error:
            return _Answer(problem=f"the request failed ({type(error).__name__})")

    def _understood(self, response: httpx.Response) -> "_Answer":
        status = response.status_code
        try:
            reply = response.json()
        except ValueError:
            reply = None
        if 300 <= status < 400:
            return _Answer(status, problem=f"a redirect ({status}), not followed as the token would go along")
        if status >= 500:
            return _Answer(status, again=True, problem=f"the server is at fault ({status})")
        if not isinstance(reply, dict):
            return _Answer(status, problem=f"the reply is not the Bot API's JSON ({status})")
        if status == HTTPStatus.OK and reply.get("ok") is True:
            result = reply.get("result")
            return _Answer(status, ok=True, result=result if isinstance(result, dict) else {})
        problem = f"{status} {self._clean(str(reply.get('description', '')))[:200]}"
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            return _Answer(status, again=True, retry_after=_retry_after(reply), problem=problem)
        return _Answer(status, problem="; ".join(filter(None, [problem, _HINTS.get(status)])))

    def _clean(self, text: str) -> str:
        return redacted(text.replace(self._reveal(), "…"))

    def _reveal(self) -> str:
        if not (token := self._token.reveal()):
            raise TelegramError(
                "the bot's token stayed in the process that was told it; "
                "set TELEGRAM_BOT_TOKEN in this one's environment"
            )
        return token


@dataclass(frozen=True)
class _Answer:
    """What came of one request, nothing by default; `again` if another attempt may fare better."""

    status: int | None = None
    ok: bool = False
    again: bool = False
    result: dict[str, Any] | None = None
    retry_after: float = 0.0  # seconds
    problem: str = ""


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)  # reading the certificates takes longer than a short exchange


_quiet = threading.local()


def _not_of_an_exchange(record: logging.LogRecord) -> bool:
    return not getattr(_quiet, "here", False)


def _found(name: str) -> str | None:
    """A credential from the environment or from Colab's secrets."""
    if text := os.environ.get(name):
        return text
    try:
        from google.colab import userdata

        return userdata.get(name)
    except Exception:  # there is no Colab, no such secret, or this notebook may not see it
        return None


def _retry_after(reply: dict[str, Any]) -> float:
    parameters = reply.get("parameters")
    seconds = parameters.get("retry_after") if isinstance(parameters, dict) else None
    known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and math.isfinite(seconds)
    return max(float(seconds), 0.0) if known else 0.0


def _length(text: str) -> int:
    return len(text.encode("utf-16-le", "replace")) // 2


def _cut(text: str, limit: int) -> str:
    """A text of at most so many UTF-16 units, with a mark where it was cut; what no text can hold becomes "?"."""
    units = text.encode("utf-16-le", "replace")
    if len(units) <= 2 * limit:
        return units.decode("utf-16-le")
    return units[: 2 * (limit - len(_CUT))].decode("utf-16-le", "ignore") + _CUT
