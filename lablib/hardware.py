"""What the machine offers for training: devices, precision, memory."""

import contextlib
import ctypes
import gc
import os
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig

# for `deterministic`: PyTorch reads it once, at the first matrix product on a GPU, perhaps long before training
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_lock = threading.RLock()


def check_device(device: str) -> None:
    """Raise ValueError if this machine does not have the device."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps}
    if device in backends and not backends[device].is_available():
        raise ValueError(f"device = {device!r}, but PyTorch finds no such device here; write 'auto' or 'cpu'")


def resolve_precision(config: TrainingConfig, model: nn.Module) -> str:
    """A run's precision; "auto" is the fastest here for its network. Raises ValueError for fp16 without a CUDA GPU."""
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    if config.precision == "fp16" and not on_gpu:
        raise ValueError("precision = 'fp16' needs a CUDA GPU; write 'bf16', 'fp32' or 'auto'")
    if config.precision != "auto":
        return config.precision  # with "fp32", GPUs use TF32 in convolutions
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "fp32"
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else "fp32"


def memory_format(model: nn.Module, device: torch.device, image_shape: Sequence[int]) -> torch.memory_format:
    """The fastest memory format for a model's images (channels, height, width): channels last for convolutions.

    On a GPU, the weights are converted too. Models that fail on such images, as with `view`, get contiguous ones. So do
    models on a CPU with strided 1 × 1 convolutions of fewer than 16 channels: oneDNN (up to 3.13 at least) writes past
    its workspace, which ruins gradients or ends the process (https://github.com/uxlfoundation/oneDNN/issues/6035).
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    narrow = [c for c in convolutions if c.kernel_size == (1, 1) and c.in_channels // c.groups < 16]
    overflows = device.type == "cpu" and any(max(convolution.stride) > 1 for convolution in narrow)
    if device.type not in ("cpu", "cuda") or not convolutions or overflows:
        return torch.contiguous_format
    images = torch.zeros(2, *image_shape, device=convolutions[0].weight.device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    with contextlib.suppress(Exception), untouched(model), torch.no_grad():
        model.eval()
        model(images.contiguous(memory_format=torch.channels_last))
        return torch.channels_last
    model.to(memory_format=torch.contiguous_format)
    return torch.contiguous_format  # the sanity check reports anything else that is wrong with the model


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On exit, restore a model's weights, buffers, modes, hooks and other attributes, and the dicts among them."""
    dicts = [vars(module) for module in model.modules()]
    dicts += [value for attributes in dicts for value in attributes.values() if isinstance(value, dict)]
    old_dicts = [dict(each) for each in dicts]
    # only tensors are copied, since some models cannot be
    old_tensors = {t: t.detach().clone() for each in dicts for t in each.values() if isinstance(t, torch.Tensor)}
    try:
        yield
    finally:
        for now, old in zip(dicts, old_dicts, strict=True):
            now.clear()
            now.update(old)
        for now, old in old_tensors.items():
            if not torch.equal(now, old):  # an expanded tensor cannot be written to
                now.data.copy_(old)


def random_states() -> dict[str, Any]:
    """The random states of Python, NumPy, PyTorch and the current GPU, in a form that checkpoints can store."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    states = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "cpu": torch.get_rng_state()}
    if torch.accelerator.is_available():
        states["gpu"] = torch.get_device_module().get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if "gpu" in states and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(states["gpu"])


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """On exit, restore the random states. They belong to the process, so only one thread may enter at a time."""
    with _lock, contextlib.ExitStack() as afterwards:
        afterwards.callback(restore_random_states, random_states())
        yield


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Use a GPU's fastest algorithms, or reproducible ones (https://pytorch.org/docs/stable/notes/randomness.html)."""
    enabled, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled or deterministic)
    torch.backends.cudnn.benchmark = not (enabled or deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.backends.cudnn.benchmark = benchmark


def fits(tensor: torch.Tensor, device: torch.device) -> bool:
    """Whether a tensor takes less than half of a GPU's free memory; True on any other device."""
    if device.type != "cuda":
        return True
    gc.collect()  # frees what an earlier training left behind
    torch.cuda.empty_cache()
    return 2 * tensor.nbytes < torch.cuda.mem_get_info(device)[0]


def keep_memory() -> None:
    """Let glibc keep freed memory: page faults take ten times as long as an elementwise operation on a batch."""
    with contextlib.suppress(OSError, AttributeError):  # without glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
