"""A task whose prompts have two images and an exact length: what the benchmarks train on.

The "dataset" is a description, SIDE/TEXT: pixels a side of both images, and the text of every prompt. Images
come from the sample's number, rewards from the completion's text alone.
"""

import zlib
from dataclasses import dataclass

from benchmarks.shapes import images

WEIGHTS = {"luck": 1.0}


@dataclass(frozen=True)
class Sample:
    id: str
    number: int
    side: int
    text: str


def load(folder: str, split: str, *, missing_images: str = "stop") -> list[Sample]:
    side, _, text = folder.partition("/")
    return [Sample(f"{split}/{number}", number, int(side), text) for number in range(64)]


def build_prompt(sample: Sample, *, reasoning: bool = True):
    return images(sample.number, sample.side), sample.text


def target(sample: Sample) -> str:
    return ""


def stratum(sample: Sample) -> str:
    return ""


def is_none(sample: Sample) -> bool:
    return False


def reward(completion: str, sample: Sample) -> dict[str, float]:
    """Arbitrary, but the same for the same text, and rarely equal within a group."""
    return {"luck": zlib.crc32(completion.encode()) % 1000 / 1000}


def correct(completion: str, sample: Sample) -> bool:
    return False


def parse(completion: str, sample: Sample) -> None:
    return None


def metrics(completions: list[str], samples: list[Sample]) -> dict[str, float]:
    return {"f1": 0.0}
