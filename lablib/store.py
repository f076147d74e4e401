"""The run store as a whole: what lies in it, and clearing it.

python -m lablib.store                     list the runs of runs/ with their states
python -m lablib.store clean               delete interrupted and damaged ones and leftovers, after asking
python -m lablib.store clean --finished    delete finished ones too
"""

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from lablib.config import TrainingConfig
from lablib.metrics import best_row
from lablib.runs import DamagedRunError, load_run

_RUN_NAME = re.compile(r".+-[0-9a-f]{12}(\.damaged-\d+)?")
_COLUMNS = dict.fromkeys(["run", "model", "dataset"], "object") | {"seed": "Int64", "state": "object"}
_COLUMNS |= {"epochs": "object", "val_accuracy": "float64", "test_accuracy": "float64", "size_mib": "float64"}
_COLUMNS |= {"changed": "datetime64[s]", "notes": "object"}


def runs_table(output_dir: str | Path) -> pd.DataFrame:
    """One row a run of a store, by data set, model (its class) and seed; none if the store is empty or missing.

    The state is "finished" (every file is what was written), "training" (a process holds its lock), "interrupted"
    (it goes on when it is asked for again), "damaged" (the notes say why), "unreadable" (the system refuses, which may
    pass) or "set aside" (a damaged one that was trained again). Accuracies are fractions: the best epoch's on
    validation, the test's of finished runs only, none of runs that cannot be trusted. `changed` is in local time.
    Folders that are not a run of the store are left out. Raises NotADirectoryError if `output_dir` is a file.
    """
    rows = [_row(path) for path in _run_folders(Path(output_dir))]
    table = pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_COLUMNS)
    return table.sort_values(["dataset", "model", "seed", "run"], ignore_index=True)


def readable_runs(table: pd.DataFrame) -> pd.DataFrame:
    """A `runs_table` for people: texts, empty where there is nothing to say."""

    def texts(name: str, text: Callable[[Any], str] = str) -> list[str]:
        return ["" if pd.isna(value) else text(value) for value in table[name]]

    columns = {name: texts(name) for name in ("model", "dataset", "seed", "state", "epochs")}
    for name, title in {"val_accuracy": "validation accuracy", "test_accuracy": "test accuracy"}.items():
        columns[title] = texts(name, lambda share: f"{100 * share:.2f} %")
    columns |= {"MiB": texts("size_mib", "{:.1f}".format), "changed": texts("changed", "{:%Y-%m-%d %H:%M}".format)}
    return pd.DataFrame({**columns, "notes": texts("notes")}, index=table["run"])


def clean_runs(output_dir: str | Path, finished: bool = False, ask: Callable[[str], str] = input) -> list[str]:
    """List what is of no use in a store, delete it if `ask` answers y or yes, and return the names of what is gone.

    Of no use are interrupted and damaged runs, those set aside, and what a broken-off writing left in finished runs;
    with `finished` the finished runs too. A run in training stays. Lock files stay: they are empty, and a process
    that waits for one that is deleted would hold another lock than the next process.
    """
    table = runs_table(output_dir).set_index("run")
    unwanted = {"interrupted", "damaged", "set aside"} | ({"finished"} if finished else set())
    runs = [(Path(output_dir, name), row["state"], row["epochs"]) for name, row in table.iterrows()]
    found = [run for run in runs if run[1] in unwanted]
    for path in [path for path, state, _ in runs if state == "finished" and not finished]:
        found += [(file, "leftover", "") for file in sorted(path.glob("*.partial"))]
    if not found:
        print(f"Nothing to clean in {output_dir}")
        return []
    sizes = {path: _size_and_time(path)[0] for path, _, _ in found}
    for path, state, epochs in found:
        print(f"{path.relative_to(output_dir)!s:<40} {state:<12} {epochs:<10} {sizes[path]:8.1f} MiB")
    print(f"in all {sum(sizes.values()):.1f} MiB")
    if not _agreed(ask, f"Delete these {len(found)}? [y/N] "):
        print("Nothing is deleted")
        return []
    gone = [path for path, state, _ in found if _delete(path, state)]
    print(f"Deleted {len(gone)} of {len(found)}; {sum(sizes[path] for path in gone):.1f} MiB are free")
    return [str(path.relative_to(output_dir)) for path in gone]


def _run_folders(store: Path) -> list[Path]:
    if store.exists() and not store.is_dir():
        raise NotADirectoryError(f"{store} is a file; a run store is a folder, such as runs")
    paths = store.iterdir() if store.exists() else ()
    folders = [path for path in paths if _RUN_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return [p for p in folders if _is_set_aside(p) or (p / "identity.json").exists() or (p / "result.json").exists()]


def _is_set_aside(path: Path) -> bool:
    return ".damaged-" in path.name


def _row(path: Path) -> dict[str, Any]:
    held = _is_held(path)  # asked first: a run that ends in between is then finished
    row = _inspect(path)
    if held and row["state"] in ("interrupted", "damaged"):
        row["state"] = "training"
    row["size_mib"], row["changed"] = _size_and_time(path)
    return row


def _inspect(path: Path) -> dict[str, Any]:
    """What a run's files say; whether somebody trains it, they do not."""
    row, notes = {"run": path.name, "epochs": ""}, []
    try:
        config = _read_identity(path, row)
        run = load_run(path)
        row["state"] = "finished" if run else "interrupted"
        row |= _progress(path, config)
        if run:
            row["test_accuracy"] = run.result["test_accuracy"]
            notes += run.result.get("notes", [])
    except OSError as error:
        row["state"] = "damaged" if isinstance(error, DamagedRunError) else "unreadable"
        notes.append(str(error).replace(f"{path}{os.sep}", ""))
    except (ValueError, KeyError, TypeError):
        notes.append("history.jsonl is damaged, so its progress is not known")
    if count := len(list(path.glob("set-aside/*/"))):
        notes.append(f"{count} checkpoint{'s' * (count > 1)} set aside")
    if _is_set_aside(path):
        row |= {"state": "set aside", "epochs": "", "val_accuracy": None, "test_accuracy": None}
    return row | {"notes": "; ".join(notes)}


def _read_identity(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The config of a run, which leaves out what is at its default; model, data set and seed go into its row."""
    try:
        described = json.loads((path / "identity.json").read_bytes())
        config = described["config"]
        row |= {"model": str(described["model"]["class"]), "dataset": str(described["data"]["name"])}
        row["seed"] = int(config.get("seed", TrainingConfig.seed))
        return config
    except FileNotFoundError:
        return {}  # load_run finds it missing
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedRunError(f"{path / 'identity.json'} is damaged: {error!r}") from error


def _progress(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    metric = config.get("early_stopping_metric", TrainingConfig.early_stopping_metric)
    history = path / "history.jsonl"  # which is not there before the end of the first epoch
    rows = [json.loads(line) for line in history.read_bytes().splitlines()] if history.exists() else []
    epochs = f"{len(rows)} of {config.get('num_epochs', TrainingConfig.num_epochs)}"
    return {"epochs": epochs, "val_accuracy": float(best_row(rows, metric)["val_accuracy"]) if rows else None}


def _size_and_time(path: Path) -> tuple[float, pd.Timestamp | None]:
    """MiB and time of the last change of a file, or of all files of a folder."""
    size, changed = 0, []
    for file in [path, *(Path(parent, name) for parent, _, names in os.walk(path) for name in names)]:
        with suppress(FileNotFoundError):  # a training deletes its old checkpoints
            stat = file.lstat()
            size += 0 if file.is_dir() else stat.st_size
            changed.append(stat.st_mtime)
    return size / 2**20, pd.Timestamp.fromtimestamp(int(max(changed))) if changed else None


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(path.name + ".lock"), blocking=False)  # the one that a training holds


def _is_held(path: Path) -> bool:
    if not path.with_name(path.name + ".lock").exists():
        return False
    try:
        with _lock(path):
            return False
    except OSError:  # held, or another user's, which may be held
        return True


def _agreed(ask: Callable[[str], str], question: str) -> bool:
    try:
        return ask(question).strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):  # nobody there, or Ctrl-C
        print()
        return False


def _delete(path: Path, state: str) -> bool:
    """Delete what was listed, unless its run is in another state by now."""
    run, expected = (path.parent, "finished") if state == "leftover" else (path, state)
    try:
        with nullcontext() if state == "set aside" else _lock(run):
            if _inspect(run)["state"] != expected:
                print(f"{run.name} is left alone: it is no longer {expected}")
                return False
            path.unlink() if state == "leftover" else shutil.rmtree(path)
            return True
    except Timeout:
        print(f"{run.name} is left alone: a process is at it")
    except OSError as error:
        print(f"{path.name} cannot be deleted: {error}")
    return False


def main(arguments: Sequence[str]) -> int:
    """0; wrong arguments end the process with a message and 2."""
    parser = argparse.ArgumentParser(prog="python -m lablib.store", description="What lies in a run store.")
    parser.add_argument("command", nargs="?", choices=("list", "clean"), default="list")
    parser.add_argument("--output-dir", default="runs", help="the run store (runs)")
    parser.add_argument("--finished", action="store_true", help="with clean: delete finished runs too")
    parser.add_argument("--yes", action="store_true", help="with clean: do not ask")
    options = parser.parse_args(arguments)
    if options.command == "list" and (options.finished or options.yes):
        parser.error("--finished and --yes go with clean")
    try:
        if options.command == "clean":
            clean_runs(options.output_dir, options.finished, ask=(lambda _: "yes") if options.yes else input)
        elif (table := runs_table(options.output_dir)).empty:
            print(f"No runs in {options.output_dir}")
        else:
            print(readable_runs(table).reset_index().to_string(index=False))
    except NotADirectoryError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
