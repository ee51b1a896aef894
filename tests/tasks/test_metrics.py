"""Scores, plain and weighted: a weight of two is the row twice."""

import numpy as np
import pytest
import torch

from geolora.tasks.metrics import METRICS, score

LABELS = [0, 1, 1, 2, 0, 1]
CLASSES = [0, 1, 0, 2, 1, 1]
NUMBERS = [0.1, 1.4, 0.2, 1.9, 0.6, 0.8]


def test_accuracy() -> None:
    assert score("accuracy", CLASSES, LABELS) == pytest.approx(4 / 6)


def test_pearson_is_numpys() -> None:
    assert score("pearson", NUMBERS, LABELS) == pytest.approx(np.corrcoef(NUMBERS, LABELS)[0, 1])
    assert score("pearson", [1.0] * 6, LABELS) == 0.0


def test_matthews_is_the_correlation_of_two_classes() -> None:
    labels, predictions = [0, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1]
    wanted = np.corrcoef(predictions, labels)[0, 1]
    assert score("matthews", predictions, labels) == pytest.approx(wanted)
    assert score("matthews", [1] * 6, labels) == 0.0
    # 4 of 6 right, classes 2, 3, 1 on both sides: (6 * 4 - 14) / (36 - 14)
    assert score("matthews", CLASSES, LABELS) == pytest.approx(10 / 22)


@pytest.mark.parametrize(
    "metric, predictions", [("accuracy", CLASSES), ("matthews", CLASSES), ("pearson", NUMBERS)]
)
def test_weights_count_rows(metric: str, predictions: list) -> None:
    weights = torch.tensor([[1, 2, 0, 1, 3, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.float64)
    found = METRICS[metric](torch.tensor(predictions), torch.tensor(LABELS), weights)
    repeated = [i for i, count in enumerate([1, 2, 0, 1, 3, 1]) for _ in range(count)]
    wanted = score(metric, [predictions[i] for i in repeated], [LABELS[i] for i in repeated])
    assert found.tolist() == pytest.approx([wanted, score(metric, predictions, LABELS)])


def test_f1_is_that_of_sklearn_and_of_rows_drawn_again() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(3)
    for classes in (2, 4):
        labels, found = (torch.randint(classes, (60,), generator=generator) for _ in range(2))
        average = "binary" if classes == 2 else "macro"
        name = "f1" if classes == 2 else "macro_f1"
        ours = score(name, found.tolist(), labels.tolist())
        assert ours == pytest.approx(metrics.f1_score(labels, found, average=average))
        drawn = torch.randint(60, (60,), generator=generator)
        weights = torch.bincount(drawn, minlength=60).double()
        again = metrics.f1_score(labels[drawn], found[drawn], average=average)
        assert METRICS[name](found, labels, weights) == pytest.approx(again)


def test_sums_over_rows_are_weighted_as_the_rows_are() -> None:
    weights = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    lost, tokens = torch.tensor([3.0, 1.0]), torch.tensor([2, 6])
    wanted = torch.tensor([4 / 8, 6 / 4]).exp()
    torch.testing.assert_close(METRICS["perplexity"](lost, tokens, weights).float(), wanted)
    torch.testing.assert_close(
        METRICS["token_accuracy"](torch.tensor([1, 3]), tokens, weights).float(),
        torch.tensor([4 / 8, 2 / 4]),
    )
    hits_found, there = torch.tensor([[1, 2], [0, 1]]), torch.tensor([3, 1])
    torch.testing.assert_close(
        METRICS["entity_f1"](hits_found, there, weights).float(), torch.tensor([2 / 7, 4 / 10])
    )
    nothing = METRICS["entity_f1"](torch.zeros(2, 2), torch.zeros(2), weights)
    assert nothing.tolist() == [0.0, 0.0]
