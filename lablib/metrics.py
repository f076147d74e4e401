"""What is measured: of all predictions at once, and of a run by epoch."""

import math

import numpy as np
import torch
from torch.nn import functional as F
from transformers import EvalPrediction


def history(log: list[dict]) -> list[dict]:
    """A run's metrics by epoch, from `trainer.state.log_history`.

    One dict an epoch: epoch, train_loss, train_accuracy, val_loss, val_accuracy, learning_rate, grad_norm (of the
    epoch's last step), seconds (since the run began).
    """
    rows: dict[int, dict] = {}
    for entry in log:
        row = rows.setdefault(math.ceil(entry.get("epoch", 0) - 1e-9), {})
        if "eval_loss" in entry and "val_loss" not in row:  # a later evaluation is not the epoch's
            row |= {"val_loss": entry["eval_loss"], "val_accuracy": entry["eval_accuracy"]}
        elif "accuracy" in entry:
            row |= {"train_loss": entry["loss"], "train_accuracy": entry["accuracy"]}
            row |= {key: entry.get(key) for key in ("learning_rate", "grad_norm", "seconds")}
    return [{"epoch": epoch, **row} for epoch, row in sorted(rows.items()) if "train_loss" in row and "val_loss" in row]


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Mean cross-entropy and accuracy over all images, each counted once."""
    logits, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
    loss = F.cross_entropy(logits.double(), labels).item()
    return {"loss": loss, "accuracy": float(np.mean(prediction.predictions.argmax(1) == prediction.label_ids))}
