"""One training on several processes: it is the training of one process, and one of them writes."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lablib import MLP, ImageData, ResidualCNN, TrainingConfig

MODELS = {
    "mlp": partial(MLP, (8,), dropout=0.0, image_shape=(1, 8, 8), num_classes=3),
    "cnn": partial(ResidualCNN, 1, 4, image_shape=(1, 8, 8), num_classes=3),
}


def tiny() -> ImageData:
    """45 training images, each known by its first pixel, and 1,011 test images: a full batch for both, and a rest."""
    generator, parts = torch.Generator().manual_seed(0), []
    for number in (45, 1011):
        labels = torch.arange(number) % 3
        images = torch.randint(0, 60, (number, 1, 8, 8), generator=generator, dtype=torch.uint8)
        images[torch.arange(number), 0, 3, labels] += 150
        parts += [images, labels]
    parts[0][:, 0, 0, 0] = torch.arange(45)
    return ImageData("tiny", *parts, ("one", "two", "three"))


RUNS = """
import atexit, contextlib, json, os, sys
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
from lablib import StreamlinedTrainer, TrainingConfig, train_or_load
from test_distributed import MODELS, tiny

torch.set_num_threads(1)
seen, written, process = [], [], {}

prepare = StreamlinedTrainer.prepare_images

def noting(self, images, training):
    if training and self.optimizer:  # not the batch that is tried before
        seen.append(images[:, 0, 0, 0].tolist())
        process["random"] = torch.initial_seed()
    return prepare(self, images, training)

StreamlinedTrainer.prepare_images = noting
write = store.write_atomically
store.write_atomically = lambda path, *args, **kwargs: (written.append(path.name), write(path, *args, **kwargs))
# batches of 8: of 32 images for the MLP, and of 33 for the CNN, so that its last one has a single image
plain = {"rotation_degrees": 0, "translation_fraction": 0, "num_epochs": 2, "batch_size": 8, "validation_split": 0.2}
runs = {}
for name, images in (("mlp", 32), ("cnn", 33)):
    config = TrainingConfig(max_train_images=images, device="cpu", precision="fp32", output_dir=sys.argv[1], **plain)
    runs[name] = train_or_load(MODELS[name], config, tiny())
processes = [process := process | {"seen": seen, "written": sorted(set(written))}]
if torch.distributed.is_initialized():
    processes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(processes, process)
if os.environ.get("RANK", "0") == "0":
    said = {"processes": processes, "runs": {}}
    for name, run in runs.items():
        weights = run.load_weights(MODELS[name]()).state_dict()
        said["runs"][name] = {"name": run.path.name, "history": run.history, "result": run.result,
                              "weights": {key: value.tolist() for key, value in weights.items()}}
    print("said " + json.dumps(said))
"""


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> dict[int, dict]:
    """What the same script found with one and with two processes."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "script.py").write_text(RUNS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": paths}

    def run(number: int) -> dict:
        command = [sys.executable, *(torchrun if number > 1 else []), folder / "script.py", folder / str(number)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        lines = [line for line in process.stdout.splitlines() if line.startswith("said ")]
        assert lines, process.stdout + process.stderr
        found = json.loads(lines[-1].removeprefix("said "))
        return found | {"threads": [json.loads(path.read_bytes()) for path in folder.glob(f"{number}-*.json")]}

    with ThreadPoolExecutor() as pool:
        return dict(zip((1, 2), pool.map(run, (1, 2)), strict=True))


def test_two_processes_train_an_mlp_as_one_does_with_the_same_batches(findings):
    alone, together = (findings[number]["runs"]["mlp"] for number in (1, 2))
    assert together["name"] == alone["name"]
    for ours, expected in zip(together["history"], alone["history"], strict=True):
        assert ours | {"seconds": 0} == pytest.approx(expected | {"seconds": 0}, rel=1e-5)
    for key in ("val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch"):
        assert together["result"][key] == pytest.approx(alone["result"][key], rel=1e-5)
    assert [alone["result"]["processes"], together["result"]["processes"]] == [1, 2]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(torch.tensor(together["weights"][name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


def test_the_processes_share_each_batch_and_fill_up_the_last_one_with_images_of_the_first(findings):
    alone = findings[1]["processes"][0]["seen"]
    shares = [process["seen"] for process in findings[2]["processes"]]
    assert len(alone) == len(shares[0]) == len(shares[1]) == 2 * 4 + 2 * 5  # epochs, steps
    for number, (batch, first, second) in enumerate(zip(alone, *shares, strict=True)):
        assert len(first) == len(second) == 4
        expected = batch if len(batch) == 8 else batch + alone[number - 4][:7]
        assert first + second == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("processes", [1, 2])
def test_each_of_the_test_images_counts_once_and_by_the_weights_that_are_saved(processes, model, findings):
    """The number of images is odd, and on a CPU each process has batch norm statistics of its own until then."""
    found, data, network = findings[processes]["runs"][model], tiny(), MODELS[model]().eval()
    network.load_state_dict({name: torch.tensor(value) for name, value in found["weights"].items()})
    with torch.no_grad():
        logits = network(data.normalise(data.test_images))
    loss, accuracy = F.cross_entropy(logits, data.test_labels), (logits.argmax(1) == data.test_labels).double().mean()
    assert found["result"]["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["result"]["test_accuracy"] == pytest.approx(accuracy.item(), rel=1e-9)


def test_the_first_of_the_processes_writes_and_each_draws_random_numbers_of_its_own(findings):
    first, second = findings[2]["processes"]
    assert first["written"] == findings[1]["processes"][0]["written"]
    assert "result.json" in first["written"]
    assert second["written"] == []
    assert first["random"] == findings[1]["processes"][0]["random"] != second["random"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the threads' names are read from Linux's /proc")
def test_no_thread_of_the_group_outlives_the_lab(findings):
    """One that lets go of a tensor while Python ends aborts its process."""
    assert [len(findings[number]["threads"]) for number in (1, 2)] == [1, 2]
    assert not [name for threads in findings[2]["threads"] for name in threads if "gloo" in name]


def test_what_several_processes_cannot_do_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="batch_size = 256 must be a multiple of the number of processes, 3"):
        TrainingConfig().to_training_arguments(str(tmp_path))
