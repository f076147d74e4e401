"""Whether a training's batch fits into memory, tried before the training."""

import contextlib
import copy
import random
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lablib.hardware import keep_freed_memory, return_freed_memory

_SMALL, _SMALLER = 8, 4  # images in the batches that an estimate is made from
_PLENTY = 3.0  # so many times of what a training needs are free: what it frees may be kept for its next step
_MARGIN = 1.25  # a batch is advised if one of so many times its size fits too: a training takes more than a pass
_GIB = 2**30
_CGROUPS = Path("/sys/fs/cgroup")
# what PyTorch, oneDNN and the GPUs' libraries say in a RuntimeError
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "ALLOC_FAILED", "could not create a memory")


class BatchTooLargeError(MemoryError):
    """A batch of the size that is asked for does not fit into memory."""


def check_batch_fits(trainer) -> None:
    """Take one forward and backward pass of a full training batch, on a copy of the model; no trace of it is left.

    On the CPU a batch that would need more than is free, by an estimate from small batches, is not tried, since Linux
    may end a process that takes too much instead of refusing it. The optimizer's own tensors are in the estimate only;
    the batches of evaluations are not looked at. With `auto_find_batch_size` nothing is checked, as the trainer then
    finds a batch size itself, nor a model that cannot be copied. Each process of a distributed training checks for
    itself.

    Raises BatchTooLargeError that says which smaller batch was tried and fits.
    """
    if trainer.args.auto_find_batch_size:
        return
    device = trainer.args.device
    try:
        model = copy.deepcopy(trainer.model).to(device).train()  # the bare one, also in a distributed training
    except RuntimeError:
        return  # it keeps a tensor with its history, such as an activation, which PyTorch does not copy
    wanted = min(trainer.args.train_batch_size, len(trainer.train_dataset))
    keep_freed_memory(False)  # or pieces of what the trial takes would be missing in the training
    with _random_states_kept(device):
        needed = _needed_bytes(trainer, model, wanted)
        if needed is not None:
            plenty = needed * _PLENTY <= free_memory(device)
            keep_freed_memory() if plenty else return_freed_memory()
            return
        smaller = [wanted >> halvings for halvings in range(1, wanted.bit_length())]
        fitting = next((n for n in smaller if _needed_bytes(trainer, model, n, _MARGIN) is not None), None)
    place = "the cpu" if device.type == "cpu" else f"the GPU {device}"
    return_freed_memory()
    free = f" ({free_memory(device) / _GIB:.1f} GiB free)"
    if fitting is None:
        raise BatchTooLargeError(
            f"not even a batch of one image fits into the memory of {place}{free}: take a smaller model, or scale the "
            "images down, as load_data(..., image_size=32) does"
        )
    raise BatchTooLargeError(
        f"a batch of {wanted} images does not fit into the memory of {place}{free}; "
        f"{fitting} was tried and fits: write batch_size={fitting}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device: of the machine, its control group and its own limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free = [psutil.virtual_memory().available, *_free_in_control_groups()]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        used = psutil.Process().memory_info()
        for kind, taken in ((resource.RLIMIT_AS, used.vms), (resource.RLIMIT_DATA, getattr(used, "data", 0))):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                free.append(limit - taken)
    return max(0, min(free))


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, as long as something holds them, such as a tensor or autograd.

    `timeline` has the bytes after each operation, `peak` the most of them. Storages of the tensors in `known` do not
    count. It sees no operation's own scratch memory.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.timeline: list[int] = [0]
        self._bytes = 0
        self._storages = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    @property
    def peak(self) -> int:
        return max(self.timeline)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage not in self._storages:
                self._storages.add(storage)
                self._bytes += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self.timeline.append(self._bytes)
        return result

    def _forget(self, size: int):
        self._bytes -= size


def _needed_bytes(trainer, model: nn.Module, images: int, margin: float = 1.0) -> float | None:
    """What a training with batches of so many images takes on the CPU (on a GPU 0), or None if it does not fit."""
    device = trainer.args.device
    on_cpu = device.type == "cpu"
    estimated = 0.0
    try:
        if on_cpu and images > _SMALL:
            estimated = _estimated_bytes(trainer, model, images)
            if estimated * _PLENTY > free_memory(device):
                return_freed_memory()
            if estimated * margin > free_memory(device):
                return None
        timeline = _pass(trainer, model, int(images * margin), measured=on_cpu)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return_freed_memory()
        return None
    return max(estimated, *timeline)  # the pass takes more if what it takes does not grow linearly


def _estimated_bytes(trainer, model: nn.Module, images: int) -> float:
    """What a training with batches of so many images takes beside its weights, at most.

    What lives at a moment of a pass grows linearly with the batch, in parts that depend on the moment: the weights'
    gradients not at all, activations in proportion. So each moment is extrapolated by itself.
    """
    moments_of_adam = 2 * sum(parameter.nbytes for parameter in model.parameters())
    timeline = _pass(trainer, model, _SMALL, measured=True)
    upper_bound = max(timeline) * images / _SMALL + moments_of_adam
    if upper_bound * _PLENTY <= free_memory(trainer.args.device):
        return upper_bound
    growth = (images - _SMALL) / (_SMALL - _SMALLER)
    pairs = zip(_pass(trainer, model, _SMALLER, measured=True), timeline, strict=False)
    return max(small + (small - smaller) * growth for smaller, small in pairs) + moments_of_adam


def _pass(trainer, model: nn.Module, images: int, measured: bool = False) -> list[int]:
    """One forward and backward pass; if measured, the bytes of what lives in it, after each operation."""
    model.zero_grad()
    batch = trainer._prepare_inputs(trainer.train_dataset.__getitems__(range(images)))
    live = LiveBytes([*model.parameters(), *model.buffers(), *batch.values()])
    try:
        with live if measured else contextlib.nullcontext():
            # a model gets its precision from accelerate only when the training begins
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                loss = trainer.compute_loss(model, batch)
            loss.backward()
    finally:
        trainer._since_last_log.forget()
    return live.timeline


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        sign in str(error) for sign in _OUT_OF_MEMORY
    )


@contextlib.contextmanager
def _random_states_kept(device: torch.device):
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _free_in_control_groups() -> list[int]:
    """Bytes left in this process's control group (version 2) and in those around it, where they have a limit.

    The cache of files counts as free, since the system gives it up for a process that needs memory.
    """
    free = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        group = _CGROUPS / next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(_CGROUPS):
                break
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max" in it
                limit = int((folder / "memory.max").read_text())
                used = int((folder / "memory.current").read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(limit - used + int(stat["inactive_file"]) + int(stat["active_file"]))
    return free
