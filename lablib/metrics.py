"""Loss and accuracy: by batch in training, over all predictions in an evaluation, by epoch in a run's history."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from transformers import EvalPrediction

Losses = Callable[[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor], dict[str, torch.Tensor]]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """{"loss": mean cross-entropy} of logits (images × classes) and labels (images)."""
    return {"loss": F.cross_entropy(logits, labels)}


@torch.no_grad()
def evaluation_metrics(
    prediction: "EvalPrediction", losses: Losses = cross_entropy, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The losses and the accuracy over all images, each counted once.

    Predictions are logits (images × classes), or a tuple that begins with them. `losses` gets all of them at once,
    since a weighted loss is not a mean over batches, on the device and in the dtype of the training, since it may hold
    tensors such as class weights.
    """
    outputs = tree_map(lambda array: torch.from_numpy(array).to(device), prediction.predictions)
    labels = torch.from_numpy(prediction.label_ids).to(device)
    logits = outputs[0] if isinstance(outputs, tuple) else outputs
    measured = {name: value.item() for name, value in losses(outputs, labels).items()}
    return measured | {"accuracy": (logits.argmax(1) == labels).double().mean().item()}


class BatchMeter:
    """Collects the losses and hits of batches without waiting for the device, until they are asked for."""

    def __init__(self):
        self.forget()

    def __len__(self) -> int:
        return len(self._sizes)

    def state(self) -> dict:
        """All measurements as JSON, exactly."""
        losses = {name: values.tolist() for name, values in self.losses().items()}
        return {"sizes": self._sizes, "correct": self._hits(), "losses": losses}

    def restore(self, state: dict):
        """Continue from a `state`."""
        self.forget()
        self._sizes = list(state["sizes"])
        self._correct = _Scalars(torch.tensor(state["correct"]))
        self._losses = {
            name: _Scalars(torch.tensor(values, dtype=torch.float64)) for name, values in state["losses"].items()
        }

    def forget(self):
        """Start again."""
        self._sizes: list[int] = []
        self._correct = _Scalars()
        self._losses: dict[str, _Scalars] = {}

    def add(self, losses: dict[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor):
        """Add one batch: its mean losses, its logits (batch × classes) and labels (batch)."""
        self._sizes.append(len(labels))
        self._correct.append((logits.detach().argmax(1) == labels).sum())
        for name, loss in losses.items():
            self._losses.setdefault(name, _Scalars()).append(loss.detach())

    def losses(self) -> dict[str, torch.Tensor]:
        """Each loss by batch, float64 on the CPU."""
        return {name: scalars.gathered() for name, scalars in self._losses.items()}

    def means(self) -> dict[str, float]:
        """Each loss and the accuracy as means over images."""
        sizes = torch.tensor(self._sizes)
        means = {name: ((values * sizes).sum() / sizes.sum()).item() for name, values in self.losses().items()}
        return means | {"accuracy": sum(self._hits()) / sizes.sum().item()}

    def _hits(self) -> list[int]:
        return self._correct.gathered().long().tolist() if self._sizes else []


def combined(states: list[dict]) -> dict:
    """Merge the states of several processes, each of which measured its share of the same batches."""
    sizes = torch.tensor([state["sizes"] for state in states])  # (processes, batches)
    correct = torch.tensor([state["correct"] for state in states])
    means = {
        name: torch.tensor([state["losses"][name] for state in states], dtype=torch.float64)
        for name in states[0]["losses"]
    }
    total = sizes.sum(0)
    losses = {name: ((values * sizes).sum(0) / total).tolist() for name, values in means.items()}
    return {"sizes": total.tolist(), "correct": correct.sum(0).tolist(), "losses": losses}


class _Scalars:
    """Scalars on their device, in order.

    They are stacked a few at a time: as single tensors they would fragment the memory between the tensors of a step, so
    that a long epoch would take more and more of it.
    """

    _TOGETHER = 64

    def __init__(self, first: torch.Tensor | None = None):
        self._parts = [] if first is None else [first]
        self._latest: list[torch.Tensor] = []

    def append(self, value: torch.Tensor):
        self._latest.append(value)
        if len(self._latest) == self._TOGETHER:
            self._parts.append(torch.stack(self._latest))
            self._latest = []

    def gathered(self) -> torch.Tensor:
        """All of them as float64 on the CPU, with one wait for each device that they are on."""
        by_kind: dict[tuple, list[torch.Tensor]] = {}
        for part in [*self._parts, *([torch.stack(self._latest)] if self._latest else [])]:
            by_kind.setdefault((part.device, part.dtype), []).append(part)  # those of a checkpoint first, on the CPU
        return torch.cat([torch.cat(parts).cpu().double() for parts in by_kind.values()])


def history(log: list[dict]) -> list[dict]:
    """A run's metrics by epoch, from `trainer.state.log_history`.

    One dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate, grad_norm (of the
    epoch's last step), seconds (since the run began); and the terms of the loss, if it has several, such as
    train_soft_loss and val_soft_loss.
    """
    rows: dict[int, dict] = {}
    for entry in log:
        row = rows.setdefault(math.ceil(entry.get("epoch", 0) - 1e-9), {})
        if "eval_loss" in entry and "val_loss" not in row:  # a later evaluation is not the epoch's
            row |= {f"val_{name}": entry[f"eval_{name}"] for name in _measured(entry, "eval_")}
        elif "accuracy" in entry:
            row |= {f"train_{name}": entry[name] for name in _measured(entry, "")}
            row |= {key: entry.get(key) for key in ("learning_rate", "grad_norm", "seconds")}
    return [{"epoch": epoch, **row} for epoch, row in sorted(rows.items()) if "train_loss" in row and "val_loss" in row]


def best_row(rows: list[dict], metric: str) -> dict:
    """The first row of `history` with the best validation "accuracy" or "loss", whose weights a trainer restores."""
    best = max if metric == "accuracy" else min
    return best(rows, key=lambda row: row[f"val_{metric}"])


def _measured(entry: dict, prefix: str) -> list[str]:
    names = [name.removeprefix(prefix) for name in entry if name.startswith(prefix)]
    measured = [name for name in names if name == "accuracy" or name.endswith("loss")]
    return sorted(measured, key=lambda name: (name != "loss", name == "accuracy", name))  # one order, resumed or not
