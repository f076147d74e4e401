"""The lab's library. The names a notebook needs are available here; each is imported on first use."""

import warnings
from importlib import import_module

# transformers imports tqdm.auto, which asks for ipywidgets, for progress bars that the lab does not use
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
    """Import on first use, so that listing runs or a wrong parameter does not wait seconds for PyTorch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
