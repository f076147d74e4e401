"""What there is to compare of a training or a run, without what a clock adds."""

from lablib import Run, StreamlinedTrainer


def timeless(run: Run) -> dict:
    """All that a run found out, its weights and measurements as bytes."""
    result, *rows = ({k: v for k, v in row.items() if k != "seconds"} for row in (run.result, *run.history))
    files = {"weights": "model.safetensors", "measured": "measured.npz"}
    return {name: (run.path / file).read_bytes() for name, file in files.items()} | {"history": rows, "result": result}


def timeless_rows(trainer: StreamlinedTrainer) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.history]


def findings(trainer: StreamlinedTrainer) -> tuple:
    return timeless_rows(trainer), {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
