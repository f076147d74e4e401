"""What Weights & Biases and Telegram have in common: their errors never reach a training."""

import contextlib
import functools
import warnings
import weakref

import torch
from transformers import TrainerCallback

from lablib.secret import redacted


class Harmless:
    """Something optional: the first error in one of its `@harmless` methods is a warning, and then they do nothing."""

    service = "the service"
    broken = False

    def fail(self, error: BaseException) -> None:
        """Say once what is wrong, and do nothing more."""
        if self.broken:
            return
        self.broken = True
        with contextlib.suppress(Exception):
            self.give_up()
        reason = redacted(str(error)) or type(error).__name__
        # without a line of somebody else's source below the message
        warnings.warn_explicit(f"{self.service}: {reason}; continuing without it", UserWarning, "lablib", 0)

    def give_up(self) -> None:
        """Let go of what the service holds."""


def harmless(method):
    """Decorate a method of a `Harmless` that may fail. It leaves PyTorch's random state as it was."""

    @functools.wraps(method)
    def guarded(self, *args, **kwargs):
        if self.broken:
            return
        random_state = torch.get_rng_state()
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.fail(error)
        finally:
            torch.set_rng_state(random_state)

    return guarded


class ServiceCallback(Harmless, TrainerCallback):
    """A callback that knows its trainer, and that hears of a failed training too; only the first process has it."""

    def __init__(self, trainer):
        self._trainer = weakref.ref(trainer)  # which has this callback
        self.broken = not trainer.is_world_process_zero()

    @property
    def trainer(self):
        return self._trainer()

    def on_train_failed(self, error: BaseException) -> None:
        """The training ended with an exception, which may be a KeyboardInterrupt."""

    def test_result(self) -> dict[str, float]:
        """Loss and accuracy on the test set; empty under `torchrun`, where every process would have to take part."""
        return self.trainer.final_test() if self.trainer.args.world_size == 1 else {}
