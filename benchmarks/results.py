"""benchmarks/RESULTS.md from results.jsonl: of every benchmark and set of cases the last run on a CPU and on
each GPU, its machine, date, versions, table.

    python -m benchmarks.results
"""

import json

from benchmarks.record import RESULTS

BY_MACHINE = {"limit", "decode_cost"}  # what they measure is the machine: another's table does not replace it
DRAWN = {
    ("growth", ""): ("growth.svg", "seconds over G"),
    ("demo_seeds", "text"): ("text_demo.svg", "reward over rollouts"),
}


def cell(value) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: list[dict]) -> list[str]:
    """A Markdown table; bytes become megabytes."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    megabytes = lambda name, value: (
        round(value / 1e6) if name.endswith("bytes") and isinstance(value, (int, float)) else value
    )
    head = [name.replace("_bytes", ", MB").replace("_", " ") for name in names]
    body = [[cell(megabytes(name, row.get(name, ""))) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *body)]


def main() -> None:
    runs = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    named = lambda row: row.get("case", row.get("shape", ""))
    cases = lambda run: ", ".join(dict.fromkeys(filter(None, map(str, map(named, run["figures"])))))
    same = lambda run: run["machine"].endswith(" cores") and run["benchmark"] not in BY_MACHINE
    machine = lambda run: "" if same(run) else run["machine"]  # of CPUs the newest counts
    # one of other cases or other group sizes does not stand in another's place
    last = {(run["benchmark"], machine(run), run["settings"].get("task", ""),
             f"{cases(run)} {run['settings'].get('group_size', '')}"): run for run in runs}
    lines = [
        "# Measured",
        "",
        "Written by `python -m benchmarks.results` from `results.jsonl`, which every benchmark appends to",
        "with `--record`. What each one measures, and how, stands at the top of its file. Times on shared",
        "machines are noisy: compare within a table.",
        "",
    ]
    settled = {key for key in last if not RESULTS.with_name(f"{key[0]}.py").exists()}
    for key, run in last.items():
        name, _, task, _ = key
        if key in settled:
            continue
        versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
        settings = ", ".join(f"{name} {cell(value)}" for name, value in run["settings"].items())
        lines += [
            f"## {name} {task}".rstrip(),
            "",
            f"`python -m benchmarks.{name}`, {run['date']}, {run['machine']}, {versions}, "
            f"at {run['commit']}; {settings}.",
            "",
        ]
        lines += [*table(run["figures"]), ""]
        lines += [f"**{line}**\n" for line in run["summary"].split("; ") if line]
        if (name, task) in DRAWN:
            lines += [f"![{DRAWN[name, task][1]}]({DRAWN[name, task][0]})", ""]
    lines += ["## Settled", "", "Measured once for a decision; the program is in the history, at the commit.", ""]
    lines += [
        f"- {run['benchmark']} ({run['date']}, {run['machine']}, torch {run['versions']['torch']}, "
        f"at {run['commit']}): "
        f"{run['summary']}"
        for run in (last[key] for key in sorted(settled))
    ]
    RESULTS.with_name("RESULTS.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {RESULTS.with_name('RESULTS.md')}")


if __name__ == "__main__":
    main()
