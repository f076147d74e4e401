"""A training that is interrupted anywhere goes on from its newest usable checkpoint and ends bitwise the same."""

import errno
import gc
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
from lablib.checkpoints import DamagedCheckpointError, Interruption, checkpoints_in, seal, verify
from lablib.identity import build_seeded
from lablib.metrics import BatchMeter, history
from lablib.runs import train_or_load

STEPS = 4  # an epoch: 27 of tiny_data's 36 images in batches of 8
tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
distilling = partial(KnowledgeDistillationTrainer, teacher=build_seeded(tiny_mlp, 9), temperature=3.0, alpha=0.5)


@pytest.fixture
def config(tmp_path):
    return TrainingConfig(
        num_epochs=3,
        batch_size=8,
        validation_split=0.25,
        device="cpu",
        lr_schedule="cosine",
        output_dir=str(tmp_path / "runs"),
    )


@pytest.fixture
def build(config, tiny_data, tmp_path):
    """A trainer whose checkpoints lie in `tmp_path / name`."""

    def build(name: str, *callbacks, trainer_class=StreamlinedTrainer, model=tiny_mlp, knobs=config):
        folder = str(tmp_path / name)
        network = build_seeded(model, 0)
        return trainer_class(network, config=knobs, data=tiny_data, callbacks=callbacks, checkpoint_dir=folder)

    return build


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def findings(trainer) -> tuple:
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history(trainer.state.log_history)]
    return rows, {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}


def steps(name: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in checkpoints_in(name)]


def seal_again(checkpoint: Path):
    """Make a changed checkpoint one that passes verification."""
    (checkpoint / "manifest.json").unlink()
    (checkpoint.parent / "unfinished").mkdir(exist_ok=True)
    checkpoint.rename(checkpoint.parent / "unfinished" / checkpoint.name)
    seal(checkpoint, keep=2)


# Going on


@pytest.mark.parametrize("trainer_class", [StreamlinedTrainer, distilling], ids=["plain", "distilling"])
@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 3])
def test_ctrl_c_ends_the_step_with_a_checkpoint_and_the_training_goes_on_from_there(
    step, trainer_class, build, tmp_path
):
    undisturbed = build("undisturbed", trainer_class=trainer_class)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", At(step, press_ctrl_c), trainer_class=trainer_class).train()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert steps(tmp_path / "interrupted")[0] == step
    begun = []
    torch.rand(7)
    noting = [At(number, partial(begun.append, number)) for number in range(1, 3 * STEPS + 1)]
    resumed = build("interrupted", *noting, trainer_class=trainer_class)
    resumed.train(resume_from_checkpoint=True)
    assert begun == list(range(step + 1, 3 * STEPS + 1))
    assert findings(resumed) == findings(undisturbed)


def test_with_several_batches_a_step_it_goes_on_from_a_step(build, config, tmp_path):
    knobs = TrainingConfig(**{**vars(config), "training_arguments": {"gradient_accumulation_steps": 3}})
    undisturbed = build("undisturbed", knobs=knobs)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", At(3, press_ctrl_c), knobs=knobs).train()
    resumed = build("interrupted", knobs=knobs)
    resumed.train(resume_from_checkpoint=True)
    assert findings(resumed) == findings(undisturbed)


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


def test_weights_that_are_shared_or_strided_are_trained_saved_and_resumed(build, tmp_path):
    undisturbed = build("undisturbed", model=Repeated)
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", At(STEPS + 1, press_ctrl_c), model=Repeated).train()
    resumed = build("interrupted", model=Repeated)
    resumed.train(resume_from_checkpoint=True)
    assert findings(resumed) == findings(undisturbed)
    assert resumed.model.blocks[0] is resumed.model.blocks[2]


def test_a_run_of_shared_weights_is_saved_and_loaded(config, tiny_data):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Flatten(), *[nn.Linear(36, 36)] * 2, nn.Linear(36, 3))

        def forward(self, images):
            return self.layers(images)

    run = train_or_load(Shared, config, tiny_data)
    weights = run.load_weights(Shared()).state_dict()
    assert torch.equal(weights["layers.1.weight"], weights["layers.2.weight"])


def test_after_many_interruptions_it_is_still_the_same(build, tmp_path):
    undisturbed = build("undisturbed")
    undisturbed.train()
    for step in range(1, 3 * STEPS):
        trainer = build("interrupted", At(step, press_ctrl_c))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=step > 1)
    resumed = build("interrupted")
    resumed.train(resume_from_checkpoint=True)
    assert findings(resumed) == findings(undisturbed)


def test_the_two_newest_are_kept_and_each_has_all_that_it_needs(build, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build("interrupted", At(2 * STEPS + 2, press_ctrl_c)).train()
    assert steps(tmp_path / "interrupted") == [2 * STEPS + 2, 2 * STEPS]
    newest, before = checkpoints_in(tmp_path / "interrupted")
    verify(newest), verify(before)
    assert (newest / "best_model.safetensors").exists()


def test_there_is_one_at_each_epochs_end(build, tmp_path):
    seen = []
    look = [At(number, lambda: seen.append(steps(tmp_path / "here"))) for number in (1, STEPS + 1, 2 * STEPS + 1)]
    build("here", *look).train()
    assert seen == [[], [STEPS], [2 * STEPS, STEPS]]


@pytest.mark.parametrize(("batches", "cut"), [(8, 5), (65, 64), (200, 100)])
def test_the_measurements_of_half_an_epoch_come_back_as_they_were(batches, cut):
    def add(meter, numbers):
        for number in numbers:
            loss = torch.tensor(1 / number)
            meter.add({"loss": loss, "soft_loss": loss / 3}, torch.eye(3) * number, torch.tensor([0, 1, number % 3]))

    whole, half = BatchMeter(), BatchMeter()
    add(whole, range(1, batches + 1))
    add(half, range(1, cut + 1))
    other = BatchMeter()
    other.restore(json.loads(json.dumps(half.state())))
    add(other, range(cut + 1, batches + 1))
    assert other.means() == whole.means()
    assert whole.losses()["loss"].tolist() == [
        torch.tensor(1 / number).double().item() for number in range(1, batches + 1)
    ]
    assert len(other) == batches
    empty = BatchMeter()
    empty.restore(json.loads(json.dumps(BatchMeter().state())))
    assert len(empty) == 0


def test_the_measurements_of_many_batches_are_few_tensors():
    def tensors() -> int:
        return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())

    meter, logits, labels = BatchMeter(), torch.eye(3), torch.tensor([0, 1, 2])
    before = tensors()
    for _ in range(1000):
        meter.add({"loss": torch.tensor(0.5)}, logits, labels)
    assert tensors() - before < 200
    assert meter.means() == {"loss": 0.5, "accuracy": 1.0}


# When


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now.time)
    return now


def test_within_an_epoch_there_is_one_every_so_many_seconds_and_fewer_if_that_costs_too_much(clock):
    callback = resuming._CheckpointCallback(Interruption(), seconds=300)
    args, control = SimpleNamespace(world_size=1), SimpleNamespace(should_save=False)

    def asks(at: float, epoch: float = 0.5) -> bool:
        clock.time, control.should_save = at, False
        callback.on_step_end(args, SimpleNamespace(epoch=epoch, global_step=1), control)
        return control.should_save

    callback.on_train_begin(args, None, control)
    assert not asks(299)
    assert asks(301)
    clock.time = 301 + 10  # it takes ten seconds: a hundredth of a thousand
    callback.on_save(args, None, control)
    assert not asks(311 + 999)
    assert not asks(311 + 1001, epoch=1.0)  # the epoch's own comes at its end
    assert asks(311 + 1001)


def test_checkpoint_seconds_is_what_the_trainer_goes_by(build, config, tmp_path):
    knobs = TrainingConfig(**{**vars(config), "checkpoint_seconds": 1e-9})
    seen = []
    build("here", At(2, lambda: seen.append(steps(tmp_path / "here"))), knobs=knobs).train()
    assert seen == [[1]]


# Leaving


def test_sigterm_ends_the_step_with_a_checkpoint_and_then_does_what_it_does(build, tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(steps(tmp_path / "here")))
    try:
        with pytest.raises(SystemExit) as caught:
            build("here", At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))).train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 128 + signal.SIGTERM
    assert received == [[2]]


def test_a_second_ctrl_c_does_not_wait():
    def impatient():
        with Interruption() as interruption:
            press_ctrl_c()
            assert interruption.asked
            press_ctrl_c()
            raise AssertionError("it waits")

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interruption_that_nobody_acted_upon_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Interruption():
        press_ctrl_c()


def test_an_ignored_signal_stays_ignored_and_another_thread_handles_none():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            press_ctrl_c()
            assert not interruption.asked
    finally:
        signal.signal(signal.SIGINT, before)

    def enter():
        with Interruption():
            handlers.append(signal.getsignal(signal.SIGINT))

    handlers = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


# What cannot be used


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_planted_pickle_is_not_executed(name, build, tmp_path):
    undisturbed = build("undisturbed")
    undisturbed.train()
    with pytest.raises(KeyboardInterrupt):
        build("here", At(STEPS + 1, press_ctrl_c)).train()
    newest = checkpoints_in(tmp_path / "here")[0]
    torch.save(Malicious(tmp_path / "executed"), newest / name)
    seal_again(newest)
    resumed = build("here")
    if name == "training_args.bin":  # nobody reads it
        resumed.train(resume_from_checkpoint=True)
    else:
        with pytest.warns(UserWarning, match=rf"{newest.name} cannot be used: .*cannot be loaded: UnpicklingError"):
            resumed.train(resume_from_checkpoint=True)
        assert (tmp_path / "set-aside" / f"{newest.name}-1").is_dir()
    assert not (tmp_path / "executed").exists()
    assert findings(resumed) == findings(undisturbed)


def test_a_checkpoint_of_another_architecture_is_set_aside(build, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build("here", At(1, press_ctrl_c)).train()
    wider = build("here", model=partial(MLP, (9,), image_shape=(1, 6, 6), num_classes=3))
    with pytest.warns(UserWarning, match=r"model.safetensors holds the weights of another architecture"):
        assert wider.newest_checkpoint() is None
    assert (tmp_path / "set-aside" / "checkpoint-1-1").is_dir()


def test_without_a_checkpoint_to_go_on_from_it_says_so(build, tmp_path):
    with pytest.raises(ValueError, match=r"there is no checkpoint in .*here to go on from; train without resuming"):
        build("here").train(resume_from_checkpoint=True)


def test_a_damaged_checkpoint_that_is_asked_for_by_name_is_refused(build, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build("here", At(1, press_ctrl_c)).train()
    checkpoint = tmp_path / "here" / "checkpoint-1"
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"optimizer.pt is missing"):
        build("here").train(resume_from_checkpoint=str(checkpoint))


def test_another_number_of_processes_goes_on_with_what_all_have_measured_and_a_note(build, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build("here", At(1, press_ctrl_c)).train()
    checkpoint = tmp_path / "here" / "checkpoint-1"
    saved = json.loads((checkpoint / "lablib_0.json").read_text())
    saved["environment"]["processes"] = "2"
    for process in (0, 1):
        (checkpoint / f"lablib_{process}.json").write_text(json.dumps(saved))
    trainer = build("here")
    with pytest.warns(UserWarning, match=r"resumed at step 1 with processes 1, begun with processes 2"):
        trainer._restore(checkpoint)
    before, after = saved["progress"]["measured"], trainer.progress()["measured"]
    assert after["sizes"] == [2 * size for size in before["sizes"]]
    assert after["correct"] == [2 * hits for hits in before["correct"]]
    assert after["losses"] == before["losses"]


def test_a_disk_that_is_full_stops_the_training_and_leaves_the_checkpoints_before(build, tmp_path, monkeypatch):
    undisturbed = build("undisturbed")
    undisturbed.train()
    trainer = build("here")
    save = torch.save

    def full(content, path, *args, **kwargs):
        if trainer.state.global_step == 2 * STEPS:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(content, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint-8 could not be written .*file write failed.* of room") as caught:
            trainer.train()
    assert caught.value.errno == errno.EIO
    assert [path.name for path in (tmp_path / "here").iterdir()] == [f"checkpoint-{STEPS}"]
    resumed = build("here")
    resumed.train(resume_from_checkpoint=True)
    assert findings(resumed) == findings(undisturbed)


def test_an_error_in_writing_that_is_not_about_the_disk_stays_what_it_is(build, monkeypatch):
    class Unwritable(StreamlinedTrainer):
        def progress(self):
            raise RuntimeError("no progress today")

    trainer = build("here", trainer_class=Unwritable)
    with pytest.raises(RuntimeError, match=r"^no progress today$"):
        trainer.train()
    assert list(Path(trainer.args.output_dir).iterdir()) == []


def test_before_a_training_a_disk_without_room_for_its_checkpoints_is_refused(build, monkeypatch):
    trainer = build("here")
    monkeypatch.setattr("lablib.checkpoints.shutil.disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(OSError, match=r"has 1 MiB free, but this training writes up to 3.*MiB"):
        trainer.train()
    assert trainer.state.global_step == 0


# Another machine


@pytest.mark.parametrize("changed", ["torch", "precision"])
def test_a_change_of_versions_or_precision_is_said_and_stays_with_the_result(changed, config, tiny_data, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(At(2, press_ctrl_c),))
    if changed == "torch":
        monkeypatch.setattr(resuming, "version", lambda name: "9.9")
        now, before = "torch 9.9, transformers 9.9", rf"torch {torch.__version__.partition('+')[0]}"
    else:
        monkeypatch.setattr("lablib.trainer.resolve_bf16", lambda config, model: True)
        now, before = "precision bf16", "precision fp32"
    said = rf"resumed at step 2 with {now}, begun with .*{before}"
    with (
        pytest.warns(UserWarning, match=rf"{said}.*; the result will carry this note"),
        pytest.raises(KeyboardInterrupt),
    ):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(At(STEPS + 1, press_ctrl_c),))
    run = train_or_load(tiny_mlp, config, tiny_data)  # no second note for what has not changed again
    (note,) = run.result["notes"]
    assert note.startswith(f"resumed at step 2 with {now}")


def test_another_teacher_than_the_one_that_it_was_begun_with_is_noted(build):
    with pytest.raises(KeyboardInterrupt):
        build("here", At(2, press_ctrl_c), trainer_class=distilling).train()
    resumed = build("here", trainer_class=partial(distilling, teacher=build_seeded(tiny_mlp, 10)))
    with pytest.warns(UserWarning, match=r"resumed at step 2 with teacher \w{12}, begun with teacher \w{12}"):
        resumed.train(resume_from_checkpoint=True)


def test_a_run_without_such_a_change_carries_no_note(config, tiny_data):
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(At(2, press_ctrl_c),))
    assert "notes" not in train_or_load(tiny_mlp, config, tiny_data).result


def test_deterministic_algorithms_are_on_while_it_trains_and_as_before_afterwards(build, config):
    def settings():
        cudnn = torch.backends.cudnn
        return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark

    before, seen = settings(), []
    knobs = TrainingConfig(**{**vars(config), "deterministic": True})
    trainer = build("here", At(1, lambda: seen.append(settings())), knobs=knobs)
    trainer.train()
    assert seen == [(True, True, False)]
    assert settings() == before
    plain = build("plain")
    plain.train()
    assert findings(trainer) == findings(plain)
