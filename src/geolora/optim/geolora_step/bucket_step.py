"""A bucket on its way through one step of GeoLoRA: what it reads, sees and writes along the long dimension d.

The step of all buckets is in `geolora.py`, what they decide together in `across_layers.py`, the mathematics in
`methods/geolora.py`.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from geolora.kernels.augment import Span, combine, span_of, stack_spans
from geolora.kernels.tangent import norm, transport
from geolora.methods import geolora as method
from geolora.optim.buckets import pairs_of, stacked_gradients
from geolora.optim.geolora_step.masters import Masters
from geolora.optim.geolora_step.rank_cycle import (
    by_gain,
    looks_along_probes,
    new_probes,
    phase_of,
)
from geolora.pairs.point import Gauge
from geolora.pairs.sharded import is_sharded, write_factors

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Most bytes, counted in float64, that a chunk works on: a core's cache on the CPU, enough for a launch to pay on CUDA."""


class Chunk:
    """Layers of a bucket that go through a step together, each with `width` slots."""

    def __init__(self, layers: list[int], width: int, count: int, device: torch.device) -> None:
        """`layers` of the `count` of a bucket."""
        self.layers, self.width, self.is_bucket = layers, width, len(layers) == count
        neighbours = layers[-1] - layers[0] == len(layers) - 1
        self.index = None if neighbours else torch.tensor(layers, device=device)
        self.at = slice(layers[0], layers[-1] + 1) if self.index is None else self.index
        self.gradients: tuple[Tensor, Tensor] | None = None
        """Those of A and B, where they are few enough to be kept."""
        self.spans: list[Span] = []
        """What [U | K] and what [V | L] span."""
        self.move: method.Move | None = None
        """The solved step; None before."""
        self.K_and_L: dict[str, Tensor] = {}
        """K and L, where the state keeps no momentum."""


class BucketStep:
    """A bucket on its way through one step.

    The long dimension is gone over in chunks of some layers each: what they need in between stays in the
    cache, and is never there for all layers at once. Layers with few slots in use are chunks of their own.
    """

    def __init__(self, index: int, masters: Masters, live: list[bool]) -> None:
        """`index` of the bucket among the groups of pairs, `live`: which of its layers have a gradient."""
        self.index, self.masters, self.live = index, masters, live
        self.group, self.state = masters.group, masters.state
        self.gauge, self.fresh = masters.gauge()
        """How A and B lie in the slots, in any way where somebody else wrote the pairs (`fresh`)."""
        self.pairs = list(pairs_of(self.group["params"]))
        self.r = self.state["V"].shape[-1]
        self.adaptive = self.group["moments"] == "adaptive"
        self.sharded = any(map(is_sharded, self.group["params"]))
        self.phase = phase_of(self.group)
        self.chunks: list[Chunk] = []
        self.keep: Tensor | None = None
        """Slots (n, r) that a judgement has left, 1 or 0."""
        self._keeps_gradients = False

    def split(self, widths: list[int]) -> None:
        """Into chunks, given how many slots every layer takes."""
        U, V = self.state["U"], self.state["V"]
        # a product of a batch of matrices is shared out to the cores matrix by matrix
        cores = torch.get_num_threads() if U.device.type == "cpu" else 1
        room = CHUNK_BYTES.get(U.device.type, CHUNK_BYTES["cuda"])
        room //= 24 * max(U.shape[1], V.shape[1])
        self._keeps_gradients = self.sharded or self.r * len(widths) <= cores * room
        self.chunks = [
            Chunk(layers, width, len(widths), U.device)
            for width, layers in layers_of_chunks(widths, None if self.sharded else room, cores)
        ]

    # ---- what of a stack is of a chunk -------------------------------------------------------------

    def slots(self, key: str, chunk: Chunk, width: int) -> Tensor:
        """The first slots (n, width, d) of U, V, K or L: a view where the layers are neighbours, else a copy."""
        stack = self.first(self.state[key].mT, width)
        return (
            self.rows_of(stack, chunk)
            if chunk.index is None
            else stack.index_select(0, chunk.index)
        )

    def put_slots(self, key: str, chunk: Chunk, slots: Tensor) -> None:
        """Write tensors of the shape that `slots` gives."""
        stack = self.first(self.state[key].mT, slots.shape[1])
        if chunk.index is None:
            self.rows_of(stack, chunk).copy_(slots)
        else:
            stack.index_copy_(0, chunk.index, slots)

    def rows_of(self, stack: Tensor, chunk: Chunk) -> Tensor:
        """The rows of a stack (n, ...) that are of a chunk."""
        return stack if chunk.is_bucket else stack[chunk.at]

    def first(self, stack: Tensor, width: int) -> Tensor:
        """The first slots of a stack (n, r, ...)."""
        return stack if width == self.r else stack[:, :width]

    def live_of(self, chunk: Chunk) -> list[bool]:
        """Which layers of a chunk have a gradient."""
        return [self.live[layer] for layer in chunk.layers]

    # ---- reading -----------------------------------------------------------------------------------

    def gradients(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Those of A (n, r, d_in) and B (n, d_out, r) of a chunk; zero where there is none."""
        if chunk.gradients is not None:
            return chunk.gradients
        chosen = [factor for layer in chunk.layers for factor in self.pairs[layer]]
        stacks = stacked_gradients(chosen, self.state["U"].dtype)
        if self._keeps_gradients:
            chunk.gradients = stacks
        return stacks

    def all_gradients(self) -> Iterable[Tensor]:
        """Stacked, where they are kept so; else one by one."""
        if self._keeps_gradients:
            return [grad for chunk in self.chunks for grad in self.gradients(chunk)]
        return [p.grad for p in self.group["params"] if p.grad is not None]

    def tangent_squares(self) -> list[Tensor]:
        """||P(W)G||^2 of every chunk."""
        squares = []
        for chunk in self.chunks:
            right, left = (self.rows_of(side, chunk) for side in self.gauge[2:])
            grad_A, grad_B = self.gradients(chunk)
            K, L = (right.mT @ grad_B.mT).mT, (left.mT @ grad_A).mT
            squares.append(norm(K, L, self.slots("U", chunk, self.r).mT).square().sum())
        return squares

    # ---- seeing ------------------------------------------------------------------------------------

    def see(self, shrink: Tensor | None) -> None:
        """Update the momentum in place, and compute its Gram matrices with the bases.

        Args:
            shrink: what the gradients are multiplied by, a number; None for 1.
        """
        if any(self.live):
            for chunk in self.chunks:
                self._see(chunk, shrink)

    def _see(self, chunk: Chunk, shrink: Tensor | None) -> None:
        live, beta, width = self.live_of(chunk), self.group["momentum"], chunk.width
        inputs = self.r if self.fresh else width  # of slots not in use the gradient is zero
        right, left = (
            self.rows_of(self.first(side, inputs), chunk)[..., :width] for side in self.gauge[2:]
        )
        grad_A, grad_B = self.gradients(chunk)
        if shrink is not None:
            grad_A, grad_B = (grad * shrink.to(grad) for grad in (grad_A, grad_B))
        chunk.spans = []
        for key, basis, onto, grad in (
            ("K", "U", right.mT, self.first(grad_B.mT, inputs)),
            ("L", "V", left.mT, self.first(grad_A, inputs)),
        ):
            ahead = ()
            if key not in self.state:
                chunk.K_and_L[key] = now = torch.bmm(onto, grad)
            else:
                before = self.slots(key, chunk, width)
                now = torch.baddbmm(before, onto, grad, beta=beta)
                now = where_live(live, now, before)
                if self.adaptive:  # Nesterov: the gradient + b M = (1 + b) M - b M_before
                    ahead = (before.lerp(now, 1 + beta).mT,)
                self.put_slots(key, chunk, now)
            chunk.spans.append(span_of(self.slots(basis, chunk, width).mT, now.mT, *ahead))

    def weigh(self) -> None:
        """Add up what directions gain, from the growing to the judgement."""
        if not by_gain(self.group) or self.phase == "hold" or not any(self.live):
            return
        for chunk in self.chunks:
            now = self.group["unit"] * method.gains(both_sides([chunk]))
            now = where_live(self.live_of(chunk), now, torch.zeros_like(now))
            self.state["gain"][chunk.at, : chunk.width] += now

    # ---- writing -----------------------------------------------------------------------------------

    def sigma(self) -> Tensor:
        """The new singular values (n, r), as gradient_rows as they are known."""
        sigma = self.state["sigma"].clone()
        for chunk in self.chunks:
            if chunk.move is not None:
                before = self.first(self.rows_of(sigma, chunk), chunk.width)
                now = where_live(self.live_of(chunk), chunk.move.sigma, before)
                sigma[chunk.at, : chunk.width] = now
        return sigma if self.keep is None else sigma * self.keep

    def changes(self) -> bool:
        """Whether anything is to be written."""
        return self.keep is not None or any(chunk.move is not None for chunk in self.chunks)

    def overlap(self, chunk: Chunk, length_A: Tensor, length_B: Tensor) -> Tensor:
        """B_new^T B + A_new A^T (n, w, w), float64: the new slots, of these lengths and not turned, against those that are.

        Args:
            length_A, length_B: (n, r), of all layers.
        """
        width = chunk.width
        total = torch.zeros((), dtype=torch.float64)
        for side, (length, before) in enumerate(((length_B, 1), (length_A, 0))):
            were = self.rows_of(self.gauge[before], chunk)[:, :width, :width].double()
            if chunk.move is not None:
                now = chunk.spans[side].gram[:, :width] @ chunk.move[2 * side][..., :width]
                onto = now.mT @ were
                were = where_live(self.live_of(chunk), onto, were)
            lengths = self.first(self.rows_of(length, chunk), width)
            total = total + lengths.double().unsqueeze(-1) * were
        return total

    def turn(self, chunk: Chunk, turn: Tensor) -> None:
        """Take the turn (n, w, w) of the layers of a chunk that are written."""
        state = self.state["turn"]
        whole = torch.eye(self.r, dtype=state.dtype, device=state.device).repeat(len(turn), 1, 1)
        whole[:, : chunk.width, : chunk.width] = turn
        written = self.live_of(chunk) if self.keep is None else [True] * len(turn)
        state[chunk.at] = where_live(written, whole, self.rows_of(state, chunk))

    def write(self, gauge: Gauge) -> None:
        """New bases and momentum, in place, a probe where ranks grow, and A and B.

        Args:
            gauge: of the new pairs of all layers, (n, r, r) each.
        """
        grows = looks_along_probes({**self.group, "steps": self.group["steps"] + 1})
        for chunk in self.chunks:
            self._write(chunk, gauge, grows)
        if all(self.live) or self.keep is not None:
            self.masters.remember(gauge)
        else:
            self.masters.forget_gauge()

    def _write(self, chunk: Chunk, gauge: Gauge, grows: bool) -> None:
        names = [key for key in ("U", "V", "K", "L") if key in self.state]
        # momentum along a new direction is taken from where it was
        old = {}
        if grows and "K" in self.state:
            old = {key: self.slots(key, chunk, self.r).clone() for key in names}
        if chunk.move is not None:
            self._move(chunk, chunk.move)
        if self.keep is not None:
            for key in names:
                kept = self.rows_of(self.keep, chunk).unsqueeze(-1)
                self.put_slots(key, chunk, self.slots(key, chunk, self.r) * kept)
        if grows:
            self._probe(chunk, old)
        # what lies beyond is zero before and after, but where somebody else wrote it
        every_slot = self.fresh or grows or self.sharded or self.keep is not None
        width = self.r if every_slot else chunk.width
        in_A, in_B = (self.rows_of(side, chunk)[:, :width, :width] for side in gauge[:2])
        A = torch.bmm(in_A.mT, self.slots("V", chunk, width))
        B = torch.bmm(in_B.mT, self.slots("U", chunk, width)).mT
        targets, sources = [], []
        for layer, a, b in zip(chunk.layers, A.unbind(), B.unbind(), strict=True):
            if self.live[layer] or self.keep is not None:
                on = self.pairs[layer]
                targets += on if width == self.r else [on[0][:width], on[1][:, :width]]
                sources += [a, b]
        if targets:
            write_factors(targets, sources)

    def _move(self, chunk: Chunk, turn: method.Move) -> None:
        live, width = self.live_of(chunk), chunk.width
        sides = (("U", "K", turn.left), ("V", "L", turn.right))
        for span, (basis, key, on) in zip(chunk.spans, sides, strict=True):
            basis_rows = self.slots(basis, chunk, width)
            has_momentum = key in self.state
            gradient_rows = self.slots(key, chunk, width) if has_momentum else chunk.K_and_L[key]
            onto = on if has_momentum else on[..., :width]
            new = combine(span, basis_rows.mT, gradient_rows.mT, onto)
            self.put_slots(basis, chunk, where_live(live, new[:, :width], basis_rows))
            if has_momentum:
                self.put_slots(key, chunk, where_live(live, new[:, width:], gradient_rows))

    def _probe(self, chunk: Chunk, old: dict[str, Tensor]) -> None:
        """A new direction to look along, and the momentum along it, taken from where it was."""
        layers = [self.group["layers"][layer] for layer in chunk.layers]
        U, V = (self.slots(key, chunk, self.r).mT for key in ("U", "V"))
        omega, slot = new_probes(U, V, layers, self.group["steps"])
        if self.keep is None:
            slot = where_live(self.live_of(chunk), slot, torch.zeros_like(slot))
        self.put_slots("V", chunk, (V + omega * slot).mT)
        if old:
            K, L, before_U, before_V = (old[key].mT for key in ("K", "L", "U", "V"))
            along, _ = transport(K, L, before_U, before_V, U[..., :0], omega)
            now = self.slots("K", chunk, self.r)
            self.put_slots("K", chunk, now + (along * slot).mT)


def layers_of_chunks(
    widths: Sequence[int], room: int | None, cores: int
) -> list[tuple[int, list[int]]]:
    """(width, layers) of every chunk: layers of one width, as many as there is room for on every core.

    Args:
        widths: slots that each layer takes.
        room: slots, of all layers of a chunk together, for each core; None for all layers of a width at once.
        cores: a chunk has at least as many layers, where there are so many.
    """
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, width in enumerate(widths):
        layers[width].append(layer)
    return [
        (width, same[at : at + size])
        for width, same in layers.items()
        for size in [len(same) if room is None else cores * max(1, room // width)]
        for at in range(0, len(same), size)
    ]


def both_sides(chunks: list[Chunk]) -> Span:
    """What the chunks see from the left and then from the right, as one stack."""
    return stack_spans([chunk.spans[side] for side in (0, 1) for chunk in chunks])


def where_live(live: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """Rows of the new tensor for the layers that have a gradient, of the old one for the others."""
    if all(live):
        return new
    mask = torch.tensor(live, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)


def alike(steps: list[BucketStep]) -> list[list[BucketStep]]:
    """Buckets with as many slots, of one dtype, on one device."""
    groups: dict[Any, list[BucketStep]] = defaultdict(list)
    for step in steps:
        sigma = step.state["sigma"]
        groups[step.r, sigma.dtype, sigma.device].append(step)
    return list(groups.values())
