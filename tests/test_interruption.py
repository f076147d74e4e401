"""Signals and deaths among several processes: an experiment's workers, and `torchrun`."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from lablib import MLP, TrainingConfig
from lablib.identity import run_path
from lablib.runs import train_or_load

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

TRAINING = """
import json, os, signal, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from lablib import MLP, ImageData, StreamlinedTrainer, TrainingConfig, experiment, train_or_load
from lablib.checkpoints import checkpoints_in

torch.set_num_threads(1)
labels = torch.arange(45) % 3
images = torch.randint(0, 60, (45, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
images[torch.arange(45), 0, labels] += 150
data = ImageData("tiny", images, labels, images[:9], labels[:9], ("one", "two", "three"))
mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
config = TrainingConfig(num_epochs=3, batch_size=4, validation_split=0.2, device="cpu", output_dir=sys.argv[1])
STEPS = 9  # an epoch

def findings(run):
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return [rows, result, (run.path / "model.safetensors").read_bytes().hex()]
"""

EXPERIMENT = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
store = Path(sys.argv[1])

class Slow(StreamlinedTrainer):
    def training_step(self, *args, **kwargs):
        if (store / "slow").exists() and self.state.global_step > STEPS:
            (store / f"at-{self.config.seed}").write_text(str(self.state.global_step))
            time.sleep(0.2)
        return super().training_step(*args, **kwargs)

def child(task):
    process = os.fork()
    if process:
        return process
    os.setsid()
    status = 1
    try:
        task()
        status = 0
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)

def until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"still not {condition.__name__}"
        time.sleep(0.02)

def both_are_trained():
    return all((store / f"at-{seed}").exists() for seed in (0, 1))

def nobody_is_left():
    try:
        os.killpg(process, 0)
        return False
    except ProcessLookupError:
        return True

def newest():
    return sorted(int(checkpoints_in(path)[0].name.rpartition("-")[2]) for path in store.glob("*/checkpoints"))

def reached():
    at = [store / f"at-{seed}" for seed in (0, 1)]
    steps = sorted(int(path.read_text()) for path in at)
    for path in at:
        path.unlink()
    return steps

train = lambda: experiment({"mlp": mlp}, config, data, seeds=(0, 1), jobs=2, trainer_class=Slow)
(store / "slow").touch()
said = {}
process = child(train)
until(both_are_trained)
os.killpg(process, signal.SIGINT)
status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
said["ctrl-c"] = {"status": status, "reached": reached(), "kept": newest()}
os.killpg(process, signal.SIGKILL)
until(nobody_is_left)

process = child(train)
until(both_are_trained)
os.kill(process, signal.SIGKILL)
os.waitpid(process, 0)
until(nobody_is_left)
said["kill -9"] = {"reached": reached(), "kept": newest()}

(store / "slow").unlink()
elsewhere = replace(config, output_dir=sys.argv[1] + "-2")
runs, undisturbed = (
    experiment({"mlp": mlp}, knobs, data, seeds=(0, 1), trainer_class=Slow).runs for knobs in (config, elsewhere)
)
said["same"] = [findings(runs[key]) == findings(undisturbed[key]) for key in runs]
print("said " + json.dumps(said))
"""

TOGETHER = """
from transformers import TrainerCallback

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if os.environ.get("DIE") and args.process_index == 1 and state.global_step == STEPS + 3:
            os.kill(os.getpid(), signal.SIGKILL)

run = train_or_load(mlp, config, data, callbacks=(Die(),))
again = train_or_load(mlp, config, data)
undisturbed = train_or_load(mlp, replace(config, output_dir=sys.argv[1] + "-2"), data)
if os.environ["RANK"] == "0":
    print("said " + json.dumps([findings(run) == findings(undisturbed) == findings(again), len(run.history)]))
"""


def script(tmp_path: Path, *parts: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text("\n".join(parts))
    (tmp_path / "runs").mkdir()
    return path


def said(process: subprocess.CompletedProcess):
    """What a script printed at its end, as JSON."""
    lines = [line for line in process.stdout.splitlines() if line.startswith("said ")]
    assert lines, process.stdout + process.stderr
    return json.loads(lines[-1].removeprefix("said "))


def run(*command, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=QUIET | more, capture_output=True, text=True, timeout=300)


def interrupt_an_experiment(folder: Path) -> dict:
    return said(run(sys.executable, script(folder, TRAINING, EXPERIMENT), folder / "runs"))


def kill_one_of_two_and_resume(folder: Path) -> tuple[subprocess.CompletedProcess, float, bool, list]:
    """The run of which a process dies, its seconds, whether it left a checkpoint; what the run after it said."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, script(folder, TRAINING, TOGETHER), folder / "runs"]
    began = time.monotonic()
    killed = run(*command, DIE="1")
    seconds = time.monotonic() - began
    left = any((folder / "runs").glob("*/checkpoints/checkpoint-9"))
    return killed, seconds, left, said(run(*command))


@pytest.fixture(scope="module")
def side_by_side(tmp_path_factory):
    """Both take long and wait much."""
    with ThreadPoolExecutor() as pool:
        tasks = (interrupt_an_experiment, kill_one_of_two_and_resume)
        yield {task: pool.submit(task, tmp_path_factory.mktemp(task.__name__)) for task in tasks}


def test_workers_end_with_a_checkpoint_on_ctrl_c_and_when_their_parent_is_killed(side_by_side):
    findings = side_by_side[interrupt_an_experiment].result()
    assert findings["ctrl-c"]["status"] == 130
    for death in ("ctrl-c", "kill -9"):
        for reached, kept in zip(findings[death]["reached"], findings[death]["kept"], strict=True):
            assert 0 <= kept - reached <= 2, findings  # the step that was reached had begun
    assert findings["same"] == [True, True]


def test_torchrun_ends_when_a_process_dies_and_goes_on_exactly(side_by_side):
    killed, seconds, left_a_checkpoint, resumed = side_by_side[kill_one_of_two_and_resume].result()
    assert killed.returncode != 0
    assert seconds < 150  # the group itself would wait for half an hour
    assert left_a_checkpoint, killed.stderr[-3000:]
    assert resumed == [True, 3]


@pytest.fixture
def config(tmp_path):
    return TrainingConfig(
        num_epochs=1, batch_size=8, validation_split=0.25, device="cpu", output_dir=str(tmp_path / "runs")
    )


def small_mlp() -> MLP:
    return MLP((8,), image_shape=(1, 6, 6), num_classes=3)


def test_a_lock_goes_with_the_process_that_held_it_and_whoever_waits_is_told(config, tiny_data, capsys):
    path = run_path(small_mlp, config, tiny_data)
    path.parent.mkdir()
    lock = path.with_name(path.name + ".lock")
    hold = "import filelock, os, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; time.sleep(1); os.kill(os.getpid(), 9)", lock]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        run = train_or_load(small_mlp, config, tiny_data)
    assert holder.returncode == -9
    assert f"another process is at the run {path.name}; waiting for it" in capsys.readouterr().out
    assert len(run.history) == 1
    assert lock.exists()  # nobody holds it
    with FileLock(lock).acquire(timeout=0):
        pass
