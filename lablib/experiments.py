"""An experiment: some models × some seeds -> their runs, trained side by side where there are cores for it."""

import copy
import json
import numbers
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

from lablib import figures
from lablib.checkpoints import Interruption, leave_with
from lablib.config import TrainingConfig, is_first_process, num_processes, redacted
from lablib.data import ImageData
from lablib.identity import build_seeded, run_identity, run_name
from lablib.runs import Run, TrainedModel, find_run, separate_callbacks, train_or_load
from lablib.statistics import compare, compare_effects, readable_table, results_table, save_table, verdicts

TrainerClass = type | partial | None  # a StreamlinedTrainer; None is that itself

_TRACE_LINES = 10
_one_training = threading.Lock()  # of a process: PyTorch's random numbers are the process's, not a thread's


@dataclass
class Experiment:
    """The runs that one table or figure compares, by model name and seed; and the failures, with their errors."""

    data: ImageData
    config: TrainingConfig
    models: dict[str, Callable[[], nn.Module]]
    seeds: tuple[int, ...]
    runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    failures: dict[tuple[str, int], str] = field(default_factory=dict)

    def values(self, model: str, key: str = "test_accuracy") -> dict[int, float]:
        """One figure of a model's results, by seed."""
        return {seed: run.result[key] for (name, seed), run in sorted(self.runs.items()) if name == model}

    def select(self, *models: str) -> "Experiment":
        """The same experiment with some of its models only. Raises KeyError for a model that it does not have."""
        return replace(
            self,
            models={name: self.models[name] for name in models},
            runs={key: run for key, run in self.runs.items() if key[0] in models},
            failures={key: error for key, error in self.failures.items() if key[0] in models},
        )

    def measured(self, model: str, key: str) -> dict[int, np.ndarray]:
        """What was measured with a model's weights, by seed; the keys are those of `Run.measured`."""
        return {seed: run.measured()[key] for (name, seed), run in sorted(self.runs.items()) if name == model}

    def frame(self) -> pd.DataFrame:
        """One row a run, failed ones included: model, seed, dataset, parameters, accuracies, epochs and so on."""
        columns = ["parameters", "val_accuracy", "test_accuracy", "best_epoch", "epochs", "seconds", "precision"]
        rows = []
        for model, seed in product(self.models, self.seeds):
            if run := self.runs.get((model, seed)):
                rows.append({"model": model, "seed": seed} | {name: run.result[name] for name in columns})
            elif error := self.failures.get((model, seed)):
                rows.append({"model": model, "seed": seed, "error": error})
        table = pd.DataFrame(rows, columns=["model", "seed", *columns, *(["error"] if self.failures else [])])
        return table.assign(dataset=self.data.name)

    def table(self, reference: Mapping[str, float] | None = None, save_to: str | Path | None = None) -> pd.DataFrame:
        """One row a network, for people; `reference` has other figures (fractions), `save_to` a CSV."""
        table = results_table(self.frame(), reference)
        return readable_table(save_table(table, save_to) if save_to else table)

    def compare(
        self,
        first: str | Mapping[str, tuple[str, str]],
        second: str | None = None,
        by: Sequence[int] | None = None,
        metric: str = "test_accuracy",
    ) -> "Comparison":
        """Paired differences over the seeds: the first model minus the second.

        Two models or two families, or several pairs by name: {"the shortcut": ("ResidualCNN", "NoShortcut")}. `by` are
        the depths at which families are compared ("ResidualCNN-2"). All pairs share one correction of the p-values; a
        pair of a model with itself is left out.
        """
        questions = first if isinstance(first, Mapping) else {"": (first, second)}
        pairs = {}
        for question, (one, other) in questions.items():
            if one == other:
                continue
            if by is None or one in self.models:
                pairs[question or f"{one} − {other}"] = (one, other)
                continue
            for depth in by:
                pairs[f"{question}, depth {depth}" if question else f"depth {depth}"] = (
                    f"{one}-{depth}",
                    f"{other}-{depth}",
                )
        return Comparison(compare(self.frame(), pairs, metric), self.data.name)

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

        With several temperatures or alphas there is a student for each pair, named "T = 4, α = 0.7"; else it has the
        `name`. Config and seeds are those of this experiment unless others are given. A student whose teacher failed
        has failed too. Raises as `experiment` does, and KeyError if there is no teacher at all.
        """
        from lablib.distillation import KnowledgeDistillationTrainer  # with transformers, which takes seconds

        several = isinstance(temperature, Sequence) or isinstance(alpha, Sequence)
        cells = list(product(*(x if isinstance(x, Sequence) else [x] for x in (temperature, alpha))))
        names = {f"T = {t:g}, α = {a:g}" if several else name: (t, a) for t, a in cells}
        seeds = self.seeds if seeds is None else _checked_seeds(seeds)
        failed = {seed: self.failures[teacher, seed] for seed in seeds if (teacher, seed) in self.failures}
        trained = [seed for seed in seeds if seed not in failed] or seeds
        trainers = {
            (cell, seed): partial(
                KnowledgeDistillationTrainer, teacher=self.teacher(teacher, seed), temperature=t, alpha=a
            )
            for (cell, (t, a)), seed in product(names.items(), trained)
        }
        students = dict.fromkeys(names, self.models[student])
        result = experiment(students, config or self.config, self.data, trained, jobs=jobs, trainer_class=trainers)
        why = {seed: f"its teacher failed: {error}" for seed, error in failed.items()}
        failures = {(cell, seed): why[seed] for cell, seed in product(names, failed)}
        return replace(result, seeds=tuple(seeds), failures=result.failures | failures)

    def histories(self) -> pd.DataFrame:
        """Every run's metrics by epoch: model, seed, epoch, train_loss, val_loss, ..."""
        rows = [
            {"model": name, "seed": seed, **row}
            for name in self.models
            for seed in self.seeds
            if (name, seed) in self.runs
            for row in self.runs[name, seed].history
        ]
        return pd.DataFrame(rows)

    def gradients(self) -> pd.DataFrame:
        """Every run's gradient by layer: model, seed, moment ("initial" or "trained"), layer, name, rms."""
        tables = []
        for (model, seed), run in self.runs.items():
            measured = run.measured()
            for moment in ("initial", "trained") if "gradient_layers" in measured else ():
                layers = {"name": measured["gradient_layers"], "rms": measured[f"gradient_{moment}"]}
                table = pd.DataFrame(layers).assign(model=model, seed=seed, moment=moment)
                tables.append(table.assign(layer=range(1, len(table) + 1)))
        columns = ["model", "seed", "moment", "layer", "name", "rms"]
        return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)

    def predictions(self) -> pd.DataFrame:
        """Every run's answers to the test images: model, seed, image, predicted (class), confidence, correct."""
        tables = []
        for model, seed in product(self.models, self.seeds):
            if run := self.runs.get((model, seed)):
                measured = run.measured()
                columns = {"predicted": measured["test_class"], "confidence": measured["test_confidence"].astype(float)}
                table = pd.DataFrame(columns).assign(model=model, seed=seed, image=range(len(self.data.test_labels)))
                tables.append(table.assign(correct=table["predicted"] == self.data.test_labels.numpy()))
        columns = ["model", "seed", "image", "predicted", "confidence", "correct"]
        return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)

    def trained_model(self, model: str, seed: int | None = None) -> nn.Module:
        """A model with the best epoch's weights of one of its runs (of the first seed by default), in eval mode.

        Raises KeyError if there is no such run, and ValueError if it was published without its weights.
        """
        return self.teacher(model, self.seeds[0] if seed is None else seed).load()

    def teacher(self, model: str, seed: int) -> TrainedModel:
        """The trained model of a run, to teach others: known by its run, loaded when a student is trained."""
        if (model, seed) not in self.runs:
            why = self.failures.get((model, seed)) or f"there are those of {sorted(self.runs)}"
            raise KeyError(f"no finished run of {model!r} with seed {seed}: {why}")
        return TrainedModel(self.runs[model, seed], self.models[model])

    def __or__(self, other: "Experiment") -> "Experiment":
        """Both experiments' models and runs as one; the seeds are those of either.

        Raises ValueError for two data sets, and for runs of one name and seed that are not the same run.
        """
        if other.data.fingerprint != self.data.fingerprint:
            raise ValueError(
                f"experiments on {self.data.name} and {other.data.name} cannot be joined; "
                "both must be on the same images and labels"
            )
        both = sorted(self.models.keys() & other.models.keys())
        if both and {**self.config.identity(), "seed": 0} != {**other.config.identity(), "seed": 0}:
            raise ValueError(f"the experiments have {', '.join(both)} under two configs; give one of them another name")
        return Experiment(
            self.data,
            self.config,
            self.models | other.models,
            tuple(sorted({*self.seeds, *other.seeds})),
            self.runs | other.runs,
            self.failures | other.failures,
        )


@dataclass(frozen=True)
class Comparison:
    """Paired differences between networks, as `statistics.compare` gives them, and the data set that they are from."""

    table: pd.DataFrame
    dataset: str

    def plot(self, title: str, *paths: str | Path) -> Figure:
        """A dot for each seed, the means, and intervals from three seeds on; written to the paths too."""
        return figures.save(figures.paired_differences(self.table, self.dataset, title), *paths)

    def verdicts(self) -> "Sentences":
        """One sentence a comparison, which says no more than its interval does."""
        return Sentences(verdicts(self.table))

    def __or__(self, other: "Comparison") -> "Comparison":
        """Both comparisons in one table; p-values stay as they are, corrected within each."""
        return Comparison(pd.concat([self.table, other.table], ignore_index=True), self.dataset)

    def __sub__(self, other: "Comparison") -> "Comparison":
        """How far the differences of the same labels differ, seed by seed."""
        return Comparison(compare_effects(self.table, other.table), self.dataset)


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
    trainer_class: TrainerClass | Mapping[int, TrainerClass] | Mapping[tuple[str, int], TrainerClass] = None,
    callbacks: Sequence = (),
    weights: bool = False,
) -> Experiment:
    """Train each model with each seed, or load the runs that are finished: here, or published with the lab.

    `models` gives for each name a function without arguments that builds the network. `seeds=3` means 0, 1 and 2.
    `jobs` runs go side by side through joblib, each with its share of the threads; `joblib.parallel_config("dask")`
    sends them to a cluster, whose workers need `output_dir` at the same path. `trainer_class` is another trainer than
    StreamlinedTrainer: its class, or a `functools.partial` with what else it needs, such as a teacher; or one by seed,
    or by (model, seed). Each run gets its own copies of the `callbacks`. With `weights` a published run, which has
    none, is trained all the same.

    A run that fails is reported by a warning and in the experiment's `failures`; the others continue. Raises
    RuntimeError if all fail, and TypeError or ValueError for arguments that cannot be used. Telegram gets one message
    at the end, with the config's `telegram_every_run` one for each run too; none if all runs are loaded.
    """
    models, seeds = dict(models), _checked_seeds(seeds)
    if not isinstance(data, ImageData):
        raise TypeError(f"data = {data!r}, but it must be an ImageData, as load_data({str(data)!r}) gives")
    if not isinstance(config, TrainingConfig):
        raise TypeError(f"config = {config!r}, but it must be a TrainingConfig")
    if not models or not seeds:
        raise ValueError(f"an experiment needs a model and a seed; it has {len(models)} models and {len(seeds)} seeds")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0:
        raise ValueError(f"jobs = {jobs!r}, but it must be a whole number: runs side by side, or -1 for one a core")
    if jobs != 1 and num_processes() > 1:
        raise ValueError(f"jobs = {jobs}, but {num_processes()} processes train each run together: write jobs=1")
    trainers = _by_run(trainer_class, [(name, seed) for name in models for seed in seeds])
    result, failures = Experiment(data, config, models, seeds), _Failures()
    with _messages(result) as messages:
        pending = {}
        for key, trainer in trainers.items():
            try:
                trainer, mine = separate_callbacks(trainer, callbacks)
                described = run_identity(models[key[0]], replace(config, seed=key[1]), data, trainer, mine)
                run = find_run(run_name(described), config.output_dir, weights) if num_processes() == 1 else None
            except Exception as error:
                failures.report(result, key, *_described(error))
                continue
            if run:
                result.runs[key] = run
            else:
                pending[key] = (described, trainer, mine)
        if pending:
            _train_pending(result, pending, jobs, weights, messages, failures)
            result.runs = {key: result.runs[key] for key in trainers if key in result.runs}
    failures.summarise()
    if result.failures and not result.runs:
        line, number = Counter(result.failures.values()).most_common(1)[0]
        raise RuntimeError(f"all {len(result.failures)} runs failed, {number} of them with {line}")
    return result


def _checked_seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    seeds = range(seeds) if isinstance(seeds, numbers.Integral) and not isinstance(seeds, bool) else seeds
    if isinstance(seeds, (bool, str)) or not isinstance(seeds, Iterable):
        raise TypeError(f"seeds = {seeds!r}, but it must be a number of seeds, or some whole numbers such as [0, 1, 2]")
    return tuple(dict.fromkeys(int(seed) if isinstance(seed, numbers.Integral) else seed for seed in seeds))


def _messages(result: Experiment):
    """What tells a chat of an experiment, or None; it is imported only where it is switched on."""
    if not result.config.use_telegram_notifications or not is_first_process():
        return nullcontext()
    from lablib.telegram import ExperimentMessages

    return ExperimentMessages(result)


def _by_run(trainer_class: TrainerClass | Mapping, runs: list[tuple[str, int]]) -> dict[tuple[str, int], TrainerClass]:
    """The trainer of each run (model, seed), in the order of the runs."""
    if not isinstance(trainer_class, Mapping):
        return dict.fromkeys(runs, trainer_class)
    trainers = {run: trainer_class.get(run, trainer_class.get(run[1])) for run in runs}
    if missing := [run for run, trainer in trainers.items() if trainer is None]:
        raise ValueError(f"trainer_class has no trainer for {missing}; it has some for {list(trainer_class)}")
    return trainers


def _train_pending(result: Experiment, pending: dict, jobs: int, weights: bool, messages, failures: "_Failures"):
    paths = {key: Path(result.config.output_dir) / run_name(described) for key, (described, *_) in pending.items()}
    if messages:
        messages.begin(paths)
    # the experiment speaks for its runs, and the token stays in this process
    config = replace(result.config, use_telegram_notifications=False, telegram_bot_token=None)
    jobs = min(joblib.effective_n_jobs(jobs), jobs if jobs > 0 else len(pending), len(pending))
    threads = max(1, joblib.cpu_count() // jobs) if jobs > 1 and _is_local() else None
    interruption = Interruption([signal.SIGINT])  # which workers get too: they are waited for, to write a checkpoint
    tasks = (
        joblib.delayed(_train_one)(
            key, result.models[key[0]], replace(config, seed=key[1]), result.data, *task, weights, threads, os.getpid()
        )
        for key, task in pending.items()
        if not interruption.asked
    )
    backend, _ = joblib.parallel.get_active_backend()
    return_as = "generator_unordered" if backend.supports_return_generator else "list"
    # mmap_mode "c": the workers share the images' memory, and may write to their own copy
    parallel = joblib.Parallel(n_jobs=jobs, return_as=return_as, mmap_mode="c", pre_dispatch=jobs)
    print(f"{_counted(len(result.runs), 'run')} loaded, {len(pending)} to train", flush=True)
    with _Progress(paths, result.config.num_epochs) as progress, interruption:
        try:
            for key, run, error in parallel(tasks):
                if run is not None:
                    result.runs[key] = run
                elif error is None:
                    interruption.ask()
                    continue
                else:
                    failures.report(result, key, *error)
                progress.finished(key)
                if messages:
                    messages.run_ended(key)
        except Exception as error:  # a worker died, and joblib gives up the rest; what is finished is in the store
            for key in () if interruption.asked else pending.keys() - result.failures.keys():
                if run := find_run(paths[key].name, config.output_dir):
                    result.runs[key] = run
                else:
                    failures.report(result, key, *_described(error))
                if messages:
                    messages.run_ended(key)


class _Progress:
    """A context manager: one bar over all epochs of all runs, with the time left and the latest figures.

    It watches the history files of the store, so it works for runs in other processes and on other machines too.
    """

    def __init__(self, paths: Mapping[tuple[str, int], Path], num_epochs: int):
        self._paths, self._num_epochs, self._began = paths, num_epochs, time.time()
        self._done: set[tuple[str, int]] = set()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        terminal = sys.stderr.isatty()
        look = {"dynamic_ncols": True, "mininterval": 0.1} if terminal else {"ncols": 110, "mininterval": 10}
        look |= {"file": sys.stderr if terminal else sys.stdout, "disable": not is_first_process()}
        self.bar = tqdm(
            total=num_epochs * len(paths), desc=_counted(len(paths), "run"), unit="epoch", miniters=0, **look
        )

    def __enter__(self):
        self._watcher.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._watcher.join()
        self.bar.set_postfix_str("")
        self.bar.close()

    def finished(self, key: tuple[str, int]):
        """Count a run as finished, also where it stopped early."""
        self._done.add(key)
        self._show({})

    def _watch(self):
        while not self._stop.wait(0.5):
            self._show({key: rows for key in self._paths.keys() - self._done if (rows := self._history(key))})

    def _show(self, running: Mapping[tuple[str, int], list[str]]):
        epochs = self._num_epochs * len(self._done) + sum(len(rows) for rows in running.values())
        if running:
            (name, seed), rows = max(running.items(), key=lambda item: len(item[1]))
            last = json.loads(rows[-1])
            figures = f"loss {last['train_loss']:.3f}, validation {100 * last['val_accuracy']:.1f} %"
            self.bar.set_postfix_str(f"{name}, seed {seed}: {figures}", refresh=False)
        self.bar.update(max(0, epochs - self.bar.n))

    def _history(self, key: tuple[str, int]) -> list[str]:
        """The epochs of a run so far; none if it has not begun in this session."""
        with suppress(OSError):
            file = self._paths[key] / "history.jsonl"
            return file.read_text().splitlines() if file.stat().st_mtime >= self._began else []
        return []


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _is_local() -> bool:
    """Whether joblib's runs are on this machine, so that its cores are what they share."""
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__module__ == "joblib._parallel_backends"


def _described(error: Exception) -> tuple[str, str]:
    """An error in one line, and the end of its traceback; both are printed and sent, so without tokens."""
    first_line = redacted(next(iter(str(error).splitlines()), ""))
    trace = redacted("".join(traceback.format_exception(error))).rstrip().splitlines()
    return f"{type(error).__name__}: {first_line}", "\n".join(trace[-_TRACE_LINES:])


class _Failures:
    """Reports each error once, and how many runs had it."""

    def __init__(self):
        self._first: dict[str, tuple[str, int]] = {}  # error -> run
        self._others: Counter[str] = Counter()

    def report(self, result: Experiment, key: tuple[str, int], line: str, trace: str):
        result.failures[key] = line
        if line in self._first:
            self._others[line] += 1
        else:
            self._first[line] = key
            warnings.warn(f"the run of {key[0]!r} with seed {key[1]} failed:\n{trace}", stacklevel=4)

    def summarise(self):
        for line, number in self._others.items():
            name, seed = self._first[line]
            warnings.warn(f"{name!r} with seed {seed} and {number} more failed with {line}", stacklevel=3)


def _train_one(key, build_model, config, data, described, trainer_class, callbacks, weights, threads, parent: int):
    """A run's key, the run, and its error; neither if it was interrupted in a worker process."""
    leave_with(parent)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    more = {"trainer_class": trainer_class, "callbacks": copy.deepcopy(callbacks), "weights": weights}
    try:
        with _one_training:
            return key, train_or_load(build_model, config, data, **more, identity=described), None
    except Exception as error:
        return key, None, _described(error)
    except KeyboardInterrupt:
        if os.getpid() == parent:
            raise
        return key, None, None
    finally:
        torch.set_num_threads(before)


def initial_model(experiment: Experiment, model: str, seed: int) -> nn.Module:
    """A model as its run began: with the initial weights of the seed, in eval mode."""
    return build_seeded(experiment.models[model], seed).eval()
