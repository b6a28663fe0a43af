"""Which samples are trained on when: the stratified cold-start draw and MORE-R1's Progressive Sample-Mixing Strategy.

Everything here depends on (seed, epoch) and on nothing else: not on the number of processes, which share a batch out
among themselves, nor on what was drawn before, so that a resumed run draws what the interrupted one would have drawn.
"""
import logging
import random
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from fractions import Fraction

MIXINGS = ("progressive", "raw")
LAST_BATCHES = ("fill", "drop")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """One epoch's mini-batches, in order, and what the journal writes down about them."""
    batches: list[list]  # every batch holds prompts-per-rollout samples
    record: dict


def easy_ratio(epoch: int, decay: float) -> float:
    """Easy samples per hard one, decay^epoch with epochs from 0 (MORE-R1, equation 6, counts t = 1, 2, … there).

    1 in the first epoch, except that decay 0 means hard samples only from the first epoch on; decay 1 is always 1.
    """
    if epoch < 0 or not 0 <= decay <= 1:
        raise ValueError(f"epoch {epoch}, decay {decay}: an epoch from 0 and a decay between 0 and 1 expected")
    return float(decay) ** epoch if decay else 0.0


def stratified_draw(samples: list, fraction: float, stratum: Callable[[object], Hashable], seed: int):
    """(drawn, rest): `fraction` of each stratum at random, both lists in the samples' own order.

    A stratum of n gives n·fraction rounded to the nearest, halves up, and at least one: a label that the cold start
    never shows is not learned there. The total is therefore the fraction of all only up to half a sample a stratum
    (and one for each stratum under 1 / (2·fraction) samples).
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction}: a share between 0 and 1 expected")
    strata: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        strata.setdefault(stratum(sample), []).append(index)
    drawn = set()
    for name, indices in strata.items():
        count = int(len(indices) * exact(fraction) + Fraction(1, 2))
        count = max(count, 1) if fraction else 0
        # Each stratum has its own generator: another stratum's size changes nothing here.
        drawn.update(_generator(seed, "draw", name).sample(indices, count))
    return ([sample for index, sample in enumerate(samples) if index in drawn],
            [sample for index, sample in enumerate(samples) if index not in drawn])


def none_share(samples: list, is_none: Callable[[object], bool]) -> float:
    """The share of `none` in the original training set, which every easy draw keeps."""
    return sum(map(is_none, samples)) / len(samples) if samples else 0.0


def epoch_batches(hard: list, easy: list, *, epoch: int, batch_size: int, is_none: Callable[[object], bool],
                  none_share: float, decay: float = 0.5, mixing: str = "progressive", last: str = "fill",
                  seed: int = 0) -> Epoch:
    """The epoch's mini-batches of `batch_size` samples (prompts per rollout over all processes).

    progressive: all hard samples and `easy_ratio(epoch, decay)` times as many easy ones, drawn anew each epoch with
    the original training set's `none_share`; after every batch the easy samples so far are the ratio's share of all
    samples so far, rounded down. Where there are too few easy samples all of them are taken, the ratio is theirs, and
    the log says so; with none at all training goes on with hard ones only.
    raw: all of both in one shuffle (the ablation).
    last: "drop" leaves the incomplete last batch out; "fill" completes it in the same ratio, with easy samples not
    drawn yet while there are any, otherwise with the epoch's first ones once more.

    Raises a one-line ValueError where nothing can be trained on.
    """
    _refuse(hard, easy, batch_size, mixing, last)
    if mixing == "raw":
        wanted = Fraction(len(easy), len(hard)) if hard else None
        drawn_hard, drawn_easy = _shuffled(hard, seed, epoch, "hard"), _shuffled(easy, seed, epoch, "easy")
        spare = []
    else:
        wanted = exact(easy_ratio(epoch, decay))
        drawn_hard = _shuffled(hard, seed, epoch, "hard")
        drawn_easy, spare = draw_easy(easy, int(len(hard) * wanted), is_none, none_share,
                                      _generator(seed, epoch, "easy"))
