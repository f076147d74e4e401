"""The processes that train together (`torchrun`): which of them this one is, and how it leaves them."""

import atexit
import functools
import gc
import os
import sys


def num_processes() -> int:
    """How many processes train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this one writes the files and speaks to people."""
    return int(os.environ.get("RANK", 0)) == 0


def process_seed(seed: int, process: int) -> int:
    """The seed of one of the processes: the run's own for the first, and far from other runs' for the others."""
    return (seed + process * 2_654_435_761) % 2**32


@functools.cache
def leave_group_at_exit():
    """Let this process leave `torch.distributed`'s group when it ends, unless by an error: the others might wait then.

    Gloo's threads would outlive Python otherwise, and one that lets go of a tensor so late aborts the process
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    atexit.register(_leave_group)


def _leave_group():
    import torch

    if torch.distributed.is_initialized() and not hasattr(sys, "last_value"):
        gc.collect()  # trainers in cycles hold the group, and with it its threads
        torch.distributed.destroy_process_group()
