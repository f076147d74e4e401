"""Runs that are killed, and writes that fail: does each run still end as if nothing had happened?

`python tests/torture.py` kills each kind of run 20 times, breaks each of its writes in each way, and prints what came
of it. Each attempt is a process of its own, forked from this one, which has imported everything.
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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from lablib import (
    MLP,
    KnowledgeDistillationTrainer,
    ResidualCNN,
    StreamlinedTrainer,
    TrainingConfig,
    load_data,
    resuming,
    runs,
)
from lablib.data import ImageData
from lablib.identity import build_seeded
from lablib.runs import train_or_load

KINDS = ("step", "validation", "checkpoint", "result")
FAULTS = ("ENOSPC", "EIO", "torn")
STEPS_BETWEEN_CHECKPOINTS = 4  # within an epoch; by the clock, no two attempts would write the same ones


def trainings(data: ImageData) -> dict[str, dict]:
    """The trainings that are tormented, as arguments of `train_or_load`."""
    shape = {"image_shape": data.image_shape, "num_classes": data.num_classes}
    cnn = partial(ResidualCNN, 1, 4, **shape)
    teacher = build_seeded(partial(MLP, (64, 32), **shape), 7)
    distillation = partial(KnowledgeDistillationTrainer, teacher=teacher, temperature=4.0, alpha=0.7)
    return {
        "MLP": {"build_model": partial(MLP, (32,), **shape), "trainer_class": StreamlinedTrainer},
        "ResidualCNN": {"build_model": cnn, "trainer_class": StreamlinedTrainer},
        "distillation": {"build_model": partial(MLP, (16,), **shape), "trainer_class": distillation},
    }


def some_digits(images: int) -> ImageData:
    """The first of scikit-learn's digits."""
    digits = load_data("digits")
    part = {name: getattr(digits, name)[:images] for name in ("train_images", "train_labels")}
    part |= {name: getattr(digits, name)[: images // 2] for name in ("test_images", "test_labels")}
    return ImageData("digits", **part, class_names=digits.class_names)


@dataclass
class Torturer:
    """What happens to one attempt: it lists its moments, and dies or fails at one of them.

    A moment is (kind, global step, number within that): a training step between its gradients and its update, a
    validation batch, an operation of writing a checkpoint, or one of writing the result.
    """

    store: Path
    moment: tuple | None = None
    fault: str | None = None  # instead of being killed
    seen: list[tuple] = field(default_factory=list)
    phase: str | None = None
    trainer: object = None

    def install(self):
        """Get between lablib and what it calls; for the rest of this process."""
        self._around(StreamlinedTrainer, "training_step", "step")
        self._around(StreamlinedTrainer, "prediction_step", "validation")
        self._phase(resuming.ResumableTrainer, "_save_checkpoint", "checkpoint")
        self._phase(runs, "_result", "result")
        for module, name, path in (
            (torch, "save", lambda obj, path, *rest: path),
            (safetensors.torch, "save_file", lambda tensors, path, *rest, **more: path),
            (builtins, "open", lambda path, mode="r", *rest, **more: path if set("wx") & set(mode) else None),
            (os, "replace", lambda source, target: None),
            (os, "fsync", lambda descriptor: None),
            (shutil, "rmtree", lambda path, **more: None),
        ):
            self._operation(module, name, path)
        every = STEPS_BETWEEN_CHECKPOINTS
        resuming._CheckpointCallback._is_due = lambda self, args, state: state.global_step % every == 0

    def _around(self, cls, name: str, kind: str):
        original = getattr(cls, name)

        def wrapped(trainer, *args, **kwargs):
            outcome = original(trainer, *args, **kwargs)
            self.trainer = trainer
            if trainer.is_in_train:
                self._reached(kind)
            return outcome

        setattr(cls, name, wrapped)

    def _phase(self, owner, name: str, phase: str):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before, self.phase = self.phase, phase
            try:
                return original(*args, **kwargs)
            finally:
                self.phase = before if phase == "checkpoint" else phase  # the result is written after `_result`

        setattr(owner, name, wrapped)

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

    def _reached(self, kind: str, what: str = "", path=None):
        step = self.trainer.state.global_step
        number = sum(moment[:2] == (kind, step) for moment in self.seen)
        moment = (kind, step, number)
        self.seen.append((*moment, what))
        if moment != self.moment:
            return
        if path is not None:  # what a death in the middle of writing leaves
            os.truncate(path, os.path.getsize(path) // 2)
        if self.fault in ("ENOSPC", "EIO"):
            number = getattr(errno, self.fault)
            raise OSError(number, os.strerror(number), str(path or self.store))
        os.kill(os.getpid(), signal.SIGKILL)


def attempt(training: dict, config: TrainingConfig, data: ImageData, torturer: Torturer) -> tuple[int, dict]:
    """Train in a process of its own; its exit status (negative: a signal) and what it had to say."""
    said_path = torturer.store.with_suffix(".said")
    said_path.unlink(missing_ok=True)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        said = json.loads(said_path.read_text()) if said_path.exists() else {}
        return os.waitstatus_to_exitcode(status), said
    status = 1
    write = Path.write_text
    said = {"error": None, "warnings": []}
    try:
        torturer.install()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                train_or_load(config=config, data=data, **training)
                status = 0
            except OSError as error:
                said["error"], status = str(error), 3
        said["warnings"] = [str(warning.message) for warning in caught]
        said["seen"] = torturer.seen
        torturer.phase = None
        write(said_path, json.dumps(said))
    finally:
        os._exit(status)


def outcome(store: Path) -> dict[str, bytes]:
    """All that a run found out, byte by byte, without what a clock adds."""
    (path,) = [path for path in store.glob("*/") if (path / "result.json").exists() and ".damaged-" not in path.name]
    run = runs.load_run(path)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in run.history]
    result = {k: v for k, v in run.result.items() if k != "seconds"}
    return {
        "weights": (path / "model.safetensors").read_bytes(),
        "history": json.dumps(rows).encode(),
        "result": json.dumps(result).encode(),
        "measured": (path / "measured.npz").read_bytes(),
    }


class Case:
    """One kind of training, with what it comes to undisturbed and the moments it has."""

    def __init__(self, name: str, folder: Path, data: ImageData, epochs: int):
        self.name, self.folder, self.data = name, folder, data
        self.training = trainings(data)[name]
        self.config = TrainingConfig(num_epochs=epochs, batch_size=32, device="cpu", precision="fp32")
        self.stores = 0
        store = self.new_store()
        status, said = self.attempt(store)
        assert status == 0, said
        self.moments = [tuple(moment) for moment in said["seen"]]
        self.expected = outcome(store)

    def new_store(self) -> Path:
        self.stores += 1
        store = self.folder / f"{self.name}-{self.stores}"
        store.mkdir(parents=True)
        return store

    def attempt(self, store: Path, moment: tuple | None = None, fault: str | None = None) -> tuple[int, dict]:
        config = TrainingConfig(**{**vars(self.config), "output_dir": str(store)})
        return attempt(self.training, config, self.data, Torturer(store, moment and moment[:3], fault))

    def differences(self, store: Path) -> list[str]:
        """Which of weights, history, result and measurements are not bitwise those of the undisturbed run."""
        found = outcome(store)
        return [name for name in self.expected if found[name] != self.expected[name]]


def killed_often(case: Case, kills: int, seed: int) -> dict:
    """One run, killed at moments drawn from a seed and started again each time, until it ends."""
    drawn = random.Random(seed)
    of_kind = {kind: [m for m in case.moments if m[0] == kind and m[3] != "rmtree"] for kind in KINDS}
    written = max(i for i, moment in enumerate(of_kind["result"]) if moment[3] == "replace")  # result.json
    of_kind["result"], after = of_kind["result"][: written + 1], of_kind["result"][written + 1]
    share = {kind: kills // len(KINDS) + (number < kills % len(KINDS)) for number, kind in enumerate(KINDS)}
    chosen = [after] * (share["result"] > 0)  # after a kill with a whole result nothing is left to be killed
    share["result"] -= len(chosen)
    share = {kind: min(number, len(of_kind[kind])) for kind, number in share.items()}
    share["step"] += kills - len(chosen) - sum(share.values())
    for kind in KINDS:
        chosen += drawn.sample(of_kind[kind], share[kind])
    chosen.sort(key=case.moments.index)
    store, died = case.new_store(), Counter()
    for moment in chosen:
        status, said = case.attempt(store, moment)
        if status == -signal.SIGKILL:
            died[moment[0]] += 1
        else:
            assert status == 0, said
    status, said = case.attempt(store)
    assert status == 0, said
    return {"training": case.name, **{kind: died[kind] for kind in KINDS}, "differences": case.differences(store)}


def broken_writes(case: Case, limit: int | None = None, seed: int = 0) -> list[dict]:
    """A run for each operation of writing and each fault: it stops with an error or dies, and goes on from there."""
    writes = [moment for moment in case.moments if moment[0] in ("checkpoint", "result")]
    plans = [
        (moment, fault)
        for moment in writes
        for fault in FAULTS
        if (fault == "torn") == moment[3].startswith("half of") and not (fault != "torn" and moment[3] == "rmtree")
    ]
    if limit:
        plans = random.Random(seed).sample(plans, limit)
    rows = []
    for moment, fault in plans:
        store = case.new_store()
        status, said = case.attempt(store, moment, fault)
        stopped = status == -signal.SIGKILL if fault == "torn" else status == 3 and str(store) in said["error"]
        status, said = case.attempt(store)
        assert status == 0, (moment, fault, said)
        rows.append({"fault": fault, "stopped": stopped, "differences": case.differences(store), "moment": moment})
        shutil.rmtree(store)
    return rows


def damaged_files(case: Case, limit: int | None = None, seed: int = 0) -> list[dict]:
    """A run for each file of a checkpoint and of a result, and each damage to it after it was written."""
    last = max(moment[1] for moment in case.moments)
    rows = []
    for at, moment in {
        "checkpoint": ("step", last - 2, 0),
        "result": None,
    }.items():
        template = case.new_store()
        status, said = case.attempt(template, moment)
        assert status == (-signal.SIGKILL if moment else 0), said
        files = [path.relative_to(template) for path in _newest(template)]
        plans = [(file, damage) for file in files for damage in ("half", "flipped bit", "missing")]
        for file, damage in random.Random(seed).sample(plans, limit) if limit else plans:
            store = case.new_store()
            shutil.copytree(template, store, dirs_exist_ok=True)
            _damage(store / file, damage, seed)
            status, said = case.attempt(store)
            assert status == 0, (file, damage, said)
            finished_anew = at == "result" and file.name == "result.json" and damage == "missing"
            # a flipped bit in result.json may be one of another file's sum, which is then named
            damaged = "The run is set aside" if at == "result" else file.parent.name
            named = any(damaged in text for text in said["warnings"])
            rows.append(
                {
                    "fault": f"{damage}, {at}",
                    "stopped": named or finished_anew,
                    "differences": case.differences(store),
                    "moment": str(file),
                }
            )
            shutil.rmtree(store)
    return rows


def _newest(store: Path) -> list[Path]:
    """The files of a store's newest checkpoint, or those of its result."""
    checkpoints = sorted(store.glob("*/checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    folder = checkpoints[-1] if checkpoints else next(path.parent for path in store.glob("*/result.json"))
    return sorted(path for path in folder.iterdir() if path.is_file())


def _damage(path: Path, damage: str, seed: int):
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "half":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[random.Random(seed).randrange(len(content))] ^= 1 << random.Random(seed + 1).randrange(8)
        path.write_bytes(content)


def report(kills: list[dict], faults: list[dict], seconds: float) -> str:
    """What stands in results/reliability.md."""
    lines = [
        "# Interrupted, broken, damaged: does a run end the same?",
        "",
        "`make torture` writes this page. A run counts as the same only if its weights, its history, its result and",
        "what was measured are bitwise those of a run that nothing happened to (times aside). Each attempt is a process of its own.",
        "",
        "## Killed with SIGKILL and started again until it ends",
        "",
        "Moments drawn from a seed: in a training step, between its gradients and its update; in a validation; between",
        "and within the writes of a checkpoint; between and within the writes of the result.",
        "",
        "| training | in a step | in a validation | writing a checkpoint | writing the result | differences |",
        "|---|---|---|---|---|---|",
    ]
    for row in kills:
        cells = [row["training"], *(row[kind] for kind in KINDS), ", ".join(row["differences"]) or "none"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += [
        "",
        "## A fault in each write, and damage to each file",
        "",
        "ENOSPC (no space left) and EIO (the disk fails) are raised by each operation in turn: opening, writing,",
        'syncing, renaming a file. "torn" leaves half of the bytes and kills the process. The damages are done to the',
        "newest checkpoint of an interrupted run, or to a finished run. Noticed: the run stopped with an error that",
        "names the path, or a warning named what was damaged (for a result that is missing there is nothing to name).",
        "",
        "| fault | injected | noticed | ended the same |",
        "|---|---|---|---|",
    ]
    for fault in dict.fromkeys(row["fault"] for row in faults):
        rows = [row for row in faults if row["fault"] == fault]
        same, noticed = sum(not row["differences"] for row in rows), sum(row["stopped"] for row in rows)
        lines.append(f"| {fault} | {len(rows)} | {noticed} | {same} |")
    lines += ["", f"{seconds:.0f} seconds with one thread; torch {torch.__version__.partition('+')[0]}.", ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each training")
    parser.add_argument("--only", nargs="+", default=["MLP", "ResidualCNN", "distillation"], help="trainings")
    parser.add_argument("--faults", type=int, help="as many, drawn from the seed; by default all")
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the table; without one it is printed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.monotonic()
    data = some_digits(options.images)
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        cases = [Case(name, Path(folder), data, options.epochs) for name in options.only]
        kills = [killed_often(case, options.kills, options.seed) for case in cases]
        faults = broken_writes(cases[0], options.faults, options.seed)
        faults += damaged_files(cases[0], options.faults, options.seed)
    page = report(kills, faults, time.monotonic() - began)
    print(page)
    failed = [row for row in [*kills, *faults] if row["differences"] or not row.get("stopped", True)]
    expected = options.kills * len(cases)
    died = sum(row[kind] for row in kills for kind in KINDS)
    if failed or died != expected:
        print(f"{died} of {expected} kills; {len(failed)} not as they should be: {failed[:3]}", file=sys.stderr)
        return 1
    if options.out:
        options.out.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
