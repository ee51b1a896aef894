"""What the layers of a step of GeoLoRA decide together: the bound on it, the small problems, step sizes, ranks."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from geolora.kernels.augment import Span
from geolora.kernels.decompose import polar
from geolora.kernels.truncate import leading, settled_ranks
from geolora.methods import geolora as method
from geolora.optim.geolora_step.bucket_step import BucketStep, Chunk, both_sides
from geolora.optim.geolora_step.rank_cycle import by_gain, tail_by_gain

SOFTEN = 0.01
"""e of the soft sign of an adaptive step; measured (docs/decisions.md)."""
REFERENCE_RANK = 8.0
"""Rank at which an adaptive step has the size that `lr` says; elsewhere sqrt(8 / rank) of it."""

Chunks = list[tuple[BucketStep, Chunk]]
"""Chunks whose small problems are one stack."""


def shrink_factor(steps: list[BucketStep]) -> Tensor | None:
    """What the gradients are multiplied by where their joint tangent norm exceeds max_tangent_norm."""
    bound = steps[0].group["max_tangent_norm"] if steps else None
    if bound is None:
        return None
    squares = [square for step in steps for square in step.tangent_squares()]
    size = torch.stack([square.to(squares[0].device) for square in squares]).sum().sqrt()
    return (bound / size.clamp(min=1e-30)).clamp(max=1.0)


def solve_small_problems(steps: list[BucketStep]) -> None:
    """Solve the small problems: the new points of all chunks, capped but not yet judged."""
    moving = [step for step in steps if step.group["lr"] != 0.0 and any(step.live)]
    stacks = _with_equal_width(moving)
    spans = [both_sides([chunk for _, chunk in stack]) for stack in stacks]
    for stack, span, rate in zip(stacks, spans, _rates(stacks, spans), strict=True):
        caps = []
        for step, chunk in stack:
            held = step.phase == "hold"
            caps += [step.group["ranks"][layer] if held else step.r for layer in chunk.layers]
        sigma = [
            step.first(step.rows_of(step.state["sigma"], chunk), chunk.width)
            for step, chunk in stack
        ]
        turn = method.step(
            span,
            torch.cat(sigma),
            rate,
            torch.tensor(caps, device=rate.device),
            SOFTEN if stack[0][0].adaptive else None,
        )
        counts = [len(chunk.layers) for _, chunk in stack]
        shares = zip(*(tensor.split(counts) for tensor in turn), strict=True)
        for (_, chunk), share in zip(stack, shares, strict=True):
            chunk.move = method.Move(*share)


def judge_all(steps: list[BucketStep], settings: dict[str, Any]) -> None:
    """Cut every bucket, by tail and then by the budget over all layers; what is left is in `keep` and the ranks.

    Args:
        settings: `tail`, what it is of, `budget` and `moments`.
    """
    ranks = settled_ranks(
        [sigma for step in steps for sigma in step.sigma().double().cpu()],
        [step.group["cost"] for step in steps for _ in step.live],
        settings["tail"],
        settings["budget"],
        _taken_gains(steps) if by_gain(settings) else None,
        tail_by_gain(settings),
    )
    for step in steps:
        group = step.group
        settle = group["settle_after"]
        group["settled"] = settle is not None and group["steps"] >= settle
        group["ranks"], ranks = ranks[: len(step.live)], ranks[len(step.live) :]
        sigma = step.sigma()
        step.keep = method.kept(sigma, torch.tensor(group["ranks"], device=sigma.device))


def turn_slots(written: list[tuple[BucketStep, Tensor, Tensor]]) -> None:
    """Take the turn of the judged slots of all layers that leaves A and B nearest to what they are.

    It minimises ||A_new - A||^2 + ||B_new - B||^2: a slot holds about the same direction from step to step, however
    singular vectors of like sigma turn. Trials, probes and idle slots stay as they are.

    Args:
        written: buckets with as many slots, and the lengths (n, r) of their slots before they are turned.
    """
    lengths = {id(step): sides for step, *sides in written}
    for stack in _with_equal_width([step for step, *_ in written]):
        M = torch.cat([step.overlap(chunk, *lengths[id(step)]) for step, chunk in stack])
        width = M.shape[-1]
        judged = torch.cat([_judged(step, chunk) for step, chunk in stack])
        inside = leading(judged, width)
        size = M.abs().amax((-2, -1))
        rest = torch.where(inside, 0.0, torch.where(size > 0, size, 1.0).unsqueeze(-1))
        block = inside.unsqueeze(-1) & inside.unsqueeze(-2)
        turns = polar(torch.where(block, M, rest.diag_embed()))
        counts = [len(chunk.layers) for _, chunk in stack]
        for (step, chunk), turn in zip(stack, turns.split(counts), strict=True):
            step.turn(chunk, turn)


def _judged(step: BucketStep, chunk: Chunk) -> Tensor:
    """How many slots of the layers of a chunk are active and judged."""
    active = (step.rows_of(step.state["sigma"], chunk) > 0).sum(-1)
    return torch.minimum(active, step.rows_of(step.masters.constants()[1], chunk))


def _taken_gains(steps: list[BucketStep]) -> list[Tensor]:
    """What the directions of all layers have gained since the last judgement; counted anew."""
    gains = [step.state["gain"] for step in steps]
    rows = [row.clone() for gain in gains for row in gain.double().cpu()]
    for gain in gains:
        gain.zero_()
    return rows


def _rates(stacks: list[Chunks], spans: list[Span]) -> list[Tensor]:
    """The step sizes of all layers, (N,) float64 for each stack."""

    def of_layers(stack: Chunks, key: str) -> Tensor:
        values = [step.group[key] for step, chunk in stack for _ in chunk.layers]
        device = stack[0][0].state["sigma"].device
        return torch.tensor(values, dtype=torch.float64, device=device)

    rates = [of_layers(stack, "lr") for stack in stacks]
    if not stacks or not stacks[0][0][0].adaptive:
        return rates
    units = [of_layers(stack, "unit") for stack in stacks]
    forces = [unit * method.tangent_norms(span) for unit, span in zip(units, spans, strict=True)]
    device = forces[0].device  # layers may lie on several
    live = [on for stack in stacks for step, chunk in stack for on in step.live_of(chunk)]
    shares = method.shares(
        torch.cat([force.to(device) for force in forces]), torch.tensor(live, device=device)
    )
    for rate, unit, share, span, stack in zip(
        rates, units, shares.split([*map(len, rates)]), spans, stacks, strict=True
    ):
        used = method.slots_with_right_vector(span, stack[0][1].width).sum(-1).clamp(min=1).double()
        rate *= unit * (REFERENCE_RANK / used).sqrt() * share.to(rate.device)
    return rates


def _with_equal_width(steps: list[BucketStep]) -> list[Chunks]:
    """Chunks of buckets whose small problems are one: as many slots in use, one dtype, one device."""
    groups: dict[Any, Chunks] = defaultdict(list)
    for step in steps:
        sigma = step.state["sigma"]
        for chunk in step.chunks:
            groups[chunk.width, sigma.dtype, sigma.device].append((step, chunk))
    return list(groups.values())
