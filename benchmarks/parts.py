"""Where the time of lablib's epochs goes, by part: timers around the methods that an epoch is made of."""

import tempfile
import time
from collections import Counter
from functools import wraps

from benchmarks.cases import Case
from benchmarks.rivals import lablib_trainer

PARTS = (
    "data",
    "augmentation",
    "forward",
    "loss",
    "backward",
    "optimizer",
    "measuring",
    "Trainer's own",
    "log",
    "evaluation",
    "checkpoint",
)


class Stopwatches:
    """Seconds and calls by part; a part within another one counts for itself only."""

    def __init__(self):
        self.seconds, self.calls = Counter(), Counter()
        self._running: list[str] = []
        self._since = 0.0

    def around(self, owner, name: str, part: str):
        """Time a method of an object from now on."""
        original = getattr(owner, name)

        @wraps(original)
        def timed(*arguments, **more):
            self.start(part)
            try:
                return original(*arguments, **more)
            finally:
                self.stop()

        setattr(owner, name, timed)

    def start(self, part: str):
        self._credit()
        self._running.append(part)
        self.calls[part] += 1

    def stop(self):
        self._credit()
        self._running.pop()

    def _credit(self):
        _synchronise()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def profile(case: Case, images: int | None, threads: int | None, epochs: int = 3) -> dict:
    """Milliseconds a step of each part of the training, and milliseconds an epoch of what follows it.

    The first epoch warms up and does not count. On a GPU the timers wait for the device, so that parts add up to more
    than an undisturbed epoch.
    """
    import torch
    from transformers import TrainerCallback

    watches = Stopwatches()

    class Epochs(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if state.epoch and round(state.epoch) == 1:
                watches.seconds.clear()
                watches.calls.clear()
            watches.start("Trainer's own")

        def on_epoch_end(self, *_, **__):
            watches.stop()

    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lablib_trainer(case, images, folder, num_epochs=epochs + 1, callbacks=[Epochs()])
        _time(trainer, watches)
        trainer.train()
    steps = watches.calls["forward"]
    if not steps:
        raise RuntimeError("no step was timed")
    after = ("log", "evaluation", "checkpoint")
    return {
        "case": case.name,
        "images": len(trainer.train_dataset),
        "batch_size": case.batch_size,
        "threads": torch.get_num_threads(),
        "steps": steps // epochs,
        "ms_a_step": {p: round(1e3 * watches.seconds[p] / steps, 3) for p in PARTS if p not in after},
        "ms_an_epoch": {p: round(1e3 * watches.seconds[p] / epochs, 1) for p in after},
    }


def _time(trainer, watches: Stopwatches):
    """Put the watches around a trainer's parts; what is between them is Trainer's own."""
    around = watches.around
    around(trainer, "get_batch_samples", "data")
    around(trainer, "losses", "loss")
    around(trainer.accelerator, "backward", "backward")
    around(trainer._since_last_log, "add", "measuring")
    around(trainer, "log", "log")
    around(trainer, "_training_metrics", "log")
    around(trainer, "evaluate", "evaluation")
    around(trainer, "_save_checkpoint", "checkpoint")
    _time_in_training(trainer, "prepare_images", "augmentation", watches)
    _time_in_training(trainer, "outputs", "forward", watches)
    create_optimizer = trainer.create_optimizer

    def create_and_time(*arguments, **more):
        made = trainer.optimizer is None
        optimizer = create_optimizer(*arguments, **more)
        if made:
            around(optimizer, "step", "optimizer")
            around(trainer.model, "zero_grad", "optimizer")
        return optimizer

    trainer.create_optimizer = create_and_time


def _time_in_training(trainer, name: str, part: str, watches: Stopwatches):
    """As `around`, but what happens in an evaluation stays a part of that."""
    original = getattr(trainer, name)
    watches.around(trainer, name, part)
    timed = getattr(trainer, name)
    setattr(trainer, name, lambda *a, **more: (timed if trainer.model.training else original)(*a, **more))


def _synchronise():
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
