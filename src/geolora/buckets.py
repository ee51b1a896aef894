"""Buckets: pairs of equal shape as one param group, stacked for batched kernels.

A group holds what must survive a checkpoint as plain numbers: `layers` (names), `scales`, `ranks`
(as last judged), `steps` (taken so far) and the settings. Pairs are found by position,
[A1, B1, A2, B2, …].
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from geolora.pairs import Pair


def phase_of(group: dict[str, Any]) -> str:
    """ "grow", "judge" or "hold": what the coming step does with the rank."""
    at, settle, every = group["steps"], group["settle_after"], group["prune_every"]
    if (
        settle is not None and at >= settle
    ):  # due until it is done: a step with lr = 0 judges nothing
        return "hold" if group["settled"] else "judge"
    if every is None:
        return "hold"
    at, growing = at % every, every // 6
    return "grow" if at < growing else "judge" if at == growing else "hold"


def by_shape(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of equal shape, dtype and device together, in the order they are found."""
    buckets: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        key = (pair.d_out, pair.d_in, pair.r, pair.A.dtype, pair.B.dtype, pair.A.device)
        buckets[key].append(pair)
    return list(buckets.values())


def new_group(pairs: list[Pair], settings: dict[str, Any]) -> dict[str, Any]:
    """The param group of a bucket, before its first step."""
    first = pairs[0]
    rank = settings["start_rank"] or first.r
    return {
        "kind": "geometric",
        "params": [p for pair in pairs for p in (pair.A, pair.B)],
        "layers": [pair.name for pair in pairs],
        "scales": [pair.scale for pair in pairs],
        "ranks": [rank] * len(pairs),
        "cost": first.d_in + first.d_out,
        "width": math.sqrt(first.d_in * first.d_out),
        "steps": 0,
        "skipped": 0,
        "settled": False,
        **settings,
    }


def make_masters(state: dict[str, Any], group: dict[str, Any]) -> None:
    """Zero masters U (n, d_out, r), sigma (n, r), V (n, d_in, r), and momentum K, L like U, V."""
    A, B = group["params"][:2]
    n, r, dtype = len(group["layers"]), A.shape[0], torch.promote_types(A.dtype, torch.float32)
    d_out, d_in = B.flatten(1).shape[0], A.flatten(1).shape[1]
    shapes = {"U": (n, d_out, r), "sigma": (n, r), "V": (n, d_in, r)}
    if group["moments"] != "none":
        shapes |= {"K": (n, d_out, r), "L": (n, d_in, r)}
    for key, shape in shapes.items():
        state[key] = torch.zeros(shape, dtype=dtype, device=A.device)


def stacked_gradients(params: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of all A (n, r, d_in) and all B (n, d_out, r); zero where there is none."""

    def stack(side: list[Tensor]) -> Tensor:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in side]
        return torch.stack([g.flatten(1) for g in grads]).to(dtype)

    return stack(params[::2]), stack(params[1::2])


def pairs_of(params: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """(A, B) of every pair of a group."""
    return zip(params[::2], params[1::2], strict=True)


def new_probes(U: Tensor, V: Tensor, layers: list[str], step: int) -> tuple[Tensor, Tensor]:
    """A random unit vector w (n, d_in, 1), orthogonal to V, and the slot (n, 1, r) it goes to.

    That is the first idle slot of every layer; V + w * slot is the new V.

    Where U^T G = 0 and G V = 0 the tangent step is blind although G may not be zero (with lr = 1 on
    a quadratic loss a rank-1 start stays at rank 1 for ever); a probe sees G w. The numbers depend
    on the layer's name and the step alone, so every process draws the same.
    """
    idle = ~((U != 0).any(-2) | (V != 0).any(-2))  # (n, r)
    first = idle & (idle.cumsum(-1) == 1)
    draws = []
    for name in layers:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{step}".encode()))
        draws.append(torch.randn(V.shape[-2], generator=generator, dtype=torch.float64))
    omega = torch.stack(draws).to(V).unsqueeze(-1)  # (n, d_in, 1)
    omega = omega / torch.linalg.vector_norm(omega, dim=-2, keepdim=True)
    for _ in range(2):
        omega = omega - V @ (V.mT @ omega)
    length = torch.linalg.vector_norm(omega, dim=-2, keepdim=True)
    room = length > 1e-3  # V may span everything
    omega = torch.where(room, omega / length.clamp(min=1e-3), 0.0)
    omega = omega - V @ (V.mT @ omega)
    return omega, first.unsqueeze(-2)


def scales_of(group: dict[str, Any], like: Tensor) -> Tensor:
    """LoRA's s of every pair (n,)."""
    return torch.tensor(group["scales"], dtype=like.dtype, device=like.device)


def fingerprints(params: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when a parameter is written or swapped by somebody else."""
    return [(p._version, p.data_ptr()) for p in params]
