"""Measure everything and write the tables.

python -m benchmarks                                      all of it: results/benchmark-<device>.md and .json
python -m benchmarks --cases MLP-2 --rivals student lablib --rounds 1 --images 2560 --no-growth --out out
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks import growth, machine
from benchmarks.cases import CASES, Case
from benchmarks.contest import race
from benchmarks.report import markdown
from benchmarks.rivals import RIVALS


def main(arguments: Sequence[str] | None = None):
    """Write the results and print where they are."""
    cases = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="How fast lablib is.")
    parser.add_argument("--cases", nargs="*", choices=cases, default=list(cases))
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each rival after its first one")
    parser.add_argument("--images", type=int, help="training images an epoch, for quick trials")
    parser.add_argument("--jobs", type=int, help="lablib's runs side by side; one a core, on a GPU 4")
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="leave out how the cost grows")
    parser.add_argument("--out", type=Path, default="results", help="the folder of the tables")
    options = parser.parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    measured = measure([cases[name] for name in options.cases], options)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"benchmark-{machine.device_slug(measured['machine'])}"
    text = json.dumps(measured, indent=1) + "\n"
    file.with_suffix(".json").write_text(text)
    file.with_suffix(".md").write_text(markdown(json.loads(text)))
    print(f"{file}.md and {file}.json, {measured['minutes']} minutes")


def measure(cases: Sequence[Case], options: argparse.Namespace) -> dict:
    """All measurements, as the JSON file holds them."""
    start = time.monotonic()
    described = machine.describe()
    on_gpu = described["gpu"] is not None
    jobs = options.jobs or (4 if on_gpu else described["cores"])
    present = [name for name in options.rivals if RIVALS[name].is_installed()]
    measured = {
        "machine": described,
        "date": date.today().isoformat(),
        "rounds": options.rounds,
        "absent": [RIVALS[name].title for name in options.rivals if name not in present],
        "cases": [],
    }
    for case in cases:
        print(f"{case.name}: {', '.join(present)}", file=sys.stderr, flush=True)
        measured["cases"].append(race(case, present, options.rounds, jobs, on_gpu, options.images))
    if options.growth:
        print("cost against images", file=sys.stderr, flush=True)
        sizes = (options.images, 2 * options.images) if options.images else (5_000, 50_000, 500_000)
        measured["growth"] = growth.measure((cases or CASES)[0], sizes)
    return measured | {"minutes": round((time.monotonic() - start) / 60, 1)}


if __name__ == "__main__":
    main()
