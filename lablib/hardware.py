"""What a machine can do for a training: its devices, its precision, its memory."""

import contextlib
import ctypes
import os
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from lablib.config import TrainingConfig
from lablib.data import ImageData


def resolve_bf16(config: TrainingConfig, model: nn.Module) -> bool:
    """Whether a run computes in bfloat16: by the config, or where it is faster.

    That is, for convolutions on a processor or GPU with bfloat16 units (AMX or AVX-512 BF16 on x86), which take half to
    two thirds of the time; small linear layers gain nothing.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if not has_convolutions(model):
        return False
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def memory_format(model: nn.Module, device: torch.device, image_shape: Sequence[int]) -> torch.memory_format:
    """How images lie in memory where a model is fastest: channels last for convolutions.

    Not so on a processor for a network with strided 1 × 1 convolutions of fewer than 16 channels: oneDNN (to 3.13 at
    least) then writes past its workspace, which ruins gradients or ends the process
    (https://github.com/uxlfoundation/oneDNN/issues/6035). Nor for a model that does not take such images, as one that
    flattens its features with `view` does not; it is tried. `image_shape` is (channels, height, width).
    """
    if device.type not in ("cpu", "cuda") or not has_convolutions(model):
        return torch.contiguous_format
    if device.type == "cpu" and any(_overflows(module) for module in model.modules()):
        return torch.contiguous_format
    return torch.channels_last if takes_channels_last(model, image_shape) else torch.contiguous_format


@torch.no_grad()
def takes_channels_last(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether a model takes images of (channels, height, width) that lie in memory channels last."""
    images = torch.zeros(2, *image_shape, device=next(model.parameters(), torch.empty(0)).device)
    with untouched(model):
        try:
            model.eval()(images.contiguous(memory_format=torch.channels_last))
        except Exception:  # what else is wrong with the model, the sanity check says
            return False
    return True


@contextlib.contextmanager
def untouched(owner: object):
    """Leave a model, or a trainer and the models that it holds, as they were, and the random states too.

    That is weights, buffers, gradients, modes and plain attributes, but not what is in a list that a model fills. The
    models begin without gradients. Nothing is copied but tensors, since a model may hold what cannot be copied.
    """
    models = [held for held in (owner, *vars(owner).values()) if isinstance(held, nn.Module)]
    modules = {module for model in models for module in model.modules()}
    places = [p for module in modules for p in (vars(module), module._parameters, module._buffers, module._modules)]
    places.append(vars(owner))
    contents = [dict(place) for place in places]
    tensors = {id(t): t for content in contents for t in content.values() if isinstance(t, torch.Tensor)}.values()
    values = [tensor.detach().clone() for tensor in tensors]
    leaves = [(tensor, tensor.grad) for tensor in tensors if tensor.is_leaf]
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    for tensor, _ in leaves:
        tensor.grad = None
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for place, content in zip(places, contents, strict=True):
            place.clear()
            place.update(content)
        for tensor, value in zip(tensors, values, strict=True):
            if not torch.equal(tensor, value):
                tensor.data.copy_(value)
        for tensor, gradient in leaves:
            tensor.grad = gradient


def _overflows(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and set(module.kernel_size) == {1}
        and max(module.stride) > 1
        and module.in_channels // module.groups < 16
    )


def has_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def check_device(device: str):
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(device, True):
        there = ", ".join(["'auto'", "'cpu'", *(repr(name) for name in present if present[name])])
        raise ValueError(f"device = {device!r}, but this machine has none that PyTorch can use; write one of {there}")


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool):
    """PyTorch's deterministic algorithms, which give the same bits each time on a GPU and take longer.

    https://pytorch.org/docs/stable/notes/randomness.html; the settings are as before at the end.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


def fits(data: ImageData, device: torch.device) -> bool:
    """Whether the training images may live on the device: in half of the memory that is free there."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return data.train_images.nbytes < free / 2


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next step; without glibc this does nothing.

    By default it returns each block above its threshold to the system, and every step pays for the page faults again:
    ten times the price of an elementwise operation on a batch of MNIST. But what it keeps falls into pieces, so that a
    training takes up to twice the memory of its tensors.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
