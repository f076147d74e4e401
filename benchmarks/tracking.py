"""What Weights & Biases costs a training: without it, with it, and with histograms of all gradients and parameters.

python -m benchmarks.tracking     writes results/tracking.csv and results/tracking.md
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pandas as pd

from benchmarks import machine
from benchmarks.cases import CASES, Case, build, load
from benchmarks.isolated import isolated

WAYS = {"off": {}, "on": {"use_wandb": True}, "histograms": {"use_wandb": True, "wandb_watch": True}}


def measure(case: Case, way: str, epochs: int) -> list[dict]:
    """Two trainings of this process, one after the other; the first one also has to import what the second one finds.

    An epoch is one step: what tracking costs an epoch does not depend on the epoch's length, and is seen best in a
    short one. `seconds` are those of an epoch, `ends` those before the first and after the last, with the test, `kib`
    what W&B has written of the run.
    """
    import torch

    from lablib import StreamlinedTrainer, TrainingConfig
    from lablib.metrics import history

    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    os.environ.pop("WANDB_DIR", None)
    torch.set_num_threads(1)
    data = load(case, case.batch_size)
    measured = []
    for training in ("first", "second"):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainingConfig(
                num_epochs=epochs,
                batch_size=case.batch_size,
                early_stopping_patience=None,
                device="cpu",
                output_dir=folder,
                **WAYS[way],
            )
            trainer = StreamlinedTrainer(build(case, data.image_shape, data.num_classes), config, data)
            start = time.perf_counter()
            trainer.train()
            trainer.final_test()  # which W&B has done by now
            whole = time.perf_counter() - start
            seconds = history(trainer.state.log_history)[-1]["seconds"]
            written = sum(
                path.stat().st_size for path in Path(folder, "wandb").glob("offline-run-*/**/*") if path.is_file()
            )
            measured.append(
                {
                    "network": case.name,
                    "parameters": sum(p.numel() for p in trainer.model.parameters()),
                    "tracking": way,
                    "training": training,
                    "seconds": seconds / epochs,
                    "ends": whole - seconds,
                    "kib": written / 1024,
                }
            )
    return measured


def page(table: pd.DataFrame, about: str) -> str:
    """What tracking adds, as medians with their ranges over the rounds."""
    from lablib.report import markdown

    rows = []
    for (network, parameters), part in table.groupby(["network", "parameters"], sort=False):
        wide = part.pivot(index=["training", "round"], columns="tracking", values=["seconds", "ends", "kib"])
        for way, name in (("on", "W&B"), ("histograms", "W&B and histograms")):
            seconds, ends = (wide[what][way] - wide[what]["off"] for what in ("seconds", "ends"))
            rows.append(
                {
                    "network": network,
                    "parameters": f"{parameters:,}",
                    "with": name,
                    "an epoch, ms": _range(1000 * seconds["second"]),
                    "a run, KiB": f"{wide['kib'][way].median():.0f}",
                    "a run's ends, s": _range(ends["second"]),
                    "those of a process's first run, s": _range(ends["first"]),
                }
            )
    shown = pd.DataFrame(rows).set_index("network")
    return (
        "# What does Weights & Biases cost?\n\n"
        "What a training takes longer with it than without, offline, in turns with trainings without it, on one "
        "thread: the median and the range of these differences. A difference below 0 is chance. None of it changes a "
        "weight, and a run's ends do not count in its `seconds`. `python -m benchmarks.tracking` measures this, and "
        f"`tracking.csv` has each training.\n\n{markdown(shown)}\n{about}\n"
    )


def _range(values: pd.Series) -> str:
    return f"{values.median():.2f} ({values.min():.2f} to {values.max():.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tracking", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", default="MLP-2,ResidualCNN-4", help="networks of benchmarks/cases.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", default="results", type=Path)
    options = parser.parse_args(arguments)
    by_name = {case.name: case for case in CASES}
    if unknown := [name for name in options.cases.split(",") if name not in by_name]:
        parser.error(f"--cases {unknown[0]}: there are {', '.join(by_name)}")
    rows = [
        {"round": turn, **row}
        for turn in range(options.rounds)
        for name in options.cases.split(",")
        for way in WAYS
        for row in isolated(measure, by_name[name], way, options.epochs)
    ]
    table = pd.DataFrame(rows)
    rounds = f"{options.rounds} round{'s' * (options.rounds != 1)} of two trainings of {options.epochs} epochs"
    about = f"Measured on {date.today()} on {machine.named(isolated(machine.describe))}: {rounds}."
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "tracking.csv", index=False)
    (options.out / "tracking.md").write_text(page(table, about))
    return 0


if __name__ == "__main__":
    sys.exit(main())
