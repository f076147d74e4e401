"""TrainingConfig and a notebook's parameters: what is refused, with which words, and what a config becomes."""

import dataclasses
import json
import math
import os
import re

import pytest
from transformers import TrainingArguments

from lablib import TrainingConfig
from lablib.config import NOT_IDENTITY, TRAINING_ARGUMENTS, check_parameters

FIELDS = {field.name for field in dataclasses.fields(TrainingConfig)}

# field -> values that are refused, and what the error says for the first of them
REFUSED = {
    "num_epochs": ("should be greater than or equal to 1", [0, -1, 1.5, True, "3", None]),
    "batch_size": ("should be greater than or equal to 1", [0, -8, 2.5, False, "256"]),
    "learning_rate": ("should be greater than 0", [0, -1e-3, math.nan, math.inf, True, "1e-3", None]),
    "optimizer": ("should be 'adam', 'adamw' or 'sgd'", ["adamax", "Adam", None, 1]),
    "weight_decay": ("should be greater than or equal to 0", [-0.1, math.nan, "0", None]),
    "lr_schedule": ("should be 'constant' or 'cosine'", ["linear", "", None]),
    "warmup_fraction": ("should be less than 1", [1, 1.5, -0.1, math.nan, "0.1"]),
    "max_grad_norm": ("should be greater than 0", [0, -1.0, math.inf, "1"]),
    "validation_split": ("should be greater than 0", [0, 1, -0.1, 1.1, math.nan, "0.1", None]),
    "max_train_images": ("should be greater than or equal to 1", [0, -1, 2.5, True, "100"]),
    "early_stopping_patience": ("should be greater than or equal to 0", [-1, 2.5, True, "10"]),
    "early_stopping_metric": ("should be 'accuracy' or 'loss'", ["val_loss", None]),
    "rotation_degrees": ("should be greater than or equal to 0", [-1, 180.5, math.nan, "10", None]),
    "translation_fraction": ("should be greater than or equal to 0", [-0.1, 1.5, math.nan, True]),
    "horizontal_flip": ("should be True or False", [1, 0, "false", None]),
    "crop_padding": ("should be greater than or equal to 0", [-1, 4.5, True, "4", None]),
    "precision": ("should be 'auto', 'fp32' or 'bf16'", ["fp16", 32, None]),
    "device": ("should be 'auto', 'cpu', 'cuda' or 'mps'", ["gpu", "cuda:1", 0, None]),
    "seed": ("should be greater than or equal to 0", [-1, 2**32, 0.5, True, "0", None]),
    "deterministic": ("should be True or False", [1, "no", None]),
    "output_dir": ("string should have at least 1 character", ["", None, 3]),
    "checkpoint_seconds": ("should be greater than 0", [0, -1, math.nan, math.inf, "300", None]),
    "use_wandb": ("should be True or False", [1, "yes", None]),
    "wandb_project": ("string should have at least 1 character", ["", None]),
    "wandb_group": ("string should have at least 1 character", ["", 3]),
    "wandb_tags": ("should be a valid tuple", ["tag", (1,), None]),
    "wandb_watch": ("should be True or False", [1, "all", None]),
    "use_telegram_notifications": ("should be True or False", [1, "yes", None]),
    "telegram_additional_info": ("should be a valid string", [None, 3]),
    "telegram_every_run": ("should be True or False", [1, "yes", None]),
    "telegram_bot_token": ("value should have at least 1 item", ["", 0, False, b""]),
    "telegram_chat_id": ("should be the number of a chat, or its @name", ["", True, 4.2, ["42"], f"123:{35 * 'A'}"]),
    "training_arguments": ("should be a valid dictionary", [None, [("adam_beta1", 0.8)], "x"]),
}
HIDDEN = ("telegram_bot_token", "telegram_chat_id", "training_arguments")

# field -> another value than the default
NO_INFLUENCE = {
    **{"output_dir": "elsewhere", "checkpoint_seconds": 60.0, "device": "cpu", "use_wandb": True},
    **{"wandb_project": "another", "wandb_group": "group", "wandb_tags": ("tag",), "wandb_watch": True},
    **{"use_telegram_notifications": True, "telegram_additional_info": "on the old laptop"},
    **{"telegram_every_run": True, "telegram_bot_token": "1:token", "telegram_chat_id": 42},
}
INFLUENCE = {
    **{"num_epochs": 61, "batch_size": 128, "learning_rate": 2e-3, "optimizer": "sgd", "weight_decay": 0.1},
    **{"lr_schedule": "cosine", "warmup_fraction": 0.1, "max_grad_norm": 1.0, "validation_split": 0.2},
    **{"max_train_images": 1000, "early_stopping_patience": 3, "early_stopping_metric": "loss"},
    **{"rotation_degrees": 0.0, "translation_fraction": 0.0, "horizontal_flip": True, "crop_padding": 4},
    **{"precision": "fp32", "seed": 1, "deterministic": True, "training_arguments": {"adam_beta1": 0.8}},
}


def test_every_field_has_refused_values_and_a_place_in_the_identity_or_none():
    assert set(REFUSED) == FIELDS
    assert NO_INFLUENCE.keys() == {*NOT_IDENTITY}
    assert INFLUENCE.keys() == FIELDS - {*NOT_IDENTITY}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_is_not_allowed_is_refused_by_its_field_with_what_is_allowed(name):
    allowed, values = REFUSED[name]
    for value in values:
        words = "" if name in HIDDEN else f"{name} = {value!r}: "
        with pytest.raises(ValueError, match="^" + re.escape(f"TrainingConfig: {words}{name}")) as caught:
            TrainingConfig(**{name: value})
        assert value is not values[0] or f"{name} {allowed}" in str(caught.value)


def test_a_misspelt_field_is_refused_with_the_right_spelling_and_all_faults_are_named():
    with pytest.raises(ValueError, match=r"there is no parameter 'epochs'\. Did you mean 'num_epochs'"):
        TrainingConfig(epochs=3)
    with pytest.raises(ValueError, match=r"batch_size = 0.*\n.*seed = -1"):
        TrainingConfig(seed=-1, batch_size=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight_decay", 0), ("warmup_fraction", 0.999), ("rotation_degrees", 180), ("seed", 2**32 - 1)],
)
def test_values_at_the_edge_of_what_is_allowed_are_taken(name, value):
    assert getattr(TrainingConfig(**{name: value}), name) == value


def test_a_path_becomes_text_and_a_list_of_tags_a_tuple(tmp_path):
    config = TrainingConfig(output_dir=tmp_path, wandb_tags=["a", "b"])
    assert config.output_dir == str(tmp_path)
    assert config.wandb_tags == ("a", "b")
    assert TrainingConfig(output_dir="~/runs").output_dir == os.path.expanduser("~/runs")


def test_a_config_cannot_be_changed_and_its_replacement_is_checked_and_keeps_the_token():
    config = TrainingConfig(telegram_bot_token="1:token")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(ValueError, match="seed = -1: seed should be"):
        dataclasses.replace(config, seed=-1)
    assert dataclasses.replace(config, seed=1).telegram_bot_token.get_secret_value() == "1:token"


def test_a_config_becomes_training_arguments_with_the_same_settings(tmp_path):
    config = TrainingConfig(
        num_epochs=7, batch_size=32, learning_rate=0.02, weight_decay=0.01, max_grad_norm=0.5, seed=3, device="cpu"
    )
    arguments = config.to_training_arguments(str(tmp_path))
    expected = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 7,
        "per_device_train_batch_size": 32,
        "learning_rate": 0.02,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "seed": 3,
        "data_seed": 3,
        "use_cpu": True,
        "bf16": False,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_accuracy",
        "greater_is_better": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "restore_callback_states_from_checkpoint": True,
        "report_to": [],
    }
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_by_default_gradients_are_not_clipped_and_an_early_stop_on_the_loss_looks_for_the_smallest(tmp_path):
    arguments = TrainingConfig(early_stopping_metric="loss").to_training_arguments(str(tmp_path))
    assert arguments.max_grad_norm == 0
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == ("eval_loss", False)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [("constant", 0.0, "constant"), ("constant", 0.1, "constant_with_warmup"), ("cosine", 0.25, "cosine")],
)
def test_the_schedule_is_the_one_asked_for_and_the_warmup_a_fraction_of_all_steps(tmp_path, schedule, warmup, expected):
    config = TrainingConfig(lr_schedule=schedule, warmup_fraction=warmup)
    arguments = config.to_training_arguments(str(tmp_path))
    assert arguments.lr_scheduler_type == expected
    assert arguments.get_warmup_steps(1000) == 1000 * warmup


def test_further_training_arguments_are_passed_on_and_win_over_the_labs_defaults(tmp_path):
    config = TrainingConfig(training_arguments={"adam_beta1": 0.8, "save_total_limit": 5})
    arguments = config.to_training_arguments(str(tmp_path))
    assert (arguments.adam_beta1, arguments.save_total_limit) == (0.8, 5)
    assert TrainingConfig().to_training_arguments(str(tmp_path)).save_total_limit == 2


@pytest.mark.parametrize("name", ["adam_beta_1", "fsdp", "num_train_epochs", "eval_delay", "label_smoothing_factor"])
def test_every_other_training_argument_is_refused_and_those_that_work_are_named(name):
    with pytest.raises(
        ValueError, match=f"training_arguments has {name}, .*; it takes adam_beta1, .*, torch_compile_mod"
    ):
        TrainingConfig(training_arguments={"adam_beta1": 0.8, name: 1})
    assert {field.name for field in dataclasses.fields(TrainingArguments) if field.init} >= {*TRAINING_ARGUMENTS}


def test_the_identity_has_the_settings_that_are_on_and_both_ways_to_say_off_are_one():
    usual = TrainingConfig().identity()
    assert all(usual.values())
    assert usual.keys() < INFLUENCE.keys()
    off = [TrainingConfig(early_stopping_patience=value).identity() for value in (0, None)]
    assert off[0] == off[1] == {k: v for k, v in usual.items() if k != "early_stopping_patience"}


@pytest.mark.parametrize(("name", "value"), {**INFLUENCE, **NO_INFLUENCE}.items())
def test_what_changes_a_runs_outcome_changes_its_identity_and_nothing_else_does(name, value):
    changed, usual = TrainingConfig(**{name: value}).identity(), TrainingConfig().identity()
    assert (changed != usual) == (name in INFLUENCE)
    assert {**usual, name: value} == {**changed, name: value}


@pytest.mark.parametrize("name", ["rotation_degrees", "learning_rate", "weight_decay", "translation_fraction"])
def test_a_whole_number_and_the_same_float_have_one_identity_as_json(name):
    whole, fraction = TrainingConfig(**{name: 1}), TrainingConfig(**{name: 1.0})
    assert json.dumps(whole.identity()) == json.dumps(fraction.identity())


# A notebook's parameters

CELL = """
from typing import Literal
from lablib.config import Count, Natural, Counts, Positive, Share, Shares

Name = Literal["digits", "mnist"]
dataset: Name = "digits"
epochs: Count = 12
images: Natural = 0
rate: Positive = 0.001
flip: bool = False
alpha: Share = 0.7
alphas: Shares = [0.1, 0.9]
depths: Counts = [2, 4, 8]
"""


def notebook(*injected: str, **values) -> dict:
    """A notebook's globals() after its parameters cell and the cells that papermill put after it."""
    namespace = {"In": ["", CELL, *injected]}
    for source in (CELL, *injected):
        exec(source, namespace)
    return namespace | values


def faults(*injected: str, **values) -> list[str]:
    with pytest.raises(ValueError, match=r"^parameters: ") as caught:
        check_parameters(notebook(*injected, **values))
    return str(caught.value).splitlines()


def test_the_defaults_and_what_papermill_sets_right_are_taken():
    check_parameters(notebook())
    check_parameters(notebook("# Parameters\nepochs = 3\ndataset = 'mnist'\n"))
    check_parameters(notebook(epochs=100, depths=[64, 1], flip=True, rate=1, alpha=0, alphas=[1]))
    check_parameters(notebook("model = 3\n# Parameters\n", "epoch = 4"))  # of other cells


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", "two", "epochs = 'two': epochs should be a valid integer"),
        ("epochs", 2.0, "epochs = 2.0: epochs should be a valid integer"),
        ("epochs", True, "epochs = True: epochs should be a valid integer"),
        ("epochs", 0, "epochs = 0: epochs should be greater than or equal to 1"),
        ("images", -1, "images = -1: images should be greater than or equal to 0"),
        ("rate", "fast", "rate = 'fast': rate should be a valid number"),
        ("rate", float("inf"), "rate = inf: rate should be a finite number"),
        ("alpha", 1.5, "alpha = 1.5: alpha should be less than or equal to 1"),
        ("alpha", float("nan"), "alpha = nan: alpha should be "),
        ("alphas", [0.5, 1.5], "alphas = [0.5, 1.5]: alphas[1] should be less than or equal to 1"),
        ("flip", "false", "flip = 'false': flip should be True or False"),
        ("dataset", "minst", "dataset = 'minst': dataset should be 'digits' or 'mnist'"),
        ("depths", [], "depths = []: depths list should have at least 1 item"),
        ("depths", "[2, 4]", "depths should be a list; with papermill: -y 'depths: [2, 4]'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_allowed(name, value, words):
    (message,) = faults(**{name: value})
    assert words in message


def test_an_unknown_name_that_papermill_injected_is_refused_and_all_faults_are_listed_at_once():
    assert faults("# Parameters\nzzz = 3\n")[0].startswith(
        "parameters: there is no parameter 'zzz'. There are: dataset,"
    )
    lines = faults("# Parameters\nepoch = 3\n", flip="false", epochs="two")
    assert sorted(lines)[2] == "parameters: there is no parameter 'epoch'. Did you mean 'epochs'?"
    assert [line.split()[1] for line in sorted(lines)] == ["epochs", "flip", "there"]


def test_a_namespace_without_annotated_parameters_says_which_cell_to_run():
    with pytest.raises(ValueError, match="no annotated parameters; run its cell tagged 'parameters' first"):
        check_parameters({"epochs": 3})
