"""The store as a whole: every state is made as it comes about, with small trainings."""

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from transformers import TrainerCallback

from lablib import MLP, TrainingConfig
from lablib.runs import run_path
from lablib.store import clean_runs, main, readable_runs, runs_table
from lablib.training import train_or_load

ROOT = Path(__file__).parent.parent
tiny_mlp = partial(MLP, (8,), image_shape=(1, 6, 6), num_classes=3)
HOLD = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); input()"


class InterruptInEpoch(TrainerCallback):
    def __init__(self, epoch: int):
        self.epoch = epoch

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch > self.epoch - 1:
            raise KeyboardInterrupt


def config_of(store: Path, seed: int) -> TrainingConfig:
    return TrainingConfig(
        num_epochs=4, batch_size=8, validation_split=0.25, device="cpu", seed=seed, output_dir=str(store)
    )


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory) -> Path:
    """A store with finished runs of seeds 0 and 1, one of seed 2 interrupted in epoch 3, one of seed 3 in epoch 1."""
    store = tmp_path_factory.mktemp("Läufe für 実験 [a]") / "runs"
    for seed in (0, 1):
        train_or_load(tiny_mlp, config_of(store, seed), tiny_data)
    for seed, epoch in {2: 3, 3: 1}.items():
        with pytest.raises(KeyboardInterrupt):
            train_or_load(tiny_mlp, config_of(store, seed), tiny_data, callbacks=(InterruptInEpoch(epoch),))
    return store


@pytest.fixture
def store(trained, tmp_path) -> Path:
    """A copy of that store, to do with as one likes, under a path with spaces and letters of any script."""
    return shutil.copytree(trained, tmp_path / "Läufe für 実験 'a' & [b]")


@pytest.fixture
def path_of(store, tiny_data):
    return lambda seed: run_path(tiny_mlp, config_of(store, seed), tiny_data)


@pytest.fixture
def train(store, tiny_data):
    return lambda seed, **how: train_or_load(tiny_mlp, config_of(store, seed), tiny_data, **how)


@pytest.fixture
def hold():
    """Another process that holds a run's lock until the test ends."""
    processes = []

    def hold(run: Path):
        command = [sys.executable, "-c", HOLD, f"{run}.lock"]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"

    yield hold
    for process in processes:
        process.communicate("\n", timeout=120)


def row_of(store: Path, run: Path) -> pd.Series:
    return runs_table(store).set_index("run").loc[run.name]


def has_no_accuracy(row: pd.Series) -> bool:
    return pd.isna(row["val_accuracy"]) and pd.isna(row["test_accuracy"])


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-20])


def rewrite_result(path: Path, **changes):
    """Write a result anew with the sum that belongs to it."""
    result = json.loads((path / "result.json").read_bytes()) | changes
    sums = result.pop("sha256")
    sums["result"] = hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()
    (path / "result.json").write_text(json.dumps(result | {"sha256": sums}))


def everything(store: Path) -> set[str]:
    return {str(file.relative_to(store)) for file in store.rglob("*") if file.suffix != ".lock"}


# What lies there


def test_a_table_has_a_row_for_each_run_by_seed(store, path_of):
    table = runs_table(store)
    assert table["run"].tolist() == [path_of(seed).name for seed in range(4)]
    assert table["seed"].tolist() == [0, 1, 2, 3]
    assert set(table["model"]) == {"MLP"}
    assert set(table["dataset"]) == {"tiny"}
    assert table["state"].tolist() == ["finished", "finished", "interrupted", "interrupted"]
    assert table["epochs"].tolist() == ["4 of 4", "4 of 4", "2 of 4", "0 of 4"]
    assert table["notes"].tolist() == [""] * 4


def test_a_finished_run_has_the_accuracies_of_its_result(store, train):
    row, run = runs_table(store).iloc[1], train(1)
    assert row["val_accuracy"] == run.result["val_accuracy"]
    assert row["test_accuracy"] == run.result["test_accuracy"]
    bytes_there = sum(file.stat().st_size for file in run.path.iterdir())
    assert row["size_mib"] == pytest.approx(bytes_there / 2**20)
    newest = max(file.stat().st_mtime for file in [run.path, *run.path.iterdir()])
    assert abs(row["changed"] - pd.Timestamp.fromtimestamp(newest)) <= pd.Timedelta(seconds=1)


def test_an_interrupted_run_has_the_best_accuracy_so_far_and_no_test(store, path_of):
    history = [json.loads(line) for line in (path_of(2) / "history.jsonl").read_text().splitlines()]
    row = row_of(store, path_of(2))
    assert row["val_accuracy"] == max(epoch["val_accuracy"] for epoch in history)
    assert pd.isna(row["test_accuracy"])
    assert has_no_accuracy(row_of(store, path_of(3)))


def test_the_default_number_of_epochs_and_the_choice_by_loss_are_those_of_the_config(store, tiny_data):
    config = TrainingConfig(
        batch_size=8, validation_split=0.25, early_stopping_metric="loss", device="cpu", output_dir=str(store)
    )
    with pytest.raises(KeyboardInterrupt):
        train_or_load(tiny_mlp, config, tiny_data, callbacks=(InterruptInEpoch(3),))
    path = run_path(tiny_mlp, config, tiny_data)
    epochs = [{"val_loss": 0.5, "val_accuracy": 0.9}, {"val_loss": 0.4, "val_accuracy": 0.8}]
    (path / "history.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    row = row_of(store, path)
    assert row["epochs"] == "2 of 60"
    assert row["val_accuracy"] == 0.8


def test_a_run_whose_lock_another_process_holds_is_in_training(store, path_of, hold):
    hold(path_of(0))  # as whoever loads it may do for a moment
    hold(path_of(2))
    assert row_of(store, path_of(0))["state"] == "finished"
    row = row_of(store, path_of(2))
    assert row["state"] == "training"
    assert row["epochs"] == "2 of 4"
    assert not pd.isna(row["val_accuracy"])
    assert row_of(store, path_of(3))["state"] == "interrupted"


def test_a_run_is_in_training_for_the_process_that_trains_it_too(store, path_of, train):
    class Look(TrainerCallback):
        states = ()

        def on_epoch_end(self, args, state, control, **kwargs):
            self.states += (row_of(store, path_of(2))["state"],)

    look = Look()
    train(2, callbacks=(look,))
    assert look.states == ("training", "training")
    assert row_of(store, path_of(2))["state"] == "finished"


def test_a_lock_that_nobody_holds_is_no_training_and_looking_makes_none(store, path_of):
    Path(f"{path_of(2)}.lock").touch()
    Path(f"{path_of(3)}.lock").unlink()
    before = sorted(store.iterdir())
    assert row_of(store, path_of(2))["state"] == row_of(store, path_of(3))["state"] == "interrupted"
    assert sorted(store.iterdir()) == before


DAMAGES = {
    "weights cut": ("model.safetensors", cut_short, r"^model\.safetensors is damaged: it is not what was written$"),
    "weights lost": ("model.safetensors", Path.unlink, r"^model\.safetensors is missing$"),
    "identity lost": ("identity.json", Path.unlink, r"^identity\.json is missing$"),
    "identity cut": ("identity.json", cut_short, r"^identity\.json is damaged: JSONDecodeError"),
    "result cut": ("result.json", cut_short, r"^result\.json is damaged: JSONDecodeError"),
}


@pytest.mark.parametrize(("name", "damage", "note"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_run_has_no_accuracy_and_a_note_that_says_why(name, damage, note, store, path_of):
    damage(path_of(0) / name)
    row = row_of(store, path_of(0))
    assert row["state"] == "damaged"
    assert has_no_accuracy(row)
    assert row["epochs"] == ""
    assert re.search(note, row["notes"])


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"null", b"[]", b'{"config": null}', b'{"config": {"seed": "x"}}']
)
def test_an_interrupted_run_whose_identity_cannot_be_read_is_damaged(content, store, path_of):
    (path_of(2) / "identity.json").write_bytes(content)
    row = row_of(store, path_of(2))
    assert row["state"] == "damaged"
    assert has_no_accuracy(row)
    assert row["notes"].startswith("identity.json is damaged: ")


@pytest.mark.parametrize("content", [b"{", b"[1]\n", b"{}\n", b'{"val_accuracy": "high"}\n', b"\xff\n"])
def test_an_interrupted_run_whose_history_cannot_be_read_has_no_progress(content, store, path_of):
    (path_of(2) / "history.jsonl").write_bytes(content)
    row = row_of(store, path_of(2))
    assert row["state"] == "interrupted"
    assert has_no_accuracy(row)
    assert row["epochs"] == ""
    assert row["notes"] == "history.jsonl is damaged, so its progress is not known"


def test_a_run_that_was_set_aside_is_listed_beside_the_one_trained_again(store, path_of, train):
    cut_short(path_of(0) / "model.safetensors")
    with pytest.warns(UserWarning, match="set aside"):
        train(0)
    aside = row_of(store, path_of(0).with_name(path_of(0).name + ".damaged-1"))
    assert aside["state"] == "set aside"
    assert aside["seed"] == 0
    assert has_no_accuracy(aside)
    assert aside["notes"] == "model.safetensors is damaged: it is not what was written"
    assert row_of(store, path_of(0))["state"] == "finished"


def test_what_the_system_does_not_let_one_read_is_neither_a_result_nor_damage(store, path_of):
    (path_of(0) / "result.json").unlink()
    (path_of(0) / "result.json").mkdir()
    row = row_of(store, path_of(0))
    assert row["state"] == "unreadable"
    assert has_no_accuracy(row)
    assert "Is a directory" in row["notes"]
    assert path_of(0).name not in clean_runs(store, finished=True, ask=lambda _: "yes")
    assert path_of(0).exists()


def test_notes_of_a_result_and_checkpoints_set_aside_are_told(store, path_of):
    rewrite_result(path_of(0), notes=["resumed under torch 2.14", "resumed twice"])
    for step in (4, 8):
        (path_of(0) / "set-aside" / f"checkpoint-{step}").mkdir(parents=True)
    (path_of(2) / "set-aside" / "checkpoint-4").mkdir(parents=True)
    row = row_of(store, path_of(0))
    assert row["state"] == "finished"
    assert row["notes"] == "resumed under torch 2.14; resumed twice; 2 checkpoints set aside"
    assert row_of(store, path_of(2))["notes"] == "1 checkpoint set aside"


def test_an_empty_or_missing_store_is_an_empty_table_with_the_same_columns(trained, tmp_path):
    expected = runs_table(trained)
    for table in (runs_table(tmp_path), runs_table(tmp_path / "nowhere")):
        assert len(table) == len(readable_runs(table)) == 0
        assert table.dtypes.equals(expected.dtypes)
    assert not (tmp_path / "nowhere").exists()


def test_what_is_not_a_run_is_left_out_and_left_alone(store, path_of):
    before = len(runs_table(store))
    (store / "student").mkdir()
    (store / "student" / "identity.json").write_text("{}")  # no name of a run
    (store / "backup-202601011200").mkdir()  # no file of a run
    (store / "MLP-0123456789ab").touch()
    (store / "MLP-ba9876543210").symlink_to(path_of(0))
    assert len(runs_table(store)) == before
    clean_runs(store, finished=True, ask=lambda _: "yes")
    left = {path.name for path in store.iterdir() if path.suffix != ".lock"}
    assert left == {"student", "backup-202601011200", "MLP-0123456789ab", "MLP-ba9876543210"}


def test_a_file_in_the_place_of_a_store_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for asked in (runs_table, clean_runs):
        with pytest.raises(NotADirectoryError, match="file is a file; a run store is a folder, such as runs"):
            asked(tmp_path / "file")
    with pytest.raises(SystemExit, match="2"):
        main(["--output-dir", str(tmp_path / "file")])
    assert "is a file; a run store is a folder, such as runs" in capsys.readouterr().err


# Cleaning


@pytest.mark.parametrize("answer", ["y", "Yes ", " YES"])
def test_yes_deletes_interrupted_and_damaged_runs_and_no_other(answer, store, path_of, capsys):
    cut_short(path_of(1) / "history.jsonl")
    kept = {name for name in everything(store) if name.startswith(path_of(0).name)}
    asked = []
    gone = clean_runs(store, ask=lambda question: asked.append(question) or answer)
    assert asked == ["Delete these 3? [y/N] "]
    assert sorted(gone) == sorted(path_of(seed).name for seed in (1, 2, 3))
    assert everything(store) == kept
    said = capsys.readouterr().out
    assert re.search(rf"{path_of(2).name} +interrupted +2 of 4 +0\.\d MiB\n", said)
    assert re.search(rf"{path_of(1).name} +damaged +0\.0 MiB\n", said)
    assert re.search(r"in all 0\.\d MiB\nDeleted 3 of 3; 0\.\d MiB are free\n", said)


@pytest.mark.parametrize("answer", ["n", "", "N", "yess", "finished"])
def test_anything_but_yes_deletes_nothing(answer, store, capsys):
    before = everything(store)
    assert clean_runs(store, ask=lambda _: answer) == []
    assert everything(store) == before
    assert capsys.readouterr().out.endswith("Nothing is deleted\n")


def test_nobody_to_answer_and_ctrl_c_count_as_no(store, monkeypatch, capsys):
    before = everything(store)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["clean", "--output-dir", str(store)]) == 0

    def interrupt(question):
        raise KeyboardInterrupt

    assert clean_runs(store, ask=interrupt) == []
    assert everything(store) == before
    assert capsys.readouterr().out.count("Nothing is deleted\n") == 2


def test_finished_runs_go_only_where_that_is_asked_for(store, path_of, capsys):
    assert main(["clean", "--output-dir", str(store), "--yes"]) == 0
    assert runs_table(store)["run"].tolist() == [path_of(0).name, path_of(1).name]
    assert main(["clean", "--output-dir", str(store), "--yes"]) == 0
    assert f"Nothing to clean in {store}\n" in capsys.readouterr().out
    assert main(["clean", "--output-dir", str(store), "--finished", "--yes"]) == 0
    assert everything(store) == set()


def test_a_run_in_training_is_not_even_offered(store, path_of, hold):
    hold(path_of(2))
    before = {name for name in everything(store) if name.startswith(path_of(2).name)}
    gone = clean_runs(store, finished=True, ask=lambda _: "yes")
    assert sorted(gone) == sorted(path_of(seed).name for seed in (0, 1, 3))
    assert everything(store) == before


def test_a_training_that_begins_while_one_is_asked_is_left_alone(store, path_of, hold, capsys):
    gone = clean_runs(store, ask=lambda _: hold(path_of(2)) or "yes")
    assert gone == [path_of(3).name]
    assert path_of(2).exists()
    assert f"{path_of(2).name} is left alone: a process is at it\n" in capsys.readouterr().out


def test_a_run_that_is_finished_while_one_is_asked_is_left_alone(store, path_of, train, capsys):
    gone = clean_runs(store, ask=lambda _: train(2) and "yes")
    assert gone == [path_of(3).name]
    assert row_of(store, path_of(2))["state"] == "finished"
    assert f"{path_of(2).name} is left alone: it is no longer interrupted\n" in capsys.readouterr().out


def test_a_run_that_was_deleted_is_trained_anew_and_ends_the_same(store, path_of, train):
    before = train(0)
    clean_runs(store, finished=True, ask=lambda _: "yes")
    assert not path_of(0).exists()
    assert train(0).result["test_loss"] == before.result["test_loss"]


def test_runs_set_aside_and_half_written_files_go_and_their_finished_runs_stay(store, path_of, hold, capsys):
    shutil.rmtree(path_of(3))
    hold(path_of(2))
    shutil.copytree(path_of(0), path_of(0).with_name(path_of(0).name + ".damaged-1"))
    kept = everything(store) - {n for n in everything(store) if ".damaged-" in n}
    (path_of(1) / "result.json.999999.partial").write_bytes(b"{")
    writing = path_of(2) / "history.jsonl.999999.partial"  # of the one in training
    writing.write_bytes(b"{")
    assert has_no_accuracy(row_of(store, path_of(0).with_name(path_of(0).name + ".damaged-1")))
    gone = clean_runs(store, ask=lambda _: "y")
    assert sorted(gone) == sorted(
        [f"{path_of(0).name}.damaged-1", str(Path(path_of(1).name, "result.json.999999.partial"))]
    )
    assert everything(store) == kept | {str(writing.relative_to(store))}
    said = capsys.readouterr().out
    assert re.search(r"result\.json\.999999\.partial +leftover ", said)
    assert "history.jsonl" not in said


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(store, path_of, monkeypatch, capsys):
    delete = shutil.rmtree

    def refuse(path):
        if path == path_of(2):
            raise PermissionError(13, "Permission denied")
        delete(path)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert clean_runs(store, ask=lambda _: "yes") == [path_of(3).name]
    said = capsys.readouterr().out
    assert f"{path_of(2).name} cannot be deleted: [Errno 13] Permission denied\n" in said
    assert "Deleted 1 of 2; " in said


# The command line


def test_the_list_shows_percent_and_no_accuracy_where_there_is_none(store, path_of, train, capsys):
    cut_short(path_of(1) / "model.safetensors")
    assert main(["--output-dir", str(store)]) == 0
    said = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    accuracies = [f"{100 * train(0).result[key]:.2f} %" for key in ("val_accuracy", "test_accuracy")]
    assert all(text in said[path_of(0).name] for text in accuracies)
    assert re.search(r" MLP +tiny +1 +damaged +0\.0 .* model\.safetensors is damaged", said[path_of(1).name])
    assert "%" not in said[path_of(1).name]
    assert "<NA>" not in str(said)
    assert "nan" not in str(said)


def test_an_empty_store_is_said_to_be_empty(tmp_path, capsys):
    assert main(["--output-dir", str(tmp_path)]) == 0
    assert main(["clean", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No runs in {tmp_path}\nNothing to clean in {tmp_path}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--finished"], "--finished and --yes go with clean"),
        (["list", "--yes"], "--finished and --yes go with clean"),
        (["clear"], "invalid choice: 'clear'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs"], '-m lablib.store --output-dir "runs"'),
        (["runs", "RUNS=out/my runs"], '-m lablib.store --output-dir "out/my runs"'),
        (["clean-runs"], '-m lablib.store clean --output-dir "runs"'),
        (["clean-runs", "FINISHED=0"], '-m lablib.store clean --output-dir "runs"'),
        (["clean-runs", "FINISHED=1"], '-m lablib.store clean --output-dir "runs" --finished'),
    ],
)
def test_make_lists_and_cleans(arguments, expected):
    said = subprocess.run(
        ["make", "--no-print-directory", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.splitlines()[-1].strip().endswith(expected)
