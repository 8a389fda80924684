"""Some of many samples, drawn by a seed: the same for every method."""

import torch
from jaxtyping import Int
from torch import Tensor


def draw_rows(n: int, most: int, *, seed: int) -> Int[Tensor, " rows"]:
    """All rows, or `most` of them in rising order, each equally likely."""
    if n <= most:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def draw_positions(total: int, most: int, *, seed: int) -> Int[Tensor, " drawn"]:
    """The same of very many positions, without a list of all of them."""
    if total <= 4 * most:
        return draw_rows(total, most, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.empty(0, dtype=torch.int64)
    while drawn.numel() < most:  # a random part of distinct draws is a random set
        drawn = torch.cat([drawn, torch.randint(total, (most,), generator=generator)]).unique()
    return drawn[torch.randperm(drawn.numel(), generator=generator)[:most]].sort().values
