"""An experiment: some models × some seeds -> their runs, trained side by side where there are cores for it."""

import json
import os
import signal
import traceback
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
from matplotlib.figure import Figure
from torch import nn

from lablib import figures
from lablib.checkpoints import Interruption
from lablib.config import TrainingConfig, num_processes, redacted, warn
from lablib.data import UNBALANCED, ImageData
from lablib.identity import LABLIB_VERSION, described_network, json_digest, run_identity, run_name
from lablib.runs import Key, Run, TrainedModel, attempt, described_error, find_run, progress
from lablib.statistics import compare, compare_effects, readable_table, results_table, save_table, verdicts


@dataclass
class Experiment:
    """The runs that one table or figure compares, by model name and seed; and the failures, with their errors."""

    data: ImageData
    config: TrainingConfig | None  # None if experiments with different ones were joined
    models: dict[str, Callable[[], nn.Module]]
    seeds: tuple[int, ...]
    callbacks: tuple | None = ()  # None as for config
    runs: dict[Key, Run] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        models, seeds = ", ".join(self.models), ", ".join(map(str, self.seeds))
        return f"Experiment({self.data.name!r}, models: {models}; seeds: {seeds}; runs: {len(self.runs)})"

    def _repr_html_(self) -> str:  # what a notebook shows
        return self.table().to_html()

    def select(self, *models: str) -> "Experiment":
        """The same experiment with some of its models only. Raises KeyError for a model that it does not have."""
        if unknown := [name for name in models if name not in self.models]:
            raise KeyError(f"there is no model {unknown[0]!r} in this experiment; there are {[*self.models]}")
        runs, failures = ({k: v for k, v in part.items() if k[0] in models} for part in (self.runs, self.failures))
        return replace(self, models={name: self.models[name] for name in models}, runs=runs, failures=failures)

    def __or__(self, other: "Experiment") -> "Experiment":
        """Both experiments' models and runs as one; the seeds are those of either.

        Raises ValueError for two data sets, and for a model of both unless they have one of its runs in common.
        """
        if len({run.identity["data"][1] for run in (*self.runs.values(), *other.runs.values())}) > 1:
            names = f"{self.data.name} and {other.data.name}"
            raise ValueError(f"experiments on {names} have different data, or data changed in place")
        for name in self.models.keys() & other.models.keys():
            mine, theirs = ({run.path.name for key, run in e.runs.items() if key[0] == name} for e in (self, other))
            if mine and theirs and not mine & theirs:
                advice = "use another name, or the same settings and seeds in both (in a notebook, run all cells)"
                raise ValueError(f"the experiments trained {name!r} differently, or with other seeds; {advice}")
        same = self.config and other.config and self.config.__identity__() == other.config.__identity__()
        config = self.config if same else None
        callbacks = self.callbacks if self.callbacks == other.callbacks else None
        models, runs = self.models | other.models, self.runs | other.runs
        failures = {key: error for key, error in (self.failures | other.failures).items() if key not in runs}
        seeds = tuple(sorted({*self.seeds, *other.seeds}))
        return Experiment(self.data, config, models, seeds, callbacks, runs, failures)

    def values(self, model: str, key: str = "test_accuracy") -> dict[int, float]:
        """One of a model's results, such as its test accuracy, by seed."""
        return {seed: run.result[key] for (_, seed), run in sorted(self.select(model).runs.items())}

    def frame(self) -> pd.DataFrame:
        """One row per run, failed ones included: model, seed, dataset, parameters, accuracies, epochs and so on.

        If class sizes differ by more than a factor of `data.UNBALANCED`, a column `balanced_accuracy` gives the mean
        test accuracy over classes.
        """
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
        """Every run's metrics by epoch: model, seed, epoch, train_loss, val_loss, ..."""
        return self._of_each_run(lambda run: pd.DataFrame(run.history))

    def gradients(self) -> pd.DataFrame:
        """Every run's gradient by layer: model, seed, layer, when ("initial" or "trained"), rms."""

        def gradients(run: Run) -> pd.DataFrame:
            measured = run.measured()
            table = pd.DataFrame({m: measured.get(f"gradient_{m}", []) for m in ("initial", "trained")})
            return table.assign(layer=table.index + 1).melt("layer", var_name="when", value_name="rms")

        return self._of_each_run(gradients)

    def predictions(self) -> pd.DataFrame:
        """Every run's answers to the test images: model, seed, image, label, predicted, confidence, correct.

        `image` is the image's number; `datasets.list_images` gives the paths of those in a folder's `test/`.
        """
        true = self.data.test_labels.numpy()

        def predictions(run: Run) -> pd.DataFrame:
            measured = run.measured()
            predicted, confidence = measured["test_class"], measured["test_confidence"].astype(float)
            answers = {"predicted": predicted, "confidence": confidence, "correct": predicted == true}
            return pd.DataFrame({"image": range(len(true)), "label": true, **answers})

        return self._of_each_run(predictions)

    def _of_each_run(self, table_of: Callable[[Run], pd.DataFrame]) -> pd.DataFrame:
        """The tables of all runs in one, with the columns model and seed."""
        keys = [key for key in product(self.models, self.seeds) if key in self.runs]
        tables = {key: table for key in keys if len(table := table_of(self.runs[key]))}
        return pd.concat(tables, names=["model", "seed"]).droplevel(-1).reset_index()

    def table(self, reference: Mapping[str, float] | None = None, save_to: str | Path | None = None) -> pd.DataFrame:
        """One row per network, as text; `reference` has published accuracies (fractions), `save_to` is a CSV file."""
        table = results_table(self.frame(), reference)
        return readable_table(save_table(table, save_to) if save_to else table)

    def compare(
        self, first: str | Mapping[str, tuple[str, str]], second: str | None = None, by: Sequence[int] | None = None
    ) -> "Comparison":
        """Paired differences in test accuracy over the seeds: the first model minus the second.

        Two models, or several pairs by name: {"the shortcut": ("ResidualCNN", "NoShortcut")}. With `by`, the depths,
        they are families ("ResidualCNN-2"). The p-values are corrected over the depths of a pair; without `by`, over
        all pairs. A pair of a model with itself is left out. Raises KeyError for an unknown model.
        """
        pairs = first if isinstance(first, Mapping) else {"": (first, second)}
        if by is not None:
            pairs = {
                f"{label}, depth {depth}" if label else f"depth {depth}": (f"{one}-{depth}", f"{other}-{depth}")
                for (label, (one, other)), depth in product(pairs.items(), by)
            }
        pairs = {label or f"{one} − {other}": (one, other) for label, (one, other) in pairs.items() if one != other}
        table = compare(self.select(*chain(*pairs.values())).frame(), pairs)
        return Comparison(table, self.data.name)

    def distil(
        self,
        student: str,
        teacher: str,
        temperature: float | Sequence[float],
        alpha: float | Sequence[float],
        *,
        name: str = "Distilled",
        config: TrainingConfig | None = None,
        seeds: int | Iterable[int] | None = None,
        jobs: int = 1,
    ) -> "Experiment":
        """Train one of the networks as a student: each seed's run learns from the `teacher`'s run with that seed.

        With a list of temperatures or alphas there is a student for each pair, named "T = 4, α = 0.7"; else it has the
        `name`. Callbacks, config and seeds are those of this experiment unless others are given. A seed whose teacher
        failed is left out. Raises as `experiment` does, and KeyError for an unknown network or if there is no teacher.
        """
        from lablib.distillation import KnowledgeDistillationTrainer  # with transformers, which takes seconds

        config, seeds = config or self.config, self.seeds if seeds is None else _seeds(seeds)
        if config is None or self.callbacks is None:
            what = "the joined experiments have different configs or callbacks"
            raise ValueError(f"{what}; call distil on one of them, or pass config= if only that differs")
        seeds = [seed for seed in seeds if (teacher, seed) not in self.failures] or seeds  # all: `_trained` says why
        teachers = {seed: self._trained(teacher, seed) for seed in seeds}
        if trained := [seed for seed in seeds if (student, seed) in self.runs]:
            trainer = self._trained(student, trained[0]).run.identity["trainer"]  # refuses a builder that has changed
            if not json.dumps(trainer).startswith(('"lablib.', '{"partial": "lablib.')):
                why = "has a trainer of its own, but distil uses KnowledgeDistillationTrainer"
                raise ValueError(f"{student!r} {why}; derive yours from it and pass it to experiment")
        several = np.ndim(temperature) or np.ndim(alpha)
        pairs = product(np.ravel(temperature).tolist(), np.ravel(alpha).tolist())
        students = {f"T = {t:g}, α = {a:g}" if several else name: {"temperature": t, "alpha": a} for t, a in pairs}
        trainers = {
            (label, seed): partial(KnowledgeDistillationTrainer, teacher=teachers[seed], **knobs)
            for (label, knobs), seed in product(students.items(), seeds)
        }
        models = dict.fromkeys(students, self.select(student).models[student])
        more = {"jobs": jobs, "trainer_class": trainers, "callbacks": self.callbacks}
        return experiment(models, config, self.data, seeds, **more)

    def trained_model(self, model: str, seed: int | None = None) -> nn.Module:
        """A model with the best epoch's weights of one of its runs (of the first seed by default), in eval mode.

        Raises KeyError if there is no such run, and ValueError if it was published without its weights or the function
        that builds it has changed.
        """
        return self._trained(model, self.seeds[0] if seed is None else seed).load()

    def _trained(self, model: str, seed: int) -> TrainedModel:
        key = (model, seed)
        if key not in self.runs:
            raise KeyError(f"no finished run {key}: {self.failures.get(key) or f'there are {sorted(self.runs)}'}")
        run, build = self.runs[key], self.models[model]
        if json_digest(described_network(build, seed)[1]) != json_digest(run.identity["model"]):
            advice = "a lambda sees the latest values of its variables; use functools.partial(Network, width)"
            raise ValueError(f"{model!r} now stands for a different network from the one trained ({advice})")
        return TrainedModel(run, build)


@dataclass(frozen=True)
class Comparison:
    """Paired differences between networks, as `statistics.compare` gives them."""

    table: pd.DataFrame
    dataset: str

    def plot(self, title: str, *paths: str | Path) -> Figure:
        """A dot for each seed, the means, and intervals from three seeds on; written to the paths too."""
        return figures.save(figures.paired_differences(self.table, self.dataset, title), *paths)

    def verdicts(self) -> "Sentences":
        """One sentence per comparison, which claims no more than its interval supports."""
        return Sentences(verdicts(self.table))

    __repr__ = _repr_markdown_ = verdicts

    def __or__(self, other: "Comparison") -> "Comparison":
        """Both comparisons, on the same data set, in one table; p-values stay as they are, corrected within each."""
        return replace(self, table=pd.concat([self.table, self._table_of(other)], ignore_index=True))

    def __sub__(self, other: "Comparison") -> "Comparison":
        """How far the differences with the same labels differ, seed by seed, say between two recipes."""
        return replace(self, table=compare_effects(self.table, self._table_of(other)))

    def _table_of(self, other: "Comparison") -> pd.DataFrame:
        if other.dataset != self.dataset:
            raise ValueError(f"comparisons on {self.dataset} and {other.dataset} must be on the same data set")
        return other.table


class Sentences(str):
    """Markdown that a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


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
    """Train each model with each seed, or load the runs that are finished: here, or published with the lab.

    `models` maps each name to a function without arguments that builds the network. `seeds=3` means 0, 1 and 2.
    joblib trains `jobs` runs side by side, each with its share of the threads (-1: one run per core);
    `joblib.parallel_config("dask")` sends them to a cluster, whose workers need `output_dir` at the same path.
    `trainer_class` replaces StreamlinedTrainer: a class, or a `functools.partial` with what else the class needs, such
    as a teacher; or a dict of these by (model, seed). Each run gets its own copies of the `callbacks`.
    With `weights`, a published run does not count, as it has no weights: it is trained here.

    A run that fails is reported by a warning and in the experiment's `failures`; the others continue. Raises
    RuntimeError if all fail, and TypeError or ValueError for arguments that cannot be used. Telegram gets one message
    at the end; none if all runs are loaded.
    """
    _check_arguments(models, config, data)
    result = Experiment(data, config, dict(models), _seeds(seeds), tuple(callbacks))
    keys = [*product(result.models, result.seeds)]
    trainers = trainer_class if isinstance(trainer_class, Mapping) else dict.fromkeys(keys, trainer_class)
    if not keys:
        raise ValueError("an experiment needs a model and a seed; seeds=2 stands for the seeds 0 and 1")
    if lacking := {*keys} - trainers.keys():
        raise ValueError(f"trainer_class has no trainer for {sorted(lacking)[0]}")
    # for the runs: the experiment speaks for them, the token stays in this process, workers may be in another folder
    silent = {"use_telegram_notifications": False, "telegram_bot_token": None}
    run_config = replace(config, **silent, output_dir=os.path.abspath(config.output_dir))
    missing = _load_finished(result, run_config, trainers, weights)
    paths = {key: Path(run_config.output_dir, run_name(identity)) for key, identity in missing.items()}
    _refuse_twins({key: run.path for key, run in result.runs.items()} | paths)
    wandb_mode = ""
    if missing and config.use_wandb:  # asked once, for all runs
        from lablib.tracking import mode_here  # with transformers

        run_config = replace(run_config, use_wandb=bool(wandb_mode := mode_here()))
    _announce(result, paths, len(keys))
    telling = nullcontext()
    if config.use_telegram_notifications and (missing or result.failures):
        from lablib.telegram import ExperimentMessages  # with transformers

        telling = ExperimentMessages(result)
    with telling:
        if missing:
            shared = {"callbacks": result.callbacks, "weights": weights}
            shared |= {"wandb_mode": wandb_mode, "parent": os.getpid()}
            tasks = []
            for (name, seed), identity in missing.items():
                # the precision as resolved here: another machine has to follow
                seeded = replace(run_config, seed=seed, precision=identity["config"]["precision"])
                own = {"trainer_class": trainers[name, seed], "identity": identity}
                tasks.append(joblib.delayed(attempt)((name, seed), result.models[name], seeded, data, **own, **shared))
            _train_all(result, tasks, paths, jobs)
            result.runs = {key: result.runs[key] for key in keys if key in result.runs}
    if result.failures and not result.runs:
        what = "the run" if len(keys) == 1 else f"all {len(keys)} runs"
        raise RuntimeError(f"{what} failed: {'; '.join(dict.fromkeys(result.failures.values()))}")
    return result


def _check_arguments(models: Mapping, config: TrainingConfig, data: ImageData):
    """Raise TypeError or ValueError for likely mistakes that would show late, or not at all."""
    for value, kind in ((models, Mapping), (config, TrainingConfig), (data, ImageData)):
        if not isinstance(value, kind):
            needed = "a dict of functions that build networks, a TrainingConfig, and what load_data returns"
            raise TypeError(f"an experiment needs {needed}, not {value!r}: experiment({{'mine': Mine}}, config, data)")
    if config.seed:
        raise ValueError(f"the config has seed = {config.seed}; write seeds = [{config.seed}] instead")
    if num_processes() > 1:
        raise ValueError("under torchrun, use train_or_load: an experiment trains each run in one process")
    if built := [name for name, build in models.items() if isinstance(build, nn.Module) or not callable(build)]:
        raise TypeError(f"models: {built[0]!r} needs a function that builds the network, such as lambda: Net()")


def _load_finished(result: Experiment, config: TrainingConfig, trainers: Mapping, weights: bool) -> dict[Key, dict]:
    """Add the finished runs to an experiment, and return the identities of those that are to be trained."""
    missing = {}
    for name, seed in product(result.models, result.seeds):
        seeded, trainer = replace(config, seed=seed), trainers[name, seed]
        try:
            identity = run_identity(result.models[name], seeded, result.data, trainer, result.callbacks)
            if run := find_run(run_name(identity), config.output_dir, weights):
                result.runs[name, seed] = run
            else:
                missing[name, seed] = identity
        except Exception as error:
            _note_failure(result, (name, seed), *described_error(error))
    return missing


def _refuse_twins(paths: dict[Key, Path]):
    """Raise ValueError if two names stand for one run, which would look like two independent results."""
    first = {}
    for key, path in paths.items():
        if (twin := first.setdefault(path.name, key)) != key:
            advice = "a lambda in a loop sees the last value only; write functools.partial(Network, width) there"
            raise ValueError(f"the models {twin[0]!r} and {key[0]!r} are the same network, trained alike ({advice})")


def _announce(result: Experiment, paths: dict[Key, Path], number: int):
    """Say how many of the runs are loaded, from where, and how many are to be trained."""
    result.data.warn_if_unbalanced()
    config, images = result.config, len(result.data.train_labels)
    images = min(images - round(config.validation_split * images), config.max_train_images or images)
    if paths and config.batch_size > images:
        advice = "an epoch is a single step; try batch_size = 16 and more epochs"
        print(f"batch_size = {config.batch_size} for {images} training images: {advice}")
    checked = round(config.validation_split * len(result.data.train_labels))
    if paths and checked < 100 and config.early_stopping_patience:
        print(f"only {checked} validation images decide when to stop: early_stopping_patience = None may work better")
    places = {str(run.path.parent).removeprefix(f"{Path.cwd()}{os.sep}") for run in result.runs.values()}
    where = f" from {' and '.join(sorted(places))}" if places else ""
    own = [run.result["versions"].get("lablib") for run in result.runs.values() if run.has_weights]  # not published
    if others := len(own) - own.count(LABLIB_VERSION):
        print(f"loaded runs made by another version of lablib: {others} (delete them to train them again)")
    begun = sum(any(path.glob("checkpoints/checkpoint-*")) for path in paths.values())
    resumed = f", {begun} of them to resume" if begun else ""
    print(f"{len(result.runs)} of {number} runs loaded{where}, {len(paths)} to train{resumed}", flush=True)


def _seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    """3 means 0, 1 and 2; a seed that is there twice counts once."""
    return tuple(dict.fromkeys(map(index, seeds if isinstance(seeds, Iterable) else range(seeds))))


def _note_failure(result: Experiment, key: Key, line: str, frames: list[traceback.FrameSummary], message: str):
    """Warn of a failed run, with the lines that led to the error unless another run has failed in the same way."""
    trace = redacted("".join([*traceback.format_list(frames), message])).rstrip()
    what = f" too: {line}" if line in result.failures.values() else f":\n{trace}"
    result.failures[key] = line
    warn(f"the run of {key[0]!r} with seed {key[1]} failed{what}")


def _train_all(result: Experiment, tasks: list[tuple], paths: dict[Key, Path], jobs: int):
    jobs = min(joblib.effective_n_jobs(jobs), jobs if jobs > 0 else len(tasks), len(tasks))  # dask ignores jobs
    backend, _ = joblib.parallel.get_active_backend()
    interruption = Interruption([signal.SIGINT] if jobs > 1 else [])  # workers get Ctrl-C too: await their checkpoints
    ended = set()
    return_as = "generator_unordered" if backend.supports_return_generator else "list"  # Ray's has no generator
    # mmap_mode "c": the workers share the images' memory, and may write to their own copy
    parallel = joblib.Parallel(n_jobs=jobs, return_as=return_as, mmap_mode="c", pre_dispatch=jobs)
    with progress(paths, result.config.num_epochs, ended), interruption:
        try:
            for key, run, error in parallel(task for task in tasks if not interruption.asked):
                if run:
                    result.runs[key] = run
                    ended.add(key)
                elif error:
                    _note_failure(result, key, *error)
                else:
                    interruption.ask()
        except Exception:  # a worker died
            if not interruption.asked:
                raise
