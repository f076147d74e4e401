"""The lab's machinery; a notebook imports what it needs from here."""

from lablib.config import TrainingConfig
from lablib.data import ImageData, stratified_split
from lablib.experiment import Experiment, experiment
from lablib.models import MLP, ResidualBlock, ResidualMLP
from lablib.runs import Run, train_or_load
from lablib.sources import load_data
from lablib.trainer import StreamlinedTrainer

__all__ = [
    "MLP",
    "Experiment",
    "ImageData",
    "ResidualBlock",
    "ResidualMLP",
    "Run",
    "StreamlinedTrainer",
    "TrainingConfig",
    "experiment",
    "load_data",
    "stratified_split",
    "train_or_load",
]
