"""How long a notebook takes whose runs are all finished."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path


def rerun_seconds(notebook: str, **parameters) -> dict:
    """Seconds of the notebook through papermill on its own parameters, twice with one run store."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        given = {name: out / name for name in ("output_dir", "figures_dir", "results_dir")} | parameters
        options = [text for name, value in given.items() for text in ("-p", name, str(value))]
        command = [sys.executable, "-m", "lablib.execute", notebook, str(out / "executed.ipynb"), *options]
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds.append(round(time.perf_counter() - start, 1))
    return {"notebook": notebook, "first_seconds": seconds[0], "again_seconds": seconds[1]}
