"""results/ -> the README's tables and findings, each between its markers.

python -m lablib.readme            write them
python -m lablib.readme --check    only say whether they are up to date
"""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pandas as pd

from lablib import reference
from lablib.findings import findings, mostly
from lablib.report import (
    by_depth,
    by_family,
    by_question,
    by_regime,
    markdown,
    readable_depth,
    readable_differences,
    readable_distillation,
    readable_prices,
    readable_regimes,
    readable_rules,
    untimed,
    with_ways,
)
from lablib.statistics import points, readable_table

_BENCHMARK = "benchmark-cpu-2-cores.json"
_WAYS = {
    "student": "usual student lab",
    "transformers": "transformers.Trainer",
    "lightning": "Lightning",
    "keras": "Keras",
    "tight": "tight loop",
    "lablib": "lablib, one run",
    "side by side": "lablib, runs side by side",
}
_MARKED = r"(<!-- table: {name} -->\n).*?(<!-- end -->)"


def tables(results: Path) -> dict[str, str]:
    """Markdown tables by name, from the CSV files in a folder. Raises FileNotFoundError if one is missing."""
    read = {path.stem: _finished(pd.read_csv(path)) for path in sorted(results.glob("*.csv"))}
    mlps = ("mlps_mnist", "mlps_mnist_cosine", "mlps_mnist_depth", "mlps_mnist_differences")
    cnns = ("cnns_cifar10-jpeg", "cnns_cifar10-jpeg_differences")
    distillation = ("distillation_cifar10-jpeg", "distillation_cifar10-jpeg_rules")
    regimes = tuple(f"regimes_cifar10-jpeg{part}" for part in ("", "_differences", "_prices"))
    depth = ("depth_cifar10-jpeg", "depth_cifar10-jpeg_differences")
    wide = "cnns_wide_cifar10-jpeg"
    missing = [f"{name}.csv" for name in (*mlps, *cnns, *distillation, *regimes, *depth, wide) if name not in read]
    if missing:
        raise FileNotFoundError(f"{results} lacks {', '.join(missing)}; `make full` writes them")
    if not (results / _BENCHMARK).exists():
        raise FileNotFoundError(f"{results} lacks {_BENCHMARK}; `make bench` writes it on a machine of 2 cores")
    return {
        "findings": findings(read),
        "mlps_mnist": markdown(readable_table(read["mlps_mnist"], reference.MNIST)),
        "mlps_mnist_cosine": markdown(readable_table(read["mlps_mnist_cosine"])),
        "mlps_mnist_depth": by_depth_with_seeds(read["mlps_mnist_depth"]),
        "mlps_mnist_differences": markdown(readable_differences(read["mlps_mnist_differences"])),
        "cnns_cifar10-jpeg": markdown(untimed(readable_table(read["cnns_cifar10-jpeg"]))),
        "cnns_cifar10-jpeg_differences": markdown(by_question(read["cnns_cifar10-jpeg_differences"])),
        "distillation_cifar10-jpeg": distillation_table(read["distillation_cifar10-jpeg"]),
        "distillation_cifar10-jpeg_rules": markdown(readable_rules(read["distillation_cifar10-jpeg_rules"])),
        "regimes_cifar10-jpeg": markdown(readable_regimes(read["regimes_cifar10-jpeg"])),
        "regimes_cifar10-jpeg_differences": markdown(by_regime(read["regimes_cifar10-jpeg_differences"])),
        "regimes_cifar10-jpeg_prices": markdown(readable_prices(read["regimes_cifar10-jpeg_prices"])),
        "depth_cifar10-jpeg": depth_by_way(read["depth_cifar10-jpeg"]),
        "depth_cifar10-jpeg_gains": markdown(readable_depth(read["depth_cifar10-jpeg_differences"])),
        "depth_cifar10-jpeg_differences": markdown(by_family(read["depth_cifar10-jpeg_differences"])),
        wide: markdown(untimed(readable_table(read[wide], reference.CIFAR10))),
        "speed": speed(json.loads((results / _BENCHMARK).read_bytes())),
    }


def _finished(table: pd.DataFrame) -> pd.DataFrame:
    """Without the networks of which no run has a result, so that the seeds of the others are whole numbers."""
    return table.dropna(subset="seeds").astype({"seeds": int}) if "seeds" in table else table


def by_depth_with_seeds(table: pd.DataFrame) -> str:
    """Test accuracy by family and depth, and below it the number of seeds."""
    return f"{markdown(by_depth(table))}\nn = {mostly(dict(zip(table['model'], table['seeds'], strict=True)))}.\n"


def depth_by_way(table: pd.DataFrame) -> str:
    """Test accuracy by family, way of training and depth, and below it the number of seeds and the precision."""
    names = (table["model"] + " (" + table["regime"] + ")").to_list()
    seeds, precision = (mostly(dict(zip(names, table[key], strict=True))) for key in ("seeds", "precision"))
    return f"{markdown(by_depth(with_ways(table)))}\nn = {seeds}; trained in {precision}.\n"


def distillation_table(table: pd.DataFrame) -> str:
    """The table of a distillation, and below it how its gain and the reference's come about."""
    ours = table.set_index("role")["test_accuracy_mean"]
    known = reference.CIFAR10_DISTILLATION
    above = {role: points(ours[role] - known[role]) for role in known}
    gains = (
        points(known["distilled"] - known["baseline"]),
        points(table.set_index("role").loc["distilled", "gain_mean"]),
    )
    lies = f"our baseline lies {above['baseline']}, our distilled student {above['distilled']}, our teacher"
    said = f"The reference gains {gains[0]} points, ours {gains[1]}: beside the reference {lies} {above['teacher']}."
    return f"{markdown(untimed(readable_distillation(table)))}\n{said}\n"


def speed(measured: dict) -> str:
    """Training images a second by network and way of training, each in its fastest variant, and where and when."""
    rows = {}
    for case in measured["cases"]:
        best: dict[str, float] = {}
        for entry in case["entries"]:
            way = _WAYS["side by side" if "side by side" in entry["variant"] else entry["rival"]]
            best[way] = max(best.get(way, 0.0), median(entry["train"]))
        rows[case["name"]] = {way: f"{best[way]:,.0f}" if way in best else "–" for way in _WAYS.values()}
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("images a second")
    machine = measured["machine"]
    processor = " with ".join([machine["gpu"] or machine["processor"], *filter(None, [", ".join(machine["units"])])])
    where = f"{processor}, {machine['cores']} cores, PyTorch {machine['versions']['torch']}"
    epochs = f"the median of {measured['rounds']} epochs, in turns"
    return f"{markdown(table)}\nMeasured on {measured['date']} on {where}: {epochs}.\n"


def filled(text: str, results: Path) -> str:
    """A text with the tables between its markers written anew. Raises ValueError for a table without its place."""
    for name, table in tables(results).items():
        text, count = re.subn(_MARKED.format(name=name), rf"\g<1>\n{table}\n\g<2>", text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"the README needs '<!-- table: {name} -->' and '<!-- end -->' once; it has them {count}×")
    return text


def main(arguments: list[str]) -> int:
    """0, or 1 if `--check` finds the README out of date."""
    readme = Path("README.md")
    text = readme.read_text(encoding="utf-8")
    new = filled(text, Path("results"))
    if "--check" in arguments:
        print("README.md is up to date" if new == text else "README.md differs from results/: run `make readme`")
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
