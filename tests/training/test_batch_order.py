"""The order of the rows: whole passes, rows of like length together, a function of the seed alone."""

from collections import Counter

import pytest
import torch

from geolora.training.batch_order import WINDOW, batch_order

LENGTHS = [(7 * i) % 31 + 1 for i in range(100)]


@pytest.mark.parametrize("size", [1, 7, 10, 16, 64, 100])
def test_every_pass_holds_every_row_once_and_no_batch_one_twice(size: int) -> None:
    order = batch_order(LENGTHS, size, 350 // size + 1, seed=0)
    assert len(order) == size * (350 // size + 1)
    for start in (0, 100, 200):
        assert sorted(order[start : start + 100]) == list(range(100))
    for start in range(0, len(order), size):
        assert len(set(order[start : start + size])) == size


def test_more_in_a_batch_than_there_are_rows() -> None:
    order = batch_order([3, 1, 2], 4, 3, seed=0)
    assert Counter(order) == {0: 4, 1: 4, 2: 4}


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
