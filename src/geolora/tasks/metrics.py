"""Scores of predictions, plain or with weights on the rows (as a bootstrap draws them)."""

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


METRICS = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson}
"""(predictions (n,), labels (n,), weights (*batch, n) float64) -> scores (*batch,) float64."""


METRICS_OF = {
    "text-classification": ("accuracy", "matthews"),
    "text-regression": ("pearson",),
}
"""Metrics of a task, the default first."""


def score(metric: str, predictions: list[float], labels: list[float]) -> float:
    """The score of a list of predictions, every row counting once."""
    weights = torch.ones(len(labels), dtype=torch.float64)
    return float(METRICS[metric](torch.tensor(predictions), torch.tensor(labels), weights))
