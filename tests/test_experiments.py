"""Experiments: all runs, side by side or one after the other, whatever becomes of one of them."""

import os
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import joblib
import numpy as np
import pytest
import torch
from outcomes import timeless
from sklearn.metrics import balanced_accuracy_score
from transformers import TrainerCallback

from lablib import MLP, Experiment, KnowledgeDistillationTrainer, StreamlinedTrainer, TrainingConfig, experiment
from lablib.data import ImageData
from lablib.runs import TrainedModel, load_run, publish, train_or_load

tiny_mlp = partial(MLP, image_shape=(1, 6, 6), num_classes=3)
MODELS = {"narrow": partial(tiny_mlp, (4,)), "wide": lambda: tiny_mlp((8,))}
NARROW = {"narrow": MODELS["narrow"]}
SEEDS = (0, 1)


def config_in(folder) -> TrainingConfig:
    return TrainingConfig(num_epochs=2, batch_size=8, validation_split=0.25, device="cpu", output_dir=folder)


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path / "runs")


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory) -> Experiment:
    return experiment(MODELS, config_in(tmp_path_factory.mktemp("finished")), tiny_data, SEEDS)


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(joblib, "Parallel", Mock(side_effect=AssertionError("trained again")))


class Notes(SimpleNamespace):
    def __identity__(self):  # what a test notes makes no other run
        return "notes"


class FailsInTraining(MLP):
    def forward(self, images):
        raise ArithmeticError("no forward today")


def test_every_model_is_trained_with_every_seed_as_it_would_be_alone(finished, tiny_data, tmp_path):
    assert [*finished.runs, *finished.failures] == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]
    for (name, seed), run in finished.runs.items():
        expected = train_or_load(MODELS[name], replace(config_in(tmp_path), seed=seed), tiny_data)
        assert timeless(run) == timeless(expected)
    assert len({run.result["test_loss"] for run in finished.runs.values()}) == 4


def test_predictions_are_the_models_answers_to_the_test_images(finished):
    table = finished.predictions()
    assert len(table) == 4 * len(finished.data.test_labels)
    for (model, seed), answers in table.groupby(["model", "seed"]):
        with torch.no_grad():
            images = finished.data.normalise(finished.data.test_images)
            confidence, predicted = finished.trained_model(model, seed)(images).softmax(1).max(1)
        assert answers["predicted"].tolist() == predicted.tolist()
        assert answers["confidence"].tolist() == pytest.approx(confidence.tolist(), abs=1e-3)
        assert answers["label"].tolist() == finished.data.test_labels.tolist()
        assert answers["correct"].mean() == pytest.approx(finished.values(model)[seed])


def test_unbalanced_classes_are_named_and_have_sklearns_balanced_accuracy_in_the_table(config, tiny_data):
    assert "balanced_accuracy" not in experiment(NARROW, config, tiny_data, 1).frame()

    def uneven_part(part: str, *sizes: int) -> dict:
        images, labels = (getattr(tiny_data, f"{part}_{what}") for what in ("images", "labels"))
        kept = torch.cat([torch.where(labels == label)[0][:size] for label, size in enumerate(sizes)])
        return {f"{part}_images": images[kept], f"{part}_labels": labels[kept]}

    uneven = replace(tiny_data, name="uneven", **uneven_part("train", 12, 2, 8), **uneven_part("test", 6, 1, 4))
    with pytest.warns(UserWarning, match="The largest class of uneven has 6 times the images of the smallest"):
        result = experiment(NARROW, config, uneven, 2)
    said = result.predictions().groupby("seed")["predicted"]
    expected = [balanced_accuracy_score(uneven.test_labels, predicted) for _, predicted in said]
    assert result.frame()["balanced_accuracy"].tolist() == pytest.approx(expected)


def test_histories_and_gradients_are_tables_of_what_each_run_has(finished):
    histories, gradients = finished.histories(), finished.gradients()
    assert len(histories) == 4 * 2  # epochs
    row = histories.query("model == 'wide' and seed == 1 and epoch == 2").iloc[0]
    assert row.drop(["model", "seed"]).to_dict() == finished.runs["wide", 1].history[1]
    for (model, seed, when), layers in gradients.groupby(["model", "seed", "when"]):
        assert layers["rms"].tolist() == finished.runs[model, seed].measured()[f"gradient_{when}"].tolist()
        assert layers["layer"].tolist() == [1, 2]
    assert len(gradients) == 4 * 2 * 2


def test_models_and_families_are_compared_but_no_model_with_itself(finished):
    pairs = {"families": ("narrow", "wide"), "itself": ("wide", "wide")}
    assert finished.compare(pairs).table["label"].tolist() == ["families"]
    comparison = finished.compare("narrow", "wide")
    assert repr(comparison).startswith("- narrow − wide: ")
    assert (comparison - comparison).table["by_seed"].tolist() == [{0: 0, 1: 0}]
    deep = replace(finished, models=dict.fromkeys(["a-2", "b-2"]), runs={})
    deep.runs.update({(name, 0): finished.runs["wide", 0] for name in deep.models})
    assert deep.compare({"it": ("a", "b")}, by=[2]).table["label"].tolist() == ["it, depth 2"]
    with pytest.raises(KeyError, match="a-4"):
        deep.compare("a", "b", by=[2, 4])


def test_experiments_can_be_divided_and_joined_if_they_agree_on_the_data_and_what_both_have(finished, tiny_data):
    narrow, wide = finished.select("narrow"), replace(finished.select("wide"), seeds=(1, 7))
    assert list(narrow.runs) == [("narrow", 0), ("narrow", 1)]
    both = narrow | wide
    assert both.runs == finished.runs
    assert (list(both.models), both.seeds) == (["narrow", "wide"], (0, 1, 7))
    darker = replace(tiny_data, train_images=tiny_data.train_images // 2)
    with pytest.raises(ValueError, match="have different data"):
        narrow | experiment(NARROW, finished.config, darker, 1)
    longer = replace(narrow, config=replace(finished.config, num_epochs=3))
    for part in (longer, replace(narrow, callbacks=[Counting()])):
        with pytest.raises(ValueError, match="the joined experiments have different configs; pass config="):
            (part | finished).distil("narrow", "wide", 4, 0.5)
    with pytest.raises(ValueError, match="the experiments trained 'narrow' differently; use another name"):
        finished | replace(narrow, runs={("narrow", 0): finished.runs["wide", 0]})


def test_a_second_experiment_trains_nothing_and_says_so(finished, tiny_data, capsys, no_training):
    for seeds in (2, [0, 1, 0]):
        again = experiment(MODELS, finished.config, tiny_data, seeds, jobs=2)
        assert capsys.readouterr().out == f"4 of 4 runs loaded from {finished.config.output_dir}, 0 to train\n"
        assert list(again.runs.items()) == list(finished.runs.items())
    with pytest.raises(AssertionError, match="trained again"):
        experiment(MODELS, finished.config, tiny_data, [0, 2])


def test_only_what_is_missing_is_trained_each_run_by_its_own_trainer_and_the_order_stays(config, tiny_data):
    state = Notes(trained=[])

    class Marking(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            state.trained.append((self.mark, self.config.seed))
            return super().train(*args, **kwargs)

    keys = {("narrow", 0): "x", ("wide", 0): "a", ("narrow", 1): "y", ("wide", 1): "z"}
    trainers = {key: type(f"Marking{mark}", (Marking,), {"mark": mark}) for key, mark in keys.items()}
    train_or_load(MODELS["wide"], config, tiny_data, trainer_class=trainers["wide", 0])
    result = experiment(MODELS, config, tiny_data, SEEDS, trainer_class=trainers)
    assert state.trained == [("a", 0), ("x", 0), ("y", 1), ("z", 1)]
    assert list(result.runs) == [("narrow", 0), ("narrow", 1), ("wide", 0), ("wide", 1)]


class Counting(TrainerCallback):
    epochs = 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self.epochs += 1

    def on_train_end(self, args, state, control, **kwargs):
        print(f"epochs: {self.epochs}")


def test_a_run_that_an_earlier_one_has_changed_is_refused(config, tiny_data):
    class Leaking(TrainerCallback):
        epochs = []  # noqa: RUF012

        def on_epoch_end(self, *args, **kwargs):
            self.epochs.append(1)

    with pytest.warns(UserWarning, match="RuntimeError: the callbacks of this run no longer match"):
        result = experiment(NARROW, config, tiny_data, SEEDS, callbacks=[Leaking()])
    assert list(result.runs) == [("narrow", 0)]


def test_a_run_has_the_precision_that_was_resolved_for_its_name_wherever_it_is_trained(config, tiny_data, monkeypatch):
    here = lambda config, model: "bf16" if config.precision == "auto" else config.precision  # noqa: E731
    monkeypatch.setattr("lablib.identity.resolve_precision", here)  # the trainer's own would give fp32
    run = experiment(NARROW, config, tiny_data, [0]).runs["narrow", 0]
    assert run.result["precision"] == run.identity["config"]["precision"] == "bf16"


def test_callbacks_are_called_each_run_with_its_own_copy(config, tiny_data, capsys):
    result = experiment(NARROW, config, tiny_data, SEEDS, callbacks=[Counting()])
    assert capsys.readouterr().out.count("epochs: 2\n") == 2
    assert experiment(NARROW, config, tiny_data, SEEDS, callbacks=[Counting()]).runs == result.runs
    result.distil("narrow", "narrow", 4, 0.5)
    assert capsys.readouterr().out.count("epochs: 2\n") == 2
    assert result.runs["narrow", 0].path != experiment(NARROW, config, tiny_data, [0]).runs["narrow", 0].path
    capsys.readouterr()
    train_or_load(MODELS["wide"], config, tiny_data, trainer_class=partial(StreamlinedTrainer, callbacks=[Counting()]))
    assert capsys.readouterr().out.count("epochs: 2\n") == 1


@pytest.fixture(scope="module")
def distilled(finished) -> Experiment:
    return finished.distil("narrow", "wide", [1, 4], [0.5, 1.0])


def test_a_student_in_a_grid_is_the_one_trained_alone_with_its_teacher(distilled, finished, tiny_data, tmp_path):
    cells = ["T = 1, α = 0.5", "T = 1, α = 1", "T = 4, α = 0.5", "T = 4, α = 1"]
    assert list(distilled.runs) == [(name, seed) for name in cells for seed in SEEDS]
    assert len({timeless(run)["weights"] for run in distilled.runs.values()}) == 8
    teacher = TrainedModel(finished.runs["wide", 1], MODELS["wide"])
    trainer = partial(KnowledgeDistillationTrainer, teacher=teacher, temperature=4, alpha=0.5)
    alone = train_or_load(MODELS["narrow"], replace(config_in(tmp_path), seed=1), tiny_data, trainer_class=trainer)
    assert timeless(alone) == timeless(distilled.runs["T = 4, α = 0.5", 1])


def test_a_student_whose_teacher_failed_is_left_out_and_the_others_are_trained(finished, tmp_path):
    partly = replace(finished, config=config_in(tmp_path), failures={("wide", 1): "ArithmeticError: no forward today"})
    partly = replace(partly, runs={key: run for key, run in finished.runs.items() if key != ("wide", 1)})
    assert list(partly.distil("narrow", "wide", 4, 0.7).runs) == [("Distilled", 0)]


def test_a_student_is_known_by_its_teachers_run_whether_the_weights_are_there_or_not(finished, distilled, tmp_path):
    published = {key: load_run(publish(run, tmp_path / "published")) for key, run in finished.runs.items()}
    without = replace(finished, runs=published)
    assert without.distil("narrow", "wide", [1, 4], [0.5, 1.0]).runs == distilled.runs
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="published without its weights"):
        replace(without, config=config_in(tmp_path / "elsewhere")).distil("narrow", "wide", 4, 0.5)


def test_a_run_that_fails_loses_no_other_and_the_traceback_is_shown_once(config, tiny_data):
    models = {"broken": lambda: FailsInTraining((4,), image_shape=(1, 6, 6))}
    with pytest.warns(UserWarning, match="failed") as caught:
        result = experiment(models | NARROW, config, tiny_data, [0, 3])
    assert list(result.runs) == [("narrow", 0), ("narrow", 3)]
    assert list(result.failures) == [("broken", 0), ("broken", 3)]
    assert "fails with ArithmeticError: no forward today" in result.failures["broken", 0]
    first, other = (str(warning.message) for warning in caught)
    assert first.startswith("the run of 'broken' with seed 0 failed:\nTraceback (most recent call last)")
    assert "in forward" in first
    assert other == f"the run of 'broken' with seed 3 failed too: {result.failures['broken', 3]}"
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="no run succeeded"):
        experiment(models, config, tiny_data, 2)


def test_what_would_give_other_results_than_asked_for_is_refused(config, tiny_data, no_training):
    with pytest.raises(ValueError, match=r"the config has seed = 5; write seeds = \[5\] instead"):
        experiment(MODELS, replace(config, seed=5), tiny_data, 1)
    with pytest.raises(ValueError, match="the models 'a' and 'b' are the same network"):
        experiment(dict.fromkeys("ab", MODELS["wide"]), config, tiny_data, 1)
    with pytest.raises(ZeroDivisionError):
        experiment(MODELS | {"unbuilt": lambda: 1 / 0}, config, tiny_data, 1)


def test_a_callback_may_hold_an_array_that_its_code_uses_too(config, tiny_data):
    weights = np.ones(3)

    class Holding(TrainerCallback):
        def __init__(self):
            self.weights = weights

        def on_epoch_end(self, *args, **kwargs):
            assert (self.weights == weights).all()

    assert len(experiment(NARROW, config, tiny_data, seeds=1, callbacks=[Holding()]).runs) == 1


def test_a_network_whose_code_has_changed_is_no_teacher_and_not_loaded(config, tiny_data):
    state = Notes(width=4)
    result = experiment({"mine": lambda: tiny_mlp((state.width,))}, config, tiny_data, seeds=1)
    result.trained_model("mine")
    state.width = 5
    with pytest.raises(ValueError, match=r"the function that builds lablib\.MLP has changed since the run was trained"):
        result.trained_model("mine")


def test_an_interruption_says_where_and_keeps_what_is_finished(api, config, tiny_data, capsys):
    class Interrupted(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            assert not self.config.use_telegram_notifications  # the experiment tells, and keeps the token to itself
            assert self.config.telegram_bot_token is None
            if self.config.seed == 1 and not state.resumed:
                raise KeyboardInterrupt
            return super().train(*args, **kwargs)

    state, token = Notes(resumed=False), "123456789:AAq7Zk-Wm3xVt9Rb_Ls5Yc2Hd8Fg4Jn6PqE"
    bot = {"use_telegram_notifications": True, "telegram_bot_token": token, "telegram_chat_id": 42}
    with pytest.raises(KeyboardInterrupt, match="interrupted at epoch 2 of 6; run again to resume"):
        experiment(NARROW, replace(config, **bot), tiny_data, [0, 1, 2], trainer_class=Interrupted)
    (message,) = api.messages()
    assert message.text.startswith(
        "Experiment on tiny: failed with KeyboardInterrupt: interrupted at epoch 2 of 6; run"
    )
    assert "\nruns: 1 of 3 finished, 0 failed\n" in message.text
    assert capsys.readouterr().out.count("\ninterrupted at epoch 2 of 6; run again to resume\n") == 1
    state.resumed = True
    result = experiment(NARROW, config, tiny_data, [0, 1, 2], trainer_class=Interrupted)
    assert f"1 of 3 runs loaded from {config.output_dir}, 2 to train" in capsys.readouterr().out
    assert list(result.values("narrow")) == [0, 1, 2]


workers = joblib.Parallel(n_jobs=2, batch_size=1, mmap_mode="c")  # those of the experiments


def test_jobs_side_by_side_give_the_same_bits_and_a_failure_loses_no_other(finished, config, tiny_data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of each worker, as this process has it
    config = replace(config, output_dir=os.path.relpath(config.output_dir))
    cell = "from torch import nn\nbuild = lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3))\n"
    exec(compile(cell, "<cell>", "exec"), names := {"__name__": "__main__"})
    models = {**MODELS, "cell": names["build"], "broken": lambda: FailsInTraining((4,), image_shape=(1, 6, 6))}
    with pytest.warns(UserWarning, match="'broken' with seed [01] failed"):
        side_by_side = experiment(models, config, tiny_data, SEEDS, jobs=2)
    assert [error.split(":")[0] for error in side_by_side.failures.values()] == ["SanityCheckError"] * 2
    assert list(side_by_side.runs) == [(name, seed) for name in ("narrow", "wide", "cell") for seed in SEEDS]
    for key, run in finished.runs.items():
        assert timeless(side_by_side.runs[key]) == timeless(run)
    assert {(run.result["threads"], run.path.is_absolute()) for run in side_by_side.runs.values()} == {(1, True)}


def test_workers_share_one_file_of_images(tmp_path):
    images, labels = np.zeros((400, 3, 32, 32), np.uint8), np.arange(400) % 2  # 1.2 MB; joblib shares from 1 MB on
    data = ImageData("black", images, labels, images, labels, ("a", "b"))
    files = {*workers(joblib.delayed(lambda data: str(data._arrays[0].filename))(data) for _ in range(4))}
    assert len(files) == 1


def test_two_processes_that_want_the_same_run_train_it_once(config, tiny_data, tmp_path):
    class Slow(StreamlinedTrainer):
        def train(self, *args, **kwargs):
            with open(tmp_path / "trainings", "a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.3)
            return super().train(*args, **kwargs)

    def wanted(number):
        (tmp_path / f"here-{number}").touch()
        while not (tmp_path / f"here-{1 - number}").exists():
            time.sleep(0.01)
        return os.getpid(), train_or_load(MODELS["narrow"], config, tiny_data, trainer_class=Slow)

    (one_process, one), (other_process, other) = workers(joblib.delayed(wanted)(number) for number in (0, 1))
    assert one_process != other_process
    assert len((tmp_path / "trainings").read_text().split()) == 1
    assert one == other == load_run(one.path)
