from dataclasses import replace
from functools import partial

import pandas as pd
import pytest

from lablib import MLP, KnowledgeDistillationTrainer, TrainingConfig, train_or_load
from lablib.record import main, record
from lablib.runs import run_path


@pytest.fixture(scope="module")
def store(tiny_data, tmp_path_factory):
    """Two seeds of an MLP, the first with another rate too, a student of it, and a run that has only begun."""
    shape = {"image_shape": tiny_data.image_shape, "num_classes": tiny_data.num_classes}
    build = partial(MLP, (4,), **shape)
    folder = tmp_path_factory.mktemp("store")
    config = TrainingConfig(num_epochs=2, batch_size=12, device="cpu", validation_split=0.25, output_dir=str(folder))
    runs = {
        "first": train_or_load(build, config, tiny_data),
        "second": train_or_load(build, replace(config, seed=1), tiny_data),
        "faster": train_or_load(build, replace(config, learning_rate=0.01), tiny_data),
    }
    teacher = runs["first"].load_weights(build())
    trainer = partial(KnowledgeDistillationTrainer, teacher=teacher, temperature=3.0, alpha=0.5)
    runs["student"] = train_or_load(build, config, tiny_data, trainer_class=trainer)
    begun = run_path(build, replace(config, seed=7), tiny_data)
    begun.mkdir()
    (begun / "identity.json").write_bytes((runs["first"].path / "identity.json").read_bytes())
    return folder, runs


def test_each_finished_run_is_a_row_with_what_it_is_and_what_it_found(store):
    folder, runs = store
    table = record(folder).set_index("run")
    assert set(table.index) == {run.path.name for run in runs.values()}
    first, student = table.loc[runs["first"].path.name], table.loc[runs["student"].path.name]
    assert first[["dataset", "model", "trainer", "seed"]].tolist() == ["tiny", "MLP", "StreamlinedTrainer", 0]
    assert first["arguments"] == '{"dropout": 0.1, "hidden_sizes": [4]}'
    assert "image_shape" not in student["trainer_arguments"]
    for part in ('"alpha": 0.5', '"temperature": 3.0', '"class": "MLP"', '"hidden_sizes": [4]'):
        assert part in student["trainer_arguments"]
    for name in ("val_accuracy", "test_accuracy", "best_epoch", "epochs", "seconds", "device", "threads", "parameters"):
        assert first[name] == runs["first"].result[name]
    assert first["torch"] == runs["first"].result["versions"]["torch"]


def test_seeds_of_one_config_have_its_hash_and_another_rate_has_another(store):
    folder, runs = store
    table = record(folder).set_index("run")
    of = {name: table.loc[run.path.name, "config"] for name, run in runs.items()}
    assert of["first"] == of["second"] == of["student"] != of["faster"]
    assert '"learning_rate": 0.01' in table.loc[runs["faster"].path.name, "knobs"]


def test_the_command_writes_a_table_that_reads_back(store, tmp_path, capsys):
    folder, _ = store
    out = tmp_path / "results" / "runs.csv"
    assert main(["--output-dir", str(folder), "--out", str(out)]) == 0
    assert "runs.csv: 4 runs" in capsys.readouterr().out
    read = pd.read_csv(out)
    assert read["run"].tolist() == record(folder)["run"].tolist()
    assert read["test_accuracy"].round(4).tolist() == record(folder)["test_accuracy"].round(4).tolist()


def test_an_empty_store_leaves_the_table_alone(tmp_path, capsys):
    out = tmp_path / "runs.csv"
    out.write_text("as it was")
    with pytest.raises(SystemExit):
        main(["--output-dir", str(tmp_path / "none"), "--out", str(out)])
    assert "no finished run in" in capsys.readouterr().err
    assert out.read_text() == "as it was"
    with pytest.raises(SystemExit):
        main(["--output-dir", str(out)])
    assert "is a file" in capsys.readouterr().err
