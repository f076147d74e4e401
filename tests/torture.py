"""Runs that are killed, and writes that fail: does each run still end as if nothing had happened?

`python tests/torture.py` kills each kind of run 20 times, breaks its writes in each way, damages each file, and prints
what came of it. Each attempt is a process of its own, forked from this one, which has imported everything.
"""

import argparse
import builtins
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from outcomes import timeless

from lablib import MLP, KnowledgeDistillationTrainer, ResidualCNN, StreamlinedTrainer, TrainingConfig
from lablib.checkpoints import checkpoints_in
from lablib.datasets import load_data
from lablib.identity import build_seeded
from lablib.runs import load_run, train_or_load

DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "flipped bit": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "missing": None,
}
KINDS = ("step", "validation", "checkpoint", "result")
STEPS_BETWEEN_CHECKPOINTS = 4  # and one after each epoch; by the clock, no two attempts would write the same ones


def trainings() -> dict[str, dict]:
    """The trainings that are tormented, as arguments of `train_or_load`."""
    teacher = build_seeded(partial(MLP, (64, 32)), 7)
    distillation = partial(KnowledgeDistillationTrainer, teacher=teacher, temperature=4.0, alpha=0.7)
    return {
        "MLP": {"build_model": partial(MLP, (32,))},
        "ResidualCNN": {"build_model": partial(ResidualCNN, 1, 4, image_shape=(1, 28, 28))},
        "distillation": {"build_model": partial(MLP, (16,)), "trainer_class": distillation},
    }


@dataclass
class Torturer:
    """What happens to one attempt: it lists its moments, and dies or fails at one of them.

    A moment is (kind, global step, number within that, operation): a training step between its gradients and its
    update, a validation batch, an operation of writing a checkpoint, or one of writing the result.
    """

    store: Path
    moment: tuple | None = None
    fault: str | None = None  # instead of being killed
    seen: list[tuple] = field(default_factory=list)
    saving: bool = False
    trained: bool = False
    trainer: StreamlinedTrainer | None = None

    def install(self):
        """Get between lablib and what it calls; for the rest of this process."""
        self._after(StreamlinedTrainer, "training_step", lambda: self._reached("step"))
        self._after(StreamlinedTrainer, "run_model", lambda: self.trainer.model.training or self._reached("validation"))
        self._after(StreamlinedTrainer, "train", lambda: setattr(self, "trained", True))
        save = StreamlinedTrainer._write_checkpoint

        def saving(trainer):
            self.saving = True
            save(trainer)
            self.saving = False

        StreamlinedTrainer._write_checkpoint = saving
        written = lambda path, mode="r", *rest, **more: path if set("wx") & set(mode) else None  # noqa: E731
        self._operation(builtins, "open", written)
        self._operation(os, "replace", lambda source, target: target)
        due = StreamlinedTrainer._save_if_due
        StreamlinedTrainer._save_if_due = lambda trainer, seconds: due(
            trainer,
            0 if trainer.state.epoch.is_integer() or not trainer.state.global_step % STEPS_BETWEEN_CHECKPOINTS else 1e9,
        )

    @property
    def phase(self) -> str | None:
        """What is being written."""
        return "checkpoint" if self.saving else "result" if self.trained else None

    def _after(self, cls, name: str, action):
        original = getattr(cls, name)

        def wrapped(trainer, *args, **kwargs):
            outcome = original(trainer, *args, **kwargs)
            self.trainer = trainer
            if trainer.is_in_train or name == "train":
                action()
            return outcome

        setattr(cls, name, wrapped)

    def _operation(self, module, name: str, written_path):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            if self.phase is None:
                return original(*args, **kwargs)
            path = written_path(*args, **kwargs)
            if name == "open" and (path is None or self.store not in Path(str(path)).parents):
                return original(*args, **kwargs)
            self._reached(self.phase, name)
            outcome = original(*args, **kwargs)
            if path is not None and name != "open":
                self._reached(self.phase, f"half of {name}", path)
            return outcome

        setattr(module, name, wrapped)

    def _reached(self, kind: str, operation: str = "", path=None):
        step = self.trainer.state.global_step
        number = sum(moment[:2] == (kind, step) for moment in self.seen)
        self.seen.append((kind, step, number, operation))
        if self.seen[-1] != self.moment:
            return
        if path is not None:  # what a death in the middle of writing leaves
            os.truncate(path, os.path.getsize(path) // 2)
        if self.fault in ("ENOSPC", "EIO"):
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), str(path or self.store))
        os.kill(os.getpid(), signal.SIGKILL)


class Case:
    """One kind of training, with what it comes to undisturbed and the moments it has."""

    def __init__(self, name: str, folder: Path, images: int, epochs: int):
        self.name, self.data, self.training = name, load_data("digits"), trainings()[name]
        knobs = {"num_epochs": epochs, "max_train_images": images, "batch_size": 32}
        self.config = TrainingConfig(**knobs, device="cpu", precision="fp32")
        self.folder, store = folder, Path(tempfile.mkdtemp(dir=folder))
        self.moments = [tuple(moment) for moment in self.finish(store)["seen"]]
        self.expected = outcome(store)

    def attempt(self, store: Path, moment: tuple | None = None, fault: str | None = None) -> tuple[int, dict]:
        """Train in a process of its own; its exit status (negative: a signal) and what it had to say."""
        said_path, torturer = store.with_suffix(".said"), Torturer(store, moment, fault)
        said_path.unlink(missing_ok=True)
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            said = json.loads(said_path.read_text()) if said_path.exists() else {}
            return os.waitstatus_to_exitcode(status), said
        status, said = 1, {"error": None, "seen": torturer.seen}
        try:
            torturer.install()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    train_or_load(config=replace(self.config, output_dir=str(store)), data=self.data, **self.training)
                    status = 0
                except OSError as error:
                    said["error"], status = str(error), 3
            said["warnings"] = [str(warning.message) for warning in caught]
            torturer.trained = False
            said_path.write_text(json.dumps(said))
        finally:
            os._exit(status)

    def finish(self, store: Path) -> dict:
        """Train, which has to succeed, and return what was said."""
        status, said = self.attempt(store)
        assert status == 0, (store, said)
        return said

    def differences(self, store: Path) -> list[str]:
        """Which of weights, history, result and measurements are not bitwise those of the undisturbed run."""
        found = outcome(store)
        return [name for name in self.expected if found[name] != self.expected[name]]


def outcome(store: Path) -> dict:
    (path,) = [path for path in store.glob("*/") if (path / "result.json").exists()]
    return timeless(load_run(path))


def killed_often(case: Case, kills: int) -> dict:
    """One run, killed at moments drawn at random and started again each time, until it ends."""
    of_kind = {kind: [moment for moment in case.moments if moment[0] == kind] for kind in KINDS}
    written = max(i for i, moment in enumerate(of_kind["result"]) if moment[3] == "replace")  # result.json
    del of_kind["result"][written + 2 :]  # after a kill with a whole result nothing is left to be killed
    share = {kind: min(kills // len(KINDS), len(of_kind[kind])) for kind in KINDS}
    share["step"] += kills - sum(share.values())
    drawn = random.Random(0)
    chosen = [moment for kind in KINDS for moment in drawn.sample(of_kind[kind], share[kind])]
    store, died = Path(tempfile.mkdtemp(dir=case.folder)), Counter()
    for moment in sorted(chosen, key=case.moments.index):
        status, said = case.attempt(store, moment)
        assert status in (0, -signal.SIGKILL), said
        died[moment[0]] += status != 0
    case.finish(store)
    return {"training": case.name, **{kind: died[kind] for kind in KINDS}, "differences": case.differences(store)}


def broken_writes(case: Case, limit: int | None) -> list[dict]:
    """A run for each operation of writing and each fault: it stops with an error or dies, and resumes.

    The checkpoints are the first, which has none before it, one within the second epoch and the last.
    """
    steps = sorted({step for kind, step, *_ in case.moments if kind == "checkpoint"})
    steps = {steps[0], steps[len(steps) // 2], steps[-1]}
    plans, rows = [], []
    for moment in case.moments:
        if moment[0] == "result" or (moment[0] == "checkpoint" and moment[1] in steps):
            faults = ("torn",) if moment[3].startswith("half of") else ("ENOSPC", "EIO")
            plans += [(moment, fault) for fault in faults]
    for moment, fault in random.Random(0).sample(plans, min(limit or len(plans), len(plans))):
        store = Path(tempfile.mkdtemp(dir=case.folder))
        status, said = case.attempt(store, moment, fault)
        noticed = status == -signal.SIGKILL if fault == "torn" else status == 3 and str(store) in said["error"]
        case.finish(store)
        rows.append({"fault": fault, "noticed": noticed, "differences": case.differences(store), "moment": moment})
        shutil.rmtree(store)
    return rows


def damaged_files(case: Case, limit: int | None) -> list[dict]:
    """A run for each file of a checkpoint and of a result, and each damage to it after it was written."""
    last, rows = max(moment[1] for moment in case.moments), []
    for at, moment in {"checkpoint": ("step", last - 2, 0, ""), "result": None}.items():
        template = Path(tempfile.mkdtemp(dir=case.folder))
        case.attempt(template, moment)
        (folder,) = template.glob("*/")
        files = checkpoints_in(folder / "checkpoints")[:1] if moment else sorted(folder.glob("*.*"))
        files = [path.relative_to(template) for path in files if path.is_file()]
        plans = [(file, damage) for file in files for damage in DAMAGES]
        for file, damage in random.Random(0).sample(plans, min(limit or len(plans), len(plans))):
            store = shutil.copytree(template, Path(tempfile.mkdtemp(dir=case.folder)), dirs_exist_ok=True)
            content = (store / file).read_bytes()
            (store / file).unlink()
            if damage != "missing":
                (store / file).write_bytes(DAMAGES[damage](content))
            said = case.finish(store)
            # a flipped bit in result.json may be one of another file's sum, which is then named
            damaged = file.name if moment else "is damaged and does not count"
            noticed = any(damaged in text for text in said["warnings"])
            noticed |= damage == "missing" and file.suffix in (".pt", ".json")  # then it is another or no result
            row = {"fault": f"{damage}, {at}", "noticed": noticed, "moment": str(file)}
            rows.append(row | {"differences": case.differences(store)})
            shutil.rmtree(store)
    return rows


PAGE = """# Do runs survive interruptions, failed writes and damaged files?

`make torture` writes this page. A run counts as the same only if its weights, history and result are bitwise identical
to those of an undisturbed run, except for times. Each attempt is a separate process.

## Runs killed with SIGKILL and restarted until they finish

The moments of the kills are drawn at random, with a fixed seed: in a training step, between gradients and update;
during validation; between and within the writes of a checkpoint; between and within the writes of the result.

| run | in a step | in validation | writing a checkpoint | writing the result | differences |
|---|---|---|---|---|---|
{}

## Failing writes and damaged files

ENOSPC (no space left) and EIO (disk error) are raised by each operation in turn: opening, writing and
renaming a file of the first, a middle and the last checkpoint, and of the result. *Torn* leaves half of the bytes and
kills the process. Files are damaged in the newest checkpoint of an interrupted run, or in a finished run. *Detected*
means that the run stopped with an error that names the path, or that a warning named the damaged file (a missing
checkpoint or result leaves nothing to name).

| fault | injected | detected | same outcome |
|---|---|---|---|
{}

The test took {seconds:.0f} seconds with one thread; torch {version}.
"""


def report(kills: list[dict], faults: list[dict], seconds: float) -> str:
    """What stands in results/reliability.md."""
    killed = [[row["training"], *map(row.get, KINDS), ", ".join(row["differences"]) or "none"] for row in kills]
    broken = []
    for fault in dict.fromkeys(row["fault"] for row in faults):
        rows = [row for row in faults if row["fault"] == fault]
        broken.append([fault, len(rows), sum(r["noticed"] for r in rows), sum(not r["differences"] for r in rows)])
    tables = ("\n".join(f"| {' | '.join(map(str, cells))} |" for cells in rows) for rows in (killed, broken))
    return PAGE.format(*tables, seconds=seconds, version=torch.__version__.partition("+")[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--only", nargs="+", default=["MLP", "ResidualCNN", "distillation"], help="trainings")
    parser.add_argument("--faults", type=int, help="as many, drawn at random; by default all")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a file for the table; without one it is printed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        cases = [Case(name, Path(folder), options.images, options.epochs) for name in options.only]
        kills = [killed_often(case, options.kills) for case in cases]
        faults = broken_writes(cases[0], options.faults)
        faults += damaged_files(cases[0], options.faults)
    page = report(kills, faults, time.monotonic() - began)
    print(page)
    failed = [row for row in [*kills, *faults] if row["differences"] or not row.get("noticed", True)]
    died, expected = sum(row[kind] for row in kills for kind in KINDS), options.kills * len(cases)
    if failed or died != expected:
        print(f"{died} of {expected} kills; {len(failed)} not as they should be: {failed[:3]}", file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
