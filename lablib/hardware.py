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
    """Whether a run computes in bfloat16: as the config says, or where it is faster.

    It is for convolutions on a processor or GPU with bfloat16 units (AMX or AVX-512 BF16 on x86), which take half to
    two thirds of the time. Small linear layers gain nothing.
    """
    if config.precision != "auto":
        return config.precision == "bf16"
    if not has_convolutions(model):
        return False
    if config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def memory_format(model: nn.Module, device: torch.device, image_shape: Sequence[int]) -> torch.memory_format:
    """The fastest memory format for a model's images of (channels, height, width): channels last for convolutions.

    There are two exceptions. On a processor, strided 1 × 1 convolutions of fewer than 16 channels make oneDNN (up to
    3.13 at least) write past its workspace, which ruins gradients or ends the process
    (https://github.com/uxlfoundation/oneDNN/issues/6035). And some models fail on such images, for instance where they
    flatten features with `view`; this is tried.
    """
    if device.type not in ("cpu", "cuda") or not has_convolutions(model):
        return torch.contiguous_format
    if device.type == "cpu" and any(_overflows(module) for module in model.modules()):
        return torch.contiguous_format
    return torch.channels_last if takes_channels_last(model, image_shape) else torch.contiguous_format


@torch.no_grad()
def takes_channels_last(model: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether a model accepts channels-last images of (channels, height, width)."""
    images = torch.zeros(2, *image_shape, device=next(model.parameters(), torch.empty(0)).device)
    with untouched(model):
        try:
            model.eval()(images.contiguous(memory_format=torch.channels_last))
        except Exception:  # if something else is wrong with the model, the sanity check says so
            return False
    return True


@contextlib.contextmanager
def untouched(owner: object):
    """Afterwards restore a model, or a trainer with the models it holds, and the random states.

    Restores weights, buffers, gradients, modes and plain attributes, but not the contents of lists. Inside, gradients
    are None. Only tensors are copied, since a model as a whole may not be.
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
    """PyTorch's deterministic algorithms, slower and bitwise reproducible on a GPU; restores the settings afterwards.

    https://pytorch.org/docs/stable/notes/randomness.html
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
    """Whether the training images fit into half of the device's free memory."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return data.train_images.nbytes < free / 2


def keep_freed_memory():
    """Let glibc keep the memory of freed tensors for the next step; elsewhere this does nothing.

    By default it returns large blocks to the system, and every step pays for the page faults again: ten times the cost
    of an elementwise operation on a batch of MNIST. Fragmentation may double a training's memory in return.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 28)  # M_MMAP_THRESHOLD, bytes
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
