"""results/ -> the README's tables, each between its markers.

python -m lablib.report            write them
python -m lablib.report --check    only say whether they are up to date
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pandas as pd

from lablib import reference
from lablib.findings import findings, mostly
from lablib.statistics import readable_table

_BENCHMARK = "benchmark-cpu-2-cores.json"
_WAYS = {
    "student": "usual student lab",
    "transformers": "transformers.Trainer",
    "lightning": "Lightning",
    "keras": "Keras",
    "tight": "tight loop",
    "lablib": "lablib, one run",
    "side by side": "lablib, runs side by side",
}
_MARKED = r"(<!-- table: {name} -->\n).*?(<!-- end -->)"


def tables(results: Path) -> dict[str, str]:
    """Markdown tables by name, from the CSV files in a folder. Raises FileNotFoundError if one is missing."""
    read = {path.stem: pd.read_csv(path) for path in sorted(results.glob("*.csv"))}
    mlps = ("mlps_mnist", "mlps_mnist_cosine", "mlps_mnist_depth", "mlps_mnist_differences")
    cnns = ("cnns_cifar10-jpeg", "cnns_cifar10-jpeg_differences")
    distillation = ("distillation_cifar10-jpeg", "distillation_cifar10-jpeg_rules")
    regimes = tuple(f"regimes_cifar10-jpeg{part}" for part in ("", "_differences", "_prices"))
    depth = ("depth_cifar10-jpeg", "depth_cifar10-jpeg_differences")
    wide = "cnns_wide_cifar10-jpeg"
    missing = [f"{name}.csv" for name in (*mlps, *cnns, *distillation, *regimes, *depth, wide) if name not in read]
    if missing:
        raise FileNotFoundError(f"{results} lacks {', '.join(missing)}; `make full` writes them")
    if not (results / _BENCHMARK).exists():
        raise FileNotFoundError(f"{results} lacks {_BENCHMARK}; `make bench` writes it on a machine of 2 cores")
    return {
        "findings": findings(read),
        "mlps_mnist": markdown(readable_table(read["mlps_mnist"], reference.MNIST)),
        "mlps_mnist_cosine": markdown(readable_table(read["mlps_mnist_cosine"])),
        "mlps_mnist_depth": markdown(by_depth(read["mlps_mnist_depth"])),
        "mlps_mnist_differences": markdown(readable_differences(read["mlps_mnist_differences"])),
        "cnns_cifar10-jpeg": markdown(readable_table(read["cnns_cifar10-jpeg"])),
        "cnns_cifar10-jpeg_differences": markdown(by_question(read["cnns_cifar10-jpeg_differences"])),
        "distillation_cifar10-jpeg": markdown(readable_distillation(read["distillation_cifar10-jpeg"])),
        "distillation_cifar10-jpeg_rules": markdown(readable_rules(read["distillation_cifar10-jpeg_rules"])),
        "regimes_cifar10-jpeg": markdown(readable_regimes(read["regimes_cifar10-jpeg"])),
        "regimes_cifar10-jpeg_differences": markdown(by_regime(read["regimes_cifar10-jpeg_differences"])),
        "regimes_cifar10-jpeg_prices": markdown(readable_prices(read["regimes_cifar10-jpeg_prices"])),
        "depth_cifar10-jpeg": depth_by_way(read["depth_cifar10-jpeg"]),
        "depth_cifar10-jpeg_gains": markdown(readable_depth(read["depth_cifar10-jpeg_differences"])),
        "depth_cifar10-jpeg_differences": markdown(by_family(read["depth_cifar10-jpeg_differences"])),
        wide: markdown(readable_table(read[wide], reference.CIFAR10)),
        "speed": speed(json.loads((results / _BENCHMARK).read_bytes())),
    }


def by_depth(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy in percent, families in rows and depths in columns; a dash where there is no run."""
    family, depth = table["model"].str.rpartition("-")[0], table["model"].str.rpartition("-")[2]
    cells = [
        _with_interval(f"{100 * mean:.2f}", ci95)
        for mean, ci95 in zip(table["test_accuracy_mean"], table["test_accuracy_ci95"], strict=True)
    ]
    wide = pd.DataFrame({"model": family, "depth": depth.astype(int), "cell": cells})
    wide = wide.pivot(index="model", columns="depth", values="cell").loc[family.unique()]
    return wide.rename_axis(columns=None).fillna("–")


def depth_by_way(table: pd.DataFrame) -> str:
    """Test accuracy by family, way of training and depth, and below it the number of seeds and the precision."""
    names = (table["model"] + " (" + table["regime"] + ")").to_list()
    seeds, precision = (mostly(dict(zip(names, table[key], strict=True))) for key in ("seeds", "precision"))
    return f"{markdown(by_depth(with_ways(table)))}\nn = {seeds}; trained in {precision}.\n"


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
    points, seeds = (
        cells.pivot(index=where, columns="what", values=part)
        .loc[table[where].unique(), table["what"].unique()]
        .rename_axis(columns=None)
        .fillna("–")
        for part in ("points", "n")
    )
    return points.assign(n=[_seeds(row) for row in seeds.to_numpy()])


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
            "gain, points": _with_interval(f"{100 * row['gain_mean']:+.2f}", row["gain_ci95"]),
            "n": row["seeds"],
        }
        for row in table.to_dict("records")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("epoch with the")


def readable_regimes(table: pd.DataFrame) -> pd.DataFrame:
    """The same networks trained in several ways, one row a network and way."""
    readable = readable_table(table).drop(columns="seconds a run")
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


def speed(measured: dict) -> str:
    """Training images a second by network and way of training, each in its fastest variant, and where and when."""
    rows = {}
    for case in measured["cases"]:
        best: dict[str, float] = {}
        for entry in case["entries"]:
            way = _WAYS["side by side" if "side by side" in entry["variant"] else entry["rival"]]
            best[way] = max(best.get(way, 0.0), median(entry["train"]))
        rows[case["name"]] = {way: f"{best[way]:,.0f}" if way in best else "–" for way in _WAYS.values()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("images a second")
    machine = measured["machine"]
    processor = " with ".join([machine["gpu"] or machine["processor"], *filter(None, [", ".join(machine["units"])])])
    where = f"{processor}, {machine['cores']} cores, PyTorch {machine['versions']['torch']}"
    epochs = f"the median of {measured['rounds']} epochs, in turns"
    return f"{markdown(table)}\nMeasured on {measured['date']} on {where}: {epochs}.\n"


def _points(table: pd.DataFrame, prefix: str = "") -> list[str]:
    return [
        "" if pd.isna(mean) else _with_interval(f"{100 * mean:+.2f}", ci95)
        for mean, ci95 in zip(table[f"{prefix}mean"], table[f"{prefix}ci95"], strict=True)
    ]


def _with_interval(mean: str, ci95: float) -> str:
    return mean if pd.isna(ci95) else f"{mean} ± {100 * ci95:.2f}"


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table with the index as its first column."""
    header = [table.index.name or "", *map(str, table.columns)]
    rows = [[str(index), *map(str, row)] for index, row in zip(table.index, table.to_numpy(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def filled(text: str, results: Path) -> str:
    """A text with the tables between its markers written anew. Raises ValueError for a table without its place."""
    for name, table in tables(results).items():
        text, count = re.subn(_MARKED.format(name=name), rf"\g<1>\n{table}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the README needs '<!-- table: {name} -->' and '<!-- end -->' once; it has them {count}×")
    return text


def main(arguments: list[str]) -> int:
    """0, or 1 if `--check` finds the README out of date."""
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    new = filled(text, Path("results"))
    if "--check" in arguments:
        print("README.md is up to date" if new == text else "README.md differs from results/: run `make readme`")
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
