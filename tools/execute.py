"""Run a notebook through papermill and leave its output fit to be shown and committed.

python tools/execute.py Lab1_MLPs.ipynb out/Lab1_MLPs.ipynb -p epochs 3
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat


def main(arguments: list[str]) -> int:
    """Papermill's exit status; its options follow the notebook and the output's path."""
    output = Path(arguments[1])
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "papermill", *arguments]
    if not any(argument in ("-k", "--kernel") for argument in arguments):
        command += ["--kernel", "python3"]
    process = subprocess.Popen(command)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()  # Ctrl-C has reached it too
        print("\ninterrupted; run it again: finished runs are loaded and interrupted ones resume", file=sys.stderr)
        return 130
    if status == 0:
        clean(output)
    return status


def clean(path: Path):
    """Take out of an executed notebook what a reader does not need: timings, widgets' metadata, redrawn progress."""
    notebook = nbformat.read(path, as_version=4)
    for part in (notebook, *notebook.cells):
        for key in ("papermill", "widgets", "execution"):
            part.metadata.pop(key, None)
    for cell in notebook.cells:
        merged = []
        for output in cell.get("outputs", []):
            same = merged and output.output_type == "stream" == merged[-1].output_type
            if same and output.name == merged[-1].name:
                merged[-1].text += output.text
            else:
                merged.append(output)
        for output in merged:
            if output.output_type == "stream":
                output.text = as_shown(output.text)
        if "outputs" in cell:
            cell.outputs = merged
    nbformat.write(notebook, path)


def as_shown(text: str) -> str:
    """What a terminal shows of a text whose lines are redrawn with carriage returns."""
    return "\n".join(re.sub(r"\r+$", "", line).rpartition("\r")[2].rstrip() for line in text.split("\n"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
