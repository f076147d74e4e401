"""A text that no print-out, log or pickle gives away; and texts without what looks like a bot's token."""

import re

_TOKEN = re.compile(r"\d+(?::|%3[Aa])[\w-]{30,}")


class Secret:
    """Holds a text such as a bot's token; whatever shows it shows its last four characters at most.

    `reveal()` gives the text. A pickle or a copy in another process has none (`reveal()` is None there): a secret stays
    in the process that was told it.
    """

    __slots__ = ("_hint", "reveal")

    def __init__(self, text: str):
        self._hint = f"…{text[-4:]}" if len(text) >= 16 else "…"
        self.reveal = lambda: text

    def __repr__(self) -> str:
        return f"Secret({self._hint})"

    def __str__(self) -> str:
        return self._hint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self.reveal() == other.reveal()

    def __hash__(self) -> int:
        return hash(self.reveal())

    def __copy__(self) -> "Secret":
        return self

    def __deepcopy__(self, memo: dict) -> "Secret":
        return self

    def __reduce__(self):
        return _without_text, (self._hint,)


def _without_text(hint: str) -> Secret:
    secret = Secret("")
    secret._hint, secret.reveal = hint, _nothing
    return secret


def _nothing() -> None:
    return None


def redacted(text: str) -> str:
    """A text from elsewhere, without whatever looks like a bot's token."""
    return _TOKEN.sub("…", text)


def looks_like_a_token(text: str) -> bool:
    """Whether a text is or holds what looks like a bot's token, such as one that was given for something else."""
    return _TOKEN.search(text) is not None
