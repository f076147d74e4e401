"""A bot's token is used, and stands nowhere: in no file, log, warning, print-out or exception."""

import contextlib
import dataclasses
import json
import logging
import pprint
import tempfile
import traceback
import warnings
from functools import partial
from unittest.mock import Mock

import pytest
from bot_api import closed_port, error, hang, reply, reset
from IPython.lib.pretty import pretty
from scripted import At

from lablib import MLP, TrainingConfig, experiment, train_or_load
from lablib.telegram import TelegramNotifier

SECRET = "AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
TOKEN = f"123456789:{SECRET}"
# More of it than its last four characters, in whatever form: six in a row.
PIECES = [SECRET[start : start + 6] for start in range(len(SECRET) - 5)]

KNOBS = {"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu"}
KNOBS |= {"use_telegram_notifications": True}

tiny_mlp = partial(MLP, (4,), image_shape=(1, 6, 6), num_classes=3)


@pytest.fixture(autouse=True)
def _quick_and_alone(api, monkeypatch, tmp_path):
    """Short waits, and every file below tmp_path."""
    monkeypatch.setattr(TelegramNotifier, "timeout", 0.2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def leaks(text: str | bytes) -> bool:
    """Whether a text or a file's content has a piece of the token, in one or two bytes a character."""
    content = text.encode() if isinstance(text, str) else text
    return any(piece.encode(code) in content for piece in PIECES for code in ("ascii", "utf-16-le"))


def shown(problem: BaseException | None) -> str:
    """All that an exception, its causes and its contexts say or keep, even if the traceback leaves a context out."""
    if problem is None:
        return ""
    kept = [str(problem), repr(problem), repr(problem.args), repr(vars(problem))]
    for value in vars(problem).values():  # such as the request of an httpx error
        with contextlib.suppress(TypeError):
            kept.append(repr({name: str(part) for name, part in vars(value).items()}))
    lines = traceback.format_exception(problem)
    return "\n".join([*kept, *lines, shown(problem.__cause__), shown(problem.__context__)])


@pytest.fixture
def trace(capfd, tmp_path, monkeypatch):
    """A function that says which places of all that was printed, logged, warned of and written show the token."""
    logged = []

    def keep(logger: logging.Logger, record: logging.LogRecord):
        problem = shown(record.exc_info[1]) if record.exc_info else ""
        logged.append("\n".join([record.getMessage(), repr(record.args), repr(vars(record)), problem]))

    def places() -> list[str]:
        out, err = capfd.readouterr()
        texts = {"stdout": out, "stderr": err, "logs": "\n".join(logged)}
        texts["warnings"] = "\n".join(f"{w.message} {w.message.args} {shown(w.message)} {w.source}" for w in warned)
        contents = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        return [place for place, content in {**texts, **contents}.items() if leaks(content)]

    # every logger says all that it has to say, whatever its level
    monkeypatch.setattr(logging.Logger, "isEnabledFor", lambda *logger_and_level: True)
    monkeypatch.setattr(logging.Logger, "callHandlers", keep)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        places.logged, places.warned = logged, warned
        yield places


AT = f"/bot{TOKEN}/sendMessage"
FAULTS = {  # what Telegram answers, and what the error says
    "400": (error(400, f"Bad Request: {AT}"), "Bad Request: /bot…/sendMessage; check TELEGRAM_BOT_TOKEN"),
    "401": (error(401, f"Unauthorized: {TOKEN}"), "Unauthorized: …; check TELEGRAM_BOT_TOKEN"),
    "429": (error(429, f"Too Many Requests {AT}"), "Too Many Requests /bot…/sendMessage"),
    "500": (error(500, f"Internal, at {AT}"), "Internal, at /bot…/sendMessage"),
    "no JSON": (reply(200, f"<html>{AT}</html>".encode()), "no answer"),
    "reset": (reset, "no answer"),
    "hang": (hang, "no answer"),
    "refused": (None, "no answer"),
}


@pytest.mark.parametrize("fault", ["all well", "400", "401", "refused", "training fails"])
def test_a_training_leaves_no_trace_of_the_token(fault, api, tiny_data, tmp_path, trace, monkeypatch):
    fails = fault == "training fails"
    problem = ArithmeticError(f"no GET https://api.telegram.org/bot{TOKEN}/getMe") if fails else None
    if fault == "refused":
        monkeypatch.setattr(TelegramNotifier, "base_url", closed_port())
    api.script = [FAULTS[fault][0]] * 99 if fault in ("400", "401") else []
    config = TrainingConfig(**KNOBS, output_dir=tmp_path / "runs", telegram_bot_token=TOKEN, telegram_chat_id=42)
    print(config)
    with contextlib.suppress(ArithmeticError):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(At(6, Mock(name=TOKEN, side_effect=problem)),))
    assert fault == "refused" or {request.token for request in api.requests} == {TOKEN}  # it was used
    assert not any(leaks(request.body) for request in api.requests)  # not even the chat sees it
    reasons = [str(warning.message) for warning in trace.warned if "Telegram: " in str(warning.message)]
    assert len(reasons) == (fault in ("400", "401", "refused")), reasons
    assert len(trace.logged) > 10
    assert len(list(tmp_path.glob("runs/*/checkpoints/*.pt" if fails else "runs/*/result.json"))) == 1
    assert trace() == []


def test_the_search_finds_a_token_in_each_place(tmp_path, trace):
    print(TOKEN[:-4])
    logging.getLogger("httpcore.http11").debug("to %s", TOKEN[9:-4])
    warnings.warn(f"about {TOKEN[12:20]}", stacklevel=1)
    (tmp_path / "wide.txt").write_text(TOKEN, encoding="utf-16-le")
    (tmp_path / "last four.txt").write_text(TOKEN[-4:])
    assert sorted(trace()) == sorted(["stdout", "logs", "warnings", str(tmp_path / "wide.txt")])


@pytest.mark.parametrize(("answer", "problem"), FAULTS.values(), ids=FAULTS)
def test_an_error_says_what_is_wrong_and_has_the_token_nowhere(answer, problem, api, trace, monkeypatch):
    api.script = [answer] * 99
    if not answer:
        monkeypatch.setattr(TelegramNotifier, "base_url", closed_port())
    with pytest.raises((RuntimeError, ConnectionError), match=f"^{problem}") as caught:
        TelegramNotifier(TOKEN, 42).send_message("text")
    assert not leaks(shown(caught.value))
    assert caught.value.__context__ is None  # and no error of httpx, which holds the URL
    assert not any(leaks(repr(frame.frame.f_locals)) for frame in caught.traceback if "lablib" in str(frame.path))
    assert trace() == []


@pytest.mark.parametrize("knobs", [{"telegram_bot_token": TOKEN.encode()}, {"telegram_chat_id": TOKEN}, {"no": "such"}])
def test_a_config_that_is_refused_does_not_show_the_token(knobs):
    with pytest.raises(ValueError, match="TrainingConfig: ") as caught:
        TrainingConfig(**{"telegram_bot_token": TOKEN} | knobs)
    assert not leaks(shown(caught.value))


THINGS = {
    "config": lambda: TrainingConfig(telegram_bot_token=TOKEN, telegram_chat_id=42),
    "training arguments": lambda: TrainingConfig(telegram_bot_token=TOKEN).to_training_arguments("out"),
    "identity": lambda: TrainingConfig(telegram_bot_token=TOKEN, telegram_chat_id=42).__identity__(),
    "notifier": lambda: TelegramNotifier(TOKEN, 42),
}


@pytest.mark.parametrize("thing", THINGS)
def test_no_view_of_what_holds_the_token_shows_it(thing):
    it = THINGS[thing]()
    fields = dataclasses.asdict(it) if dataclasses.is_dataclass(it) else getattr(it, "__dict__", {})
    seen = [repr(it), f"{it} {it!s:>20}", pprint.pformat(it), repr(fields), json.dumps(fields, default=str), pretty(it)]
    assert [text for text in seen if leaks(text)] == []


def test_an_experiment_leaves_no_trace_of_the_token(api, tiny_data, tmp_path, trace, monkeypatch):
    class Broken(MLP):
        def forward(self, images):
            raise ValueError(f"no model from https://api.telegram.org/bot{TOKEN}/getFile")

    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)
    monkeypatch.setenv("TELEGRAM_CHAT_ID", "42")
    config = TrainingConfig(**KNOBS, output_dir=tmp_path / "runs")
    print(experiment({"tiny": tiny_mlp, "broken": lambda: Broken((4,), **tiny_mlp.keywords)}, config, tiny_data, [0]))
    assert "failed: broken, seed 0: SanityCheckError: " in api.requests[-1].text
    assert not any(leaks(request.body) for request in api.requests)
    (failed,) = trace.warned
    assert "the run of 'broken' with seed 0 failed" in str(failed.message)
    assert trace() == []
