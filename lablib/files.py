"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_atomically(path: Path, content: bytes, sync: bool = True):
    """Write a file beside its place and put it there in one step; `sync` waits until the disk has it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(beside, "wb") as file:
        file.write(content)
        if sync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(beside, path)
