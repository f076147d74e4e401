"""What a service that is told of a training has in common with the others: it cannot harm the training."""

import contextlib
import functools
import io
import warnings
import weakref

import torch
from transformers import TrainerCallback

from lablib.secret import redacted


class ServiceCallback(TrainerCallback):
    """A callback that knows its trainer and is also told of a failure; an error of its own becomes one warning.

    After that warning it does nothing more. Subclasses wrap what they do with `harmless`.
    """

    service = "the service"

    def __init__(self, trainer):
        self._trainer = weakref.ref(trainer)
        self.broken = False

    @property
    def trainer(self):
        return self._trainer()

    def on_train_failed(self, error: BaseException) -> None:
        """The training ended with an exception, KeyboardInterrupt included."""

    def give_up(self) -> None:
        """Let go of what the service holds, after an error of its own."""

    def test_result(self) -> dict[str, float]:
        """The test set's loss and accuracy; none where several processes train, as all would have to take part."""
        return self.trainer.final_test() if self.trainer.args.world_size == 1 else {}


def harmless(method):
    """Let a ServiceCallback's method do nothing once the service is broken, and never raise an Exception."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.broken or not self.trainer.is_world_process_zero():
            return
        random_state = torch.get_rng_state()
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.broken = True
            with contextlib.suppress(Exception):
                self.give_up()
            reason = redacted(str(error)) or type(error).__name__
            message = f"{self.service}: {reason}; the training goes on without it"
            warnings.warn_explicit(message, UserWarning, "lablib", 0)  # without a line of transformers' source below it
        finally:
            torch.set_rng_state(random_state)  # a service draws no numbers from the training

    return guarded


def learning_curves(rows: list[dict[str, float]], title: str) -> bytes:
    """A run's loss and accuracy by epoch, training and validation, as a PNG; `rows` are those of `metrics.history`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")  # pyplot does not know of it, so that no notebook shows it
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in rows]
    look = {"marker": "." if len(epochs) == 1 else None}
    # blue and orange of seaborn's palette for colour-blind readers
    parts = {"training": ("train", "#0173b2", "-"), "validation": ("val", "#de8f05", "--")}
    for axis, metric, unit in zip(figure.subplots(1, 2), ("loss", "accuracy"), (" (nats)", ""), strict=True):
        for label, (part, color, line) in parts.items():
            axis.plot(epochs, [row[f"{part}_{metric}"] for row in rows], line, color=color, label=label, **look)
        axis.set(xlabel="epoch", ylabel=metric + unit)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
