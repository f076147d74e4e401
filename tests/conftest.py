"""What several test files share: small data, and quick starts of trainings."""

import signal
from pathlib import Path

import matplotlib
import pytest
import torch
from bot_api import BotApi

from lablib import ImageData, StreamlinedTrainer, load_data
from lablib.telegram import TelegramNotifier

matplotlib.use("Agg")
torch.set_num_threads(1)  # the tests' batches are too small to share out

DATA_DIR = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="session", autouse=True)
def _checkpoints_after_each_epoch():
    """So that an epoch of milliseconds has one to resume from."""
    StreamlinedTrainer.seconds_between_epochs = 0.0


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c():
    """Ctrl-C raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    """scikit-learn's digits, 28 × 28; shared by all tests, so copy a tensor before you write to it."""
    return load_data("digits")


@pytest.fixture(scope="session")
def mnist() -> ImageData:
    """MNIST from data/; nothing is downloaded for a test."""
    if not (DATA_DIR / "MNIST" / "raw").is_dir():
        pytest.skip("no MNIST in data/MNIST/raw; python -c \"import lablib; lablib.load_data('mnist')\" gets it")
    return load_data("mnist", DATA_DIR)


@pytest.fixture(scope="session")
def tiny_data() -> ImageData:
    """36 + 18 images of 6 × 6 grey pixels in 3 classes, told apart by the bright pair of rows; shared by all tests."""
    generator = torch.Generator().manual_seed(0)

    def part(per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(3).repeat(per_class)
        images = torch.randint(0, 60, (len(labels), 1, 6, 6), generator=generator, dtype=torch.uint8)
        for image, label in zip(images, labels, strict=True):
            image[:, 2 * label : 2 * label + 2] += 180
        return images, labels

    return ImageData("tiny", *part(12), *part(6), ("top", "middle", "bottom"))


@pytest.fixture
def api(monkeypatch):
    """A Bot API on loopback to which those talk who do not say otherwise, with short pauses and no credentials."""
    for name in ("TELEGRAM_BOT_TOKEN", "TELEGRAM_CHAT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(TelegramNotifier, "pause", 0.01)
    with BotApi() as api:
        monkeypatch.setattr(TelegramNotifier, "base_url", api.url)
        yield api
