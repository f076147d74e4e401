import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")


def test_conda_installs_the_same_extras_but_the_rivals_and_the_same_python_as_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert sorted(name_of(entry) for entry in conda) == ["pip", "python"]
    assert f"python{PROJECT['requires-python']}" in conda
    assert len(pip) == 1
    extras = re.fullmatch(r"-e \.\[(.*)\]", pip[0]).group(1).split(",")
    assert {*extras, "bench"} == set(PROJECT["optional-dependencies"])  # `make bench` installs its own


def test_every_requirement_has_a_tested_version_within_its_range():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (Requirement(text) for group in groups for text in group):
        if requirement.name != PROJECT["name"]:  # one extra's mention of another
            assert pinned[name_of(requirement.name)] in requirement.specifier, requirement


def test_one_command_sets_the_repositorys_address_everywhere_and_what_is_no_address_nowhere(tmp_path):
    (old,) = re.findall(r"https://github\.com/([^/]+/[^/]+)$", PROJECT["urls"]["Repository"])
    kinds = ".toml", ".cff", ".md", ".ipynb", ".py", ".yml"
    ours = [path for folder in ("*", "[!o]*/*", ".*/*/*") for path in ROOT.glob(folder) if path.suffix in kinds]
    texts = [tmp_path / path.relative_to(ROOT) for path in ours if old in path.read_text()]
    for path in (*texts, tmp_path / "Makefile"):
        path.parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / path.relative_to(tmp_path), path)
    before = [path.read_bytes() for path in texts]
    assert len(before) >= 5
    for wrong in ("a/b", "https://github.com/a/b.git"):
        command = ["make", "address", f"REPOSITORY={wrong}"]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0
    assert [path.read_bytes() for path in texts] == before
    subprocess.run(["make", "address", "REPOSITORY=https://github.com/a/b.c"], cwd=tmp_path, check=True)
    assert [path for path in tmp_path.rglob("*.*") if path.suffix == ".bak" or old in path.read_text()] == []
    assert all("github.com/a/b.c" in path.read_text() or "github/a/b.c/" in path.read_text() for path in texts)


def test_lablib_imports_what_takes_seconds_when_it_is_asked_for_and_trains_without_services_and_extras(tmp_path):
    names = ["wandb", "papermill", "nbval", "IPython", "torchmetrics"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({names}))
import lablib, lablib.config
assert "torch" not in sys.modules
from lablib import MLP, TrainingConfig, load_data
TrainingConfig(num_epochs=3)
import lablib.diagnostics, lablib.experiments, lablib.figures  # all that runs which are finished need
assert not {{"transformers.trainer", "accelerate"}} & set(sys.modules)
from lablib import StreamlinedTrainer
assert all(getattr(lablib, name).__name__ == name and name in dir(lablib) for name in lablib.__all__)
StreamlinedTrainer(MLP((4,)), TrainingConfig(num_epochs=1, batch_size=999, device="cpu"), load_data("digits")).train()
assert [name for name in sys.modules if name.startswith(("lablib.telegram", "wandb."))] == []
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
