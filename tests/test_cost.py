"""What a model costs, against formulas, files, PyTorch's own allocator and clocks that are written in advance."""

import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lablib.cost import bytes_on_disk, latency, multiply_adds, peak_memory
from lablib.models import MLP, ResidualCNN, ResidualMLP, SimpleCNN


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


# Memory

FLOAT = 4  # bytes


def small_cnn(seed: int = 0) -> ResidualCNN:
    torch.manual_seed(seed)
    return ResidualCNN(1, 4, (3, 8, 8))


class Chain(nn.Module):
    """Linear layers whose results are kept, dropped or looked at, as a test says."""

    def __init__(self, steps):
        super().__init__()
        self.wide, self.narrow = nn.Linear(12, 50), nn.Linear(50, 2)
        self.steps = steps

    def forward(self, images):
        return self.steps(self, images.flatten(1))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(
    ("widths", "most"),
    [
        ((7,), 12 + 7),
        ((30, 7), 12 + 30 + 7),
        ((30, 50, 7), 12 + 30 + 50),  # the last layer needs 50 + 7 only: the 30 have been let go
        ((2, 9, 40), 12 + 9 + 40),
    ],
)
def test_peak_memory_of_linear_layers_is_the_images_and_a_layers_input_and_output(widths, most, batch):
    sizes = (12, *widths)
    layers = [nn.Linear(i, o) for i, o in zip(sizes[:-1], widths, strict=True)]
    model = nn.Sequential(nn.Flatten(), *layers)  # flattened images are a view of them
    assert peak_memory(model, (3, 2, 2), batch) == FLOAT * batch * most


@pytest.mark.parametrize(("inplace", "most"), [(True, 12 + 50), (False, 12 + 50 + 50)])
def test_a_relu_in_place_takes_no_memory_and_another_as_much_as_its_input(inplace, most):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 50), nn.ReLU(inplace))
    assert peak_memory(model, (3, 2, 2), 8) == FLOAT * 8 * most


@pytest.mark.parametrize(
    ("steps", "most"),
    [
        (lambda net, x: [net.wide(x)], 12 + 50),
        (lambda net, x: [net.wide(x), net.wide(x)], 12 + 2 * 50),
        (lambda net, x: [y := net.wide(x), y.view(-1), y.T, y[:, :1], y.detach()], 12 + 50),  # views
        (lambda net, x: [net.wide(x)[:, :1], net.wide(x)[:, :1]], 12 + 2 * 50),  # a view keeps all of what it shows
        (lambda net, x: net.narrow(net.wide(x)).sum() + net.wide(x).sum(), 12 + 50 + 2),
        (lambda net, x: [net.wide.weight.T, net.wide.weight[:3], net.wide.bias.view(5, 10)], 12),  # of weights
        (lambda net, x: [x[:1], x.T, x.view(-1)], 12),  # of the images
        (lambda net, x: x.relu_(), 12),
        (lambda net, x: x.clone().relu_().clone(), 3 * 12),
    ],
    ids=["one", "two", "views", "small views", "let go", "weights", "images", "in place", "copies"],
)
def test_peak_memory_counts_what_lives_at_the_same_time_each_storage_once(steps, most):
    assert peak_memory(Chain(steps), (3, 2, 2), 8) == FLOAT * 8 * most


def test_peak_memory_of_a_residual_cnn_is_that_by_hand():
    """At the downsampling: images, the block's input, the result of its two convolutions, and on the shortcut the
    convolution's result and the batch norm's."""
    images, stem, stage = 3 * 8 * 8, 4 * 8 * 8, 8 * 4 * 4
    assert peak_memory(small_cnn(), (3, 8, 8), 8) == FLOAT * 8 * (images + stem + 3 * stage)
    assert peak_memory(SimpleCNN(1, 4, (3, 8, 8)), (3, 8, 8), 8) == FLOAT * 8 * (images + 2 * stem)


@pytest.mark.parametrize("build", [lambda: MLP((8, 16, 4)), lambda: ResidualMLP((8, 16, 4)), lambda: MLP((700, 300))])
def test_peak_memory_of_an_mlp_is_what_pytorchs_allocator_hands_out(build, tmp_path):
    """An oracle for linear layers only: convolutions take scratch memory besides."""
    model, images = build().eval(), torch.zeros(7, 1, 28, 28)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(images)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    live, most = 0, 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        most = max(most, live)
    assert most > 0
    assert peak_memory(model, (1, 28, 28), 7) == images.nbytes + most


def test_peak_memory_leaves_the_model_as_it_was_and_is_the_same_again():
    model = small_cnn().train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = peak_memory(model, (3, 8, 8), 4)
    assert peak_memory(model, (3, 8, 8), 4) == first
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


# Time


class Scripted:
    """In place of a clock: notes each pass and takes the next of the seconds that are written for it."""

    def __init__(self, models, seconds):
        self.names = {id(model): name for name, model in models.items()}
        self.seconds, self.passes, self.training = seconds, [], []

    def __call__(self, model, images):
        key = self.names[id(model)], len(images)
        self.training.append(model.training)
        self.passes.append(key)
        return self.seconds[key][self.passes.count(key) - 1]


def test_latency_has_a_row_a_model_and_batch_size_and_leaves_the_models_as_they_were():
    models = {"cnn": ResidualCNN(1, 4).train(), "mlp": MLP((4,), image_shape=(3, 16, 16)).eval()}
    before = {name: tensor.clone() for name, tensor in models["cnn"].state_dict().items()}
    table = latency(models, (3, 16, 16), batch_sizes=(1, 8), repeats=2, rounds=2)
    assert table.columns.tolist() == ["model", "batch", "milliseconds", "images_per_second", "device", "threads"]
    assert sorted(zip(table["model"], table["batch"], strict=True)) == [("cnn", 1), ("cnn", 8), ("mlp", 1), ("mlp", 8)]
    assert (table["milliseconds"] > 0).all()
    assert table["images_per_second"].tolist() == pytest.approx((table["batch"] / table["milliseconds"] * 1e3).tolist())
    assert set(table["device"]) == {"cpu"}
    assert set(table["threads"]) == {torch.get_num_threads()}
    assert models["cnn"].training
    assert not models["mlp"].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in models["cnn"].state_dict().items())


def test_latency_is_the_median_of_all_rounds_without_the_two_passes_that_warm_up(monkeypatch):
    models = {"slow": MLP((2,)), "fast": MLP((2,))}
    seconds = {  # two rounds of two to warm up and three that count
        ("slow", 10): [90.0, 80.0, 0.3, 0.5, 0.1, 70.0, 60.0, 0.9, 0.7, 0.6],
        ("fast", 10): [0.0, 0.0, 0.03, 0.01, 0.02, 0.0, 0.0, 0.04, 0.08, 0.05],
    }
    clock = Scripted(models, seconds)
    monkeypatch.setattr("lablib.cost._timed", clock)
    table = latency(models, (1, 28, 28), batch_sizes=(10,), repeats=3, rounds=2).set_index("model")
    assert table["milliseconds"].to_dict() == pytest.approx({"slow": 550, "fast": 35})
    assert table["images_per_second"].to_dict() == pytest.approx({"slow": 10 / 0.55, "fast": 10 / 0.035})
    assert all(clock.passes.count(key) == len(times) for key, times in seconds.items())


def test_the_models_take_turns_so_that_a_busy_while_slows_all_of_them(monkeypatch):
    models = {name: MLP((2,)).train() for name in "abc"}
    clock = Scripted(models, {(name, batch): [1.0] * 20 for name in models for batch in (1, 4)})
    monkeypatch.setattr("lablib.cost._timed", clock)
    latency(models, (1, 28, 28), batch_sizes=(1, 4), repeats=1, rounds=3)
    turns = [key for index, key in enumerate(clock.passes) if index == 0 or clock.passes[index - 1] != key]
    assert turns == [("a", 1), ("b", 1), ("c", 1), ("a", 4), ("b", 4), ("c", 4)] * 3
    assert len(clock.passes) == 3 * len(turns)
    assert not any(clock.training)
    assert all(model.training for model in models.values())


@pytest.mark.parametrize(("repeats", "rounds"), [(0, 5), (10, 0), (-1, 1)])
def test_no_repeats_and_no_rounds_are_refused(repeats, rounds):
    words = f"repeats = {repeats} and rounds = {rounds}, but both must be whole numbers above 0"
    with pytest.raises(ValueError, match=words):
        latency({"mlp": MLP((2,))}, (1, 28, 28), repeats=repeats, rounds=rounds)
