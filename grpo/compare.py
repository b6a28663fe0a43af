"""Metrics of several evaluations side by side: a table to look at, the same numbers as JSON.

    python -m grpo.compare sft=runs/demo/sft grpo=runs/demo/grpo --output results.json"""

from dataclasses import dataclass
from pathlib import Path

from data.read import read_object, shown
from grpo.runtime.files import write_json
from grpo.runtime.log import table
from grpo.runtime.settings import read_settings, run_program, setting

HEADLINE = ("accuracy", "precision", "recall", "f1")


@dataclass
class Settings:
    """Metrics of several evaluations side by side."""

    evaluations: list[str] = setting([], "a name for each, and the folder that grpo.evaluate wrote", positional=True,
                                     metavar="NAME=FOLDER", top=True)
    output: str = setting("", "JSON file for the same numbers; empty for none", top=True)


def read_metrics(folder: str) -> dict[str, float]:
    """The headline metrics of one evaluation, shares between 0 and 1: accuracy, and of the others what there is."""
    path, expected = Path(folder) / "metrics.json", "what grpo.evaluate writes: accuracy at least"
    if not path.is_file():
        raise ValueError(f"{path} is missing; expected {expected}")
    found = read_object(path, expected)
    metrics = {name: found.get(name) for name in HEADLINE if name == "accuracy" or name in found}
    for name, value in metrics.items():
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError(f"{path}: found {shown(value)} for {name}, a share between 0 and 1; expected {expected}")
    return metrics


def main(words: list[str] | None = None) -> None:
    settings = read_settings(Settings, words)
    folders = {name: folder for name, _, folder in (word.partition("=") for word in settings.evaluations)}
    if len(folders) < len(settings.evaluations) or not all(folders.values()):
        raise ValueError(f"found {' '.join(settings.evaluations)}; expected name=folder …, each name once")
    results = {name: read_metrics(folder) for name, folder in folders.items()}
    metrics = [name for name in HEADLINE if all(name in row for row in results.values())]
    rows = [[name, *(f"{100 * row[metric]:.2f}" for metric in metrics)] for name, row in results.items()]
    print(table([["%", *metrics], *rows]))
    for name, folder in folders.items():
        print(f"{name}: {folder}/predictions.jsonl")
    if settings.output:
        write_json(Path(settings.output), results)
        print(f"wrote {settings.output}")


if __name__ == "__main__":
    run_program(main)
