"""What was tested beside the figures of the paper, as Markdown and JSON.

    python -m grpo.report.paper_table docs/recipes/jmere-r1/paper.json --runs runs/jmere-r1/test --output
    runs/jmere-r1/table

The recipe names the metrics and, for each row, the folder under --runs where grpo.evaluate wrote its metrics.json (none
for a row that is only the paper's), and the paper's figures where it gives any. A row not run yet shows a dash;
`<folder>_greedy` stands in a column of its own where any was run. Writes <output>.md and <output>.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from grpo.runtime.files import write_json
from grpo.runtime.settings import read_settings, required, run_program, setting


@dataclass
class Settings:
    """What was tested beside the figures of the paper, as Markdown and JSON."""

    recipe: str = setting("", "the paper's rows: docs/recipes/*/paper.json", positional=True, path="file", top=True)
    runs: str = required("folder of the evaluations' folders")
    output: str = required("where to write, without .md and .json")


def read_object(path: Path) -> dict:
    """A JSON object; ValueError with its path for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}; a JSON object expected")
    return content


def measured(runs: Path, name: str | None, metric: str) -> float | None:
    """A metric of one evaluation in percent; None where there is no such evaluation."""
    path = runs / (name or "") / "metrics.json"
    if not name or not path.exists():
        return None
    metrics = read_object(path)
    if metric not in metrics:
        raise ValueError(f"{path}: no {metric}; found {', '.join(metrics)}")
    return 100 * metrics[metric]


def rows_of(paper: dict, runs: Path) -> list[dict]:
    """One {"title", metric: {"ours", "paper", "greedy"}} a row."""
    rows = []
    for row in paper["rows"]:
        name = row.get("folder")
        rows.append({"title": row["title"], **{metric: {"ours": measured(runs, name, metric), "paper": row.get(metric),
            "greedy": measured(runs, name and f"{name}_greedy", metric)} for metric in paper["metrics"]}})
    return rows


def markdown(paper: dict, rows: list[dict]) -> str:
    """The table: ours and the paper's, a metric at a time, and greedy where anything was run both ways."""
    greedy = any(row[metric]["greedy"] is not None for row in rows for metric in paper["metrics"])
    columns = ("ours", "paper", "greedy") if greedy else ("ours", "paper")
    cells = [["%", *(f"{title}, {what}" for title in paper["metrics"].values() for what in columns)]]
    for row in rows:
        values = [row[metric][what] for metric in paper["metrics"] for what in columns]
        cells.append([row["title"], *("–" if value is None else f"{value:.2f}" for value in values)])
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:], "", f"Paper: {paper['source']}."]) + "\n"


def main() -> None:
    settings = read_settings(Settings)
    recipe, output = Path(settings.recipe), Path(settings.output)
    paper = read_object(recipe)
    if missing := [name for name in ("source", "metrics", "rows") if name not in paper]:
        raise ValueError(f"{recipe}: no {missing[0]}; source, metrics and rows expected")
    rows = rows_of(paper, Path(settings.runs))
    text = markdown(paper, rows)
    write_json(output.with_name(output.name + ".json"), rows)
    output.with_name(output.name + ".md").write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {output}.md and {output}.json")


if __name__ == "__main__":
    run_program(main)
