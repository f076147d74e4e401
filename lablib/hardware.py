"""What a machine can do for a training: its devices, its precision, its memory."""

import contextlib
import copy
import ctypes
import gc
import os
from collections.abc import Sequence

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
    return torch.channels_last if _takes_channels_last(model, image_shape) else torch.contiguous_format


@torch.no_grad()
def _takes_channels_last(model: nn.Module, image_shape: Sequence[int]) -> bool:
    trial = copy.deepcopy(model).cpu().eval()
    try:
        trial(torch.zeros(2, *image_shape).contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        return False
    return True


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


def keep_freed_memory(kept: bool = True):
    """Let glibc keep the memory of freed tensors for the next step, or from now on give it back.

    By default it returns each block above its threshold to the system, and every step pays for the page faults again:
    ten times the price of an elementwise operation on a batch of MNIST. But what it keeps falls into pieces, so that a
    training takes up to twice the memory of its tensors. Elsewhere than on glibc this does nothing.
    """
    mmap_threshold, trim_threshold = (1 << 28, 1 << 30) if kept else (1 << 20, 1 << 20)  # bytes
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, mmap_threshold)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, trim_threshold)  # M_TRIM_THRESHOLD


def return_freed_memory():
    """Give back to the system what is kept of freed tensors, and from now on keep none: for where memory is scarce."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
    keep_freed_memory(False)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
