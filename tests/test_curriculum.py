"""The cold-start draw and the progressive mixing of easy and hard samples."""
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.curriculum import easy_ratio, epoch_batches, none_share, stratified_draw

HARD = [f"hard {i}{' none' if i % 3 == 0 else ''}" for i in range(237)]
EASY = [f"easy {i}{' none' if i % 6 else ''}" for i in range(885)]
SHARE = 0.73


def is_none(sample):
    return sample.endswith("none")


def is_easy(sample):
    return sample.startswith("easy")


def mixed(hard=HARD, easy=EASY, epoch=0, batch_size=16, **options):
    return epoch_batches(hard, easy, epoch=epoch, batch_size=batch_size, is_none=is_none,
                         **{"none_share": SHARE, **options})


def flat(epoch):
    return [sample for batch in epoch.batches for sample in batch]


def test_the_ratio_decays_from_one():
    assert [easy_ratio(epoch, 0.5) for epoch in range(4)] == [1, 0.5, 0.25, 0.125]
    assert [easy_ratio(epoch, 1) for epoch in range(3)] == [1, 1, 1]
    assert [easy_ratio(epoch, 0) for epoch in range(3)] == [0, 0, 0]
    for epoch, decay in ((-1, 0.5), (0, 1.5), (0, -0.1), (0, float("nan"))):
        with pytest.raises(ValueError, match="decay"):
            easy_ratio(epoch, decay)


@pytest.mark.parametrize("decay", [0, 0.3, 0.5, 0.7, 1])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 16])
def test_the_running_total_of_easy_samples_is_never_off_by_a_whole_one(decay, batch_size):
    for epoch in range(4):
        ratio, seen, easy = easy_ratio(epoch, decay), 0, 0
        for batch in mixed(epoch=epoch, decay=decay, batch_size=batch_size).batches:
            assert len(batch) == batch_size
            seen, easy = seen + len(batch), easy + sum(map(is_easy, batch))
            assert abs(easy - seen * ratio / (1 + ratio)) < 1 - 1e-9


def test_the_paper_s_numbers_come_out():
    hard, easy = [f"hard {i}" for i in range(2370)], [f"easy {i}" for i in range(8853)]
    records = [mixed(hard, easy, epoch, batch_size=1, none_share=0).record for epoch in range(4)]
    assert [record["hard"] for record in records] == [2370] * 4
    assert [record["easy"] for record in records] == [2370, 1185, 592, 296]


def test_a_filled_epoch_holds_every_hard_sample_and_repeats_only_hard_ones():
    for epoch in range(3):
        counts = Counter(flat(mixed(epoch=epoch)))
        assert set(HARD) <= set(counts)
        repeated = [sample for sample, count in counts.items() if count > 1]
        assert not any(map(is_easy, repeated)) and len(repeated) < 16


def test_a_dropped_last_batch_repeats_nothing():
    epoch = mixed(last="drop")
    assert max(Counter(flat(epoch)).values()) == 1
    assert len(epoch.batches) == 2 * len(HARD) // 16
    assert epoch.record["left_out"] == 2 * len(HARD) % 16 and epoch.record["filled"] == 0


def test_easy_samples_keep_the_training_set_s_share_of_none():
    for epoch in range(4):
        easy = list(filter(is_easy, flat(mixed(epoch=epoch))))
        assert abs(sum(map(is_none, easy)) - SHARE * len(easy)) <= 0.5
    assert none_share(["none", "none", "a", "b"], is_none) == 0.5


def test_where_one_kind_of_easy_sample_runs_out_the_other_fills_its_place(caplog):
    easy = [f"easy {i}" for i in range(300)] + ["easy none"]
    epoch = mixed(easy=easy, batch_size=2)
    assert (epoch.record["easy"], epoch.record["easy_none"]) == (237, 1)
    assert "should be none" in caplog.text


def test_too_few_easy_samples_are_all_taken_in_the_ratio_that_they_give(caplog):
    epoch = mixed(easy=EASY[:79], batch_size=4)
    assert [sum(map(is_easy, batch)) for batch in epoch.batches] == [1] * 79
    assert set(EASY[:79]) <= set(flat(epoch)) and epoch.record["ratio"] == pytest.approx(1 / 3)
    assert "only 79" in caplog.text


def test_without_easy_samples_training_goes_on_with_hard_ones(caplog):
    assert set(flat(mixed(easy=[]))) == set(HARD)
    assert "only 0" in caplog.text


def test_decay_zero_is_hard_only_without_a_warning(caplog):
    assert not any(map(is_easy, flat(mixed(decay=0))))
    assert not caplog.text


def test_without_hard_samples_there_is_nothing_to_teach():
    with pytest.raises(ValueError, match="nothing for the curriculum to teach"):
        mixed(hard=[])
    assert set(flat(mixed(hard=[], mixing="raw"))) == set(EASY)


def test_raw_takes_everything_every_epoch():
    for epoch in range(2):
        counts = Counter(flat(mixed(epoch=epoch, mixing="raw")))
        assert set(counts) == set(HARD + EASY) and sum(counts.values()) - len(counts) < 16
    assert mixed(mixing="raw", last="drop").record["left_out"] == len(HARD + EASY) % 16


def test_a_few_samples_still_fill_a_batch():
    epoch = mixed(hard=HARD[:3], easy=EASY[:2])
    assert [len(batch) for batch in epoch.batches] == [16]
    with pytest.raises(ValueError, match="5 samples are fewer than a batch of 16"):
        mixed(hard=HARD[:3], easy=EASY[:2], last="drop")


def test_every_epoch_and_seed_draws_anew_and_always_the_same():
    assert mixed(epoch=1) == mixed(epoch=1)
    assert mixed(epoch=1, seed=1) != mixed(epoch=1, seed=2)
    epochs = [set(flat(mixed(epoch=epoch, decay=1, last="drop"))) for epoch in (0, 1)]
    assert len({frozenset(filter(is_easy, samples)) for samples in epochs}) == 2
    assert len({frozenset(set(HARD) - samples) for samples in epochs}) == 2  # others are left out


def test_another_process_draws_the_same():
    program = ("from test_curriculum import *\n"
               "print(mixed(epoch=2).batches, stratified_draw(EASY, 0.1, is_none, 3)[0])")
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    there = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                            cwd=Path(__file__).parent, env={**surroundings, "PYTHONHASHSEED": seed}).stdout
             for seed in "12"]
    here = f"{mixed(epoch=2).batches} {stratified_draw(EASY, 0.1, is_none, 3)[0]}\n"
    assert there == [here, here]


def test_sharing_out_a_batch_in_turn_gives_no_process_all_the_easy_ones():
    shares = [sum(map(is_easy, batch[::2])) for batch in mixed().batches]
    assert min(shares) < 4 < max(shares) and abs(sum(shares) / len(shares) - 4) < 0.5


def test_the_record_counts_what_is_in_the_batches():
    epoch = mixed(epoch=1)
    easy = list(filter(is_easy, flat(epoch)))
    assert epoch.record == {
        "epoch": 1, "mixing": "progressive", "ratio": 0.5, "batches": len(epoch.batches),
        "hard": len(flat(epoch)) - len(easy), "easy": len(easy), "easy_none": sum(map(is_none, easy)),
        "filled": len(flat(epoch)) - 237 - 118, "left_out": 0}


def test_a_draw_takes_its_share_of_every_stratum():
    sizes = {"none": 1000, "peer": 10, "awarded": 7, "couple": 2, "alone": 1}
    samples = [f"{name} {i}" for name, size in sizes.items() for i in range(size)]
    drawn, rest = stratified_draw(samples, 0.25, lambda sample: sample.split()[0], seed=0)
    counts = Counter(sample.split()[0] for sample in drawn)
    assert counts == {"none": 250, "peer": 3, "awarded": 2, "couple": 1, "alone": 1}
    assert sorted(drawn + rest) == sorted(samples)
    assert drawn == [sample for sample in samples if sample in set(drawn)]
    assert stratified_draw(samples, 1, lambda sample: sample, 0) == (samples, [])
    assert stratified_draw(samples, 0, lambda sample: sample, 0) == ([], samples)


def test_a_draw_is_decided_by_its_seed():
    draw = [stratified_draw(EASY, 0.25, is_none, seed)[0] for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]


@pytest.mark.parametrize("options, message", [
    ({"mixing": "sorted"}, "mixing 'sorted'"), ({"last": "keep"}, "last 'keep'"),
    ({"batch_size": 0}, "batch size 0"), ({"decay": 2}, "decay 2"),
    ({"hard": [], "easy": []}, "nothing to train on"),
])
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixed(**options)
