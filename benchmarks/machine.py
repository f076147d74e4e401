"""On what, and with what, is measured; nothing that names the machine or a place on it."""

import os
import platform
import re
from importlib.metadata import distributions
from pathlib import Path

import psutil
import torch

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "lightning", "pillow", "numpy")


def describe() -> dict:
    """Processor, cores, memory, accelerator, versions."""
    information = Path("/proc/cpuinfo")  # on Linux
    installed = {package.name.lower(): package.version for package in distributions()}
    found = information.exists() and re.search(r"model name\s*:\s*(.+)", information.read_text())
    units = {
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "units": [name for name, there in units.items() if there],
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in PACKAGES if name in installed},
    }


def device_slug(machine: dict) -> str:
    """What a file's name says of the device: `cpu-2-cores`, or the GPU's name."""
    name = machine["gpu"] or f"cpu {machine['cores']} core{'s' * (machine['cores'] != 1)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
