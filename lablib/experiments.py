"""An experiment trains several models with several seeds, `jobs` runs in parallel."""

import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, product
from operator import index
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from torch import nn

from lablib import figures
from lablib.checkpoints import Interruption
from lablib.config import TrainingConfig, redacted, warn
from lablib.data import UNBALANCED, ImageData
from lablib.identity import run_identity, run_name
from lablib.runs import Key, Run, TrainedModel, attempt, find_run, progress
from lablib.statistics import compare, compare_effects, readable_table, results_table, save_table, verdicts


@dataclass(repr=False)
class Experiment:
    """The runs that a table or figure compares, and the errors of failed ones, by model name and seed."""

    data: ImageData
    config: TrainingConfig | None  # None if experiments with different configs or callbacks were joined
    models: dict[str, Callable[[], nn.Module]]
    seeds: tuple[int, ...]
    callbacks: tuple = ()
    runs: dict[Key, Run] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)

    def _repr_html_(self) -> str:  # what a notebook shows
        return self.table().to_html()

    def select(self, *models: str) -> "Experiment":
        """The same experiment with only some of its models. Raises KeyError for a model that it does not have."""
        runs, failures = ({k: v for k, v in part.items() if k[0] in models} for part in (self.runs, self.failures))
        return replace(self, models={name: self.models[name] for name in models}, runs=runs, failures=failures)

    def __or__(self, other: "Experiment") -> "Experiment":
        """Join the models, seeds and runs of both. Raises ValueError if their data or a run they share differ."""
        if len({run.identity["data"][1] for run in (*self.runs.values(), *other.runs.values())}) > 1:
            raise ValueError(f"experiments on {self.data.name} and {other.data.name} have different data")
        for name, seed in self.runs.keys() & other.runs.keys():
            if self.runs[name, seed].path.name != other.runs[name, seed].path.name:
                raise ValueError(f"the experiments trained {name!r} differently; use another name")
        same = (self.config, self.callbacks) == (other.config, other.callbacks)
        models, runs, failures = self.models | other.models, self.runs | other.runs, self.failures | other.failures
        failures = {key: error for key, error in failures.items() if key not in runs}
        seeds = tuple(sorted({*self.seeds, *other.seeds}))
        return Experiment(self.data, self.config if same else None, models, seeds, self.callbacks, runs, failures)

    def values(self, model: str, key: str = "test_accuracy") -> dict[int, float]:
        """One result of a model, such as its test accuracy, for each seed."""
        return {seed: run.result[key] for (_, seed), run in sorted(self.select(model).runs.items())}

    def frame(self) -> pd.DataFrame:
        """One row per run, including failed ones; with `balanced_accuracy` if the classes are unbalanced."""
        columns = ["model", "seed", "parameters", "val_accuracy", "test_accuracy", "best_epoch", "epochs", "seconds"]
        columns += ["precision", *(["error"] if self.failures else [])]
        found = {key: {"error": error} for key, error in self.failures.items()}
        found |= {key: run.result for key, run in self.runs.items()}
        keys = [key for key in product(self.models, self.seeds) if key in found]
        rows = [{**found[model, seed], "model": model, "seed": seed} for model, seed in keys]
        table = pd.DataFrame(rows, columns=columns).assign(dataset=self.data.name)
        if self.data.imbalance <= UNBALANCED or not self.runs:
            return table
        by_class = self.predictions().groupby(["model", "seed", "label"])["correct"].mean()
        balanced = by_class.groupby(["model", "seed"]).mean().rename("balanced_accuracy")
        return table.join(balanced, ["model", "seed"])

    def histories(self) -> pd.DataFrame:
        """Metrics of every run by epoch: model, seed, epoch, train_loss, val_loss, ..."""
        return self._by_run([pd.DataFrame(run.history) for run in self.runs.values()])

    def gradients(self) -> pd.DataFrame:
        """Gradients of every run by layer: model, seed, layer, when ("initial" or "trained"), rms."""
        tables = []
        for run in self.runs.values():
            arrays = run.measured()
            table = pd.DataFrame({m: arrays.get(f"gradient_{m}", []) for m in ("initial", "trained")}, dtype=np.float32)
            tables.append(table.assign(layer=table.index + 1).melt("layer", var_name="when", value_name="rms"))
        return self._by_run(tables)

    def predictions(self) -> pd.DataFrame:
        """Each run's predictions on the test set: model, seed, image (index), label, predicted, confidence, correct."""
        true, tables = self.data.test_labels.numpy(), []
        for run in self.runs.values():
            measured = run.measured()
            answers = {"predicted": measured["test_class"], "confidence": measured["test_confidence"].astype(float)}
            tables.append(pd.DataFrame({"image": range(len(true)), "label": true, **answers}))
        return self._by_run(tables).assign(correct=lambda table: table["predicted"] == table["label"])

    def _by_run(self, tables: list[pd.DataFrame]) -> pd.DataFrame:
        return pd.concat(tables, keys=[*self.runs], names=["model", "seed"]).droplevel(-1).reset_index()

    def table(self, reference: Mapping[str, float] | None = None, save_to: str | Path | None = None) -> pd.DataFrame:
        """One row per model, as text. `reference`: published accuracies (fractions). `save_to`: a CSV file."""
        table = results_table(self.frame(), reference)
        return readable_table(save_table(table, save_to) if save_to else table)

    def compare(self, first: str | Mapping, second: str | None = None, by: Sequence[int] = ()) -> "Comparison":
        """Paired differences in test accuracy by seed, first model − second. Raises KeyError for an unknown model.

        Give two models, or several pairs by name: {"the shortcut": ("ResidualCNN", "NoShortcut")}. With depths in `by`,
        they are families ("ResidualCNN-2"), and p-values are corrected over a pair's depths, otherwise over all pairs.
        """
        pairs = first if isinstance(first, Mapping) else {f"{first} − {second}": (first, second)}
        if by:
            families = product(pairs.items(), by)
            pairs = {f"{label}, depth {n}": (f"{one}-{n}", f"{other}-{n}") for (label, (one, other)), n in families}
        pairs = {label: pair for label, pair in pairs.items() if pair[0] != pair[1]}  # no model with itself
        return Comparison(compare(self.select(*chain(*pairs.values())).frame(), pairs), self.data.name)

    def distil(
        self, student: str, teacher: str, temperature, alpha, *, name="Distilled", config=None, seeds=None, **more
    ) -> "Experiment":
        """Train a model as a student: for each seed, it learns from the `teacher`'s run with the same seed.

        Lists of temperatures or alphas give a student per pair, named "T = 4, α = 0.7"; otherwise `name` is its name.
        Config and seeds default to this experiment's; `more` is `jobs` and `weights`, as in `experiment`. Seeds whose
        teacher failed are skipped. KeyError for a missing model or run, ValueError without a config; see `experiment`.
        """
        from lablib.distillation import KnowledgeDistillationTrainer  # with transformers, which takes seconds

        if not (config := config or self.config):
            raise ValueError("the joined experiments have different configs; pass config=")
        seeds = range(seeds) if isinstance(seeds, int) else seeds or self.seeds
        seeds = [seed for seed in seeds if (teacher, seed) not in self.failures]
        models, trainers = {}, {}
        for t, a in product(np.ravel(temperature).tolist(), np.ravel(alpha).tolist()):
            label = f"T = {t:g}, α = {a:g}" if np.ndim(temperature) or np.ndim(alpha) else name
            models[label] = self.models[student]
            for seed in seeds:
                trained = TrainedModel(self.runs[teacher, seed], self.models[teacher])
                trainers[label, seed] = partial(KnowledgeDistillationTrainer, teacher=trained, temperature=t, alpha=a)
        more |= {"trainer_class": trainers, "callbacks": self.callbacks}
        return experiment(models, config, self.data, seeds, **more)

    def trained_model(self, model: str, seed: int | None = None) -> nn.Module:
        """A run's network (by default the first seed's) with its best weights. Raises as `TrainedModel.load`."""
        run = self.runs[model, self.seeds[0] if seed is None else seed]
        return TrainedModel(run, self.models[model]).load()


@dataclass(frozen=True)
class Comparison:
    table: pd.DataFrame  # paired differences between models, from `statistics.compare`
    dataset: str

    def plot(self, title: str, *paths: str | Path) -> figures.plt.Figure:
        """Plot a dot per seed, the means, and intervals from three seeds on; also save the figure to the paths."""
        return figures.save(figures.paired_differences(self.table, self.dataset, title), *paths)

    def verdicts(self) -> "Sentences":
        """One sentence per comparison that claims no more than the interval supports."""
        return Sentences(verdicts(self.table))

    __repr__ = _repr_markdown_ = verdicts

    def __or__(self, other: "Comparison") -> "Comparison":
        """Both comparisons, on the same data set, in one table; p-values stay corrected within each comparison."""
        return replace(self, table=pd.concat([self.table, other.table], ignore_index=True))

    def __sub__(self, other: "Comparison") -> "Comparison":
        """By how much differences with the same label differ, seed by seed, for example between two recipes."""
        return replace(self, table=compare_effects(self.table, other.table))


class Sentences(str):
    _repr_markdown_ = str.__str__  # a notebook shows them as Markdown


def experiment(
    models: Mapping[str, Callable[[], nn.Module]],
    config: TrainingConfig,
    data: ImageData,
    seeds: int | Iterable[int],
    *,
    jobs: int = 1,
    trainer_class: Callable | Mapping[Key, Callable] | None = None,
    callbacks: Sequence = (),
    weights: bool = False,
) -> Experiment:
    """Train each model with each seed. Runs already finished here, or published with the lab, are loaded.

    `models` maps names to functions that build the networks; `seeds=3` means 0, 1 and 2. joblib trains `jobs` runs in
    parallel (-1: one per core), on a cluster with `joblib.parallel_config("dask")`; its workers need `output_dir` at
    the same path. `trainer_class` (or a dict by model and seed) and `weights` are as in `train_or_load`. Each run gets
    copies of the `callbacks`. Failed runs cause a warning and are in `failures`; RuntimeError if all fail. Before any
    training, raises as `run_identity`, and ValueError for a config with a seed or one run under two names.
    """
    if config.seed:
        raise ValueError(f"the config has seed = {config.seed}; write seeds = [{config.seed}] instead")
    if built := [name for name, build in models.items() if isinstance(build, nn.Module)]:
        raise TypeError(f"models: {built[0]!r} needs a function that builds the network, such as lambda: Net()")
    seeds = tuple(dict.fromkeys(map(index, range(seeds) if isinstance(seeds, int) else seeds)))  # each once
    keys = [*product(models, seeds)]
    if not keys:
        raise ValueError("an experiment needs at least one model and one seed; seeds=2 means the seeds 0 and 1")
    result = Experiment(data, config, dict(models), seeds, tuple(callbacks))
    trainers = trainer_class if isinstance(trainer_class, Mapping) else dict.fromkeys(keys, trainer_class)
    silent = {"use_telegram_notifications": False, "telegram_bot_token": None}  # the token stays in this process
    missing, named = {}, {}
    for name, seed in keys:
        seeded = replace(config, seed=seed, output_dir=os.path.abspath(config.output_dir), **silent)
        identity = run_identity(models[name], seeded, data, trainers[name, seed], callbacks)
        if (twin := named.setdefault(run_name(identity), name)) != name:  # they would look like independent results
            same = f"the models {twin!r} and {name!r} are the same network, trained in the same way"
            raise ValueError(f"{same}; in a loop, a lambda sees only the last value: use functools.partial")
        if run := find_run(run_name(identity), seeded.output_dir, weights):
            result.runs[name, seed] = run
        else:
            missing[name, seed] = seeded, identity
    data.warn_if_unbalanced()
    places = sorted({str(run.path.parent).removeprefix(f"{Path.cwd()}{os.sep}") for run in result.runs.values()})
    loaded = f"{len(result.runs)} of {len(keys)} runs loaded" + (f" from {' and '.join(places)}" if places else "")
    print(f"{loaded}, {len(missing)} to train", flush=True)
    if missing:
        _train(result, missing, trainers, weights, jobs)
        result.runs = {key: result.runs[key] for key in keys if key in result.runs}
    if result.failures and not result.runs:
        raise RuntimeError(f"no run succeeded: {'; '.join(dict.fromkeys(result.failures.values()))}")
    return result


def _train(result: Experiment, missing: dict[Key, tuple], trainers: Mapping, weights: bool, jobs: int):
    from lablib import telegram, tracking  # with transformers, which takes seconds

    wandb_mode = tracking.mode_here() if result.config.use_wandb else ""  # checked once for all runs
    shared = {"callbacks": result.callbacks, "weights": weights, "parent": os.getpid(), "wandb_mode": wandb_mode}
    tasks, paths = [], {}
    for key, (config, identity) in missing.items():
        config = replace(config, use_wandb=bool(wandb_mode), precision=identity["config"]["precision"])  # resolved here
        own = {"trainer_class": trainers[key], "identity": identity}
        tasks.append(joblib.delayed(attempt)(key, result.models[key[0]], config, result.data, **own, **shared))
        paths[key] = Path(config.output_dir, run_name(identity))
    jobs = min(joblib.effective_n_jobs(jobs), jobs if jobs > 0 else len(tasks), len(tasks))  # dask ignores jobs
    # mmap_mode "c": the workers share the images' memory, and may write to their own copy
    backend, _ = joblib.parallel.get_active_backend()
    return_as = "generator_unordered" if backend.supports_return_generator else "list"  # Ray's has no generators
    parallel = joblib.Parallel(n_jobs=jobs, return_as=return_as, mmap_mode="c", pre_dispatch=jobs)
    telling = telegram.ExperimentMessages(result) if result.config.use_telegram_notifications else nullcontext()
    interruption = Interruption([signal.SIGINT] if jobs > 1 else [])  # workers get Ctrl-C too: wait for checkpoints
    with telling, progress(paths, result.config.num_epochs), interruption:
        try:
            for key, run, error, trace in parallel(task for task in tasks if not interruption.asked):
                if run:
                    result.runs[key] = run
                elif error:
                    what = f" too: {error}" if error in result.failures.values() else f":\n{redacted(trace)}"
                    result.failures[key] = error
                    warn(f"the run of {key[0]!r} with seed {key[1]} failed{what}")
                else:
                    interruption.ask()
        except Exception:  # a worker died
            if not interruption.asked:
                raise
