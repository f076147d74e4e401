"""Which of the processes that train together (`torchrun`) this one is."""

import os


def num_processes() -> int:
    """How many processes train together; 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this one writes the files and speaks to people."""
    return int(os.environ.get("RANK", 0)) == 0


def process_seed(seed: int, process: int) -> int:
    """The seed of one of the processes: the run's own for the first, and far from other runs' for the others."""
    return (seed + process * 2_654_435_761) % 2**32
