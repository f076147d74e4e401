"""Signals and failures among several processes: an experiment's workers, and `torchrun`."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from outcomes import timeless

from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.checkpoints import checkpoints_in

STEPS = 9  # an epoch: 36 of 45 images in batches of 4
TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SCRIPT = """
import signal, sys, torch
from test_interruption import train

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
torch.set_num_threads(1)
jobs, *stores = sys.argv[1:]
for store in stores:
    train(store, seeds=int(jobs), jobs=int(jobs))
"""


class Disturbed(StreamlinedTrainer):
    """Its second epoch is slow, or fails in the second process, if there is a file of that name in the store."""

    seconds_between_epochs = 0

    def training_step(self, *args, **kwargs):
        store, step = Path(self.config.output_dir), self.state.global_step
        if (store / "slow").exists() and step > STEPS:
            (store / f"at-{self.config.seed}").write_text(str(step))
            (store / f"process-{self.args.process_index}").write_text(str(os.getpid()))
            time.sleep(0.5)  # so that one worker does not end before the other has begun
        if (store / "fail").exists() and step == STEPS + 3 and self.args.process_index == 1:
            raise RuntimeError("one of two")
        return super().training_step(*args, **kwargs)


def train(store: str, seeds: int, jobs: int = 1) -> list:
    """Train an MLP with each seed; what there is to compare of the runs."""
    labels = torch.arange(45) % 3
    images = torch.randint(0, 60, (45, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[torch.arange(45), 0, labels] += 150
    data = ImageData("tiny", images, labels, images[:9], labels[:9], ("one", "two", "three"))
    config = TrainingConfig(num_epochs=3, batch_size=4, validation_split=0.2, device="cpu", output_dir=store)
    mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
    if "WORLD_SIZE" in os.environ:  # several processes train one run
        runs = [train_or_load(mlp, config, data, trainer_class=Disturbed)]
    else:
        runs = experiment({"mlp": mlp}, config, data, seeds=seeds, jobs=jobs, trainer_class=Disturbed).runs.values()
    return [timeless(run) for run in runs]


def start(stores: list[Path], *launcher: str, jobs: int = 1) -> subprocess.Popen:
    """Train as many seeds as jobs, in a process group of its own; its output goes to a file beside the stores."""
    (script := stores[0].with_name("script.py")).write_text(SCRIPT)
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}
    command = [sys.executable, *launcher, script, str(jobs), *stores]
    with open(stores[0].with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def group_is_gone(process: subprocess.Popen) -> bool:
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_workers_end_with_a_checkpoint_on_ctrl_c_and_when_their_parent_is_killed(tmp_path):
    store = tmp_path / "runs"
    store.mkdir()
    (store / "slow").touch()
    for disturb in (lambda group: os.killpg(group, signal.SIGINT), lambda parent: os.kill(parent, signal.SIGKILL)):
        process, at = start([store], jobs=2), [store / f"at-{seed}" for seed in (0, 1)]
        wait_for(lambda at=at: all(path.exists() and path.read_text() for path in at))
        disturb(process.pid)
        assert process.wait(timeout=120) in (-signal.SIGINT, -signal.SIGKILL)
        if process.returncode == -signal.SIGINT:
            os.killpg(process.pid, signal.SIGKILL)  # joblib's idle workers
        wait_for(lambda process=process: group_is_gone(process))
        reached = sorted(int(path.read_text()) for path in at)
        newest = [checkpoints_in(path)[0] for path in store.glob("*/checkpoints")]
        kept = sorted(int(path.stem.rpartition("-")[2]) for path in newest)
        assert [0 <= step - before <= 2 for step, before in zip(kept, reached, strict=True)] == [True, True]
        for path in at:
            path.unlink()
    (store / "slow").unlink()
    assert train(str(store), seeds=2) == train(str(tmp_path / "undisturbed"), seeds=2)


def test_torchrun_ends_when_a_process_gets_a_signal_or_fails_and_resumes_exactly(tmp_path):
    interrupted, undisturbed, failing = stores = [tmp_path / name for name in ("interrupted", "undisturbed", "failing")]
    for store, disturbed in ((interrupted, "slow"), (failing, "fail")):
        store.mkdir()
        (store / disturbed).touch()
    process, second = start(stores[:1], *TOGETHER), interrupted / "process-1"
    wait_for(lambda: second.exists() and second.read_text())
    os.kill(int(second.read_text()), signal.SIGINT)  # all end after the same step
    assert process.wait(timeout=120) != 0
    log = interrupted.with_suffix(".log")
    assert [*interrupted.glob(f"*/checkpoints/checkpoint-{2 * STEPS}.pt")], log.read_text()
    assert "RuntimeError" not in log.read_text()
    (interrupted / "slow").unlink()
    began = time.monotonic()
    assert start(stores, *TOGETHER).wait(timeout=300) != 0
    assert time.monotonic() - began < 200  # the group itself would wait for half an hour
    assert [*failing.glob(f"*/checkpoints/checkpoint-{STEPS}.pt")], log.read_text()
    assert train(str(interrupted), seeds=1) == train(str(undisturbed), seeds=1)  # which loads them
