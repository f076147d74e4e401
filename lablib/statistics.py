"""Means, intervals, paired comparisons and result tables, from tables of runs.

A *frame* has one row per run: model, seed, dataset, test_accuracy (a fraction, NaN if it failed), error (why), ...
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy import stats

MIN_SEEDS = 3  # with two, an interval means little, so none is shown


class Summary(NamedTuple):
    mean: float
    std: float  # of the sample
    ci95: float  # half-width of the mean's 95 % interval (Student's t)
    n: int

    def percent(self) -> str:
        """A fraction as text: '98.35 ± 0.12 % (n = 5)'."""
        return f"{_hundredths(self.mean, self.ci95)} ({seeds_text(self.n)})"


def seeds_text(n: int) -> str:
    return "1 seed" if n == 1 else f"n = {n}"


def _hundredths(mean: float, ci95: float = math.nan, sign: str = "", unit: str = " %") -> str:
    text = f"{100 * mean:{sign}z.2f}" + ("" if math.isnan(ci95) else f" ± {100 * ci95:.2f}") + unit
    return "" if math.isnan(mean) else text.replace("-", "−")


def summarise(values: Sequence[float]) -> Summary:
    """Summarise the values that are not NaN. `ci95` is NaN for fewer than `MIN_SEEDS` values or if all are equal."""
    series = pd.Series(values, dtype=float).dropna()
    error = stats.sem(series) if len(series) >= MIN_SEEDS else 0
    ci95 = math.nan if error < 1e-12 else float(stats.t.ppf(0.975, len(series) - 1) * error)  # equal up to rounding
    return Summary(series.mean(), series.std(), ci95, len(series))


def compare(frame: pd.DataFrame, pairs: Mapping[str, tuple[str, str]], metric: str = "test_accuracy") -> pd.DataFrame:
    """Paired differences, first − second, over the seeds that both models of a pair have (pairs without any are left
    out): label, first, second, n, mean, std, ci95, p_value (paired t-test), p_adjusted (Benjamini and Hochberg, over
    the rows of one question), significant (adjusted p < 0.05), by_seed ({seed: difference}). Labels that differ only in
    depth, such as "the shortcut, depth 2", are one question; all labels without a depth are another.
    """
    values = frame.dropna(subset=metric).pivot(index="seed", columns="model", values=metric)
    known = [(label, one, other) for label, (one, other) in pairs.items() if {one, other} <= {*values}]
    return _tested([(label, one, other, values[one] - values[other]) for label, one, other in known])


def compare_effects(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """A table like `compare`'s of first's differences − second's, paired by seed, for the labels that both have."""
    comparisons = []
    for row in first.merge(second, on="label", validate="one_to_one").itertuples():
        effects = f"{row.first_x} − {row.second_x}", f"{row.first_y} − {row.second_y} in the other experiment"
        comparisons.append((row.label, *effects, pd.Series(row.by_seed_x) - pd.Series(row.by_seed_y)))
    return _tested(comparisons)


def _tested(comparisons: list[tuple[str, str, str, pd.Series]]) -> pd.DataFrame:
    rows = []
    for *names, differences in comparisons:
        if len(values := differences.dropna()):
            mean, std, ci95, n = summarise(values)
            p = math.nan if math.isnan(ci95) else stats.ttest_1samp(values, 0).pvalue
            rows.append([*names, n, mean, std, ci95, p, values.to_dict()])
    table = pd.DataFrame(rows, columns=["label", "first", "second", "n", "mean", "std", "ci95", "p_value", "by_seed"])
    question = table["label"].astype(str).str.extract(r"^(.*), depth \d+$")[0].fillna("")
    by_question = table["p_value"].dropna().astype(float).groupby(question)
    table.insert(8, "p_adjusted", by_question.transform(stats.false_discovery_control))
    table.insert(9, "significant", table["p_adjusted"] < 0.05)
    return table


def labels(comparison: pd.DataFrame) -> list[str]:
    """Each row's label, preceded by the values to its left: "reference recipe, depth 2"."""
    return [", ".join(row) for row in comparison.loc[:, :"label"].itertuples(index=False)]


def points(row: Mapping) -> str:
    """A comparison as text, in percentage points: '+0.63 ± 0.20 points (n = 5, adjusted p = 0.003)'."""
    p = row["p_adjusted"]
    tested = "" if math.isnan(p) else ", adjusted p < 0.001" if p < 0.001 else f", adjusted p = {p:.2g}"
    return f"{_hundredths(row['mean'], row['ci95'], '+', ' points')} ({seeds_text(row['n'])}{tested})"


def verdict(row: Mapping, word: str = "better") -> str:
    """A comparison as a sentence that claims no more than its interval supports. The larger value is `word`."""
    first, second = row["first"], row["second"]
    if math.isnan(row["ci95"]):
        why = "too few seeds to tell" if row["n"] < MIN_SEEDS else "the same for every seed, so there is no interval"
        return f"{first} − {second}: {points(row)}, {why}."
    if not row["significant"]:
        return f"No significant difference between {first} and {second}: {points(row)}."
    if " − " in first:  # effects have a sign: larger is not always better
        return f"**{first} is {'larger' if row['mean'] > 0 else 'smaller'} than {second}**: {points(row)}."
    larger, smaller = (first, second) if row["mean"] > 0 else (second, first)
    return f"**{larger} is {word} than {smaller}**: {points({**row, 'mean': abs(row['mean'])})}."


def verdicts(comparison: pd.DataFrame, word: str = "better") -> str:
    """All comparisons as a Markdown list of sentences."""
    rows = zip(labels(comparison), comparison.to_dict("records"), strict=True)
    return "\n".join(f"- {label}: {verdict(row, word)}" for label, row in rows) or "Nothing to compare."


def effects_table(comparisons: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Comparisons as text, in percentage points: one row per label, one column per comparison; * if significant."""
    columns = {}
    for name, table in comparisons.items():
        rows = table.itertuples()
        cells = [f"{_hundredths(r.mean, r.ci95, '+', '')} ({seeds_text(r.n)}){' *' * r.significant}" for r in rows]
        columns[name] = pd.Series(cells, labels(table), dtype=object)
    return pd.concat(columns, axis=1).fillna("").rename_axis(columns="points, * significant")


def results_table(frame: pd.DataFrame, reference: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per model, in order. `reference`: published accuracies. ValueError if a model has a seed twice."""
    if frame.duplicated(["model", "seed"]).any():
        raise ValueError("two runs of a model have the same seed; give one of the models another name")
    columns = {"dataset": ("dataset", "first"), "parameters": ("parameters", "first"), "n": ("test_accuracy", "count")}
    columns |= {f"{m}_{kind}": (m, kind) for m in ("val_accuracy", "test_accuracy") for kind in ("mean", "std")}
    columns["test_accuracy_ci95"] = "test_accuracy", lambda values: summarise(values).ci95
    columns |= {f"{m}_mean": (m, "mean") for m in ("epochs", "seconds", "balanced_accuracy") if m in frame}
    if "error" in frame:
        columns["error"] = "error", lambda errors: "; ".join(errors.dropna().unique())
    table = frame.groupby("model", sort=False).agg(**columns).astype({"parameters": "Int64"}).reset_index()
    return table.assign(reference=table["model"].map(reference).astype(float)) if reference else table


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """A `results_table` as readable text, with percent signs, intervals and thousands separators."""
    whole = "{:,.0f}".format
    columns = {"parameters": ("parameters", whole), "validation accuracy": ("val_accuracy_mean", _hundredths)}
    columns |= {"balanced accuracy": ("balanced_accuracy_mean", _hundredths), "reference": ("reference", _hundredths)}
    columns |= {"n": ("n", whole), "epochs": ("epochs_mean", whole), "seconds per run": ("seconds_mean", whole)}
    columns |= {"failed": ("error", str)}
    texts = {name: table[c].map(text, na_action="ignore") for name, (c, text) in columns.items() if c in table}
    readable = pd.DataFrame(texts).astype(object).fillna("").set_index(table["model"])
    readable.insert(2, "test accuracy", [*map(_hundredths, table["test_accuracy_mean"], table["test_accuracy_ci95"])])
    return readable.rename_axis(columns=", ".join(table["dataset"].dropna().unique()))


def recommend(table: pd.DataFrame) -> str:
    """The smallest model within one standard error of the best validation accuracy (Breiman et al., CART, 1984)."""
    finished = table[table["n"] >= MIN_SEEDS]
    if finished.empty:
        return f"none: every model has fewer than {MIN_SEEDS} finished runs"
    best = finished.loc[finished["val_accuracy_mean"].idxmax()]
    lowest = best["val_accuracy_mean"] - best["val_accuracy_std"] / math.sqrt(best["n"])
    close = finished[finished["val_accuracy_mean"] >= lowest]
    return close.sort_values(["parameters", "val_accuracy_mean"], ascending=[True, False])["model"].iloc[0]


def save_table(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Write a table as CSV with all digits, creating its folder, and return the table."""
    Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def with_depth(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose model has a name like "ResidualMLP-8", with the columns family and depth (int) added."""
    parts = table["model"].str.extract(r"^(?P<family>.+)-(?P<depth>\d+)$")
    return table.assign(**parts).dropna(subset="depth").astype({"depth": int})


def with_knobs(table: pd.DataFrame) -> pd.DataFrame:
    """The finished runs of models named like "T = 4, α = 0.7", with the columns temperature and alpha (float) added."""
    knobs = table["model"].str.extract(r"^T = (?P<temperature>.+), α = (?P<alpha>.+)$").astype(float)
    return table.assign(**knobs).dropna(subset=["temperature", "val_accuracy"])


def gradient_ratios(gradients: pd.DataFrame) -> pd.DataFrame:
    """Each run's ratio of first to last hidden layer's gradient (NaN if that is 0), from `Experiment.gradients()`."""
    layers = gradients.groupby(["model", "seed", "when"], sort=False)["rms"]
    return layers.agg(lambda rms: rms.iloc[0] / (rms.iloc[-2:-1].sum() or math.nan)).rename("ratio").reset_index()
