"""An experiment: some models × some seeds -> their runs, trained side by side where there are cores for it."""

import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import joblib
import pandas as pd
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData
from lablib.interruption import Interruption, leave_with
from lablib.processes import is_first_process, num_processes
from lablib.progress import RunProgress
from lablib.record import Record, RecordedRun
from lablib.runs import Run, build_seeded, load_or_set_aside, run_identity, run_name
from lablib.secret import redacted

TrainerClass = type | partial | None  # a StreamlinedTrainer; None is that itself

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

    def histories(self) -> pd.DataFrame:
        """Every run's metrics by epoch: model, seed, epoch, train_loss, val_loss, ...; those of a record have none."""
        rows = [
            {"model": name, "seed": seed, **row}
            for name in self.models
            for seed in self.seeds
            if (name, seed) in self.runs
            for row in self.runs[name, seed].history
        ]
        return pd.DataFrame(rows)

    def trained_model(self, model: str, seed: int | None = None) -> nn.Module:
        """A model with the best epoch's weights of one of its runs (of the first seed by default), in eval mode."""
        seed = self.seeds[0] if seed is None else seed
        if (model, seed) not in self.runs:
            why = self.failures.get((model, seed)) or f"there are those of {sorted(self.runs)}"
            raise KeyError(f"no finished run of {model!r} with seed {seed}: {why}")
        return self.runs[model, seed].load_weights(self.models[model]())

    def teacher(self, model: str, seed: int) -> nn.Module:
        """The trained model of a run, to teach others.

        If the run is one of a record, of which the weights are not known, it is the architecture only, on PyTorch's
        "meta" device. Its students can be found in the record with it, and cannot be trained.
        """
        if isinstance(self.runs.get((model, seed)), RecordedRun):
            return self.models[model]().to("meta").eval()
        return self.trained_model(model, seed)

    def __or__(self, other: "Experiment") -> "Experiment":
        """Both experiments' models and runs as one; the seeds are those of either."""
        if other.data.fingerprint != self.data.fingerprint:
            raise ValueError(
                f"experiments on {self.data.name} and {other.data.name} cannot be joined; "
                "both must be on the same images and labels"
            )
        return Experiment(
            self.data,
            self.config,
            self.models | other.models,
            tuple(sorted({*self.seeds, *other.seeds})),
            self.runs | other.runs,
            self.failures | other.failures,
        )


def experiment(
    models: Mapping[str, Callable[[], nn.Module]],
    config: TrainingConfig,
    data: ImageData,
    seeds: Iterable[int],
    *,
    jobs: int = 1,
    trainer_class: TrainerClass | Mapping[int, TrainerClass] | Mapping[tuple[str, int], TrainerClass] = None,
    recorded: Record | None = None,
    train: bool = True,
) -> Experiment:
    """Train each model with each seed, or load the runs that are finished.

    `models` gives for each name a function without arguments that builds the network. `jobs` runs go side by side
    through joblib, each with its share of the threads; `joblib.parallel_config("dask")` sends them to a cluster, whose
    workers need `output_dir` at the same path. `trainer_class` is another trainer than StreamlinedTrainer: its class,
    or a `functools.partial` with what else it needs, such as a teacher; or one by seed, or by (model, seed).
    `recorded`, of `lablib.record.recorded_runs`, has figures of runs: what the store lacks is taken from there instead
    of trained, if it is the same run, and has then no weights and no history. With `train` False
    nothing is trained: the experiment has the runs that are there. A run that fails is reported by a warning and in the
    experiment's `failures`; the others go on. Telegram gets one message at the end, with the config's
    `telegram_every_run` one a run too; none if all runs are loaded.
    """
    models, seeds = dict(models), tuple(dict.fromkeys(seeds))
    if not models or not seeds:
        raise ValueError(f"an experiment needs a model and a seed; it has {len(models)} models and {len(seeds)} seeds")
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs == 0:
        raise ValueError(f"jobs = {jobs!r}, but it must be a whole number: runs side by side, or -1 for one a core")
    if jobs != 1 and num_processes() > 1:
        raise ValueError(f"jobs = {jobs}, but {num_processes()} processes train each run together: write jobs=1")
    if recorded and not isinstance(recorded, Record):
        raise TypeError(
            f"recorded is a {type(recorded).__name__}, but it must be what `recorded_runs` returns, a Record"
        )
    trainers = _by_run(trainer_class, [(name, seed) for name in models for seed in seeds])
    result = Experiment(data, config, models, seeds)
    with _messages(result) as messages:
        pending = {}
        for key in trainers:
            try:
                described = run_identity(models[key[0]], replace(config, seed=key[1]), data, trainers[key])
                path = Path(config.output_dir) / run_name(described)
                run = load_or_set_aside(path) if num_processes() == 1 else None  # or all would have to agree
                run = run or (recorded.find(described) if recorded else None)
            except Exception as error:
                _report_failure(result, key, *_described(error))
                continue
            if run:
                result.runs[key] = run
            else:
                pending[key] = path
        if pending and train:
            _train_pending(result, pending, jobs, trainers, messages)
            result.runs = {key: result.runs[key] for key in trainers if key in result.runs}
    return result


def _messages(result: Experiment):
    """What tells a chat of an experiment, or None; it is imported only where it is switched on."""
    if not result.config.use_telegram_notifications or not is_first_process():
        return nullcontext()
    from lablib.telegram.callback import ExperimentMessages

    return ExperimentMessages(result)


def _by_run(trainer_class: TrainerClass | Mapping, runs: list[tuple[str, int]]) -> dict[tuple[str, int], TrainerClass]:
    """The trainer of each run (model, seed), in the order of the runs."""
    if not isinstance(trainer_class, Mapping):
        return dict.fromkeys(runs, trainer_class)
    trainers = {run: trainer_class.get(run, trainer_class.get(run[1])) for run in runs}
    if missing := [run for run, trainer in trainers.items() if trainer is None]:
        raise ValueError(f"trainer_class has no trainer for {missing}; it has some for {list(trainer_class)}")
    return trainers


def _train_pending(
    result: Experiment, pending: dict, jobs: int, trainers: Mapping[tuple[str, int], TrainerClass], messages
):
    if messages:
        messages.begin(pending)
    config = replace(result.config, use_telegram_notifications=False)  # the experiment speaks for its runs
    jobs = min(joblib.effective_n_jobs(jobs), jobs if jobs > 0 else len(pending), len(pending))
    threads = max(1, joblib.cpu_count() // jobs) if jobs > 1 and _is_local() else None
    interruption = Interruption([signal.SIGINT])  # which workers get too: they are waited for, to write a checkpoint
    tasks = (
        joblib.delayed(_train_one)(
            key, result.models[key[0]], replace(config, seed=key[1]), result.data, trainers[key], threads, os.getpid()
        )
        for key in pending
        if not interruption.asked
    )
    backend, _ = joblib.parallel.get_active_backend()
    return_as = "generator_unordered" if backend.supports_return_generator else "list"
    # mmap_mode "c": the workers share the images' memory, and may write to their own copy
    parallel = joblib.Parallel(n_jobs=jobs, return_as=return_as, mmap_mode="c", pre_dispatch=jobs)
    names = {f"{name}, seed {seed}": path for (name, seed), path in pending.items()}
    with RunProgress(names, result.config.num_epochs, finished=len(result.runs)) as progress, interruption:
        try:
            for key, run, error in parallel(tasks):
                if run is not None:
                    result.runs[key] = run
                elif error is None:
                    interruption.ask()
                    continue
                else:
                    _report_failure(result, key, *error)
                progress.finished("{}, seed {}".format(*key))
                if messages:
                    messages.run_ended(key)
        except Exception as error:  # a worker died, and joblib gives up the rest; what is finished is in the store
            for key in () if interruption.asked else pending.keys() - result.failures.keys():
                if run := load_or_set_aside(pending[key]):
                    result.runs[key] = run
                else:
                    _report_failure(result, key, *_described(error))
                if messages:
                    messages.run_ended(key)


def _is_local() -> bool:
    """Whether joblib's runs are on this machine, so that its cores are what they share."""
    backend, _ = joblib.parallel.get_active_backend()
    return type(backend).__module__ == "joblib._parallel_backends"


def _described(error: Exception) -> tuple[str, str]:
    """An error in one line, and with its traceback; both are printed and sent, so without tokens."""
    first_line = redacted(next(iter(str(error).splitlines()), ""))
    return f"{type(error).__name__}: {first_line}", redacted("".join(traceback.format_exception(error)))


def _report_failure(result: Experiment, key: tuple[str, int], line: str, trace: str):
    result.failures[key] = line
    warnings.warn(f"the run of {key[0]!r} with seed {key[1]} failed:\n{trace}", stacklevel=4)


def _train_one(key, build_model, config, data, trainer_class, threads: int | None, parent: int):
    """A run's key, the run, and its error; neither if it was interrupted in a worker process."""
    from lablib.training import train_or_load  # with transformers, which loading a run does without

    leave_with(parent)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with _one_training:
            return key, train_or_load(build_model, config, data, trainer_class=trainer_class), None
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
