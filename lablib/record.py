"""Every finished run of a store in one table, for whoever wants to reckon with them.

python -m lablib.record --output-dir runs --out results/runs.csv
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lablib.files import write_atomically
from lablib.identity import digest
from lablib.runs import load_run
from lablib.store import runs_table

_MEASURED = ("parameters", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch", "epochs", "seconds")
_WHERE = ("device", "precision", "threads", "processes")
_OF_THE_DATA = ("image_shape", "num_classes")  # of a model's arguments


def record(output_dir: str | Path) -> pd.DataFrame:
    """One row a finished run, by data set, model, config and seed; no damaged or interrupted ones.

    `run` is its folder in the store. `arguments` and `trainer_arguments` are JSON: what model and trainer were made
    with. `config` is a hash of all knobs but the seed, the same for runs that may be averaged, and `knobs` are those
    not at their defaults, as JSON. Accuracies are fractions, losses nats, and `seconds` those of the training.
    Raises NotADirectoryError if `output_dir` is a file.
    """
    table = runs_table(output_dir)
    rows = [_row(Path(output_dir, name)) for name in table.loc[table["state"] == "finished", "run"]]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).sort_values(["dataset", "model", "arguments", "trainer_arguments", "config", "seed"])


def _row(path: Path) -> dict[str, Any]:
    described = json.loads((path / "identity.json").read_bytes())
    result = load_run(path).result
    model, trainer = described["model"], described["trainer"]
    config = {name: value for name, value in described["config"].items() if name != "seed"}
    of_trainer = {name: _named(value) for name, value in trainer.get("arguments", {}).items()}
    row = {
        "run": path.name,
        "dataset": result["dataset"],
        "model": result["model"],
        "arguments": _json({k: v for k, v in (model["arguments"] or {}).items() if k not in _OF_THE_DATA}),
        "trainer": trainer["class"],
        "trainer_arguments": _json(of_trainer),
        "config": digest(config),
        "knobs": _json(config),
        "seed": result["seed"],
    }
    row |= {name: result.get(name) for name in (*_MEASURED, *_WHERE)}
    return row | result["versions"] | {"notes": "; ".join(result.get("notes", []))}


def _named(value: Any) -> Any:
    """A teacher by its class and its arguments instead of its layers."""
    if isinstance(value, dict) and "class" in value:
        arguments = value.get("arguments") or {}
        return {"class": value["class"], **{k: v for k, v in arguments.items() if k not in _OF_THE_DATA}}
    return value


def _json(value: dict) -> str:
    return json.dumps(value, sort_keys=True)


def main(arguments: Sequence[str]) -> int:
    """0; wrong arguments end the process with a message and 2."""
    parser = argparse.ArgumentParser(prog="python -m lablib.record", description="The finished runs of a store as CSV.")
    parser.add_argument("--output-dir", default="runs", help="the run store (runs)")
    parser.add_argument("--out", default="results/runs.csv", type=Path, help="the table (results/runs.csv)")
    options = parser.parse_args(arguments)
    try:
        table = record(options.output_dir)
    except NotADirectoryError as error:
        parser.error(str(error))
    if table.empty:
        parser.error(f"no finished run in {options.output_dir}, and {options.out} stays as it is")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, table.to_csv(index=False, float_format="%.6g").encode())
    print(f"{options.out}: {len(table)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
