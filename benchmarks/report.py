"""Measurements -> the Markdown page, as a pure function."""

from statistics import median


def markdown(measured: dict) -> str:
    """The page of `results/benchmark-<device>.md` from the contents of its JSON file."""
    sections = [_head(measured), *map(_case, measured["cases"])]
    if measured["cases"]:
        sections.append(_start_and_memory(measured["cases"]))
    if "growth" in measured:
        sections.append(_growth(measured["growth"]))
    return "\n\n".join([*sections, _notes(measured)]) + "\n"


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _head(measured: dict) -> str:
    machine = measured["machine"]
    units = f" with {', '.join(machine['units'])}" if machine["units"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"# Speed on {machine['gpu'] or machine['processor']}\n\n"
        f"Images per second in training, measured on {measured['date']} on {machine['gpu'] or 'the processor'}: "
        f"{machine['processor']}{units}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory; Python "
        f"{machine['python']}, {versions}. `make bench` measures it again.\n\n"
        "Every rival trains the same network from the same weights, with Adam (rate 0.001), on the same images, each "
        "rotated by up to 10 degrees; on MNIST shifted by up to a tenth of its side, on CIFAR flipped one time in two. "
        f"Each has a process of its own, and they take turns: one epoch each, {measured['rounds']} times, beginning "
        "with another one each time. An epoch covers a part of the training set, as many images as the column says. A "
        "figure is the median over these epochs, with the lowest and the highest. *Training* ends with the last step, "
        "*whole epoch* with the validation (a ninth as many images) and whatever else a rival does at an epoch's end; "
        "both count training images only. Starting and the first epoch, which sets up memory and kernels, are not in "
        "them and are given separately."
    )


def _case(case: dict) -> str:
    entries = case["entries"]
    ours = max([median(e["train"]) for e in entries if e["rival"] == "lablib" and "one run" in e["variant"]], default=0)
    rows = [
        [
            f"{entry['title']}, {entry['variant']}",
            f"{entry['images']:,}",
            _speed(entry["train"]),
            _speed(entry["epoch"]),
            f"{ours / median(entry['train']):.3g} times as fast" if ours and entry["rival"] != "lablib" else "",
        ]
        for entry in entries
    ]
    columns = ["way of training", "images", "training, images/s", "whole epoch, images/s", "lablib, one run, is"]
    arguments = ", ".join(f"{name} {value}" for name, value in case["arguments"].items())
    return (
        f"## {case['name']} on {case['dataset'].rpartition('/')[2]}, batch {case['batch_size']}\n\n"
        f"`{case['network']}` with {arguments}.\n\n{table(columns, rows)}"
    )


def _speed(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


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
        "## Start and memory\n\n*Start* is the time from the start of the process to the end of the first step: the "
        "imports, the data, the first pass. *Warm-up* is what the first epoch takes beyond a later one. *Memory* is "
        "the peak of the process with its libraries and its images; of data loader workers it counts what they do not "
        "share. Variants that differ in threads are one process.\n\n"
        + table(["network", "way of training", "start, s", "warm-up, s", "memory, MiB"], rows)
    )


def _growth(growth: dict) -> str:
    rows = [
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
    return (
        f"## Cost against images\n\n{growth['case']}, one epoch, the data set's images over and over; each row in a "
        "process of its own with one thread. *More memory* is the peak during the training above what the process held "
        f"with the data in place.\n\n{table(columns, rows)}"
    )


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
    ]
    notes += [f"{title} is left out: it is not installed here." for title in measured.get("absent", [])]
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)
