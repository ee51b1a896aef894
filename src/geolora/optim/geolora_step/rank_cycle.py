"""The cycle of ranks: grow, judge, hold; and the random directions that growing layers look along."""

import zlib
from typing import Any

import torch
from torch import Tensor


def phase_of(group: dict[str, Any]) -> str:
    """ "grow", "judge" or "hold": what the coming step does with the ranks of a bucket.

    Args:
        group: its param group, of which `tail`, `steps`, `settle_after`, `settled` and `prune_every` count.
    """
    at, settle, every = group["steps"], group["settle_after"], group["prune_every"]
    if group["tail"] is None:
        return "hold"
    if (
        settle is not None and at >= settle
    ):  # stays due until it has happened: a step with lr = 0 does not judge
        return "hold" if group["settled"] else "judge"
    if every is None:  # both are None in states of 0.1.0 that keep their ranks
        return "hold" if settle is None else "grow"
    at, growing = at % every, every // 6
    return "grow" if at < growing else "judge" if at == growing else "hold"


def looks_along_probes(group: dict[str, Any]) -> bool:
    """Whether the coming step looks along a random direction too: where ranks grow, or are judged at every step."""
    phase = phase_of(group)
    return phase == "grow" or (phase == "judge" and group["prune_every"] == 1)


def by_gain(settings: dict[str, Any]) -> bool:
    """Whether anything is judged by what directions gain: the tail or, in states of 0.1.0, the budget alone."""
    if settings["moments"] != "adaptive" or settings["tail"] is None:
        return False
    return tail_by_gain(settings) or settings["budget"] is not None


def tail_by_gain(settings: dict[str, Any]) -> bool:
    """Whether the tail is a share of the gain; of sigma it is in states of 0.1.0, and without adaptive moments."""
    return settings.get("tail_of") == "gain"


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
