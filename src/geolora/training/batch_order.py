"""The order of the training rows: a pure function of the seed, so that a resumed run repeats it."""

from collections.abc import Sequence

import torch

WINDOW = 50
"""Batches whose rows are grouped by length: less padding, and still shuffled."""


def batch_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Row indices of all batches of a run, steps * batch_size of them, one batch after the other.

    Passes over the data follow each other without a gap, each holding every row once; the last
    rows of a pass share a batch with the first ones of the next. No batch holds a row twice where
    there are rows enough. Within a window of WINDOW batches rows of like length share a batch, and
    the batches are in random order.

    Args:
        lengths: per row, tokens or characters. steps: batches in all.
        seed: the same seed gives the same order, whatever else draws random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()

    order: list[int] = []
    carried: list[int] = []
    while len(order) < steps * batch_size:
        rows = shuffled(len(lengths))
        if len(rows) < batch_size:
            order += rows
            continue
        if carried:
            before = set(carried)
            first = [row for row in rows if row not in before][: batch_size - len(carried)]
            order += carried + first
            taken = set(first)
            rows = [row for row in rows if row not in taken]
        full = len(rows) // batch_size * batch_size  # rows of full batches; the others wait
        rows, carried = rows[:full], rows[full:]
        for start in range(0, full, WINDOW * batch_size):
            window = rows[start : start + WINDOW * batch_size]
            window.sort(key=lambda row: lengths[row])  # stable: rows of a length stay shuffled
            batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
            for batch in shuffled(len(batches)):
                order += batches[batch]
    return order[: steps * batch_size]
