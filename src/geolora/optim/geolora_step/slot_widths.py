"""How many slots a layer takes through a step: the fewer it uses, the less it costs."""

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from geolora.optim.geolora_step.bucket_step import BucketStep

WORTH = 2500
"""Least saving, in squared widths summed over layers, for which one more distinct width pays for its calls (CPU)."""


class SlotWidths:
    """Widths of all layers; while ranks are held they are counted once."""

    def __init__(self) -> None:
        self.counted: dict[tuple[int, ...], tuple[list[bool], list[int]]] = {}
        """{buckets: (layers with a gradient, widths)}"""

    def forget(self) -> None:
        """Count again."""
        self.counted = {}

    def of(self, steps: list[BucketStep]) -> list[int]:
        """How many slots each layer of buckets with equal r, dtype and device may use after this step.

        Twice those filled now; where ranks are held, up to the rank. Layers without a gradient need none.
        Counting reads from the device.
        """
        live = [on for step in steps for on in step.live]
        buckets = tuple(step.index for step in steps)
        held = all(step.phase == "hold" for step in steps)
        if not held:
            self.forget()  # of all, also where other layers take part
        elif (known := self.counted.get(buckets)) and known[0] == live:
            return known[1]
        filled = [
            torch.maximum(filled_slots(step.state["U"]), filled_slots(step.state["V"]))
            for step in steps
        ]
        last = torch.cat(filled).clamp(min=1).tolist()
        caps = [rank for step in steps for rank in step.group["ranks"]]
        if not held:
            caps = [2 * slots for slots in last]
        bounds = [
            (slots, cap) if on else (1, 1) for on, slots, cap in zip(live, last, caps, strict=True)
        ]
        r = steps[0].r
        needed = [min(r, max(bound)) for bound in bounds]
        apart = steps[0].state["V"].device.type == "cpu" and not any(s.sharded for s in steps)
        widths = cheapest_widths(needed if apart else [max(needed)] * len(needed), r)
        if held and needed == [cap for _, cap in bounds]:
            # counted again, as after a resume, it would be the same
            self.counted[buckets] = live, widths
        return widths


def cheapest_widths(needed: Sequence[int], r: int) -> list[int]:
    """How many of r slots each layer takes, given how many it needs: the most any needs, a half or a quarter of it.

    A layer costs some 7e-4 ms times the square of its slots, or more where it is wide, and the calls for one
    more width twice 0.8 ms: the cheapest choice is taken.
    """
    full = min(r, even(max(needed)))
    lower = [option for option in sorted({even(-(-full // n)) for n in (2, 4)}) if option < full]

    def width(need: int, choice: tuple[int, ...]) -> int:
        return next((option for option in choice if need <= option), full)

    def cost(choice: tuple[int, ...]) -> int:
        return WORTH * len(choice) + sum(width(need, choice) ** 2 for need in needed)

    choices = [choice for k in range(len(lower) + 1) for choice in combinations(lower, k)]
    best = min(choices, key=cost)
    return [width(need, best) for need in needed]


def even(width: int) -> int:
    """Rounded up to a multiple of 4, which matrix products like."""
    return -(-width // 4) * 4


def filled_slots(basis: Tensor) -> Tensor:
    """The last column (n,) of a basis that is not zero, from one on; a norm is 12 times as fast as `any`."""
    filled = torch.linalg.vector_norm(basis, dim=-2) > 0
    return (filled * torch.arange(1, basis.shape[-1] + 1, device=basis.device)).amax(-1)
