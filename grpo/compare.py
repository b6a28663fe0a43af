"""Metrics of several evaluations side by side: a table to look at, the same numbers as JSON.

    python -m grpo.compare sft=runs/demo/sft grpo=runs/demo/grpo --output results.json
"""

import json
from dataclasses import dataclass
from pathlib import Path

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


def read_metrics(folder: str, metrics: tuple[str, ...] = HEADLINE) -> dict[str, float]:
    """The headline metrics of one evaluation, shares between 0 and 1."""
    path = Path(folder) / "metrics.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in metrics}
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: {error}; expected what grpo.evaluate writes") from None
    except KeyError as error:
        raise ValueError(f"{path}: no {error}; expected {', '.join(metrics)}") from None


def main() -> None:
    settings = read_settings(Settings)
    words = settings.evaluations
    if any("=" not in word for word in words):
        raise ValueError(f"found {' '.join(words)}; expected name=folder [name=folder …] [--output FILE]")
    results = {name: read_metrics(folder) for name, _, folder in (word.partition("=") for word in words)}
    print(table([["%", *HEADLINE], *([name, *(f"{100 * row[m]:.2f}" for m in HEADLINE)] for name, row in results.items())]))
    for word in words:
        print(f"{word.partition('=')[0]}: {word.partition('=')[2]}/predictions.jsonl")
    if settings.output:
        write_json(Path(settings.output), results)
        print(f"wrote {settings.output}")


if __name__ == "__main__":
    run_program(main)
