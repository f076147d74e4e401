"""What a model costs: multiply-adds, bytes on disk and in memory, time per batch."""

import statistics
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd
import safetensors.torch
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lablib.checkpoints import contiguous_weights
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
    return len(safetensors.torch.save(contiguous_weights(model)))


@torch.no_grad()
def peak_memory(model: nn.Module, image_shape: Sequence[int], batch: int = 128) -> int:
    """Peak bytes of the tensors alive in a forward pass in eval mode: the images and all that is computed from them.

    Neither weights (see `bytes_on_disk`) nor an operation's scratch memory count. `image_shape` is (channels, height,
    width).
    """
    images = torch.zeros(batch, *image_shape, device=next(model.parameters()).device)
    with eval_mode(model), _LiveBytes([images, *model.parameters(), *model.buffers()]) as live:
        model(images)
    return images.nbytes + live.peak


@torch.no_grad()
def latency(
    models: Mapping[str, nn.Module],
    image_shape: Sequence[int],
    batch_sizes: Sequence[int] = (1, 128),
    repeats: int = 10,
    rounds: int = 5,
) -> pd.DataFrame:
    """Time of a forward pass in eval mode, one row per model and batch size.

    Columns: model, batch, milliseconds (median), images_per_second, device, threads. The models take turns for several
    `rounds`, so that a busy machine slows all of them alike; a turn is `repeats` passes after two to warm up. They stay
    on their device and in their precision.
    Raises ValueError for fewer than one repeat or round.
    """
    if min(repeats, rounds) < 1:
        raise ValueError(f"repeats = {repeats} and rounds = {rounds}, but both must be whole numbers above 0")
    seconds = defaultdict(list)
    for _, batch, (name, model) in product(range(rounds), batch_sizes, models.items()):
        images = torch.zeros(batch, *image_shape, device=next(model.parameters()).device)
        with eval_mode(model):
            seconds[name, batch] += [_timed(model, images) for _ in range(2 + repeats)][2:]
    rows = []
    for (name, batch), times in seconds.items():
        median = statistics.median(times)
        row = {"model": name, "batch": batch, "milliseconds": 1e3 * median, "images_per_second": batch / median}
        rows.append(row | {"device": next(models[name].parameters()).device.type})
    return pd.DataFrame(rows).assign(threads=torch.get_num_threads())


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make for as long as a tensor holds them; those of `known` do not count."""

    def __init__(self, known):
        super().__init__()
        self.peak = self._bytes = 0
        self._storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)):
            if storage not in self._storages:
                self._storages.add(storage)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.peak = max(self.peak, self._bytes)
        return result

    def _forget(self, size: int):
        self._bytes -= size


def _timed(model: nn.Module, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    if images.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start
