"""Results -> mean, standard deviation and interval; the paired comparison of two models over seeds; tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats

if TYPE_CHECKING:
    from lablib.experiments import Experiment


@dataclass(frozen=True)
class Summary:
    """Mean of n values, their sample standard deviation, and the half-width of the mean's 95 % interval (Student t).

    One value shows no spread: `std` and `ci95` are None, and the text says so. Nor do equal ones: `ci95` is None.
    """

    mean: float
    std: float | None
    ci95: float | None
    n: int

    def _why(self) -> str:
        return f"n = {self.n}: {'one seed shows' if self.n == 1 else 'all the same, which shows'} no spread"

    def percent(self) -> str:
        """As text, for a share such as an accuracy: '98.35 ± 0.12 % (n = 5)'."""
        if self.ci95 is None:
            return f"{100 * self.mean:.2f} % ({self._why()})"
        return f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f} % (n = {self.n})"


@dataclass(frozen=True)
class PairedDifference(Summary):
    """Mean over common seeds of one model's value less another's, with the two-sided p-value of the paired t-test.

    Where all differences are the same, as with one seed, there is neither an interval nor a p-value.
    """

    p_value: float | None

    def points(self) -> str:
        """As text, in percentage points: '+0.25 ± 0.10 points (n = 5, p = 0.003)'."""
        if self.ci95 is None:
            return f"{points(self.mean)} points ({self._why()})"
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{points(self.mean, self.ci95)} points (n = {self.n}, {p})"

    def verdict(self, first: str, second: str) -> str:
        """A sentence about the two, which says no more than the interval does."""
        if self.ci95 is None:
            return f"{first} against {second}: {self.points()}."
        if not self.excludes_zero:
            return f"between {first} and {second} no difference is shown: {self.points()}, an interval that holds 0."
        better, worse = (first, second) if self.mean > 0 else (second, first)
        return f"**{better} is ahead of {worse}**: {self.points()}."

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval lies on one side of 0; False where there is no interval."""
        return self.ci95 is not None and abs(self.mean) > self.ci95


def summarise(values: Sequence[float]) -> Summary:
    """Summary of some values. Raises ValueError if there are none or one of them is not finite."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"a summary needs one or more finite values; it got {list(values)!r}")
    n, mean = len(array), float(array.mean())
    if n == 1:
        return Summary(mean, None, None, 1)
    std = float(array.std(ddof=1))
    if std < 1e-12:  # equal counts, which differ by rounding at most
        return Summary(mean, std, None, n)
    return Summary(mean, std, float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n), n)


def differences(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """First less second, by seed, for the seeds that both have."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """First less second over the seeds that both have. Raises ValueError if they have none in common."""
    by_seed = differences(first, second)
    if not by_seed:
        raise ValueError(f"no seed in common: {sorted(first)} and {sorted(second)}; train both with the same seeds")
    return summarise_differences(by_seed)


def summarise_differences(by_seed: Mapping[int, float]) -> PairedDifference:
    """Mean of `differences`, with interval and test against 0. Raises ValueError if there are none."""
    values = list(by_seed.values())
    summary = summarise(values)
    if summary.ci95 is None:
        return PairedDifference(summary.mean, summary.std, None, summary.n, None)
    p_value = float(stats.ttest_1samp(values, 0).pvalue)
    return PairedDifference(summary.mean, summary.std, summary.ci95, summary.n, p_value)


def results_table(experiment: "Experiment") -> pd.DataFrame:
    """One row a model; accuracies are fractions. A model whose runs failed has its error in the column `failed`."""
    rows = []
    for model in experiment.models:
        failed = [f"seed {seed}: {error}" for (name, seed), error in experiment.failures.items() if name == model]
        row = {"model": model, "dataset": experiment.data.name, "failed": "; ".join(failed)}
        values = experiment.values(model)
        if values:
            validation = summarise(list(experiment.values(model, "val_accuracy").values()))
            test = summarise(list(values.values()))
            row |= {
                "parameters": next(iter(experiment.values(model, "parameters").values())),
                "seeds": test.n,
                "val_accuracy_mean": validation.mean,
                "val_accuracy_std": validation.std,
                "test_accuracy_mean": test.mean,
                "test_accuracy_std": test.std,
                "test_accuracy_ci95": test.ci95,
                "epochs_mean": summarise(list(experiment.values(model, "epochs").values())).mean,
                "seconds_mean": summarise(list(experiment.values(model, "seconds").values())).mean,
            }
        rows.append(row)
    columns = ["model", "dataset", "parameters", "seeds", "val_accuracy_mean", "val_accuracy_std"]
    columns += ["test_accuracy_mean", "test_accuracy_std", "test_accuracy_ci95", "epochs_mean", "seconds_mean"]
    table = pd.DataFrame(rows).reindex(columns=[*columns, "failed"])
    table = table.astype({"parameters": "Int64", "seeds": "Int64"})
    return table if experiment.failures else table.drop(columns="failed")


def save_table(table: pd.DataFrame, path: str | Path) -> pd.DataFrame:
    """Write a table as CSV with all digits of its numbers, making its folder, and return it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return table


def differences_table(differences: Mapping[tuple, PairedDifference], keys: Sequence[str]) -> pd.DataFrame:
    """One row a paired difference (fractions): the parts of its key, named by `keys`, and what it holds."""
    rows = [dict(zip(keys, key, strict=True)) | asdict(difference) for key, difference in differences.items()]
    return pd.DataFrame(rows, columns=[*keys, *(field.name for field in fields(PairedDifference))])


def recommend(table: pd.DataFrame) -> str:
    """The model of a `results_table` to take, chosen on validation accuracy by the rule of one standard error.

    That is the one with the fewest parameters among those whose mean is within a standard error of the best mean
    (Breiman, Friedman, Olshen and Stone, Classification and Regression Trees, 1984). With one seed: the best.
    Where some have several seeds, those with one are no candidates: of single runs one is lucky.
    Raises ValueError if no model has a result.
    """
    finished = table.dropna(subset="val_accuracy_mean")
    if finished.empty:
        raise ValueError("no model has a finished run, so there is none to recommend")
    if finished["seeds"].max() > 1:
        finished = finished[finished["seeds"] > 1]
    best = finished.loc[finished["val_accuracy_mean"].idxmax()]
    error = 0.0 if pd.isna(best["val_accuracy_std"]) else best["val_accuracy_std"] / math.sqrt(best["seeds"])
    close = finished[finished["val_accuracy_mean"] >= best["val_accuracy_mean"] - error]
    return close.loc[close["parameters"].astype(int).idxmin(), "model"]


def readable_table(table: pd.DataFrame, reference: Mapping[str, float] | None = None) -> pd.DataFrame:
    """A `results_table` for people: percent with intervals, and beside it a reference figure (a fraction) by model."""
    rows = []
    for row in table.to_dict("records"):
        if pd.isna(row["seeds"]):
            why = row.get("failed")
            rows.append({"model": row["model"], "test accuracy": f"failed: {why}" if why else "not trained"})
            continue
        test = percent(row["test_accuracy_mean"], row["test_accuracy_ci95"])
        rows.append(
            {
                "model": row["model"],
                "parameters": f"{int(row['parameters']):,}",
                "validation accuracy": percent(row["val_accuracy_mean"]),
                "test accuracy": test,
                "reference": percent(reference[row["model"]]) if row["model"] in (reference or {}) else "",
                "n": str(int(row["seeds"])),
                "epochs": f"{row['epochs_mean']:.0f}",
                "seconds a run": f"{row['seconds_mean']:.0f}",
            }
        )
        if isinstance(row.get("failed"), str) and row["failed"]:  # of joined tables one may lack the column
            rows[-1]["failed"] = row["failed"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    readable = pd.DataFrame([{key: row.get(key, "") for key in columns} for row in rows]).set_index("model")
    return readable if reference else readable.drop(columns="reference", errors="ignore")


def points(mean: float, ci95: float | None = None) -> str:
    """A difference of shares as text: '+0.25 ± 0.10', or '+0.25' where there is no interval."""
    return f"{100 * mean:+.2f}" if ci95 is None or pd.isna(ci95) else f"{100 * mean:+.2f} ± {100 * ci95:.2f}"


def percent(mean: float, ci95: float | None = None) -> str:
    """A share as text: '98.35 ± 0.12 %', or '98.35 %' where there is no interval."""
    return f"{100 * mean:.2f} %" if ci95 is None or pd.isna(ci95) else f"{100 * mean:.2f} ± {100 * ci95:.2f} %"
