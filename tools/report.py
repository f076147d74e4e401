"""Write results/README.md and fill in the tables and numbers of README.md, from results/ and images/.

python tools/report.py            write both
python tools/report.py --check    write nothing; 1 if one of them would change

In README.md a number stands between `<!--TABLE: ROW-->` and `<!--end-->`; ROW is a model or a comparison of
results/TABLE.csv. `<!--table TABLE: COLUMN, COLUMN-->` is a table and `<!--figure FILE: ALT TEXT-->` a figure.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

import pandas as pd

from lablib.statistics import Summary, labels, points, readable_table

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"(<!--(?:(table|figure) )?([\w.-]+): ([^>]+?)-->).*?<!--end-->", re.DOTALL)


def read(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """A table for people, and each of its rows as a number in a sentence."""
    table = pd.read_csv(path, dtype={"parameters": "Int64"})
    rows = table.to_dict("records")
    if "test_accuracy_ci95" in table:
        columns = ("test_accuracy_mean", "test_accuracy_std", "test_accuracy_ci95", "n")
        return readable_table(table), {row["model"]: Summary(*map(row.get, columns)).percent() for row in rows}
    if "by_seed" in table:
        numbers = dict(zip(labels(table), map(points, rows), strict=True))
        texts = [(points(row), "yes" if row["significant"] else "") for row in rows]
        return pd.DataFrame(texts, pd.Index([*numbers], name="comparison"), ["difference", "significant"]), numbers
    return table.map(lambda x: f"{x:.4g}" if isinstance(x, float) else str(x)).set_index(table.columns[0]), {}


def markdown(table: pd.DataFrame) -> str:
    lines = [[table.index.name or "model", *table.columns], ["---"] * (1 + table.shape[1]), *table.itertuples()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def filled(root: Path, mark: re.Match) -> str:
    """A marked place of README.md with what belongs there. Raises KeyError for a row or column that is not there."""
    start, kind, name, label = mark.groups()
    if kind == "figure":
        text = f'<img src="images/{name}" alt="{label}" width="520">'
    else:
        table, numbers = read(root / f"results/{name}.csv")
        text = markdown(table[label.split(", ")]) if kind else numbers[label]
    return f"{start}\n\n{text}\n\n<!--end-->" if kind else f"{start}{text}<!--end-->"


def results_page(root: Path) -> str:
    captions = tomllib.loads((ROOT / "tools" / "captions.toml").read_text("utf-8"))
    runs = [json.loads(path.read_bytes()) for path in sorted(root.glob("results/runs/*/result.json"))]
    parts = [captions["introduction"]]
    for section in captions["section"]:
        tables = {root / f"results/{name}.csv": text for name, text in section["tables"].items()}
        figures = {root / f"images/{name}": text for name, text in section["figures"].items()}
        precision = ", ".join(sorted({run["precision"] for run in runs if run["dataset"] == section["dataset"]}))
        executed = root / "results" / section["notebook"]
        parts.append(f"## {section['title']}\n\nData set {section['dataset']}, precision {precision}.\n")
        parts += [f"[Executed notebook]({executed.name})\n"] if executed.exists() else []
        parts += [f"**{text}**\n\n{markdown(read(path)[0])}\n" for path, text in tables.items() if path.exists()]
        parts += [f"![{text}](../images/{path.name})\n\n*{text}*\n" for path, text in figures.items() if path.exists()]
    pages = [path for path in sorted(root.glob("results/*.md")) if path.name != "README.md"]
    titles = [f"- [{path.read_text('utf-8').splitlines()[0].strip('# ')}]({path.name})" for path in pages]
    return "\n".join([*parts, "## Measurements", "", *titles, ""])


def main(arguments: list[str], root: Path = ROOT) -> int:
    """0; 1 if something is out of date and `--check` is given."""
    check, readme, page = "--check" in arguments, root / "README.md", root / "results" / "README.md"
    texts = {readme: MARK.sub(lambda mark: filled(root, mark), readme.read_text("utf-8")), page: results_page(root)}
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(path, "is out of date: run python tools/report.py" if check else "written")
        if not check:
            path.write_text(texts[path], "utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
