"""Does bfloat16 cost accuracy? ResidualCNN of depth 2 in both precisions, with the same seeds, on a part of CIFAR-10.

python -m benchmarks.precision     writes results/precision.csv and results/precision.md
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from lablib import ResidualCNN, TrainingConfig, experiment, load_data
from lablib.report import markdown
from lablib.statistics import paired_difference, summarise


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not in the store, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="data/cifar10-jpeg")
    parser.add_argument("--images", type=int, default=5000, help="training images")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output-dir", default="runs")
    parser.add_argument("--out", default="results", type=Path)
    options = parser.parse_args(arguments)
    data = load_data(options.data, image_size=32, channels=3)
    config = TrainingConfig(
        num_epochs=options.epochs,
        batch_size=128,
        rotation_degrees=10,
        translation_fraction=0,
        horizontal_flip=True,
        early_stopping_patience=None,
        max_train_images=options.images,
        output_dir=options.output_dir,
    )
    network = {"ResidualCNN-2": partial(ResidualCNN, 2, 16, image_shape=data.image_shape, num_classes=data.num_classes)}
    rows = []
    for precision in ("fp32", "bf16"):
        runs = experiment(network, replace(config, precision=precision), data, range(options.seeds), jobs=options.jobs)
        rows += [{"precision": precision, "seed": seed, **_accuracies(run)} for (_, seed), run in runs.runs.items()]
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "precision.csv", index=False)
    (options.out / "precision.md").write_text(page(table, data.name, options.images, options.epochs))
    return 0


def _accuracies(run) -> dict:
    return {name: run.result[name] for name in ("val_accuracy", "test_accuracy", "best_epoch", "seconds")}


def page(table: pd.DataFrame, dataset: str, images: int, epochs: int) -> str:
    """Means with 95 % intervals by precision, and the difference between runs of the same seed."""
    by_seed = {
        name: dict(zip(rows["seed"], rows["test_accuracy"], strict=True)) for name, rows in table.groupby("precision")
    }
    shown = pd.DataFrame(
        {"test accuracy": [summarise(list(by_seed[name].values())).percent() for name in ("fp32", "bf16")]},
        index=pd.Index(["fp32", "bf16"], name="precision"),
    )
    verdict = paired_difference(by_seed["bf16"], by_seed["fp32"]).verdict("bf16", "fp32")
    return (
        "# Does bfloat16 cost accuracy?\n\n"
        f"ResidualCNN of depth 2 and width 16 on {images:,} training images of {dataset}, {epochs} epochs; the test "
        "set's accuracy at the best validation epoch, mean over the seeds with the 95 % interval of the mean. "
        "`python -m benchmarks.precision` trains these runs, and `precision.csv` has each.\n\n"
        f"{markdown(shown)}\nBy seed: {verdict}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
