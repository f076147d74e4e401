"""StreamlinedTrainer: trains one model on one data set, on top of transformers.Trainer."""

import atexit
import contextlib
import difflib
import functools
import gc
import inspect
import io
import math
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence

import accelerate.optimizer
import numpy as np
import torch
import transformers
from accelerate.utils import broadcast, convert_outputs_to_fp32
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau  # the config's schedules are LambdaLR
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, default_convert
from transformers import EarlyStoppingCallback, EvalPrediction, PrinterCallback, TrainerCallback
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import PredictionOutput

from lablib.augmentation import augment
from lablib.checkpoints import ResumableTrainer, contiguous_weights
from lablib.config import TrainingConfig, warn, warn_once
from lablib.data import ImageBatches, ImageData, ShuffledBatches, fixed_sample, stratified_split, stratified_subset
from lablib.hardware import check_device, fits, keep_memory, memory_format, resolve_precision, untouched
from lablib.metrics import BatchMeter, are_probabilities, first_logits
from lablib.models import unprepared

Outputs = torch.Tensor | tuple[torch.Tensor, ...]  # logits (batch × classes), or a tuple that begins with them

_NUMPY = [np.dtype, type(np.dtype(float)), np.float64().__reduce__()[0]]  # of a saved schedule with a float64
# methods of transformers.Trainer that only its own optimizer needs, or that it no longer calls
_UNUSED = {"create_optimizer_and_scheduler", "get_optimizer_cls_and_kwargs", "get_decay_parameter_names"}
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite."""


class SanityCheckError(RuntimeError):
    """The training would fail at its first step or hours later; it has not started."""


class StreamlinedTrainer(ResumableTrainer, transformers.Trainer):
    """Trains, validates after each epoch, stops early and restores the best weights; `.test()` evaluates the test set.

    The training set is split by class into a training and a validation part. Augmentation and normalisation happen in
    the training step, on the device, so that a resumed run draws the random numbers of an uninterrupted one (see
    `ResumableTrainer`). Callbacks and checkpoints work as in any `transformers.Trainer`. Checkpoints go to
    `checkpoint_dir`, or to a temporary folder that is deleted with the trainer. `run_name` is the name in Weights &
    Biases and Telegram. `train` prints nothing; add transformers' `ProgressCallback` for a bar.

    Under `torchrun` accelerate splits each batch among the processes, each of which draws its own augmentation and
    dropout; docs/scaling.md says how the result compares with that of one process.

    Raises ValueError for a device that does not exist, and for what would silently change results. `train` raises
    SanityCheckError before its first step (see `sanity_check`), and NonFiniteLossError, naming epoch and step, for a
    loss that is NaN or infinite.
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
        _avoid_overhead()  # first: a trainer that existed by then would never be collected
        callbacks = [*callbacks]
        _refuse_unused(type(self), callbacks)
        check_device(config.device)
        keep_memory()
        if hasattr(model, "config") and not isinstance(model, transformers.PreTrainedModel):
            raise ValueError("transformers would write to the model's attribute `config`; give it another name")
        self.config, self.data = config, data
        self.run_name = run_name or type(model).__name__
        if checkpoint_dir is None:
            checkpoint_dir = tempfile.mkdtemp(prefix="lablib-")
            weakref.finalize(self, shutil.rmtree, checkpoint_dir, ignore_errors=True)
        args = config.to_training_arguments(checkpoint_dir, precision=resolve_precision(config, model))
        args._n_gpu = min(args.n_gpu, 1)  # or Trainer multiplies the batch by the GPUs it sees
        most = min(1000, 2**22 // data.train_images[0].numel())  # as many images as hold 4 million values
        args.per_device_eval_batch_size = max(config.batch_size, most) // args.world_size * args.world_size
        images, labels = data.train_images, data.train_labels
        if fits(images, args.device):
            images, labels = images.to(args.device), labels.to(args.device)
        train, validation = stratified_split(data.train_labels, config.validation_split, config.seed)
        train = stratified_subset(train, data.train_labels, config.max_train_images, config.seed)
        patience = config.early_stopping_patience
        self._memory_format = memory_format(unprepared(model), args.device, data.image_shape)
        super().__init__(
            model=model,
            args=args,
            train_dataset=ImageBatches(images, labels, train),
            eval_dataset=ImageBatches(images, labels, validation),
            data_collator=default_convert,
            compute_metrics=self._evaluated,
            callbacks=[*([EarlyStoppingCallback(patience)] if patience else []), *callbacks],
        )
        self.model_accepts_loss_kwargs = False  # or a forward with **kwargs counts as one that scales its own loss
        self.remove_callback(PrinterCallback)
        if config.use_wandb:
            from lablib.tracking import WandbCallback

            self.add_callback(WandbCallback(self))
        if config.use_telegram_notifications:
            from lablib.telegram import TelegramCallback

            self.add_callback(TelegramCallback(self))
        mean, std = (s.to(args.device).view(-1, 1, 1) for s in data.channel_statistics)
        self._scale, self._offset = 1 / (255 * std), -mean / std

    def before_training(self) -> None:
        """Run the sanity check, then seed and start the clock. Raises SanityCheckError."""
        if self.model_wrapped is self.model:  # not if several processes have wrapped it already
            unprepared(self.model)
        sanity_check(self)
        if self.args.world_size > 1 and self.args.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if self.config.torch_compile:  # in place: transformers would also compile all later runs of this process
            self.model.compile()
        transformers.set_seed((self.args.seed + self.args.process_index * 2_654_435_761) % 2**32)  # not a nearby seed
        self._since_last_log = BatchMeter(self.args.world_size)
        self._clock = time.monotonic()

    def test(self) -> dict[str, float]:
        """Loss and accuracy on the test set with the current weights: after `train()`, those of the best epoch."""
        return self.predict_test().metrics

    def predict_test(self) -> PredictionOutput:
        """Logits (images × classes), labels and metrics of the test set."""
        return self.predict(ImageBatches(self.data.test_images, self.data.test_labels), metric_key_prefix="test")

    def get_train_dataloader(self) -> DataLoader:
        """As upstream; a single process draws its batches as tensors of indices."""
        if self.args.world_size > 1:
            return super().get_train_dataloader()
        data, seed = self.train_dataset, self.args.data_seed
        own = type(self)._get_train_sampler is not transformers.Trainer._get_train_sampler
        sampler = self._get_train_sampler(data) if own else None
        batches = ShuffledBatches(len(data), self._train_batch_size, seed, data.indices.device, sampler)
        return self.accelerator.prepare(DataLoader(data, batch_sampler=batches, collate_fn=default_convert))

    def prepare_images(self, images: torch.Tensor, training: bool) -> torch.Tensor:
        """uint8 images -> the model's input: augmented if training, normalised by the training set's statistics."""
        config, pixels = self.config, images.float()
        if training:
            knobs = config.rotation_degrees, config.translation_fraction, config.horizontal_flip, config.crop_padding
            pixels = augment(pixels, *knobs)
        return (pixels * self._scale + self._offset).contiguous(memory_format=self._memory_format)

    def use_precision(self, model: nn.Module) -> None:
        """Let a model compute in the run's precision, as accelerate does when a training begins."""
        if self.args.bf16 or self.args.fp16:
            model.forward = convert_outputs_to_fp32(self.accelerator.autocast()(model.forward))

    def outputs(self, model: nn.Module, images: torch.Tensor) -> Outputs:
        """The model's logits (batch × classes), or a tuple that begins with them, as `losses` needs.

        A model may also return a dict with the key "logits", as those of transformers do.
        """
        outputs = model(images)
        return outputs["logits"] if isinstance(outputs, dict) and "logits" in outputs else outputs

    def losses(self, outputs: Outputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The "loss" to minimise and other terms to record by epoch, each a mean over the batch."""
        return {"loss": F.cross_entropy(outputs, labels)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch, augmented in training."""
        outputs = self.outputs(model, self.prepare_images(inputs["images"], model.training))
        losses = self.losses(outputs, inputs["labels"])
        if model.training:
            self._since_last_log.add(losses, first_logits(outputs), inputs["labels"])
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def training_step(self, *args, **kwargs):
        """As upstream. Raises ValueError for a learning rate that would not be what its author meant."""
        schedule, best = self.lr_scheduler, "max" if self.args.greater_is_better else "min"
        if isinstance(schedule, ReduceLROnPlateau) and schedule.mode != best:
            metric = self.config.early_stopping_metric
            raise ValueError(f"ReduceLROnPlateau is given the validation {metric}; write mode={best!r}")
        groups = self.optimizer.param_groups
        if isinstance(schedule, LambdaLR) and [group["lr"] for group in groups] != schedule.get_last_lr():
            raise ValueError("a learning rate was set outside the schedule, which resets it; override create_scheduler")
        if not self.state.global_step:
            self._check_optimizer()
        return super().training_step(*args, **kwargs)

    def _check_optimizer(self):
        """Raise ValueError for an optimizer or a schedule that no checkpoint could restore; warn of epochs."""
        schedule, steps = self.lr_scheduler, len(self.callback_handler.train_dataloader)
        for name in ("step_size", "milestones", "T_max", "T_0"):
            value = vars(schedule).get(name)
            last = max(value, default=None) if isinstance(value, (dict, list, tuple)) else value
            if isinstance(last, (int, float)) and last <= self.config.num_epochs < self.state.max_steps:
                what = f"{type(schedule).__name__}'s {name} counts batches, of which an epoch has {steps}"
                warn_once(f"{what}; if you mean epochs, multiply it by {steps}")
        if {p for group in self.optimizer.param_groups for p in group["params"]} - {*self.model.parameters()}:
            raise ValueError("the optimizer has parameters that are not the network's; register them in the network")
        states = [self.optimizer.state_dict(), self.lr_scheduler.state_dict()]
        try:
            torch.save(states, saved := io.BytesIO())
            with torch.serialization.safe_globals(_NUMPY):
                torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
        except Exception as error:
            advice = "their attributes must be Python's numbers, strings, lists, dicts or tensors"
            raise ValueError(f"no checkpoint could restore the optimizer or the schedule: {advice}") from error

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Outputs and labels of one batch; `_evaluated` computes the losses of all batches at once."""
        inputs = self._prepare_inputs(inputs)
        outputs = self.outputs(model, self.prepare_images(inputs["images"], training=False))
        return None, outputs, inputs["labels"]

    def _evaluate(self, *args, **kwargs):
        # until `evaluation_loop` has the epoch's result: the only one that may stop the training or be the best
        self._evaluating_epoch = True
        return super()._evaluate(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As upstream; during training, extra evaluations only measure, or they would count towards early stopping."""
        if not self.is_in_train or (self._evaluating_epoch and eval_dataset is None):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self.predict(dataset, ignore_keys, metric_key_prefix).metrics

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """As upstream; an epoch's weights are kept, since a callback may change them before they prove the best."""
        broadcast([*self.model.buffers()])  # all processes take the first one's, such as a CPU's batch norm statistics
        ends_epoch = self.is_in_train and description == "Evaluation"  # else `predict` calls this
        with torch.random.fork_rng(devices=[], enabled=self.is_in_train and not ends_epoch):
            output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if ends_epoch:
            self._evaluated_weights, self._evaluating_epoch = contiguous_weights(self.model), False
            if not math.isfinite(loss := output.metrics["eval_loss"]):
                raise self._not_finite(f"evaluation loss is {loss}")
        return output

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The config's plain optimizer, with weight decay on every parameter."""
        if self.optimizer is None:
            config = self.config
            options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
            options |= {"momentum": 0.9} if config.optimizer == "sgd" else {}
            parameters = [*(model or self.model).parameters()]
            self.optimizer = _OPTIMIZERS[config.optimizer](parameters, **options)
            if config.optimizer == "sgd":  # or it stays uninitialised if fp16's loss scaler skips the first step
                self.optimizer.state |= {p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters}
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint):
        with torch.serialization.safe_globals(_NUMPY):
            super()._load_optimizer_and_scheduler(checkpoint)
        for parameter, state in self.optimizer.state.items():  # fused optimizers mix up values in another memory format
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler:  # an fp16 training may be resumed in another precision
            super()._load_scaler(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As upstream; training loss and accuracy are means over the images since the last log."""
        if "loss" in logs and len(self._since_last_log):
            logs |= self._training_metrics()
        super().log(logs, start_time)

    def is_last_step(self) -> bool:
        """Whether the current step is the last one of an epoch."""
        return (self.state.global_step + 1) % len(self.callback_handler.train_dataloader) == 0

    def _get_grad_norm(self, model, grad_norm=None):
        # Upstream computes the norm in every step (a tenth of a small MLP's time) and logs it once per epoch.
        return super()._get_grad_norm(model, grad_norm) if self.is_last_step() else grad_norm

    def _training_metrics(self) -> dict[str, float]:
        losses = [batch["loss"] for batch in self._since_last_log.batches()]  # the only wait for the device in an epoch
        wrong = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong and not (self.args.fp16 and len(wrong) < len(losses)):  # the loss scaler of fp16 skips such a step
            step = self.state.global_step - len(losses) + wrong[0] + 1
            raise self._not_finite(f"training loss is {losses[wrong[0]]}", f", step {step}")
        means = self._since_last_log.means()
        self._since_last_log = BatchMeter(self.args.world_size)
        return means | {"seconds": time.monotonic() - self._clock}

    @torch.no_grad()
    def _evaluated(self, prediction: EvalPrediction) -> dict[str, float]:
        """Losses and accuracy over all images at once, since a weighted loss is not a mean over batches."""
        arrays, device = (prediction.predictions, prediction.label_ids), self.args.device  # that of `losses`' tensors
        outputs, labels = tree_map(lambda array: torch.from_numpy(array).to(device), arrays)
        metrics = {name: value.item() for name, value in self.losses(outputs, labels).items()}
        return metrics | {"accuracy": (first_logits(outputs).argmax(1) == labels).sum().item() / len(labels)}

    def _not_finite(self, what: str, where: str = "") -> NonFiniteLossError:
        advice = f"a smaller learning_rate than {self.config.learning_rate:g} or max_grad_norm=1.0 may help"
        return NonFiniteLossError(f"the {what} at epoch {math.ceil(self.state.epoch or 0)}{where}; {advice}")


def sanity_check(trainer: StreamlinedTrainer) -> None:
    """Try what training does on a few real images, so that it fails in the first seconds or not at all.

    An evaluation, whose outputs must be logits, one for each class, and whose weights are kept and loaded; a full batch
    and the last batch of an epoch (forward and backward). It leaves the model as it was (see `untouched`) and needs no
    other process.
    Raises SanityCheckError, which says what failed, what the network was given, and the original error.
    """
    model, processes, number = trainer.model, trainer.args.world_size, len(trainer.train_dataset)
    full, last = min(number, trainer.args.train_batch_size // processes), number % trainer.args.train_batch_size
    attributes = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    unregistered = {leaf for leaf in attributes if isinstance(leaf, nn.Module)} - {*model.modules()}
    if any(p.requires_grad for module in unregistered for p in module.parameters()):
        what = f"{type(model).__name__} holds layers in a list or dict of Python, so they would not be trained"
        raise SanityCheckError(f"{what}; use nn.ModuleList or nn.ModuleDict, or freeze them")
    with untouched(model):
        trainer._since_last_log = BatchMeter()
        trainer.use_precision(model)
        _try(trainer, "an evaluation", trainer.eval_dataset, min(len(trainer.eval_dataset), 16))
        _try(trainer, "a full batch", trainer.train_dataset, full)
        if not len(trainer._since_last_log):
            raise SanityCheckError("compute_loss recorded nothing; override `losses` or `outputs` instead of it")
        if 0 < last < full and processes == 1:  # several processes fill it up
            _try(trainer, "the last batch of an epoch", trainer.train_dataset, last, ". Use another batch_size")


def _try(trainer: StreamlinedTrainer, what: str, dataset: ImageBatches, size: int, advice: str = "") -> None:
    """Evaluate some images of a data set, or compute the gradients of a training step."""
    model, data = trainer.model, trainer.data
    try:
        batch = trainer._prepare_inputs(dataset.__getitems__(fixed_sample(len(dataset), size)))
        model.train(dataset is trainer.train_dataset)
        if dataset is trainer.train_dataset:
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            recorded = [{}, *trainer._since_last_log.batches()][-1].get("loss", math.nan)
            if abs(loss.item() - recorded) > 0.01 * abs(recorded):
                warn_once(
                    "histories show the loss of `losses`, but compute_loss returns another; override `losses` instead"
                )
            return
        _, outputs, labels = trainer.prediction_step(model, batch, prediction_loss_only=False)
        logits = first_logits(outputs)
        if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
            raise TypeError("a network must return logits (images × classes), or a tuple that begins with them")
        if not all(isinstance(part, torch.Tensor) and part.shape[:1] == (size,) for part in tree_leaves(outputs)):
            raise TypeError("each output must be a tensor whose first dimension is the images")
        if (number := logits.shape[1]) != data.num_classes:
            raise ValueError(f"the network has {number} outputs, but {data.name} has {data.num_classes} classes")
        if type(trainer).losses.__module__.startswith("lablib.") and are_probabilities(logits):
            raise ValueError("the network returns probabilities, but the loss takes logits; remove its final softmax")
        if are_probabilities(logits) or logits.min() == 0 < logits.max():
            warn(f"{type(model).__name__} ends in a softmax or ReLU; a loss on logits needs the values before it")
        losses = trainer.losses(outputs, labels)
        if not isinstance(losses, dict) or "loss" not in losses or any(value.ndim for value in losses.values()):
            raise TypeError('`losses` must return a dict of scalar tensors with the key "loss"')
        trainer._evaluated(EvalPrediction(*nested_numpify((outputs, labels))))
        model.load_state_dict(contiguous_weights(model))  # as the best epoch's
    except Exception as error:
        network = f"{type(model).__name__} was given float32 {(size, *data.image_shape)}"
        advice = ". Use a smaller batch_size or image_size" if should_reduce_batch_size(error) else advice
        if "shapes cannot be multiplied" in str(error):
            number = math.prod(data.image_shape)
            advice = f". Flattened (nn.Flatten()), an image has {number} values; lablib's MLPs need image_shape"
        words = f"{what} ({size} of {len(dataset)} images) fails with {type(error).__name__}: {error}. {network}"
        raise SanityCheckError(words + advice) from error


def _refuse_unused(trainer: type[StreamlinedTrainer], callbacks: Sequence[TrainerCallback]) -> None:
    """Raise ValueError for methods that look as if they were called, but are not."""
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for callback in callbacks:
        kind = callback if isinstance(callback, type) else type(callback)
        methods = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.startswith("on_")]
        for name in {*methods} - {*events, "on_train_failed"}:
            if known := difflib.get_close_matches(name, events, n=1):
                raise ValueError(f"{kind.__name__}.{name} is no event of a TrainerCallback; {known[0]} is one")
    own = {name for name in dir(trainer) if getattr(trainer, name) is not getattr(StreamlinedTrainer, name, None)}
    if "loss" in own and not own & {"losses", "compute_loss"} and inspect.isfunction(trainer.loss):
        raise ValueError(f"nothing calls {trainer.__name__}.loss; write losses, or use another name")
    if (unused := sorted(own & _UNUSED)) and "create_optimizer" not in own:
        raise ValueError(f"nothing calls {trainer.__name__}.{unused[0]}; write create_optimizer and create_scheduler")


@functools.cache
def _avoid_overhead() -> None:
    """Avoid two costs in accelerate: a garbage collection over all imported modules at the start of each training
    (0.3 s), and a search of the disk for an optional package twice per step (6 to 10 % of an MLP's step)."""
    with contextlib.suppress(AttributeError):  # absent in another version
        accelerate.optimizer.is_lomo_available = functools.cache(accelerate.optimizer.is_lomo_available)
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or extension modules report leaks when the process ends
