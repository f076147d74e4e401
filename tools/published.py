"""The published runs: what they are, which are missing, and their training.

    python tools/published.py --list                          what is there and what is missing
    python tools/published.py --jobs 2                        train what is missing, in this order, and publish it
    python tools/published.py --only ResidualCNN-2 A/cosine   some networks, groups, or recipes of a group

Trained runs lie in runs/, whole; what is finished is copied to results/runs/, without the weights. It can be
interrupted at any time and resumes where it was. Neither a notebook nor an installed lablib is needed. The tables of
wider networks, which no notebook asks for, are written too.
"""

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path

import pandas as pd
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)

from lablib import MLP, ResidualCNN, ResidualMLP, SimpleCNN, TrainingConfig, experiment, load_data, runs  # noqa: E402
from lablib.data import ImageData  # noqa: E402
from lablib.distillation import KnowledgeDistillationTrainer  # noqa: E402
from lablib.identity import run_identity, run_name  # noqa: E402
from lablib.statistics import compare, results_table, save_table  # noqa: E402

SIZES = {2: (128, 64), 4: (128, 64, 64, 32), 8: (128, 128, 64, 64, 32, 32, 16, 16)}
DEPTHS = (2, 4, 8, 16, 32, 64)  # of the depth study
PATIENT = ("MLP-32", "NoShortcut-16", "HeMLP-64")  # networks of it that are trained without early stopping too
TEMPERATURES, ALPHAS = (2, 4, 8), (0.5, 0.7, 0.9)
WIDE_REFERENCE = {"SimpleCNN-2": 0.7503, "SimpleCNN-3": 0.8017, "SimpleCNN-4": 0.8287}  # one author's single runs
WIDE_REFERENCE |= {"ResidualCNN-2": 0.8745, "ResidualCNN-3": 0.8689}

MNIST = TrainingConfig(num_epochs=60, batch_size=256, precision="fp32")
MNIST_RECIPES = {"reference": MNIST, "cosine": replace(MNIST, lr_schedule="cosine", early_stopping_patience=None)}
_CIFAR = TrainingConfig(
    num_epochs=60, batch_size=128, translation_fraction=0, horizontal_flip=True, rotation_degrees=10, precision="bf16"
)
_COSINE = {"num_epochs": 30, "learning_rate": 1e-2, "lr_schedule": "cosine", "warmup_fraction": 0.1}
_COSINE |= {"rotation_degrees": 0, "crop_padding": 4, "early_stopping_patience": None}
CIFAR_RECIPES = {"reference": _CIFAR, "cosine": replace(_CIFAR, **_COSINE)}


@dataclass(frozen=True)
class Block:
    """Runs of one table that share a config: some networks × some seeds; students with the name of their teacher."""

    name: str  # group/recipe
    data: str
    config: TrainingConfig
    networks: dict[str, Callable[[], nn.Module]]
    seeds: tuple[int, ...]
    teacher: str | None = None
    width: int = 0  # of the teacher
    distillation: dict[str, tuple[float, float]] = field(default_factory=dict)  # network -> temperature, alpha
    teacher_images: int | None = None  # that the teacher was trained on; None: all
    table: str | None = None  # its name in results/, unless a notebook writes it


def blocks(lab: "Lab", together: int = 5) -> Iterator[Block]:
    """All published runs, in the order in which they are trained; of teacher and student, some seeds together."""
    five = tuple(range(lab.seeds))
    three, some = five[:3], [five[start : start + together] for start in range(0, lab.seeds, together)]
    narrow, shallow = lab.cnns(lab.width), f"ResidualCNN-{lab.depths[0]}"
    student, teacher, distilled = narrow[shallow], f"ResidualCNN-{lab.depths[-1]}", f"Distilled-{lab.depths[0]}"

    def cnns(group: str, recipe: str, names: list[str], seeds: tuple[int, ...], width: int = lab.width) -> Block:
        networks = {name: network for name, network in lab.cnns(width).items() if name in names}
        return Block(f"{group}/{recipe}", lab.cifar, lab.cifar_recipes[recipe], networks, seeds)

    def students(group: str, recipe: str, knobs: dict, seeds: tuple[int, ...], images=None, teachers=None) -> Block:
        config, networks = replace(lab.cifar_recipes[recipe], max_train_images=images), dict.fromkeys(knobs, student)
        return Block(f"{group}/{recipe}", lab.cifar, config, networks, seeds, teacher, lab.width, knobs, teachers)

    for recipe, seeds in product(("cosine", "reference"), some):  # a student right after its teacher
        yield cnns("A", recipe, [teacher], seeds)
        yield students("A", recipe, {distilled: (4, 0.7)}, seeds)
        yield cnns("A", recipe, [shallow], seeds)
    middle = [f"{family}-{depth}" for family in ("ResidualCNN", "NoShortcut") for depth in lab.depths[1:-1]]
    others = [name for name in narrow if not name.startswith("ResidualCNN") and name not in middle]
    yield cnns("B", "cosine", others, five)
    yield cnns("B", "reference", others, five)
    for recipe in ("reference", "cosine"):
        yield Block(f"C/{recipe}", lab.mnist, lab.mnist_recipes[recipe], lab.mlps(), five)
    yield Block("C/depth", lab.mnist, lab.mnist_recipes["reference"], deep := lab.mlps(deep=True), five)
    patient = replace(lab.mnist_recipes["reference"], early_stopping_patience=None)
    yield Block("C/patient", lab.mnist, patient, {n: deep[n] for n in PATIENT if n in deep}, five)
    wide = [name for name in narrow if not name.startswith("NoShortcut") and name != teacher]
    yield replace(cnns("D", "cosine", wide, (0,), lab.wide), table="cnns_wide_cosine")
    yield cnns("E", "cosine", middle, five)
    yield cnns("E", "reference", middle, five)
    cells = {f"T = {T:g}, α = {a:g}": (T, a) for T, a in product(TEMPERATURES, ALPHAS)}
    yield (grid := students("F", "cosine", cells, three, lab.grid_images))
    alone = {"no teacher": student, teacher: narrow[teacher]}
    yield replace(grid, networks=alone, seeds=five, teacher=None, distillation={})
    if best := lab.best_of_grid(grid):
        yield students("F", "cosine", {"best cell": best}, five, lab.grid_images)
        yield students("F", "cosine", {"subset teacher": best}, five, lab.grid_images, lab.grid_images)
        yield students("G", "cosine", {f"Distilled-{lab.depths[0]}, tuned": best}, five)
    strong = {"networks": {distilled: lab.cnns(lab.strong)[shallow]}, "teacher": middle[0], "width": lab.strong}
    yield replace(cnns("I", "cosine", [middle[0], shallow], five, lab.strong), table="distillation_strong")
    yield replace(students("I", "cosine", {distilled: (4, 0.7)}, five), **strong, table="distillation_strong")
    yield replace(cnns("H", "reference", wide, (0,), lab.wide), table="cnns_wide")


@dataclass(frozen=True)
class Lab:
    """Where the runs come from and go to; the sizes are those of the published runs, but for tests."""

    mnist: str = "mnist"
    cifar: str = "data/cifar10-jpeg"
    output_dir: str = "runs"
    published: Path = runs.PUBLISHED
    seeds: int = 5
    width: int = 16
    strong: int = 32
    wide: int = 64
    depths: tuple[int, ...] = (2, 3, 4)
    grid_images: int = 5000
    mnist_recipes: dict[str, TrainingConfig] = field(default_factory=lambda: MNIST_RECIPES)
    cifar_recipes: dict[str, TrainingConfig] = field(default_factory=lambda: CIFAR_RECIPES)

    def data(self, name: str) -> ImageData:
        return _load(name, **({"image_size": 32, "channels": 3} if name == self.cifar else {}))

    def cnns(self, width: int) -> dict[str, Callable[[], nn.Module]]:
        plain = partial(ResidualCNN, shortcut=False)
        families = {"SimpleCNN": SimpleCNN, "NoShortcut": plain, "ResidualCNN": ResidualCNN}
        shape = _shape(self.data(self.cifar))
        return {f"{f}-{d}": partial(families[f], d, width, **shape) for f, d in product(families, self.depths)}

    def mlps(self, deep: bool = False) -> dict[str, Callable[[], nn.Module]]:
        shape, families = _shape(self.data(self.mnist)), {"MLP": MLP, "ResidualMLP": ResidualMLP}
        if deep:
            he, plain = partial(MLP, initialisation="he"), partial(ResidualMLP, shortcut=False)
            families |= {"NoShortcut": plain, "HeMLP": he, "HeNoDropout": partial(he, dropout=0.0)}
        sizes = {depth: SIZES.get(depth, (64,) * depth) for depth in (DEPTHS if deep else SIZES)}
        return {f"{f}-{d}": partial(families[f], sizes[d], **shape) for f, d in product(families, sizes)}

    def names(self, block: Block) -> dict[tuple[str, int], str | None]:
        """The run of each network and seed of a block; None for a student whose teacher is not trained yet."""
        data, names = self.data(block.data), {}
        for name, seed in product(block.networks, block.seeds):
            trainer = self._trainers(block, seed).get(name)
            if trainer is None and block.teacher:
                names[name, seed] = None
                continue
            described = run_identity(block.networks[name], replace(block.config, seed=seed), data, trainer)
            names[name, seed] = run_name(described)
        return names

    def _trainers(self, block: Block, seed: int, weights: bool = False) -> dict[str, partial]:
        if block.teacher is None:
            return {}
        build = self.cnns(block.width)[block.teacher]
        config = replace(block.config, seed=seed, max_train_images=block.teacher_images)
        name = run_name(run_identity(build, config, self.data(block.data)))
        run = runs.load_run(Path(self.output_dir, name)) or (None if weights else runs.load_run(self.published / name))
        if run is None:
            return {}
        teacher = partial(KnowledgeDistillationTrainer, teacher=runs.TrainedModel(run, build))
        return {name: partial(teacher, temperature=T, alpha=a) for name, (T, a) in block.distillation.items()}

    def missing(self, block: Block) -> list[tuple[str, int]]:
        there = {path.parent.name for path in self.published.glob("*/result.json")}
        return [key for key, name in self.names(block).items() if name not in there]

    def best_of_grid(self, block: Block) -> tuple[float, float] | None:
        """Temperature and alpha with the best mean validation accuracy; None before the grid is finished."""
        if self.missing(block):
            return None
        found = {key: runs.load_run(self.published / name) for key, name in self.names(block).items()}
        accuracy = pd.Series({key: run.result["val_accuracy"] for key, run in found.items()})
        return block.distillation[accuracy.groupby(level=0, sort=False).mean().idxmax()]

    def train(self, block: Block, networks: set[str], jobs: int) -> None:
        """Train and publish what a block misses, as many seeds at a time as there are jobs."""
        for start in range(0, len(block.seeds), jobs):
            seeds = block.seeds[start : start + jobs]
            wanted = {name for name, seed in self.missing(block) if seed in seeds} & networks
            if not wanted:
                continue
            config, data = replace(block.config, output_dir=self.output_dir), self.data(block.data)
            models, trainers = {name: block.networks[name] for name in wanted}, {}
            if block.teacher:  # a published one has no weights; then it is trained again
                teacher = {block.teacher: self.cnns(block.width)[block.teacher]}
                taught = replace(config, max_train_images=block.teacher_images)
                experiment(teacher, taught, data, seeds, jobs=jobs, weights=True)
                trainers = {(n, s): trainer for s in seeds for n, trainer in self._trainers(block, s, True).items()}
            done = experiment(models, config, data, seeds, jobs=jobs, trainer_class=trainers or None)
            for run in done.runs.values():
                runs.publish(run, self.published)

    def save_table(self, table: str, some: list[Block]) -> None:
        """Write a table of those runs of some blocks that are published, and what distillation gains; or nothing."""
        names = {key: name for block in some for key, name in self.names(block).items() if name}
        found = {key: run for key, name in names.items() if (run := runs.load_run(self.published / name))}
        rows = [run.result | {"model": model, "seed": seed} for (model, seed), run in found.items()]
        if not rows:
            return
        frame, path = pd.DataFrame(rows), self.published.parent / f"{table}.csv"
        save_table(results_table(frame, WIDE_REFERENCE if table.startswith("cnns_wide") else None), path)
        if taught := [block for block in some if block.teacher]:
            alone, (distilled,) = f"ResidualCNN-{self.depths[0]}", taught[0].distillation
            pairs = {"the teacher's lead": (taught[0].teacher, alone), "distillation": (distilled, alone)}
            save_table(compare(frame, pairs), path.with_name(f"{table}_gains.csv"))


@cache
def _load(name: str, **knobs) -> ImageData:
    return load_data(name, ROOT / "data", **knobs)


def _shape(data: ImageData) -> dict:
    return {"image_shape": data.image_shape, "num_classes": data.num_classes}


def main(arguments: list[str] | None = None, lab: Lab | None = None) -> int:
    """0; 1 if something of what was asked for is missing afterwards."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="train nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="networks, groups or their recipes")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (1)")
    options = parser.parse_args(arguments)
    lab, still, tables = lab or Lab(), 0, defaultdict(list)
    for block in blocks(lab, lab.seeds if options.list else options.jobs):
        group_wanted = not options.only or {block.name, block.name.partition("/")[0]} & {*options.only}
        tables[block.table].append(block)
        networks = [name for name in block.networks if group_wanted or name in options.only]
        if not (networks and block.seeds):
            continue
        if not options.list:
            lab.train(block, {*networks}, options.jobs)
        missing = [key for key in lab.missing(block) if key[0] in networks]
        still += len(missing)
        total, seeds = len(networks) * len(block.seeds), ", ".join(map(str, block.seeds))
        there = f"{block.name:<12} {total - len(missing):>3} of {total:<3} seeds {seeds:<14}"
        print(there, ", ".join(networks), flush=True)
    for table in filter(None, {} if options.list else tables):
        lab.save_table(table, tables[table])
    print(f"{still} missing" if still else "nothing missing")
    return int(still > 0)


if __name__ == "__main__":
    sys.exit(main())
