"""The order of the training rows: a pure function of the seed, so that a resumed run repeats it."""

from collections.abc import Sequence

import torch

WINDOW = 50
"""Batches whose rows are grouped by length: less padding, and still shuffled."""


def batch_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Row indices of all batches of a run, steps * batch_size of them, one batch after the other.

    Passes over the data follow each other without a gap: every row comes once in each. Within a
    window of WINDOW batches rows of like length share a batch; the batches are in random order.

    Args:
        lengths: per row, tokens or characters. steps: batches in all.
        seed: the same seed gives the same order, whatever else draws random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < steps * batch_size:
        drawn += torch.randperm(len(lengths), generator=generator).tolist()
    drawn = drawn[: steps * batch_size]
    order: list[int] = []
    for start in range(0, len(drawn), WINDOW * batch_size):
        window = drawn[start : start + WINDOW * batch_size]
        window.sort(key=lambda row: lengths[row])  # stable: rows of a length stay shuffled
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        for batch in torch.randperm(len(batches), generator=generator).tolist():
            order += batches[batch]
    return order
