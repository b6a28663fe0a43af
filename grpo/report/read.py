"""Run folders → plain data for the page. Runs may still be writing: a last line without its end is left for later."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

FILES = ("metrics.jsonl", "settings.json", "metrics.json")  # any of them makes a folder a run or an evaluation
SHOWN_BYTES = 12 * 2**20  # of rollouts in one page; beyond it records are left out, evenly over the run


@dataclass
class Run:
    """One folder that grpo.train, sft.train or grpo.evaluate wrote.

    columns   {name: one value or None a line of metrics.jsonl}; `step` is always there
    rollouts  the records of rollouts.jsonl (see grpo/runtime/rollout_log.py) that are shown, of `recorded` ones"""

    name: str
    folder: Path
    what_ran: dict = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)
    rollouts: list[dict] = field(default_factory=list)
    recorded: int = 0
    rollouts_state: tuple = ()
    evaluation: dict = field(default_factory=dict)
    best: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return "GRPO" if "reward" in self.columns or self.rollouts else "SFT" if self.columns else "evaluation"


def find_runs(words: list[str], wait: bool = False) -> list[Path]:
    """The folders named, or the runs directly inside them. ValueError names one that holds neither, unless `wait`."""
    folders = []
    for word in words:
        folder = Path(word)
        inside = sorted(path for path in folder.iterdir() if is_run(path)) if folder.is_dir() else []
        if is_run(folder):
            folders.append(folder)
        elif inside:
            folders += inside
        elif not wait:
            what = "no such folder" if not folder.is_dir() else f"no {', '.join(FILES)} in it or in a folder inside"
            raise ValueError(f"{word}: {what}; expected what grpo.train, sft.train or grpo.evaluate wrote")
    return list(dict.fromkeys(folder.absolute() for folder in folders))


def is_run(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


def short_names(folders: list[Path]) -> list[str]:
    """As few of the last parts of each path as tell them apart."""
    names = [folder.name for folder in folders]
    for depth in range(2, 20):
        if len(set(names)) == len(names):
            break
        longer = ["/".join(folder.parts[-depth:]) for folder in folders]
        names = [long if names.count(name) > 1 else name for long, name in zip(longer, names)]
    return names


def read_run(folder: Path, name: str, before: Run | None = None) -> Run:
    """All that the page shows of a run. `before`, an earlier reading, saves reading rollouts that are the same."""
    run = Run(name, folder)
    run.what_ran = read_object(folder / "settings.json", run.warnings)
    metrics = read_object(folder / "metrics.json", run.warnings)
    run.evaluation = {name: value for name, value in metrics.items() if is_number(value)}
    run.best = read_object(folder / "best.json", run.warnings)
    rows = [row for row in read_lines(folder / "metrics.jsonl", run.warnings) if is_number(row.get("step"))]
    run.columns = columns(rows, read_lines(folder / "curriculum.jsonl", run.warnings))
    path = folder / "rollouts.jsonl"
    run.rollouts_state = (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else ()
    if before and before.rollouts_state == run.rollouts_state:
        run.rollouts, run.recorded = before.rollouts, before.recorded
    else:
        records = [record for record in read_lines(path, run.warnings) if is_record(record)]
        run.rollouts, run.recorded = spread(records, SHOWN_BYTES), len(records)
    return run


def read_object(path: Path, warnings: list[str]) -> dict:
    """A JSON object, {} where there is none yet."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        warnings.append(f"{path.name} cannot be read: {problem}")
        return {}
    return content if isinstance(content, dict) else {}


def read_lines(path: Path, warnings: list[str]) -> list[dict]:
    """The whole lines of a JSONL file. A broken one in between (a disk that was full) is left out and told."""
    try:
        text = path.read_bytes()
    except OSError:
        return []
    found = []
    for number, line in enumerate(text.split(b"\n")[:-1], 1):  # what stands after the last line's end is not whole yet
        try:
            found.append(json.loads(line))
        except ValueError:
            warnings.append(f"{path.name}:{number}: not a whole line of JSON; left out")
    return [line for line in found if isinstance(line, dict)]


def columns(rows: list[dict], epochs: list[dict]) -> dict[str, list]:
    """Rows → columns of numbers in the order of first appearance; the curriculum's ratio joins by its epoch."""
    ratio = {epoch.get("epoch"): epoch["easy"] / epoch["hard"] for epoch in epochs
             if is_number(epoch.get("hard")) and epoch["hard"] and is_number(epoch.get("easy"))}
    for row in rows if any(ratio.values()) else ():
        if row.get("epoch") in ratio:
            row["curriculum/easy_per_hard"] = ratio[row["epoch"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: [shorter(row.get(name)) for row in rows] for name in names}
    return {name: values for name, values in table.items() if name == "step" or values.count(None) < len(values)}


def shorter(value) -> float | int | None:
    return None if not is_number(value) else value if isinstance(value, int) else float(f"{value:.6g}")


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_record(record: dict) -> bool:
    """Whether the page can show it: another program's line must not break the page."""
    words, numbers, lists = [], [record.get("step")], [record.get("groups")]
    try:
        for group in record["groups"]:
            words += [group["id"], *(group.get(name) or "" for name in ("prompt", "target", "text", "entity"))]
            words += group.get("images") or []
            cx, cy, width, height = group.get("box") or [0, 0, 0, 0]
            numbers += [cx, cy, width, height, group["completions"][0]["reward"]]
            for completion in group["completions"]:
                lists.append(completion["pieces"])
                words += lists[-1]
                numbers += [completion["advantage"], completion["reward"]]
    except (AttributeError, LookupError, TypeError, ValueError):
        return False
    kinds = (words, str), (lists, list)
    return all(isinstance(one, kind) for some, kind in kinds for one in some) and all(map(is_number, numbers))


def spread(records: list[dict], budget: int) -> list[dict]:
    """Records that fit the budget together, evenly spread, the first and the last among them."""
    sizes = [len(json.dumps(record)) for record in records]
    kept = list(range(len(records)))
    while sum(sizes[i] for i in kept) > budget and len(kept) > 2:
        kept = sorted({*kept[::2], kept[-1]})
    return [records[i] for i in kept]
