"""A training that is interrupted anywhere resumes from its newest usable checkpoint and ends bitwise the same."""

import math
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from outcomes import findings
from scripted import At, Scripted, press_ctrl_c
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import EarlyStoppingCallback, ViTConfig, ViTForImageClassification

from lablib import MLP, ResidualCNN, SimpleCNN, StreamlinedTrainer, TrainingConfig, train_or_load
from lablib import trainer as trainer_module
from lablib.checkpoints import Interruption, checkpoints_in, load_checkpoint, save_checkpoint
from lablib.identity import build_seeded
from lablib.metrics import BatchMeter, means

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
tiny_cnn = partial(SimpleCNN, 1, 4, (1, 6, 6), 3)
vit = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "image_size": 6}
tiny_vit = partial(ViTForImageClassification, ViTConfig(**vit, patch_size=3, num_channels=1, num_labels=3))


@pytest.fixture
def config(tmp_path):
    knobs = {"num_epochs": 3, "batch_size": 8, "validation_split": 0.25, "lr_schedule": "cosine"}
    return partial(TrainingConfig, **knobs, device="cpu", output_dir=str(tmp_path / "runs"))


@pytest.fixture
def build(config, tiny_data, tmp_path):
    """A trainer whose checkpoints lie in `tmp_path / name`."""

    def build(name: str, *callbacks, trainer_class=StreamlinedTrainer, model=tiny_mlp, between=60.0, **knobs):
        more = {"callbacks": callbacks, "checkpoint_dir": str(tmp_path / name)}
        trainer = trainer_class(build_seeded(model, 0), config=config(**knobs), data=tiny_data, **more)
        trainer.seconds_between_epochs = between
        return trainer

    return build


def stopped(build, *steps: int, **more) -> list[Path]:
    """Interrupt one training at steps, one after another; its checkpoints, newest first."""
    for number, step in enumerate(steps):
        trainer = build("interrupted", At(step, press_ctrl_c), **more)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=number > 0)
    return checkpoints_in(Path(trainer.args.output_dir))


def trained(build, name: str, *callbacks, **more):
    trainer = build(name, *callbacks, **more)
    torch.rand(7)
    trainer.train(resume_from_checkpoint=name == "interrupted")
    return trainer


class Repeated(nn.Module):
    """One block three times, a transposed weight, and channels-last convolutions."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList([nn.Linear(64, 64)] * 3)
        self.classifier = nn.Parameter(torch.randn(3, 64).T)

    def forward(self, images):
        x = self.convolution(images).relu().flatten(1)
        for block in self.blocks:
            x = x + block(x).relu()
        return x @ self.classifier


class Scaled(StreamlinedTrainer):
    """Scales its loss as fp16 on a GPU does; the scale grows until gradients overflow, and such a step is skipped."""

    def create_optimizer(self, model=None):
        self._scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_factor=16, growth_interval=2)
        return super().create_optimizer(model)


class Custom(StreamlinedTrainer):
    """Draws its images by weight, has another schedule, and sets and unfreezes weights as training and epochs begin."""

    def __init__(self, model, **arguments):
        super().__init__(model.requires_grad_(False), **arguments)
        model.classifier.requires_grad_(True)
        weight, acting = model.classifier.weight, At(None, lambda: None)
        acting.on_train_begin = lambda *more, **kw: [nn.init.ones_(weight), None][1]

        def begin_epoch(args, state, *more, **kw):
            weight.data /= 2
            model.requires_grad_(state.epoch >= 1).classifier.requires_grad_(True)

        acting.on_epoch_begin = begin_epoch
        self.add_callback(acting)

    def epoch_order(self, epoch):
        generator = torch.Generator().manual_seed(epoch)
        return torch.multinomial(torch.arange(27) + 1.0, 27, replacement=True, generator=generator)

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = OneCycleLR(self.optimizer, 0.1, num_training_steps)


class OnceInfinite(Scaled):
    def losses(self, outputs, labels):
        is_second_step = self.model.training and self.state.global_step == 1
        return {"loss": super().losses(outputs, labels)["loss"] * (math.inf if is_second_step else 1)}


class TwicePatient(Scripted):
    """Has a second early stopping."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(EarlyStoppingCallback(4))


def test_a_step_that_loss_scaling_skips_changes_no_weights_and_is_no_non_finite_loss(build):
    weights = []
    noting = At(None, lambda: weights.append(trainer.model.classifier.weight.tolist()))
    trainer = build("undisturbed", noting, trainer_class=OnceInfinite)
    trainer.train()
    assert weights[0] == weights[1] != weights[2]
    assert all(math.isfinite(row["train_loss"]) for row in trainer.history)


PATIENT = {"num_epochs": 6, "early_stopping_patience": 2, "trainer_class": Scripted}


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        (range(1, 3 * STEPS), {}),
        ((3 * STEPS,), {"optimizer": "sgd"}),
        ((STEPS + 1,), {"model": Repeated}),
        ((STEPS + 1,), {"model": tiny_cnn, "optimizer": "sgd"}),
        ((STEPS + 1,), {"model": tiny_vit}),
        ((STEPS + 1,), {"model": partial(ResidualCNN, 1, 4, (1, 6, 6), 3), "precision": "bf16"}),
        ((STEPS + 2,), {"trainer_class": Scaled}),
        ((2, STEPS, STEPS + 2), {"trainer_class": Custom}),
        ((STEPS + 1, 3 * STEPS + 2), PATIENT),
        ((4 * STEPS,), PATIENT),
        ((STEPS + 1, 3 * STEPS + 2), PATIENT | {"trainer_class": TwicePatient}),
    ],
)
def test_ctrl_c_ends_the_step_with_a_checkpoint_and_the_resumed_training_ends_bitwise_the_same(steps, more, build):
    assert stopped(build, *steps, **more)[0].name == f"checkpoint-{steps[-1]}.pt"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    begun = []
    noting = [At(number, partial(begun.append, number)) for number in range(1, 6 * STEPS)]
    whole, resumed = trained(build, "undisturbed", **more), trained(build, "interrupted", *noting, **more)
    assert begun == [*range(steps[-1] + 1, whole.state.global_step + 1)]
    assert findings(resumed) == findings(whole)
    if more is PATIENT:
        assert len(findings(resumed)[0]) == 4  # two epochs after the best one
        assert resumed.evaluate()["eval_loss"] == findings(whole)[0][1]["val_loss"]


@pytest.mark.parametrize(("within", "expected"), [(300, [8]), (50, [5, 10]), (1e-9, [1, 2, 3, 5, 6, 7, 9, 10, 11])])
def test_checkpoints_are_written_by_the_clock_and_at_an_epochs_end_after_a_minute(within, expected, build, monkeypatch):
    written, clock = [], SimpleNamespace(seconds=0, monotonic=lambda: clock.seconds)
    monkeypatch.setattr(trainer_module, "time", clock)
    callback = At(None, lambda: setattr(clock, "seconds", clock.seconds + 10))
    callback.on_optimizer_step = lambda _, state, control, **kw: setattr(control, "should_save", state.epoch % 1 > 0.7)
    callback.on_save = lambda args, state, control, **kwargs: written.append(state.global_step)
    trainer = trained(build, "undisturbed", callback, checkpoint_seconds=within)
    assert written == expected
    kept = checkpoints_in(Path(trainer.args.output_dir))
    assert [path.name for path in kept] == [f"checkpoint-{step}.pt" for step in written[:-3:-1]]


def test_the_measurements_of_half_an_epoch_come_back_as_they_were():
    whole, half, other = BatchMeter(), BatchMeter(), BatchMeter()
    for number in range(200):
        if number == 100:
            other.restore(half.batches().to_dict("list"), torch.device("cpu"))
        losses = {"loss": torch.tensor(1 / (number + 1)), "soft_loss": torch.tensor(3 / (number + 1))}
        for meter in (whole, half if number < 100 else other):
            meter.add(losses, torch.eye(3), torch.tensor([0, 1, number % 3]))
    assert other.batches().equals(whole.batches())
    (meter := BatchMeter()).add({"loss": torch.tensor(1.0).bfloat16()}, torch.eye(2)[[1] + [0] * 511], torch.zeros(512))
    assert means(meter.batches())["accuracy"] == 511 / 512  # in bfloat16, as the loss, it would be 1


def test_sigterm_ends_the_step_with_a_checkpoint_and_then_does_what_it_does(build, tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.extend(checkpoints_in(tmp_path / "here")))
    try:
        with pytest.raises(SystemExit) as caught:
            build("here", At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert [path.name for path in received] == ["checkpoint-2.pt"]


@pytest.mark.parametrize(("times", "parent"), [(1, None), (2, None), (2, os.getppid())])
def test_a_second_signal_waits_in_workers_only_and_one_that_nobody_acted_upon_is_not_lost(times, parent, monkeypatch):
    monkeypatch.setattr(Interruption, "parent", parent)
    reached = []
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:  # noqa: PT012
        for _ in range(times):
            press_ctrl_c()
            reached.append(interruption.asked)
        reached.append("the end")
    assert reached == ([True] if times == 2 and not parent else [True] * times + ["the end"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored_and_another_thread_handles_none(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press_ctrl_c()
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(threading, "main_thread", lambda: None)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("damage", [lambda c: c[:-9] + bytes([c[-9] ^ 1]) + c[-8:], lambda c: c[: len(c) // 2]])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, build):
    newest, _ = stopped(build, STEPS + 1, between=0.0)
    newest.write_bytes(damage(newest.read_bytes()))
    words = r"checkpoint-5.pt cannot be loaded: ValueError: it does not match its checksum"
    with pytest.raises(OSError, match=words):
        build("interrupted").train(resume_from_checkpoint=newest)
    with pytest.warns(UserWarning, match=words):
        resumed = trained(build, "interrupted")
    assert findings(resumed) == findings(trained(build, "undisturbed"))


def test_a_checkpoint_of_weights_in_another_memory_format_resumes_as_one_in_the_same(build):
    last_is_best = {"early_stopping_metric": "loss", "learning_rate": 0.01}
    stopped(build, STEPS + 1, model=lambda: tiny_cnn().to(memory_format=torch.channels_last), **last_is_best)
    resumed, whole = (trained(build, name, model=tiny_cnn, **last_is_best) for name in ("interrupted", "undisturbed"))
    assert whole.state.best_global_step == 3 * STEPS
    for weights, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(weights, expected, rtol=0, atol=3e-4)  # mixed up they differ by 2e-3


def test_the_seconds_of_a_resumed_training_do_not_include_the_pause(build):
    slow, began = At(STEPS + 1, partial(time.sleep, 0.2)), time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", slow, At(STEPS + 2, press_ctrl_c)).train()
    time.sleep(0.3)
    seconds = [row["seconds"] for row in trained(build, "interrupted").history]
    assert seconds[1] - seconds[0] >= 0.2
    assert seconds[1] < seconds[2] <= time.perf_counter() - began - 0.3


def test_a_new_training_in_the_same_folder_is_not_taken_for_an_older_one(build):
    trained(build, "interrupted", between=0.0)
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", At(2, press_ctrl_c)).train()
    (kept,) = checkpoints_in(Path(build("interrupted").args.output_dir))
    assert kept.name == "checkpoint-2.pt"
    assert findings(trained(build, "interrupted")) == findings(trained(build, "undisturbed"))


def test_a_callbacks_wish_to_stop_waits_for_the_end_of_the_epoch_also_after_a_resume(build):
    def stop(args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 1

    (stopping := At(1, None)).on_step_end = stop
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", stopping, At(2, press_ctrl_c)).train()
    resumed, whole = (trained(build, name, stopping) for name in ("interrupted", "undisturbed"))
    assert findings(resumed) == findings(whole)
    assert whole.state.global_step == STEPS


def test_a_planted_pickle_is_not_executed(build, tmp_path):
    (planted,), touch = stopped(build, 1), (Path.touch, (tmp_path / "executed",))
    malicious = type("Malicious", (), {"__reduce__": lambda self: touch})()
    save_checkpoint(planted, load_checkpoint(planted) | {"optimizer": malicious})
    with pytest.raises(OSError, match="Weights only load failed"):
        build("interrupted").train(resume_from_checkpoint=planted)
    assert not (tmp_path / "executed").exists()


def test_the_newest_two_checkpoints_stay_by_number(tmp_path):
    for step in (8, 9, 10, 100, 100):
        save_checkpoint(tmp_path / f"checkpoint-{step}.pt", {"step": step})
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-100.pt", "checkpoint-10.pt"]


def test_another_setting_is_named(build):
    stopped(build, 2, num_epochs=2, weight_decay=0.1)
    words = "resumed at step 2 with another num_epochs, weight_decay;"
    with pytest.warns(UserWarning, match=words):
        trained(build, "interrupted")


def test_another_version_is_said_once_and_noted_in_the_result(config, tiny_data, monkeypatch):
    def interrupted_at(step: int):
        with pytest.raises(KeyboardInterrupt):
            train_or_load(tiny_mlp, config(), tiny_data, callbacks=(At(step, press_ctrl_c),))

    interrupted_at(2)
    monkeypatch.setattr(trainer_module, "version", lambda name: "9.9")
    with pytest.warns(UserWarning, match=r"resumed at step 2 with another torch, transformers; the result will carry"):
        interrupted_at(STEPS + 1)
    (note,) = train_or_load(tiny_mlp, config(), tiny_data).result["notes"]
    assert note == "resumed at step 2 with another torch, transformers"
