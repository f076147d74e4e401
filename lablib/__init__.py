"""The lab's machinery. What a notebook needs has its name here, and is loaded when it is asked for."""

import warnings
from importlib import import_module

# tqdm.auto, which comes in with transformers, wants ipywidgets for bars that the lab does not draw
warnings.filterwarnings("ignore", message="IProgress not found")

_NAMES = {
    "config": ("TrainingConfig",),
    "data": ("ImageData", "stratified_split"),
    "datasets": ("load_data",),
    "distillation": ("KnowledgeDistillationTrainer", "distillation_loss"),
    "experiments": ("Experiment", "experiment"),
    "models": ("MLP", "ResidualBlock", "ResidualCNN", "ResidualMLP", "SimpleCNN"),
    "runs": ("Run", "TrainedModel", "train_or_load"),
    "trainer": ("StreamlinedTrainer",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    """PyTorch and transformers take seconds to import, which a list of runs or a wrong parameter need not wait for."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
