"""A bot's token is used, and stands nowhere: in no file, log, warning, print-out, pickle or exception."""

import contextlib
import dataclasses
import json
import logging
import os
import pprint
import subprocess
import sys
import tempfile
import traceback
import warnings
from functools import partial

import nbformat
import pytest
import torch
from bot_api import BotApi, closed_port, error, hang, reply, reset
from IPython.lib.pretty import pretty
from pydantic import SecretStr
from transformers import TrainerCallback

from lablib import MLP, TrainingConfig, experiment, train_or_load
from lablib.telegram import TelegramError, TelegramNotifier

SECRET = "AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
TOKEN = f"123456789:{SECRET}"
# More of it than its last four characters, in whatever form: six in a row.
PIECES = [SECRET[start : start + 6] for start in range(len(SECRET) - 5)]

KNOBS = {
    "num_epochs": 2,
    "batch_size": 8,
    "validation_split": 0.25,
    "device": "cpu",
    "use_telegram_notifications": True,
}

tiny_mlp = partial(MLP, (4,), image_shape=(1, 6, 6), num_classes=3)


@pytest.fixture(autouse=True)
def _quick_and_alone(monkeypatch, tmp_path):
    """No credentials of whoever runs the tests, short waits, and every file below tmp_path."""
    for name in ("TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(TelegramNotifier, "deadline", 0.2)
    monkeypatch.setattr(TelegramNotifier, "pause", 0.01)
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


class Keep(logging.Handler):
    """Everything that any logger is given, with its arguments and its exception."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord):
        problem = shown(record.exc_info[1]) if record.exc_info else ""
        self.texts.append("\n".join([record.getMessage(), repr(record.args), repr(vars(record)), problem]))


@contextlib.contextmanager
def everything_logged(handler: logging.Handler):
    """All loggers that there are at DEBUG, whatever they are set to, and with the handler at each."""
    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    for logger in loggers:
        logger.level, logger.disabled = logging.DEBUG, False  # setLevel clears the caches of all loggers every time
        logger.addHandler(handler)
    logging.root.manager._clear_cache()
    try:
        yield
    finally:
        for logger, level, disabled in before:
            logger.removeHandler(handler)
            logger.level, logger.disabled = level, disabled
        logging.root.manager._clear_cache()


@pytest.fixture
def trace(capfd, tmp_path):
    """A function that says how much was logged and which places of all that was said and written show the token."""
    handler, warned = Keep(), []

    def places() -> list[str]:
        out, err = capfd.readouterr()
        files = [os.path.join(folder, name) for folder, _, names in os.walk(tmp_path) for name in names]
        texts = {"stdout": out, "stderr": err, "logs": "\n".join(handler.texts)}
        texts["warnings"] = "\n".join(f"{w.message} {w.message.args} {shown(w.message)} {w.source}" for w in warned)
        contents = {path: open(path, "rb").read() for path in files}  # noqa: SIM115
        return [place for place, content in {**texts, **contents}.items() if leaks(content)]

    with everything_logged(handler), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warned = caught
        places.handler, places.warned = handler, caught
        yield places


class Fails(TrainerCallback):
    """Ends a training in its second epoch, with an error that has seen the token."""

    def __init__(self, problem: BaseException | None):
        self.problem = problem

    def __identity__(self) -> str:
        return type(self.problem).__name__

    def on_step_end(self, args, state, control, **kwargs):
        if self.problem and state.global_step == 6:
            raise self.problem


FAULTS = {
    "all well": None,
    "429 for long": error(429, f"Too Many Requests for bot{TOKEN}", parameters={"retry_after": 30}),
    "429": error(429, "Too Many Requests", parameters={"retry_after": 0.01}),
    "400": error(400, f"Bad Request: /bot{TOKEN}/sendPhoto"),
    "401": error(401, f"Unauthorized: {TOKEN}"),
    "403": error(403, "Forbidden"),
    "404": reply(404, f"no page /bot{TOKEN}/sendPhoto".encode()),
    "500": error(500, f"Internal, at /bot{TOKEN}/sendPhoto"),
    "no JSON": reply(200, f"<html>/bot{TOKEN}/sendPhoto</html>".encode()),
    "redirect": reply(302, b"", Location=f"/bot{TOKEN}/sendPhoto", X_Echo=f"/bot{TOKEN}/sendPhoto"),
    "bad redirect": reply(302, b"", Location=f"http://[/bot{TOKEN}"),
    "bad encoding": reply(200, f"/bot{TOKEN}".encode(), Content_Encoding="gzip"),
    "reset": reset,
    "hang": hang,
    "refused": "refused",
}


@pytest.mark.parametrize("ends", ["well", "with an error"])
@pytest.mark.parametrize("fault", ["all well", "400", "401", "hang", "refused"])
def test_a_training_leaves_no_trace_of_the_token_whatever_telegram_answers(
    fault, ends, tiny_data, tmp_path, trace, monkeypatch, one_picture
):
    problem = None if ends == "well" else ArithmeticError(f"no GET https://api.telegram.org/bot{TOKEN}/getMe")
    with BotApi() as api:
        url = closed_port() if fault == "refused" else api.url
        api.script = [FAULTS[fault]] * 99 if callable(FAULTS[fault]) else []
        monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, url, 10))
        config = TrainingConfig(**KNOBS, output_dir=tmp_path / "runs", telegram_bot_token=TOKEN, telegram_chat_id=42)
        print(config)
        with contextlib.suppress(ArithmeticError) if problem else contextlib.nullcontext():
            train_or_load(tiny_mlp, config, tiny_data, callbacks=(Fails(problem),))
        assert fault == "refused" or {request.token for request in api.requests} == {TOKEN}  # it was used
        assert not any(leaks(request.body) for request in api.requests)  # not even the chat sees it
    reasons = [str(warning.message) for warning in trace.warned if "Telegram: " in str(warning.message)]
    assert len(reasons) == (fault != "all well"), reasons
    assert len(trace.handler.texts) > 10
    assert len(list(tmp_path.glob("runs/*/checkpoints/*/training_args.bin" if problem else "runs/*/result.json"))) == 1
    assert trace() == []


def test_the_search_finds_a_token_in_each_place(tmp_path, trace):
    print(TOKEN[:-4])
    logging.getLogger("httpcore.http11").debug("to %s", TOKEN[9:-4])
    warnings.warn(f"about {TOKEN[12:20]}", stacklevel=1)
    torch.save({"arguments": {"token": TOKEN}}, tmp_path / "training_args.bin")
    (tmp_path / "wide.txt").write_text(TOKEN, encoding="utf-16-le")
    (tmp_path / "last four.txt").write_text(TOKEN[-4:])
    files = [str(tmp_path / name) for name in ("training_args.bin", "wide.txt")]
    assert sorted(trace()) == sorted(["stdout", "logs", "warnings", *files])


@pytest.mark.parametrize("fault", [name for name, answer in FAULTS.items() if answer is not None])
def test_an_error_of_the_notifier_has_the_token_neither_in_its_text_nor_in_its_causes_and_contexts(fault, trace):
    with BotApi() as api:
        api.script = [FAULTS[fault]] * 99 if callable(FAULTS[fault]) else []
        notifier = TelegramNotifier(TOKEN, 42, closed_port() if fault == "refused" else api.url)
        with pytest.raises(TelegramError) as caught:
            notifier.send_report("text", b"picture")
    assert not leaks(shown(caught.value))
    assert isinstance(caught.value.__context__, TelegramError | None)  # and no error of httpx, which holds the URL
    assert trace() == []


@pytest.mark.parametrize(
    "knobs",
    [
        {"telegram_bot_token": TOKEN.encode()},
        {"telegram_bot_token": [TOKEN]},
        {"telegram_chat_id": TOKEN},
        {"telegram_chat_id": f"bot{TOKEN}"},
        {"telegram_bot_token": TOKEN, "num_epochs": 0},
        {"telegram_bot_token": TOKEN, "telegram_chat_id": True},
        {"telegram_bot_token": TOKEN, "training_arguments": {"no": "such"}},
    ],
)
def test_a_config_that_is_refused_does_not_show_the_token(knobs):
    with pytest.raises(ValueError, match="TrainingConfig: ") as caught:
        TrainingConfig(**knobs)
    assert not leaks(shown(caught.value))


THINGS = {
    "config": lambda: TrainingConfig(telegram_bot_token=TOKEN, telegram_chat_id=42),
    "config in a container": lambda: {"configs": [TrainingConfig(telegram_bot_token=SecretStr(TOKEN))]},
    "replaced config": lambda: dataclasses.replace(TrainingConfig(telegram_bot_token=TOKEN), seed=1),
    "notifier": lambda: TelegramNotifier(TOKEN, 42),
}


@pytest.mark.parametrize("thing", THINGS)
def test_no_view_of_what_holds_the_token_shows_it(thing):
    it = THINGS[thing]()
    fields = dataclasses.asdict(it) if dataclasses.is_dataclass(it) else getattr(it, "__dict__", {})
    seen = [repr(it), f"{it} {it!s:>20}", pprint.pformat(it), repr(fields), json.dumps(fields, default=str), pretty(it)]
    assert [text for text in seen if leaks(text)] == []


def test_training_arguments_and_the_identity_know_nothing_of_the_token(tmp_path):
    config = TrainingConfig(telegram_bot_token=TOKEN, telegram_chat_id=42)
    arguments = config.to_training_arguments(str(tmp_path))
    assert not leaks(repr(arguments) + repr(vars(arguments)) + arguments.to_json_string())
    assert not leaks(repr(config.identity()))


def test_an_experiment_leaves_no_trace_of_the_token(tiny_data, tmp_path, trace, monkeypatch):
    def broken():
        raise ValueError(f"no model from https://api.telegram.org/bot{TOKEN}/getFile")

    with BotApi(error(500, f"at /bot{TOKEN}")) as api:
        monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, api.url, 10))
        monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)
        monkeypatch.setenv("TELEGRAM_CHAT_ID", "42")
        config = TrainingConfig(**KNOBS, output_dir=tmp_path / "runs", telegram_every_run=True)
        print(experiment({"tiny": tiny_mlp, "broken": broken}, config, tiny_data, [0]))
        assert {request.method for request in api.messages()} == {"sendPhoto"}
        assert "failed: broken, seed 0: ValueError: no model from" in api.requests[-1].fields["caption"]
        assert not any(leaks(request.body) for request in api.requests)
    (failed,) = trace.warned
    assert "the run of 'broken' with seed 0 failed" in str(failed.message)
    assert trace() == []


CELLS = [
    "from lablib import MLP, StreamlinedTrainer, TrainingConfig, load_data\n"
    "from lablib.telegram import TelegramNotifier\n"
    "TelegramNotifier.__init__.__defaults__ = (None, None, {url!r}, 10)\n"
    "TelegramNotifier.deadline = 0.2",
    "notifier = TelegramNotifier()\nprint(notifier, vars(notifier))\nnotifier",
    "notifier.check()",  # fails: its traceback is an output, with what IPython makes of it
    "config = TrainingConfig(num_epochs=1, use_telegram_notifications=True)\n"
    "trainer = StreamlinedTrainer(MLP((4,)), config, load_data('digits'))\n"
    "trainer.train()\nconfig",
]


@pytest.fixture(scope="module", autouse=True)
def executing(tmp_path_factory):
    """A notebook that uses the token, being executed while the other tests run; what it asked of Telegram, its path."""
    path = tmp_path_factory.mktemp("notebook") / "notebook.ipynb"
    with BotApi(*[error(401, f"Unauthorized: /bot{TOKEN}")] * 5) as api:
        cells = [nbformat.v4.new_code_cell(source.replace("{url!r}", repr(api.url))) for source in CELLS]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
        command = [sys.executable, "-c", "from nbclient.cli import main; main()", "--allow-errors", "--inplace"]
        secrets = {"TELEGRAM_BOT_TOKEN": TOKEN, "TELEGRAM_CHAT_ID": "42"}
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([*command, str(path)], env=os.environ | secrets, **quiet)
        yield process, api, path
        process.kill()
        process.communicate()


def test_an_executed_notebook_shows_nothing_of_the_token(executing):
    process, api, path = executing
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert api.requests[0].token == TOKEN
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.outputs]
    (failure,) = [output for output in outputs if output.output_type == "error"]
    assert failure.ename == "TelegramError"
    assert any("Telegram: 401" in output.get("text", "") for output in outputs)  # the training's one warning
    assert not leaks(path.read_bytes())
    assert not leaks(printed)
