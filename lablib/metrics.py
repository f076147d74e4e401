"""Losses and accuracy of batches and runs."""

from typing import Any

import numpy as np
import pandas as pd
import torch


class BatchMeter:
    """Collects the sizes, hits and losses of batches on the device, and waits for it only when asked for them."""

    def __init__(self, processes: int = 1):
        self.processes = processes
        self._names: list[str] = []
        self._rows: list[torch.Tensor] = []  # batches × (size, hits and mean losses)

    @torch.no_grad()
    def add(self, losses: dict[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add one batch: its mean losses, its logits (batch × classes) and labels (batch)."""
        hits = (logits.argmax(1) == labels).sum()
        self._names = ["size", "hits", *losses]
        values = [torch.full_like(hits, len(labels)), hits, *losses.values()]
        self._rows.append(torch.stack([value.float() for value in values])[None])
        if len(self._rows) == 64:  # many small tensors would fragment the device's memory
            self._rows = [torch.cat(self._rows)]

    def batches(self) -> pd.DataFrame:
        """One row per batch: size, hits and mean losses, over all processes, which must call this together."""
        if not self._rows:
            return pd.DataFrame()
        rows = torch.cat(self._rows)
        if self.processes > 1:
            torch.distributed.all_reduce(rows)
        rows = rows.cpu().double()
        rows[:, 2:] /= self.processes  # all_reduce added up the means too
        return pd.DataFrame(rows.numpy(), columns=self._names)

    def restore(self, batches: dict[str, list[float]], device: torch.device) -> None:
        """Continue from earlier `batches()`, whatever the number of processes was then."""
        if batches:
            rows = torch.tensor([*batches.values()], dtype=torch.float64).T
            rows[:, :2] /= self.processes
            self._names, self._rows = [*batches], [rows.float().to(device)]


def means(batches: pd.DataFrame) -> dict[str, float]:
    """Each loss and the accuracy, averaged over images. The losses ignore batches whose loss is not finite."""
    finite = batches[np.isfinite(batches["loss"])]
    losses = finite.drop(columns=["size", "hits"])
    averages = {name: np.average(values, weights=finite["size"]).item() for name, values in losses.items()}
    return averages | {"accuracy": (batches["hits"].sum() / batches["size"].sum()).item()}


def first_logits(outputs: Any) -> Any:
    """The logits in a model's output, which is either the logits or a tuple that begins with them."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def are_probabilities(logits: torch.Tensor) -> bool:
    """Whether outputs (images × classes) are non-negative and sum to 1 per image, as after a softmax."""
    return bool((logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3)


def summary(rows: list[dict], metric: str, test: dict[str, float]) -> dict[str, float]:
    """Summarise a finished training: epochs, best epoch, its validation metrics, ... The best epoch, whose weights the
    trainer restores, is the first with the best validation `metric`.
    """
    best = (max if metric == "accuracy" else min)(rows, key=lambda row: row[f"val_{metric}"])
    validation = {name: best[name] for name in ("val_loss", "val_accuracy")}
    tested = {name: test[name] for name in ("test_loss", "test_accuracy") if test}
    return {"epochs": len(rows), "best_epoch": best["epoch"], **validation, **tested, "seconds": rows[-1]["seconds"]}
