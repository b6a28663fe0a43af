import pytest
import torch

from grpo.engine.rope import rope_positions
from tiny import IMAGE, tiny_model, tiny_prompt

GRIDS = {
    "text alone": (),
    "one square image": ((1, 4, 4),),
    "two images, wide and tall": ((1, 4, 10), (1, 8, 2)),
    "wider than one attention window": ((1, 6, 20),),
    "three images": ((1, 2, 2), (1, 2, 6), (1, 10, 4)),
}


@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS.keys())
def test_rope_positions_equal_transformers(grids):
    prompt = tiny_prompt(1, grids)
    model = tiny_model().model
    ids = prompt.tokens[None]
    expected, _ = model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=prompt.grids)
    assert torch.equal(prompt.positions, expected[:, 0])


def test_text_after_a_image_counts_on_from_its_longer_side():
    tokens = torch.tensor([1, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 2])
    positions = rope_positions(tokens, torch.tensor([[1, 4, 6]]), IMAGE, 2)  # merged: 2 rows, 3 columns
    assert positions.tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 4],
        [0, 1, 1, 1, 2, 2, 2, 4],
        [0, 1, 2, 3, 1, 2, 3, 4],
    ]
