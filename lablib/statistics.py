"""Results -> mean, standard deviation and interval; the paired comparison of two models over seeds; tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from lablib.experiment import Experiment


@dataclass(frozen=True)
class Summary:
    """Mean of n values, their sample standard deviation, and the half-width of the mean's 95 % interval (Student t).

    With one value there is no spread to see: `std` and `ci95` are None, and the text says so.
    """

    mean: float
    std: float | None
    ci95: float | None
    n: int

    def percent(self) -> str:
        """As text, for a share such as an accuracy: '98.35 ± 0.12 % (n = 5)'."""
        if self.ci95 is None:
            return f"{100 * self.mean:.2f} % (n = 1: one seed shows no spread)"
        return f"{100 * self.mean:.2f} ± {100 * self.ci95:.2f} % (n = {self.n})"


@dataclass(frozen=True)
class PairedDifference(Summary):
    """Mean over common seeds of one model's value less the other's, with the two-sided p-value of Student's paired t."""

    p_value: float | None

    def points(self) -> str:
        """As text, in percentage points: '+0.25 ± 0.10 points (n = 5, p = 0.003)'."""
        if self.ci95 is None:
            return f"{100 * self.mean:+.2f} points (n = 1: one seed shows no spread)"
        p = "p < 0.001" if self.p_value < 0.001 else f"p = {self.p_value:.3f}"
        return f"{100 * self.mean:+.2f} ± {100 * self.ci95:.2f} points (n = {self.n}, {p})"

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95 % interval lies on one side of 0; False for one seed, which shows nothing."""
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
    return Summary(mean, std, float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n), n)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> PairedDifference:
    """First less second over the seeds that both have. Raises ValueError if they have none in common."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(first)} and {sorted(second)}")
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    summary = summarise(differences)
    if summary.n == 1:
        return PairedDifference(summary.mean, None, None, 1, None)
    if summary.std == 0:
        p_value = 1.0 if summary.mean == 0 else 0.0
    else:
        p_value = float(stats.ttest_1samp(differences, 0).pvalue)
    return PairedDifference(summary.mean, summary.std, summary.ci95, summary.n, p_value)


def results_table(experiment: Experiment) -> pd.DataFrame:
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
