"""The record: the figures of every finished run in one table, to reckon with and to build upon.

python -m lablib.record --output-dir runs --out results/runs.csv    add a store's finished runs to it
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from lablib.config import TrainingConfig
from lablib.files import write_atomically
from lablib.identity import digest
from lablib.runs import Run, load_run, run_name
from lablib.store import runs_table

_MEASURED = ("parameters", "val_accuracy", "val_loss", "test_accuracy", "test_loss", "best_epoch", "epochs", "seconds")
_WHERE = ("device", "precision", "threads", "processes")
_WHAT = ("dataset", "model", "arguments", "trainer", "trainer_arguments", "config", "seed")
_OF_THE_DATA = ("image_shape", "num_classes")  # of a model's arguments
_ORDER = ["dataset", "model", "arguments", "trainer_arguments", "config", "seed"]


@dataclass(frozen=True)
class RecordedRun(Run):
    """A run of which the figures are known and nothing else: `path` is the record, the history is empty."""

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Raises ValueError: there are none."""
        raise ValueError(
            f"{self.path} has the figures of this run and not its weights; to have them, train it: leave out `recorded`"
        )


class Record(dict[str, RecordedRun]):
    """Recorded runs by their names in a store."""

    def find(self, described: dict[str, Any]) -> RecordedRun | None:
        """The run of an identity (see `lablib.identity`), or None.

        A name has the hash of all that changes a run's outcome in it, so a run is found if it is the same one, and only
        then: another rate, seed, architecture or data set is another name. With a teacher without weights, as
        `Experiment.teacher` gives it, the name is not known; then it is the run that has the same in all columns of
        the record, the teacher's architecture among them. How that teacher was trained no column tells: it is taken to
        be of the student's own config and seed. Networks and trainers of a notebook's own are not found so, since the
        columns do not describe them. Raises ValueError if there are several.
        """
        networks = [value for value in described["trainer"].get("arguments", {}).values() if _is_network(value)]
        if all(network["initial_weights"] for network in networks):
            return self.get(run_name(described))
        if described["trainer"]["code"] or any(
            n["code"] or not n["arguments"] for n in (described["model"], *networks)
        ):
            return None
        columns = _columns(described)
        alike = [name for name, run in self.items() if all(run.result[what] == columns[what] for what in _WHAT)]
        if len(alike) > 1:
            raise ValueError(
                f"the record has {len(alike)} runs of this description, which it cannot tell apart: {', '.join(alike)}"
                "; train teacher and student, without `recorded`"
            )
        return self[alike[0]] if alike else None


def recorded_runs(path: str | Path) -> Record:
    """The runs of a record, for `experiment(..., recorded=...)`.

    Raises FileNotFoundError if there is no record, and ValueError if the file is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no record {path}; `make record` writes one of the runs in runs/")
    table = _read(Path(path))
    wrong = [name for name in ("seed", *_MEASURED) if pd.to_numeric(table[name], errors="coerce").isna().any()]
    if wrong:
        raise ValueError(f"{path} is no record of runs: in {', '.join(wrong)} not every row has a number")
    table = table.assign(**{name: pd.to_numeric(table[name]) for name in ("seed", *_MEASURED)})
    results = table[[*_WHAT, *_MEASURED, "device", "precision"]].to_dict("records")
    return Record(
        (name, RecordedRun(Path(path), result, [])) for name, result in zip(table["run"], results, strict=True)
    )


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
    return pd.DataFrame(rows).sort_values(_ORDER)


def added(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """A `record` as texts, and with it the rows that stand in a file already and are of other runs.

    Raises ValueError if the file is no record.
    """
    new = _read(io.StringIO(table.to_csv(index=False, float_format="%.6g")))
    if not path.exists():
        return new
    old = _read(path)
    both = pd.concat([new, old[~old["run"].isin(new["run"])]]).fillna("")
    return both.sort_values(_ORDER, key=lambda column: column.astype(int) if column.name == "seed" else column)


def _read(source: Path | io.StringIO) -> pd.DataFrame:
    """A record as texts, so that what is not changed is written back as it was."""
    try:
        table = pd.read_csv(source, dtype=str, keep_default_na=False)
        missing = [name for name in ("run", *_WHAT, *_MEASURED, *_WHERE) if name not in table]
    except ValueError as error:
        raise ValueError(f"{source} is no record of runs: {error}") from error
    if missing:
        raise ValueError(f"{source} is no record of runs: it lacks the column {missing[0]}")
    return table


def _row(path: Path) -> dict[str, Any]:
    described = json.loads((path / "identity.json").read_bytes())
    result = load_run(path).result
    row = {"run": path.name} | _columns(described) | {name: result.get(name) for name in (*_MEASURED, *_WHERE)}
    return row | result["versions"] | {"notes": "; ".join(result.get("notes", []))}


def _columns(described: dict[str, Any]) -> dict[str, Any]:
    """What an identity says in the columns of a record."""
    model, trainer = described["model"], described["trainer"]
    config = {name: value for name, value in described["config"].items() if name != "seed"}
    of_trainer = {name: _named(value) for name, value in trainer.get("arguments", {}).items()}
    return {
        "dataset": described["data"]["name"],
        "model": model["class"],
        "arguments": _json({k: v for k, v in (model["arguments"] or {}).items() if k not in _OF_THE_DATA}),
        "trainer": trainer["class"],
        "trainer_arguments": _json(of_trainer),
        "config": digest(config),
        "knobs": _json(config),
        "seed": described["config"].get("seed", TrainingConfig.seed),  # left out where it is the default
    }


def _is_network(value: Any) -> bool:
    return isinstance(value, dict) and "initial_weights" in value


def _named(value: Any) -> Any:
    """A teacher by its class and its arguments instead of its layers."""
    if _is_network(value):
        arguments = value.get("arguments") or {}
        return {"class": value["class"], **{k: v for k, v in arguments.items() if k not in _OF_THE_DATA}}
    return value


def _json(value: dict) -> str:
    return json.dumps(value, sort_keys=True)


def main(arguments: Sequence[str]) -> int:
    """0; wrong arguments end the process with a message and 2."""
    parser = argparse.ArgumentParser(
        prog="python -m lablib.record", description="Add the finished runs of a store to a table of runs, as CSV."
    )
    parser.add_argument("--output-dir", default="runs", help="the run store (runs)")
    parser.add_argument("--out", default="results/runs.csv", type=Path, help="the table (results/runs.csv)")
    options = parser.parse_args(arguments)
    try:
        table = record(options.output_dir)
        if table.empty:
            print(f"no finished run in {options.output_dir}: {options.out} stays as it is")
            return 0
        all_runs = added(table, options.out)
    except (NotADirectoryError, ValueError) as error:
        parser.error(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.out, all_runs.to_csv(index=False).encode())
    print(f"{options.out}: {len(all_runs)} runs, {len(table)} of them in {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
