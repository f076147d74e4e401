"""Ideas for a faster training, each measured against the same training without it: what was kept, and what was not.

python -m benchmarks.tried     writes results/tried-<device>.md and .json (about five minutes)
"""

import argparse
import contextlib
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from benchmarks import machine
from benchmarks.cases import CASES, EVALUATION_BATCH, LEARNING_RATE, Case, build, load
from benchmarks.inputs import split
from benchmarks.isolated import isolated
from lablib.augmentation import affine
from lablib.hardware import keep_freed_memory

MLP, RESIDUAL_CNN = "MLP-2", "ResidualCNN-2"
IMAGES = {MLP: 25_600, RESIDUAL_CNN: 2_560}  # an epoch of a comparison


@dataclass(frozen=True)
class Way:
    """A way of training in memory; the defaults are lablib's for an MLP, one thread a run."""

    threads: int = 1
    separate_sampling: bool = False  # a pass over the images for the rotation, one for the shift, one for the flip
    affine_grid: bool = False  # PyTorch's grid instead of one by broadcasting
    augmentation: torch.dtype = torch.float32
    ahead: bool = False  # the next batch is augmented in a second thread during a step
    optimizer: str = "fused"  # or "foreach", or "loop" over the parameters
    keeps_memory: bool = True
    bf16: bool = False
    channels_last: bool = False
    compiled: bool = False
    seeds: int = 1  # networks trained in one batched product
    validates: int = 0  # only validation, in batches of so many images


@dataclass(frozen=True)
class Idea:
    """`changed` is the way with the idea; `usual` the one without."""

    text: str
    case: str
    usual: Way
    changed: Way
    outcome: str


OWN_CHOICE = 'left to `precision="bf16"`: the published MLPs and their gradients are in fp32'
CNN = Way(threads=2, bf16=True, channels_last=True)
IDEAS = (
    Idea(
        "rotation, shift and flip in one `grid_sample`, not one after the other",
        MLP,
        Way(separate_sampling=True),
        Way(),
        "kept; and images are interpolated once, so they stay sharper",
    ),
    Idea("the sampling grid by broadcasting, not by `F.affine_grid`", MLP, Way(affine_grid=True), Way(), "kept"),
    Idea(
        "grid and sampling in bfloat16",
        MLP,
        Way(),
        Way(augmentation=torch.bfloat16),
        "not kept; and positions would be rounded to a twentieth of a pixel",
    ),
    Idea(
        "the next batch is augmented in a second thread during the step",
        MLP,
        Way(),
        Way(ahead=True),
        "not kept: two runs side by side use the second core better, and the random state would run ahead of the step "
        "that a checkpoint resumes",
    ),
    Idea(
        "two threads for one run",
        MLP,
        Way(),
        Way(threads=2),
        "PyTorch's default for one run; runs side by side get one each",
    ),
    Idea("two threads for one run", RESIDUAL_CNN, replace(CNN, threads=1), CNN, "as above"),
    Idea("one fused Adam kernel, not a loop over the parameters", MLP, Way(optimizer="loop"), Way(), "kept"),
    Idea("one fused Adam kernel, not `foreach`", MLP, Way(optimizer="foreach"), Way(), "kept"),
    Idea("the allocator keeps what is freed", MLP, Way(keeps_memory=False), Way(), "kept"),
    Idea("bfloat16 for the network", MLP, Way(), Way(bf16=True), OWN_CHOICE),
    Idea("bfloat16 for the network", RESIDUAL_CNN, replace(CNN, bf16=False), CNN, "kept for convolutions"),
    Idea("channels last", RESIDUAL_CNN, replace(CNN, channels_last=False), CNN, "kept for convolutions"),
    Idea("`torch.compile`", MLP, Way(), Way(compiled=True), "not kept: its warm-up is paid by each process"),
    Idea("`torch.compile`", RESIDUAL_CNN, CNN, replace(CNN, compiled=True), "not kept: as above"),
    Idea(
        "5 seeds of a network in one batched product (`torch.func.stack_module_state`)",
        MLP,
        Way(),
        Way(seeds=5),
        "not kept: early stopping, resuming and the run store would have to know of it",
    ),
    Idea(
        f"validation in batches of {EVALUATION_BATCH:,} images, not of 256",
        MLP,
        Way(validates=256),
        Way(validates=EVALUATION_BATCH),
        "kept for GPUs, and since the loop around a batch is not in this figure; a small part of an epoch either way",
    ),
    Idea(
        f"validation in batches of {EVALUATION_BATCH:,} images, not of 128",
        RESIDUAL_CNN,
        replace(CNN, validates=128),
        replace(CNN, validates=EVALUATION_BATCH),
        "kept, as above",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all ideas and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tried", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each way, in turns")
    parser.add_argument("--images", type=int, help="training images an epoch, for quick trials")
    parser.add_argument("--out", default="results", type=Path)
    options = parser.parse_args(arguments)
    measured = {"machine": isolated(machine.describe), "date": date.today().isoformat(), "rounds": options.rounds}
    measured["ideas"] = []
    for idea in IDEAS:
        print(f"{idea.case}: {idea.text}", file=sys.stderr, flush=True)
        times = isolated(compare, idea, options.rounds, options.images)
        measured["ideas"].append({"idea": idea.text, "network": idea.case, "outcome": idea.outcome, **times})
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"tried-{machine.device_slug(measured['machine'])}"
    file.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(measured))
    return 0


def compare(idea: Idea, rounds: int, images: int | None) -> dict:
    """Images a second of both ways, by round and in turns, and what the first epoch of the changed one took longer."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # or what an earlier process compiled would be found
        return _compare(idea, rounds, images)


def _compare(idea: Idea, rounds: int, images: int | None) -> dict:
    case = next(case for case in CASES if case.name == idea.case)
    ways = {name: Training(case, way, images) for name, way in (("usual", idea.usual), ("changed", idea.changed))}
    first = {name: training.epoch() for name, training in ways.items()}
    speeds = {name: [] for name in ways}
    for turn in range(rounds):
        for name in sorted(ways, reverse=turn % 2 == 0):
            seconds = ways[name].epoch()
            speeds[name].append(round(ways[name].images / seconds, 1))
    later = ways["changed"].images / median(speeds["changed"])
    return speeds | {"warm_up_seconds": round(max(first["changed"] - later, 0), 1)}


class Training:
    """A network, its optimizer and its images in memory, trained in one way."""

    def __init__(self, case: Case, way: Way, images: int | None = None):
        self.case, self.way = case, way
        data = load(case, images or IMAGES[case.name])
        self.pixels, self.labels = data.train_images, data.train_labels
        self.indices = split(data)[0]
        if way.validates:
            self.indices = self.indices.repeat(4)
        self.images = len(self.indices) * way.seeds
        mean, std = (statistic.view(-1, 1, 1) for statistic in data.channel_statistics)
        self.scale, self.offset = 1 / (255 * std), -mean / std
        self.layout = torch.channels_last if way.channels_last else torch.contiguous_format
        networks = [build(case, data.image_shape, data.num_classes) for _ in range(way.seeds)]
        self.network = networks[0].to(memory_format=self.layout)
        self.parameters = list(self.network.parameters())
        if way.seeds > 1:
            self.stacked, self.buffers = stack_module_state(networks)
            self.parameters = list(self.stacked.values())
        kinds = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
        self.optimizer = torch.optim.Adam(self.parameters, lr=LEARNING_RATE, **kinds[way.optimizer])
        self.forward = torch.compile(self.network) if way.compiled else self.network

    def epoch(self) -> float:
        """Seconds of one pass over the images."""
        torch.set_num_threads(self.way.threads)
        keep_freed_memory() if self.way.keeps_memory else _return_freed_memory()
        start = time.perf_counter()
        if self.way.validates:
            self._validate()
        else:
            self._train()
        return time.perf_counter() - start

    def _train(self):
        self.network.train()
        batches = self._batches()
        for images, labels in _ahead(batches) if self.way.ahead else batches:
            with self._precision():
                loss = self._loss(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    @torch.no_grad()
    def _validate(self):
        self.network.eval()
        for chosen in self.indices.split(self.way.validates):
            with self._precision():
                self.forward(self._normalised(self.pixels.index_select(0, chosen).float()))

    def _precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.way.bf16)

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.way.seeds == 1:
            return F.cross_entropy(self.forward(images), labels)

        def of_one(parameters, buffers, images, labels):
            return F.cross_entropy(functional_call(self.network, (parameters, buffers), (images,)), labels)

        parts = (part.unflatten(0, (self.way.seeds, -1)) for part in (images, labels))
        return vmap(of_one, randomness="different")(self.stacked, self.buffers, *parts).sum()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        orders = torch.stack([self.indices[torch.randperm(len(self.indices))] for _ in range(self.way.seeds)])
        for chosen in orders.split(self.case.batch_size, dim=1):
            chosen = chosen.flatten()
            images = self._augmented(self.pixels.index_select(0, chosen).to(self.way.augmentation))
            yield self._normalised(images.float()), self.labels.index_select(0, chosen)

    def _augmented(self, images: torch.Tensor) -> torch.Tensor:
        case = self.case
        draws = torch.rand(4, len(images))
        angles = (2 * draws[0] - 1) * case.rotation_degrees
        shifts = (2 * draws[1:3].T - 1) * case.translation_fraction * images.shape[-1]
        flips = draws[3] < 0.5 if case.horizontal_flip else None
        if self.way.separate_sampling:
            none = torch.zeros_like(angles), torch.zeros_like(shifts)
            return affine(affine(images, angles, none[1]), none[0], shifts, flips)
        if self.way.affine_grid:
            cos, sin = torch.deg2rad(angles).cos(), torch.deg2rad(angles).sin()
            dx, dy = (shifts * (2 / images.shape[-1])).T
            rows = torch.stack([cos, -sin, sin * dy - cos * dx, sin, cos, -sin * dx - cos * dy])
            grid = F.affine_grid(rows.T.reshape(-1, 2, 3), list(images.shape), align_corners=False)
            return F.grid_sample(images, grid, align_corners=False)
        exact = images.dtype
        return affine(images, angles.to(exact), shifts.to(exact), flips)

    def _normalised(self, images: torch.Tensor) -> torch.Tensor:
        return (images * self.scale + self.offset).contiguous(memory_format=self.layout)


def _ahead(batches: Iterator) -> Iterator:
    """The batches, of which the next one is made in a second thread while one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def page(measured: dict) -> str:
    """The page of `results/tried-<device>.md` from the contents of its JSON file."""
    described = measured["machine"]
    rows = []
    for tried in measured["ideas"]:
        ratios = [changed / usual for changed, usual in zip(tried["changed"], tried["usual"], strict=True)]
        speed = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        outcome = tried["outcome"]
        if "compile" in tried["idea"]:
            outcome += f"; {_earned_back(tried)}"
        rows.append([tried["idea"], tried["network"], speed, outcome])
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
    header = "\n".join(["| idea | network | speed | what became of it |", "| --- | --- | ---: | --- |"])
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"# What was tried for speed\n\n"
        f"Each idea against the same training without it, measured on {measured['date']}: {described['processor']}, "
        f"{described['cores']} cores; Python {described['python']}, {versions}. *Speed* is images a second with the "
        f"idea divided by those without: median of {measured['rounds']} epochs of each, in turns, with the lowest and "
        "the highest; below 1 the idea slows. The loops are written by hand around lablib's networks and augmentation, "
        "with one thread for the MLP and two for the ResidualCNN unless the idea says otherwise. "
        "`python -m benchmarks.tried` measures them anew.\n\n"
        f"{header}\n{body}\n"
    )


def _earned_back(tried: dict) -> str:
    usual, changed = median(tried["usual"]), median(tried["changed"])
    warm_up = f"the first epoch takes {tried['warm_up_seconds']:.0f} s more"
    if changed <= usual:
        return f"{warm_up}, which is never earned back"
    images = tried["warm_up_seconds"] / (1 / usual - 1 / changed)
    return f"{warm_up}, which is earned back after {images:,.0f} images"


if __name__ == "__main__":
    sys.exit(main())


def _return_freed_memory():
    """From now on glibc gives freed memory back to the system, which is close to its default."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 20)  # M_TRIM_THRESHOLD
        libc.malloc_trim(0)
