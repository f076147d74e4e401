"""Measurements -> the Markdown page, as a pure function."""

from statistics import median

from benchmarks.machine import named

RIVAL_ORDER = ("student", "transformers", "lightning", "tight")


def markdown(measured: dict) -> str:
    """The page of `results/benchmark-<device>.md` from the contents of its JSON file."""
    sections = [_head(measured), *map(_case, measured["cases"])]
    if measured["cases"]:
        sections += [_start_and_memory(measured["cases"]), _ratios(measured["cases"])]
    if "growth" in measured:
        sections.append(_growth(measured["growth"]))
    return "\n\n".join([*sections, _notes(measured)]) + "\n"


def best(entries: list[dict], rival: str, side_by_side: bool = False) -> dict | None:
    """A rival's fastest variant in training; of lablib's, one run or the runs side by side."""
    found = [e for e in entries if e["rival"] == rival and ("side by side" in e["variant"]) == side_by_side]
    return max(found, key=lambda entry: median(entry["train"]), default=None)


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _head(measured: dict) -> str:
    machine = measured["machine"]
    device = machine["gpu"] or "the processor"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"# Speed on {machine['gpu'] or machine['processor']}\n\n"
        f"Images a second in training, measured on {measured['date']} on {device}: {named(machine)}, "
        f"{machine['memory_gib']} GiB of memory; Python {machine['python']}, {versions}. "
        "`make bench` measures it again.\n\n"
        "Every rival trains the same network from the same weights, with Adam (rate 0.001), on the same images, each "
        "turned by up to 10 degrees and, on MNIST, shifted by up to a tenth of its side, on CIFAR mirrored one time in "
        "two. Each has a process of its own, and they take turns: one epoch each, "
        f"{measured['rounds']} {'rounds' if measured['rounds'] != 1 else 'round'}, beginning with another one in each "
        "round. An epoch goes over a part of the training set, as many images as the column says. A figure is the "
        "median over the rounds, with the lowest and the highest. *Training* ends with the last step, *whole epoch* "
        "with the validation (a ninth as many images) and whatever else the way of working does at an epoch's end; "
        "both count training images only. Starting and the first epoch, in which memory and kernels are set up, are "
        "not in them and are given apart."
    )


def _case(case: dict) -> str:
    rows = []
    for entry in case["entries"]:
        rows.append(
            [
                f"{entry['title']}, {entry['variant']}",
                f"{entry['images']:,}",
                _speed(entry["train"]),
                _speed(entry["epoch"]),
                _times_of_lablib(case["entries"], entry),
            ]
        )
    columns = ["way of training", "images", "training, images/s", "whole epoch, images/s", "lablib, one run, is"]
    return (
        f"## {case['name']} on {_dataset(case)}, batch {case['batch_size']}\n\n"
        f"{_arguments(case)}\n\n{table(columns, rows)}"
    )


def _arguments(case: dict) -> str:
    arguments = ", ".join(f"{name} {_plain(value)}" for name, value in case["arguments"].items())
    text = f"`{case['network']}` with {arguments}"
    return text + "."


def _dataset(case: dict) -> str:
    return case["dataset"].rpartition("/")[2]


def _plain(value) -> str:
    return "-".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _speed(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _times_of_lablib(entries: list[dict], entry: dict) -> str:
    one_run = best(entries, "lablib")
    if one_run is None or entry["rival"] == "lablib":
        return ""
    return f"{_ratio(one_run, entry)} times as fast"


def _ratio(entry: dict, other: dict) -> str:
    return f"{median(entry['train']) / median(other['train']):.3g}"


def _ratios(cases: list[dict]) -> str:
    rivals = [name for name in RIVAL_ORDER if any(best(case["entries"], name) for case in cases)]
    titles = [next(best(c["entries"], name) for c in cases if best(c["entries"], name))["title"] for name in rivals]
    rows = []
    for case in cases:
        for side_by_side, said in ((False, "one run"), (True, None)):
            ours = best(case["entries"], "lablib", side_by_side)
            if ours is None:
                continue
            others = [best(case["entries"], name) for name in rivals]
            cells = [_ratio(ours, other) if other else "–" for other in others]
            rows.append([f"{case['name']}, {said or ours['variant']}", *cells])
    return (
        "## lablib's speed in training, as a multiple of each rival's\n\nOf a rival with several variants (data loader "
        "workers, threads) the fastest one counts.\n\n" + table(["", *titles], rows)
    )


def _start_and_memory(cases: list[dict]) -> str:
    rows = [
        [
            case["name"],
            f"{entry['title']}, {entry['variant']}",
            f"{entry['seconds_to_first_step']:.1f}",
            f"{entry['warm_up_seconds']:.1f}",
            f"{entry['peak_memory_mib']:,}",
        ]
        for case in cases
        for entry in case["entries"]
    ]
    return (
        "## Start and memory\n\n*Start* goes from the start of the process to the end of the first step: the imports, "
        "the data, the first pass. *Warm-up* is what the first epoch takes beyond a later one. *Memory* is the peak of "
        "the process with its libraries and its images; of data loader workers it counts what they do not share. "
        "Variants that differ in threads are one process.\n\n"
        + table(["network", "way of training", "start, s", "warm-up, s", "memory, MiB"], rows)
    )


def _growth(growth: dict) -> str:
    images = [
        [
            f"{row['images']:,}",
            f"{row['training_seconds']:.2f}",
            f"{1e6 * row['training_seconds'] / row['images']:.1f}",
            f"{row['seconds']:.2f}",
            f"{row['data_mib']:,}",
            f"{row['more_memory_mib']:,}",
        ]
        for row in growth["images"]
    ]
    columns = ["training images", "training, s", "µs an image", "start to end, s", "data, MiB", "more memory, MiB"]
    text = [
        "## Cost against images, epochs and runs",
        f"{growth['case']}, one epoch, the data set's images over and over; each row in a process of its own with "
        "one thread. *More memory* is the peak during the training above what the process held with the data in place.",
        table(columns, images),
    ]
    for name in ("epochs", "runs"):
        rows = [[f"{row[name]}", f"{row['seconds']:.2f}", f"{row['seconds'] / row[name]:.2f}"] for row in growth[name]]
        other = "one run" if name == "epochs" else "one epoch each, one after another"
        number = growth[name][0]["images"]
        text += [
            f"By {name}, {other}, {number:,} training images, start and test included:",
            table([name, "seconds", f"seconds for one of the {name}"], rows),
        ]
    return "\n\n".join(text)


def _notes(measured: dict) -> str:
    notes = [
        "The usual ways get their images decoded and in memory; reading files would slow them further.",
        "Their shifts are whole pixels, as torchvision makes them; lablib's are not. Rotation is bilinear everywhere.",
        "transformers and Lightning take as many data loader workers (0 or 2) as the plain loop is faster with "
        "in a trial epoch. Workers stay alive between epochs and may have their first batches ready when one "
        "begins, which favours those rivals a little.",
        "The tight loop has the allocator's setting and the fused optimizer that lablib has, and measures no training "
        "accuracy, writes no checkpoint and keeps no history.",
        "lablib's validation, history, best weights and checkpoint are in *whole epoch*; on a part of the data set, as "
        "here, they weigh more than on all of it.",
        "Runs side by side are counted from the start of the first to the end of the last, so waiting for the slower "
        "one is in the figure.",
        "Rivals import only the networks and the data of lablib, so that its other imports are not in their start and "
        "memory.",
    ]
    notes += [f"{title} is left out: it is not installed here." for title in measured.get("absent", [])]
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)
