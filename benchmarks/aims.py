"""What the lab aims at, beside what was measured; as a pure function of the measurements."""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

USUAL = ("student", "transformers", "lightning", "keras")  # the rivals that every network is to be faster than
NOT_LABLIBS = ("augmentation", "forward", "loss", "backward", "optimizer")  # what a loop without machinery does, too


class Aim(NamedTuple):
    """`why`: from the same measurements, where it falls short."""

    text: str
    asked: str
    measured: str
    reached: bool
    why: str = ""


def aims(measured: dict) -> list[Aim]:
    """Those that these measurements can tell about."""
    cases = {case["name"]: case["entries"] for case in measured["cases"]}
    profiles = {profile["case"]: profile["ms_a_step"] for profile in measured.get("parts", [])}
    found = [*_mlp(cases, profiles), *_convolutional(cases, profiles), *_every_network(cases), *_trainer(profiles)]
    if "notebook" in measured:
        found.append(_notebook(measured["notebook"]))
    if "linearity" in measured:
        found += _growth(measured["linearity"])
    return found


def best(entries: list[dict], rival: str, side_by_side: bool = False, threads: str = "") -> dict | None:
    """A rival's fastest variant in training; of lablib's, one run or the runs side by side."""
    found = [e for e in entries if e["rival"] == rival and ("side by side" in e["variant"]) == side_by_side]
    found = [e for e in found if threads in e["variant"]]
    return max(found, key=lambda entry: median(entry["train"]), default=None)


def ratio(entry: dict, other: dict) -> float:
    """How many times as many images a second the one trains as the other."""
    return median(entry["train"]) / median(other["train"])


def _mlp(cases: dict, profiles: dict) -> Iterator[Aim]:
    entries = cases.get("MLP-2", [])
    student, tight = best(entries, "student"), best(entries, "tight")
    one, many = best(entries, "lablib"), best(entries, "lablib", side_by_side=True)
    limit = (
        f"with no machinery at all (tight loop) it is {ratio(tight, student):.3g} times" if student and tight else ""
    )
    if student and one:
        yield _at_least("MLP-2, one run, beside the usual student lab", 12, ratio(one, student), limit)
    if student and many:
        yield _at_least("MLP-2, runs side by side, beside the usual student lab", 20, ratio(many, student), limit)
    one, tight = best(entries, "lablib", threads="1 thread"), best(entries, "tight", threads="1 thread")
    if one and tight:
        why = ""
        if profile := profiles.get("MLP-2"):
            machinery = {part: ms for part, ms in profile.items() if part not in NOT_LABLIBS}
            listed = ", ".join(f"{part} {ms:.2f}" for part, ms in machinery.items())
            why = f"of a step's {sum(profile.values()):.2f} ms these are machinery: {listed}"
        yield _at_least("MLP-2, one run, beside the tight loop, one thread each", 0.95, ratio(one, tight), why)


def _convolutional(cases: dict, profiles: dict) -> Iterator[Aim]:
    entries = cases.get("ResidualCNN-2", [])
    one = best(entries, "lablib")
    why = ""
    if profile := profiles.get("ResidualCNN-2"):
        share = (profile["forward"] + profile["backward"]) / sum(profile.values())
        why = f"forward and backward are {share:.0%} of a step, so what is left is in PyTorch's convolutions"
    for rival, title, asked in (("student", "the usual student lab", 2.5), ("tight", "the tight loop in fp32", 2)):
        other = best(entries, rival)
        if one and other:
            yield _at_least(f"ResidualCNN-2, one run, beside {title}", asked, ratio(one, other), why)


def _every_network(cases: dict) -> Iterator[Aim]:
    ratios = {}
    for name, entries in cases.items():
        one = best(entries, "lablib")
        for rival in USUAL:
            if one and (other := best(entries, rival)):
                ratios[f"{name}, {other['title']}"] = ratio(one, other)
    if ratios:
        least = min(ratios, key=ratios.get)
        measured = f"{ratios[least]:.2f} times at least ({least})"
        yield Aim("every network, one run, beside each usual way", "faster", measured, ratios[least] > 1)


def _trainer(profiles: dict) -> Iterator[Aim]:
    own = profiles.get("MLP-2", {}).get("Trainer's own")
    if own is not None:
        why = "its loop, callbacks and accelerate; going round them would mean another loop than transformers'"
        yield Aim("Trainer's own time in a step of MLP-2", "< 0.3 ms", f"{own:.2f} ms", own < 0.3, why)


def _notebook(notebook: dict) -> Aim:
    seconds = notebook["again_seconds"]
    why = "most of it is the start of Python, Jupyter, PyTorch and transformers"
    return Aim("a notebook whose runs are finished", "< 20 s", f"{seconds:.1f} s", seconds < 20, why)


def _growth(linearity: dict) -> Iterator[Aim]:
    rows = linearity["images"]
    per_image = [1e6 * row["training_seconds"] / row["images"] for row in rows]
    text = f"time for an image, from {rows[0]['images']:,} to {rows[-1]['images']:,} images"
    measured = f"{per_image[0]:.1f} to {per_image[-1]:.1f} µs"
    yield Aim(text, "the same, to a quarter", measured, per_image[-1] <= 1.25 * per_image[0])
    more = [row["more_memory_mib"] for row in rows]
    text = f"memory beyond the data, from {rows[0]['images']:,} to {rows[-1]['images']:,} images"
    flat = more[-1] - more[0] < 0.1 * rows[-1]["data_mib"]
    yield Aim(text, "hardly grows", f"{more[0]:,} to {more[-1]:,} MiB, beside {rows[-1]['data_mib']:,} of data", flat)


def _at_least(text: str, asked: float, measured: float, why: str) -> Aim:
    return Aim(text, f"≥ {asked:g} times", f"{measured:.3g} times", measured >= asked, why)
