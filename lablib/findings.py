"""results/ -> what the lab found, in sentences that say no more than the intervals do."""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pandas as pd

from lablib import reference
from lablib.statistics import PairedDifference, percent, points, recommend

_WAYS = ("constant", "cosine")
_FEW = 3  # seeds; with fewer nothing is printed in bold

Tables = Mapping[str, pd.DataFrame]


def findings(tables: Tables) -> str:
    """Markdown: each question of the lab with its answers, from the tables of results/ by their names.

    Raises KeyError if a table is missing, and ValueError if one lacks a comparison.
    """
    answers = {
        "Do shortcuts help a multilayer perceptron? (MNIST, constant way)": _perceptrons(tables),
        "Do they help a convolutional network with batch norm? (cifar10-jpeg, width 16)": _convolutional(tables),
        "Is depth worth more in another training? (cifar10-jpeg, width 16)": _depth(tables),
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


def _perceptrons(tables: Tables) -> list[str]:
    differences = tables["mlps_mnist_differences"]
    depths = sorted(differences["depth"].unique())
    found = [
        _verdict(_difference(differences, schedule="constant", depth=depth), f"ResidualMLP-{depth}", f"MLP-{depth}")
        for depth in (depths[0], depths[-1])
    ]
    accuracies = tables["mlps_mnist_depth"].set_index("model")
    deepest = max(int(model.rpartition("-")[2]) for model in accuracies.index)
    rows = accuracies[accuracies.index.str.endswith(f"-{deepest}")]
    side_by_side = "; ".join(f"{model} {_accuracy(row)}" for model, row in rows.iterrows())
    level, residual = (accuracies.loc[f"{family}-{deepest}"] for family in ("HeMLP", "ResidualMLP"))
    return [*found, f"{deepest} deep: {side_by_side}. {_sentence(_level_gradient(level, residual))}"]


def _level_gradient(level: pd.Series, residual: pd.Series) -> str:
    """Whether He's initialisation, with which the gradient starts level, does what the shortcut does."""
    rows = level, residual
    spread = [0 if row["test_accuracy_std"] == 0 else row["test_accuracy_ci95"] for row in rows]  # nan: one seed
    start = "a gradient that starts level, as He's initialisation makes it,"
    if residual["test_accuracy_mean"] - level["test_accuracy_mean"] > sum(spread):
        return f"{start} is not enough there."
    return f"whether {start} is enough there is not shown."


def _convolutional(tables: Tables) -> list[str]:
    differences = tables["depth_cifar10-jpeg_differences"]
    shortcut = differences[differences["what"] == "the shortcut"]
    deepest = max(int(where.removeprefix("depth ")) for where in shortcut["where"])
    there = shortcut[shortcut["where"] == f"depth {deepest}"]
    names = f"ResidualCNN-{deepest}", f"NoShortcut-{deepest}"
    networks = tables["depth_cifar10-jpeg"]
    found = []
    for way in there["trained"]:
        mixed = _mixed(networks[networks["model"].isin(names) & (networks["regime"] == way)])
        found.append(f"{way} way{mixed}: {_verdict(_difference(there, trained=way), *names)}")
    return found


def _depth(tables: Tables) -> list[str]:
    differences, networks = tables["depth_cifar10-jpeg_differences"], tables["depth_cifar10-jpeg"]
    gains = differences[~differences["where"].str.startswith("depth ")]
    found = []
    for family in gains["where"].unique():
        part = gains[gains["where"] == family]
        said = [f"{way} way {_difference(part, trained=way).points()}" for way in part["trained"] if way in _WAYS]
        both = part[part["trained"] == "cosine less constant"]
        said += [f"the difference of the two {_difference(both).points()}"] if len(both) else []
        compared = networks["depth"].isin((networks["depth"].min(), networks["depth"].max()))
        mixed = _mixed(networks[compared & networks["model"].str.startswith(f"{family}-")])
        found.append(f"{family}, {part['what'].iloc[0]}{mixed}: {'; '.join(said)}.")
    return found


def _mixed(networks: pd.DataFrame) -> str:
    """That networks which are compared were trained in different precision, which is part of the difference then."""
    precisions = sorted(networks["precision"].unique())
    return f" (trained partly in {' and partly in '.join(precisions)})" if len(precisions) > 1 else ""


def _taught(tables: Tables) -> list[str]:
    differences = tables["regimes_cifar10-jpeg_differences"]
    names = "the distilled student", "the baseline"
    found = [f"{way} way: {_verdict(_difference(differences, what='the teacher', where=way), *names)}" for way in _WAYS]
    for what in differences["what"].unique():
        if what.startswith("the teacher, "):  # another temperature and weight
            answer = _verdict(_difference(differences, what=what, where="cosine"), *names)
            found.append(f"{what.removeprefix('the teacher, ')}, cosine way: {answer}")
    by_role = tables["distillation_cifar10-jpeg"].set_index("role")
    teacher, baseline = (_accuracy(by_role.loc[role]) for role in ("teacher", "baseline"))
    (rule,) = tables["distillation_cifar10-jpeg_rules"].query("rule == 'accuracy'").to_dict("records")
    validation = f"{points(rule['gain_mean'], rule['gain_ci95'])} points (n = {rule['seeds']})"
    beside = f"in the constant way the gain on validation is {validation}; the teacher is at {teacher}, the baseline at"
    return [*found, f"{beside} {baseline}."]


def _instead(tables: Tables) -> list[str]:
    differences = tables["regimes_cifar10-jpeg_differences"]
    trained = _difference(differences, what="cosine rate and crops", where="ResidualCNN-2")
    found = [_verdict(trained, "the student in the cosine way", "the same in the constant way")]
    for what in differences["what"].unique():
        if what.startswith("rate "):  # the same network with another learning rate
            rate, _, usual = what.partition(", not ")
            answer = _verdict(_difference(differences, what=what, where="cosine"), rate, usual)
            found.append(f"the student in the cosine way, its learning rate to begin with: {answer}")
    prices = tables["regimes_cifar10-jpeg_prices"]
    small = prices["parameters"].min()
    for row in prices[prices["parameters"] > small].to_dict("records"):
        gain = f"{points(row['gain_mean'], row['gain_ci95'])} points (n = {row['seeds']})"
        times = f"{row['parameters'] / small:.0f} times the parameters"
        found.append(f"the student at {row['student']}, {times}, against the same at width 16, constant way: {gain}.")
    depth = tables["depth_cifar10-jpeg"]
    named = depth.assign(model=depth["model"] + ", " + depth["regime"] + " way").set_index("model", drop=False)
    taken = named.loc[recommend(named.reset_index(drop=True))]
    return [
        *found,
        f"to take, at width 16: {taken['model']}, {taken['parameters']:,} parameters, {_accuracy(taken)}; chosen on "
        "validation accuracy by the rule of one standard error.",
    ]


def _beside_the_reference(tables: Tables) -> list[str]:
    figures = {
        "mlps_mnist": reference.MNIST,
        "cnns_wide_cifar10-jpeg": reference.CIFAR10,
        "distillation_cifar10-jpeg": reference.CIFAR10_DISTILLATION,
    }
    reached, held, below, absent = 0, [], [], []
    for name, by_model in figures.items():
        rows = tables[name].set_index("role" if "role" in tables[name] else "model")
        at_width = " at width 64" if by_model is reference.CIFAR10 else ""
        absent += [f"{model}{at_width}" for model in by_model if model not in rows.index]
        for model, row in rows.iterrows():
            short = by_model[model] - row["test_accuracy_mean"]
            beside = f"{model} ({row['dataset']}), {_accuracy(row)} beside {percent(by_model[model])}"
            if short <= 0:
                reached += 1
            elif short <= row["test_accuracy_ci95"]:  # not where there is no interval
                held.append(beside)
            else:
                below.append(beside)
    ours = reached + len(held) + len(below)
    found = [
        f"{ours} of the {ours + len(absent)} single runs have a counterpart here; our mean reaches {reached} of them."
    ]
    for what, names in {"below, with an interval that holds the reference": held, "below": below}.items():
        found += [f"{what}: {'; '.join(names)}."] if names else []
    return found + ([f"not trained: {', '.join(absent)}."] if absent else [])


def _difference(table: pd.DataFrame, **where: str | int) -> PairedDifference:
    """The one comparison of a `differences_table` with these values in its other columns."""
    chosen = table[(table[list(where)] == pd.Series(where)).all(axis=1)] if where else table
    if len(chosen) != 1:
        raise ValueError(f"the results have {len(chosen)} comparisons, and not one, with {where}")
    (row,) = chosen.to_dict("records")
    return PairedDifference(**{field.name: _number(row[field.name]) for field in fields(PairedDifference)})


def _verdict(difference: PairedDifference, first: str, second: str) -> str:
    text = difference.verdict(first, second)
    return text if difference.n >= _FEW else text.replace("**", "")


def _accuracy(row: pd.Series) -> str:
    return f"{percent(row['test_accuracy_mean'], row['test_accuracy_ci95'])} (n = {row['seeds']})"


def _sentence(text: str) -> str:
    """With a capital letter, also behind the asterisks of bold type."""
    return re.sub(r"\w", lambda first: first.group().upper(), text, count=1)


def _number(value: float) -> float | None:
    return None if pd.isna(value) else value
