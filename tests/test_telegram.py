"""Telegram: what arrives at a Bot API on loopback, and what becomes of a training when nothing does."""

import asyncio
import copy
import logging
import os
import struct
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace

import httpx
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from bot_api import BotApi, closed_port, drip, error, hang, reply, reset
from matplotlib.figure import Figure
from transformers import TrainerCallback

from lablib import MLP, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.secret import Secret
from lablib.services import ServiceCallback, learning_curves
from lablib.telegram import TelegramError, TelegramNotifier, messages
from lablib.telegram.callback import TelegramCallback

TOKEN = "123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
CHAT = "-1001234567890"
PNG = b"\x89PNG\r\n\x1a\n--boundary\r\n\r\n\x00\xff" + bytes(range(256)) * 20

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": partial(tiny_mlp, (8,))}


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch):
    """Neither those of whoever runs the tests, nor waits as long as in earnest."""
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
    return TrainingConfig(
        num_epochs=2,
        batch_size=8,
        validation_split=0.25,
        device="cpu",
        output_dir=str(tmp_path / "runs"),
        use_telegram_notifications=True,
    )


def sent(api) -> str:
    """The text of the only message."""
    (request,) = api.requests
    return request.fields["caption" if request.method == "sendPhoto" else "text"]


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


# Credentials


def test_arguments_come_before_the_environment_and_the_environment_before_colab(api, monkeypatch):
    colab = ModuleType("google.colab")
    secrets = {"TELEGRAM_BOT_TOKEN": "3:colab", "TELEGRAM_CHAT_ID": "333"}
    colab.userdata = SimpleNamespace(get=secrets.__getitem__)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    TelegramNotifier(base_url=api.url).send_message("")
    monkeypatch.setenv("TELEGRAM_BOT_TOKEN", " 2:environment\n")
    TelegramNotifier(base_url=api.url).send_message("")
    monkeypatch.setenv("TELEGRAM_CHAT_ID", "222")
    TelegramNotifier(base_url=api.url).send_message("")
    TelegramNotifier("1:argument", base_url=api.url).send_message("")
    TelegramNotifier(Secret("1:secret"), 111, api.url).send_message("")
    assert [(request.token, request.fields["chat_id"]) for request in api.requests] == [
        ("3:colab", "333"),
        ("2:environment", "333"),
        ("2:environment", "222"),
        ("1:argument", "222"),
        ("1:secret", "111"),
    ]
    secrets.clear()  # as where Colab has no such secret, or does not show it to this notebook
    monkeypatch.delenv("TELEGRAM_BOT_TOKEN")
    with pytest.raises(TelegramError, match="set TELEGRAM_BOT_TOKEN in the environment"):
        TelegramNotifier()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "set TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in"),
        ((TOKEN,), "set TELEGRAM_CHAT_ID in"),
        ((None, 42), "set TELEGRAM_BOT_TOKEN in"),
        (("", " "), "set TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in"),
    ],
)
def test_missing_credentials_are_named_by_their_variables(arguments, named):
    with pytest.raises(TelegramError, match=named) as caught:
        TelegramNotifier(*arguments)
    assert str(caught.value).endswith("in the environment, or as secrets of that name in Colab")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            (f"{TOKEN}/getMe?", CHAT),
            "TELEGRAM_BOT_TOKEN holds signs that no bot's token has; copy it anew from @BotFather",
        ),
        ((CHAT, TOKEN), "TELEGRAM_CHAT_ID looks like a bot's token; it is the number of a chat"),
        ((TOKEN, CHAT, "api.telegram.org"), "base_url must begin with https:// or http://"),
    ],
)
def test_credentials_that_can_not_be_right_are_refused_without_being_shown(arguments, problem):
    with pytest.raises(TelegramError, match=problem) as caught:
        TelegramNotifier(*arguments)
    assert TOKEN[12:] not in str(caught.value)


# What arrives


def test_a_message_arrives_as_it_was_sent(api, notifier):
    text = "ended: 97 % <b>&amp; _now_ *\n\n“é” 🎉 + a=b&c"
    notifier.send_message(text)
    (request,) = api.requests
    assert (request.token, request.method) == (TOKEN, "sendMessage")
    assert request.fields == {"chat_id": CHAT, "text": text}


def test_a_photo_arrives_as_it_was_sent(api, notifier):
    notifier.send_photo(PNG, "loss “é”\n🎉")
    (request,) = api.requests
    assert (request.token, request.method) == (TOKEN, "sendPhoto")
    assert request.fields == {"chat_id": CHAT, "caption": "loss “é”\n🎉"}
    assert request.files == {"photo": ("picture.png", "image/png", PNG)}


def test_check_says_whose_bot_it_is(api, notifier):
    assert notifier.check() == "The token is that of Lab Bot (@lab_bot)."
    assert api.methods() == ["getMe"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x" * 4096, "x" * 4096),
        ("x" * 4097, "x" * 4088 + "\n… (cut)"),
        ("🎉" * 2048, "🎉" * 2048),
        ("x" + "🎉" * 2048, "x" + "🎉" * 2043 + "\n… (cut)"),
        ("broken \ud800 half", "broken ? half"),
    ],
    ids=["at the limit", "beyond", "emoji at the limit", "emoji beyond", "half a pair"],
)
def test_a_long_message_is_cut_with_a_mark_at_what_telegram_takes(text, expected, api, notifier):
    notifier.send_message(text)
    assert sent(api) == expected


def test_a_long_caption_is_cut_with_a_mark(api, notifier):
    notifier.send_photo(PNG, "x" * 1025)
    assert sent(api) == "x" * 1016 + "\n… (cut)"


def test_a_report_is_one_message_with_a_picture_where_it_fits(api, notifier):
    notifier.send_report("x" * 1024, PNG)
    notifier.send_report("x" * 1025, PNG)
    notifier.send_report("no picture")
    assert api.methods() == ["sendPhoto", "sendMessage", "sendPhoto", "sendMessage"]
    assert [request.fields.get("text", request.fields.get("caption")) for request in api.requests] == [
        "x" * 1024,
        "x" * 1025,
        "",
        "no picture",
    ]


def test_a_chat_that_takes_no_pictures_gets_the_text(api, notifier):
    api.script = [error(400, "Bad Request: not enough rights to send photos to the chat")]
    notifier.send_report("text", PNG)
    assert api.methods() == ["sendPhoto", "sendMessage"]
    assert api.requests[1].fields["text"] == "text"


def test_sending_works_where_an_event_loop_runs_as_in_a_notebook(api, notifier):
    async def cell():
        notifier.send_message("from a cell")

    asyncio.run(cell())
    assert sent(api) == "from a cell"


def test_proxies_of_the_environment_do_not_see_the_token(api, notifier, monkeypatch):
    with BotApi() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        notifier.send_message("text")
        assert proxy.requests == []
    assert sent(api) == "text"


# Faults


def test_a_429_waits_as_long_as_it_says(api, notifier):
    api.script = [error(429, "Too Many Requests: retry after 0.2", parameters={"retry_after": 0.2})]
    notifier.send_message("text")
    first, second = api.requests
    assert second.at - first.at >= 0.2
    assert second.fields == first.fields


def test_a_429_that_lasts_beyond_the_deadline_is_not_waited_for(api, notifier):
    api.script = [error(429, "Too Many Requests: retry after 61", parameters={"retry_after": 61})]
    began = time.monotonic()
    with pytest.raises(TelegramError, match="429 Too Many Requests: retry after 61") as caught:
        notifier.send_message("text")
    assert time.monotonic() - began < 5
    assert caught.value.status == 429
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    "parameters", [None, [], {}, {"retry_after": "soon"}, {"retry_after": -5}, {"retry_after": True}]
)
def test_a_429_without_a_sensible_time_is_tried_again_after_a_pause(parameters, api, notifier):
    api.script = [error(429, "Too Many Requests", parameters=parameters)]
    notifier.send_message("text")
    assert api.requests[1].at - api.requests[0].at >= 0.01


@pytest.mark.parametrize(
    ("status", "description", "hint"),
    [
        (400, "Bad Request: chat not found", "is TELEGRAM_CHAT_ID right?"),
        (401, "Unauthorized", "is TELEGRAM_BOT_TOKEN right?"),
        (403, "Forbidden: bot was blocked by the user", "a bot may write to those only who wrote to it first"),
        (404, "Not Found", "is TELEGRAM_BOT_TOKEN right?"),
        (413, "Request Entity Too Large", ""),
    ],
)
def test_a_4xx_is_not_tried_again_and_says_what_to_look_at(status, description, hint, api, notifier):
    api.script = [error(status, description)]
    with pytest.raises(TelegramError) as caught:
        notifier.send_message("text")
    assert str(caught.value) == "; ".join(filter(None, [f"{status} {description}", hint]))
    assert caught.value.status == status
    assert len(api.requests) == 1


def test_faults_of_the_server_are_tried_again_with_longer_and_longer_pauses(api, notifier, monkeypatch):
    monkeypatch.setattr(TelegramNotifier, "pause", 0.08)
    api.script = [error(500, "Internal"), reply(502, b"<html>Bad Gateway</html>")]
    notifier.send_photo(PNG, "text")
    first, second, third = api.requests
    assert second.at - first.at >= 0.08
    assert third.at - second.at >= 0.16
    assert third.files["photo"][2] == PNG


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_at_fault_is_given_up_at_the_deadline(api, notifier):
    api.script = [error(503, "Unavailable")] * 100
    began = time.monotonic()
    with pytest.raises(TelegramError, match=r"the server is at fault \(503\)"):
        notifier.send_message("text")
    assert time.monotonic() - began < 5
    assert 1 < len(api.requests) < 10


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (reply(200, b"<html>Log in to the hotel's network</html>"), r"not the Bot API's JSON \(200\)"),
        (reply(200, b""), r"not the Bot API's JSON \(200\)"),
        (reply(200, b"[1]"), r"not the Bot API's JSON \(200\)"),
        (reply(200, b"\xff\xfe\x00"), r"not the Bot API's JSON \(200\)"),
        (reply(403, b"forbidden"), r"not the Bot API's JSON \(403\)"),
        (reply(200, {"ok": False, "description": "no"}), "^200 no$"),
        (reply(200, b"no gzip", Content_Encoding="gzip"), r"the request failed \(DecodingError\)"),
    ],
)
def test_a_reply_that_is_not_the_bot_apis_is_an_error_and_not_tried_again(answer, problem, api, notifier):
    api.script = [answer]
    with pytest.raises(TelegramError, match=problem):
        notifier.send_message("text")
    assert len(api.requests) == 1


def test_a_reset_connection_is_tried_again(api, notifier):
    api.script = [reset, reset]
    notifier.send_message("text")
    assert api.methods() == ["sendMessage"] * 3


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [reset, hang, drip])
def test_a_connection_that_stays_bad_is_given_up_at_the_deadline(fault, api, notifier):
    api.script = [fault] * 100
    began = time.monotonic()
    with pytest.raises(TelegramError, match=r"no connection|no answer within 0\.4 seconds"):
        notifier.send_message("text")
    assert time.monotonic() - began < 5


def test_a_server_that_hangs_is_tried_again_after_the_timeout_of_a_request(api):
    api.script = [hang]
    TelegramNotifier(TOKEN, CHAT, api.url, timeout=0.1).send_message("text")
    assert len(api.requests) == 2


@pytest.mark.usefixtures("impatient")
def test_a_refused_connection_is_given_up_at_the_deadline():
    began = time.monotonic()
    with pytest.raises(TelegramError, match=r"no connection .*refused"):
        TelegramNotifier(TOKEN, CHAT, closed_port()).send_message("text")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status, api, notifier):
    with BotApi() as elsewhere:
        api.script = [reply(status, b"", Location=f"{elsewhere.url}/bot{TOKEN}/sendMessage")]
        with pytest.raises(TelegramError, match=f"a redirect .{status}., not followed as the token would go along"):
            notifier.send_message("text")
        assert elsewhere.requests == []
    assert len(api.requests) == 1


def test_what_a_server_says_is_shown_without_tokens(api, notifier):
    other = "987654321:" + "B" * 35
    api.script = [error(400, f"no /bot{TOKEN}/x nor /bot{TOKEN.replace(':', '%3A')} nor {other}, " + "and so on " * 99)]
    with pytest.raises(TelegramError) as caught:
        notifier.send_message("text")
    assert "no /bot…/x nor /bot… nor …, and so on" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_http_library_logs_nothing_of_these_calls_and_goes_on_logging_others(api, notifier, caplog):
    caplog.set_level(logging.DEBUG)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("http"):
            caplog.set_level(logging.DEBUG, name)
    notifier.check()
    assert [record for record in caplog.records if record.name.startswith("http")] == []
    httpx.get(f"{api.url}/of/others", trust_env=False)
    assert {"httpx", "httpcore.http11"} <= {record.name for record in caplog.records}


# A training


class Scripted(StreamlinedTrainer):
    """Its validation accuracy by epoch is written in advance; its learning rate makes each epoch's weights differ."""

    script = (0.5, 0.9, 0.4, 0.6, 0.7)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if metric_key_prefix == "eval":
            output.metrics["eval_accuracy"] = self.script[round(self.state.epoch) - 1]
        else:
            bias = dict(self.model.named_parameters())["classifier.bias"]
            output.metrics["test_accuracy"] = bias.double().sum().abs().item()  # names the weights
        return output


class At(TrainerCallback):
    """Raises an error after a step."""

    def __init__(self, step: int, error: BaseException):
        self.step, self.error = step, error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise self.error


STEPS = 4  # an epoch


@pytest.mark.usefixtures("in_environment")
def test_the_end_of_a_training_is_told_with_the_figures_of_its_best_epoch(api, config, tiny_data):
    knobs = replace(config, num_epochs=9, early_stopping_patience=3, telegram_additional_info="on the <old> laptop")
    run = train_or_load(MODELS["narrow"], knobs, tiny_data, trainer_class=Scripted)
    assert run.result["best_epoch"] == 2
    assert sent(api) == (
        "MLP on tiny: training finished\n"
        f"run: {run.path.name}\n"
        "best epoch: 2 of 5\n"
        "validation accuracy: 90.00 %\n"
        f"test accuracy: {100 * run.result['test_accuracy']:.2f} %\n"
        f"duration: {run.result['seconds']:.0f} s\n"
        "\n"
        "on the <old> laptop"
    )
    name, _, png = api.requests[0].files["photo"]
    assert name == "picture.png"
    assert png == learning_curves(run.history, "MLP on tiny")
    assert min(size_of(png)) > 300
    assert plt.get_fignums() == []
    train_or_load(MODELS["narrow"], knobs, tiny_data, trainer_class=Scripted)
    assert len(api.requests) == 1  # nothing was trained


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_a_training_gives_the_same_bits_whatever_telegram_does(api, config, tiny_data):
    def trained(knobs: TrainingConfig):
        trainer = StreamlinedTrainer(MODELS["wide"](), knobs, tiny_data)
        trainer.train()
        rows = [{k: v for k, v in row.items() if "loss" in k or "acc" in k} for row in trainer.state.log_history]
        return copy.deepcopy(trainer.model.state_dict()), rows, torch.get_rng_state(), trainer.model.training

    def build_and_train(knobs):
        torch.manual_seed(0)
        return trained(knobs)

    expected = build_and_train(replace(config, use_telegram_notifications=False))
    told = [build_and_train(config)]
    api.script = [error(401, "Unauthorized")]
    with pytest.warns(UserWarning, match="401"):
        told.append(build_and_train(config))
    for weights, *rest in told:
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected[0].items())
        assert rest[0] == expected[1]
        assert torch.equal(rest[1], expected[2])
        assert rest[2] is expected[3] is False


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize(
    ("error", "outcome", "described"),
    [
        (ArithmeticError(f"no way with {TOKEN}"), "failed", "ArithmeticError: no way with …"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (
            ValueError("Caught in worker 0.\nOriginal Traceback (most recent call last):\n  File x\nValueError"),
            "failed",
            "ValueError: Caught in worker 0.",
        ),
    ],
    ids=["error", "interrupt", "traceback"],
)
@pytest.mark.parametrize(
    ("step", "place", "resume"),
    [
        (2, "at epoch 1 of 3", "It can be started again; it has no checkpoint yet."),
        (2 * STEPS + 1, "at epoch 3 of 3", "It can be resumed: it goes on after epoch 2, its last checkpoint."),
    ],
)
def test_a_failure_is_told_with_run_epoch_error_and_how_to_go_on(
    error, outcome, described, step, place, resume, api, config, tiny_data
):
    knobs = replace(config, num_epochs=3, telegram_additional_info="info")
    with pytest.raises(type(error)) as caught:
        train_or_load(MODELS["narrow"], knobs, tiny_data, callbacks=(At(step, error),))
    assert caught.value is error
    (run,) = [path for path in os.scandir(config.output_dir) if path.is_dir()]
    assert sent(api) == "\n".join(
        [f"MLP on tiny: training {outcome}", f"run: {run.name}", place, described, resume, "", "info"]
    )


@pytest.mark.usefixtures("in_environment")
def test_who_interrupts_the_sending_waits_for_no_other_message(api, config, tiny_data, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(TelegramNotifier, "send_report", interrupted)
    with pytest.raises(KeyboardInterrupt):
        StreamlinedTrainer(MODELS["narrow"](), config, tiny_data).train()
    assert api.requests == []


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_a_resumed_training_is_told_as_a_whole(api, config, tiny_data):
    knobs = replace(config, num_epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(MODELS["narrow"], knobs, tiny_data, callbacks=(At(2 * STEPS + 1, KeyboardInterrupt()),))
    with pytest.raises(ArithmeticError):
        train_or_load(MODELS["narrow"], knobs, tiny_data, callbacks=(At(2 * STEPS + 2, ArithmeticError()),))
    run = train_or_load(MODELS["narrow"], knobs, tiny_data)
    interrupted, failed, finished = api.requests
    assert "at epoch 3 of 3\nKeyboardInterrupt\n" in interrupted.fields["text"]
    assert "at epoch 3 of 3\nArithmeticError\n" in failed.fields["text"]
    assert f"best epoch: {run.result['best_epoch']} of 3\n" in finished.fields["caption"]


def test_a_training_without_credentials_says_once_at_its_start_what_to_set(api, config, tiny_data, monkeypatch):
    monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, api.url, 10))
    events = []

    class NoteStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            events.append(state.global_step)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: events.append(str(message))
        train_or_load(MODELS["narrow"], config, tiny_data, callbacks=(NoteStep(),))
        with pytest.raises(ArithmeticError):
            train_or_load(MODELS["wide"], config, tiny_data, callbacks=(NoteStep(), At(1, ArithmeticError())))
    (warning,) = {event for event in events if isinstance(event, str)}
    assert "Telegram: set TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in the environment, or as secrets" in warning
    assert events == [warning, *range(1, 2 * STEPS + 1), warning, 1]
    assert api.requests == []


@pytest.mark.usefixtures("in_environment", "impatient", "one_picture")
def test_a_telegram_that_does_not_answer_delays_the_end_by_no_more_than_the_deadline_and_is_one_warning(
    api, config, tiny_data, monkeypatch
):
    api.script = [hang] * 10
    trainer = StreamlinedTrainer(MODELS["narrow"](), replace(config, num_epochs=1), tiny_data)
    ends = []
    monkeypatch.setattr(trainer, "test", lambda: ends.append(time.monotonic()) or {"test_accuracy": 0.5})
    with pytest.warns(UserWarning, match="no answer within") as caught:
        trainer.train()
    assert [str(warning.message) for warning in caught] == [
        "Telegram: no answer within 0.4 seconds; the training goes on without it"
    ]
    assert time.monotonic() - ends[0] < 5  # a request alone may take ten seconds


def test_with_the_services_off_nothing_of_them_is_imported(config, tiny_data, monkeypatch):
    for name in ("lablib.telegram", "lablib.telegram.callback", "lablib.tracking", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    off = replace(config, use_telegram_notifications=False)
    result = experiment({"narrow": MODELS["narrow"]}, off, tiny_data, [0])
    assert not result.failures
    trainer = StreamlinedTrainer(MODELS["narrow"](), off, tiny_data)
    assert not [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ServiceCallback)]
    with pytest.raises(ModuleNotFoundError):
        StreamlinedTrainer(MODELS["narrow"](), config, tiny_data)


# An experiment


class Silent(StreamlinedTrainer):
    """A run of an experiment, which leaves the messages to the experiment."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if any(isinstance(callback, TelegramCallback) for callback in self.callback_handler.callbacks):
            raise AssertionError("a run of an experiment would send messages")


class FailsInTraining(MLP):
    def forward(self, images):
        raise ArithmeticError(f"no forward with {TOKEN}")


BROKEN = partial(FailsInTraining, (4,), image_shape=(1, 6, 6), num_classes=3)


def mean_of(result, name: str) -> str:
    values = list(result.values(name).values())
    return f"{100 * sum(values) / len(values):.2f}"


@pytest.mark.usefixtures("in_environment")
def test_an_experiment_sends_one_message_at_its_end(api, config, tiny_data):
    train_or_load(MODELS["wide"], replace(config, seed=1, use_telegram_notifications=False), tiny_data)
    knobs = replace(config, telegram_additional_info="info")
    with pytest.warns(UserWarning, match="the run of 'broken' with seed [01] failed"):
        result = experiment({**MODELS, "broken": BROKEN}, knobs, tiny_data, [0, 1], trainer_class=Silent)
    assert len(result.runs) == 4
    head, info, accuracies, failures = sent(api).split("\n\n")
    assert head.startswith("Experiment on tiny: finished\nruns: 4 trained, 0 loaded, 2 failed\nduration: ")
    title, narrow, wide = accuracies.split("\n")
    assert title == "test accuracy, mean over n seeds:"
    assert narrow.startswith(f"narrow: {mean_of(result, 'narrow')} ")
    assert wide.startswith(f"wide: {mean_of(result, 'wide')} ")
    assert "(n = 2" in narrow
    assert failures == "\n".join(f"failed: broken, seed {seed}: ArithmeticError: no forward with …" for seed in (0, 1))
    assert info == "info"
    assert min(size_of(api.requests[0].files["photo"][2])) > 300
    assert plt.get_fignums() == []


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_an_experiment_counts_what_was_loaded_and_is_silent_if_all_was(api, config, tiny_data):
    narrow = {"narrow": MODELS["narrow"]}
    experiment(narrow, config, tiny_data, [0])
    experiment(narrow, config, tiny_data, [0, 1])
    experiment(narrow, config, tiny_data, [0, 1])
    heads = [request.fields["caption"].split("\n")[1] for request in api.requests]
    assert heads == ["runs: 1 trained, 0 loaded, 0 failed", "runs: 1 trained, 1 loaded, 0 failed"]


@pytest.mark.usefixtures("in_environment")
def test_an_experiment_of_failures_only_is_told_too(api, config, tiny_data):
    with pytest.warns(UserWarning, match="failed"):
        experiment({"broken": lambda: 1 / 0}, config, tiny_data, [0])
    head, failures = sent(api).split("\n\n")
    assert "runs: 0 trained, 0 loaded, 1 failed\n" in head
    assert failures.startswith("failed: broken, seed 0: ZeroDivisionError")
    assert api.methods() == ["sendMessage"]


@pytest.mark.usefixtures("in_environment")
def test_each_run_is_told_if_asked_for(api, config, tiny_data):
    models = {"narrow": MODELS["narrow"], "broken": BROKEN}
    with pytest.warns(UserWarning, match="failed"):
        result = experiment(models, replace(config, telegram_every_run=True), tiny_data, [3], trainer_class=Silent)
    run = result.runs["narrow", 3]
    narrow, broken, end = (request.fields.get("text") or request.fields["caption"] for request in api.requests)
    assert narrow.split("\n")[:2] == ["narrow on tiny, seed 3: training finished", f"run: {run.path.name}"]
    assert f"test accuracy: {100 * run.result['test_accuracy']:.2f} %" in narrow
    assert api.requests[0].files["photo"][2] == learning_curves(run.history, "narrow on tiny, seed 3")
    assert broken.split("\n")[0] == "broken on tiny, seed 3: training failed"
    assert broken.split("\n")[2:] == [
        "at epoch 1 of 2",
        "ArithmeticError: no forward with …",
        "It can be started again; it has no checkpoint yet.",
    ]
    assert end.startswith("Experiment on tiny: finished\nruns: 1 trained, 0 loaded, 1 failed")


@pytest.mark.usefixtures("in_environment")
def test_an_interrupted_experiment_is_told_and_the_interruption_passes_through(api, config, tiny_data):
    class Interrupted(StreamlinedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.config.seed == 1:
                self.add_callback(At(STEPS + 1, KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        experiment({"narrow": MODELS["narrow"]}, config, tiny_data, [0, 1, 2], trainer_class=Interrupted)
    lines = sent(api).split("\n")
    assert lines[0] == "Experiment on tiny: interrupted"
    assert lines[1].startswith("1 of 3 runs are finished, after ")
    assert lines[2:] == [
        "narrow, seed 1: at epoch 2 of 2",
        "KeyboardInterrupt",
        "It can be resumed: started again, it loads the finished runs and goes on with the others.",
    ]


@pytest.mark.parametrize("every_run", [False, True])
def test_an_experiment_without_credentials_warns_once_for_all_its_runs(every_run, config, tiny_data):
    knobs = replace(config, num_epochs=1, telegram_every_run=every_run)
    with pytest.warns(UserWarning, match="Telegram") as caught:
        result = experiment({"narrow": MODELS["narrow"]}, knobs, tiny_data, [0, 1])
    assert len(result.runs) == 2
    (warning,) = caught
    assert "set TELEGRAM_BOT_TOKEN and TELEGRAM_CHAT_ID in the environment" in str(warning.message)


@pytest.mark.usefixtures("in_environment", "one_picture")
def test_an_experiment_that_can_not_send_warns_once_and_tries_no_more(api, config, tiny_data):
    api.script = [error(403, "Forbidden: bot was blocked by the user")] * 9
    knobs = replace(config, num_epochs=1, telegram_every_run=True)
    with pytest.warns(UserWarning, match="Telegram") as caught:
        result = experiment({"narrow": MODELS["narrow"]}, knobs, tiny_data, [0, 1])
    assert len(result.runs) == 2
    (warning,) = caught
    assert str(warning.message).startswith("Telegram: 403 Forbidden: bot was blocked by the user; ")
    assert str(warning.message).endswith("; the experiment goes on without it")
    assert len(api.requests) == 1


def test_the_picture_of_many_models_shows_the_best_in_validation(monkeypatch):
    def result(accuracies: list[float]):
        names = [f"model {number}" for number in range(len(accuracies))]
        rows = [{"model": name, "seed": 0, "epoch": epoch, "val_loss": 1 / epoch} for name in names for epoch in (1, 2)]
        return SimpleNamespace(
            runs=names,
            models=names,
            data=SimpleNamespace(name="tiny"),
            values=lambda name, key: {0: accuracies[names.index(name)]} if key == "val_accuracy" else None,
            histories=lambda: pd.DataFrame(rows),
        )

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure.axes[0]))
    messages.experiment_curves(result([number / 10 for number in (1, 9, 2, 8, 3, 7, 4, 6, 5, 0)]))
    messages.experiment_curves(result([0.5] * 8))
    labels = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn]
    assert labels[0] == [f"model {number} (n = 1)" for number in (1, 2, 3, 4, 5, 6, 7, 8)]
    assert messages.experiment_curves(SimpleNamespace(histories=pd.DataFrame)) is None  # figures of a record alone
    assert drawn[0].get_title() == "the 8 of 10 models with the best validation accuracy"
    assert len(labels[1]) == 8
    assert drawn[1].get_title() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (8040, "2 h 14 min"),
    ],
)
def test_a_duration_is_said_as_people_say_it(seconds, text):
    assert messages.duration(seconds) == text


def test_an_errors_long_message_is_cut_after_tokens_were_taken_out_of_it():
    text = messages.described(ValueError("x" * 485 + TOKEN + "." * 100))
    assert text == "ValueError: " + "x" * 485 + "…" + "." * 14 + "…"
