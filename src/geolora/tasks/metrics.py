"""Scores of predictions, plain or with weights on the rows (as a bootstrap draws them)."""

from typing import Any

import torch
from torch import Tensor


def accuracy(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Share of rows that are right, (*batch,); predictions and labels are class indices (n,)."""
    hits = (predictions == labels).double()
    return (weights @ hits) / weights.sum(-1)


def pearson(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Pearson correlation (*batch,); 0 where predictions or labels are constant."""
    weights = weights / weights.sum(-1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        return values - (weights @ values).unsqueeze(-1)

    x, y = centred(predictions.double()), centred(labels.double())
    size = ((weights * x**2).sum(-1) * (weights * y**2).sum(-1)).sqrt()
    together = (weights * x * y).sum(-1)
    return torch.where(size > 0, together / torch.where(size > 0, size, 1.0), 0.0)


def matthews(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Matthews correlation of two or more classes (*batch,); 0 where either side is one class.

    Source: Gorodkin 2004, the correlation of the indicator vectors of predictions and labels.
    """
    classes = torch.cat([predictions, labels]).unique()
    weights = weights / weights.sum(-1, keepdim=True)
    x, y = ((side.unsqueeze(-1) == classes).double() for side in (predictions, labels))
    p, t = weights @ x, weights @ y  # shares of the classes

    def correlation(hits: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return hits - (a * b).sum(-1)

    size = (
        correlation(weights.new_ones(()), p, p) * correlation(weights.new_ones(()), t, t)
    ).sqrt()
    together = correlation(weights @ (x * y).sum(-1), p, t)
    several = ((p > 0).sum(-1) > 1) & ((t > 0).sum(-1) > 1)
    return torch.where(several, together / torch.where(several, size, 1.0), 0.0)


def f1(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """F1 of the second of two classes (*batch,); 0 where it is on neither side."""
    return _mean_f1(predictions, labels, weights, torch.ones(1, dtype=labels.dtype))


def macro_f1(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean F1 of the classes that are on either side (*batch,)."""
    return _mean_f1(predictions, labels, weights, torch.cat([predictions, labels]).unique())


def _mean_f1(predictions: Tensor, labels: Tensor, weights: Tensor, classes: Tensor) -> Tensor:
    x, y = ((side.unsqueeze(-1) == classes).double() for side in (predictions, labels))
    hits, sizes = weights @ (x * y), weights @ (x + y)
    return torch.where(sizes > 0, 2 * hits / torch.where(sizes > 0, sizes, 1.0), 0.0).mean(-1)


def share(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Share of words that are right (*batch,), from how many of a row are, and how many it has."""
    return (weights @ predictions.double()) / (weights @ labels.double())


def entity_f1(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """F1 over all entities (*batch,), from [right, predicted] (n, 2) and how many a row has; 0 without any."""
    hits, predicted = (weights @ predictions.double()).unbind(-1)
    sizes = predicted + weights @ labels.double()
    return torch.where(sizes > 0, 2 * hits / torch.where(sizes > 0, sizes, 1.0), 0.0)


def perplexity(predictions: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """exp of the mean -log p of a token (*batch,), from sums over the tokens of a row and their number."""
    return ((weights @ predictions.double()) / (weights @ labels.double())).exp()


METRICS = {
    "accuracy": accuracy,
    "entity_f1": entity_f1,
    "exact_match": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "perplexity": perplexity,
    "token_accuracy": share,
}
"""(predictions (n, ...), labels (n, ...), weights (*batch, n) float64) -> scores (*batch,) float64."""
LOWER_IS_BETTER = ("perplexity",)


def score(metric: str, predictions: list[Any], labels: list[Any]) -> float:
    """The score of a list of predictions, every row counting once."""
    weights = torch.ones(len(labels), dtype=torch.float64)
    return float(METRICS[metric](torch.tensor(predictions), torch.tensor(labels), weights))
