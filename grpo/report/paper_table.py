"""What was tested beside the figures of the paper, as Markdown and JSON.

    python -m grpo.report.paper_table docs/recipes/jmere-r1/paper.json --runs runs/jmere-r1/test --output TABLE

The recipe names the metrics and, for each row, the folder under --runs where grpo.evaluate wrote its metrics.json (none
for a row that is only the paper's), and the paper's figures where it gives any. A row not run yet shows a dash;
`<folder>_greedy` stands in a column of its own where any was run. Writes <output>.md and <output>.json."""

from dataclasses import dataclass
from pathlib import Path

from data.read import read_object
from grpo.runtime.files import write_json
from grpo.runtime.settings import read_settings, required, run_program, setting


@dataclass
class Settings:
    """What was tested beside the figures of the paper, as Markdown and JSON."""

    recipe: str = setting("", "the paper's rows: docs/recipes/*/paper.json", positional=True, path="file", top=True)
    runs: str = required("folder of the evaluations' folders")
    output: str = required("where to write, without .md and .json")


def measured(runs: Path, name: str | None, metric: str) -> float | None:
    """A metric of one evaluation in percent; None where there is no such evaluation."""
    path = runs / (name or "") / "metrics.json"
    if not name or not path.exists():
        return None
    metrics = read_object(path, "a JSON object of metrics")
    if metric not in metrics:
        raise ValueError(f"{path}: no {metric}; found {', '.join(metrics)}")
    return 100 * metrics[metric]


def rows_of(paper: dict, runs: Path) -> list[dict]:
    """One {"title", metric: {"ours", "paper", "greedy"}} a row."""
    def figures(row: dict, metric: str) -> dict:
        name = row.get("folder")
        greedy = measured(runs, name and f"{name}_greedy", metric)
        return {"ours": measured(runs, name, metric), "paper": row.get(metric), "greedy": greedy}

    return [{"title": row["title"], **{metric: figures(row, metric) for metric in paper["metrics"]}}
            for row in paper["rows"]]


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
    paper = read_object(recipe, "a JSON object of the paper's rows")
    if missing := [name for name in ("source", "metrics", "rows") if name not in paper]:
        raise ValueError(f"{recipe}: no {missing[0]}; source, metrics and rows expected")
    rows = rows_of(paper, Path(settings.runs))
    text = markdown(paper, rows)
    write_json(output.with_name(output.name + ".json"), rows)
    output.with_name(output.name + ".md").write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {output}.md and {output}.json")


if __name__ == "__main__":
    run_program(main)
