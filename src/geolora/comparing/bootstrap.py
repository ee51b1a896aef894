"""The paired bootstrap: how sure the difference of two methods is, over evaluation rows and seeds."""

import statistics
from typing import Any, NamedTuple

import torch

from geolora.tasks.metrics import METRICS

RESAMPLES = 10_000
AT_ONCE = 1000
"""Resamples that are drawn together: they hold AT_ONCE x rows numbers."""
INTERVAL = 0.95


class Difference(NamedTuple):
    """The difference of two methods on a task: its mean, and the means of all resamples."""

    mean: float
    draws: torch.Tensor
    seeds: int


def paired_difference(
    ours: list[dict[str, Any]], theirs: list[dict[str, Any]], seed: int
) -> Difference | None:
    """The difference of two methods, seeds paired; None where they have no seed in common.

    Rows of the evaluation set and seeds are both drawn again with replacement, the same draw for
    both methods.

    Args:
        ours: runs of the method that have not diverged. theirs: those of the one it is compared with.
        seed: of the draws.
    """
    other = {run["seed"]: run for run in theirs}
    pairs = [(run, other[run["seed"]]) for run in ours if run["seed"] in other]
    if not pairs:
        return None
    metric = METRICS[pairs[0][0]["report"]["metric"]]
    target = torch.tensor(pairs[0][0]["targets"])
    rows = len(target)
    generator = torch.Generator().manual_seed(seed)
    draws = []
    for _ in range(RESAMPLES // AT_ONCE):
        index = torch.randint(rows, (AT_ONCE, rows), generator=generator)
        weights = torch.zeros(AT_ONCE, rows, dtype=torch.float64)
        weights.scatter_add_(1, index, torch.ones_like(weights))
        gaps = [
            metric(torch.tensor(a["predictions"]), target, weights)
            - metric(torch.tensor(b["predictions"]), target, weights)
            for a, b in pairs
        ]
        seeds = torch.randint(len(pairs), (AT_ONCE, len(pairs)), generator=generator)
        draws.append(torch.stack(gaps, dim=1).gather(1, seeds).mean(1))
    mean = statistics.fmean(a["report"]["value"] - b["report"]["value"] for a, b in pairs)
    return Difference(mean, torch.cat(draws), len(pairs))


def interval(differences: list[Difference]) -> dict[str, Any]:
    """The mean of one difference or several, its bootstrap interval, and the fewest seeds."""
    low, high = (
        torch.stack([difference.draws for difference in differences])
        .mean(0)
        .quantile(torch.tensor([(1 - INTERVAL) / 2, (1 + INTERVAL) / 2], dtype=torch.float64))
    )
    mean = statistics.fmean(difference.mean for difference in differences)
    seeds = min(difference.seeds for difference in differences)
    return {"mean": mean, "low": float(low), "high": float(high), "seeds": seeds}
