"""The published runs: each is found by its name, whatever changes in lablib, and the notebooks ask for them."""

import dataclasses
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

from lablib import KnowledgeDistillationTrainer, TrainingConfig, models
from lablib.config import NOT_IDENTITY
from lablib.identity import run_identity, run_name
from lablib.runs import PUBLISHED, load_run
from tools.published import CIFAR_RECIPES, MNIST_RECIPES, Lab, blocks, main

STORED = sorted(path for path in PUBLISHED.glob("*") if path.is_dir())
SHORT = {"num_epochs": 1, "batch_size": 128, "precision": "fp32"}


class Named(SimpleNamespace):  # a data set or a teacher of which no more than the identity is known
    def __identity__(self):
        return self.identity


def described_again(stored: dict) -> dict:
    """The identity of the run that a stored identity describes, made by today's classes."""
    off = {f.name: type(f.default)() if isinstance(f.default, (bool, int, float)) else None for f in fields()}
    config = TrainingConfig(**({f.name: off[f.name] for f in fields() if f.default} | stored["config"]))
    trainer = None
    if isinstance(stored["trainer"], dict):
        _, knobs = stored["trainer"]["with"]
        trainer = partial(KnowledgeDistillationTrainer, **knobs | {"teacher": Named(identity=knobs["teacher"])})
    network = partial(getattr(models, stored["model"]["class"].removeprefix("lablib.")), **stored["model"]["arguments"])
    return run_identity(network, config, Named(identity=stored["data"]), trainer)


def fields() -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(TrainingConfig) if f.name not in NOT_IDENTITY]


def test_every_published_run_is_whole_and_small_and_has_the_name_that_it_would_have_today():
    assert STORED
    for path in STORED:
        stored = json.loads((path / "identity.json").read_bytes())
        assert load_run(path).path.name == run_name(stored)
        assert sum(file.stat().st_size for file in path.iterdir()) <= 60_000
        assert run_name(described_again(stored)) == path.name, stored


def test_what_is_missing_is_trained_published_and_found_without_its_weights(capsys, tmp_path):
    recipes = {"mnist_recipes": MNIST_RECIPES, "cifar_recipes": CIFAR_RECIPES}
    short = {name: {k: replace(v, **SHORT) for k, v in knobs.items()} for name, knobs in recipes.items()}
    sizes = {"seeds": 1, "width": 2, "strong": 2, "wide": 3, "grid_images": 100, "published": tmp_path / "published"}
    lab = Lab("digits", "digits", str(tmp_path / "runs"), **sizes, **short)
    asked = ["--only", "A/cosine", "I", "SimpleCNN-2"]
    assert main(["--list", *asked], lab) == 1
    assert "10 missing" in capsys.readouterr().out
    assert main(asked, lab) == 0
    assert "nothing missing" in capsys.readouterr().out
    assert "SimpleCNN-2,digits,1063,1," in (tmp_path / "cnns_wide_cosine.csv").read_text()
    assert "distillation,Distilled-2,ResidualCNN-2,1," in (tmp_path / "distillation_strong_gains.csv").read_text()
    elsewhere = replace(lab, output_dir=str(tmp_path / "another machine"))
    assert main(["--list", *asked], elsewhere) == 0
    students = next(block for block in blocks(elsewhere) if block.teacher and block.name == "A/reference")
    assert elsewhere.names(students) == {("Distilled-2", 0): None}  # its teacher is not trained
