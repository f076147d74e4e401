"""Tables of results/ -> tables for people: percent, points, intervals, and what belongs side by side."""

from collections.abc import Sequence

import pandas as pd

from lablib import reference
from lablib.statistics import percent, points, readable_table


def by_depth(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in percent, families in rows and depths in columns; a dash where there is no run."""
    family, depth = table["model"].str.rpartition("-")[0], table["model"].str.rpartition("-")[2]
    cells = [
        percent(mean, ci95).removesuffix(" %")
        for mean, ci95 in zip(table["test_accuracy_mean"], table["test_accuracy_ci95"], strict=True)
    ]
    wide = pd.DataFrame({"model": family, "depth": depth.astype(int), "cell": cells})
    wide = wide.pivot(index="model", columns="depth", values="cell").loc[family.unique()]
    return wide.rename_axis(columns=None).fillna("–")


def untimed(readable: pd.DataFrame) -> pd.DataFrame:
    """Without the seconds, where runs were interrupted or shared a machine, and say nothing of the networks."""
    return readable.drop(columns="seconds a run")


def with_ways(table: pd.DataFrame) -> pd.DataFrame:
    """A table of networks ("SimpleCNN-2") trained in several ways, with the way in the name ("SimpleCNN, cosine-2")."""
    parts = table["model"].str.rpartition("-")
    named = table.assign(model=parts[0] + ", " + table["regime"] + "-" + parts[2])
    return named.iloc[pd.factorize(parts[0])[0].argsort(kind="stable")]  # families in their order, each with its ways


def by_question(table: pd.DataFrame, where: str = "depth") -> pd.DataFrame:
    """Paired differences in percentage points, depths (or another column, `where`) in rows, questions in columns.

    `n` is the number of seeds; where it differs within a row, one number for each column, in their order.
    """
    cells = table.assign(points=_points(table), n=table["n"].astype(str))
    answers, seeds = (
        cells.pivot(index=where, columns="what", values=part)
        .loc[table[where].unique(), table["what"].unique()]
        .rename_axis(columns=None)
        .fillna("–")
        for part in ("points", "n")
    )
    return answers.assign(n=[_seeds(row) for row in seeds.to_numpy()])


def _seeds(counts: Sequence[str]) -> str:
    answered = set(counts) - {"–"}
    return answered.pop() if len(answered) == 1 else ", ".join(counts)


def by_regime(table: pd.DataFrame) -> pd.DataFrame:
    """Paired differences between two networks in percentage points, ways of training in rows, questions in columns."""
    regimes = table["where"].isin(("constant", "cosine"))  # the other rows compare two ways of training one network
    return by_question(table[regimes].rename(columns={"where": "trained"}), "trained")


def readable_depth(table: pd.DataFrame) -> pd.DataFrame:
    """What the deepest network of a family is ahead of the shallowest, in points, by the way that they were trained."""
    of_depth = table[~table["where"].str.startswith("depth ")]
    by_way = by_question(of_depth.assign(what=of_depth["trained"]), "where")
    return by_way.rename_axis(" and ".join(of_depth["what"].unique()) or None)


def by_family(table: pd.DataFrame) -> pd.DataFrame:
    """What one family is ahead of another, in points: depths and ways of training in rows, questions in columns."""
    of_families = table[table["where"].str.startswith("depth ")]
    both = of_families["where"] + ", " + of_families["trained"]
    return by_question(of_families.assign(trained=both), "trained").rename_axis("trained")


def readable_differences(table: pd.DataFrame) -> pd.DataFrame:
    """Paired differences in percentage points, with interval and p-value."""
    p_value = table["p_value"].map(lambda p: "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}")
    columns = {"rate": table["schedule"], "ResidualMLP less MLP, points": _points(table), "p": p_value, "n": table["n"]}
    return pd.DataFrame(columns).set_index(table["depth"].rename("layers or blocks"))


def readable_distillation(table: pd.DataFrame) -> pd.DataFrame:
    """Teacher, baseline and distilled student, with the gain over the baseline and the reference figures."""
    by_model = dict(zip(table["model"], table["role"].map(reference.CIFAR10_DISTILLATION), strict=True))
    readable = readable_table(table, by_model)
    readable.insert(readable.columns.get_loc("test accuracy") + 1, "gain, points", _points(table, "gain_"))
    readable.insert(0, "role", table["role"].to_list())
    return readable


def readable_rules(table: pd.DataFrame) -> pd.DataFrame:
    """A distilled student's gain on validation, by the rule that chose the epoch, and the epochs that it chose."""
    rows = {
        {"accuracy": "highest validation accuracy", "loss": "lowest validation loss"}[row["rule"]]: {
            **{
                role: f"{100 * row[f'{role}_val_accuracy']:.2f} % (epoch {row[f'{role}_epoch']:.0f})"
                for role in ("baseline", "distilled")
            },
            "gain, points": points(row["gain_mean"], row["gain_ci95"]),
            "n": row["seeds"],
        }
        for row in table.to_dict("records")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch with the")


def readable_regimes(table: pd.DataFrame) -> pd.DataFrame:
    """The same networks trained in several ways, one row a network and way."""
    readable = untimed(readable_table(table))
    readable.insert(1, "trained", table["regime"].to_list())
    return readable


def readable_prices(table: pd.DataFrame) -> pd.DataFrame:
    """Ways to a better student: what each gains over the student as it is, and what it costs in training and in use."""
    columns = {
        "validation accuracy": (100 * table["val_accuracy_mean"]).map("{:.2f} %".format),
        "test accuracy": (100 * table["test_accuracy_mean"]).map("{:.2f} %".format),
        "gain, points": _points(table, "gain_"),
        "n": table["seeds"],
        "epochs": table["epochs_mean"].map("{:.0f}".format),
        "parameters": table["parameters"].map("{:,}".format),
        "million multiply-adds": (table["multiply_adds"] / 1e6).map("{:.1f}".format),
    }
    return pd.DataFrame(columns).set_index(table["student"])


def _points(table: pd.DataFrame, prefix: str = "") -> list[str]:
    return [
        "" if pd.isna(mean) else points(mean, ci95)
        for mean, ci95 in zip(table[f"{prefix}mean"], table[f"{prefix}ci95"], strict=True)
    ]


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table with the index as its first column."""
    header = [table.index.name or "", *map(str, table.columns)]
    rows = [[str(index), *map(str, row)] for index, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"
