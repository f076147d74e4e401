"""Telegram: what arrives at a Bot API on loopback, and what becomes of a training when nothing does."""

import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from bot_api import closed_port, error, reply, reset
from pydantic import SecretStr
from scripted import At

from lablib import MLP, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.telegram import ExperimentMessages, TelegramNotifier

TOKEN = "123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
CHAT = "-1001234567890"
STEPS = 4  # an epoch

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": partial(tiny_mlp, (8,))}


@pytest.fixture(autouse=True)
def _alone(api, monkeypatch):
    """No proxy, and no thread that outlives its test."""
    monkeypatch.setenv("HTTP_PROXY", closed_port())  # which no message with a token may pass
    yield
    for thread in threading.enumerate():
        if thread.name == "telegram check":
            thread.join()


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


def test_arguments_come_before_the_environment(api, monkeypatch):
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", f" 2{TOKEN}\n")
    monkeypatch.setenv("TELEGRAM_CHAT_ID", "@name")
    TelegramNotifier().send_message("text")
    TelegramNotifier(SecretStr(f"1{TOKEN}"), 111).send_message("text")
    used = [(request.token, request.chat) for request in api.requests]
    assert used == [(f"2{TOKEN}", "@name"), (f"1{TOKEN}", "111")]


@pytest.mark.parametrize("arguments", [(), (TOKEN,), (CHAT, TOKEN), (f"{TOKEN}/getMe?", CHAT), (TOKEN[:20], CHAT)])
def test_credentials_that_are_missing_or_malformed_are_named_and_not_shown(arguments):
    with pytest.raises(RuntimeError, match="set TELEGRAM_BOT_TOKEN to a token") as caught:
        TelegramNotifier(*arguments)
    assert TOKEN[12:] not in str(caught.value)


def test_a_message_arrives_as_it_is_and_is_cut_where_it_is_too_long(api):
    notifier = TelegramNotifier(TOKEN, CHAT)
    text = "ended: 97 % <b>&amp; _now_ *\n\n“é” 🎉 + a=b&c"
    notifier.send_message(text)
    notifier.send_message("x" * 4001)
    assert [request.text for request in api.requests] == [text, "x" * 4000]
    assert {(request.token, request.chat, request.method) for request in api.requests} == {(TOKEN, CHAT, "sendMessage")}
    assert notifier.check() == "The token belongs to Lab Bot (@lab_bot)."


def test_a_group_that_became_a_supergroup_is_followed(api):
    api.script = [error(400, "Bad Request: group chat was upgraded", parameters={"migrate_to_chat_id": -1009})]
    with pytest.warns(UserWarning, match="the group has a new chat ID; set TELEGRAM_CHAT_ID to -1009"):
        TelegramNotifier(TOKEN, CHAT).send_message("text")
    assert [request.chat for request in api.requests] == [CHAT, "-1009"]


@pytest.mark.parametrize("failure", [error(500, "Internal"), error(429, "Too Many Requests"), reset])
def test_what_may_be_temporary_is_tried_again_after_a_pause(failure, api, monkeypatch):
    monkeypatch.setattr(TelegramNotifier, "pause", 0.05)
    api.script = [failure, reply(502, b"<html>Bad Gateway</html>")]
    TelegramNotifier(TOKEN, CHAT).send_message("text")
    pauses = [after.at - before.at for before, after in pairwise(api.requests)]
    assert [pause >= least for pause, least in zip(pauses, (0.05, 0.1), strict=True)] == [True, True]


@pytest.mark.usefixtures("in_environment")
def test_a_finished_training_sends_the_figures_of_its_best_epoch(api, config, tiny_data):
    run = train_or_load(MODELS["narrow"], replace(config, telegram_additional_info="on the <old> laptop"), tiny_data)
    first, info, *lines = sent(api).split("\n")
    assert (first, info) == (f"{run.path.name} on tiny: finished", "on the <old> laptop")
    assert {f"val_accuracy: {run.result['val_accuracy']:.6g}", "epochs: 2"} < {*lines}
    train_or_load(MODELS["narrow"], config, tiny_data)
    assert len(api.messages()) == 1  # nothing was trained


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ArithmeticError(f"no way with {TOKEN}\nTraceback"), "ArithmeticError: no way with …"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_training_that_fails_or_is_interrupted_sends_where_and_why(error, line, api, config, tiny_data):
    raising = At(STEPS + 2, Mock(side_effect=error))
    trainer = StreamlinedTrainer(MODELS["narrow"](), config, tiny_data, callbacks=[raising], run_name="it")
    with pytest.raises(type(error)) as caught:
        trainer.train()
    assert caught.value is error
    assert sent(api) == f"it on tiny: failed with {line}\nafter 1.5 of 2 epochs"


class FailsInTraining(MLP):
    def forward(self, images):
        raise ArithmeticError(f"no forward with {TOKEN}")


BROKEN = partial(FailsInTraining, (4,), image_shape=(1, 6, 6), num_classes=3)


@pytest.mark.usefixtures("in_environment")
def test_an_experiment_sends_one_message_at_its_end_and_none_if_all_was_loaded(api, config, tiny_data):
    train_or_load(MODELS["wide"], replace(config, seed=1, use_telegram_notifications=False), tiny_data)
    with pytest.warns(UserWarning, match="failed"):
        result = experiment({**MODELS, "broken": BROKEN}, config, tiny_data, [0, 1])
    *head, failed, again = sent(api).split("\n")
    means = [f"{name}: test accuracy {sum(result.values(name).values()) / 2:.2%} (n = 2)" for name in MODELS]
    assert head == ["Experiment on tiny: finished", "runs: 4 of 6 finished, 2 failed", *means]
    for seed, line in enumerate((failed, again)):
        assert line.startswith(f"failed: broken, seed {seed}: SanityCheckError: ")
        assert "no forward with …" in line
    experiment(MODELS, config, tiny_data, [0, 1])
    assert len(api.messages()) == 1


@pytest.mark.parametrize("token", [None, "malformed", TOKEN])
def test_an_experiment_with_bad_credentials_says_so_once_at_its_start(token, api, config, tiny_data):
    knobs = replace(config, telegram_bot_token=token, telegram_chat_id=42)
    api.script = [error(401, "Unauthorized")]
    experiment = SimpleNamespace(config=knobs, runs={}, data=tiny_data)
    with pytest.warns(UserWarning, match="Telegram: .*(set|; check) TELEGRAM_BOT_TOKEN") as warned:  # noqa: PT031
        messages = ExperimentMessages(experiment)
        while not messages.broken:
            time.sleep(0.01)
        messages.__exit__(None, None, None)
    assert len(warned) == 1
    assert api.messages() == []
