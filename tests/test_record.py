from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from torch import nn

from lablib import MLP, KnowledgeDistillationTrainer, TrainingConfig, experiment, train_or_load
from lablib.record import main, record, recorded_runs
from lablib.runs import run_path
from lablib.statistics import readable_table, results_table


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
    assert f"runs.csv: 4 runs, 4 of them in {folder}" in capsys.readouterr().out
    read = pd.read_csv(out)
    assert read["run"].tolist() == record(folder)["run"].tolist()
    assert read["test_accuracy"].round(4).tolist() == record(folder)["test_accuracy"].round(4).tolist()


def test_an_empty_store_leaves_the_table_alone(tmp_path, capsys):
    out = tmp_path / "runs.csv"
    out.write_text("as it was")
    assert main(["--output-dir", str(tmp_path / "none"), "--out", str(out)]) == 0
    assert f"no finished run in {tmp_path / 'none'}: {out} stays as it is" in capsys.readouterr().out
    assert out.read_text() == "as it was"
    with pytest.raises(SystemExit):
        main(["--output-dir", str(out)])
    assert "is a file" in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(store, tmp_path_factory):
    """The store's record."""
    out = tmp_path_factory.mktemp("record") / "runs.csv"
    assert main(["--output-dir", str(store[0]), "--out", str(out)]) == 0
    return out


def test_another_store_is_added_and_what_stands_there_stays_as_it_was(store, written, tiny_data, tmp_path, capsys):
    out = tmp_path / "runs.csv"
    out.write_bytes(written.read_bytes())
    build = partial(MLP, (5,), image_shape=tiny_data.image_shape, num_classes=tiny_data.num_classes)
    config = TrainingConfig(num_epochs=1, batch_size=12, device="cpu", validation_split=0.25, output_dir=str(tmp_path))
    other = [train_or_load(build, replace(config, seed=seed), tiny_data) for seed in (2, 10)]
    assert main(["--output-dir", str(tmp_path), "--out", str(out)]) == 0
    assert f"runs.csv: 6 runs, 2 of them in {tmp_path}" in capsys.readouterr().out
    lines = out.read_text().splitlines()
    assert set(written.read_text().splitlines()) < set(lines)
    mine = [line.partition(",")[0] for line in lines if '""hidden_sizes"": [5]' in line]
    assert mine == [run.path.name for run in other]  # seed 2 before seed 10
    before = out.read_bytes()
    assert main(["--output-dir", str(store[0]), "--out", str(out)]) == 0  # the same runs again
    assert out.read_bytes() == before


def test_a_run_that_is_in_the_store_replaces_its_row(store, written, tmp_path):
    out = tmp_path / "runs.csv"
    rows = pd.read_csv(written, dtype=str, keep_default_na=False)
    rows.assign(test_accuracy="0.123").to_csv(out, index=False)
    assert main(["--output-dir", str(store[0]), "--out", str(out)]) == 0
    assert out.read_bytes() == written.read_bytes()


@pytest.mark.parametrize("content", ["", "model,accuracy\nMLP,0.9\n", "run\nMLP-123456789abc\n", 'a,b\n"1,2\n3,4,5,6'])
def test_a_file_that_is_no_record_is_left_alone_and_not_read(store, tmp_path, capsys, content):
    out = tmp_path / "table.csv"
    out.write_text(content)
    with pytest.raises(SystemExit):
        main(["--output-dir", str(store[0]), "--out", str(out)])
    assert "table.csv is no record of runs: " in capsys.readouterr().err
    assert out.read_text() == content
    with pytest.raises(ValueError, match=r"table\.csv is no record of runs: "):
        recorded_runs(out)


def test_a_record_without_a_column_says_which(tmp_path):
    (tmp_path / "runs.csv").write_text("run,dataset,model\nMLP-123456789abc,tiny,MLP\n")
    with pytest.raises(ValueError, match="is no record of runs: it lacks the column arguments"):
        recorded_runs(tmp_path / "runs.csv")


def test_a_record_that_is_not_there_is_named_with_the_command_that_writes_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"there is no record .*none\.csv; `make record` writes one of the runs in runs/"
    ):
        recorded_runs(tmp_path / "none.csv")


def test_a_record_without_a_number_is_refused(written, tmp_path):
    rows = pd.read_csv(written, dtype=str, keep_default_na=False)
    rows.loc[1, ["test_accuracy", "epochs"]] = "?"
    rows.to_csv(tmp_path / "runs.csv", index=False)
    with pytest.raises(ValueError, match="no record of runs: in test_accuracy, epochs not every row has a number"):
        recorded_runs(tmp_path / "runs.csv")


def in_the_record(store, data, folder, seeds=(0, 1)):
    """What an experiment on the record's networks needs, with an empty store of its own."""
    shape = {"image_shape": data.image_shape, "num_classes": data.num_classes}
    config = TrainingConfig(num_epochs=2, batch_size=12, device="cpu", validation_split=0.25, output_dir=str(folder))
    return {"models": {"small": partial(MLP, (4,), **shape)}, "config": config, "data": data, "seeds": seeds}


def test_what_is_recorded_is_taken_and_not_trained(store, written, tiny_data, tmp_path):
    recorded = recorded_runs(written)
    result = experiment(**in_the_record(store, tiny_data, tmp_path), recorded=recorded)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
    for seed, run in {0: store[1]["first"], 1: store[1]["second"]}.items():
        for key in ("val_accuracy", "test_accuracy", "test_loss", "parameters", "epochs", "best_epoch", "seconds"):
            assert result.values("small", key)[seed] == pytest.approx(run.result[key], rel=1e-5)
    assert result.histories().empty
    with pytest.raises(
        ValueError,
        match="has the figures of this run and not its weights; to have them, train it: leave out `recorded`",
    ):
        result.trained_model("small")


def test_what_is_not_recorded_is_trained_or_with_train_false_left_out(store, written, tiny_data, tmp_path):
    wanted = in_the_record(store, tiny_data, tmp_path, seeds=(1, 2)) | {"recorded": recorded_runs(written)}
    without = experiment(**wanted, train=False)
    assert list(without.runs) == [("small", 1)]
    assert not without.failures
    trained = experiment(**wanted)
    assert list(trained.runs) == [("small", 1), ("small", 2)]
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {trained.runs["small", 2].path.name}
    assert set(trained.histories()["seed"]) == {2}


def test_a_run_of_another_rate_is_not_taken_from_the_record(store, written, tiny_data, tmp_path):
    wanted = in_the_record(store, tiny_data, tmp_path)
    wanted["config"] = replace(wanted["config"], learning_rate=0.5)
    result = experiment(**wanted, recorded=recorded_runs(written), train=False)
    assert not result.runs
    assert readable_table(results_table(result)).loc["small", "test accuracy"] == "not trained"


def test_the_stores_own_run_goes_before_the_record(store, written, tiny_data):
    rows = pd.read_csv(written, dtype=str, keep_default_na=False).assign(test_accuracy="0.123")
    other = written.with_name("other.csv")
    rows.to_csv(other, index=False)
    result = experiment(**in_the_record(store, tiny_data, store[0]), recorded=recorded_runs(other))
    assert [run.path for run in result.runs.values()] == [store[1]["first"].path, store[1]["second"].path]
    assert 0.123 not in result.values("small").values()


def taught(teacher, **arguments):
    return partial(KnowledgeDistillationTrainer, teacher=teacher, **{"temperature": 3.0, "alpha": 0.5} | arguments)


def test_a_student_is_found_by_its_description_where_its_teachers_weights_are_not_known(
    store, written, tiny_data, tmp_path
):
    wanted = in_the_record(store, tiny_data, tmp_path) | {"recorded": recorded_runs(written)}
    teacher = experiment(**wanted, train=False).teacher("small", 0)
    assert all(parameter.is_meta for parameter in teacher.parameters())
    with pytest.raises(KeyError, match="no finished run of 'small' with seed 7"):
        experiment(**wanted, train=False).teacher("small", 7)
    wanted["seeds"] = [0]
    student = experiment(**wanted, trainer_class=taught(teacher), train=False).runs["small", 0]
    assert student.result["test_accuracy"] == pytest.approx(store[1]["student"].result["test_accuracy"])
    assert student.result["trainer"] == "KnowledgeDistillationTrainer"
    for other in (taught(teacher, alpha=0.6), taught(teacher, temperature=2.0)):
        assert not experiment(**wanted, trainer_class=other, train=False).runs
    wider = MLP((5,), image_shape=tiny_data.image_shape, num_classes=tiny_data.num_classes).to("meta")
    assert not experiment(**wanted, trainer_class=taught(wider), train=False).runs


def test_with_the_teachers_weights_a_student_is_found_by_its_name_only(store, written, tiny_data, tmp_path):
    wanted = in_the_record(store, tiny_data, store[0]) | {"recorded": recorded_runs(written)}
    alone = experiment(**wanted)
    wanted["config"] = replace(wanted["config"], output_dir=str(tmp_path))
    for seed, found in {0: True, 1: False}.items():  # the recorded student has the teacher of the first seed
        trainer = taught(alone.teacher("small", seed))
        assert bool(experiment(**wanted | {"seeds": [0]}, trainer_class=trainer, train=False).runs) is found


def test_two_students_of_one_description_are_not_told_apart(store, written, tiny_data, tmp_path):
    rows = pd.read_csv(written, dtype=str, keep_default_na=False)
    student = rows[rows["trainer"] == "KnowledgeDistillationTrainer"]
    twin = student.assign(run="MLP-123456789abc")
    pd.concat([rows, twin]).to_csv(tmp_path / "runs.csv", index=False)
    wanted = in_the_record(store, tiny_data, tmp_path) | {"recorded": recorded_runs(tmp_path / "runs.csv")}
    teacher = experiment(**wanted, train=False).teacher("small", 0)
    with pytest.warns(UserWarning, match="the record has 2 runs of this description"):
        result = experiment(**wanted | {"seeds": [0]}, trainer_class=taught(teacher), train=False)
    assert not result.runs
    names = ", ".join(
        run for run in pd.read_csv(tmp_path / "runs.csv")["run"] if run in {*student["run"], *twin["run"]}
    )
    assert result.failures["small", 0] == (
        f"ValueError: the record has 2 runs of this description, which it cannot tell apart: {names}; "
        "train teacher and student, without `recorded`"
    )


def test_a_network_that_the_columns_do_not_describe_is_not_found_without_its_teachers_weights(
    store, written, tiny_data, tmp_path
):
    class Own(MLP):
        def forward(self, images):
            return 2 * super().forward(images)

    rows = pd.read_csv(written, dtype=str, keep_default_na=False)
    student = rows[rows["trainer"] == "KnowledgeDistillationTrainer"]
    own = student.assign(run="Own-1", model="Own")
    bare = student.assign(run="Sequential-1", model="Sequential", arguments="{}")
    pd.concat([rows, own, bare]).to_csv(tmp_path / "runs.csv", index=False)  # as those of other networks so named
    wanted = in_the_record(store, tiny_data, tmp_path) | {"recorded": recorded_runs(tmp_path / "runs.csv")}
    teacher = experiment(**wanted, train=False).teacher("small", 0)
    shape = {"image_shape": tiny_data.image_shape, "num_classes": tiny_data.num_classes}
    for build in (partial(Own, (4,), **shape), lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))):
        wanted["models"] = {"small": build}
        assert not experiment(**wanted | {"seeds": [0]}, trainer_class=taught(teacher), train=False).runs


def test_what_is_no_record_is_refused(store, written, tiny_data, tmp_path):
    runs = dict(recorded_runs(written))
    with pytest.raises(TypeError, match="recorded is a dict, but it must be what `recorded_runs` returns, a Record"):
        experiment(**in_the_record(store, tiny_data, tmp_path), recorded=runs)


def test_a_teacher_without_weights_cannot_teach(store, written, tiny_data, tmp_path):
    wanted = in_the_record(store, tiny_data, tmp_path) | {"recorded": recorded_runs(written)}
    teacher = experiment(**wanted, train=False).teacher("small", 0)
    with pytest.warns(UserWarning, match="the teacher has no weights: a record of runs has figures only; train it"):
        result = experiment(**wanted | {"seeds": [0]}, trainer_class=taught(teacher, alpha=0.6))
    assert result.failures["small", 0] == (
        "ValueError: the teacher has no weights: a record of runs has figures only; "
        "train it, as `experiment` does without `recorded`, and give it as the teacher then"
    )
