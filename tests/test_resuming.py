"""A training that is interrupted anywhere resumes from its newest usable checkpoint and ends bitwise the same."""

import errno
import json
import os
import signal
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from lablib import MLP, KnowledgeDistillationTrainer, StreamlinedTrainer, TrainingConfig, resuming
from lablib.checkpoints import UNFINISHED, DamagedCheckpointError, Interruption, checkpoints_in, seal, verify
from lablib.identity import build_seeded
from lablib.metrics import BatchMeter, history
from lablib.runs import train_or_load

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
distilling = partial(KnowledgeDistillationTrainer, teacher=build_seeded(tiny_mlp, 9), temperature=3.0, alpha=0.5)


@pytest.fixture
def config(tmp_path):
    knobs = {"num_epochs": 3, "batch_size": 8, "validation_split": 0.25, "lr_schedule": "cosine"}
    return partial(TrainingConfig, **knobs, device="cpu", output_dir=str(tmp_path / "runs"))


@pytest.fixture
def build(config, tiny_data, tmp_path):
    """A trainer whose checkpoints lie in `tmp_path / name`."""

    def build(name: str, *callbacks, trainer_class=StreamlinedTrainer, model=tiny_mlp, **knobs):
        more = {"callbacks": callbacks, "checkpoint_dir": str(tmp_path / name)}
        return trainer_class(build_seeded(model, 0), config=config(**knobs), data=tiny_data, **more)

    return build


class At(TrainerCallback):
    """Does something at the end of a step; part of no run's identity."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def __identity__(self):
        return None

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def findings(trainer) -> tuple:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history(trainer.state.log_history)]
    return rows, {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}


def stopped(build, *steps: int, **more) -> list[Path]:
    """Interrupt one training at steps, one after another; its checkpoints, newest first."""
    for number, step in enumerate(steps):
        trainer = build("interrupted", At(step, press_ctrl_c), **more)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=number > 0)
    return checkpoints_in(Path(trainer.args.output_dir))


def resumed(build, *callbacks, **more):
    torch.rand(7)
    trainer = build("interrupted", *callbacks, **more)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def undisturbed(build, **more):
    trainer = build("undisturbed", **more)
    trainer.train()
    return trainer


class Repeated(nn.Module):
    """One block three times, a transposed weight, an expanded buffer, and channels-last convolutions."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList([nn.Linear(64, 64)] * 3)
        self.classifier = nn.Parameter(torch.randn(3, 64).T)
        self.spread = nn.Parameter(torch.randn(1, 64).expand(2, 64))
        self.register_buffer("scale", torch.ones(1).expand(64))

    def forward(self, images):
        x = self.convolution(images).relu().flatten(1)
        for block in self.blocks:
            x = x + block(x).relu() * self.scale
        return (x + self.spread.sum(0)) @ self.classifier


class Scripted(StreamlinedTrainer):
    """Its validation accuracy is best in the second epoch."""

    def _evaluated(self, prediction):
        return super()._evaluated(prediction) | {"accuracy": 0.9 if round(self.state.epoch) == 2 else 0.5}


ACCUMULATING = {"training_arguments": {"gradient_accumulation_steps": 3}}
STOPPING = {"num_epochs": 6, "early_stopping_patience": 2, "early_stopping_metric": "accuracy"}
PATIENT = {**STOPPING, "trainer_class": Scripted}


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        *[((step,), {}) for step in (1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3)],
        *[((step,), {"trainer_class": distilling}) for step in (1, STEPS, 2 * STEPS + 3)],
        (range(1, 3 * STEPS), {}),
        ((3,), ACCUMULATING),
        ((STEPS + 1,), {"model": Repeated}),
        ((STEPS + 1, 3 * STEPS + 2), PATIENT),
        ((4 * STEPS,), PATIENT),
    ],
)
def test_ctrl_c_ends_the_step_with_a_checkpoint_and_the_resumed_training_ends_bitwise_the_same(steps, more, build):
    assert stopped(build, *steps, **more)[0].name == f"checkpoint-{steps[-1]}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    begun = []
    noting = [At(number, partial(begun.append, number)) for number in range(1, 6 * STEPS)]
    whole, trainer = undisturbed(build, **more), resumed(build, *noting, **more)
    assert begun == [*range(steps[-1] + 1, whole.state.global_step + 1)]
    assert findings(trainer) == findings(whole)
    if more is PATIENT:
        assert len(findings(trainer)[0]) == 4  # two epochs after the best one
        assert trainer.evaluate()["eval_loss"] == findings(whole)[0][1]["val_loss"]
    if more.get("model") is Repeated:
        assert trainer.model.blocks[0] is trainer.model.blocks[2]


def test_the_two_newest_are_kept_and_each_has_all_that_it_needs(build):
    newest, before = stopped(build, 2 * STEPS + 2)
    assert [newest.name, before.name] == [f"checkpoint-{2 * STEPS + 2}", f"checkpoint-{2 * STEPS}"]
    verify(newest), verify(before)
    assert (newest / "best_model.safetensors").exists()


@pytest.mark.parametrize(("batches", "cut"), [(8, 5), (8, 0), (65, 64), (200, 100)])
def test_the_measurements_of_half_an_epoch_come_back_as_they_were(batches, cut):
    def add(meter, numbers):
        for number in numbers:
            loss = torch.tensor(1 / number)
            meter.add({"loss": loss, "soft_loss": loss / 3}, torch.eye(3) * number, torch.tensor([0, 1, number % 3]))

    whole, half, other = BatchMeter(), BatchMeter(), BatchMeter()
    add(whole, range(1, batches + 1))
    add(half, range(1, cut + 1))
    other.restore(json.loads(json.dumps(half.state())))
    add(other, range(cut + 1, batches + 1))
    assert other.means() == whole.means()
    assert len(other) == batches


def test_within_an_epoch_there_is_one_every_so_many_seconds_and_fewer_if_that_costs_too_much(monkeypatch):
    clock = SimpleNamespace(time=0.0)
    monkeypatch.setattr(resuming.time, "monotonic", lambda: clock.time)
    callback = resuming._CheckpointCallback(Interruption(), seconds=300)
    args, control = SimpleNamespace(world_size=1), SimpleNamespace()

    def asks(at: float, epoch: float = 0.5) -> bool:
        clock.time, control.should_save = at, False
        callback.on_step_end(args, SimpleNamespace(epoch=epoch, global_step=1), control)
        return control.should_save

    callback.on_train_begin(args, SimpleNamespace(best_global_step=None), control)
    assert not asks(299)
    assert asks(301)
    clock.time = 301 + 10  # it takes ten seconds: a hundredth of a thousand
    callback.on_save(args, None, control)
    assert not asks(311 + 999)
    assert not asks(311 + 1001, epoch=1.0)  # the epoch's own comes at its end
    assert asks(311 + 1001)


def test_checkpoint_seconds_is_what_the_trainer_goes_by(build, tmp_path):
    seen = []
    build("here", At(2, lambda: seen.extend(checkpoints_in(tmp_path / "here"))), checkpoint_seconds=1e-9).train()
    assert [path.name for path in seen] == ["checkpoint-1"]


def test_sigterm_ends_the_step_with_a_checkpoint_and_then_does_what_it_does(build, tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.extend(checkpoints_in(tmp_path / "here")))
    try:
        with pytest.raises(SystemExit) as caught:
            build("here", At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert [path.name for path in received] == ["checkpoint-2"]


def test_a_second_signal_does_not_wait_and_a_first_that_nobody_acted_upon_is_not_lost():
    reached = []

    def impatient():
        with Interruption() as interruption:
            press_ctrl_c()
            reached.append(interruption.asked)
            press_ctrl_c()
            reached.append("too far")

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert reached == [True]
    with pytest.raises(KeyboardInterrupt), Interruption():
        press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored_and_another_thread_handles_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press_ctrl_c()
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)
    handlers = []

    def enter():
        with Interruption():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_planted_pickle_is_not_executed_and_the_checkpoint_before_is_used(name, build, tmp_path):
    newest = stopped(build, STEPS + 1)[0]
    torch.save(Malicious(tmp_path / "executed"), newest / name)
    (newest / "manifest.json").unlink()
    newest.rename(newest.parent / UNFINISHED / newest.name)
    seal(newest, keep=2)
    with pytest.warns(UserWarning, match=rf"{newest.name} cannot be used: .*cannot be loaded: UnpicklingError"):
        trainer = resumed(build)
    assert (tmp_path / "set-aside" / f"{newest.name}-1").is_dir()
    assert not (tmp_path / "executed").exists()
    assert findings(trainer) == findings(undisturbed(build))


def test_a_checkpoint_of_another_architecture_is_set_aside(build):
    stopped(build, 1)
    wider = build("interrupted", model=partial(MLP, (9,), image_shape=(1, 6, 6), num_classes=3))
    with pytest.warns(UserWarning, match=r"model.safetensors holds the weights of another architecture"):
        assert wider.newest_checkpoint() is None
    with pytest.raises(ValueError, match=r"there is no checkpoint in .* to resume from; train without resuming"):
        wider.train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(build):
    checkpoint = stopped(build, 1)[0]
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"cannot be read: .*optimizer.pt"):
        build("interrupted").train(resume_from_checkpoint=str(checkpoint))


def test_a_disk_that_is_full_stops_the_training_and_leaves_the_checkpoints_before(build, monkeypatch):
    trainer = build("interrupted")
    save = torch.save

    def full(content, path, *args, **kwargs):
        if trainer.state.global_step == 2 * STEPS:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-8 could not be written .*file write failed") as caught:
            trainer.train()
    assert caught.value.errno == errno.EIO
    assert [path.name for path in Path(trainer.args.output_dir).iterdir()] == [f"checkpoint-{STEPS}"]
    assert findings(resumed(build)) == findings(undisturbed(build))
    monkeypatch.setattr("lablib.checkpoints.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=r"1 MiB are free, but this training writes up to 3.*MiB"):
        build("here").train()


def test_an_error_in_writing_that_is_not_about_the_disk_stays_what_it_is(build):
    class Unwritable(StreamlinedTrainer):
        def progress(self):
            raise RuntimeError("no progress today")

    trainer = build("here", trainer_class=Unwritable)
    with pytest.raises(RuntimeError, match=r"^no progress today$"):
        trainer.train()
    assert [*Path(trainer.args.output_dir).iterdir()] == []


def test_another_version_is_said_once_and_noted_in_the_result(config, tiny_data, monkeypatch):
    def interrupted_at(step: int):
        with pytest.raises(KeyboardInterrupt):
            train_or_load(tiny_mlp, config(), tiny_data, callbacks=(At(step, press_ctrl_c),))

    interrupted_at(2)
    monkeypatch.setattr(resuming, "version", lambda name: "9.9")
    with pytest.warns(UserWarning, match=r"at step 2 with torch 9.9, .*, begun with torch .*; the result will carry"):
        interrupted_at(STEPS + 1)
    (note,) = train_or_load(tiny_mlp, config(), tiny_data).result["notes"]
    assert note.startswith("resumed at step 2 with torch 9.9, transformers 9.9, begun with torch ")


def test_another_number_of_processes_and_precision_resume_with_what_all_have_measured_and_a_note(build, monkeypatch):
    checkpoint = stopped(build, 1)[0]
    saved = json.loads((checkpoint / "lablib_0.json").read_text())
    saved["environment"] |= {"processes": "2", "precision": "bf16"}
    for process in (0, 1):
        (checkpoint / f"lablib_{process}.json").write_text(json.dumps(saved))
    monkeypatch.setattr("lablib.checkpoints.verify", lambda checkpoint: None)
    trainer = build("interrupted")
    with pytest.warns(UserWarning, match="with precision fp32, processes 1, begun with precision bf16, processes 2"):
        trainer._restore(*trainer._load(checkpoint))
    assert trainer.progress()["measured"] == saved["progress"]["measured"]  # which is that of all processes
