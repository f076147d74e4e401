"""The ways of training that are compared. Each gets the gate, a case and its number of images, and trains for ever.

All have the same initial weights, Adam with the same rate, the same images and the same random rotation, shift and
flip; each validates after every epoch, with loss and accuracy. What only one of them needs is imported there, so that
the others do not pay for it.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cases import EVALUATION_BATCH, LEARNING_RATE, SEED, VALIDATION_SPLIT, Case, build, load
from benchmarks.gate import Gate
from benchmarks.inputs import SingleImages, pil_loaders, split
from lablib.augmentation import augment
from lablib.data import ImageData

FOREVER = 10**6  # epochs


def student(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """The usual lab: a DataLoader over PIL images, and the loop of every tutorial."""
    device = _device()
    data = load(case, images)
    model = build(case, data).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    train_loader, validation_loader = pil_loaders(case, data, workers)
    gate.images = len(train_loader.dataset)
    while True:
        gate.begin()
        model.train()
        running_loss = 0.0
        for batch in train_loader:
            inputs, labels = batch["images"].to(device), batch["labels"].to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        gate.trained()
        model.eval()
        correct = validation_loss = 0.0
        with torch.no_grad():
            for batch in validation_loader:
                inputs, labels = batch["images"].to(device), batch["labels"].to(device)
                logits = model(inputs)
                validation_loss += F.cross_entropy(logits, labels).item()
                correct += (logits.argmax(1) == labels).sum().item()
        gate.validated()


def stock_trainer(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """transformers.Trainer as it comes, over a data set that transforms one image at a time."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model = model

        def forward(self, images, labels):
            logits = self.model(images)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    data = load(case, images)
    train, validation = split(data)
    gate.images = len(train)
    arguments = TrainingArguments(
        output_dir=output_dir,
        num_train_epochs=FOREVER,
        per_device_train_batch_size=case.batch_size,
        per_device_eval_batch_size=EVALUATION_BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
        report_to="none",
        log_level="error",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        WithLoss(build(case, data)),
        arguments,
        train_dataset=SingleImages(case, data, train, training=True, pil=False),
        eval_dataset=SingleImages(case, data, validation, training=False, pil=False),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
        callbacks=[_gate_callback(gate, "on_evaluate")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def lightning(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """PyTorch Lightning with the student lab's loaders."""
    warnings.simplefilter("ignore")
    from lightning import pytorch

    class Classifier(pytorch.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch):
            loss = F.cross_entropy(self.model(batch["images"]), batch["labels"])
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch):
            logits = self.model(batch["images"])
            self.log("val_loss", F.cross_entropy(logits, batch["labels"]))
            self.log("val_accuracy", (logits.argmax(1) == batch["labels"]).float().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE)

    class GateCallback(pytorch.Callback):
        def on_train_epoch_start(self, *_):
            gate.begin()

        def on_validation_start(self, *_):
            gate.trained()

        def on_train_epoch_end(self, *_):  # which follows the validation
            gate.validated()

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = load(case, images)
    loaders = pil_loaders(case, data, workers)
    gate.images = len(loaders[0].dataset)
    trainer = pytorch.Trainer(
        max_epochs=-1,
        devices=1,
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        callbacks=[GateCallback()],
        default_root_dir=output_dir,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(build(case, data)), *loaders)


def tight_loop(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """What remains when all machinery is taken away: uint8 images in memory, batches by index, fused Adam."""
    from lablib.hardware import keep_memory

    keep_memory()
    device = _device()
    data = load(case, images)
    model = build(case, data).to(device)
    pixels, labels = data.train_images.to(device), data.train_labels.to(device)
    train, validation = (part.to(device) for part in split(data))
    mean, std = (statistic.to(device).view(-1, 1, 1) for statistic in data.channel_statistics)
    scale, offset = 1 / (255 * std), -mean / std
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    gate.images = len(train)
    while True:
        gate.begin()
        model.train()
        for chosen in train[torch.randperm(len(train), device=device)].split(case.batch_size):
            batch = pixels.index_select(0, chosen).float()
            batch = augment(batch, case.rotation_degrees, case.translation_fraction, case.horizontal_flip)
            loss = F.cross_entropy(model(batch * scale + offset), labels.index_select(0, chosen))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        gate.trained()
        model.eval()
        with torch.no_grad():
            parts = validation.split(EVALUATION_BATCH)
            logits = torch.cat([model(pixels.index_select(0, part).float() * scale + offset) for part in parts])
            truth = labels.index_select(0, validation)
            F.cross_entropy(logits, truth).item(), (logits.argmax(1) == truth).float().mean().item()
        gate.validated()


def lablib(gate: Gate, case: Case, images: int | None, workers: int, output_dir: str):
    """lablib as a notebook uses it, early stopping off: history and best weights included."""
    trainer = lablib_trainer(case, load(case, images), output_dir, callbacks=[_gate_callback(gate, "on_evaluate")])
    gate.images = len(trainer.train_dataset)
    trainer.train()


def lablib_trainer(case: Case, data: ImageData, output_dir: str, num_epochs: int = FOREVER, callbacks: Sequence = ()):
    """A StreamlinedTrainer for a case."""
    from lablib import StreamlinedTrainer, TrainingConfig

    config = TrainingConfig(
        num_epochs=num_epochs,
        batch_size=case.batch_size,
        learning_rate=LEARNING_RATE,
        validation_split=VALIDATION_SPLIT,
        early_stopping_patience=None,
        rotation_degrees=case.rotation_degrees,
        translation_fraction=case.translation_fraction,
        horizontal_flip=case.horizontal_flip,
        seed=SEED,
    )
    return StreamlinedTrainer(build(case, data), config, data, callbacks=callbacks, checkpoint_dir=output_dir)


class Rival(NamedTuple):
    """`one_by_one`: it prepares image by image, in a data loader."""

    title: str
    function: Callable
    one_by_one: bool = True
    package: str = "torch"

    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


RIVALS = {
    "student": Rival("DataLoader, PIL transforms, plain loop", student),
    "transformers": Rival("transformers.Trainer, v2 transforms", stock_trainer),
    "lightning": Rival("PyTorch Lightning, PIL transforms", lightning, package="lightning"),
    "tight": Rival("tight loop in memory, fp32", tight_loop, one_by_one=False),
    "lablib": Rival("lablib", lablib, one_by_one=False),
}


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _gate_callback(gate: Gate, last_event: str):
    """A transformers callback for the gate; `last_event` is the last one of an epoch."""
    from transformers import TrainerCallback

    class GateCallback(TrainerCallback):
        def on_epoch_begin(self, *_, **__):
            gate.begin()

        def on_epoch_end(self, *_, **__):  # before the logs, the validation and the checkpoint
            gate.trained()

    setattr(GateCallback, last_event, lambda *_, **__: gate.validated())
    return GateCallback()
