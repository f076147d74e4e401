"""What a model costs: multiply-adds, bytes on disk, time for a batch."""

import statistics
import time
from collections.abc import Sequence

import pandas as pd
import safetensors.torch
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lablib.diagnostics import eval_mode


@torch.no_grad()
def multiply_adds(model: nn.Module, image_shape: Sequence[int]) -> int:
    """Multiplications with an addition for one image, counted by `torch.utils.flop_counter` (two operations each).

    `image_shape` is (channels, height, width). Normalisation, activations and pooling are not counted.
    """
    device = next(model.parameters()).device
    with eval_mode(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *image_shape, device=device))
    return counter.get_total_flops() // 2


def bytes_on_disk(model: nn.Module) -> int:
    """Size of the model's weights as a safetensors file, in bytes."""
    return len(safetensors.torch.save({k: v.contiguous().cpu() for k, v in model.state_dict().items()}))


@torch.no_grad()
def latency(
    model: nn.Module, image_shape: Sequence[int], batch_sizes: Sequence[int] = (1, 128), repeats: int = 50
) -> pd.DataFrame:
    """Time of a forward pass, one row a batch size: batch, milliseconds (median), images_per_second, device, threads.

    The model is measured in eval mode where it is, in its own precision, after a warm-up of a fifth of the repeats.
    Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}, but it must be a whole number above 0")
    device = next(model.parameters()).device
    rows = []
    with eval_mode(model):
        for batch in batch_sizes:
            images = torch.zeros(batch, *image_shape, device=device)
            seconds = [_timed(model, images) for _ in range(repeats // 5 + repeats)][repeats // 5 :]
            median = statistics.median(seconds)
            rows.append({"batch": batch, "milliseconds": 1e3 * median, "images_per_second": batch / median})
    return pd.DataFrame(rows).assign(device=device.type, threads=torch.get_num_threads())


def _timed(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
