"""One training on several processes: it is the training of one process, and one of them writes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from lablib import MLP, TrainingConfig, experiment
from lablib.config import _leave_group
from lablib.data import ImageBatches
from lablib.distributed import Share, process_seed

QUIET = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

RUNS = """
import atexit, contextlib, json, os, sys
from functools import partial
from pathlib import Path
import torch

def save_threads():  # Linux's; what is registered first is called last
    names = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended meanwhile
            names.append((thread / "comm").read_text().strip())
    Path(f"{sys.argv[1]}-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(names))

if Path("/proc/self/task").exists():
    atexit.register(save_threads)
from lablib import runs as store
from lablib import MLP, ImageData, ResidualCNN, StreamlinedTrainer, TrainingConfig, experiment, train_or_load

torch.set_num_threads(1)
IMAGES = 45
labels = torch.arange(IMAGES) % 3
images = torch.randint(0, 60, (IMAGES, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
images[:, 0, 0, 0] = torch.arange(IMAGES)  # by which an image is known
images[torch.arange(IMAGES), 0, 3, labels] += 150
data = ImageData("tiny", images, labels, images[:11], labels[:11], ("one", "two", "three"))
seen = []
written = []

class Seeing(StreamlinedTrainer):
    def prepare_images(self, images, training):
        if training and self.optimizer:  # not the batch that is tried before
            seen.append((int(self.state.epoch), images[:, 0, 0, 0].tolist()))
        return super().prepare_images(images, training)

write = store.write_atomically
store.write_atomically = lambda path, *args, **kwargs: (written.append(path.name), write(path, *args, **kwargs))
plain = {"rotation_degrees": 0, "translation_fraction": 0}
# 33 images in batches of 8: the last one has a single image
config = TrainingConfig(num_epochs=2, batch_size=8, validation_split=0.2, max_train_images=33, device="cpu",
                        precision="fp32", output_dir=sys.argv[1], **plain)
models = {"mlp": partial(MLP, (8,), dropout=0.0, image_shape=(1, 8, 8), num_classes=3),
          "cnn": partial(ResidualCNN, 1, 4, image_shape=(1, 8, 8), num_classes=3)}
runs = experiment(models, config, data, seeds=(0,), trainer_class=Seeing).runs
process = {"seen": seen, "written": sorted(set(written)), "random": torch.initial_seed()}
processes = [process]
if torch.distributed.is_initialized():
    processes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(processes, process)
if os.environ.get("RANK", "0") == "0":
    said = {"processes": processes, "runs": {}}
    for (name, _), run in runs.items():
        weights = run.load_weights(models[name]()).state_dict()
        said["runs"][name] = {"name": run.path.name, "history": run.history, "result": run.result,
                              "weights": {key: value.tolist() for key, value in weights.items()}}
    print("said " + json.dumps(said))
"""


def said(process: subprocess.CompletedProcess):
    lines = [line for line in process.stdout.splitlines() if line.startswith("said ")]
    assert lines, process.stdout + process.stderr
    return json.loads(lines[-1].removeprefix("said "))


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[int, dict]:
    """What the same script found with one and with two processes."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(RUNS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def run(number: int) -> dict:
        command = [sys.executable, *(torchrun if number > 1 else []), folder / "script.py", folder / str(number)]
        found = said(subprocess.run(command, env=QUIET, capture_output=True, text=True, timeout=200))
        return found | {"threads": [json.loads(path.read_bytes()) for path in folder.glob(f"{number}-*.json")]}

    with ThreadPoolExecutor() as pool:
        return dict(zip((1, 2), pool.map(run, (1, 2)), strict=True))


@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_two_processes_train_the_run_of_one_with_the_same_batch(findings, model):
    alone, together = (findings[number]["runs"][model] for number in (1, 2))
    assert together["name"] == alone["name"]
    for ours, expected in zip(together["history"], alone["history"], strict=True):
        assert ours | {"seconds": 0} == pytest.approx(expected | {"seconds": 0}, rel=1e-5)
    for key in ("val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch"):
        assert together["result"][key] == pytest.approx(alone["result"][key], rel=1e-5)
    assert [alone["result"]["processes"], together["result"]["processes"]] == [1, 2]
    assert together["weights"].keys() == alone["weights"].keys()
    for name, expected in alone["weights"].items():
        torch.testing.assert_close(
            torch.tensor(together["weights"][name]), torch.tensor(expected), rtol=1e-5, atol=1e-6
        )


def test_the_processes_see_each_image_once_an_epoch_in_the_batches_of_one_process(findings):
    alone = findings[1]["processes"][0]["seen"]
    shares = [process["seen"] for process in findings[2]["processes"]]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 2 * 2 * 5  # models, epochs, steps
    for (epoch, batch), (_, first), (_, second) in zip(alone, *shares, strict=True):
        assert sorted(first + second) == sorted(batch)
        assert 0 <= len(first) - len(second) <= 1
        assert len({*batch}) == len(batch)
        assert epoch in (0, 1)
    for start in range(0, len(alone), 5):
        assert len({image for _, batch in alone[start : start + 5] for image in batch}) == 33


def test_the_first_of_the_processes_writes_and_each_draws_random_numbers_of_its_own(findings):
    first, second = findings[2]["processes"]
    assert first["written"] == findings[1]["processes"][0]["written"]
    assert "result.json" in first["written"]
    assert second["written"] == []
    assert first["random"] != second["random"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads' names are read from Linux's /proc")
def test_no_thread_of_the_group_outlives_the_lab(findings):
    """One that lets go of a tensor while Python ends aborts its process."""
    assert [len(findings[number]["threads"]) for number in (1, 2)] == [1, 2]
    assert not [name for threads in findings[2]["threads"] for name in threads if "gloo" in name]


def test_a_process_that_ends_by_an_error_does_not_wait_for_the_others(monkeypatch, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    monkeypatch.setattr(sys, "last_value", ValueError(), raising=False)
    _leave_group()
    assert torch.distributed.is_initialized()
    monkeypatch.delattr(sys, "last_value")
    _leave_group()
    assert not torch.distributed.is_initialized()
    _leave_group()  # a second time is no error


def test_shares_are_parts_of_the_batch_and_their_weights_make_a_mean_over_its_images():
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    dataset = ImageBatches(images, torch.arange(7))
    shares = [Share(dataset, process, 3).__getitems__([6, 2, 4, 0]) for process in range(3)]
    assert [share["labels"].tolist() for share in shares] == [[6, 0], [2], [4]]
    assert shares[0]["images"].flatten().tolist() == [6, 0]
    assert sum(share["weight"] * share["labels"].float().mean() for share in shares) / 3 == (6 + 2 + 4 + 0) / 4
    without = Share(dataset, 2, 3).__getitems__([5, 1])
    assert without["images"].shape == (0, 1, 1, 1)
    assert without["weight"] == 0
    assert len(Share(dataset, 2, 3)) == 7


def test_the_seeds_of_processes_begin_with_the_runs_own_and_are_not_those_of_other_runs():
    seeds = {(seed, process): process_seed(seed, process) for seed in range(100) for process in range(16)}
    assert [seeds[seed, 0] for seed in range(100)] == list(range(100))
    assert len({*seeds.values()}) == len(seeds)
    assert max(seeds.values()) < 2**32


def test_a_batch_that_the_processes_cannot_share_out_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"batch_size = 256, but .* a multiple of the number of processes, which is 3"):
        TrainingConfig().to_training_arguments(str(tmp_path))


def test_runs_side_by_side_are_refused_where_several_processes_train_one(monkeypatch, tiny_data):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"jobs = 2, but 2 processes train each run together: write jobs=1"):
        experiment({"mlp": MLP}, TrainingConfig(), tiny_data, seeds=(0,), jobs=2)
