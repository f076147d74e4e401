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
        f"Training speed in images per second, measured on {measured['date']} on {machine['gpu'] or 'the processor'}: "
        f"{machine['processor']}{units}, {machine['cores']} cores, {machine['memory_gib']} GiB of memory; Python "
        f"{machine['python']}, {versions}. `make bench` repeats the measurement.\n\n"
        "Every method trains the same network from the same weights with Adam (learning rate 0.001) on the same "
        "images, each rotated by up to 10 degrees and, on MNIST, shifted by up to a tenth of its size or, on CIFAR, "
        "mirrored with probability 1/2. lablib computes convolutions in half precision where that is faster, all "
        "others in fp32. Each method has its own process. They take turns, one epoch each, for "
        f"{measured['rounds']} rounds; each round begins with a different method. An epoch covers part of the training "
        "set, as many images as the column *images* says. Each number is the median over the rounds, with minimum and "
        "maximum. *Training* ends with the last step; *whole epoch* also includes validation (a ninth as many images). "
        "Both count training images only, without start-up and first epoch, which are reported separately."
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
    columns = ["method", "images", "training, images/s", "whole epoch, images/s", "lablib, one run, is"]
    arguments = ", ".join(f"{name} {value}" for name, value in case["arguments"].items())
    return (
        f"## {case['name']} on {case['dataset'].rpartition('/')[2]}, batch {case['batch_size']}\n\n"
        f"`{case['network']}` with {arguments}.\n\n{table(columns, rows)}"
    )


def _speed(values: list[float]) -> str:
    return f"{median(values):,.0f} ({min(values):,.0f}–{max(values):,.0f})"


def _start_and_memory(cases: list[dict]) -> str:
    rows = []
    for case in cases:
        for entry in case["entries"]:
            seconds = [f"{entry[name]:.1f}" for name in ("seconds_to_first_step", "warm_up_seconds")]
            method, waits = f"{entry['title']}, {entry['variant']}", entry.get("waits")
            counts = f"{entry['peak_memory_mib']:,}", "" if waits is None else f"{waits:,}"
            rows.append([case["name"], method, *seconds, *counts])
    columns = ["network", "method", "start, s", "warm-up, s", "memory, MiB", "waits"]
    text = (
        "## Start and memory\n\n*Start* is the time from the start of the process to the end of the first step, "
        "including imports and data; the first method to load a folder also decodes its images. *Warm-up* is the extra "
        "time of the first epoch compared with a later one. *Memory* is the peak memory of the process with its "
        "libraries and images, plus what data loader workers do not share. Variants that differ only in threads are "
        "one process."
    )
    if any(row[-1] for row in rows):
        return f"{text} *Waits* is how often an epoch's training waits for the GPU.\n\n{table(columns, rows)}"
    return f"{text}\n\n{table(columns[:-1], [row[:-1] for row in rows])}"


def _growth(growth: dict) -> str:
    form = "{images:,} {training_seconds:.2f} {microseconds:.1f} {seconds:.2f} {data_mib:,} {more_memory_mib:,}"
    each = [{**row, "microseconds": 1e6 * row["training_seconds"] / row["images"]} for row in growth["images"]]
    rows = [form.format(**row).split() for row in each]
    columns = ["training images", "training, s", "µs per image", "total, s", "data, MiB", "extra memory, MiB"]
    return (
        f"## Cost by number of images\n\nOne epoch of {growth['case']}, the data set's images repeated as needed; each "
        "row in its own process with one thread. *Extra memory* is the peak during training beyond what the process "
        f"held once the data were in place.\n\n{table(columns, rows)}"
    )


def _notes(measured: dict) -> str:
    notes = [
        "The usual methods get their images already decoded and in memory; reading files would slow them further.",
        "Their shifts are whole pixels, as in torchvision; lablib's are not. Rotation is bilinear everywhere.",
        "transformers and Lightning use 0 or 2 data loader workers, whichever made the plain loop faster in a trial "
        "epoch. Workers stay alive between epochs and may have their first batches ready when one begins, which "
        "favours these methods slightly.",
        "The tight loop has lablib's allocator settings and fused optimizer, but measures no training accuracy, writes "
        "no checkpoint and keeps no history.",
        "*Whole epoch* includes lablib's validation, history, best weights and checkpoint; on part of the data set, as "
        "here, they weigh more than on all of it.",
        "Runs side by side are timed from the start of the first to the end of the last, including the wait for the "
        "slower one.",
    ]
    notes += [f"{title} was left out, as it is not installed." for title in measured.get("absent", [])]
    return "## Notes\n\n" + "\n".join(f"- {note}" for note in notes)
