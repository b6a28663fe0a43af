"""The bit-parallel edit distance against the table that everybody knows."""
import random

import pytest

from rewards.edit_distance import edit_distance


def table_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0), ("kitten", "sitting", 3),
    ("flaw", "lawn", 2), ("aa", "bbbb", 4), ("naïve 🙂", "naive 🙃", 2), ("[a, per]", "[a, org]", 3),
])
def test_known_distances(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_it_equals_the_table_on_random_strings_shorter_and_longer_than_a_machine_word():
    draw = random.Random(0)
    for longest in [12] * 500 + [200] * 20:
        a, b = ("".join(draw.choices("abcü", k=draw.randrange(longest))) for _ in range(2))
        assert edit_distance(a, b) == table_distance(a, b), (a, b)
