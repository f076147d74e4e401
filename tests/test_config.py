"""TrainingConfig and a notebook's parameters: what is refused, with which words, and what a config becomes."""

import dataclasses
import math
import os
import re

import pytest

from lablib import TrainingConfig
from lablib.config import check_parameters

PRIVATE = {"telegram_bot_token", "telegram_chat_id"}
SWITCHES = [f.name for f in dataclasses.fields(TrainingConfig) if f.type is bool]
CHOICES = ["optimizer", "lr_schedule", "early_stopping_metric", "precision", "device"]
REFUSED = {
    **dict.fromkeys(SWITCHES, (1, 0, "false", None)),
    **dict.fromkeys(CHOICES, ("Adam", "linear", "val_loss", "fp8", "cuda:1", "", None, 1)),
    **dict.fromkeys(["num_epochs", "batch_size", "max_train_images"], (0, -1, 1.5, True, "3")),
    **dict.fromkeys(["learning_rate", "max_grad_norm", "checkpoint_seconds"], (0, -1.0, math.nan, math.inf, True, "1")),
    **dict.fromkeys(["output_dir", "wandb_project"], ("", None, 3)),
    "weight_decay": [-0.1, math.nan, "0", None],
    "warmup_fraction": [1, -0.1, math.nan, "0.1"],
    "validation_split": [0, 1, math.nan, "0.1", None],
    "early_stopping_patience": [-1, 2.5, True, "10"],
    "rotation_degrees": [-1, 180.5, math.nan, "10", None],
    "translation_fraction": [-0.1, 1.5, math.nan, True],
    "crop_padding": [-1, 4.5, True, "4", None],
    "seed": [-1, 2**32, 0.5, True, "0", None],
    "wandb_group": ["", 3],
    "telegram_additional_info": [None, 3],
    "telegram_bot_token": ["", 0, False, b""],
    "telegram_chat_id": ["", True, 4.2, ["42"], f"123:{35 * 'A'}"],
}


def test_every_field_refuses_what_is_not_allowed_by_its_name_and_value():
    assert REFUSED.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}
    for name, value in [(name, value) for name, values in REFUSED.items() for value in values]:
        words = "" if name in PRIVATE else f"{name} = {value!r}: "
        with pytest.raises(ValueError, match="^" + re.escape(f"TrainingConfig: {words}{name}")):
            TrainingConfig(**{name: value})


def test_a_misspelt_field_is_refused_with_the_right_spelling_and_all_faults_are_named():
    known = {"learning_rates": "learning_rate", "epochs": "num_epochs"}
    for theirs, ours in known.items():
        with pytest.raises(ValueError, match=f"there is no parameter {theirs!r}. Did you mean {ours!r}"):
            TrainingConfig(**{theirs: 1})
    assert "learning_rate: float = 0.001, optimizer: Literal" in str(TrainingConfig.__signature__)
    with pytest.raises(ValueError, match=r"batch_size = 0.*\n.*seed = -1"):
        TrainingConfig(seed=-1, batch_size=0)


def test_a_path_becomes_text_and_a_tilde_the_home_folder(tmp_path):
    assert TrainingConfig(output_dir=tmp_path).output_dir == str(tmp_path)
    assert TrainingConfig(output_dir="~/runs").output_dir == os.path.expanduser("~/runs")


def test_a_config_cannot_be_changed_and_its_replacement_is_checked_and_keeps_the_token():
    config = TrainingConfig(telegram_bot_token="1:token")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(ValueError, match="seed = -1: seed should be"):
        dataclasses.replace(config, seed=-1)
    assert dataclasses.replace(config, seed=1).telegram_bot_token.get_secret_value() == "1:token"


def test_a_launcher_does_not_change_the_precision(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert TrainingConfig(device="cpu").to_training_arguments("out").mixed_precision == "no"


def test_the_identity_has_the_settings_that_are_on_and_both_ways_to_say_off_are_one():
    usual = TrainingConfig().__identity__()
    off = [TrainingConfig(early_stopping_patience=value).__identity__() for value in (0, None)]
    assert off[0] == off[1] == {k: v for k, v in usual.items() if v and k != "early_stopping_patience"}


CELL = """
from typing import Literal
from lablib.config import Count, Natural, Counts, Positive, Share, Shares
dataset: Literal["digits", "mnist"] = "digits"
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


def test_the_defaults_and_what_papermill_sets_right_are_taken_but_no_cell_without_annotations():
    with pytest.raises(ValueError, match="run its cell tagged 'parameters' first"):
        check_parameters({"epochs": 3})
    check_parameters(notebook())
    check_parameters(notebook("# Parameters\nepochs = 3\ndataset = 'mnist'\n"))
    check_parameters(notebook(epochs=100, depths=[64, 1], flip=True, rate=1, alpha=0, alphas=[1]))
    check_parameters(notebook("model = 3\n# Parameters\n", "epoch = 4"))  # of other cells


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 2.0, "epochs should be a valid integer"),
        ("epochs", 0, "epochs should be greater than or equal to 1"),
        ("images", -1, "images should be greater than or equal to 0"),
        ("rate", float("inf"), "rate should be a finite number"),
        ("alphas", [0.5, 1.5], "alphas[1] should be less than or equal to 1"),
        ("flip", "false", "flip should be True or False"),
        ("dataset", "minst", "dataset should be 'digits' or 'mnist'"),
        ("depths", [], "depths list should have at least 1 item after validation, not 0"),
        ("depths", "[2, 4]", "depths should be a list; with papermill: -y 'depths: [2, 4]'"),
        ("alphas", 0.5, "alphas should be a list; with papermill: -y 'alphas: [0.5]'"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_allowed(name, value, words):
    assert faults(**{name: value}) == [f"parameters: {name} = {value!r}: {words}"]


def test_an_unknown_name_that_papermill_injected_is_refused_and_all_faults_are_listed_at_once():
    assert "there is no parameter 'zzz'. There are: dataset," in faults("# Parameters\nzzz = 3\n")[0]
    lines = faults("# Parameters\nepoch = 3\n", flip="false", epochs="two")
    assert sorted(lines)[2] == "parameters: there is no parameter 'epoch'. Did you mean 'epochs'?"
    assert [line.split()[1] for line in sorted(lines)] == ["epochs", "flip", "there"]
