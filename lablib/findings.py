"""results/ -> what the lab found, in sentences that say no more than the intervals do."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from lablib import reference
from lablib.statistics import PairedDifference, percent

_WAYS = ("constant", "cosine")


def findings(tables: Mapping[str, pd.DataFrame]) -> str:
    """Markdown: each question of the lab with its answers, from the tables of results/ by their names.

    Raises KeyError if a table is missing, and ValueError if one lacks a comparison.
    """
    answers = {
        "Do shortcuts help a multilayer perceptron? (MNIST, constant rate)": _perceptrons(tables),
        "Do they help a convolutional network with batch norm? (cifar10-jpeg, width 16)": _convolutional(tables),
        "Can a small network learn from a large one? (cifar10-jpeg, width 16)": _taught(tables),
        "What helps the small network more?": _instead(tables),
        "And beside the figures that the lab set out to reproduce?": _beside_the_reference(tables),
    }
    return "\n".join(
        f"**{question}**\n\n" + "".join(f"- {_sentence(answer)}\n" for answer in found)
        for question, found in answers.items()
    )


def mostly(values: Mapping[str, Any]) -> str:
    """What most names have, and which have something else: 'bf16, but fp32 for A, B'."""
    names = {}
    for name, value in values.items():
        names.setdefault(value, []).append(name)
    usual, *others = sorted(names, key=lambda value: -len(names[value]))
    exceptions = " and ".join(f"{other} for {', '.join(names[other])}" for other in others)
    return f"{usual}, but {exceptions}" if others else str(usual)


def _sentence(text: str) -> str:
    """With a capital letter, also behind the asterisks of bold type."""
    return re.sub(r"\w", lambda first: first.group().upper(), text, count=1)


def _perceptrons(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    differences = tables["mlps_mnist_differences"]
    depths = sorted(differences["depth"].unique())
    found = [
        _difference(differences, schedule="constant", depth=depth).verdict(f"ResidualMLP-{depth}", f"MLP-{depth}")
        for depth in (depths[0], depths[-1])
    ]
    accuracies = tables["mlps_mnist_depth"]
    deepest = max(accuracies["model"].str.rpartition("-")[2].astype(int))
    rows = accuracies[accuracies["model"].str.endswith(f"-{deepest}")]
    side_by_side = "; ".join(f"{row['model']} {_accuracy(row)}" for _, row in rows.iterrows())
    return [*found, f"{deepest} deep: {side_by_side}."]


def _convolutional(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    differences = tables["depth_cifar10-jpeg_differences"]
    shortcut = differences[differences["what"] == "the shortcut"]
    deepest = max(int(where.removeprefix("depth ")) for where in shortcut["where"])
    depth, names = f"depth {deepest}", (f"ResidualCNN-{deepest}", f"NoShortcut-{deepest}")
    found = [
        f"{way} rate: {_difference(shortcut, where=depth, trained=way).verdict(*names)}"
        for way in _WAYS
        if way in set(shortcut.loc[shortcut["where"] == depth, "trained"])
    ]
    deeper = differences[differences["where"] == "ResidualCNN"]
    worth = [f"{way} rate {_difference(deeper, trained=way).points()}" for way in _WAYS]
    return [*found, f"what depth is worth, ResidualCNN with {deeper['what'].iloc[0]}: {'; '.join(worth)}."]


def _taught(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    differences = tables["regimes_cifar10-jpeg_differences"]
    gains = {way: _difference(differences, what="the teacher", where=way) for way in _WAYS}
    return [f"{way} rate: {gain.verdict('the taught student', 'the one alone')}" for way, gain in gains.items()]


def _instead(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    differences = tables["regimes_cifar10-jpeg_differences"]
    trained = _difference(differences, what="cosine rate and crops", where="ResidualCNN-2")
    found = [trained.verdict("the student with a cosine rate and random crops", "the one with a constant rate")]
    prices = tables["regimes_cifar10-jpeg_prices"]
    small = prices["parameters"].min()
    for row in prices[prices["parameters"] > small].to_dict("records"):
        interval = "" if pd.isna(row["gain_ci95"]) else f" ± {100 * row['gain_ci95']:.2f}"
        gain = f"{100 * row['gain_mean']:+.2f}{interval} points (n = {row['seeds']})"
        found.append(f"{row['student']}, at {row['parameters'] / small:.0f} times the parameters: {gain}.")
    return found


def _beside_the_reference(tables: Mapping[str, pd.DataFrame]) -> list[str]:
    figures = {
        "mlps_mnist": reference.MNIST,
        "cnns_wide_cifar10-jpeg": reference.CIFAR10,
        "distillation_cifar10-jpeg": reference.CIFAR10_DISTILLATION,
    }
    ours, absent = {}, []
    for name, by_model in figures.items():
        rows = tables[name].set_index("role" if "role" in tables[name] else "model")
        absent += [f"{model} ({rows['dataset'].iloc[0]})" for model in by_model if model not in rows.index]
        ours |= {model: (row, by_model[model]) for model, row in rows.iterrows()}
    short = [
        f"{model} ({row['dataset']}), {_accuracy(row)} beside {percent(figure)}"
        for model, (row, figure) in ours.items()
        if row["test_accuracy_mean"] < figure
    ]
    reached = f"{len(ours) - len(short)} of the {len(ours) + len(absent)} are reached, as means over our seeds"
    found = [f"{reached}; short of it fall {'; '.join(short)}." if short else f"{reached}."]
    return found + ([f"not trained here at their width: {', '.join(absent)}."] if absent else [])


def _difference(table: pd.DataFrame, **where: str | int) -> PairedDifference:
    """The one comparison of a `differences_table` with these values in its other columns."""
    chosen = table[(table[list(where)] == pd.Series(where)).all(axis=1)]
    if len(chosen) != 1:
        raise ValueError(f"the results have {len(chosen)} comparisons, and not one, with {where}")
    (row,) = chosen.to_dict("records")
    return PairedDifference(**{field.name: _number(row[field.name]) for field in fields(PairedDifference)})


def _accuracy(row: pd.Series) -> str:
    return f"{percent(row['test_accuracy_mean'], row['test_accuracy_ci95'])} (n = {row['seeds']})"


def _number(value: float) -> float | None:
    return None if pd.isna(value) else value
