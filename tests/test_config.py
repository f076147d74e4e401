"""TrainingConfig and a notebook's parameters: what is refused, with which words, and what a config becomes."""

import dataclasses
import math
import os
import re

import pytest

from lablib import TrainingConfig
from lablib.config import check_parameters

WHOLE, REAL = (-1, 1.5, True, "3"), (-1, math.nan, "1")
REFUSED = {
    **{f.name: (1, 0, "false", None) for f in dataclasses.fields(TrainingConfig) if f.type is bool},
    **dict.fromkeys(["optimizer", "lr_schedule", "early_stopping_metric"], ("Adam", "linear", "val_loss", None, 1)),
    **dict.fromkeys(["precision", "device"], ("fp8", "cuda:1", "", None, 1)),
    **dict.fromkeys(["num_epochs", "batch_size", "max_train_images"], (0, *WHOLE)),
    **dict.fromkeys(["crop_padding", "seed", "early_stopping_patience"], WHOLE),
    **dict.fromkeys(["learning_rate", "max_grad_norm", "checkpoint_seconds"], (0, math.inf, *REAL)),
    **dict.fromkeys(["weight_decay", "warmup_fraction", "validation_split"], REAL),
    **dict.fromkeys(["rotation_degrees", "translation_fraction"], (180.5, *REAL)),
    **dict.fromkeys(["output_dir", "wandb_project", "telegram_additional_info"], (None, 3)),
    "wandb_group": [3],
    "telegram_bot_token": ["", 0, False, b""],
    "telegram_chat_id": ["", True, 4.2, ["42"], f"123:{35 * 'A'}"],
}


def test_every_field_refuses_what_is_not_allowed_by_its_name_and_value():
    assert REFUSED.keys() == {field.name for field in dataclasses.fields(TrainingConfig)}
    for name, value in [(name, value) for name, values in REFUSED.items() for value in values]:
        words = f"{name}: " if name.startswith("telegram") else f"{name} = {value!r}: "
        with pytest.raises(ValueError, match="^" + re.escape(f"TrainingConfig: {words}")):
            TrainingConfig(**{name: value})


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


def test_the_identity_has_the_settings_that_are_on_and_both_ways_to_say_off_are_one():
    off = [TrainingConfig(early_stopping_patience=value).__identity__() for value in (0, None)]
    usual = TrainingConfig().__identity__()
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


def test_the_defaults_and_what_papermill_sets_right_are_taken():
    check_parameters(notebook("# Parameters\nepochs = 3\ndataset = 'mnist'\n"))
    check_parameters(notebook(epochs=100, depths=[64, 1], flip=True, rate=1, alpha=0, alphas=[1]))
    check_parameters(notebook("model = 3\n# Parameters\n", "epoch = 4"))  # of other cells


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 2.0, "epochs should be a valid integer"),
        ("epochs", 0, "epochs should be greater than or equal to 1"),
        ("rate", float("inf"), "rate should be a finite number"),
        ("alphas", [0.5, 1.5], "alphas should be less than or equal to 1"),
        ("flip", "false", "flip should be a valid boolean"),
        ("dataset", "minst", "dataset should be 'digits' or 'mnist'"),
        ("depths", [], "List should have at least 1 item after validation, not 0"),
        ("depths", "[2, 4]", "depths should be a valid list"),
    ],
)
def test_a_wrong_parameter_is_refused_with_what_is_allowed(name, value, words):
    with pytest.raises(ValueError, match="^" + re.escape(f"parameters: {name} = {value!r}: {words}")):
        check_parameters(notebook(**{name: value}))


@pytest.mark.parametrize(("name", "hint"), {"epoch": "epochs", "zzz": "dataset or epochs or images or "}.items())
def test_an_unknown_name_that_papermill_injected_is_refused(name, hint):
    with pytest.raises(ValueError, match=f"^parameters: there is no parameter '{name}'; did you mean {hint}"):
        check_parameters(notebook(f"# Parameters\n{name} = 3\n"))
