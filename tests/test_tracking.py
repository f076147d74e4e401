"""W&B runs that trainings write, offline, as W&B's own reader reads them back; and trainings whose W&B fails."""

import dataclasses
import os
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from transformers import TrainerCallback
from wandb_runs import TrackedRun, go_offline, runs_in

from lablib import MLP, KnowledgeDistillationTrainer, StreamlinedTrainer, TrainingConfig, train_or_load
from lablib.metrics import history
from lablib.runs import build_seeded
from lablib.tracking import LOGGED

TOKEN = "1234567890:AAErecognisable_token_of_the_tests_"
ONLY_HERE = {  # fields of TrainingConfig that W&B is not told as they are
    "precision",  # what it was resolved to is
    "device",
    "output_dir",
    "checkpoint_seconds",
    "use_wandb",
    "wandb_project",
    "wandb_group",
    "wandb_tags",
    "wandb_watch",
    "use_telegram_notifications",
    "telegram_additional_info",
    "telegram_every_run",
    "telegram_bot_token",
    "telegram_chat_id",
    "training_arguments",  # numbers and switches only
}


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        go_offline(patch, tmp_path_factory.mktemp("home"))
        yield


def config(folder: Path, **knobs) -> TrainingConfig:
    defaults = {"num_epochs": 2, "batch_size": 8, "validation_split": 0.25, "device": "cpu", "use_wandb": True}
    return TrainingConfig(**{**defaults, "output_dir": str(folder), **knobs})


def small_mlp(seed: int = 0) -> MLP:
    return build_seeded(lambda: MLP((8,), image_shape=(1, 6, 6), num_classes=3), seed)


def distilling(knobs: TrainingConfig, data, **more) -> KnowledgeDistillationTrainer:
    return KnowledgeDistillationTrainer(small_mlp(), small_mlp(seed=1), knobs, data, temperature=3.0, alpha=0.6, **more)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same_bits(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def processes_of_wandb() -> list[str]:
    """Its processes that are this one's children."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    names = [(Path("/proc") / pid / "comm").read_text().strip() for pids in children for pid in pids]
    return [name for name in names if "wandb" in name]


class Talkative(TrainerCallback):
    """Prints what nobody should have printed, and keeps the parameters and gradients of each epoch's last step."""

    def __init__(self):
        self.last = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.last = {f"parameters/{name}": p.detach().clone() for name, p in model.named_parameters()}
        self.last |= {f"gradients/{name}": p.grad.clone() for name, p in model.named_parameters()}

    def on_epoch_end(self, args, state, control, **kwargs):
        print(TOKEN)
        print(TOKEN, file=sys.stderr)
        self.ended = self.last


class InterruptAtEpoch(TrainerCallback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_epoch_begin(self, args, state, control, **kwargs):
        if round(state.epoch) + 1 == self.epoch:
            raise KeyboardInterrupt(f"with {TOKEN}")


@dataclasses.dataclass
class Tracked:
    """A distillation with everything switched on, and a plain training after it while the user has a run open."""

    folder: Path
    distilled: KnowledgeDistillationTrainer
    talkative: Talkative
    runs: list[TrackedRun]
    users_run: TrackedRun
    left: list
    warned: list


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_data, _offline) -> Tracked:
    folder, elsewhere = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("elsewhere")
    hooks, talkative = (sys.exit, sys.excepthook), Talkative()
    secrets = {"telegram_bot_token": TOKEN, "telegram_additional_info": "a private remark"}
    knobs = config(
        folder,
        num_epochs=3,
        wandb_watch=True,
        wandb_tags=("one", "two"),
        training_arguments={"adam_beta1": 0.8},
        **secrets,
    )
    with warnings.catch_warnings(record=True) as warned, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(sys, "argv", [sys.argv[0], "--token", TOKEN])
        trainer = distilling(knobs, tiny_data, callbacks=[talkative], run_name="MLP-0123")
        trainer.train()
    left = [t.name for t in threading.enumerate() if "wandb" in t.name] + processes_of_wandb()
    left += ["WANDB_SERVICE"] * ("WANDB_SERVICE" in os.environ) + ["hooks"] * ((sys.exit, sys.excepthook) != hooks)

    users = wandb.init(project="mine", dir=str(elsewhere))
    StreamlinedTrainer(small_mlp(), config(folder, wandb_group="a group"), tiny_data, run_name="second").train()
    assert wandb.run is users
    users.log({"still": "there"})
    users.finish()
    wandb.teardown()
    sys.exit, sys.excepthook = hooks
    return Tracked(folder, trainer, talkative, runs_in(folder), *runs_in(elsewhere), left, warned)


@pytest.fixture(scope="module")
def untracked(tracked, tiny_data) -> StreamlinedTrainer:
    """The same distillation as the tracked one, without W&B."""
    trainer = distilling(dataclasses.replace(tracked.distilled.config, use_wandb=False), tiny_data)
    trainer.train()
    return trainer


# What is in a run


def test_the_config_is_what_is_to_be_known_and_nothing_else(tracked, tiny_data):
    logged = tracked.runs[0].config
    versions = logged.pop("versions")
    assert versions.keys() == {"lablib", "torch", "transformers", "wandb", "python"}
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert logged == {name: getattr(tracked.distilled.config, name) for name in LOGGED} | {
        "adam_beta1": 0.8,
        "temperature": 3.0,
        "alpha": 0.6,
        "trainer": "KnowledgeDistillationTrainer",
        "precision": "fp32",
        "device": "cpu",
        "model": {
            "class": "MLP",
            "parameters": 36 * 8 + 8 + 8 * 3 + 3,
            "arguments": {"hidden_sizes": [8], "dropout": 0.1, "image_shape": [1, 6, 6], "num_classes": 3},
        },
        "data": {
            "name": "tiny",
            "fingerprint": tiny_data.fingerprint,
            "image_shape": [1, 6, 6],
            "classes": ["top", "middle", "bottom"],
        },
    }
    assert "temperature" not in tracked.runs[1].config


def test_every_field_of_a_config_is_either_logged_or_kept_here_on_purpose():
    assert {field.name for field in dataclasses.fields(TrainingConfig)} == {*LOGGED} | ONLY_HERE
    assert not ONLY_HERE & {*LOGGED}


def test_each_epoch_is_one_row_with_all_of_its_metrics(tracked):
    rows = history(tracked.distilled.state.log_history)
    run = tracked.runs[0]
    assert run.metrics() == rows
    assert [row["_step"] for row in run.history] == [row["epoch"] for row in rows] == [1, 2, 3]
    terms = {f"{part}_{name}" for part in ("train", "val") for name in ("loss", "accuracy", "soft_loss", "hard_loss")}
    assert rows[0].keys() == terms | {"epoch", "learning_rate", "grad_norm", "seconds"}
    assert {"glob_name": "*", "step_metric": "epoch"}.items() <= run.records["metric"][-1].items()


def test_the_summary_has_the_best_epoch_and_the_test_result_of_its_weights(tracked):
    rows, summary = history(tracked.distilled.state.log_history), tracked.runs[0].summary
    best = max(rows, key=lambda row: row["val_accuracy"])
    assert summary["best_epoch"] == best["epoch"]
    assert (summary["best_val_accuracy"], summary["best_val_loss"]) == (best["val_accuracy"], best["val_loss"])
    test = tracked.distilled.test()
    assert (summary["test_accuracy"], summary["test_loss"]) == (test["test_accuracy"], test["test_loss"])
    assert summary["epochs"] == 3
    assert not [key for key in summary if "runtime" in key and key[0] != "_"]


def test_the_learning_curves_are_a_picture_of_the_last_epoch_and_no_figure_stays_open(tracked):
    run = tracked.runs[0]
    (path,) = [value for key, value in run.history[-1].items() if key == "learning_curves.path"]
    with Image.open(run.folder / "files" / path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
    assert plt.get_fignums() == []


def test_the_histograms_are_those_of_each_epochs_last_step(tracked):
    run = tracked.runs[0]
    names = {key.removesuffix(".bins") for row in run.history for key in row if key.endswith(".bins")}
    assert names == tracked.talkative.ended.keys()
    for row in run.history:
        for name in names:
            assert sum(row[f"{name}.values"]) == tracked.talkative.ended[name].numel()
    for name in names:
        values = tracked.talkative.ended[name].flatten().numpy()
        counts, edges = np.array(run.history[-1][f"{name}.values"]), run.history[-1][f"{name}.bins"]
        np.testing.assert_allclose([edges[0], edges[-1]], [values.min(), values.max()], rtol=1e-6)
        expected, _ = np.histogram(values, bins=64)
        assert np.abs(counts.cumsum() - expected.cumsum()).max() <= 1  # a value on an edge may fall either way
    assert not [key for row in tracked.runs[1].history for key in row if key.endswith(".bins")]


def test_no_secret_and_no_private_text_is_in_any_file(tracked):
    files = [path for path in tracked.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for private in (TOKEN, TOKEN.partition(":")[2], "a private remark", "telegram"):
        assert not [path for path in files if private.encode() in path.read_bytes()]
    assert tracked.warned == []


# Whose run it is


def test_a_run_has_its_project_name_group_and_tags(tracked):
    first, second = (run.run for run in tracked.runs)
    assert (first["display_name"], second["display_name"]) == ("MLP-0123", "second")
    assert first["project"] == second["project"] == "residual-and-distillation-lab"
    assert (first["run_group"], second["run_group"]) == ("tiny", "a group")
    assert first["tags"] == ["one", "two"]
    assert "tags" not in second


def test_two_trainings_are_two_runs_and_the_users_own_is_left_alone(tracked):
    first, second = tracked.runs
    assert first.run["run_id"] != second.run["run_id"]
    assert (len(first.history), len(second.history)) == (3, 2)
    assert first.exit_code == second.exit_code == 0
    users = [{k: v for k, v in row.items() if k[0] != "_"} for row in tracked.users_run.history]
    assert users == [{"still": "there"}]


def test_nothing_of_wandb_outlives_the_training(tracked):
    assert tracked.left == []


def test_an_interrupted_training_is_marked_so_and_continues_its_own_run(tmp_path, tiny_data):
    knobs = config(tmp_path, num_epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train_or_load(small_mlp, knobs, tiny_data, callbacks=(InterruptAtEpoch(3),))
    result = train_or_load(small_mlp, knobs, tiny_data)
    interrupted, resumed = runs_in(tmp_path)
    assert resumed.run["run_id"] == interrupted.run["run_id"]
    assert resumed.run["display_name"] == result.path.name
    assert interrupted.metrics() + resumed.metrics() == result.history
    assert (interrupted.exit_code, resumed.exit_code) == (1, 0)
    assert interrupted.summary["error"] == "KeyboardInterrupt"
    assert resumed.summary["error"] is None
    assert resumed.summary["test_accuracy"] == result.result["test_accuracy"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.usefixtures("one_picture")
def test_a_training_anew_with_the_same_trainer_is_another_run(tmp_path, tiny_data, monkeypatch):
    ids, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **more: ids.append(more["id"]) or init(**more))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer = StreamlinedTrainer(small_mlp(), config(tmp_path, num_epochs=1), tiny_data)
    trainer.train()
    trainer.train()
    trainer.args.num_train_epochs = 2
    trainer.train(resume_from_checkpoint=True)
    assert ids[0] != ids[1] == ids[2]


def test_wandbs_folder_goes_where_its_variable_says(tmp_path, tiny_data, monkeypatch):
    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **more: asked.update(more) or 1 / 0)
    with pytest.warns(UserWarning, match="Weights & Biases"):
        StreamlinedTrainer(small_mlp(), config(tmp_path, num_epochs=1), tiny_data).train()
    assert asked["dir"] == str(tmp_path)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "there"))
    with pytest.warns(UserWarning, match="Weights & Biases"):
        StreamlinedTrainer(small_mlp(), config(tmp_path, num_epochs=1), tiny_data).train()
    assert asked["dir"] is None


# It cannot harm the training


def test_the_weights_are_bitwise_those_of_a_training_without_it(tracked, untracked):
    assert same_bits(weights(tracked.distilled), weights(untracked))


class FailingRun:
    """Stands for a run whose connection breaks: one of its methods raises, the others do nothing."""

    def __init__(self, failing: str):
        self.failing, self.finished, self.summary = failing, 0, {}

    def _call(self, method: str):
        if method == self.failing:
            raise ConnectionError(f"broken in {method}")

    def define_metric(self, *args, **more):
        self._call("define_metric")

    def log(self, *args, **more):
        torch.rand(3)
        self._call("log")

    def finish(self, **more):
        self.finished += 1
        self._call("finish")


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("failing", ["init", "define_metric", "log", "finish"])
def test_one_that_fails_gives_one_warning_and_the_training_goes_on(
    failing, tmp_path, tiny_data, tracked, untracked, monkeypatch
):
    run = FailingRun(failing)

    def init(**more):
        run._call("init")
        return run

    monkeypatch.setattr(wandb, "init", init)
    knobs = dataclasses.replace(tracked.distilled.config, output_dir=str(tmp_path), wandb_watch=False)
    trainer = distilling(knobs, tiny_data)
    with pytest.warns(UserWarning, match="Weights & Biases") as warned:
        trainer.train()
    assert [str(warning.message) for warning in warned] == [
        f"Weights & Biases: broken in {failing}; the training goes on without it"
    ]
    assert run.finished >= (failing != "init")
    assert same_bits(weights(trainer), weights(untracked))


def test_a_failed_training_raises_its_own_error_whatever_wandb_does(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **more: FailingRun("finish"))
    trainer = StreamlinedTrainer(small_mlp(), config(tmp_path), tiny_data, callbacks=[InterruptAtEpoch(2)])
    with pytest.warns(UserWarning, match="broken in finish"), pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_the_wait_for_it_to_begin_is_not_counted_as_the_trainings(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setattr("lablib.tracking.time", SimpleNamespace(perf_counter=iter([0.0, 1000.0]).__next__))
    monkeypatch.setattr(wandb, "init", lambda **more: FailingRun("init")._call("init"))
    trainer = StreamlinedTrainer(small_mlp(), config(tmp_path, num_epochs=1), tiny_data)
    with pytest.warns(UserWarning, match="broken in init"):
        trainer.train()
    assert history(trainer.state.log_history)[0]["seconds"] < -900


def test_without_a_login_it_asks_for_nothing_and_says_how_to_log_in_or_go_offline(tmp_path, tiny_data, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(wandb, "init", lambda **more: pytest.fail("it would ask"))
    with pytest.warns(
        UserWarning,
        match="not logged in; `wandb login` in a terminal.*WANDB_MODE=offline keeps the run on this machine",
    ) as warned:
        StreamlinedTrainer(small_mlp(), config(tmp_path), tiny_data).train()
    assert len(warned) == 1
    assert processes_of_wandb() == []


def test_with_a_key_it_goes_online(tmp_path, tiny_data, monkeypatch):
    asked = {}
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "login", lambda prompt, verify: not prompt and not verify)
    monkeypatch.setattr(wandb, "init", lambda **more: asked.update(more) or FailingRun("nothing"))
    monkeypatch.setattr("lablib.tracking.WandbCallback._curves", lambda *_: None)
    StreamlinedTrainer(small_mlp(), config(tmp_path, num_epochs=1), tiny_data).train()
    assert asked["mode"] == "online"


def test_without_the_package_it_says_how_to_install_it(tmp_path, tiny_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(
        UserWarning, match="; `pip install wandb` installs what is missing; the training goes on"
    ) as warned:
        StreamlinedTrainer(small_mlp(), config(tmp_path), tiny_data).train()
    assert len(warned) == 1
