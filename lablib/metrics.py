"""Losses and accuracy: of the batches of an epoch, and by epoch in a run's history."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch


class BatchMeter:
    """Collects the losses and hits of batches on their device, without waiting for it until they are asked for.

    Each of several `processes` adds its share of a batch; all of them have to ask at the same time.
    """

    def __init__(self, processes: int = 1):
        self.processes = processes
        self.restore([])

    def __len__(self) -> int:
        return len(self._before) + sum(map(len, self._rows))

    def restore(self, batches: list[dict]) -> None:
        """Continue from earlier `batches()`, whatever the number of processes was."""
        self._before, self._names = batches, []
        self._rows: list[torch.Tensor] = []  # batches × (size, hits and losses)

    @torch.no_grad()
    def add(self, losses: dict[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch: its mean losses, its logits (batch × classes) and labels (batch)."""
        if unnamed := [name for name in losses if not name.endswith("loss")]:
            raise ValueError(f"`losses` gave {unnamed[0]!r}; the names of its terms must end in 'loss'")
        hits = (logits.argmax(1) == labels).sum()
        values = {"size": torch.full_like(hits, len(labels)), "hits": hits, **losses}
        self._names = [*values]
        self._rows.append(torch.stack([value.float() for value in values.values()])[None])
        if len(self._rows) == 64:  # many small tensors would fragment the memory between the tensors of a step
            self._rows = [torch.cat(self._rows)]

    def batches(self) -> list[dict[str, float]]:
        """Of each batch its size, hits and mean losses, exactly, also as JSON."""
        if not self._rows:
            return self._before
        rows = torch.cat(self._rows)
        if self.processes > 1:
            torch.distributed.all_reduce(rows)
        rows = rows.cpu().double()
        rows[:, 2:] /= self.processes  # the means are added up too
        return self._before + [dict(zip(self._names, row, strict=True)) for row in rows.tolist()]

    def means(self) -> dict[str, float]:
        """Each loss and the accuracy, averaged over images; the losses leave out batches whose loss is not finite."""
        batches = pd.DataFrame(self.batches())
        finite = batches[np.isfinite(batches["loss"])]
        losses = finite.drop(columns=["size", "hits"])
        means = {name: np.average(values, weights=finite["size"]).item() for name, values in losses.items()}
        return means | {"accuracy": (batches["hits"].sum() / batches["size"].sum()).item()}


def first_logits(outputs: Any) -> Any:
    """The logits in a model's output, which is either the logits or a tuple that begins with them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def are_probabilities(logits: torch.Tensor) -> bool:
    """Whether outputs (images × classes) are non-negative and sum to 1 for each image, as after a softmax."""
    return bool((logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3)


def history(log: list[dict]) -> list[dict]:
    """A run's metrics by epoch, from `trainer.state.log_history`.

    One dict per epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate, grad_norm (of the
    epoch's last step), seconds (since the run began); and the terms of the loss, if it has several, such as
    train_soft_loss and val_soft_loss.
    """
    rows: dict[int, dict] = {}
    for entry in log:
        row = rows.setdefault(math.ceil(entry.get("epoch", 0)), {})
        if "eval_loss" in entry and "train_loss" in row and "val_loss" not in row:  # the epoch's own, not a callback's
            row |= _renamed(entry, "eval_", "val_")
        elif "accuracy" in entry:
            row |= _renamed(entry, "", "train_")
            row |= {key: entry.get(key) for key in ("learning_rate", "grad_norm", "seconds")}
    return [{"epoch": epoch, **row} for epoch, row in sorted(rows.items()) if "val_loss" in row]


def _renamed(entry: dict, old: str, new: str) -> dict[str, float]:
    """The loss, its terms and the accuracy, always in the same order, also after a resume."""
    terms = {name.removeprefix(old) for name in entry if name.startswith(old) and name.endswith("loss")}
    return {new + name: entry[old + name] for name in ("loss", *sorted(terms - {"loss"}), "accuracy")}


def summary(rows: list[dict], metric: str, test: dict[str, float]) -> dict[str, float]:
    """A finished training, from its `history` and test metrics: epochs, the best one and its validation metrics, ...

    The best epoch, whose weights a trainer restores, is the first with the best validation `metric`.
    """
    best = (max if metric == "accuracy" else min)(rows, key=lambda row: row[f"val_{metric}"])
    validation = {name: best[name] for name in ("val_loss", "val_accuracy")}
    tested = {name: test[name] for name in ("test_loss", "test_accuracy") if test}
    return {"epochs": len(rows), "best_epoch": best["epoch"], **validation, **tested, "seconds": rows[-1]["seconds"]}
