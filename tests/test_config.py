"""TrainingConfig: defaults, what it refuses, and what it becomes."""

import dataclasses
import json
import math

import pytest
from transformers import TrainingArguments

from lablib import TrainingConfig
from lablib.config import _REFUSED_ARGUMENTS, TRAINING_ARGUMENTS
from lablib.secret import Secret

DEFAULTS = {
    "num_epochs": 60,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "lr_schedule": "constant",
    "warmup_fraction": 0.0,
    "max_grad_norm": None,
    "validation_split": 0.1,
    "max_train_images": None,
    "early_stopping_patience": 10,
    "early_stopping_metric": "accuracy",
    "rotation_degrees": 10.0,
    "translation_fraction": 0.1,
    "horizontal_flip": False,
    "crop_padding": 0,
    "precision": "auto",
    "device": "auto",
    "seed": 0,
    "deterministic": False,
    "output_dir": "runs",
    "checkpoint_seconds": 300.0,
    "use_wandb": False,
    "wandb_project": "residual-and-distillation-lab",
    "wandb_group": None,
    "wandb_tags": (),
    "wandb_watch": False,
    "use_telegram_notifications": False,
    "telegram_additional_info": "",
    "telegram_every_run": False,
    "telegram_bot_token": None,
    "telegram_chat_id": None,
    "training_arguments": {},
}

# field -> what its error must call allowed, and values that are not
REFUSED = {
    "num_epochs": ("a whole number of at least 1", [0, -1, 1.5, True, "3", None]),
    "batch_size": ("a whole number of at least 1", [0, -8, 2.0, False, "256"]),
    "learning_rate": ("a number above 0", [0, -1e-3, math.nan, math.inf, True, "1e-3", None]),
    "optimizer": ("one of 'adam', 'adamw', 'sgd'", ["adamax", "Adam", None, 1]),
    "weight_decay": ("a number of at least 0", [-0.1, math.nan, "0", None]),
    "lr_schedule": ("one of 'constant', 'cosine'", ["linear", "", None]),
    "warmup_fraction": ("a number from 0 to below 1", [1, 1.5, -0.1, math.nan, "0.1"]),
    "max_grad_norm": ("None or a number above 0", [0, -1.0, math.inf, "1"]),
    "validation_split": ("a number above 0 and below 1", [0, 1, -0.1, 1.1, math.nan, "0.1", None]),
    "max_train_images": ("None or a whole number of at least 1", [0, -1, 2.5, True, "100"]),
    "early_stopping_patience": ("None, or a whole number of at least 0", [-1, 2.5, True, "10"]),
    "early_stopping_metric": ("one of 'accuracy', 'loss'", ["val_loss", None]),
    "rotation_degrees": ("a number from 0 to 180", [-1, 180.5, math.nan, "10", None]),
    "translation_fraction": ("a number from 0 to 1", [-0.1, 1.5, math.nan, True]),
    "horizontal_flip": ("True or False", [1, 0, "false", None]),
    "crop_padding": ("a whole number of at least 0", [-1, 4.0, True, "4", None]),
    "precision": ("one of 'auto', 'fp32', 'bf16'", ["fp16", 32, None]),
    "device": ("one of 'auto', 'cpu', 'cuda', 'mps'", ["gpu", "cuda:1", 0, None]),
    "seed": ("a whole number of at least 0", [-1, 0.5, True, "0", None]),
    "deterministic": ("True or False", [1, "no", None]),
    "output_dir": ("a string that is not empty", ["", None, 3]),
    "checkpoint_seconds": ("a number above 0", [0, -1, math.nan, math.inf, "300", None]),
    "use_wandb": ("True or False", [1, "yes", None]),
    "wandb_project": ("a string that is not empty", ["", None]),
    "wandb_group": ("None or a string that is not empty", ["", 3]),
    "wandb_tags": ("a tuple or list of strings", ["tag", (1,), None]),
    "wandb_watch": ("True or False", [1, "all", None]),
    "use_telegram_notifications": ("True or False", [1, "yes", None]),
    "telegram_additional_info": ("a string", [None, 3]),
    "telegram_every_run": ("True or False", [1, "yes", None]),
    "telegram_bot_token": ("None or a string that is not empty", ["", 0, False, b""]),  # others are not shown
    "telegram_chat_id": ("None, or the number or name of a chat", ["", True, 4.2, ["42"]]),
    "training_arguments": ("a dict of transformers.TrainingArguments fields", [None, [("adam_beta1", 0.8)], "x"]),
}

NO_INFLUENCE = {
    "output_dir": "elsewhere",
    "checkpoint_seconds": 60.0,
    "device": "cpu",
    "use_wandb": True,
    "wandb_project": "another",
    "wandb_group": "group",
    "wandb_tags": ("tag",),
    "wandb_watch": True,
    "use_telegram_notifications": True,
    "telegram_additional_info": "on the old laptop",
    "telegram_every_run": True,
    "telegram_bot_token": "1:token",
    "telegram_chat_id": 42,
}
INFLUENCE = {
    "num_epochs": 61,
    "batch_size": 128,
    "learning_rate": 2e-3,
    "optimizer": "sgd",
    "weight_decay": 0.1,
    "lr_schedule": "cosine",
    "warmup_fraction": 0.1,
    "max_grad_norm": 1.0,
    "validation_split": 0.2,
    "max_train_images": 1000,
    "early_stopping_patience": 3,
    "early_stopping_metric": "loss",
    "rotation_degrees": 0.0,
    "translation_fraction": 0.0,
    "horizontal_flip": True,
    "crop_padding": 4,
    "precision": "fp32",
    "seed": 1,
    "deterministic": True,
    "training_arguments": {"adam_beta1": 0.8},
}


def test_the_defaults_are_the_documented_ones():
    assert dataclasses.asdict(TrainingConfig()) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, (allowed, values) in REFUSED.items() for value in values],
)
def test_a_value_that_is_not_allowed_is_refused_by_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=r"^TrainingConfig: ") as caught:
        TrainingConfig(**{name: value})
    assert f"{name} = {value!r}, but {name} must be {allowed}" in str(caught.value)


def test_a_seed_that_numpy_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"seed = 4294967296, but seed must be a whole number below 2\*\*32"):
        TrainingConfig(seed=2**32)


def test_every_field_has_refused_values_and_a_place_in_the_identity_or_none():
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert set(REFUSED) == fields
    assert NO_INFLUENCE.keys() | INFLUENCE.keys() == fields
    assert not NO_INFLUENCE.keys() & INFLUENCE.keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_epochs", 1),
        ("weight_decay", 0),
        ("warmup_fraction", 0.999),
        ("rotation_degrees", 180),
        ("translation_fraction", 1),
        ("max_grad_norm", 1e-9),
        ("device", "mps"),
        ("seed", 2**32 - 1),
        ("wandb_group", None),
    ],
)
def test_values_at_the_edge_of_what_is_allowed_are_taken(name, value):
    assert getattr(TrainingConfig(**{name: value}), name) == value


@pytest.mark.parametrize("off", [0, None])
def test_a_patience_of_0_or_none_means_off(off):
    assert TrainingConfig(early_stopping_patience=off).early_stopping_patience is None


def test_a_path_becomes_text_and_a_list_of_tags_a_tuple(tmp_path):
    config = TrainingConfig(output_dir=tmp_path, wandb_tags=["a", "b"])
    assert config.output_dir == str(tmp_path)
    assert config.wandb_tags == ("a", "b")


def test_a_bots_token_is_kept_as_a_secret_and_stays_the_same_in_a_replacement():
    config = TrainingConfig(telegram_bot_token="1:token", telegram_chat_id=-42)
    assert isinstance(config.telegram_bot_token, Secret)
    assert dataclasses.replace(config, seed=1).telegram_bot_token.reveal() == "1:token"
    assert TrainingConfig(telegram_bot_token=Secret("1:token"), telegram_chat_id=-42) == config


def test_a_config_cannot_be_changed_and_its_replacement_is_checked_too():
    config = TrainingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1
    with pytest.raises(ValueError, match="seed = -1"):
        dataclasses.replace(config, seed=-1)


def test_a_config_becomes_training_arguments_with_the_same_knobs(tmp_path):
    config = TrainingConfig(
        num_epochs=7, batch_size=32, learning_rate=0.02, weight_decay=0.01, max_grad_norm=0.5, seed=3, device="cpu"
    )
    arguments = config.to_training_arguments(str(tmp_path))
    assert isinstance(arguments, TrainingArguments)
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


def test_an_early_stop_on_the_loss_looks_for_the_smallest(tmp_path):
    arguments = TrainingConfig(early_stopping_metric="loss").to_training_arguments(str(tmp_path))
    assert arguments.metric_for_best_model == "eval_loss"
    assert arguments.greater_is_better is False


def test_gradients_are_not_clipped_by_default(tmp_path):
    assert TrainingConfig().to_training_arguments(str(tmp_path)).max_grad_norm == 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, "constant"),
        ("constant", 0.1, "constant_with_warmup"),
        ("cosine", 0.0, "cosine"),
        ("cosine", 0.25, "cosine"),
    ],
)
def test_the_schedule_is_the_one_asked_for_and_the_warmup_a_fraction_of_all_steps(tmp_path, schedule, warmup, expected):
    config = TrainingConfig(lr_schedule=schedule, warmup_fraction=warmup)
    arguments = config.to_training_arguments(str(tmp_path))
    assert arguments.lr_scheduler_type == expected
    assert arguments.get_warmup_steps(1000) == 1000 * warmup


def test_further_training_arguments_are_passed_on_and_win_over_the_labs_defaults(tmp_path):
    config = TrainingConfig(training_arguments={"adam_beta1": 0.8, "save_total_limit": 5})
    arguments = config.to_training_arguments(str(tmp_path))
    assert arguments.adam_beta1 == 0.8
    assert arguments.save_total_limit == 5
    assert TrainingConfig().to_training_arguments(str(tmp_path)).save_total_limit == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adam_beta_1", r"which is not tested with this lab; did you mean 'adam_beta1'\?$"),
        ("gradient_accumulation", r"which is not tested with this lab; did you mean 'gradient_accumulation_steps'\?$"),
        ("fsdp", r"which is not tested with this lab; it takes 'adam_beta1', .*, 'torch_compile_mode'$"),
        ("num_train_epochs", "which TrainingConfig sets by its field num_epochs$"),
        ("per_device_train_batch_size", "which TrainingConfig sets by its field batch_size$"),
        ("warmup_steps", "which TrainingConfig sets by its field warmup_fraction$"),
        ("bf16_full_eval", "which TrainingConfig sets by its field precision$"),
        ("report_to", "which TrainingConfig sets by its field use_wandb$"),
        ("save_only_model", "which TrainingConfig sets by its field checkpoint_seconds$"),
        ("eval_delay", "but early stopping and history need one log and one validation per epoch$"),
        ("eval_do_concat_batches", "but an evaluation needs the logits of all images at once$"),
        ("include_for_metrics", "but an evaluation needs the logits of all images at once$"),
        ("ignore_data_skip", "but a resumed training would no longer be exact$"),
        ("remove_unused_columns", "but the lab's batches are images and labels$"),
        ("label_smoothing_factor", "which would do nothing: the trainer's `losses` make the loss$"),
    ],
)
def test_another_training_argument_is_refused_with_the_reason(name, words):
    with pytest.raises(ValueError, match=f"^TrainingConfig: training_arguments has '{name}', {words}"):
        TrainingConfig(training_arguments={name: 1})


def test_every_training_argument_is_one_of_transformers_and_what_the_config_sets_is_refused(tmp_path):
    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert known >= {*TRAINING_ARGUMENTS, *_REFUSED_ARGUMENTS}
    assert TrainingConfig()._own_arguments("", False).keys() <= _REFUSED_ARGUMENTS.keys()
    assert not {*TRAINING_ARGUMENTS} & _REFUSED_ARGUMENTS.keys()


def test_the_defaults_have_an_empty_identity():
    assert TrainingConfig().identity() == {}


@pytest.mark.parametrize(("name", "value"), NO_INFLUENCE.items())
def test_who_is_told_of_a_run_and_where_it_runs_is_no_part_of_its_identity(name, value):
    assert TrainingConfig(**{name: value}).identity() == TrainingConfig().identity()


@pytest.mark.parametrize(("name", "value"), INFLUENCE.items())
def test_what_changes_the_science_of_a_run_changes_its_identity(name, value):
    assert TrainingConfig(**{name: value}).identity() == {name: value}


def test_both_ways_to_say_off_have_one_identity():
    assert (
        TrainingConfig(early_stopping_patience=0).identity() == TrainingConfig(early_stopping_patience=None).identity()
    )


@pytest.mark.parametrize("name", ["rotation_degrees", "learning_rate", "weight_decay", "translation_fraction"])
def test_a_whole_number_and_the_same_float_have_one_identity_as_json(name):
    whole, fraction = TrainingConfig(**{name: 1}), TrainingConfig(**{name: 1.0})
    assert json.dumps(whole.identity()) == json.dumps(fraction.identity())


def test_a_token_in_the_chats_place_is_refused():
    words = "TrainingConfig: telegram_chat_id looks like a bot's token; it is the number of a chat"
    with pytest.raises(ValueError, match=words):
        TrainingConfig(telegram_chat_id="123456:" + 35 * "A")
