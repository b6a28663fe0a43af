"""What a dataset's folder holds, a column per split, and what is wrong in it, before anything is trained on it.

    python -m data.more --check DIR [--decode]
    python -m data.jmere --check DIR"""
import argparse
import sys
from collections import Counter
from pathlib import Path

from data import jmere, more
from data.images import check_box, open_image

PROBLEMS = ("file missing", "bad line", "image missing", "image unreadable", "bad box")
SHOWN = 10  # offenders named for each split


def main(task: str, arguments: list[str] | None = None) -> int:
    """0 where nothing is wrong, 1 where something is, 2 where nothing could be counted."""
    parser = argparse.ArgumentParser(prog=f"python -m data.{task}", allow_abbrev=False,
                                     description=f"Check a {task.upper()} folder before training on it.")
    parser.add_argument("--check", metavar="DIR", required=True, type=Path, help="the dataset's folder")
    if task == "more":
        parser.add_argument("--decode", action="store_true",
                            help="decode every image, to find those cut off in the middle (minutes)")
    settings = parser.parse_args(arguments)
    try:
        return check_more(settings.check, settings.decode) if task == "more" else check_jmere(settings.check)
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2


def check_more(folder: Path, decode: bool) -> int:
    labels = more.read_labels(folder)
    found = {split: check_split(folder, split, decode=decode) for split in more.SPLITS}
    print_table(["samples", *labels, *PROBLEMS], {split: counts for split, (counts, _) in found.items()})
    for split, (_, offenders) in found.items():
        for offender in offenders[:SHOWN]:
            print(offender)
        if len(offenders) > SHOWN:
            print(f"… and {len(offenders) - SHOWN} more in {split}")
    return int(any(offenders for _, offenders in found.values()))


def check_split(folder: Path, split: str, *, decode: bool = False) -> tuple[Counter, list[str]]:
    """(how many samples, of each label, and PROBLEMS; what is wrong, a line each) of a split of MORE, which is read to
    its end whatever is wrong in it; of a line's several faults the first is counted."""
    reader, counts, offenders = more.SplitReader(folder, split), Counter(), []
    if not reader.file.is_file():
        return Counter({"file missing": 1}), [f"{reader.file} is missing"]
    for where, line in reader.lines():
        counts["samples"] += 1
        problem = "bad line"
        try:
            sample = reader.sample(line, where)
            counts[sample.label] += 1
            problem = "image unreadable" if sample.image.is_file() else "image missing"
            first_time = sample.image not in reader.sizes
            size = reader.image_size(sample, where)
            if decode and first_time:
                open_image(sample.image)
            problem = "bad box"
            check_box(sample.box, size, where)
        except (ValueError, FileNotFoundError) as fault:
            if isinstance(fault, more.BoxFault):
                problem = "bad box"
                counts[more.dictionary(line, where)["relation"]] += 1
            counts[problem] += 1
            offenders.append(str(fault))
    if not counts["samples"]:
        return Counter({"bad line": 1}), [f"{reader.file}: no samples in it"]
    return counts, offenders


def check_jmere(folder: Path) -> int:
    """Raises what `load` raises at the first post that is wrong."""
    columns, relations = {}, set()
    for split in jmere.read_splits(folder):
        samples = jmere.load(folder, split, missing_images="blank")
        columns[split] = Counter(f"{relation} ({head}, {tail})" for sample in samples
                                 for _, head, _, tail, relation in sample.quintuples)
        relations.update(columns[split])
        columns[split] |= {"posts": len(samples), "posts without image": sum(one.image is None for one in samples),
                           "quintuples": columns[split].total()}
    print_table(["posts", "posts without image", "quintuples", *sorted(relations)], columns)
    return 0


def print_table(rows: list[str], columns: dict[str, Counter]) -> None:
    width = max(map(len, rows))
    print(" " * width, *(f"{split:>7}" for split in columns))
    for row in rows:
        print(f"{row:<{width}}", *(f"{counts[row]:>7,}" for counts in columns.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).stem))  # data/more.py or data/jmere.py
