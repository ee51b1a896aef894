"""The order of the rows: whole passes, rows of like length together, a function of the seed alone."""

from collections import Counter

import pytest
import torch

from geolora.tasks.order import WINDOW, batch_order

LENGTHS = [(7 * i) % 31 + 1 for i in range(100)]


def test_every_pass_holds_every_row_once() -> None:
    order = batch_order(LENGTHS, 10, 25, seed=0)
    assert len(order) == 250
    counts = Counter(order)
    assert set(counts) == set(range(100))
    assert set(counts.values()) == {2, 3}


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_fewer_batches_than_a_pass(steps: int) -> None:
    order = batch_order(LENGTHS, 16, steps, seed=0)
    assert len(order) == 16 * steps
    if 16 * steps <= 100:
        assert len(set(order)) == len(order)


def test_it_depends_on_the_seed_and_on_nothing_else() -> None:
    first = batch_order(LENGTHS, 10, 25, seed=1)
    torch.rand(5)
    torch.manual_seed(99)
    assert batch_order(LENGTHS, 10, 25, seed=1) == first
    assert batch_order(LENGTHS, 10, 25, seed=2) != first


def test_rows_of_like_length_share_a_batch_and_batches_are_shuffled() -> None:
    lengths = [1 + i % 500 for i in range(2000)]
    size = 2000 // WINDOW
    order = batch_order(lengths, size, WINDOW, seed=0)
    batches = [[lengths[i] for i in order[at : at + size]] for at in range(0, 2000, size)]
    padding = sum(max(batch) * size - sum(batch) for batch in batches) / sum(lengths)
    assert padding < 0.05  # in random order it is 0.9
    heads = [batch[0] for batch in batches]
    assert heads != sorted(heads)
    assert heads != sorted(heads, reverse=True)
