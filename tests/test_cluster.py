"""An experiment's runs on a dask cluster: those of this machine, also when a worker is killed."""

import json
import os
import subprocess
import sys
import threading
import time

import joblib
import pytest

from lablib.experiments import _train_one

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

CLUSTER = """
import json, os, signal, sys, threading, time
from functools import partial
from pathlib import Path
import joblib
import torch
from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, experiment

STEPS = 9  # an epoch

class Telling(StreamlinedTrainer):
    seconds_between_epochs = 0

    # tells which process began at which step, and waits in the second epoch as long as there is a file "wait"
    def training_step(self, *args, **kwargs):
        store, me = Path(self.config.output_dir), f"{self.config.seed}-{os.getpid()}"
        if not list(store.glob(f"began-{me}-*")):
            (store / f"began-{me}-{self.state.global_step}").touch()
        if self.state.global_step == STEPS + 3 and (store / "wait").exists():
            (store / f"waits-{me}").touch()
            while (store / "wait").exists():
                time.sleep(0.05)
        return super().training_step(*args, **kwargs)

def told(store, what):
    return sorted([int(part) for part in path.name.split("-")[1:]] for path in store.glob(what + "-*"))

def kill_one(store, killed):
    deadline = time.monotonic() + 120
    while len(told(store, "waits")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    killed += told(store, "waits")[0]
    os.kill(killed[1], signal.SIGKILL)
    (store / "wait").unlink()

def findings(run):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return [rows, result, (run.path / "model.safetensors").read_bytes().hex()]

def train(store, jobs):
    labels = torch.arange(45) % 3
    images = torch.randint(0, 60, (45, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(45), 0, labels] += 150
    data = ImageData("tiny", images, labels, images[:9], labels[:9], ("one", "two", "three"))
    mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
    config = TrainingConfig(num_epochs=3, batch_size=4, validation_split=0.2, device="cpu", output_dir=str(store))
    return experiment({"mlp": mlp}, config, data, seeds=range(3), jobs=jobs, trainer_class=Telling)

def main():
    from distributed import Client, LocalCluster

    here, there = (Path(sys.argv[1]) / name for name in ("here", "there"))
    for store in (here, there):
        store.mkdir()
    local, killed = train(here, 1), []
    (there / "wait").touch()
    threading.Thread(target=kill_one, args=(there, killed), daemon=True).start()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        with joblib.parallel_config("dask"):
            remote = train(there, 2)
    print("said " + json.dumps({
        "failures": [*local.failures.values(), *remote.failures.values()],
        "same": [findings(remote.runs[key]) == findings(local.runs[key]) for key in local.runs],
        "began": told(there, "began"),
        "killed": killed,
        "here": os.getpid(),
    }))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict:
    pytest.importorskip("distributed", reason="dask is not installed; pip install -e '.[cluster]' installs it")
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "script.py").write_text(CLUSTER)
    command = [sys.executable, folder / "script.py", folder]
    process = subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=300)
    lines = [line for line in process.stdout.splitlines() if line.startswith("said ")]
    assert lines, process.stdout + process.stderr
    return json.loads(lines[-1].removeprefix("said "))


def test_runs_on_a_cluster_are_bitwise_those_of_this_machine(findings):
    assert findings["failures"] == []
    assert findings["same"] == [True] * 3
    assert findings["here"] not in {process for _, process, _ in findings["began"]}


def test_a_run_whose_worker_is_killed_is_taken_over_from_its_checkpoint(findings):
    seed, killed = findings["killed"]
    began = {process: step for of_seed, process, step in findings["began"] if of_seed == seed}
    assert began.pop(killed) == 0
    assert list(began.values()) == [9]  # one other worker, after the epoch whose checkpoint was there


def test_threads_of_one_worker_train_one_after_the_other(monkeypatch):
    running, most = [], []

    def training(*args, **kwargs):
        running.append(threading.get_ident())
        time.sleep(0.001)
        most.append(len(running))
        running.remove(threading.get_ident())

    monkeypatch.setattr("lablib.experiments.train_or_load", training)
    arguments = [None] * 7  # model, config, data, trainer, identity, callbacks, weights
    with joblib.parallel_config("threading"):
        joblib.Parallel(n_jobs=4)(joblib.delayed(_train_one)(i, *arguments, 1) for i in range(20))
    assert most == [1] * 20
