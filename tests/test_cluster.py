"""An experiment's runs on a dask cluster: those of this machine, also when a worker is killed."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import joblib
import pytest
from outcomes import timeless

from lablib import MLP, Experiment, StreamlinedTrainer, TrainingConfig, experiment
from lablib.runs import attempt

STEPS = 4  # an epoch


class Telling(StreamlinedTrainer):
    """Tells which process began at which step, and waits in the second epoch as long as there is a file "wait"."""

    seconds_between_epochs = 0

    def training_step(self, *args, **kwargs):
        store, me = Path(self.config.output_dir), f"{self.config.seed}-{os.getpid()}"
        if not list(store.glob(f"began-{me}-*")):
            (store / f"began-{me}-{self.state.global_step}").touch()
        if self.state.global_step == STEPS + 2 and (store / "wait").exists():
            (store / f"waits-{me}").touch()
            while (store / "wait").exists():
                time.sleep(0.05)
        return super().training_step(*args, **kwargs)


def told(store: Path, what: str) -> list[list[int]]:
    return sorted([int(part) for part in path.name.split("-")[1:]] for path in store.glob(f"{what}-*"))


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> SimpleNamespace:
    """The same runs here and on a cluster, one of whose two workers is killed in its second epoch."""
    distributed = pytest.importorskip("distributed", reason="pip install -e '.[cluster]' installs dask")
    here, there = (tmp_path_factory.mktemp(name) for name in ("here", "there"))
    killed = []

    def train(store: Path, jobs: int) -> Experiment:
        knobs = {"num_epochs": 3, "batch_size": 8, "validation_split": 0.25, "device": "cpu"}
        network = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
        config = TrainingConfig(**knobs, output_dir=str(store))
        return experiment({"mlp": network}, config, tiny_data, seeds=3, jobs=jobs, trainer_class=Telling)

    def kill_one():
        deadline = time.monotonic() + 120
        while len(told(there, "waits")) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.extend(told(there, "waits")[0])
        os.kill(killed[1], signal.SIGKILL)
        (there / "wait").unlink()

    local = train(here, 1)
    (there / "wait").touch()
    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        remote = train(there, 2)
    killer.join()
    return SimpleNamespace(local=local, remote=remote, began=told(there, "began"), killed=killed)


def test_runs_on_a_cluster_are_bitwise_those_of_this_machine(trained):
    assert trained.remote.failures == {}
    assert len(trained.remote.runs) == 3
    for key, run in trained.local.runs.items():
        assert timeless(trained.remote.runs[key]) == timeless(run)
    assert os.getpid() not in {process for _, process, _ in trained.began}


def test_a_run_whose_worker_is_killed_is_taken_over_from_its_checkpoint(trained):
    seed, killed = trained.killed
    began = {process: step for of_seed, process, step in trained.began if of_seed == seed}
    assert began.pop(killed) == 0
    assert list(began.values()) == [STEPS]  # one other worker, after the epoch whose checkpoint was there


def test_threads_of_one_worker_train_one_after_the_other(monkeypatch):
    running, most = [], []

    def training(*args, **kwargs):
        running.append(threading.get_ident())
        time.sleep(0.001)
        most.append(len(running))
        running.remove(threading.get_ident())

    monkeypatch.setattr("lablib.runs.run_identity", training)  # the first thing that a training does
    arguments = [None] * 3  # model, config, data
    with joblib.parallel_config("threading"):
        joblib.Parallel(n_jobs=4)(joblib.delayed(attempt)(i, *arguments, 1, {}) for i in range(20))
    assert most == [1] * 20
