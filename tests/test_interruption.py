"""Signals and deaths among several processes: an experiment's workers, and `torchrun`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lablib.checkpoints import checkpoints_in

SCRIPT = """
import os, signal, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, experiment, train_or_load

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
torch.set_num_threads(1)
labels = torch.arange(45) % 3
images = torch.randint(0, 60, (45, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
images[torch.arange(45), 0, labels] += 150
data = ImageData("tiny", images, labels, images[:9], labels[:9], ("one", "two", "three"))
mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
store, STEPS = Path(sys.argv[1]), 9  # an epoch
config = TrainingConfig(num_epochs=3, batch_size=4, validation_split=0.2, device="cpu", output_dir=str(store))

class Disturbed(StreamlinedTrainer):
    seconds_between_epochs = 0

    def training_step(self, *args, **kwargs):
        step = self.state.global_step
        if (store / "slow").exists() and step > STEPS:
            (store / f"at-{self.config.seed}").write_text(str(step))
            time.sleep(0.2)
        if (store / "die").exists() and step == STEPS + 3 and self.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)

def findings(store):
    knobs = replace(config, output_dir=str(store))
    if "RANK" in os.environ:
        runs = [train_or_load(mlp, knobs, data, trainer_class=Disturbed)]
    else:
        trained = experiment({"mlp": mlp}, knobs, data, seeds=(0, 1), jobs=2, trainer_class=Disturbed).runs
        runs = [run for _, run in sorted(trained.items())]
    for run in runs:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
        result = {k: v for k, v in run.result.items() if k != "seconds"}
        yield [rows, result, (run.path / "model.safetensors").read_bytes().hex()]

resumed, undisturbed = [*findings(store)], [*findings(store.with_name("undisturbed"))]
assert resumed == undisturbed
"""
TOGETHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def start(store: Path, *launcher: str, disturbance: str | None = None) -> subprocess.Popen:
    """The script in a process group of its own, whose output goes to a file beside the store."""
    store.mkdir(exist_ok=True)
    script = store.with_name("script.py")
    script.write_text(SCRIPT)
    for name in ("slow", "die"):
        (store / name).unlink(missing_ok=True)
    if disturbance:
        (store / disturbance).touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *launcher, str(script), str(store)]
    with open(store.with_suffix(".log"), "w") as log:
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
    for disturb in (lambda group: os.killpg(group, signal.SIGINT), lambda parent: os.kill(parent, signal.SIGKILL)):
        process, at = start(store, disturbance="slow"), [store / f"at-{seed}" for seed in (0, 1)]
        wait_for(lambda at=at: all(path.exists() and path.read_text() for path in at))
        disturb(process.pid)
        assert process.wait(timeout=120) in (-signal.SIGINT, -signal.SIGKILL)
        if process.returncode == -signal.SIGINT:
            os.killpg(process.pid, signal.SIGKILL)  # joblib's idle workers
        wait_for(lambda process=process: group_is_gone(process))
        reached = sorted(int(path.read_text()) for path in at)
        newest = [checkpoints_in(path)[0] for path in store.glob("*/checkpoints")]
        kept = sorted(int(path.name.rpartition("-")[2]) for path in newest)
        assert [0 <= step - before <= 2 for step, before in zip(kept, reached, strict=True)] == [True, True]
        for path in at:
            path.unlink()
    assert start(store).wait(timeout=300) == 0, store.with_suffix(".log").read_text()


def test_torchrun_ends_when_a_process_dies_and_resumes_exactly(tmp_path):
    store, began = tmp_path / "runs", time.monotonic()
    assert start(store, *TOGETHER, disturbance="die").wait(timeout=300) != 0
    assert time.monotonic() - began < 200  # the group itself would wait for half an hour
    assert [*store.glob("*/checkpoints/checkpoint-9")], store.with_suffix(".log").read_text()
    assert start(store, *TOGETHER).wait(timeout=300) == 0, store.with_suffix(".log").read_text()
