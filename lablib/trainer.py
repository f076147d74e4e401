"""StreamlinedTrainer: one training of one model on one data set, on top of transformers.Trainer."""

import atexit
import contextlib
import functools
import gc
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from itertools import islice
from typing import Any

import safetensors.torch
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import PredictionOutput

from lablib.augmentation import augment
from lablib.checkpoints import ResumableTrainer, contiguous_weights
from lablib.config import TrainingConfig
from lablib.data import ImageBatches, ImageData, ShuffledBatches, stratified_split, stratified_subset
from lablib.distributed import DistributedTrainer, process_seed
from lablib.hardware import (
    check_device,
    deterministic_algorithms,
    fits,
    keep_freed_memory,
    memory_format,
    resolve_bf16,
    untouched,
)
from lablib.metrics import BatchMeter, combined, cross_entropy, evaluation_metrics
from lablib.tracking import ServiceCallback

_EVALUATION_PIXELS = 2**22  # at most in a batch that is larger than the training's
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


# what PyTorch, oneDNN and the GPUs' libraries say in a RuntimeError
_OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator", "bad_alloc", "ALLOC_FAILED", "could not create a memory")


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite."""


class SanityCheckError(RuntimeError):
    """The training would fail at its first step or hours later; it has not started."""


class StreamlinedTrainer(ResumableTrainer, DistributedTrainer):
    """Trains, validates after each epoch, stops early and restores the best weights; `.test()` evaluates the test set.

    The training set is split by class into a training and a validation part. Augmentation and normalisation happen in
    the training step, on the device, so that a resumed run draws the random numbers of an uninterrupted one (see
    `ResumableTrainer`). Callbacks, checkpoints and `torchrun` work as in any `transformers.Trainer`.

    Checkpoints go to `checkpoint_dir`, or to a temporary folder that is deleted with the trainer. `run_name` is the
    name in Weights & Biases and Telegram.
    Raises ValueError if the device does not exist. `train` raises SanityCheckError before its first step (see
    `sanity_check`), and NonFiniteLossError, naming epoch and step, for a loss that is NaN or infinite.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        data: ImageData,
        callbacks: Sequence[TrainerCallback] = (),
        checkpoint_dir: str | None = None,
        run_name: str | None = None,
    ):
        _freeze_imports()  # before there is a trainer, which would never be collected
        check_device(config.device)
        keep_freed_memory()
        self.config, self.data = config, data
        self.run_name = run_name or type(model).__name__
        if checkpoint_dir is None:
            checkpoint_dir = tempfile.mkdtemp(prefix="lablib-")
            weakref.finalize(self, shutil.rmtree, checkpoint_dir, ignore_errors=True)
        args = config.to_training_arguments(checkpoint_dir, bf16=resolve_bf16(config, model))
        args._n_gpu = min(args.n_gpu, 1)  # or Trainer multiplies the batch by the GPUs it sees
        at_once = _EVALUATION_PIXELS // data.train_images[0].numel()
        args.per_device_eval_batch_size = max(config.batch_size, min(args.per_device_eval_batch_size, at_once))
        device = args.device if fits(data, args.device) else torch.device("cpu")
        images, labels = data.train_images.to(device), data.train_labels.to(device)
        train, validation = stratified_split(data.train_labels, config.validation_split, config.seed)
        train = stratified_subset(train, data.train_labels, config.max_train_images, config.seed)
        patience = config.early_stopping_patience
        stopping = [EarlyStoppingCallback(patience)] if patience else []
        self._memory_format = memory_format(model, args.device, data.image_shape)
        self.checkpoint_seconds = config.checkpoint_seconds
        with _config_hidden(model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=ImageBatches(images, labels, train),
                eval_dataset=ImageBatches(images, labels, validation),
                data_collator=_as_it_is,
                compute_metrics=self._evaluated,
                callbacks=[*stopping, *callbacks],
            )
        self.model_accepts_loss_kwargs = False  # or a forward with **kwargs counts as one that scales its own loss
        if args.disable_tqdm:
            self.remove_callback(PrinterCallback)
        for callback in _services(self):
            self.add_callback(callback)
        mean, std = (s.to(args.device).view(-1, 1, 1) for s in data.channel_statistics)
        self._scale, self._offset = 1 / (255 * std), -mean / std
        self._since_last_log = BatchMeter()
        self._clock = time.perf_counter()
        self._final_test: dict[str, float] | None = None  # of the training that ended last

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Train until the last epoch or the early stop, then load the best weights; see `ResumableTrainer.train`."""
        with deterministic_algorithms(self.config.deterministic):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def before_training(self) -> None:
        """Run the sanity check, then seed and start the clock. Raises SanityCheckError."""
        sanity_check(self)
        transformers.set_seed(process_seed(self.args.seed, self.args.process_index))
        self._final_test = None
        self._since_last_log.forget()
        self._clock = time.perf_counter()

    def training_failed(self, error: BaseException) -> None:
        """Tell Weights & Biases and Telegram."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ServiceCallback):
                callback.on_train_failed(error)

    def progress(self) -> dict[str, Any]:
        """The measurements and seconds since the last epoch ended."""
        return {"measured": self._since_last_log.state(), "seconds": time.perf_counter() - self._clock}

    def restore_progress(self, progress: list[dict[str, Any]]) -> None:
        """Continue the measurements of the checkpoint."""
        measured = [of_process["measured"] for of_process in progress]
        if len(measured) != self.args.world_size:  # now the first process has it all
            total = combined(measured)
            measured = [total] + [tree_map(lambda value: 0, total)] * (self.args.world_size - 1)
        self._since_last_log.restore(measured[self.args.process_index])
        self._clock = time.perf_counter() - progress[0]["seconds"]

    def test(self) -> dict[str, float]:
        """Loss and accuracy on the test set with the current weights: after `train()`, those of the best epoch."""
        return self.predict_test().metrics

    def final_test(self) -> dict[str, float]:
        """The test result of the last training, computed once for all who ask: the run, W&B, Telegram."""
        if self._final_test is None:
            self._final_test = self.test()
        return dict(self._final_test)

    def predict_test(self) -> PredictionOutput:
        """Logits (images × classes), labels and metrics of the test set."""
        return self.predict(ImageBatches(self.data.test_images, self.data.test_labels), metric_key_prefix="test")

    def get_train_dataloader(self) -> DataLoader:
        """As upstream; a single process draws its batches as tensors of indices."""
        args = self.args
        if args.world_size > 1 or args.dataloader_num_workers or args.dataloader_drop_last:
            return super().get_train_dataloader()
        batches = ShuffledBatches(len(self.train_dataset), self._train_batch_size, args.data_seed)
        return self.accelerator.prepare(
            DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        )

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training  # an evaluation counts every image
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def prepare_images(self, images: torch.Tensor, training: bool) -> torch.Tensor:
        """uint8 images -> the model's input: augmented if training, normalised by the training set's statistics."""
        config = self.config
        pixels = images.to(torch.float32)
        if training and len(pixels):
            pixels = augment(
                pixels,
                config.rotation_degrees,
                config.translation_fraction,
                config.horizontal_flip,
                config.crop_padding,
            )
        return (pixels * self._scale + self._offset).contiguous(memory_format=self._memory_format)

    def outputs(self, model: nn.Module, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The model's logits (batch × classes), or a tuple that begins with them, as `losses` needs."""
        return model(images)

    def losses(self, outputs: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The "loss" to minimise and other terms to record by epoch, each a mean over the batch."""
        return cross_entropy(outputs, labels)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch, augmented in training."""
        labels = inputs["labels"]
        outputs = self.outputs(model, self.prepare_images(inputs["images"], model.training))
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        losses = self.losses(outputs, labels)
        if len(labels) == 0:  # the other processes have all of the last batch; this one contributes nothing
            losses = dict.fromkeys(losses, 0 * logits.sum())
        if model.training:
            self._since_last_log.add(losses, logits, labels)
        loss = losses["loss"] * inputs.get("weight", 1)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Outputs and labels of one batch; `evaluation_metrics` computes the losses of all batches at once."""
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            outputs = self.outputs(model, self.prepare_images(inputs["images"], training=False))
        return None, outputs, inputs["labels"]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The config's plain optimizer, with weight decay on every parameter."""
        if self.optimizer is None:
            config = self.config
            more = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
            if config.optimizer == "sgd":
                more = {"momentum": 0.9}
            parameters = list((model or self.model).parameters())
            more["fused"] = all(parameter.is_floating_point() for parameter in parameters) or None  # not of complex
            self.optimizer = _OPTIMIZERS[config.optimizer](
                parameters, lr=config.learning_rate, weight_decay=config.weight_decay, **more
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream; training loss and accuracy are means over the images since the last log."""
        if "loss" in logs and len(self._since_last_log):
            logs |= self._training_metrics()
        super().log(logs, start_time)

    def _get_grad_norm(self, model, grad_norm=None):
        # Upstream computes the norm in every step (a tenth of a small MLP's time) and logs it once per epoch.
        steps = math.ceil(len(self.callback_handler.train_dataloader) / self.args.gradient_accumulation_steps)
        if (self.state.global_step + 1) % steps == 0:
            return super()._get_grad_norm(model, grad_norm)
        return grad_norm

    def _training_metrics(self) -> dict[str, float]:
        measured = self._measured_by_all()  # the only time in an epoch that the device is waited for
        losses = measured.losses()["loss"]
        finite = losses.isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            batches = self.args.gradient_accumulation_steps  # a step
            step = self.state.global_step - math.ceil(len(losses) / batches) + first // batches + 1
            raise self._not_finite(f"training loss is {losses[first].item()}", f", step {step}")
        means = measured.means()
        self._since_last_log.forget()
        now = time.perf_counter()
        before = max((entry.get("seconds", 0.0) for entry in self.state.log_history), default=0.0)
        seconds, self._clock = before + now - self._clock, now
        return means | {"seconds": seconds}

    def _evaluated(self, prediction: EvalPrediction) -> dict[str, float]:
        metrics = evaluation_metrics(prediction, self.losses, self.args.device)
        if not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"loss of an evaluation is {metrics['loss']}")
        return metrics

    def _not_finite(self, what: str, where: str = "") -> NonFiniteLossError:
        return NonFiniteLossError(
            f"the {what} at epoch {math.ceil(self.state.epoch or 0)}{where}; "
            f"a smaller learning_rate than {self.config.learning_rate:g} or max_grad_norm=1.0 may help"
        )

    def _measured_by_all(self) -> BatchMeter:
        """The measurements since the last log; each process measures only its own images."""
        if self.args.world_size == 1:
            return self._since_last_log
        states = [None] * self.args.world_size
        torch.distributed.all_gather_object(states, self._since_last_log.state())
        whole = BatchMeter()
        whole.restore(combined(states))
        return whole


def sanity_check(trainer: StreamlinedTrainer) -> None:
    """Try what a training does on a few real images, so that it fails in the first seconds or not at all.

    An evaluation, the number of classes, a full batch and the last batch of an epoch (forward and backward), and the
    weights as safetensors. It leaves no trace (see `untouched`) and needs no other process.
    Raises SanityCheckError: which of these fails, what the network was given and returned, and the original error.
    """
    args, model = trainer.args, trainer.model
    training, validation = trainer.train_dataset, trainer.eval_dataset
    processes, batch, images = args.world_size, args.train_batch_size * args.world_size, len(training)
    if args.dataloader_drop_last and images < batch:
        raise SanityCheckError(f"dataloader_drop_last leaves none of {images} images: use a smaller batch_size")
    most = min(images, batch if processes == 1 else max(2, args.train_batch_size))  # of several, each has a share
    with untouched(trainer):
        trainer._since_last_log = BatchMeter()
        if args.bf16:  # accelerate does this when the training begins
            model.forward = convert_outputs_to_fp32(trainer.accelerator.autocast()(model.forward))
        last = (len(validation) - 1) % args.eval_batch_size + 1
        failure = _failure(trainer, "an evaluation", validation, min(last, 16))
        failure = failure or _failure(trainer, "a full batch", training, most)
        last = (images - 1) % batch + 1
        if not failure and last < most and not args.dataloader_drop_last:
            failure = _failure(trainer, "the last batch of an epoch", training, last)
            if failure:
                nearby = sorted(range(processes, batch + 9 * processes, processes), key=lambda size: abs(size - batch))
                lasts = ((size, min(most, (images - 1) % size + 1)) for size in nearby[1:17])
                works = (str(size) for size, last in lasts if not _failure(trainer, "", training, last))
                advice = f"Use batch_size = {' or '.join(islice(works, 2)) or images}, which leaves no such batch"
                drop = "training_arguments={'dataloader_drop_last': True}, which leaves it out"
                failure.args = (f"{failure}. {advice}, or {drop}",)
        if failure:
            raise failure
        try:
            safetensors.torch.save(contiguous_weights(model))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise SanityCheckError(f"no checkpoint of {type(model).__name__} can be written: {reason}") from error


def _failure(trainer: StreamlinedTrainer, what: str, dataset: ImageBatches, size: int) -> SanityCheckError | None:
    """Why a batch of the first images of a data set fails, or None."""
    model, seen = trainer.model, {}
    hooks = [
        model.register_forward_pre_hook(lambda _, inputs: seen.update(given=_shapes(inputs))),
        model.register_forward_hook(lambda _, inputs, outputs: seen.update(returned=_shapes(outputs))),
    ]
    try:
        batch = trainer._prepare_inputs(dataset.__getitems__(range(size)))
        if dataset is trainer.train_dataset:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model.train(), batch)
            loss.backward()
            return None
        _, outputs, labels = trainer.prediction_step(model.eval(), batch, prediction_loss_only=False)
        logits, data = outputs[0] if isinstance(outputs, tuple) else outputs, trainer.data
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != size:
            raise TypeError("a network must return logits, images × classes, or a tuple that begins with them")
        if (outs := logits.shape[1]) != data.num_classes:
            return SanityCheckError(f"the network gives {outs} outputs, and {data.name} has {data.num_classes} classes")
        evaluation_metrics(EvalPrediction(*nested_numpify((outputs, labels))), trainer.losses, trainer.args.device)
        return None
    except Exception as error:
        network = f". {type(model).__name__} was given {seen['given']}" if "given" in seen else ""
        network += f" and returned {seen['returned']}, which `losses` must accept" if "returned" in seen else ""
        failure = f"{what} ({size} of {len(dataset)} images) fails with {type(error).__name__}: {error}{network}"
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in _OUT_OF_MEMORY):
            failure = f"{what} ({size} images) does not fit into memory: use a smaller batch_size or image_size"
        failed = SanityCheckError(failure)
        failed.__cause__ = error
        return failed
    finally:
        for hook in hooks:
            hook.remove()


def _shapes(values) -> str:
    shapes = tree_map(lambda v: f"{v.dtype} {tuple(v.shape)}"[6:] if isinstance(v, torch.Tensor) else v, values)
    return str(shapes[0] if isinstance(values, tuple) and len(values) == 1 else shapes).replace("'", "")


@functools.cache
def _freeze_imports() -> None:
    """Spare the garbage collection with which accelerate starts each training all imported modules: 0.3 s per run."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or extension modules report leaks when the process ends


def _services(trainer: StreamlinedTrainer) -> list[ServiceCallback]:
    """The callbacks of the services that are switched on; the others are not imported."""
    callbacks = []
    if trainer.config.use_wandb:
        from lablib.tracking import WandbCallback

        callbacks.append(WandbCallback(trainer))
    if trainer.config.use_telegram_notifications:
        from lablib.telegram import TelegramCallback

        callbacks.append(TelegramCallback(trainer))
    return callbacks


class _WithoutConfig:
    config = property(lambda self: None)

    def __init_subclass__(cls):
        pass  # keeps the class below out of a registry in the user's __init_subclass__


@contextlib.contextmanager
def _config_hidden(model: nn.Module):
    """transformers mistakes a model's attribute `config` for its own kind of config and writes to it."""
    own_class = type(model)
    if not hasattr(model, "config") or isinstance(model, transformers.PreTrainedModel):
        yield
        return
    model.__class__ = type(own_class)(own_class.__name__, (_WithoutConfig, own_class), {})
    try:
        yield
    finally:
        model.__class__ = own_class


def _as_it_is(batch):
    return batch
