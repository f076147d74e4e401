"""A trained model -> an ONNX file, which other runtimes read without PyTorch."""

import copy
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lablib.checkpoints import write_atomically


@torch.no_grad()
def export_onnx(model: nn.Module, path: str | Path, image_shape: Sequence[int]) -> Path:
    """Write a model in eval mode and float32, weights included, as one ONNX file for batches of any size.

    Input `images` (float32, batch × channels × height × width, as the model takes them), output `logits` (batch ×
    classes); `image_shape` is (channels, height, width). The model stays as it was, and the file appears whole or not
    at all. Raises ImportError without the packages onnx and onnxscript, ValueError for a shape that the model does not
    take or a model that depends on the batch size, and what `torch.onnx.export` raises where it fails.
    """
    _check_packages()
    exported = copy.deepcopy(model).cpu().float().eval()
    images = torch.zeros(2, *_checked_shape(image_shape))  # a batch of 1 would be taken for a constant
    try:
        exported(images)
    except RuntimeError as error:
        raise ValueError(f"{type(model).__name__} takes no images of shape {tuple(image_shape)}: {error}") from error
    program = torch.onnx.export(
        exported,
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    graph = program.model.graph
    if any([str(size) for size in value.shape[:1]] != ["batch"] for value in (*graph.inputs, *graph.outputs)):
        # the exporter would fix the batch size in silence
        raise ValueError(
            f"{type(model).__name__} does not give one row of logits an image for batches of any size; "
            "its forward must keep the first dimension of its images as it is"
        )
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, program.model_proto.SerializeToString())
    return path


def _check_packages() -> None:
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "export_onnx needs the packages onnx and onnxscript; "
            "python -m pip install --editable '.[onnx]' in the repository's root gets them"
        ) from error


def _checked_shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    shape = tuple(image_shape)
    if len(shape) != 3 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape):
        raise ValueError(
            f"image_shape = {image_shape!r}, but it must be (channels, height, width), whole numbers above 0"
        )
    return shape
