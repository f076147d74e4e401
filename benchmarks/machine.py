"""On what, and with what, is measured; nothing that names the machine or a place on it."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "lightning", "keras", "pillow", "numpy")


def describe() -> dict:
    """Processor, cores, memory, accelerator, versions."""
    import psutil
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    units = {
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 BF16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    return {
        "processor": processor(),
        "units": [name for name, there in units.items() if there],
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def named(machine: dict) -> str:
    """A machine in a line: its processor, what that has for computing, and its cores."""
    units = f" with {', '.join(machine['units'])}" if machine["units"] else ""
    return f"{machine['processor']}{units}, {machine['cores']} cores"


def device_slug(machine: dict) -> str:
    """What a file's name says of the device: `cpu-2-cores`, or the GPU's name."""
    name = machine["gpu"] or f"cpu {machine['cores']} core{'s' * (machine['cores'] != 1)}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def processor() -> str:
    """The processor's model, as Linux or Python calls it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        found = re.search(r"model name\s*:\s*(.+)", information.read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
