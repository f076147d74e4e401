"""The short form of `make torture`: runs are killed, writes fail, and the results are those of undisturbed runs."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")
SMALL = ["--images", "300", "--epochs", "2", "--only", "MLP"]
FORGETFUL = f"""
import sys, torch, torture
torch.optim.Adam.load_state_dict = lambda self, state: None
sys.exit(torture.main({[*SMALL, "--kills", "1", "--faults", "1"]!r}))
"""


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TORTURE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def processes():
    """The torture, and one of a resume that forgets the optimizer's state, side by side."""
    with ThreadPoolExecutor() as pool:
        torture = pool.submit(run, str(TORTURE), *SMALL, "--kills", "4", "--faults", "6")
        forgetful = pool.submit(run, "-c", FORGETFUL)
        return torture.result(), forgetful.result()


def test_each_kill_and_each_fault_is_noticed_and_the_run_ends_bitwise_the_same(processes):
    process, _ = processes
    assert process.returncode == 0, process.stdout + process.stderr
    assert "| MLP | 1 | 1 | 1 | 1 | none |" in process.stdout
    table = process.stdout.partition("| fault |")[2].splitlines()[2:]
    faults = [[int(cell) for cell in line.split("|")[2:5]] for line in table if line.startswith("| ")]
    assert sum(injected for injected, _, _ in faults) == 6 + 3 + 6
    assert all(injected == noticed == same for injected, noticed, same in faults)


def test_the_comparison_can_fail(processes):
    _, forgetful = processes
    assert forgetful.returncode == 1
    assert "'differences': ['weights'" in forgetful.stderr
