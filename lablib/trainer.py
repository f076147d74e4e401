"""StreamlinedTrainer trains one model on one data set: a transformers.Trainer with its own training loop."""

import math
import platform
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._pytree import tree_leaves, tree_map
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import nested_numpify
from transformers.trainer_utils import PredictionOutput, TrainOutput

from lablib import checkpoints, hardware
from lablib.augmentation import augment
from lablib.config import NOT_IDENTITY, TrainingConfig, warn
from lablib.data import ImageBatches, ImageData, fixed_sample, stratified_split, stratified_subset
from lablib.identity import LABLIB_VERSION
from lablib.metrics import BatchMeter, are_probabilities, first_logits, means

Outputs = torch.Tensor | tuple[torch.Tensor, ...]  # logits (batch × classes), or a tuple that begins with them

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
# methods of transformers.Trainer that this training loop does not call
_UNUSED = "get_train_dataloader", "_get_train_sampler", "prediction_step", "evaluation_loop", "_inner_training_loop"
_HINT = "a smaller learning_rate or max_grad_norm=1.0 may help"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLossError(ArithmeticError):
    """A loss became NaN or infinite."""


class SanityCheckError(RuntimeError):
    """Training has not started, because it would fail at its first step or hours later."""


class StreamlinedTrainer(transformers.Trainer):
    """Trains, validates after each epoch, stops early and restores the best weights; `.test()` evaluates the test set.

    The training set is split into a training and a validation part, stratified by class. Augmentation and normalisation
    happen in the training step, on the device. Callbacks, `create_optimizer` and `create_scheduler` work as in any
    `transformers.Trainer`; `outputs`, `losses` and `epoch_order` may also be overridden.

    Checkpoints go to `checkpoint_dir`, by default a temporary folder: every `checkpoint_seconds` within an epoch, at
    its end if the last is `seconds_between_epochs` old, and on SIGINT and SIGTERM. Resumed training ends as if it had
    never stopped; `notes` records changed versions and settings. If a callback asks to stop, the epoch is finished.

    `history` has a row per epoch: epoch, train_loss, train_accuracy, learning_rate and grad_norm (of the last step),
    seconds (since the run began), val_loss, val_accuracy, and the terms of the loss if there are several. `run_name` is
    the name in Weights & Biases and Telegram. `train` raises SanityCheckError before its first step (see
    `sanity_check`), and NonFiniteLossError for a loss that is NaN or infinite.
    """

    seconds_between_epochs = 60.0

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        data: ImageData,
        callbacks: Sequence[TrainerCallback] = (),
        checkpoint_dir: str | None = None,
        run_name: str | None = None,
    ):
        if unused := [n for n in _UNUSED if getattr(type(self), n) is not getattr(transformers.Trainer, n)]:
            raise ValueError(f"nothing calls {unused[0]}; see which methods of StreamlinedTrainer may be overridden")
        hardware.check_device(config.device)
        hardware.keep_memory()
        self.config, self.data = config, data
        self.run_name = run_name or type(model).__name__
        self.precision = hardware.resolve_precision(config, model)
        if checkpoint_dir is None:
            checkpoint_dir = tempfile.mkdtemp(prefix="lablib-")
            weakref.finalize(self, shutil.rmtree, checkpoint_dir, ignore_errors=True)
        args = config.to_training_arguments(checkpoint_dir)
        most = min(1000, 2**22 // data.train_images[0].numel())  # images with 4 million values in all
        args.per_device_eval_batch_size = max(config.batch_size, most)
        images, labels = data.train_images, data.train_labels
        if hardware.fits(images, args.device):
            images, labels = images.to(args.device), labels.to(args.device)
        train, validation = stratified_split(data.train_labels, config.validation_split, config.seed)
        train = stratified_subset(train, data.train_labels, config.max_train_images, config.seed)
        stopping = [EarlyStoppingCallback(patience)] if (patience := config.early_stopping_patience) else []
        self._memory_format = hardware.memory_format(model, args.device, data.image_shape)
        super().__init__(
            model=model,
            args=args,
            train_dataset=ImageBatches(images, labels, train),
            eval_dataset=ImageBatches(images, labels, validation),
            callbacks=[*stopping, *callbacks],
        )
        self.remove_callback(PrinterCallback)
        if config.use_wandb:
            from lablib.tracking import WandbCallback

            self.add_callback(WandbCallback(self))
        if config.use_telegram_notifications:
            from lablib.telegram import TelegramCallback

            self.add_callback(TelegramCallback(self))
        mean, std = (s.to(args.device).view(-1, 1, 1) for s in data.channel_statistics)
        self._scale, self._offset = 1 / (255 * std), -mean / std
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self._meter = BatchMeter(args.world_size)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Train, or resume from a checkpoint (a path, or True: the newest); load the best weights. Raises OSError."""
        path, saved = resume_from_checkpoint, None
        if path:
            saved = self._newest_checkpoint() if path is True else checkpoints.load_checkpoint(Path(path))
        self.is_in_train = True
        with hardware.algorithms(self.config.deterministic), checkpoints.Interruption() as self._interruption:
            try:
                self._begin(saved)
                while not self._stop:
                    self._train_epoch()
                    self._end_epoch()
                return self._finish()
            except BaseException as error:
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_train_failed"):  # Weights & Biases and Telegram
                        callback.on_train_failed(error)
                raise
            finally:
                self.is_in_train, self._trained = False, None  # it would keep the process group alive

    def _call(self, event: str, *more) -> None:  # the callbacks' methods
        self.control = getattr(self.callback_handler, event)(self.args, self.state, self.control, *more)

    def _begin(self, saved: dict[str, Any] | None) -> None:
        """Check, set up and seed everything, then continue from a checkpoint if there is one."""
        config, args, several = self.config, self.args, self.args.world_size > 1
        sanity_check(self)
        self.model.zero_grad()
        if several and args.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if config.torch_compile:
            self.model.compile()
        if self.state.global_step:  # trained before: start with a new optimizer and schedule
            self.optimizer = self.lr_scheduler = None
        if self.is_world_process_zero():  # those of another training, or damaged, would seem newer
            checkpoints.delete_checkpoints(Path(args.output_dir), saved["state"]["global_step"] if saved else -1)
        max_steps = config.num_epochs * self.steps_per_epoch
        self._scaler = torch.amp.GradScaler(args.device.type, enabled=self.precision == "fp16")
        self.optimizer = self.create_optimizer() or self.optimizer
        self.lr_scheduler = self.create_scheduler(max_steps, self.optimizer) or self.lr_scheduler
        self.callback_handler.optimizer, self.callback_handler.lr_scheduler = self.optimizer, self.lr_scheduler
        self._trained = DistributedDataParallel(self.model) if several else self.model
        self._meter, self.history, self._best_weights = BatchMeter(args.world_size), [], None
        self.notes, self.wandb_id, self._stop = [], secrets.token_hex(4), False
        first = {"is_world_process_zero": self.is_world_process_zero()}
        self.state = TrainerState(0.0, 0, max_steps, num_train_epochs=config.num_epochs, **first)
        transformers.set_seed((config.seed + args.process_index * 2_654_435_761) % 2**32)  # far from other seeds
        if saved:
            vars(self.state).update(saved["state"])
            self.history, self.notes, self.wandb_id = saved["history"], saved["notes"], saved["wandb_id"]
            if changed := [name for name, was in saved["environment"].items() if self.environment.get(name) != was]:
                self.notes.append(f"resumed at step {self.state.global_step} with another {', '.join(changed)}")
                warn(f"{args.output_dir}: {self.notes[-1]}; the result will carry this note")
        self._call("on_train_begin")
        self._clock = self._saved_at = time.monotonic()
        if saved:
            self._restore(saved)

    def _train_epoch(self) -> None:
        """Take the steps of an epoch, or those that are left."""
        epoch, done = divmod(self.state.global_step, self.steps_per_epoch)
        if not done:
            self._call("on_epoch_begin")
        order = self.epoch_order(epoch).to(self.train_dataset.indices.device)
        for number, positions in enumerate(order.split(self.config.batch_size)[done:], done + 1):
            self._call("on_step_begin")
            if self.args.world_size > 1:  # fill up the last batch with the epoch's first images; each takes its share
                filled = torch.cat([positions, order])[: self.config.batch_size]
                positions = filled.chunk(self.args.world_size)[self.args.process_index]
            batch = self._prepare_inputs(self.train_dataset.__getitems__(positions))
            self.training_step(self._trained, batch)
            self._update()
            self.state.global_step += 1
            self.state.epoch = epoch + number / self.steps_per_epoch
            self._call("on_step_end")
            if number < self.steps_per_epoch:
                if self.control.should_evaluate or self.control.should_log or self.control.should_epoch_stop:
                    advice = "let it ask in on_epoch_end, or set max_train_images for shorter epochs"
                    raise ValueError(f"a callback asks to evaluate, log or stop within an epoch; {advice}")
                if self.args.world_size == 1 or number % 50 == 0:  # it takes time for all processes to agree
                    self._save_if_due(0 if self.control.should_save else self.config.checkpoint_seconds)

    def epoch_order(self, epoch: int) -> torch.Tensor:
        """An epoch's positions in `train_dataset`, as many as it has images; the order follows from the seed."""
        generator = torch.Generator().manual_seed(self.config.seed + epoch)
        return torch.randperm(len(self.train_dataset), generator=generator)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        model.train()
        loss = self.compute_loss(model, inputs)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        """Clip the gradients and take a step; fp16's loss scaler skips it if they overflow."""
        limit, parameters = self.config.max_grad_norm, [p for p in self.model.parameters() if p.grad is not None]
        self._scaler.unscale_(self.optimizer)
        if limit or self.is_last_step():
            self._grad_norm = get_total_norm([p.grad for p in parameters])
        if limit:
            clip_grads_with_norm_(parameters, limit, self._grad_norm)
        self._call("on_pre_optimizer_step")
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._call("on_optimizer_step")
        self._learning_rate = self.optimizer.param_groups[0]["lr"]
        self.lr_scheduler.step()
        self.model.zero_grad()
        self.optimizer.zero_grad()  # it may have further parameters, such as those of a loss

    def is_last_step(self) -> bool:  # of an epoch
        return (self.state.global_step + 1) % self.steps_per_epoch == 0

    def _end_epoch(self) -> None:
        """Validate, keep the weights if they are the best so far, and write a checkpoint if one is due."""
        args, state = self.args, self.state
        self._call("on_epoch_end")
        batches = self._meter.batches()  # the only wait for the device in an epoch
        self._meter = BatchMeter(args.world_size)
        finite = batches["loss"].map(math.isfinite)
        if not (finite.any() if self._scaler.is_enabled() else finite.all()):  # fp16's loss scaler skips some steps
            step = state.global_step - len(batches) + finite.idxmin() + 1
            raise NonFiniteLossError(f"training loss is not finite in epoch {state.epoch:.0f}, step {step}; {_HINT}")
        trained = means(batches)
        last = {"learning_rate": self._learning_rate, "grad_norm": self._grad_norm.item()}
        last["seconds"] = time.monotonic() - self._clock
        self.log(trained | last)
        validated = self.evaluate()
        if not math.isfinite(validated["eval_loss"]):
            raise NonFiniteLossError(f"validation loss is not finite in epoch {state.epoch:.0f}; {_HINT}")
        value, best = validated[args.metric_for_best_model], state.best_metric
        if better := best is None or (value > best if args.greater_is_better else value < best):
            self._best_weights = checkpoints.contiguous_weights(self.model)
        row = {f"train_{name}": value for name, value in trained.items()} | last
        row |= {name.replace("eval_", "val_", 1): value for name, value in validated.items()}
        self.history.append({"epoch": round(state.epoch), **row})
        self.log(dict(validated))
        self._call("on_evaluate", validated)
        if better:  # only now, as early stopping compares with the best so far
            state.best_metric, state.best_global_step = value, state.global_step
        self._stop = self.control.should_training_stop or state.epoch == args.num_train_epochs
        self._save_if_due(self.seconds_between_epochs)

    def _finish(self) -> TrainOutput:
        metrics = {"train_loss": self.history[-1]["train_loss"], "train_runtime": time.monotonic() - self._clock}
        self.log(dict(metrics))
        self.model.load_state_dict(self._best_weights)
        self._call("on_train_end")
        return TrainOutput(self.state.global_step, metrics["train_loss"], metrics)

    def prepare_images(self, images: torch.Tensor, training: bool) -> torch.Tensor:
        """uint8 images -> the model's input: augmented if training, normalised by the training set's statistics."""
        config, pixels = self.config, images.float()
        if training:
            knobs = config.rotation_degrees, config.translation_fraction, config.horizontal_flip, config.crop_padding
            pixels = augment(pixels, *knobs)
        return (pixels * self._scale + self._offset).contiguous(memory_format=self._memory_format)

    def outputs(self, model: nn.Module, images: torch.Tensor) -> Outputs:
        """The input of `losses`: a model's logits, from a dict if it returns one, or a tuple that begins with them."""
        outputs = model(images)
        return outputs["logits"] if isinstance(outputs, dict) and "logits" in outputs else outputs

    def losses(self, outputs: Outputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The "loss" to minimise and any other terms to record per epoch, each a mean over the batch."""
        return {"loss": F.cross_entropy(outputs, labels)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one batch, augmented in training."""
        outputs = self.run_model(model, inputs["images"], model.training)
        losses = self.losses(outputs, inputs["labels"])
        if model.training:
            self._meter.add(losses, first_logits(outputs), inputs["labels"])
        return (losses["loss"], outputs) if return_outputs else losses["loss"]

    def run_model(self, model: nn.Module, images: torch.Tensor, training: bool = False) -> Outputs:
        """Outputs for uint8 images on the device, computed in the run's precision and returned in float32."""
        pixels, half = self.prepare_images(images, training), _HALF.get(self.precision)
        with torch.autocast(self.args.device.type, half, enabled=half is not None):
            outputs = self.outputs(model, pixels)
        return tree_map(lambda t: t.float() if isinstance(t, torch.Tensor) and t.dtype == half else t, outputs)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The config's optimizer, with weight decay on all parameters."""
        if self.optimizer is None:
            config = self.config
            options = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
            options |= {"momentum": 0.9} if config.optimizer == "sgd" else {}
            parameters = [*self.model.parameters()]
            self.optimizer = _OPTIMIZERS[config.optimizer](parameters, **options)
            if config.optimizer == "sgd":  # else uninitialised if fp16's loss scaler skips the first step
                self.optimizer.state |= {p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters}
        return self.optimizer

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss and accuracy on the validation images or other `ImageBatches`, with the current weights."""
        return self.predict(eval_dataset or self.eval_dataset, metric_key_prefix=metric_key_prefix).metrics

    def test(self) -> dict[str, float]:
        """Loss and accuracy on the test set with the current weights; after `train()`, these are the best epoch's."""
        return self.predict().metrics

    @torch.no_grad()
    def predict(self, test_dataset=None, ignore_keys=None, metric_key_prefix="test") -> PredictionOutput:
        """Outputs, labels and metrics, by default of the test set; losses are computed over all images at once."""
        test_dataset = test_dataset or ImageBatches(self.data.test_images, self.data.test_labels)
        if self.args.world_size > 1:
            for buffer in self.model.buffers():  # on CPUs, batch norm statistics differ between processes
                torch.distributed.broadcast(buffer, 0)
        self.model.eval()
        parts = []
        for positions in torch.arange(len(test_dataset)).split(self.args.per_device_eval_batch_size):
            batch = self._prepare_inputs(test_dataset.__getitems__(positions))
            parts.append((self.run_model(self.model, batch["images"]), batch["labels"]))
        outputs, labels = tree_map(lambda *tensors: torch.cat(tensors), *parts)
        metrics = {name: value.item() for name, value in self.losses(outputs, labels).items()}
        metrics["accuracy"] = (first_logits(outputs).argmax(1) == labels).sum().item() / len(labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return PredictionOutput(nested_numpify(outputs), labels.cpu().numpy(), metrics)

    def _newest_checkpoint(self) -> dict[str, Any] | None:
        """The content of the newest undamaged checkpoint, or None; a warning names damaged ones."""
        for path in checkpoints.checkpoints_in(Path(self.args.output_dir)):
            try:
                return checkpoints.load_checkpoint(path)
            except OSError as error:
                warn(f"{error}; training resumes from an earlier checkpoint, if any, or starts again")

    def _save_if_due(self, seconds: float) -> None:
        """Write a checkpoint if the last one is that old, or if a signal arrived, after which training ends."""
        asked, old = self._interruption.asked, time.monotonic() - self._saved_at >= seconds
        if self.args.world_size > 1:  # all processes must agree
            flags = torch.tensor([asked, old], dtype=torch.int32, device=self.args.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            asked, old = flags.tolist()
        if asked or old:
            self._write_checkpoint()
            self._call("on_save")
        if asked:
            self._interruption.leave()

    def _write_checkpoint(self) -> None:
        state, callbacks, several = self.state, self.callback_handler.callbacks, self.args.world_size > 1
        everyone = [hardware.random_states()]
        if several:
            torch.distributed.all_gather_object(everyone := [None] * self.args.world_size, hardware.random_states())
        kept = ("epoch", "global_step", "log_history", "best_metric", "best_global_step")
        content = {
            "environment": self.environment,
            "state": {name: getattr(state, name) for name in kept},
            "history": self.history,
            "notes": self.notes,
            "wandb_id": self.wandb_id,
            "seconds": time.monotonic() - self._clock,
            "stop": (self._stop, self.control.should_training_stop),
            "callbacks": [c.state()["attributes"] for c in callbacks if hasattr(c, "from_state")],
            "batches": self._meter.batches().to_dict("list"),
            "weights": self.model.state_dict(),
            "best_weights": self._best_weights,
            "frozen": [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": everyone,
        }
        if self.is_world_process_zero():
            checkpoints.save_checkpoint(Path(self.args.output_dir, f"checkpoint-{state.global_step}.pt"), content)
        if several:
            torch.distributed.barrier()
        self._saved_at = time.monotonic()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Restore the rest of a checkpoint, after the callbacks' `on_train_begin`, which may have set weights."""
        self.model.load_state_dict(saved["weights"])
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name not in saved["frozen"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in self.optimizer.state.items():  # fused ones mix up values in a different memory format
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self.lr_scheduler.load_state_dict(saved["scheduler"])
        if saved["scaler"]:
            self._scaler.load_state_dict(saved["scaler"])
        stateful = (c for c in self.callback_handler.callbacks if hasattr(c, "from_state"))
        for callback, attributes in zip(stateful, saved["callbacks"], strict=False):
            vars(callback).update(attributes)
        self._stop, self.control.should_training_stop = saved["stop"]
        self._best_weights = saved["best_weights"]
        self._meter.restore(saved["batches"], self.args.device)
        self._clock = time.monotonic() - saved["seconds"]
        hardware.restore_random_states(saved["random"][self.args.process_index % len(saved["random"])])

    @cached_property
    def environment(self) -> dict[str, str]:
        """What should be the same when training resumes: settings, versions, device, number of processes."""
        return {
            **{name: str(value) for name, value in vars(self.config).items() if name not in NOT_IDENTITY},
            **{name: version(name) for name in ("torch", "transformers")},
            "python": platform.python_version(),
            "lablib": LABLIB_VERSION,
            "precision": self.precision,
            "device": self.args.device.type,
            "processes": str(self.args.world_size),
        }


def sanity_check(trainer: StreamlinedTrainer) -> None:
    """Try an evaluation, a full batch and an epoch's last batch, so that training fails in seconds rather than hours.

    The model is left unchanged. Raises SanityCheckError, which says what failed and what the network was given.
    """
    model, train, size = trainer.model, trainer.train_dataset, trainer.config.batch_size
    name, processes = type(model).__name__, trainer.args.world_size
    attributes = [leaf for module in model.modules() for leaf in tree_leaves(vars(module))]
    unregistered = {leaf for leaf in attributes if isinstance(leaf, nn.Module)} - {*model.modules()}
    if any(p.requires_grad for module in unregistered for p in module.parameters()):
        what = f"{name} holds layers in a plain list or dict, so they would not be trained"
        raise SanityCheckError(f"{what}; use nn.ModuleList or nn.ModuleDict, or freeze them")
    tries = [("an evaluation", trainer.eval_dataset, 16, ""), ("a full batch", train, size // processes, "")]
    if len(train) > size and processes == 1:  # several processes fill up the last batch
        tries.append(("the last batch of an epoch", train, len(train) % size or size, ". Use another batch_size"))
    for what, dataset, number, advice in tries:
        number = min(number, len(dataset))
        batch = trainer._prepare_inputs(dataset.__getitems__(fixed_sample(len(dataset), number)))
        try:
            with hardware.untouched(model):
                _try_training(trainer, batch) if dataset is train else _try_evaluation(trainer, batch)
        except Exception as error:
            if should_reduce_batch_size(error):  # out of memory
                advice = ". Use a smaller batch_size or image_size"
            given = f"{name} was given float32 {(number, *trainer.data.image_shape)}{advice}"
            failed = f"{what} ({number} of {len(dataset)} images) fails with {type(error).__name__}: {error}"
            raise SanityCheckError(f"{failed}. {given}") from error


def _try_training(trainer: StreamlinedTrainer, batch: dict[str, torch.Tensor]) -> None:
    trainer._meter = BatchMeter()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    recorded = trainer._meter.batches().get("loss", [None])[0]
    if recorded is None or abs(loss.item() - recorded) > 0.01 * abs(recorded):
        raise TypeError("the history would not show the loss of compute_loss; override `losses` or `outputs` instead")


@torch.no_grad()
def _try_evaluation(trainer: StreamlinedTrainer, batch: dict[str, torch.Tensor]) -> None:
    model, data = trainer.model, trainer.data
    model.eval()
    outputs = trainer.run_model(model, batch["images"])
    logits = first_logits(outputs)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise TypeError("a network must return logits (images × classes), or a tuple that begins with them")
    if (number := logits.shape[1]) != data.num_classes:
        raise ValueError(f"the network has {number} outputs, but {data.name} has {data.num_classes} classes")
    takes_logits = type(trainer).losses.__module__.startswith("lablib.")
    if takes_logits and (are_probabilities(logits) or logits.min() == 0 < logits.max()):
        raise ValueError("the network ends in a softmax or a ReLU, but the loss takes logits; remove it")
    losses = trainer.losses(outputs, batch["labels"])
    if not isinstance(losses, dict) or "loss" not in losses or any(value.ndim for value in losses.values()):
        raise TypeError('`losses` must return a dict of scalar tensors with the key "loss"')
    trainer.predict(ImageBatches(batch["images"], batch["labels"]))
    model.load_state_dict(checkpoints.contiguous_weights(model))  # as for the best epoch
