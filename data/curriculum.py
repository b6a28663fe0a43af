"""Which samples are trained on when: the cold-start draw and MORE-R1's Progressive Sample-Mixing Strategy.

Everything here depends on (seed, epoch), the lists and their order alone: not on the number of ranks, which share out
a batch among themselves, nor on earlier draws, so that a resumed run draws what the interrupted one would have."""
import logging
import random
from collections.abc import Callable, Hashable
from fractions import Fraction
from itertools import cycle, islice
from typing import NamedTuple

MIXINGS = ("progressive", "raw")
LAST_BATCHES = ("fill", "drop")
log = logging.getLogger(__name__)


class Epoch(NamedTuple):
    """One epoch's mini-batches, in order, and the counts that the metrics_log keeps of them."""
    batches: list[list]
    record: dict


def easy_ratio(epoch: int, decay: float) -> float:
    """Easy samples per hard one: decay^epoch, epochs from 0 (MORE-R1, equation 6, has t from 1); none with decay 0."""
    if epoch < 0 or not 0 <= decay <= 1:
        raise ValueError(f"epoch {epoch}, decay {decay}: epochs from 0 and a decay from 0 to 1 expected")
    return float(decay) ** epoch if decay else 0.0


def stratified_draw(samples: list, fraction: float, stratum: Callable, seed: int) -> tuple[list, list]:
    """(drawn, rest): `fraction` of each stratum at random, both lists in the order of `samples`.

    A stratum of n gives n·fraction rounded to the nearest, halves up, and at least one: no label stays unseen."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction {fraction}: a share between 0 and 1 expected")
    strata: dict[Hashable, list[int]] = {}
    for index, sample in enumerate(samples):
        strata.setdefault(stratum(sample), []).append(index)
    drawn = set()
    for name, members in strata.items():
        count = max(_nearest(len(members) * _exact(fraction)), 1) if fraction else 0
        # A generator per stratum: what is drawn from one does not hang on the size of another.
        drawn.update(_generator(seed, "stratum", name).sample(members, count))
    part = lambda inside: [sample for index, sample in enumerate(samples) if (index in drawn) == inside]
    return part(True), part(False)


def none_share(samples: list, is_none: Callable[..., bool]) -> float:
    """The share of `none` among all samples of the original training set: what every easy draw keeps."""
    return sum(map(is_none, samples)) / len(samples) if samples else 0.0


def epoch_batches(hard: list, easy: list, *, epoch: int, batch_size: int, none_share: float, is_none: Callable,
                  decay: float = 0.5, mixing: str = "progressive", last: str = "fill", seed: int = 0) -> Epoch:
    """The epoch in mini-batches of `batch_size` samples, the prompts per rollout of all ranks together.

    "progressive" (MORE-R1, section 3.3.2): every hard sample, and `easy_ratio(epoch, decay)` times as many easy ones,
    drawn anew each epoch. After every batch, the easy samples so far are the ratio's share of all so far, rounded down.
    Too few easy samples: all are taken, with a warning. "raw" (the ablation): every sample of both, in one shuffle.

    The last batch, where incomplete, is filled up in the same ratio ("fill": more easy samples are drawn, hard ones
    come a second time), or dropped ("drop": a few hard samples are not seen in this epoch)."""
    if mixing not in MIXINGS or last not in LAST_BATCHES or batch_size < 1:
        raise ValueError(f"mixing {mixing!r}, last {last!r}, batch size {batch_size}: one of {', '.join(MIXINGS)}, "
                         f"one of {', '.join(LAST_BATCHES)}, and at least 1 expected")
    if not hard and (mixing != "raw" or not easy):
        raise ValueError(f"no hard samples and {len(easy)} easy ones: there is nothing to train on, nothing for the "
                         "curriculum to teach (mixing raw would train on the easy ones)")
    ratio = _exact(easy_ratio(epoch, decay))
    wanted = len(easy) if mixing == "raw" else int(len(hard) * ratio)
    easy_total = min(wanted, len(easy))
    total = len(hard) + easy_total
    size = total // batch_size * batch_size if last == "drop" else -(-total // batch_size) * batch_size
    if not size:
        raise ValueError(f"epoch {epoch}: {total} samples are fewer than a batch of {batch_size}, "
                         "and an incomplete last batch is dropped; fill it, or make the batch smaller")
    if mixing == "raw":
        both = [(sample, True) for sample in hard] + [(sample, False) for sample in easy]
        order = list(islice(cycle(_shuffled(both, _generator(seed, epoch, "raw"))), size))
    else:
        if easy_total < wanted:
            log.warning("epoch %d: %d easy samples wanted for %d hard ones, there are only %d",
                        epoch, wanted, len(hard), len(easy))
            ratio = Fraction(easy_total, len(hard))
        share = ratio / (1 + ratio)
        drawn = draw_easy(easy, min(int(size * share), len(easy)), none_share, is_none, _generator(seed, epoch, "easy"))
        order = _mixed_order(_shuffled(hard, _generator(seed, epoch, "hard")), drawn, share, size)
    batches = [order[start:start + batch_size] for start in range(0, size, batch_size)]
    for number, batch in enumerate(batches):
        # Hard and easy alternate; shuffled, no way of sharing out a batch gives one rank all of a kind.
        _generator(seed, epoch, "batch", number).shuffle(batch)
    seen = [sample for sample, is_hard in order if not is_hard]
    record = {"epoch": epoch, "mixing": mixing, "ratio": None if mixing == "raw" else float(ratio),
              "batches": len(batches), "hard": len(order) - len(seen), "easy": len(seen),
              "easy_none": sum(map(is_none, seen)), "filled": max(size - total, 0), "left_out": max(total - size, 0)}
    return Epoch([[sample for sample, _ in batch] for batch in batches], record)


def draw_easy(easy: list, count: int, none_share: float, is_none: Callable, generator: random.Random) -> list:
    """`count` easy samples in random order, `none_share` of them none (MORE-R1, section 4.1).

    Where one of the two kinds runs out, the other fills its place and the log says so: the ratio of easy to
    hard is the strategy itself, the proportion of none among the easy ones comes second."""
    shuffled = _shuffled(easy, generator)
    pools = {kind: [sample for sample in shuffled if is_none(sample) == kind] for kind in (True, False)}
    wanted = _nearest(count * _exact(none_share))
    others = min(count - min(wanted, len(pools[True])), len(pools[False]))
    if count - others != wanted:
        log.warning("%d of %d easy samples should be none; there are %d none and %d others, so %d are",
                    wanted, count, len(pools[True]), len(pools[False]), count - others)
    return _shuffled(pools[True][:count - others] + pools[False][:others], generator)


def _mixed_order(hard: list, easy: list, share: Fraction, size: int) -> list[tuple[object, bool]]:
    """`size` pairs (sample, whether hard); after i of them floor(i·share) are easy. Lists start over."""
    hard, easy = cycle(hard), cycle(easy)
    return [(next(easy), False) if int(i * share) > int((i - 1) * share) else (next(hard), True)
            for i in range(1, size + 1)]


def _exact(number: float) -> Fraction:
    """The fraction that was meant by a float: 0.7 as 7/10, so that a tenth of ten is one and not zero."""
    return Fraction(number).limit_denominator(1_000_000)


def _nearest(number: Fraction) -> int:
    """Halves up; Python's round would take 0.5 and 2.5 down."""
    return int(number + Fraction(1, 2))


def _generator(*parts) -> random.Random:
    # Seeding by text is the same in every process and Python version, whatever PYTHONHASHSEED.
    return random.Random("/".join(map(str, parts)))


def _shuffled(items: list, generator: random.Random) -> list:
    return generator.sample(items, len(items))
