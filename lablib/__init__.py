"""The lab's machinery; a notebook imports what it needs from here."""

from lablib.config import TrainingConfig
from lablib.data import ImageData, stratified_split
from lablib.distillation import KnowledgeDistillationTrainer, distillation_loss
from lablib.experiment import Experiment, experiment
from lablib.models import MLP, ResidualBlock, ResidualCNN, ResidualMLP, SimpleCNN
from lablib.runs import Run, train_or_load
from lablib.sources import load_data
from lablib.trainer import StreamlinedTrainer

__all__ = [
    "MLP",
    "Experiment",
    "ImageData",
    "KnowledgeDistillationTrainer",
    "ResidualBlock",
    "ResidualCNN",
    "ResidualMLP",
    "Run",
    "SimpleCNN",
    "StreamlinedTrainer",
    "TrainingConfig",
    "distillation_loss",
    "experiment",
    "load_data",
    "stratified_split",
    "train_or_load",
]
