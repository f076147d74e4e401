"""Weights & Biases without an account in tests, and the runs that it wrote, as its own reader reads them back."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from wandb.util import get_core_path


def go_offline(patch: pytest.MonkeyPatch, home: Path):
    """No account, nothing of this machine's W&B, and nothing that takes time without being looked at in a test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        patch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        patch.setenv(name, str(home))
    patch.setenv("NETRC", str(home / "netrc"))
    patch.setenv("WANDB_MODE", "offline")
    patch.setenv("WANDB_ERROR_REPORTING", "false")
    patch.setenv("WANDB__DISABLE_STATS", "true")


class TrackedRun:
    """What `wandb leet inspect` says of one offline run."""

    def __init__(self, folder: Path, lines: str):
        self.folder, records = folder, [json.loads(line) for line in lines.splitlines()]
        self.records = {kind: [r[kind] for r in records if r["type"] == kind] for kind in {r["type"] for r in records}}
        self.run = self.records["run"][0]
        self.config = {key: value for key, value in self.run["config"]["update"].items() if key != "_wandb"}
        self.history = [row["item"] for row in self.records["history"]]
        self.summary = {key: value for part in self.records["summary"] for key, value in part["update"].items()}
        self.exit_code = self.records["exit"][0]["exit_code"]

    def metrics(self) -> list[dict]:
        """The history's rows, without what is not a number and what W&B adds."""
        rows = [{k: v for k, v in row.items() if not isinstance(v, (list, str))} for row in self.history]
        return [{k: v for k, v in row.items() if k[0] != "_" and "learning_curves" not in k} for row in rows]


def runs_in(folder: Path) -> list[TrackedRun]:
    """The W&B runs that lie in a folder, the oldest first."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)
    # what `wandb leet inspect --json` starts, without a second Python in front of it
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    readers = [subprocess.Popen([*command, path, path.parents[1]], stdout=subprocess.PIPE, text=True) for path in files]
    return [TrackedRun(path.parent, reader.communicate()[0]) for path, reader in zip(files, readers, strict=True)]
