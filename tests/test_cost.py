import pytest
import safetensors.torch
import torch
from torch import nn

from lablib.cost import bytes_on_disk, latency, multiply_adds
from lablib.models import MLP, ResidualCNN, SimpleCNN


def test_multiply_adds_are_those_of_the_formula():
    assert multiply_adds(MLP((128, 64)), (1, 28, 28)) == 784 * 128 + 128 * 64 + 64 * 10
    stem, block = 9 * 3 * 4 * 32 * 32, 9 * 4 * 8 * 16 * 16
    assert multiply_adds(SimpleCNN(1, 4), (3, 32, 32)) == stem + block + 8 * 10


def test_multiply_adds_agree_with_a_count_by_hooks():
    model, counted = ResidualCNN(2, 8), []

    def count(module, inputs, output):
        per_output = module.weight[0].numel()
        counted.append(per_output * output.numel())

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 3, 32, 32))
    expected = sum(counted)
    assert multiply_adds(model, (3, 32, 32)) == expected


def test_bytes_on_disk_are_those_of_the_file(tmp_path):
    model = ResidualCNN(1, 4)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert bytes_on_disk(model) == (tmp_path / "model.safetensors").stat().st_size


def test_latency_has_a_row_a_batch_size_and_leaves_the_model_as_it_was():
    model = ResidualCNN(1, 4).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = latency(model, (3, 16, 16), batch_sizes=(1, 8), repeats=5)
    assert table["batch"].tolist() == [1, 8]
    assert (table["milliseconds"] > 0).all()
    assert table["images_per_second"].tolist() == pytest.approx((table["batch"] / table["milliseconds"] * 1e3).tolist())
    assert set(table["device"]) == {"cpu"}
    assert set(table["threads"]) == {torch.get_num_threads()}
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_latency_is_the_median_after_a_warm_up(monkeypatch):
    times = iter([100.0, 0.003, 0.001, 0.002, 0.009, 0.004])
    monkeypatch.setattr("lablib.cost._timed", lambda model, images: next(times))
    table = latency(MLP((2,)), (1, 28, 28), batch_sizes=(10,), repeats=5)
    assert table.loc[0, "milliseconds"] == pytest.approx(3.0)
    assert table.loc[0, "images_per_second"] == pytest.approx(10 / 0.003)


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="repeats = 0, but it must be"):
        latency(MLP((2,)), (1, 28, 28), repeats=0)
