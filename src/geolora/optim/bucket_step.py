"""A bucket on its way through one step of GeoLoRA: what it reads, sees and writes of the long dimension.

The step of all buckets is in `optim.py`, the mathematics in `methods/geolora.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from geolora.kernels.augment import Span, look, moved, together
from geolora.kernels.tangent import transport
from geolora.methods import geolora as method
from geolora.optim.buckets import new_probes, pairs_of, stacked_gradients
from geolora.pairs.point import scaled_pair
from geolora.pairs.sharded import is_sharded, write_factors

PART = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bytes in float64 of what the layers of one part see: what the cache holds for each core, or what a launch is worth."""

GROUP = 2500
"""Squares of slots, over all layers, that an own group of layers must save: what its calls cost on a CPU."""


class Part:
    """Layers of a bucket that go through a step together, each with `width` slots."""

    def __init__(self, layers: list[int], width: int, count: int, device: torch.device) -> None:
        """`layers` of the `count` of a bucket."""
        self.layers, self.width, self.all = layers, width, len(layers) == count
        neighbours = layers[-1] - layers[0] == len(layers) - 1
        self.index = None if neighbours else torch.tensor(layers, device=device)
        self.at = slice(layers[0], layers[-1] + 1) if self.index is None else self.index
        self.gradients: tuple[Tensor, Tensor] | None = None
        """Those of A and B, where they are few enough to be kept."""
        self.sides: list[Span] = []
        """What was seen from the left and from the right."""
        self.turn: method.Turn | None = None
        """Where they go."""
        self.directions: dict[str, Tensor] = {}
        """K and L, where the state keeps no momentum."""


class Work:
    """A bucket on its way through one step.

    The long dimension is gone over in parts of some layers each: what they need in between stays in the
    cache, and is never there for all layers at once. Layers with few slots in use are parts of their own.
    """

    def __init__(
        self,
        place: int,
        group: dict[str, Any],
        state: dict[str, Any],
        live: list[bool],
        maps: tuple[Tensor, Tensor],
        fresh: bool,
    ) -> None:
        """`maps` as in `factors.Reading`, not diagonal where somebody else wrote the pairs (`fresh`)."""
        self.place, self.group, self.state, self.live, self.maps = place, group, state, live, maps
        self.fresh = fresh
        self.pairs = list(pairs_of(group["params"]))
        self.slots = state["V"].shape[-1]
        self.adaptive = group["moments"] == "adaptive"
        self.sharded = any(map(is_sharded, group["params"]))
        self.parts: list[Part] = []
        self.keep: Tensor | None = None
        self._keeps_gradients = False

    def divide(self, widths: list[int]) -> None:
        """Into parts, given how many slots every layer takes."""
        U, V = self.state["U"], self.state["V"]
        # a product of a batch of matrices is shared out to the cores matrix by matrix
        cores = torch.get_num_threads() if U.device.type == "cpu" else 1
        room = PART.get(U.device.type, PART["cuda"]) // (24 * max(U.shape[1], V.shape[1]))
        self._keeps_gradients = self.sharded or self.slots * len(widths) <= cores * room
        layers: dict[int, list[int]] = defaultdict(list)
        for layer, width in enumerate(widths):
            layers[width].append(layer)
        self.parts = [
            Part(same[at : at + size], width, len(widths), U.device)
            for width, same in layers.items()
            for size in [len(same) if self.sharded else cores * max(1, room // width)]
            for at in range(0, len(same), size)
        ]

    def rows(self, key: str, part: Part, width: int) -> Tensor:
        """Slots (n, width, d) of some layers of U, V, K or L: a view where they are neighbours, else a copy."""
        stack = self.first(self.state[key].mT, width)
        return self.of(stack, part) if part.index is None else stack.index_select(0, part.index)

    def put(self, key: str, part: Part, rows: Tensor) -> None:
        """Write what `rows` gave."""
        stack = self.first(self.state[key].mT, rows.shape[1])
        if part.index is None:
            self.of(stack, part).copy_(rows)
        else:
            stack.index_copy_(0, part.index, rows)

    def of(self, tensor: Tensor, part: Part) -> Tensor:
        """What of a tensor (n, ...) is of some layers."""
        return tensor if part.all else tensor[part.at]

    def first(self, tensor: Tensor, slots: int) -> Tensor:
        """The first slots of a tensor (n, r, ...)."""
        return tensor if slots == self.slots else tensor[:, :slots]

    def live_of(self, part: Part) -> list[bool]:
        """Which layers of a part have a gradient."""
        return [self.live[layer] for layer in part.layers]

    def gradients(self, part: Part) -> tuple[Tensor, Tensor]:
        """Those of A (n, r, d_in) and B (n, d_out, r) of some layers; zero where there is none."""
        if part.gradients is not None:
            return part.gradients
        chosen = [factor for layer in part.layers for factor in self.pairs[layer]]
        found = stacked_gradients(chosen, self.state["U"].dtype)
        if self._keeps_gradients:
            part.gradients = found
        return found

    def all_gradients(self) -> Iterable[Tensor]:
        """Stacked, where they are kept so; else one by one."""
        if self._keeps_gradients:
            return [grad for part in self.parts for grad in self.gradients(part)]
        return [p.grad for p in self.group["params"] if p.grad is not None]

    def tangent(self, part: Part) -> tuple[Tensor, Tensor]:
        """The parts G V and G^T U of the tangent gradient."""
        right, left = (self.of(side, part) for side in self.maps)
        grad_A, grad_B = self.gradients(part)
        return (right.mT @ grad_B.mT).mT, (left.mT @ grad_A).mT

    def see(self, part: Part, shrink: Tensor | None) -> None:
        """Momentum of some layers in this step, in place, and their Gram matrices."""
        if not any(self.live):
            return
        live, beta, width = self.live_of(part), self.group["momentum"], part.width
        inputs = self.slots if self.fresh else width  # of slots not in use the gradient is zero
        right, left = (self.of(self.first(side, inputs), part)[..., :width] for side in self.maps)
        grad_A, grad_B = self.gradients(part)
        if shrink is not None:
            grad_A, grad_B = (grad * shrink.to(grad) for grad in (grad_A, grad_B))
        spans = []
        for key, basis, onto, grad in (
            ("K", "U", right.mT, self.first(grad_B.mT, inputs)),
            ("L", "V", left.mT, self.first(grad_A, inputs)),
        ):
            others = ()
            if key not in self.state:
                part.directions[key] = now = torch.bmm(onto, grad)
            else:
                before = self.rows(key, part, width)
                now = torch.baddbmm(before, onto, grad, beta=beta)
                now = of_live(live, now, before)
                if self.adaptive:  # Nesterov: the gradient + b M = (1 + b) M - b M_before
                    others = (before.lerp(now, 1 + beta).mT,)
                self.put(key, part, now)
            spans.append(look(self.rows(basis, part, width).mT, now.mT, *others))
        part.sides = spans

    def changes(self) -> bool:
        """Whether anything is to be written."""
        return self.keep is not None or any(part.turn is not None for part in self.parts)

    def sigma(self) -> Tensor:
        """The new singular values (n, r), as far as they are known."""
        sigma = self.state["sigma"].clone()
        for part in self.parts:
            if part.turn is not None:
                before = self.first(self.of(sigma, part), part.width)
                now = of_live(self.live_of(part), part.turn.sigma, before)
                sigma[part.at, : part.width] = now
        return sigma if self.keep is None else sigma * self.keep

    def write(self, part: Part, on_A: Tensor, on_B: Tensor, grows: bool) -> None:
        """New bases and momentum of some layers, in place, a probe where ranks grow, and A and B.

        Args:
            on_A, on_B: (n, r), lengths of the slots of all layers.
        """
        names = [key for key in ("U", "V", "K", "L") if key in self.state]
        moves_on = (
            grows and "K" in self.state
        )  # momentum along a new direction is taken from where it was
        old = {key: self.rows(key, part, self.slots).clone() for key in names if moves_on}
        if part.turn is not None:
            self._move(part, part.turn)
        if self.keep is not None:
            for key in names:
                kept = self.of(self.keep, part).unsqueeze(-1)
                self.put(key, part, self.rows(key, part, self.slots) * kept)
        if grows:
            self._probe(part, old)
        # what lies beyond is zero before and after, but where somebody else wrote it
        whole = self.fresh or grows or self.sharded or self.keep is not None
        width = self.slots if whole else part.width
        U, V = (self.rows(key, part, width).mT for key in ("U", "V"))
        A, B = scaled_pair(U, V, *(self.first(self.of(size, part), width) for size in (on_A, on_B)))
        targets, sources = [], []
        for layer, a, b in zip(part.layers, A.unbind(), B.unbind(), strict=True):
            if self.live[layer] or self.keep is not None:
                on = self.pairs[layer]
                targets += on if width == self.slots else [on[0][:width], on[1][:, :width]]
                sources += [a, b]
        if targets:
            write_factors(targets, sources)

    def _move(self, part: Part, turn: method.Turn) -> None:
        live, width = self.live_of(part), part.width
        ways = (("U", "K", turn.left), ("V", "L", turn.right))
        for span, (basis, key, on) in zip(part.sides, ways, strict=True):
            near = self.rows(basis, part, width)
            far = self.rows(key, part, width) if key in self.state else part.directions[key]
            onto = on if key in self.state else on[..., :width]
            new = moved(span, near.mT, far.mT, onto)
            self.put(basis, part, of_live(live, new[:, :width], near))
            if key in self.state:
                self.put(key, part, of_live(live, new[:, width:], far))

    def _probe(self, part: Part, old: dict[str, Tensor]) -> None:
        """A new direction to look along, and the momentum along it, taken from where it was."""
        layers = [self.group["layers"][layer] for layer in part.layers]
        U, V = (self.rows(key, part, self.slots).mT for key in ("U", "V"))
        omega, slot = new_probes(U, V, layers, self.group["steps"])
        if self.keep is None:
            slot = of_live(self.live_of(part), slot, torch.zeros_like(slot))
        self.put("V", part, (V + omega * slot).mT)
        if old:
            K, L, before_U, before_V = (old[key].mT for key in ("K", "L", "U", "V"))
            along, _ = transport(K, L, before_U, before_V, U[..., :0], omega)
            now = self.rows("K", part, self.slots)
            self.put("K", part, now + (along * slot).mT)


def of_sides(parts: list[Part]) -> Span:
    """What the parts have seen from the left and then from the right, as one."""
    return together([part.sides[side] for side in (0, 1) for part in parts])


def by_slots(works: list[Work]) -> list[list[Work]]:
    """Buckets with as many slots, of one dtype, on one device."""
    alike: dict[Any, list[Work]] = defaultdict(list)
    for work in works:
        sigma = work.state["sigma"]
        alike[work.slots, sigma.dtype, sigma.device].append(work)
    return list(alike.values())


def by_width(works: list[Work]) -> list[list[tuple[Work, Part]]]:
    """Parts of buckets whose small problems are one: as many slots in use, one dtype, one device."""
    alike: dict[Any, list[tuple[Work, Part]]] = defaultdict(list)
    for work in works:
        sigma = work.state["sigma"]
        for part in work.parts:
            alike[part.width, sigma.dtype, sigma.device].append((work, part))
    return list(alike.values())


def widths_of(needed: Sequence[int], slots: int) -> list[int]:
    """How many slots each layer takes, given how many it needs: the most any needs, a half or a quarter of it.

    A layer costs some 7e-4 ms times the square of its slots, or more where it is wide, and the calls for one
    more width twice 0.8 ms: the cheapest choice is taken.
    """
    full = min(slots, even(max(needed)))
    lower = [part for part in sorted({even(-(-full // share)) for share in (2, 4)}) if part < full]

    def width(need: int, choice: tuple[int, ...]) -> int:
        return next((part for part in choice if need <= part), full)

    def cost(choice: tuple[int, ...]) -> int:
        return GROUP * len(choice) + sum(width(need, choice) ** 2 for need in needed)

    choices = [choice for k in range(len(lower) + 1) for choice in combinations(lower, k)]
    best = min(choices, key=cost)
    return [width(need, best) for need in needed]


def even(width: int) -> int:
    """Rounded up to what matrix products like."""
    return -(-width // 4) * 4


def filled_slots(basis: Tensor) -> Tensor:
    """The last column (n,) of a basis that is not zero, from one on; a norm is 12 times as fast as `any`."""
    filled = torch.linalg.vector_norm(basis, dim=-2) > 0
    return (filled * torch.arange(1, basis.shape[-1] + 1, device=basis.device)).amax(-1)


def of_live(live: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """Rows of the new tensor for the layers that are live, of the old one for the others."""
    if all(live):
        return new
    mask = torch.tensor(live, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)
