"""One training on several processes (`torchrun`), which is the training of one process with the same batch."""

from collections.abc import Sequence

import torch
import transformers
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset


class Share(Dataset):
    """One process's share of the batches of a data set that gives whole batches (`__getitems__`).

    The shares differ by one image at most and have no image twice; one of the last batch may be empty. "weight" makes
    the mean over the processes of their mean losses the mean over the batch's images.
    """

    def __init__(self, dataset: Dataset, process: int, processes: int):
        self.dataset, self.process, self.processes = dataset, process, processes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, torch.Tensor | float]:
        mine = positions[self.process :: self.processes]
        batch = self.dataset.__getitems__(mine or positions[:1])
        if not mine:
            batch = {name: values[:0] for name, values in batch.items()}
        return batch | {"weight": self.processes * len(mine) / len(positions)}


class DistributedTrainer(transformers.Trainer):
    """A transformers.Trainer whose processes share out each batch, and normalise it as one batch.

    The batch is `per_device_train_batch_size` times the processes. Upstream's loader gives each process other batches,
    and some images twice where the last one is not full.
    """

    def train(self, *args, **kwargs):
        """As `transformers.Trainer.train`."""
        if self.args.world_size > 1:
            _share_batch_norms(self.model, self.args.device)
        return super().train(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The loader of one process with the whole batch, of which this process gets its share."""
        processes = self.args.world_size
        if processes == 1:
            return super().get_train_dataloader()
        loader = self._get_dataloader(
            Share(self.train_dataset, self.args.process_index, processes),
            description="Training",
            batch_size=processes * self._train_batch_size,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )
        shard = loader.batch_sampler  # accelerate's, which is to pass on every batch
        shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader


class SharedBatchNorm(_BatchNorm):
    """Batch norm over the images of all processes, as PyTorch's SyncBatchNorm, which is for GPUs only."""

    def _check_input_dim(self, input):
        pass

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not torch.distributed.is_initialized():
            return super().forward(x)
        others = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.float()
        count = _Sum.apply(values.new_tensor(x.numel() // x.shape[1]))
        mean = _Sum.apply(values.sum(others)) / count
        centred = values - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(others)) / count
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * count / (count - 1))
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return (centred * (scale * self.weight).view(shape) + self.bias.view(shape)).to(x.dtype)
        return (centred * scale.view(shape)).to(x.dtype)

    def _track(self, mean: torch.Tensor, variance: torch.Tensor):
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance, momentum)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _Sum.forward(ctx, gradient)


def _share_batch_norms(model: nn.Module, device: torch.device):
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SharedBatchNorm


def process_seed(seed: int, process: int) -> int:
    """The seed of one of the processes: the run's own for the first, and far from other runs' for the others."""
    return (seed + process * 2_654_435_761) % 2**32
