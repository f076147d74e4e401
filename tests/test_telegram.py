"""Telegram: what arrives at a Bot API on loopback, and what becomes of a training when nothing does."""

import asyncio
import logging
import sys
import time
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from bot_api import BotApi, closed_port, error, hang, reply, reset
from matplotlib.figure import Figure
from pydantic import SecretStr
from transformers import TrainerCallback

from lablib import MLP, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.telegram import ExperimentMessages, TelegramError, TelegramNotifier, learning_curves

TOKEN = "123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
CHAT = "-1001234567890"
PNG = b"\x89PNG\r\n\x1a\n--boundary\r\n\r\n\x00\xff" + bytes(range(256)) * 20
STEPS = 4  # an epoch

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": partial(tiny_mlp, (8,))}


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No credentials of whoever runs the tests, and short waits."""
    monkeypatch.delenv("TELEGRAM_BOT_TOKEN", raising=False)
    monkeypatch.delenv("TELEGRAM_CHAT_ID", raising=False)
    monkeypatch.setattr(TelegramNotifier, "pause", 0.01)


@pytest.fixture
def impatient(monkeypatch):
    """A deadline that a test can wait for."""
    monkeypatch.setattr(TelegramNotifier, "deadline", 0.4)


@pytest.fixture
def api():
    with BotApi() as api:
        yield api


@pytest.fixture
def notifier(api):
    return TelegramNotifier(TOKEN, CHAT, api.url)


@pytest.fixture
def in_environment(api, monkeypatch):
    """Credentials in the environment; whoever does not say otherwise talks to the loopback."""
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)
    monkeypatch.setenv("TELEGRAM_CHAT_ID", CHAT)
    monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, api.url, 10))


@pytest.fixture
def config(tmp_path):
    knobs = {"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu"}
    return TrainingConfig(**knobs, output_dir=str(tmp_path / "runs"), use_telegram_notifications=True)


def sent(api) -> str:
    """The text of the only message."""
    (message,) = api.messages()
    return message.text


FAILURE = "an evaluation (9 of 9 images) fails with ArithmeticError: no forward with …. FailsInTraining was given "
FAILURE += "float32 (9, 1, 6, 6)"


class At(TrainerCallback):
    """Raises an error after a step."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def __identity__(self) -> str:
        return f"{type(self.error).__name__} at {self.step}"

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


# Credentials


def test_arguments_come_before_the_environment_and_the_environment_before_colab(api, monkeypatch):
    colab = ModuleType("google.colab")
    colab.userdata = SimpleNamespace(get={"TELEGRAM_BOT_TOKEN": f"3{TOKEN}", "TELEGRAM_CHAT_ID": "333"}.__getitem__)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    TelegramNotifier(base_url=api.url).send_message("text")
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", f" 2{TOKEN}\n")
    monkeypatch.setenv("TELEGRAM_CHAT_ID", "@name")
    TelegramNotifier(base_url=api.url).send_message("text")
    TelegramNotifier(SecretStr(f"1{TOKEN}"), 111, api.url).send_message("text")
    used = [(request.token, request.fields["chat_id"]) for request in api.requests]
    assert used == [(f"3{TOKEN}", "333"), (f"2{TOKEN}", "@name"), (f"1{TOKEN}", "111")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "set TELEGRAM_BOT_TOKEN to your bot's token, 123456:AAq7… in the environment or in Colab's secrets"),
        ((f"{TOKEN}/getMe?", CHAT), "set TELEGRAM_BOT_TOKEN to your bot's token"),
        ((CHAT, TOKEN), "set TELEGRAM_BOT_TOKEN to your bot's token"),
        ((TOKEN,), "set TELEGRAM_CHAT_ID to a chat's number or @name in the environment or in Colab's secrets"),
        ((TOKEN, TOKEN), "set TELEGRAM_CHAT_ID to a chat's number or @name"),
    ],
)
def test_credentials_that_are_missing_or_malformed_are_named_and_not_shown(arguments, problem):
    with pytest.raises(TelegramError, match=problem) as caught:
        TelegramNotifier(*arguments)
    assert TOKEN[12:] not in str(caught.value)


# What arrives


def test_a_report_is_one_message_if_it_fits(api, notifier):
    text = "ended: 97 % <b>&amp; _now_ *\n\n“é” 🎉 + a=b&c"
    notifier.send_report(text, PNG)
    notifier.send_report(text + "x" * 1024, PNG)
    notifier.send_report("x" * 4001)
    assert api.methods() == ["sendPhoto", "sendMessage", "sendPhoto", "sendMessage"]
    assert [request.text for request in api.requests] == [text, text + "x" * 1024, "", "x" * 4000 + "…"]
    assert [request.files.get("photo") for request in api.requests] == [PNG, None, PNG, None]
    assert {(request.token, request.fields["chat_id"]) for request in api.requests} == {(TOKEN, CHAT)}


def test_check_says_whose_bot_it_is_also_where_an_event_loop_runs_as_in_a_notebook(notifier):
    async def cell() -> str:
        return notifier.check()

    assert asyncio.run(cell()) == "The token belongs to Lab Bot (@lab_bot)."


# Faults


def test_a_429_waits_as_long_as_it_says_but_not_beyond_the_deadline(api, notifier):
    api.script = [error(429, "Too Many Requests", parameters={"retry_after": 0.2})]
    notifier.send_message("text")
    first, second = api.requests
    assert second.at - first.at >= 0.2
    assert second.fields == first.fields
    api.script = [error(429, "Too Many Requests: retry after 61", parameters={"retry_after": 61})]
    with pytest.raises(TelegramError, match="429 Too Many Requests: retry after 61") as caught:
        notifier.send_message("text")
    assert time.monotonic() - second.at < 5
    assert caught.value.status == 429


def test_what_is_temporary_is_tried_again_with_longer_and_longer_pauses(api, notifier, monkeypatch):
    monkeypatch.setattr(TelegramNotifier, "pause", 0.05)
    api.script = [error(500, "Internal"), reply(502, b"<html>Bad Gateway</html>"), reset, error(429, "Too Many")]
    notifier.send_report("text", PNG)
    pauses = [after.at - before.at for before, after in zip(api.requests[:-1], api.requests[1:], strict=True)]
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.4), strict=True)] == [True] * 4
    assert {request.files["photo"] for request in api.requests} == {PNG}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (error(400, "Bad Request: chat not found"), "^400 Bad Request: chat not found$"),
        (error(401, "Unauthorized"), "^401 Unauthorized; is TELEGRAM_BOT_TOKEN right.$"),
        (error(403, f"no {TOKEN} nor 9:{'B' * 35}, {'etc. ' * 99}"), "^403 no … nor …, [etc. ]{180,200}$"),
        (reply(200, b"<html>Log in to the hotel's network</html>"), "^200 not a Bot API response "),
        (reply(200, b"[1]"), "^200 not a Bot API response "),
        (reply(200, {"ok": False, "description": "no"}), "^200 no$"),
        (reply(307, b"", Location="http://127.0.0.1:9"), "^307 not a Bot API response "),
    ],
)
def test_other_answers_are_errors_at_once_and_hold_no_token(answer, problem, api, notifier):
    api.script = [answer]
    with pytest.raises(TelegramError, match=problem):
        notifier.send_message("text")
    assert len(api.requests) == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("fault", "problem"),
    [(reset, "no connection|not a Bot API"), (hang, "no connection"), (error(503, "Unavailable"), "503 Unavailable")],
)
def test_a_server_that_stays_bad_is_given_up_at_the_deadline(fault, problem, api, notifier):
    api.script = [fault] * 100
    began = time.monotonic()
    with pytest.raises(TelegramError, match=problem):
        notifier.send_message("text")
    assert time.monotonic() - began < 5


def test_a_message_passes_no_proxy_and_the_http_librarys_log_has_no_token(notifier, caplog, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", closed_port())
    for name in ("httpx", "httpcore.connection", "httpcore.http11"):
        caplog.set_level(logging.DEBUG, name)
    notifier.send_message("text")
    assert len(caplog.records) > 5
    assert TOKEN[10:] not in "".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)


# A training


@pytest.mark.usefixtures("in_environment")
def test_a_finished_training_sends_the_figures_of_its_best_epoch_and_its_curves(api, config, tiny_data):
    run = train_or_load(MODELS["narrow"], replace(config, telegram_additional_info="on the <old> laptop"), tiny_data)
    assert sent(api).split("\n") == [
        "MLP on tiny: training finished",
        "on the <old> laptop",
        f"run: {run.path.name}",
        f"best epoch: {run.result['best_epoch']} of 2",
        f"validation accuracy: {run.result['val_accuracy']:.2%}",
        f"test accuracy: {run.result['test_accuracy']:.2%}",
        f"duration: {run.result['seconds']:.0f} s",
    ]
    assert api.messages()[0].files["photo"].startswith(PNG[:8])
    assert plt.get_fignums() == []
    train_or_load(MODELS["narrow"], config, tiny_data)
    assert len(api.messages()) == 1  # nothing was trained


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize(
    ("error", "outcome", "line"),
    [
        (ArithmeticError(f"no way with {TOKEN}\nTraceback"), "failed", "ArithmeticError: no way with …"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
    ],
)
def test_a_training_that_fails_or_is_interrupted_sends_where_and_why(error, outcome, line, api, config, tiny_data):
    trainer = StreamlinedTrainer(MODELS["narrow"](), config, tiny_data, callbacks=[At(STEPS + 2, error)], run_name="it")
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert sent(api).split("\n") == [f"MLP on tiny: training {outcome}", "run: it", "after 1.5 of 2 epochs", line]


@pytest.mark.usefixtures("in_environment", "impatient", "one_picture")
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (error(401, "Unauthorized"), "401 Unauthorized; is TELEGRAM_BOT_TOKEN right?"),
        (error(403, "Forbidden: bot was blocked by the user"), "403 Forbidden: bot was blocked by the user"),
        (hang, "no connection (ReadTimeout)"),
    ],
)
def test_a_telegram_that_refuses_or_hangs_is_one_warning_and_the_training_gives_the_same_bits(
    fault, problem, api, config, tiny_data
):
    def train(config: TrainingConfig):
        torch.manual_seed(0)
        trainer = StreamlinedTrainer(MODELS["wide"](), config, tiny_data)
        trainer.train()
        return [*trainer.model.state_dict().values(), torch.get_rng_state()]

    expected = train(replace(config, use_telegram_notifications=False))
    api.script = [fault] * 20
    with pytest.warns(UserWarning, match="Telegram") as warned:
        outcome = train(config)
    assert [str(warning.message) for warning in warned] == [f"Telegram: {problem}; continuing without it"]
    assert all(torch.equal(one, other) for one, other in zip(outcome, expected, strict=True))


# An experiment


class FailsInTraining(MLP):
    def forward(self, images):
        raise ArithmeticError(f"no forward with {TOKEN}")


BROKEN = partial(FailsInTraining, (4,), image_shape=(1, 6, 6), num_classes=3)


@pytest.mark.usefixtures("in_environment")
def test_an_experiment_sends_one_message_at_its_end_and_none_if_all_was_loaded(api, config, tiny_data):
    train_or_load(MODELS["wide"], replace(config, seed=1, use_telegram_notifications=False), tiny_data)
    knobs = replace(config, telegram_additional_info="info")
    with pytest.warns(UserWarning, match="failed"):
        result = experiment({**MODELS, "broken": BROKEN}, knobs, tiny_data, [0, 1])
    counts, duration, *rest = sent(api).split("\n")[2:]
    assert sent(api).startswith("Experiment on tiny: finished\ninfo\n")
    assert counts == "runs: 4 of 6 finished (1 loaded), 2 failed"
    assert duration.startswith("duration: 0:00:")
    means = {name: sum(result.values(name).values()) / 2 for name in MODELS}
    assert rest == [
        *(f"{name}: test accuracy {mean:.2%} (n = 2)" for name, mean in means.items()),
        *(f"failed: broken, seed {seed}: SanityCheckError: {FAILURE}" for seed in (0, 1)),
    ]
    assert api.messages()[0].files["photo"].startswith(PNG[:8])
    experiment(MODELS, knobs, tiny_data, [0, 1])
    assert len(api.messages()) == 1


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_each_run_sends_a_message_if_asked_for(api, config, tiny_data):
    knobs, models = replace(config, telegram_every_run=True), {"narrow": MODELS["narrow"], "broken": BROKEN}
    with pytest.warns(UserWarning, match="failed"):
        run = experiment(models, knobs, tiny_data, [3]).runs["narrow", 3]
    narrow, broken, end = (message.text for message in api.messages())
    assert narrow.startswith(f"narrow on tiny, seed 3: training finished\nrun: {run.path.name}\nbest epoch: ")
    assert broken == f"broken on tiny, seed 3: training failed\nSanityCheckError: {FAILURE}"
    assert end.startswith("Experiment on tiny: finished\nruns: 1 of 2 finished (0 loaded), 1 failed")


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_an_interrupted_experiment_sends_what_is_done_and_the_interruption_passes_through(api, config, tiny_data):
    class Interrupted(StreamlinedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.config.seed == 1:
                self.add_callback(At(STEPS + 1, KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        experiment({"narrow": MODELS["narrow"]}, config, tiny_data, [0, 1, 2], trainer_class=Interrupted)
    assert sent(api).startswith("Experiment on tiny: interrupted\nruns: 1 of 3 finished (0 loaded), 0 failed\n")
    assert "\nKeyboardInterrupt\nRun it again to continue where it stopped.\nnarrow: test accuracy " in sent(api)


@pytest.mark.parametrize("token", [None, "malformed"])
def test_an_experiment_without_credentials_says_so_once_at_its_start(token, api, config, monkeypatch):
    monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, api.url, 10))
    knobs = replace(config, telegram_bot_token=token, telegram_chat_id=42, telegram_every_run=True)

    def begin_and_end_a_run():
        with ExperimentMessages(SimpleNamespace(config=knobs, failures={}, runs={})) as messages:
            messages.begin({("narrow", 0): None})
            assert messages.broken
            messages.run_ended(("narrow", 0))

    with pytest.warns(UserWarning, match="Telegram: set TELEGRAM_BOT_TOKEN") as warned:
        begin_and_end_a_run()
    assert len(warned) == 1
    assert api.requests == []


def test_the_picture_has_a_line_for_training_and_validation_or_for_each_model(monkeypatch):
    drawn, part = [], ("train_loss", "val_loss", "train_accuracy", "val_accuracy")
    table = pd.DataFrame([{"epoch": epoch, **dict.fromkeys(part, epoch / 9)} for epoch in (1, 2)])
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: drawn.extend(figure.axes))
    learning_curves(table, "a run")
    learning_curves(pd.concat([table.assign(model=name) for name in "ab"]), "an experiment")
    labels = [[line.get_label() for line in axis.lines] for axis in drawn]
    assert labels == [list(part[:2]), list(part[2:]), *[["validation, a", "validation, b"]] * 2]
