"""Measure everything and write the tables.

python -m benchmarks                                      all of it: results/benchmark-<device>.md and .json
python -m benchmarks --cases MLP-2 --rivals student,lablib --rounds 1 --images 2560 --no-growth --out out
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks import linearity, machine
from benchmarks.cases import CASES, Case
from benchmarks.contest import race
from benchmarks.isolated import isolated
from benchmarks.report import markdown
from benchmarks.rivals import RIVALS


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the results and print where they are."""
    options = _options(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cases = [case for case in CASES if case.name in options.cases]
    measured = measure(cases, options.rivals, options.rounds, options.growth, options.images, options.jobs)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"benchmark-{machine.device_slug(measured['machine'])}"
    file.with_suffix(".json").write_text(json.dumps(measured, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(measured))
    print(f"{file}.md and {file}.json, {measured['minutes']} minutes")
    return 0


def measure(
    cases: Sequence[Case],
    rivals: Sequence[str],
    rounds: int,
    growth: bool = True,
    images: int | None = None,
    jobs: int | None = None,
) -> dict:
    """All measurements, as the JSON file holds them; `images`: an epoch of every rival in place of the cases' own."""
    start = time.monotonic()
    described = isolated(machine.describe)
    on_gpu = described["gpu"] is not None
    jobs = jobs or (4 if on_gpu else described["cores"])
    present = [name for name in rivals if RIVALS[name].is_installed()]
    measured = {
        "machine": described,
        "date": date.today().isoformat(),
        "rounds": rounds,
        "absent": [RIVALS[name].title for name in rivals if name not in present],
        "cases": [],
    }
    for case in cases:
        _say(f"{case.name}: {', '.join(present)}")
        measured["cases"].append(race(case, present, rounds, jobs, on_gpu, images))
    if growth:
        _say("cost against images, epochs and runs")
        sizes = (images, 2 * images) if images else (5_000, 50_000, 500_000)
        measured["growth"] = linearity.measure((cases or CASES)[0], sizes, epochs=(1, 2, 4, 8), runs=(1, 2, 4))
    return measured | {"minutes": round((time.monotonic() - start) / 60, 1)}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="How fast lablib is beside the usual ways."
    )
    names = [case.name for case in CASES]
    parser.add_argument("--cases", type=_some_of(names), default=names, help=f"of {','.join(names)}, or none")
    parser.add_argument("--rivals", type=_some_of(RIVALS), default=list(RIVALS), help=f"of {','.join(RIVALS)}")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each rival after its first one")
    parser.add_argument("--images", type=int, help="training images an epoch, for quick trials")
    parser.add_argument("--jobs", type=int, help="lablib's runs side by side; one a core, on a GPU 4")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="leave out how the cost grows")
    parser.add_argument("--out", default="results", help="the folder of the tables")
    return parser.parse_args(arguments)


def _some_of(allowed):
    def chosen(text: str) -> list[str]:
        names = [] if text == "none" else text.split(",")
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: allowed are {', '.join(allowed)}")
        return names

    return chosen


def _say(text: str):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
