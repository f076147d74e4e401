"""W&B runs that trainings write, offline, as W&B's own reader reads them back; and trainings whose W&B fails."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY, MagicMock, Mock

import httpx
import numpy as np
import pytest
import torch
import wandb
from scripted import At
from transformers import TrainerCallback
from wandb.util import get_core_path

from lablib import MLP, KnowledgeDistillationTrainer, StreamlinedTrainer, TrainingConfig, experiment
from lablib.identity import build_seeded
from lablib.runs import attempt, train_or_load
from lablib.tracking import LOGGED, final_result, mode_here

TOKEN = "1234567890:AAErecognisable_token_of_the_tests_"


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    """No account, nothing of this machine's W&B, and nothing that takes time without being looked at in a test."""
    home = str(tmp_path_factory.mktemp("home"))
    folders = dict.fromkeys(["WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"], home)
    switches = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB__DISABLE_STATS": "true"}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        for name, value in (folders | switches).items():
            patch.setenv(name, value)
        yield


class TrackedRun:
    """What W&B's own reader says of one offline run."""

    def __init__(self, file: Path):
        # what `wandb leet inspect --json` starts, without a second Python in front of it
        command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file, file.parent]
        records = [json.loads(line) for line in subprocess.check_output(command, text=True).splitlines()]
        of = {kind: [r[kind] for r in records if r["type"] == kind] for kind in ("run", "history", "summary", "exit")}
        self.run, self.exit_code = of["run"][0], of["exit"][0]["exit_code"]
        self.history = [row["item"] for row in of["history"]]
        self.summary = {key: value for part in of["summary"] for key, value in part["update"].items()}

    def metrics(self) -> list[dict]:
        """The history's rows, without what is not a number and what W&B adds."""
        return [{k: v for k, v in row.items() if k[0] != "_" and isinstance(v, (int, float))} for row in self.history]


def runs_in(folder: Path) -> list[TrackedRun]:
    """The W&B runs that lie in a folder, the oldest first."""
    files = folder.glob("wandb/offline-run-*/*.wandb")
    return [TrackedRun(file) for file in sorted(files, key=lambda path: path.stat().st_ctime)]


def config(folder: Path, num_epochs: int = 2, **knobs) -> TrainingConfig:
    knobs |= {"batch_size": 8, "validation_split": 0.25, "device": "cpu", "use_wandb": True}
    return TrainingConfig(num_epochs=num_epochs, output_dir=folder, **knobs)


def small_mlp(seed: int = 0) -> MLP:
    return build_seeded(partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3), seed)


def distilling(config: TrainingConfig, data, **more) -> KnowledgeDistillationTrainer:
    return KnowledgeDistillationTrainer(small_mlp(), small_mlp(1), config, data, temperature=3.0, alpha=0.6, **more)


def one_warning(train) -> str:
    with pytest.warns(UserWarning, match="Weights & Biases") as warned:
        train()
    (warning,) = warned
    return str(warning.message)


class Talkative(TrainerCallback):
    """Prints what nobody should have printed, and keeps the parameters and gradients of each epoch's last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        print(TOKEN)
        self.last = {f"parameters/{name}": p.detach().clone() for name, p in model.named_parameters()}
        self.last |= {f"gradients/{name}": p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_data, _offline) -> SimpleNamespace:
    """A distillation with everything switched on, and a plain training after it while the user has a run open."""
    folder, talkative = tmp_path_factory.mktemp("runs"), Talkative()
    private = {"telegram_bot_token": TOKEN, "telegram_additional_info": "a private remark"}
    knobs = config(folder, num_epochs=3, wandb_watch=True, **private)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [sys.argv[0], "--token", TOKEN])
        trainer = distilling(knobs, tiny_data, callbacks=[talkative], run_name="MLP-0123")
        trainer.train()
    with wandb.init(project="mine", dir=str(tmp_path_factory.mktemp("elsewhere"))) as users:
        StreamlinedTrainer(small_mlp(), config(folder, wandb_group="a group"), tiny_data, run_name="second").train()
        assert wandb.run is users
    first, second = runs_in(folder)
    return SimpleNamespace(folder=folder, trainer=trainer, last=talkative.last, first=first, second=second)


def test_the_config_is_an_allow_list(tracked):
    assert tracked.first.run["config"]["update"] == {
        **{name: getattr(tracked.trainer.config, name) for name in LOGGED},
        **{"temperature": 3.0, "alpha": 0.6, "precision": "fp32", "device": "cpu", "processes": "1"},
        **dict.fromkeys(["torch", "transformers", "python", "arguments", "_wandb"], ANY),
        **{"model": "MLP", "trainer": "KnowledgeDistillationTrainer", "parameters": 36 * 8 + 8 + 8 * 3 + 3},
        "data": {"name": "tiny", "fingerprint": ANY, "classes": ["top", "middle", "bottom"]},
    }


def test_no_secret_and_no_private_text_is_in_any_file(tracked):
    files = [path for path in tracked.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for private in (TOKEN, TOKEN.partition(":")[2], "a private remark", "telegram"):
        assert not [path for path in files if private.encode() in path.read_bytes()]


def test_each_epoch_is_one_row_with_all_of_its_metrics_and_the_summary_is_the_result(tracked):
    assert tracked.first.metrics() == tracked.trainer.history
    assert [row["_step"] for row in tracked.first.history] == [1, 2, 3]
    result = final_result(tracked.trainer)
    assert {name: tracked.first.summary[name] for name in result} == result


def test_the_histograms_are_those_of_the_last_step(tracked):
    rows = tracked.first.history
    assert {key.removesuffix(".bins") for key in rows[0] if key.endswith(".bins")} == tracked.last.keys()
    for name, tensor in tracked.last.items():
        counts, edges = np.histogram(tensor, bins=64)
        assert rows[-1][f"{name}.values"] == counts.tolist()
        np.testing.assert_allclose(rows[-1][f"{name}.bins"], edges, rtol=1e-6)
    assert not [key for row in tracked.second.history for key in row if key.endswith(".bins")]


def test_two_trainings_are_two_runs_and_the_users_own_is_left_alone(tracked):
    runs = tracked.first, tracked.second
    names = [(it.run["display_name"], it.run["run_group"], len(it.history), it.exit_code) for it in runs]
    assert names == [("MLP-0123", "tiny", 3, 0), ("second", "a group", 2, 0)]


def test_an_interrupted_training_is_marked_so_and_continues_its_own_run(tmp_path, tiny_data):
    knobs, in_epoch_3 = config(tmp_path, num_epochs=3), At(9, Mock(side_effect=KeyboardInterrupt(f"with {TOKEN}")))
    with pytest.raises(KeyboardInterrupt):
        train_or_load(small_mlp, knobs, tiny_data, callbacks=(in_epoch_3,))
    folder, *_ = tmp_path.glob("MLP-*/checkpoints")
    trainer = StreamlinedTrainer(small_mlp(), knobs, tiny_data, checkpoint_dir=str(folder), run_name="resumed")
    trainer.train(resume_from_checkpoint=True)
    interrupted, resumed = runs_in(tmp_path)
    assert resumed.run["run_id"] == interrupted.run["run_id"]
    assert interrupted.metrics() + resumed.metrics() == trainer.history
    assert (interrupted.exit_code, resumed.exit_code) == (1, 0)
    assert (interrupted.summary["error"], resumed.summary["error"]) == ("KeyboardInterrupt", None)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_one_that_fails_gives_one_warning_and_the_same_weights(failing, tmp_path, tiny_data, tracked, monkeypatch):
    run = MagicMock()
    run.init.return_value = run
    getattr(run, failing).side_effect = ConnectionError(f"broken in {failing}")
    monkeypatch.setattr(wandb, "init", run.init)
    trainer = distilling(dataclasses.replace(tracked.trainer.config, output_dir=str(tmp_path)), tiny_data)
    said = one_warning(trainer.train)
    assert said == f"Weights & Biases: ConnectionError: broken in {failing}; continuing without it"
    first, other = (each.model.state_dict().values() for each in (trainer, tracked.trainer))
    assert all(map(torch.equal, first, other))


def said_by_three_runs(folder: Path, data) -> str:
    return one_warning(lambda: experiment({"MLP": small_mlp}, config(folder, num_epochs=1), data, seeds=3))


def test_without_a_login_an_experiment_asks_for_nothing_and_warns_once(tmp_path, tiny_data, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    wandb.teardown()  # it remembers what the environment was
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(wandb, "init", lambda **more: pytest.fail("it would ask"))
    monkeypatch.setattr(httpx, "head", lambda *url, **more: None)  # the server is there
    assert "run `wandb login` or set WANDB_API_KEY; WANDB_MODE=offline" in said_by_three_runs(tmp_path, tiny_data)


def test_without_a_route_an_experiment_waits_once_and_for_a_short_time(tmp_path, tiny_data, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setattr("lablib.tracking._TIMEOUT", 1.0)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        wandb.teardown()
        began = time.monotonic()
        assert "ReadTimeout: timed out; WANDB_MODE=offline" in said_by_three_runs(tmp_path, tiny_data)
        assert 1 < time.monotonic() - began < 5
    wandb.teardown()


def test_a_worker_has_the_mode_of_its_experiment_and_a_missing_wandb_is_a_warning(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    attempt(("net", 0), None, None, None, -1, wandb_mode="offline")  # as in a worker; without a network it fails
    assert os.environ["WANDB_MODE"] == "offline"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "import of wandb halted" in one_warning(mode_here)
