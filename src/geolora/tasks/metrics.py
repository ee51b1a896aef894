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


METRICS = {"accuracy": accuracy, "pearson": pearson}
"""(predictions (n,), labels (n,), weights (*batch, n) float64) -> scores (*batch,) float64."""


def score(metric: str, predictions: list[float], labels: list[float]) -> float:
    """The score of a list of predictions, every row counting once."""
    weights = torch.ones(len(labels), dtype=torch.float64)
    return float(METRICS[metric](torch.tensor(predictions), torch.tensor(labels), weights))
