"""Experiments: all runs, side by side or one after the other, whatever becomes of one of them."""

import os
from dataclasses import replace
from functools import partial

import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from bot_api import BotApi
from transformers import TrainerCallback
from wandb_runs import go_offline, runs_in

from lablib import MLP, Experiment, KnowledgeDistillationTrainer, StreamlinedTrainer, TrainingConfig, experiment
from lablib.experiments import initial_model
from lablib.identity import build_seeded
from lablib.runs import load_run, publish, train_or_load
from lablib.telegram import TelegramNotifier

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": lambda: tiny_mlp((8,))}
SEEDS = (0, 1)


def config_in(folder) -> TrainingConfig:
    return TrainingConfig(num_epochs=2, batch_size=8, validation_split=0.25, device="cpu", output_dir=str(folder))


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Experiment:
    """Two models × two seeds, trained one after the other."""
    return experiment(MODELS, config_in(tmp_path_factory.mktemp("finished")), tiny_data, SEEDS)


@pytest.fixture
def no_training(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(StreamlinedTrainer, "train", forbidden)
    monkeypatch.setattr(joblib, "Parallel", forbidden)


class Notes:
    """What a test notes, which makes no other run."""

    def __init__(self, **notes):
        vars(self).update(notes)

    def __identity__(self):
        return "notes"


class FailsInTraining(MLP):
    def forward(self, images):
        raise ArithmeticError("no forward today")


def fails_to_build():
    raise ValueError("no such layer")


def timeless(run):
    """All that a run found out, its weights as bytes, without what a clock adds."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return result, rows, (run.path / "model.safetensors").read_bytes()


# Results


def test_every_model_is_trained_with_every_seed_as_it_would_be_alone(finished, tiny_data, tmp_path):
    assert list(finished.runs) == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]
    assert finished.failures == {}
    alone = config_in(tmp_path)
    for (name, seed), run in finished.runs.items():
        expected = train_or_load(MODELS[name], replace(alone, seed=seed), tiny_data)
        assert timeless(run) == timeless(expected)
    weights = {run.result["test_loss"] for run in finished.runs.values()}
    assert len(weights) == 4


def test_values_are_one_models_results_by_seed(finished):
    runs = finished.runs
    assert finished.values("wide") == {seed: runs["wide", seed].result["test_accuracy"] for seed in SEEDS}
    losses = {seed: runs["narrow", seed].result["val_loss"] for seed in SEEDS}
    assert finished.values("narrow", "val_loss") == losses
    assert len(set(losses.values())) == 2


def test_some_of_the_models_keep_their_runs(finished):
    narrow = finished.select("narrow")
    assert list(narrow.models) == ["narrow"]
    assert narrow.runs == {key: run for key, run in finished.runs.items() if key[0] == "narrow"}
    with pytest.raises(KeyError, match="huge"):
        finished.select("huge")


def test_predictions_are_the_models_answers_to_the_test_images(finished):
    table = finished.predictions()
    assert len(table) == 4 * len(finished.data.test_labels)
    for (model, seed), answers in table.groupby(["model", "seed"]):
        with torch.no_grad():
            images = finished.data.normalise(finished.data.test_images)
            confidence, predicted = finished.trained_model(model, seed)(images).softmax(1).max(1)
        assert answers["predicted"].tolist() == predicted.tolist()
        assert answers["confidence"].tolist() == pytest.approx(confidence.tolist(), abs=1e-3)
        assert answers["correct"].mean() == pytest.approx(finished.values(model)[seed])


def test_families_are_compared_by_depth_and_whole_names_once_but_no_model_with_itself(finished):
    pairs = {"families": ("narrow", "wide"), "itself": ("wide", "wide")}
    assert finished.compare(pairs).table["label"].tolist() == ["families"]
    assert finished.compare(pairs, by=[2, 4]).table["label"].tolist() == ["families"]
    deep = replace(finished, models=dict.fromkeys(["a-2", "b-2"]), runs={})
    deep.runs.update({(name, 0): finished.runs["wide", 0] for name in deep.models})
    assert deep.compare({"it": ("a", "b")}, by=[2]).table["label"].tolist() == ["it, depth 2"]


def test_a_student_whose_teacher_failed_has_failed_and_the_others_are_trained(finished, tmp_path):
    partly = replace(finished, config=config_in(tmp_path), failures={("wide", 1): "ArithmeticError: no forward today"})
    partly = replace(partly, runs={key: run for key, run in finished.runs.items() if key != ("wide", 1)})
    students = partly.distil("narrow", "wide", 4, 0.7)
    assert list(students.runs) == [("Distilled", 0)]
    assert students.failures == {("Distilled", 1): "its teacher failed: ArithmeticError: no forward today"}
    assert students.frame()["seed"].tolist() == [0, 1]
    with pytest.raises(KeyError, match="no finished run of 'wide' with seed 1"):
        partly.distil("narrow", "wide", 4, 0.7, seeds=[1])


def test_histories_are_one_table_with_a_row_for_each_epoch_of_each_run(finished):
    table = finished.histories()
    assert list(table[["model", "seed", "epoch"]].itertuples(index=False, name=None)) == [
        (name, seed, epoch) for name in MODELS for seed in SEEDS for epoch in (1, 2)
    ]
    row = table[(table.model == "wide") & (table.seed == 1) & (table.epoch == 2)].iloc[0]
    assert row.drop(["model", "seed"]).to_dict() == finished.runs["wide", 1].history[1]
    assert not table.isna().any(axis=None)


def test_a_seed_that_is_given_twice_counts_once(config, tiny_data):
    result = experiment({"narrow": MODELS["narrow"]}, config, tiny_data, [0, 0])
    assert len(result.runs) == 1
    assert len(result.histories()) == 2


def test_a_trained_model_has_the_weights_of_its_run(finished):
    for seed in (0, 1):
        model = finished.trained_model("wide", seed)
        stored = safetensors.torch.load_file(finished.runs["wide", seed].path / "model.safetensors")
        assert not model.training
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in stored.items())
    first = finished.trained_model("wide").state_dict()
    assert torch.equal(first["classifier.bias"], finished.trained_model("wide", 0).state_dict()["classifier.bias"])
    with pytest.raises(
        KeyError, match=r"no finished run of 'wide' with seed 7: there are those of \[.*\('wide', 1\)\]"
    ):
        finished.trained_model("wide", 7)


def test_an_initial_model_is_what_the_run_began_with(finished):
    initial = initial_model(finished, "wide", 1)
    expected = build_seeded(MODELS["wide"], 1).state_dict()
    assert not initial.training
    assert all(torch.equal(initial.state_dict()[name], tensor) for name, tensor in expected.items())


def test_experiments_on_the_same_data_can_be_joined(finished, tiny_data, no_training):
    narrow = experiment({"narrow": MODELS["narrow"]}, finished.config, tiny_data, [0])
    wide = experiment({"wide": MODELS["wide"]}, finished.config, tiny_data, [1])
    both = narrow | wide
    assert both.runs == {key: finished.runs[key] for key in [("narrow", 0), ("wide", 1)]}
    assert list(both.models) == ["narrow", "wide"]
    assert both.seeds == (0, 1)
    assert list(both.histories().model) == ["narrow", "narrow", "wide", "wide"]
    darker = replace(tiny_data, name="darker", train_images=tiny_data.train_images // 2)
    with pytest.raises(
        ValueError, match="tiny and darker cannot be joined; both must be on the same images and labels"
    ):
        narrow | Experiment(darker, finished.config, {}, ())


def test_a_second_experiment_trains_nothing(finished, tiny_data, no_training):
    again = experiment(MODELS, finished.config, tiny_data, SEEDS, jobs=2)
    assert again.runs == finished.runs
    assert list(again.runs) == list(finished.runs)
    with pytest.raises(AssertionError, match="trained again"):
        experiment(MODELS, finished.config, tiny_data, [0, 2])


def test_only_what_is_missing_is_trained_and_the_order_stays(finished, tiny_data, tmp_path):
    config = config_in(tmp_path)
    train_or_load(MODELS["wide"], replace(config, seed=1), tiny_data)
    trained = []

    class Noting(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            trained.append((self.config.seed, sum(p.numel() for p in self.model.parameters())))
            return super().train(*args, **kwargs)

    train_or_load(MODELS["wide"], replace(config, seed=1), tiny_data, trainer_class=Noting)
    trained.clear()
    result = experiment(MODELS, config, tiny_data, SEEDS, trainer_class=Noting)
    assert [seed for seed, _ in trained] == [0, 1, 0]
    assert list(result.runs) == list(finished.runs)


# A trainer for each run


class Marking(StreamlinedTrainer):
    """Notes which trainer had which run."""

    mark, trained = "", []

    def train(self, *args, **kwargs):
        self.trained.append((self.mark, sum(p.numel() for p in self.model.parameters()), self.config.seed))
        return super().train(*args, **kwargs)


def marking(mark: str) -> type[Marking]:
    return type(f"Marking{mark.title()}", (Marking,), {"mark": mark})


NARROW, WIDE = (sum(p.numel() for p in build().parameters()) for build in MODELS.values())


@pytest.mark.parametrize(
    ("trainers", "expected"),
    [
        ({0: "a", 1: "b"}, ["a", "b", "a", "b"]),
        ({1: "b", 0: "a", 7: "never"}, ["a", "b", "a", "b"]),
        (
            {(name, seed): f"{name}{seed}" for name in MODELS for seed in SEEDS},
            ["narrow0", "narrow1", "wide0", "wide1"],
        ),
        ({("wide", 1): "special", 0: "a", 1: "b"}, ["a", "b", "a", "special"]),
        ({("narrow", 0): "x", ("narrow", 1): "y", 0: "a", ("wide", 1): "z"}, ["x", "y", "a", "z"]),
    ],
    ids=["by seed", "by seed in another order", "by run", "a run before its seed", "mixed"],
)
def test_each_run_gets_its_own_trainer_by_run_or_else_by_seed(trainers, expected, config, tiny_data):
    Marking.trained.clear()
    classes = {key: marking(mark) for key, mark in trainers.items()}
    result = experiment(MODELS, replace(config, num_epochs=1), tiny_data, SEEDS, trainer_class=classes)
    runs = [(NARROW, 0), (NARROW, 1), (WIDE, 0), (WIDE, 1)]
    assert Marking.trained == [(mark, *run) for mark, run in zip(expected, runs, strict=True)]
    assert not result.failures
    assert list(result.runs) == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]


@pytest.mark.parametrize(
    ("keys", "missing"),
    [
        ([0], "[('narrow', 1), ('wide', 1)]"),
        ([("wide", 0), ("wide", 1), 0], "[('narrow', 1)]"),
        ([("narrow", 0), ("narrow", 1), ("other", 0), ("other", 1)], "[('wide', 0), ('wide', 1)]"),
        (["narrow", "wide"], "[('narrow', 0), ('narrow', 1), ('wide', 0), ('wide', 1)]"),
        ([], "[('narrow', 0), ('narrow', 1), ('wide', 0), ('wide', 1)]"),
    ],
)
def test_a_run_without_a_trainer_is_refused_by_name_before_anything_is_trained(
    keys, missing, config, tiny_data, no_training
):
    with pytest.raises(ValueError, match="trainer_class has no trainer for ") as caught:
        experiment(MODELS, config, tiny_data, SEEDS, trainer_class=dict.fromkeys(keys, StreamlinedTrainer))
    assert f"no trainer for {missing}; it has some for {keys}" in str(caught.value)


CELLS = {f"T = {T}, α = {alpha}": (T, alpha) for T in (1, 4) for alpha in (0.5, 1.0)}


def grid(config, data, jobs: int = 1) -> Experiment:
    """One student for each temperature and alpha, taught by a teacher of its seed, and one without a teacher."""
    teachers = {seed: build_seeded(MODELS["wide"], 10 + seed) for seed in SEEDS}
    trainers = {
        (name, seed): partial(KnowledgeDistillationTrainer, teacher=teachers[seed], temperature=T, alpha=alpha)
        for name, (T, alpha) in CELLS.items()
        for seed in SEEDS
    }
    trainers |= {("no teacher", seed): StreamlinedTrainer for seed in SEEDS}
    students = dict.fromkeys([*CELLS, "no teacher"], MODELS["narrow"])
    return experiment(students, config, data, SEEDS, jobs=jobs, trainer_class=trainers)


@pytest.fixture(scope="module")
def distilled(tiny_data, tmp_path_factory) -> Experiment:
    return grid(config_in(tmp_path_factory.mktemp("grid")), tiny_data)


def test_a_grid_of_students_and_one_without_a_teacher_are_trained_in_one_call(distilled, finished):
    assert not distilled.failures
    assert list(distilled.runs) == [(name, seed) for name in [*CELLS, "no teacher"] for seed in SEEDS]
    assert len({run.path for run in distilled.runs.values()}) == 10
    weights = {(run.path / "model.safetensors").read_bytes() for run in distilled.runs.values()}
    assert len(weights) == 10
    for seed in SEEDS:  # as if it had been trained without the others
        assert timeless(distilled.runs["no teacher", seed]) == timeless(finished.runs["narrow", seed])


def test_the_losses_of_a_grid_are_weighted_by_the_alpha_of_each_cell(distilled):
    histories = distilled.histories()
    for name, (_, alpha) in CELLS.items():
        rows = histories[histories["model"] == name]
        assert len(rows) == 4
        for part in ("train", "val"):
            expected = alpha * rows[f"{part}_soft_loss"] + (1 - alpha) * rows[f"{part}_hard_loss"]
            assert rows[f"{part}_loss"].tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    alone = histories[histories["model"] == "no teacher"]
    assert alone[["train_soft_loss", "val_soft_loss"]].isna().all(axis=None)
    assert alone["train_loss"].notna().all()


def test_a_grid_is_loaded_by_the_next_call(distilled, tiny_data, no_training):
    again = grid(distilled.config, tiny_data)
    assert again.runs == distilled.runs


def test_a_cell_of_a_grid_is_as_if_it_were_trained_alone_with_the_teacher_of_its_seed(distilled, tiny_data, tmp_path):
    name, (temperature, alpha) = "T = 4, α = 0.5", CELLS["T = 4, α = 0.5"]
    knobs = replace(config_in(tmp_path), seed=1)
    losses = []
    for teachers_seed in (10, 11):
        teacher = build_seeded(MODELS["wide"], teachers_seed)
        trainer = partial(KnowledgeDistillationTrainer, teacher=teacher, temperature=temperature, alpha=alpha)
        losses.append(timeless(train_or_load(MODELS["narrow"], knobs, tiny_data, trainer_class=trainer)))
    assert losses[1] == timeless(distilled.runs[name, 1])
    assert losses[0] != losses[1]


# Failures


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        (fails_to_build, "ValueError: no such layer"),
        (lambda: FailsInTraining((4,), image_shape=(1, 6, 6)), "fails with ArithmeticError: no forward today"),
        (lambda: tiny_mlp((4,), num_classes=2), "the network gives 2 outputs, and tiny has 3 classes"),
    ],
    ids=["in the building", "in the forward", "too few outputs"],
)
def test_a_run_that_fails_loses_no_other_and_equal_errors_are_reported_once(broken, error, config, tiny_data):
    models = {"broken one": broken, "narrow": MODELS["narrow"]}
    with pytest.warns(UserWarning, match="failed") as caught:
        result = experiment(models, config, tiny_data, [0, 3, 4])
    assert list(result.runs) == [("narrow", 0), ("narrow", 3), ("narrow", 4)]
    assert list(result.failures) == [("broken one", 0), ("broken one", 3), ("broken one", 4)]
    first, others = (str(warning.message) for warning in caught)
    assert "the run of 'broken one' with seed 0 failed" in first
    assert len(first.splitlines()) <= 11
    assert "'broken one' with seed 0 and 2 more failed" in others
    for text in (first, others, *result.failures.values()):
        assert error in text
    assert result.values("broken one") == {}
    with pytest.raises(KeyError, match=error):
        result.trained_model("broken one")


def test_an_experiment_of_which_every_run_fails_raises_and_is_tried_again_by_the_next_call(config, tiny_data):
    models = {"net": lambda: FailsInTraining((4,), image_shape=(1, 6, 6), num_classes=3), "other": fails_to_build}
    for _ in range(2):
        with (
            pytest.warns(UserWarning, match="failed"),
            pytest.raises(RuntimeError, match="all 4 runs failed, 2 of them with ValueError: no such layer"),
        ):
            experiment(models, config, tiny_data, 2)


@pytest.mark.parametrize("seeds", [3, np.arange(3), range(3), [0, 1, 2, 1], np.int64(3)])
def test_seeds_are_a_number_of_them_or_whole_numbers(seeds, config, tiny_data, monkeypatch):
    monkeypatch.setattr("lablib.experiments._train_pending", lambda *arguments: None)
    result = experiment(MODELS, config, tiny_data, seeds)
    assert result.seeds == (0, 1, 2)
    assert all(type(seed) is int for seed in result.seeds)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"data": "digits"}, TypeError, r"load_data\('digits'\)"),
        ({"seeds": "012"}, TypeError, "seeds = '012', but it must be a number of seeds"),
        ({"seeds": 1.5}, TypeError, "seeds = 1.5, but it must be"),
        ({"config": {"num_epochs": 3}}, TypeError, "must be a TrainingConfig"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_what_to_write(arguments, error, words, config, tiny_data):
    usual = {"config": config, "data": tiny_data, "seeds": [0]}
    with pytest.raises(error, match=words):
        experiment(MODELS, **(usual | arguments))


def test_runs_of_one_name_under_two_configs_cannot_be_joined(finished, tiny_data, tmp_path):
    other = Experiment(tiny_data, replace(finished.config, learning_rate=0.1), dict(MODELS), SEEDS)
    with pytest.raises(ValueError, match="narrow, wide under two configs"):
        finished | other
    elsewhere = Experiment(tiny_data, replace(finished.config, output_dir=str(tmp_path)), dict(MODELS), (7,))
    assert (finished | elsewhere).runs == finished.runs


class Counting(TrainerCallback):
    """Counts the epochs of the run that it is told of."""

    epochs = 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs += 1

    def on_train_end(self, args, state, control, **kwargs):
        print(f"epochs: {self.epochs}")


@pytest.mark.parametrize("within", [False, True], ids=["as an argument", "within a partial trainer"])
def test_callbacks_are_called_each_run_with_its_own_copy(within, config, tiny_data, capsys):
    counting = Counting()
    given = (
        {"trainer_class": partial(StreamlinedTrainer, callbacks=[counting])} if within else {"callbacks": [counting]}
    )
    narrow = {"narrow": MODELS["narrow"]}
    result = experiment(narrow, config, tiny_data, SEEDS, **given)
    assert capsys.readouterr().out.count("epochs: 2\n") == 2
    assert experiment(narrow, config, tiny_data, SEEDS, **given).runs == result.runs
    assert result.runs["narrow", 0].path != experiment(narrow, config, tiny_data, [0]).runs["narrow", 0].path


def test_a_student_is_known_by_its_teachers_run_whether_the_weights_are_there_or_not(finished, tiny_data, tmp_path):
    def students(teachers, folder):
        trainers = {s: partial(KnowledgeDistillationTrainer, teacher=teachers.teacher("wide", s)) for s in SEEDS}
        return experiment({"student": MODELS["narrow"]}, config_in(folder), tiny_data, SEEDS, trainer_class=trainers)

    taught = students(finished, tmp_path / "runs")
    published = {key: load_run(publish(run, tmp_path / "published")) for key, run in finished.runs.items()}
    without = replace(finished, runs=published)
    assert students(without, tmp_path / "runs").runs == taught.runs
    with (
        pytest.warns(UserWarning, match="failed"),
        pytest.raises(RuntimeError, match=r"was published without its weights\. Train it to have them"),
    ):
        students(without, tmp_path / "elsewhere")


@pytest.mark.parametrize("jobs", [0, 1.5, "2", True, None])
def test_a_number_of_jobs_that_is_none_is_refused(jobs, config, tiny_data, no_training):
    with pytest.raises(ValueError, match=f"jobs = {jobs!r}") as caught:
        experiment(MODELS, config, tiny_data, SEEDS, jobs=jobs)
    assert ", but it must be a whole number: runs side by side, or -1 for one a core" in str(caught.value)


@pytest.mark.parametrize(
    ("models", "seeds", "words"), [({}, SEEDS, "0 models and 2 seeds"), (MODELS, [], "2 models and 0 seeds")]
)
def test_an_experiment_without_models_or_seeds_is_refused(models, seeds, words, config, tiny_data):
    with pytest.raises(ValueError, match=f"an experiment needs a model and a seed; it has {words}"):
        experiment(models, config, tiny_data, seeds)


def test_an_interruption_by_hand_passes_through_and_keeps_what_is_finished(config, tiny_data):
    class Interrupted(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            if self.config.seed == 1 and not state.resumed:
                raise KeyboardInterrupt
            state.trained.append(self.config.seed)
            return super().train(*args, **kwargs)

    state = Notes(trained=[], resumed=False)
    narrow = {"narrow": MODELS["narrow"]}
    with pytest.raises(KeyboardInterrupt):
        experiment(narrow, config, tiny_data, [0, 1, 2], trainer_class=Interrupted)
    assert state.trained == [0]
    state.resumed = True
    result = experiment(narrow, config, tiny_data, [0, 1, 2], trainer_class=Interrupted)
    assert state.trained == [0, 1, 2]
    assert list(result.values("narrow")) == [0, 1, 2]


def test_the_number_of_threads_is_as_before_when_an_experiment_ends(config, tiny_data):
    before = torch.get_num_threads()
    experiment({"narrow": MODELS["narrow"]}, config, tiny_data, [0])
    assert torch.get_num_threads() == before


# Side by side


@pytest.fixture
def two_cores(monkeypatch):
    """So that each of two jobs takes one thread, as this process does."""
    monkeypatch.setattr(joblib, "cpu_count", lambda *args, **kwargs: 2)


def test_jobs_side_by_side_give_the_same_bits_and_a_failure_loses_no_other(finished, config, tiny_data, two_cores):
    bias = 0.5

    class Net(MLP):
        def forward(self, images):
            return super().forward(images) + bias

    models = {
        **MODELS,
        "closure": lambda: Net((4,), image_shape=(1, 6, 6), num_classes=3),
        "broken": lambda: FailsInTraining((4,), image_shape=(1, 6, 6)),
    }
    with pytest.warns(UserWarning, match="'broken' with seed [01] (failed|and 1 more failed)") as caught:
        side_by_side = experiment(models, config, tiny_data, SEEDS, jobs=2)
    assert len(caught) == 2
    assert {key: error.split(":")[0] for key, error in side_by_side.failures.items()} == {
        ("broken", seed): "SanityCheckError" for seed in SEEDS
    }
    assert list(side_by_side.runs) == [(name, seed) for name in ("narrow", "wide", "closure") for seed in SEEDS]
    for key, run in finished.runs.items():
        assert timeless(side_by_side.runs[key]) == timeless(run)
    assert {run.result["threads"] for run in side_by_side.runs.values()} == {1}


def test_a_grid_of_trainers_side_by_side_gives_the_same_bits(distilled, config, tiny_data, two_cores):
    side_by_side = grid(config, tiny_data, jobs=2)
    assert not side_by_side.failures
    assert list(side_by_side.runs) == list(distilled.runs)
    for key, run in distilled.runs.items():
        assert timeless(side_by_side.runs[key]) == timeless(run)
        assert side_by_side.runs[key].path.name == run.path.name


def test_a_damaged_run_is_reported_by_whichever_process_finds_it(config, tiny_data, two_cores):
    narrow = {"narrow": MODELS["narrow"]}
    before = experiment(narrow, config, tiny_data, SEEDS)
    for seed in SEEDS:
        os.truncate(before.runs["narrow", seed].path / "history.jsonl", 10)
    with pytest.warns(UserWarning, match=r"history\.jsonl is damaged.* set aside"):
        after = experiment(narrow, config, tiny_data, SEEDS, jobs=2)
    for key, run in before.runs.items():
        assert after.runs[key].history[-1]["val_loss"] == run.history[-1]["val_loss"]
        assert run.path == after.runs[key].path


@pytest.mark.parametrize("every_run", [False, True])
def test_workers_that_do_not_know_the_token_leave_the_messages_to_the_experiment(
    every_run, config, tiny_data, two_cores, monkeypatch
):
    class Silent(StreamlinedTrainer):
        def __init__(self, *args, config, **kwargs):
            if config.use_telegram_notifications or config.telegram_bot_token is not None:
                raise AssertionError("a worker would send messages, or knows the token")
            super().__init__(*args, config=config, **kwargs)

    knobs = replace(
        config,
        use_telegram_notifications=True,
        telegram_every_run=every_run,
        telegram_bot_token="123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE",
        telegram_chat_id=42,
    )
    with BotApi() as api:
        monkeypatch.setattr(TelegramNotifier.__init__, "__defaults__", (None, None, api.url, 10))
        result = experiment({"narrow": MODELS["narrow"]}, knobs, tiny_data, SEEDS, jobs=2, trainer_class=Silent)
    assert not result.failures
    heads = [request.fields["caption"].split("\n")[0] for request in api.messages()]
    runs = [f"narrow on tiny, seed {seed}: training finished" for seed in SEEDS] if every_run else []
    assert sorted(heads) == sorted([*runs, "Experiment on tiny: finished"])
    assert heads[-1] == "Experiment on tiny: finished"


def test_each_run_of_an_experiment_side_by_side_is_a_run_of_its_own_in_wandb(
    config, tiny_data, two_cores, tmp_path, monkeypatch
):
    go_offline(monkeypatch, tmp_path / "home")
    offline = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}

    def build() -> MLP:
        os.environ.update(offline)  # the workers are there since an earlier test
        return MODELS["narrow"]()

    result = experiment({"narrow": build}, replace(config, use_wandb=True), tiny_data, SEEDS, jobs=2)
    tracked = runs_in(tmp_path / "runs")
    assert {run.run["display_name"] for run in tracked} == {run.path.name for run in result.runs.values()}
    assert {run.run["run_group"] for run in tracked} == {"tiny"}
    assert sorted(run.config["seed"] for run in tracked) == [*SEEDS]
    assert [run.exit_code for run in tracked] == [0, 0]


class Dies(MLP):
    def forward(self, images):
        os._exit(1)


def test_a_worker_that_dies_loses_no_finished_run_and_is_reported(config, tiny_data, two_cores):
    models = {"narrow": MODELS["narrow"], "dies": lambda: Dies((4,), image_shape=(1, 6, 6), num_classes=3)}
    experiment({"narrow": MODELS["narrow"]}, config, tiny_data, [0])
    with pytest.warns(UserWarning, match="failed"):
        result = experiment(models, config, tiny_data, [0, 1], jobs=2)
    assert ("narrow", 0) in result.runs
    assert {("dies", 0), ("dies", 1)} <= set(result.failures)
    assert all("Terminated" in error for error in result.failures.values())
    assert len(result.runs) + len(result.failures) == 4
