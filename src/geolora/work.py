"""A bucket on its way through one step of GeoLoRA: what it reads, sees and writes of the long dimension.

The step of all buckets is in `optim.py`, the mathematics in `methods/geolora.py`.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from geolora.buckets import new_probes, stacked_gradients
from geolora.kernels.augment import Span, look, moved
from geolora.kernels.tangent import transport
from geolora.methods import geolora as method
from geolora.sharded import is_sharded

PART = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Bytes in float64 of what the layers of one part see: what the cache holds, or what a launch is worth."""


class Work:
    """A bucket on its way through one step.

    The long dimension is gone over in parts of some layers each: what they need in between stays in the
    cache, and is never there for all layers at once.
    """

    def __init__(
        self,
        place: int,
        group: dict[str, Any],
        state: dict[str, Any],
        live: list[bool],
        maps: tuple[Tensor, Tensor],
    ) -> None:
        self.place, self.group, self.state, self.live, self.maps = place, group, state, live, maps
        self.slots = state["V"].shape[-1]
        self.adaptive = group["moments"] == "adaptive"
        self.width = self.slots
        self.left: list[Span] = []
        self.right: list[Span] = []
        self.moves: list[tuple[Tensor, Tensor]] = []
        self.turn: method.Turn | None = None
        self.keep: Tensor | None = None
        self.parts = self._parts()
        self._gradients: tuple[Tensor, Tensor] | None = None

    def _parts(self) -> list[slice]:
        U, V = self.state["U"], self.state["V"]
        count, longest = len(U), max(U.shape[1], V.shape[1])
        size = count
        if not any(map(is_sharded, self.group["params"])):
            size = max(1, PART.get(U.device.type, PART["cuda"]) // (24 * self.slots * longest))
        return [slice(at, min(count, at + size)) for at in range(0, count, size)]

    def of(self, tensor: Tensor, part: slice) -> Tensor:
        """The rows of some layers."""
        return tensor if len(self.parts) == 1 else tensor[part]

    def used(self, tensor: Tensor) -> Tensor:
        """The slots that take part in this step."""
        return tensor if self.width == self.slots else tensor[..., : self.width]

    def gradients(self, part: slice) -> tuple[Tensor, Tensor]:
        """Those of A (n, r, d_in) and B (n, d_out, r) of some layers; zero where there is none."""
        if self._gradients is None:
            params = self.group["params"][2 * part.start : 2 * part.stop]
            found = stacked_gradients(params, self.state["U"].dtype)
            if len(self.parts) > 1:
                return found
            self._gradients = found
        return self._gradients

    def all_gradients(self) -> Iterable[Tensor]:
        """Stacked, where they are kept so; else one by one."""
        if len(self.parts) == 1:
            return self.gradients(self.parts[0])
        return [p.grad for p in self.group["params"] if p.grad is not None]

    def tangent(self, part: slice) -> tuple[Tensor, Tensor]:
        """The parts G V and G^T U of the tangent gradient."""
        right, left = (self.of(side, part) for side in self.maps)
        grad_A, grad_B = self.gradients(part)
        return (right.mT @ grad_B.mT).mT, (left.mT @ grad_A).mT

    def see(self, part: slice, shrink: Tensor | None) -> None:
        """Momentum of some layers in this step, in place, and their Gram matrices."""
        live = self.live[part]
        if not any(self.live):
            return
        right, left = (self.of(side, part) for side in self.maps)
        grad_A, grad_B = self.gradients(part)
        if shrink is not None:
            grad_A, grad_B = (grad * shrink.to(grad) for grad in (grad_A, grad_B))
        beta, moves, spans = self.group["momentum"], [], []
        for key, basis, onto, grad in (
            ("K", "U", right.mT, grad_B.mT),
            ("L", "V", left.mT, grad_A),
        ):
            others = ()
            if key not in self.state:
                now = torch.bmm(onto, grad).mT
            else:
                before = self.of(self.state[key], part)
                now = torch.baddbmm(before.mT, onto, grad, beta=beta).mT
                if not all(live):
                    now = of_live(live, now, before)
                if self.adaptive:  # Nesterov: the gradient + b M = (1 + b) M - b M_before
                    others = (self.used(before.lerp(now, 1 + beta)),)
                now = before.copy_(now)
            moves.append(now)
            near = self.used(self.of(self.state[basis], part))
            spans.append(look(near, self.used(now), *others))
        self.moves.append((moves[0], moves[1]))
        self.left.append(spans[0])
        self.right.append(spans[1])

    def sigma(self) -> Tensor:
        """The new singular values (n, r), as far as they are known."""
        sigma = self.state["sigma"]
        if self.turn is not None:
            now = nn.functional.pad(self.turn.sigma, (0, self.slots - self.width))
            sigma = of_live(self.live, now, sigma)
        return sigma if self.keep is None else sigma * self.keep

    def move(self, number: int, part: slice, grows: bool) -> None:
        """New bases and momentum of some layers, in place, and a probe where ranks grow."""
        state, w = self.state, self.width
        names = [key for key in ("U", "V", "K", "L") if key in state]
        old = [state[key][part].clone() for key in names] if grows else []
        if self.turn is not None:
            for far, (basis, key, on, spans) in zip(
                self.moves[number],
                (("U", "K", self.turn.left, self.left), ("V", "L", self.turn.right, self.right)),
                strict=True,
            ):
                far, near = self.used(far), self.used(self.of(state[basis], part))
                on = self.of(on, part)
                on = on if key in state else on[..., :w]
                new = moved(spans[number], near, far, on).mT
                near.copy_(of_live(self.live[part], new[..., :w], near))
                if key in state:
                    far.copy_(of_live(self.live[part], new[..., w:], far))
        if self.keep is not None:
            for key in names:
                state[key][part].mul_(self.keep[part].unsqueeze(-2))
        if grows:
            U, V = state["U"][part], state["V"][part]
            omega, slot = new_probes(U, V, self.group["layers"][part], self.group["steps"])
            if self.keep is None:
                slot = of_live(self.live[part], slot, torch.zeros_like(slot))
            V += omega * slot
            if "K" in state:
                along, _ = transport(old[2], old[3], old[0], old[1], U[..., :0], omega)
                state["K"][part] += along * slot


def by_slots(works: list[Work]) -> list[list[Work]]:
    """Buckets whose small problems are one: as many slots, one dtype, one device."""
    together: dict[Any, list[Work]] = defaultdict(list)
    for work in works:
        sigma = work.state["sigma"]
        together[work.slots, sigma.dtype, sigma.device].append(work)
    return list(together.values())


def even(width: int) -> int:
    """Rounded up to what matrix products like."""
    return -(-width // 4) * 4


def filled_columns(basis: Tensor) -> Tensor:
    """Which columns (n, r) of a basis are not zero; a norm is 12 times as fast as `any`."""
    return torch.linalg.vector_norm(basis, dim=-2) > 0


def of_live(live: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """Rows of the new tensor for the layers that are live, of the old one for the others."""
    if all(live):
        return new
    mask = torch.tensor(live, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)
