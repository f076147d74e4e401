"""What there is to compare of a run."""

from lablib import Run


def timeless(run: Run) -> tuple:
    """All that a run found out, its weights as bytes, without what a clock adds."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in (run.result, *run.history)]
    return rows, *((run.path / name).read_bytes() for name in ("model.safetensors", "measured.npz"))
