"""Rope positions of a Qwen2.5-VL prompt: text counts along all three axes, an image spans a grid.

Source: Qwen2-VL (arXiv 2409.12191, section 2.1, "M-RoPE"); pinned to transformers' `get_rope_index` by a test."""

import torch
from torch import Tensor


def image_positions(grid: Tensor, merge: int, start: int) -> Tensor:
    """(3, t·h·w / merge²) positions of one image whose patch grid is `grid` = (t, h, w), from `start` on."""
    time, height, width = grid[0].item(), grid[1].item() // merge, grid[2].item() // merge
    axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes).reshape(3, -1) + start


def rope_positions(tokens: Tensor, grids: Tensor | None, image_token: int, merge: int) -> Tensor:
    """(P,) token ids → (3, P) positions: time, height, width.

    After an image the count goes on from its longer side, max(h, w) / merge, not from its number of
    tokens: this is why positions cannot be an arange. Continuations go on from `positions.max() + 1`."""
    pieces, start, place = [], 0, 0
    for grid in grids if grids is not None else ():
        words = (tokens[place:] == image_token).nonzero()[0].item()  # before the image
        pieces += [torch.arange(words).expand(3, -1) + start, image_positions(grid, merge, start + words)]
        start += words + int(grid[1:].max()) // merge
        place += words + pieces[-1].shape[1]
    pieces.append(torch.arange(len(tokens) - place).expand(3, -1) + start)
    return torch.cat(pieces, dim=1)
