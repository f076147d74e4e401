"""The ceiling: how fast this machine multiplies matrices and convolves, and what a network asks of it."""

import time

from benchmarks.cases import Case, build, load

MATRIX = 2048  # rows and columns
IMAGES = (128, 64, 16, 16)  # batch × channels × height × width of the convolution, 64 to 64 channels, 3 × 3


def rates(seconds: float = 0.7) -> dict[str, dict[str, float]]:
    """GFLOP/s by operation and precision, with all cores: the best of a while; a multiply-add is two operations."""
    import torch
    from torch.nn import functional as F

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    matrix = torch.randn(MATRIX, MATRIX, device=device)
    images = torch.randn(IMAGES, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device).contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = IMAGES
    operations = {
        "matrix product": (lambda a: a @ a, (matrix,), 2 * MATRIX**3),
        "convolution": (
            lambda x, w: F.conv2d(x, w, padding=1),
            (images, weight),
            2 * batch * height * width * 64 * channels * 9,
        ),
    }
    measured = {}
    with torch.no_grad():
        for name, (operation, tensors, flops) in operations.items():
            measured[name] = {}
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                best = _fastest(operation, [tensor.to(dtype) for tensor in tensors], seconds)
                measured[name][precision] = round(flops / best / 1e9)
    return measured


def _fastest(operation, tensors, seconds: float) -> float:
    """The shortest time of one call, seconds; on a GPU of ten in a row."""
    import torch

    repeats = 10 if tensors[0].device.type != "cpu" else 1
    best, end = float("inf"), time.perf_counter() + seconds
    operation(*tensors)
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            operation(*tensors)
        if repeats > 1:
            torch.accelerator.synchronize()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def demand(case: Case) -> dict:
    """Multiply-adds of a training step for one image (forward, and twice that backward), and lablib's precision."""
    from lablib import TrainingConfig
    from lablib.cost import multiply_adds
    from lablib.hardware import resolve_bf16

    data = load(case, 1_000)
    network = build(case, data.image_shape, data.num_classes)
    precision = "bf16" if resolve_bf16(TrainingConfig(), network) else "fp32"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    cost = 3 * multiply_adds(network, data.image_shape)
    return {"multiply_adds": cost, "precision": precision, "parameters": parameters}
