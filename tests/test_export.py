import sys

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from lablib.export import export_onnx
from lablib.models import MLP, ResidualCNN, ResidualMLP, SimpleCNN

TINY = (1, 4, 4)


def tiny_mlp() -> MLP:
    return MLP((3,), image_shape=TINY, num_classes=2)


def randomised(model: nn.Module) -> nn.Module:
    """The model as if trained: random weights, and batch norms whose statistics are not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (tensor for tensor in model.state_dict().values() if tensor.is_floating_point()):
            if tensor.ndim > 1:
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model


def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images)


def random_images(batch: int, image_shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(batch, *image_shape, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize(
    ("network", "image_shape"),
    [
        (lambda: MLP(dropout=0.5), (1, 28, 28)),
        (lambda: ResidualMLP(dropout=0.5), (1, 28, 28)),
        (lambda: SimpleCNN(3), (3, 32, 32)),
        (lambda: ResidualCNN(2), (3, 32, 32)),
    ],
    ids=["MLP", "ResidualMLP", "SimpleCNN", "ResidualCNN"],
)
def test_onnxruntime_gives_pytorchs_logits_for_every_batch_size_from_one_file(network, image_shape, tmp_path, capfd):
    model = randomised(network()).train()
    path = export_onnx(model, tmp_path / "new" / "model.onnx", image_shape)
    assert capfd.readouterr() == ("", "")
    assert path == tmp_path / "new" / "model.onnx"
    assert list(path.parent.iterdir()) == [path]  # the weights are inside
    onnx.checker.check_model(path, full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ("images", "tensor(float)", ["batch", *image_shape])
    ]
    assert [(o.name, o.type, o.shape) for o in session.get_outputs()] == [("logits", "tensor(float)", ["batch", 10])]
    for batch in (1, 3, 128):
        images = random_images(batch, image_shape)
        (theirs,) = session.run(["logits"], {"images": images.numpy()})
        ours = logits_of(model, images)
        assert ours.std() > 0.1  # the logits are no constant that any network would give
        torch.testing.assert_close(torch.from_numpy(theirs), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("network", "image_shape"),
    [
        (lambda: MLP((7, 5), 0.2, TINY, 3), TINY),
        (lambda: ResidualMLP((7, 5), 0.2, TINY, 3, shortcut=False), TINY),
        (lambda: SimpleCNN(3), (3, 32, 32)),
        (lambda: ResidualCNN(2), (3, 32, 32)),
        (lambda: ResidualCNN(1, 6, (2, 9, 5), 7, shortcut=False), (2, 9, 5)),
    ],
    ids=["MLP", "ResidualMLP without shortcuts", "SimpleCNN", "ResidualCNN", "ResidualCNN without shortcuts"],
)
def test_a_saved_network_gives_the_same_logits_bit_by_bit(network, image_shape, tmp_path):
    model = randomised(network())
    model.save_pretrained(tmp_path)
    images = random_images(8, image_shape)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, images), logits_of(model, images))


def test_the_model_and_the_random_numbers_stay_as_they_were(tmp_path):
    model = randomised(SimpleCNN(1, 2, TINY)).double().train()
    model.stem[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    export_onnx(model, tmp_path / "model.onnx", TINY)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_file_names_no_folder_of_this_machine_and_is_the_same_again(tmp_path):
    model = tiny_mlp()
    first, second = (export_onnx(model, tmp_path / name, TINY) for name in ("first.onnx", "second.onnx"))
    assert b"models.py" not in first.read_bytes()
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_its_packages_the_export_says_what_to_install(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="export_onnx needs the packages") as caught:
        export_onnx(tiny_mlp(), tmp_path / "model.onnx", TINY)
    assert str(caught.value) == (
        "export_onnx needs the packages onnx and onnxscript; "
        "python -m pip install --editable '.[onnx]' in the repository's root gets them"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "image_shape", "message"),
    [
        (tiny_mlp, (1, 4, 5), r"MLP takes no images of shape \(1, 4, 5\): .*cannot be multiplied"),
        (lambda: ResidualCNN(1, 2), (1, 8, 8), r"ResidualCNN takes no images of shape \(1, 8, 8\): .* 3 channels"),
        (lambda: ResidualCNN(3, 2), (3, 7, 8), r"7 × 8 pixels are too small for depth 3"),
        (
            tiny_mlp,
            (4, 4),
            r"image_shape = \(4, 4\), but it must be \(channels, height, width\), whole numbers above 0",
        ),
        (tiny_mlp, (0, 4, 4), r"image_shape = \(0, 4, 4\), but it must be"),
        (tiny_mlp, (1, 4.0, 4), r"image_shape = \(1, 4.0, 4\), but it must be"),
    ],
)
def test_an_image_shape_that_does_not_fit_is_refused(network, image_shape, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(network(), tmp_path / "model.onnx", image_shape)
    assert not list(tmp_path.iterdir())


class BatchOfTwo(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1) + torch.ones(2, 1)


class RowsOfTwo(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)


class OneNumber(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sum()


@pytest.mark.parametrize("network", [BatchOfTwo, RowsOfTwo, OneNumber])
def test_a_model_that_does_not_take_every_batch_size_is_refused(network, tmp_path):
    with pytest.raises(ValueError, match=f"^{network.__name__} does not") as caught:
        export_onnx(network(), tmp_path / "model.onnx", TINY)
    assert str(caught.value).endswith(
        "does not give one row of logits an image for batches of any size; "
        "its forward must keep the first dimension of its images as it is"
    )
    assert not list(tmp_path.iterdir())


class LogitsAndANumber(nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
        return images.flatten(1), 2


def test_a_failing_export_leaves_no_file_and_an_older_one_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the exporter would put a report
    with pytest.raises(torch.onnx.OnnxExporterError):
        export_onnx(LogitsAndANumber(), "model.onnx", TINY)
    assert not list(tmp_path.iterdir())
    older = tmp_path / "model.onnx"
    older.write_text("older")
    with pytest.raises(torch.onnx.OnnxExporterError):
        export_onnx(LogitsAndANumber(), older, TINY)
    assert older.read_text() == "older"
    assert list(tmp_path.iterdir()) == [older]
