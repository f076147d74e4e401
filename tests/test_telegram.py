"""Telegram: what arrives at a Bot API on loopback, and what becomes of a training when nothing does."""

import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from bot_api import closed_port, error, reply, reset
from pydantic import SecretStr
from scripted import At

from lablib import MLP, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.telegram import ExperimentMessages, TelegramError, TelegramNotifier

TOKEN = "123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
CHAT = "-1001234567890"
STEPS = 4  # an epoch

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": partial(tiny_mlp, (8,))}


@pytest.fixture(autouse=True)
def _alone(api, monkeypatch):
    """No proxy, short waits, and no thread that outlives its test."""
    monkeypatch.setenv("HTTP_PROXY", closed_port())  # which no message with a token may pass
    monkeypatch.setattr(TelegramNotifier, "deadline", 5.0)
    yield
    for thread in threading.enumerate():
        if thread.name == "telegram check":
            thread.join()


@pytest.fixture
def notifier(api):
    return TelegramNotifier(TOKEN, CHAT)


@pytest.fixture
def in_environment(monkeypatch):
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", TOKEN)
    monkeypatch.setenv("TELEGRAM_CHAT_ID", CHAT)


@pytest.fixture
def config(tmp_path):
    knobs = {"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu"}
    return TrainingConfig(**knobs, output_dir=str(tmp_path / "runs"), use_telegram_notifications=True)


def sent(api) -> str:
    """The text of the only message."""
    (message,) = api.messages()
    return message.text


def test_arguments_come_before_the_environment_and_the_environment_before_colab(api, monkeypatch):
    colab = ModuleType("google.colab")
    colab.userdata = SimpleNamespace(get={"TELEGRAM_BOT_TOKEN": f"3{TOKEN}", "TELEGRAM_CHAT_ID": "333"}.__getitem__)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    TelegramNotifier().send_message("text")
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", f" 2{TOKEN}\n")
    monkeypatch.setenv("TELEGRAM_CHAT_ID", "@name")
    TelegramNotifier().send_message("text")
    TelegramNotifier(SecretStr(f"1{TOKEN}"), 111).send_message("text")
    used = [(request.token, request.chat) for request in api.requests]
    assert used == [(f"3{TOKEN}", "333"), (f"2{TOKEN}", "@name"), (f"1{TOKEN}", "111")]


def test_credentials_that_are_missing_or_malformed_are_named_and_not_shown():
    wrong = {"TELEGRAM_BOT_TOKEN": [(), (f"{TOKEN}/getMe?", CHAT), (CHAT, TOKEN)]}
    wrong |= {"TELEGRAM_CHAT_ID": [(TOKEN,), (TOKEN, TOKEN)]}
    for name, arguments in [(name, arguments) for name, cases in wrong.items() for arguments in cases]:
        with pytest.raises(TelegramError, match=f"set {name}") as caught:
            TelegramNotifier(*arguments)
        assert TOKEN[12:] not in str(caught.value)


def test_a_message_arrives_as_it_is_and_is_cut_where_it_is_too_long(api, notifier):
    text = "ended: 97 % <b>&amp; _now_ *\n\n“é” 🎉 + a=b&c"
    notifier.send_message(text)
    notifier.send_message("x" * 4001)
    assert [request.text for request in api.requests] == [text, "x" * 4000 + "…"]
    assert {(request.token, request.chat, request.method) for request in api.requests} == {(TOKEN, CHAT, "sendMessage")}
    assert notifier.check() == "The token belongs to Lab Bot (@lab_bot)."


def test_a_group_that_became_a_supergroup_is_followed_once(api, notifier):
    moved = error(400, "Bad Request: group chat was upgraded", parameters={"migrate_to_chat_id": -1009})
    api.script = [moved]
    with pytest.warns(UserWarning, match="the group has a new chat ID; set TELEGRAM_CHAT_ID to -1009"):
        notifier.send_message("text")
    assert [request.chat for request in api.requests] == [CHAT, "-1009"]
    api.script = [moved] * 9
    with pytest.raises(TelegramError, match="400 Bad Request: group chat was upgraded"):
        notifier.send_message("text")
    assert len(api.requests) == 3


def test_what_is_temporary_is_tried_again_with_longer_and_longer_pauses(api, notifier, monkeypatch):
    monkeypatch.setattr(TelegramNotifier, "pause", 0.05)
    full = error(429, "Too Many Requests", parameters={"retry_after": 0.5})
    api.script = [error(500, "Internal"), reply(502, b"<html>Bad Gateway</html>"), reset, full]
    notifier.send_message("text")
    pauses = [after.at - before.at for before, after in pairwise(api.requests)]
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1, 0.2, 0.5), strict=True)] == [True] * 4


@pytest.mark.usefixtures("in_environment")
def test_a_finished_training_sends_the_figures_of_its_best_epoch(api, config, tiny_data):
    run = train_or_load(MODELS["narrow"], replace(config, telegram_additional_info="on the <old> laptop"), tiny_data)
    assert sent(api).split("\n") == [
        "MLP on tiny: training finished",
        "on the <old> laptop",
        f"run: {run.path.name}",
        "epochs: 2",
        f"best epoch: {run.result['best_epoch']}",
        f"best val loss: {run.result['val_loss']:.6g}",
        f"best val accuracy: {run.result['val_accuracy']:.2%}",
        f"test loss: {run.result['test_loss']:.6g}",
        f"test accuracy: {run.result['test_accuracy']:.2%}",
        f"seconds: {run.result['seconds']:.6g}",
    ]
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
    raising = At(STEPS + 2, Mock(side_effect=error))
    trainer = StreamlinedTrainer(MODELS["narrow"](), config, tiny_data, callbacks=[raising], run_name="it")
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert sent(api).split("\n") == [f"MLP on tiny: training {outcome}", "run: it", "after 1.5 of 2 epochs", line]


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
    *head, duration, narrow, wide, failed, again = sent(api).split("\n")
    assert head == ["Experiment on tiny: finished", "info", "runs: 4 of 6 finished (1 loaded), 2 failed"]
    assert duration.startswith("duration: 0:00:")
    means = [sum(result.values(name).values()) / 2 for name in MODELS]
    assert [narrow, wide] == [f"{n}: test accuracy {m:.2%} (n = 2)" for n, m in zip(MODELS, means, strict=True)]
    for seed, line in enumerate((failed, again)):
        assert line.startswith(f"failed: broken, seed {seed}: SanityCheckError: ")
        assert "no forward with …" in line
    experiment(MODELS, knobs, tiny_data, [0, 1])
    assert len(api.messages()) == 1


@pytest.mark.parametrize("token", [None, "malformed", TOKEN])
def test_an_experiment_with_bad_credentials_says_so_once_at_its_start(token, api, config):
    knobs = replace(config, telegram_bot_token=token, telegram_chat_id=42)
    api.script = [error(401, "Unauthorized")]
    messages = ExperimentMessages(SimpleNamespace(config=knobs, runs={}))

    with (  # noqa: PT031
        pytest.warns(UserWarning, match="Telegram: (set|401 Unauthorized; is) TELEGRAM_BOT_TOKEN") as warned,
        messages,
    ):
        while not messages.broken:
            time.sleep(0.01)
    assert len(warned) == 1
    assert api.messages() == []
