"""An experiment's runs on a dask cluster: those of this machine, also when a worker is killed."""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial

import joblib
import pytest

from lablib import MLP, TrainingConfig, experiment
from lablib.checkpoints import Interruption, leave_with

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

def main():
    from distributed import Client, LocalCluster

    labels = torch.arange(45) % 3
    images = torch.randint(0, 60, (45, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(45), 0, labels] += 150
    data = ImageData("tiny", images, labels, images[:9], labels[:9], ("one", "two", "three"))
    mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)

    def train(store, jobs):
        config = TrainingConfig(
            num_epochs=3, batch_size=4, validation_split=0.2, device="cpu", output_dir=str(store)
        )
        return experiment({"mlp": mlp}, config, data, seeds=range(3), jobs=jobs, trainer_class=Telling)

    here, there = (Path(sys.argv[1]) / name for name in ("here", "there"))
    for store in (here, there):
        store.mkdir()
    local = train(here, 1)
    (there / "wait").touch()
    killed = []
    threading.Thread(target=kill_one, args=(there, killed), daemon=True).start()
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
        with joblib.parallel_config("dask", scatter=[data]):
            remote = train(there, 2)
    print("said " + json.dumps({
        "failures": [*local.failures.values(), *remote.failures.values()],
        "same": [findings(remote.runs[key]) == findings(local.runs[key]) for key in local.runs],
        "began": told(there, "began"),
        "killed": killed,
        "here": os.getpid(),
        "stores": [sorted(path.parent.name for path in store.glob("*/result.json")) for store in (here, there)],
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
    assert findings["stores"][0] == findings["stores"][1]
    assert findings["here"] not in {process for _, process, _ in findings["began"]}


def test_a_run_whose_worker_is_killed_is_taken_over_from_its_checkpoint(findings):
    seed, killed = findings["killed"]
    began = {process: step for of_seed, process, step in findings["began"] if of_seed == seed}
    assert began.pop(killed) == 0
    assert list(began.values()) == [9]  # one other worker, after the epoch whose checkpoint was there


def test_threads_of_one_worker_train_one_after_the_other(monkeypatch):
    module = sys.modules["lablib.experiments"]
    running, most = [], []

    def training(*args, **kwargs):
        running.append(threading.get_ident())
        time.sleep(0.001)
        most.append(len(running))
        running.remove(threading.get_ident())

    monkeypatch.setattr("lablib.experiments.train_or_load", training)
    arguments = [None] * 8  # model, config, data, identity, trainer, callbacks, weights, threads
    with joblib.parallel_config("threading"):
        keys = joblib.Parallel(n_jobs=4)(joblib.delayed(module._train_one)(i, *arguments, 1) for i in range(20))
    assert [key for key, _, _ in keys] == [*range(20)]
    assert most == [1] * 20


def test_a_worker_that_is_no_child_of_the_caller_does_not_leave_with_it():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leave_with(gone.pid)
    assert not Interruption().asked
    in_a_thread = threading.Thread(target=lambda: asked.append(Interruption().__enter__().asked))
    asked = []
    in_a_thread.start()
    in_a_thread.join()
    assert asked == [False]


def test_a_backend_that_gives_all_results_at_the_end_will_do(monkeypatch, tiny_data, tmp_path):
    monkeypatch.setattr(joblib._parallel_backends.LokyBackend, "supports_return_generator", False)  # as Ray's
    config = TrainingConfig(
        num_epochs=1, batch_size=8, validation_split=0.25, device="cpu", output_dir=str(tmp_path / "runs")
    )
    mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
    assert len(experiment({"mlp": mlp}, config, tiny_data, seeds=(0, 1)).runs) == 2
