"""The whole MORE folder read through once: how many samples of each label, and what is wrong with the others.

    python -m data.more --check DIR [--decode]"""
import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field

from data.images import check_box, open_image
from data.more import SPLITS, BoxFault, SplitReader, read_labels

PROBLEMS = ("file missing", "bad line", "image missing", "image unreadable", "bad box")
SHOWN = 10  # offenders named for each split


@dataclass
class SplitReport:
    """What one split holds: counts of its lines by label, and of what is wrong with them by problem."""
    samples: int = 0
    labels: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    offenders: list[str] = field(default_factory=list)


def main(arguments: list[str] | None = None) -> int:
    """The program; 0 where nothing is wrong, 1 where something is, 2 where the folder is no MORE folder."""
    parser = argparse.ArgumentParser(prog="python -m data.more", allow_abbrev=False,
                                     description="Check a MORE folder before training on it.")
    parser.add_argument("--check", metavar="DIR", required=True, help="the folder with txt/, img_org/ and rel2id.json")
    parser.add_argument("--decode", action="store_true",
                        help="decode every image, to find those cut off in the middle (minutes)")
    settings = parser.parse_args(arguments)
    try:
        labels = read_labels(settings.check)
    except (ValueError, FileNotFoundError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    reports = {split: check_split(settings.check, split, decode=settings.decode) for split in SPLITS}
    print(table(labels, reports))
    for split, report in reports.items():
        for offender in report.offenders:
            print(offender)
        if unnamed := sum(report.problems.values()) - len(report.offenders):
            print(f"… and {unnamed} more in {split}")
    return int(any(report.problems for report in reports.values()))


def check_split(folder, split: str, *, decode: bool = False) -> SplitReport:
    """Read a split to its end whatever is wrong in it; of a line's several faults the first is counted."""
    reader, report = SplitReader(folder, split), SplitReport()
    if not reader.file.is_file():
        report.problems["file missing"] += 1
        report.offenders.append(f"{reader.file} is missing")
        return report
    for where, line in reader.lines():
        problem, message = _examine(reader, where, line, report, decode)
        if problem:
            report.problems[problem] += 1
            report.offenders.append(message)
            del report.offenders[SHOWN:]
    if not report.samples:
        report.problems["bad line"] += 1
        report.offenders.append(f"{reader.file}: no samples in it")
    return report


def _examine(reader: SplitReader, where: str, line: str, report: SplitReport, decode: bool):
    """(one of PROBLEMS, what is wrong in one line) or (None, None); counts the line in the report."""
    report.samples += 1
    problem = "bad line"
    try:
        sample = reader.sample(line, where)
        report.labels[sample.label] += 1
        problem = "image unreadable" if sample.image.is_file() else "image missing"
        first_time = sample.image not in reader.sizes
        size = reader.image_size(sample, where)
        if decode and first_time:
            open_image(sample.image)
        problem = "bad box"
        check_box(sample.box, size, where)
    except BoxFault as fault:
        report.labels[fault.label] += 1
        return "bad box", str(fault)
    except (ValueError, FileNotFoundError) as fault:
        return problem, str(fault)
    return None, None


def table(labels: tuple[str, ...], reports: dict[str, SplitReport]) -> str:
    """Labels, the total and the problems by split, as a Markdown table."""
    rows = [("samples", [report.samples for report in reports.values()])]
    rows += [(label, [report.labels[label] for report in reports.values()]) for label in labels]
    rows += [(problem, [report.problems[problem] for report in reports.values()]) for problem in PROBLEMS]
    width = max(len(name) for name, _ in rows)
    lines = [f"| {'':{width}} | " + " | ".join(f"{split:>7}" for split in reports) + " |",
             f"|-{'-' * width}-|" + "|".join("-" * 8 + ":" for _ in reports) + "|"]
    lines += [f"| {name:{width}} | " + " | ".join(f"{count:7,}" for count in counts) + " |" for name, counts in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
