"""What a machine can do: precision, memory format, devices."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from scripted import At
from torch import nn
from torch.nn import functional as F

from lablib import MLP, StreamlinedTrainer, TrainingConfig
from lablib.hardware import fits, memory_format, resolve_precision
from lablib.models import ResidualCNN, SimpleCNN

CPU, GPU = torch.device("cpu"), torch.device("cuda")
RGB = (3, 32, 32)
small_cnn = partial(SimpleCNN, 1, width=2, image_shape=(3, 6, 6), num_classes=3)
small_mlp = partial(MLP, (4,), image_shape=(1, 6, 6), num_classes=3)


def config(**knobs) -> TrainingConfig:
    return TrainingConfig(num_epochs=1, device="cpu", **knobs)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, monkeypatch, tiny_data):
    monkeypatch.setattr({"cuda": torch.cuda, "mps": torch.backends.mps}[device], "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"device = '{device}', but PyTorch finds no such device here"):
        StreamlinedTrainer(small_mlp(), TrainingConfig(device=device), tiny_data)


@pytest.mark.parametrize(
    ("units", "expected"),
    [("amx", "bf16"), ("avx512", "bf16"), ("", "fp32"), ("cuda bf16", "bf16"), ("cuda avx512", "fp16")],
)
def test_auto_takes_half_precision_for_convolutions_where_there_are_units_for_it(units, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in units)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in units)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: "bf16" in units)
    assert resolve_precision(TrainingConfig(), small_cnn()) == expected
    assert resolve_precision(TrainingConfig(), small_mlp()) == "fp32"
    assert resolve_precision(config(precision="bf16"), small_mlp()) == "bf16"
    assert resolve_precision(config(precision="fp32"), small_cnn()) == "fp32"
    with pytest.raises(ValueError, match="precision = 'fp16' needs a CUDA GPU; write 'bf16', 'fp32' or 'auto'"):
        resolve_precision(config(precision="fp16"), small_cnn())


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_training_is_deterministic_on_request_and_leaves_the_settings_as_they_were(deterministic, tiny_data):
    seen, look = [], lambda: seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
    StreamlinedTrainer(small_mlp(), config(deterministic=deterministic), tiny_data, callbacks=[At(None, look)]).train()
    look()
    assert {*seen[:-1]} == {(deterministic, not deterministic)}
    assert seen[-1] == (False, False)


@pytest.mark.parametrize(("width", "expected"), [(8, torch.contiguous_format), (16, torch.channels_last)])
def test_narrow_projections_stay_contiguous_on_a_processor_where_onednn_would_write_past_its_memory(width, expected):
    model, without_projections = ResidualCNN(2, width), ResidualCNN(2, width, shortcut=False)
    assert memory_format(model, CPU, RGB) == expected
    assert memory_format(model, GPU, RGB) == torch.channels_last
    assert memory_format(without_projections, CPU, RGB) == torch.channels_last


class ViewingCNN(nn.Module):
    """As students write it: `view` needs features that are contiguous."""

    def __init__(self, channels: int = 3):
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(channels, 4, 3), nn.Linear(4 * 4 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.convolution(images).view(len(images), -1))


def test_convolutions_get_channels_last_images_unless_the_model_takes_none(tiny_data):
    coloured = {part: getattr(tiny_data, part).repeat(1, 3, 1, 1) for part in ("train_images", "test_images")}
    data, model = replace(tiny_data, **coloured), ViewingCNN()
    StreamlinedTrainer(model, config(), data).train()
    images = StreamlinedTrainer(small_cnn(), config(), data).prepare_images(data.train_images[:4], training=True)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert memory_format(small_mlp(), CPU, (1, 6, 6)) == torch.contiguous_format
    grey = ViewingCNN(1)  # images of one channel are contiguous in both formats, but a GPU's weights are not
    assert memory_format(grey, GPU, (1, 6, 6)) == torch.contiguous_format
    assert grey.convolution.weight.is_contiguous()


def test_what_an_earlier_training_left_on_a_gpu_is_freed_before_the_images_are_found_too_large(monkeypatch):
    free, images = [7], torch.zeros(4, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 100))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(free.pop() + 2))
    assert fits(images, CPU)
    assert fits(images, GPU)
    assert not fits(images.repeat(3), GPU)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("width", [3, 16])
def test_the_gradients_of_a_residual_network_are_those_of_float64(width):
    """With a wrong memory format oneDNN may also end the process."""
    torch.manual_seed(0)
    model, images, labels = ResidualCNN(2, width).eval().double(), torch.randn(27, 3, 16, 16), torch.arange(27) % 10
    F.cross_entropy(model(images.double()), labels).backward()
    expected = {name: p.grad.float() for name, p in model.named_parameters()}
    images = images.contiguous(memory_format=memory_format(model.float(), CPU, (3, 16, 16)))
    for bf16 in [False, True] * 5:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        for name, p in model.named_parameters():
            error = (p.grad - expected[name]).norm() / expected[name].norm()
            assert error < (0.25 if bf16 else 1e-4), (bf16, name, error)
