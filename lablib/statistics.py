"""Tables of runs -> means, intervals, paired comparisons and tables of results.

A *frame* has one row per run: model, seed, dataset, parameters, val_accuracy, test_accuracy, epochs, seconds, ...;
accuracies are fractions. Where a run failed the numbers are NaN, and a column `error` may say why.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from scipy import stats

MIN_SEEDS = 3  # with two, an interval means little: tables, figures and verdicts show none
_OTHER = " in the other experiment"  # ends the name of the second of two effects


class Summary(NamedTuple):
    """Mean of n values, their sample standard deviation, and the half-width of the mean's 95 % interval (Student's t).

    `std` is NaN for one value; `ci95` is NaN for fewer than `MIN_SEEDS` values or equal ones.
    """

    mean: float
    std: float
    ci95: float
    n: int

    def percent(self) -> str:
        """A fraction as text: '98.35 ± 0.12 % (n = 5)', '98.35 % (1 seed)'."""
        return f"{_percent(self.mean, self.ci95)} ({seeds_text(self.n)})"


def _percent(mean: float, ci95: float = math.nan) -> str:
    return "" if math.isnan(mean) else f"{_hundredths(mean, ci95)} %"


def _hundredths(mean: float, ci95: float, sign: str = "") -> str:
    text = f"{100 * mean:{sign}z.2f}" + ("" if math.isnan(ci95) else f" ± {100 * ci95:.2f}")
    return text.replace("-", "−")


def seeds_text(n: int) -> str:
    """How many seeds a figure rests on: "1 seed", "n = 5"."""
    return "1 seed" if n == 1 else f"n = {n}"


def summarise(values: Sequence[float]) -> Summary:
    """Summary of those values that are not NaN."""
    series = pd.Series(values, dtype=float).dropna()
    error = stats.sem(series) if len(series) >= MIN_SEEDS else 0
    ci95 = math.nan if error < 1e-12 else float(stats.t.ppf(0.975, len(series) - 1) * error)  # equal up to rounding
    return Summary(series.mean(), series.std(), ci95, len(series))


def compare(frame: pd.DataFrame, pairs: Mapping[str, tuple[str, str]], metric: str = "test_accuracy") -> pd.DataFrame:
    """Paired differences, first − second, over the seeds that both models have: one row per pair.

    `pairs` gives for each label its two models. Columns: label, first, second, n, mean, std, ci95, p_value (paired
    t-test), p_adjusted (Benjamini and Hochberg's correction over the rows of one question), significant (adjusted
    p < 0.05), and by_seed ({seed: difference}). Labels such as "the shortcut, depth 2" that differ only in depth are
    one question, all others another. Pairs without a common seed are left out.
    """
    values = frame.dropna(subset=metric).pivot(index="seed", columns="model", values=metric)
    known = {label: pair for label, pair in pairs.items() if {*pair} <= {*values}}
    return _tested([(label, one, other, values[one] - values[other]) for label, (one, other) in known.items()])


def compare_effects(first: pd.DataFrame, second: pd.DataFrame) -> pd.DataFrame:
    """A table like `compare`'s: first's paired differences − second's, by seed, for the labels that both have."""
    comparisons = []
    for row in first.merge(second, on="label", validate="one_to_one").itertuples():
        effects = f"{row.first_x} − {row.second_x}", f"{row.first_y} − {row.second_y}{_OTHER}"
        comparisons.append((row.label, *effects, pd.Series(row.by_seed_x) - pd.Series(row.by_seed_y)))
    return _tested(comparisons)


def _tested(comparisons: list[tuple[str, str, str, pd.Series]]) -> pd.DataFrame:
    """A table of comparisons, from label, first, second and the differences by seed."""
    order = ["label", "first", "second", "n", "mean", "std", "ci95", "p_value", "p_adjusted", "significant", "by_seed"]
    rows = []
    for label, first, second, differences in comparisons:
        if len(values := differences.dropna()):
            summary = summarise(values)
            p = math.nan if math.isnan(summary.ci95) else stats.ttest_1samp(values, 0).pvalue
            names = {"label": label, "first": first, "second": second}
            rows.append(names | summary._asdict() | {"p_value": p, "by_seed": values.to_dict()})
    table = pd.DataFrame(rows, columns=order)
    question = table["label"].astype(str).str.extract(r"^(.*), depth \d+$")[0].fillna("")
    known = table["p_value"].dropna().astype(float)
    table["p_adjusted"] = known.groupby(question).transform(stats.false_discovery_control)
    table["significant"] = table["p_adjusted"] < 0.05
    return table


def labels(comparison: pd.DataFrame) -> list[str]:
    """Each row's label, preceded by the values to its left: "reference recipe, depth 2"."""
    columns = comparison.columns[: comparison.columns.get_loc("first")]
    return [", ".join(row) for row in comparison[columns].itertuples(index=False)]


def points(row: Mapping) -> str:
    """A comparison as text, in percentage points: '+0.63 ± 0.20 points (n = 5, adjusted p = 0.003)'."""
    p = row["p_adjusted"]
    tested = "" if math.isnan(p) else ", adjusted p < 0.001" if p < 0.001 else f", adjusted p = {p:.2g}"
    return f"{_hundredths(row['mean'], row['ci95'], '+')} points ({seeds_text(row['n'])}{tested})"


def verdict(row: Mapping, word: str = "better") -> str:
    """A comparison as a sentence that claims no more than its interval supports; the larger value is `word`."""
    first, second = row["first"], row["second"]
    if math.isnan(row["ci95"]):
        why = "too few seeds to tell" if row["n"] < MIN_SEEDS else "the same with every seed, so there is no interval"
        return f"{first} − {second}: {points(row)}, {why}."
    if not row["significant"]:
        return f"No significant difference between {first} and {second}: {points(row)}."
    if second.endswith(_OTHER):  # effects, whose sign matters
        return f"**{first} is {'larger' if row['mean'] > 0 else 'smaller'} than {second}**: {points(row)}."
    larger, smaller = (first, second) if row["mean"] > 0 else (second, first)
    return f"**{larger} is {word} than {smaller}**: {points({**row, 'mean': abs(row['mean'])})}."


def verdicts(comparison: pd.DataFrame, word: str = "better") -> str:
    """All comparisons as a Markdown list of sentences."""
    sentences = []
    for label, row in zip(labels(comparison), comparison.to_dict("records"), strict=True):
        start = "- " if label == f"{row['first']} − {row['second']}" else f"- {label}: "
        sentences.append(start + verdict(row, word))
    return "\n".join(sentences) or "Nothing to compare: this needs finished runs of two networks with the same seed."


def effects_table(comparisons: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Comparisons as text, in percentage points: one row per label, one column per comparison, * if significant."""
    columns = {}
    for name, table in comparisons.items():
        rows = table.itertuples()
        cells = [f"{_hundredths(r.mean, r.ci95, '+')} ({seeds_text(r.n)}){' *' * r.significant}" for r in rows]
        columns[name] = pd.Series(cells, labels(table), dtype=object)
    return pd.concat(columns, axis=1).fillna("").rename_axis(columns="points, * significant")


def results_table(frame: pd.DataFrame, reference: Mapping[str, float] | None = None) -> pd.DataFrame:
    """One row per model, in order of appearance; accuracies are fractions, `n` counts the finished runs.

    `reference` gives published test accuracies by model. Where runs failed, `error` says why. Raises ValueError for two
    runs of a model with one seed.
    """
    if len(twice := frame["model"][frame.duplicated(["model", "seed"])]):
        raise ValueError(f"two runs of {twice.iloc[0]!r} have the same seed; give one of the models another name")
    by_model = frame.groupby("model", sort=False)
    columns = {"dataset": ("dataset", "first"), "parameters": ("parameters", "first"), "n": ("test_accuracy", "count")}
    columns |= {f"{m}_{kind}": (m, kind) for m in ("val_accuracy", "test_accuracy") for kind in ("mean", "std")}
    columns["test_accuracy_ci95"] = "test_accuracy", lambda values: summarise(values).ci95
    columns |= {f"{m}_mean": (m, "mean") for m in ("epochs", "seconds", "balanced_accuracy") if m in frame}
    table = by_model.agg(**columns).astype({"parameters": "Int64"})
    if reference:
        table["reference"] = table.index.map(reference).astype(float)
    if "error" in frame:
        table["error"] = by_model["error"].agg(lambda errors: "; ".join(errors.dropna().unique()))
    return table.reset_index()


def readable_table(table: pd.DataFrame) -> pd.DataFrame:
    """A `results_table` as text to read, with percent signs, intervals and thousands separators."""
    table = table.set_index("model")
    readable = pd.DataFrame({"parameters": table["parameters"].map("{:,}".format, na_action="ignore")})
    readable["validation accuracy"] = table["val_accuracy_mean"].map(_percent)
    readable["test accuracy"] = [*map(_percent, table["test_accuracy_mean"], table["test_accuracy_ci95"])]
    for name, column in {"balanced accuracy": "balanced_accuracy_mean", "reference": "reference"}.items():
        if column in table:
            readable[name] = table[column].map(_percent)
    readable["n"] = table["n"].astype(str)
    for name, column in {"epochs": "epochs_mean", "seconds per run": "seconds_mean"}.items():
        readable[name] = table[column].map("{:,.0f}".format, na_action="ignore")
    if "error" in table and any(table["error"]):
        readable["failed"] = table["error"]
    return readable.astype(object).fillna("").rename_axis(columns=", ".join(table["dataset"].dropna().unique()))


def recommend(table: pd.DataFrame) -> str:
    """The smallest model of a `results_table` within one standard error of the best, by validation accuracy, which also
    decides between models of one size.

    This is the one-standard-error rule (Breiman et al., Classification and Regression Trees, 1984). Models with fewer
    than `MIN_SEEDS` finished runs or with a failed one are not candidates. If there is none, the returned text says so.
    """
    whole = table.get("error", pd.Series("", table.index)).fillna("") == ""
    finished = table[whole & (table["n"] >= MIN_SEEDS)]
    if finished.empty:
        return f"none: every model has fewer than {MIN_SEEDS} finished runs, or a failed one"
    best = finished.loc[finished["val_accuracy_mean"].idxmax()]
    lowest = best["val_accuracy_mean"] - best["val_accuracy_std"] / math.sqrt(best["n"])
    close = finished[finished["val_accuracy_mean"] >= lowest]
    return close.sort_values(["parameters", "val_accuracy_mean"], ascending=[True, False])["model"].iloc[0]


def save_table(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Write a table as CSV with all digits, making its folder, and return it."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def with_depth(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose model has a name like "ResidualMLP-8", with its family and depth (int) as further columns."""
    parts = table["model"].str.extract(r"^(?P<family>.+)-(?P<depth>\d+)$")
    return table.assign(**parts).dropna(subset="depth").astype({"depth": int})


def with_knobs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows whose model has a name like "T = 4, α = 0.7", with temperature and alpha (float) as columns.

    Pairs with failed runs are left out, since their means rest on other seeds.
    """
    knobs = table["model"].str.extract(r"^T = (?P<temperature>.+), α = (?P<alpha>.+)$").astype(float)
    whole = table["val_accuracy"].notna().groupby(table["model"]).transform("all")
    return table.assign(**knobs)[whole].dropna(subset="temperature")


def gradient_ratios(gradients: pd.DataFrame) -> pd.DataFrame:
    """The first layer's gradient over the last hidden one's, for each run: model, seed, when, ratio (NaN if undefined).

    `gradients` has one row per layer, in order: model, seed, when, layer (from 1; the last is the classifier), rms.
    """
    layers = gradients.groupby(["model", "seed", "when"], sort=False)["rms"]
    ratios = layers.agg(lambda rms: rms.iloc[0] / rms.iloc[-2] if len(rms) > 1 and rms.iloc[-2] else math.nan)
    return ratios.rename("ratio").reset_index()
