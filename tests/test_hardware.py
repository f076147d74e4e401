"""What a machine can do: precision, memory format, devices."""

import pytest
import torch
from torch import nn

from lablib import MLP, StreamlinedTrainer, TrainingConfig
from lablib.hardware import memory_format, resolve_bf16
from lablib.models import SimpleCNN


def config(**knobs) -> TrainingConfig:
    return TrainingConfig(num_epochs=1, device="cpu", **knobs)


def small_cnn() -> nn.Module:
    return SimpleCNN(1, width=2, image_shape=(1, 6, 6), num_classes=3)


def small_mlp() -> nn.Module:
    return MLP((4,), image_shape=(1, 6, 6), num_classes=3)


@pytest.mark.parametrize("build", [small_cnn, small_mlp])
def test_the_precision_asked_for_is_taken(build):
    assert resolve_bf16(config(precision="bf16"), build())
    assert not resolve_bf16(config(precision="fp32"), build())


@pytest.mark.parametrize(("amx", "avx512"), [(True, False), (False, True), (True, True), (False, False)])
def test_auto_takes_bf16_for_convolutions_where_the_processor_has_units_for_it(amx, avx512, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    assert resolve_bf16(config(), small_cnn()) == (amx or avx512)
    assert not resolve_bf16(config(), small_mlp())


def test_images_come_channels_last_for_convolutions_and_contiguous_for_linear_layers(tiny_data):
    assert memory_format(small_cnn()) == torch.channels_last
    assert memory_format(small_mlp()) == torch.contiguous_format
    coloured = torch.stack([tiny_data.train_images[:4]] * 3, dim=1).squeeze(2)
    model = SimpleCNN(1, width=2, image_shape=(3, 6, 6), num_classes=3)
    trainer = StreamlinedTrainer(model, config(), tiny_data)
    for training in (True, False):
        images = trainer.prepare_images(coloured, training)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert not images.is_contiguous()
