"""Buckets: pairs of equal shape as one param group, stacked for batched kernels.

A group holds what must survive a checkpoint as plain numbers and names. Pairs are found by position,
[A1, B1, A2, B2, …], so that whatever swaps the Parameter objects of a group (FSDP2) is followed.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from geolora.pairs.find import Pair
from geolora.pairs.sharded import gathered, write_factors


def by_shape(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of equal shape, dtype and device together, in the order they are found."""
    buckets: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        shape = (pair.d_out, pair.d_in, pair.r, pair.experts)
        key = (*shape, pair.A.dtype, pair.B.dtype, pair.A.device)
        buckets[key].append(pair)
    return list(buckets.values())


def bucket_group(bucket: list[Pair]) -> dict[str, Any]:
    """What the param group of every bucket holds, whatever the method.

    `params` [A1, B1, A2, B2, …], `layers` their names, `scales` LoRA's s of each; `skipped`, how many steps
    in a row were not finite.
    """
    return {
        "params": [p for pair in bucket for p in (pair.A, pair.B)],
        "layers": [pair.name for pair in bucket],
        "scales": [pair.scale for pair in bucket],
        "skipped": 0,
    }


def pairs_of(params: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """(A, B) of every pair of a group."""
    return zip(params[::2], params[1::2], strict=True)


def scales_of(group: dict[str, Any], like: Tensor) -> Tensor:
    """LoRA's s of every pair (n,)."""
    return torch.tensor(group["scales"], dtype=like.dtype, device=like.device)


def computed_in(group: dict[str, Any]) -> torch.dtype:
    """What a bucket is computed in: float32, or the wider dtype of its factors."""
    return torch.promote_types(group["params"][0].dtype, torch.float32)


def stacked_factors(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A (n, r, d_in) and B (n, d_out, r) of a bucket, gathered where they are sharded."""
    A, B = (
        torch.stack([gathered(p).flatten(1) for p in group["params"][side::2]]) for side in (0, 1)
    )
    return A.to(computed_in(group)), B.to(computed_in(group))


def stacked_gradients(params: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of all A (n, r, d_in) and all B (n, d_out, r), gathered; zero where there is none."""

    def stack(side: list[Tensor]) -> Tensor:
        grads = [gathered(torch.zeros_like(p) if p.grad is None else p.grad) for p in side]
        return torch.stack([g if g.dim() == 2 else g.flatten(1) for g in grads]).to(dtype)

    return stack(params[::2]), stack(params[1::2])


def write_back(params: Sequence[Tensor], values: Iterable[Tensor]) -> None:
    """Write values into the parameters that have a gradient, in their dtype, shape and sharding."""
    moved = [(p, v) for p, v in zip(params, values, strict=True) if p.grad is not None]
    if moved:
        write_factors(*zip(*moved, strict=True))


def not_finite(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the layers of some buckets of which a gradient holds NaN or infinities."""
    return [
        name
        for group in groups
        for name, pair in zip(group["layers"], pairs_of(group["params"]), strict=True)
        if any(p.grad is not None and not gathered(p.grad).isfinite().all() for p in pair)
    ]
