"""`GeoLoRA`; the mathematics is in `methods/geolora.py`.

How a step goes: `step` below. The long dimension of a bucket: `bucket_step.py`. What layers decide together:
`across_layers.py`. Masters: `masters.py`. When ranks grow, are judged and held: `rank_cycle.py`.

Everything that must survive a checkpoint is in `state` (the stacked masters of a bucket, as the state of its
first parameter) or in `param_groups`; what is not there is found again when needed.
"""

import math
from typing import Any

import torch
from torch import nn

from geolora.errors import SettingError
from geolora.kernels.tangent import norm
from geolora.methods.geolora import units
from geolora.optim.base import LowRankOptimizer
from geolora.optim.buckets import pairs_of
from geolora.optim.geolora_step.across_layers import (
    judge_all,
    shrink_factor,
    solve_small_problems,
    turn_slots,
)
from geolora.optim.geolora_step.bucket_step import BucketStep, alike
from geolora.optim.geolora_step.masters import Masters, master_shapes
from geolora.optim.geolora_step.rank_cycle import phase_of
from geolora.optim.geolora_step.slot_widths import SlotWidths
from geolora.optim.nonfinite import total
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import Pair, check_budget, find_pairs
from geolora.pairs.point import Gauge, balanced_gauge, slot_lengths

MOMENTS = ("adaptive", "momentum", "none")
JUDGE, SETTLE = 0.1, 20
"""When ranks are judged: after this share of the steps, or after so many where their number is not known."""
DEFAULT_LR = {"adaptive": 7e-3, "momentum": 1e-2, "none": 1e-1}


class GeoLoRA(LowRankOptimizer):
    """Descent on the manifold of low-rank matrices, over unmodified PEFT LoRA pairs.

    For every pair W = s B A = U diag(sigma) V^T with gradient G = dL/dW,

        W+ = truncate(W - lr M),    M = P(W)G  or a momentum of it,

    where P(W)G = U U^T G + G V V^T - U U^T G V V^T. In the first steps the rank may double at each
    step up to the pair's r (grow), then it is judged by `tail` and `budget` (judge), then kept (hold):
    once, or in a cycle of `prune_every` steps. In grow steps a layer with a free slot also looks along
    one random direction w, adding G w w^T to M: the tangent space alone can be blind. The pair keeps
    its shape: slots that are not in use are zero on both sides.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs/find.py` for which are treated).
            It is not written before the first step. Whatever else is trainable (heads, biases,
            embeddings) is trained by AdamW.
        lr: step size; None takes a default per `moments`. With "none" and "momentum": how far W moves per
            unit of gradient, whatever lora_alpha is. With "adaptive": about the spectral norm of the change
            of W in one step, for a square layer of rank 8 in a model of width 1024. Other layers take
            lr * sqrt(1024 * max(d_out, d_in)) / width * sqrt(8 / rank), where width is the geometric mean of
            sqrt(d_out * d_in) over all layers. A layer with a larger momentum goes further, in proportion;
            the mean square of these shares is 1.
        rest_lr: step size of AdamW for everything else that is trainable.
        moments: "adaptive" (momentum with Nesterov's look ahead, then every direction moves at a like
            speed), "momentum" (heavy ball, carried to each new tangent space) or "none" (the
            paper's step).
        momentum: factor of the momentum before, in [0, 1); not used with moments="none".
        start_rank: slots to start with where B = 0; None for all r of the pair.
        tail: what may be given up when ranks are judged, in [0, 1); None judges never and keeps the ranks.
            With moments="adaptive" a share of all that the directions of all layers gain, which is
            the fall of the loss, to first order, in the steps before: those that gain least per
            parameter go. Else a fraction of ||sigma||_2 in every layer, as in the paper.
        total_steps: steps of the run: the rank grows for a tenth of them and is then judged, once. None:
            20 steps, of a run of any length.
        prune_every: steps in a cycle: grow for the first sixth, judge, hold; 1 judges at every step, as in
            the paper; None has no cycle.
        settle_after: number of steps after which the rank is judged a last time and then kept; None
            takes what `total_steps` says. A cycle of unknown length has no last one.
        budget: adapter parameters, sum of rank * (d_in + d_out), kept at every judgement. Shared out by
            what directions gain per parameter, or by sigma^2, as `tail` is.
        max_tangent_norm: bound on the norm of P(W)G over all layers; larger ones are scaled down.
        adapter_name: which adapter of the model; None for the active one.

    Not for: embeddings, grouped convolutions, DoRA and other variants, tied, tensor-parallel or
    ZeRO-partitioned factors. Trainer's gradient clipping acts on the factors and so changes lr
    silently: set max_grad_norm=0 with moments="none" and use `max_tangent_norm`.

    Precision:
        Masters of U, sigma, V and momentum are float32 (float64 for float64 pairs), whatever the
        dtype of A and B; the 2r x 2r cores are float64.

    Raises:
        PairingError: no pair, or a layer that cannot be treated.
        SettingError: an argument out of its range. BudgetError: less than one direction per layer.
        SetupError: factors that ZeRO has partitioned; a closure given to `step`.
        StateError: a factor that was reshaped, cast or moved between steps; a state of another model.
        NonFiniteGradientError: 20 steps in a row without a finite gradient.

    Source: arXiv 2410.18720. Geometric momentum: arXiv 2506.17475.

    Examples:
        >>> optimizer = GeoLoRA(model)                      # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()  # doctest: +SKIP
    """

    method = "geolora"
    kind = "geometric"
    keeps = ("ranks", "cost", "unit", "steps", "settled")
    same_names = True  # probes are drawn by them
    newer = ("turn", "gain")

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        rest_lr: float = 1e-3,
        moments: str = "adaptive",
        momentum: float = 0.8,
        start_rank: int | None = None,
        tail: float | None = 0.2,
        total_steps: int | None = None,
        prune_every: int | None = None,
        settle_after: int | None = None,
        budget: int | None = None,
        max_tangent_norm: float | None = None,
        adapter_name: str | None = None,
    ) -> None:
        self._demand("moments", moments, moments in MOMENTS, f"one of {MOMENTS}")
        lr = DEFAULT_LR[moments] if lr is None else lr
        self._number("momentum", momentum, "in [0, 1)", lambda v: 0 <= v < 1)
        self._number("tail", tail, "None or in [0, 1)", lambda v: 0 <= v < 1, True)
        for name, value, least in (
            ("total_steps", total_steps, 1),
            ("prune_every", prune_every, 1),
            ("start_rank", start_rank, 1),
            ("settle_after", settle_after, 0),
        ):
            self._whole(name, value, least, f"None or >= {least}, a whole number", optional=True)
        kept = budget is None or tail is not None
        self._demand("budget", budget, kept, "None where `tail` is None: no rank is judged then")
        self._number("max_tangent_norm", max_tangent_norm, "None or > 0", lambda v: v > 0, True)

        pairs = find_pairs(model, adapter_name, with_sharded=True)
        for pair in pairs:
            if start_rank is not None and start_rank > pair.r:
                raise SettingError(
                    f"GeoLoRA: `start_rank` must be at most the rank of the pair; got {start_rank} "
                    f"for r={pair.r} in `{pair.name}`. Lower it, or raise `r` in LoraConfig."
                )
        check_budget([pair.cost for pair in pairs], budget)
        if settle_after is None and total_steps is not None:
            settle_after = int(JUDGE * total_steps)
        if settle_after is None and prune_every is None:
            settle_after = SETTLE
        settings = {
            "lr": lr,
            "moments": moments,
            "momentum": momentum,
            "start_rank": start_rank,
            "tail": tail,
            "prune_every": prune_every,
            "settle_after": settle_after,
            "budget": budget,
            "max_tangent_norm": max_tangent_norm,
        }
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _own(
        self, bucket: list[Pair], pairs: list[Pair], settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Settled `ranks`; `cost` of a direction; `steps` taken; whether the last judgement is behind (`settled`).

        `unit` is what lr is multiplied by for an adaptive step; `tail_of`, what `tail` is a share of.
        """
        first = bucket[0]
        known = units([(pair.d_out, pair.d_in) for pair in pairs])
        return {
            "ranks": [settings["start_rank"] or first.r] * len(bucket),
            "cost": first.d_in + first.d_out,
            "unit": known[pairs.index(first)],
            "steps": 0,
            "settled": False,
            "tail_of": "gain" if settings["moments"] == "adaptive" else "sigma",
        }

    def settled_ranks(self) -> dict[str, int]:
        """{layer: rank} as last judged; before the first step the starting rank."""
        return {
            name: rank
            for group in self._paired()
            for name, rank in zip(group["layers"], group["ranks"], strict=True)
        }

    def adapter_parameters(self) -> int:
        """Sum of rank * (d_in + d_out) over all layers, at the settled ranks."""
        return sum(sum(group["ranks"]) * group["cost"] for group in self._paired())

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Numbers to watch a training by; costs a read from the device, so not for every step.

        Returns:
            "rank" and "adapter_parameters" as settled; "sigma/largest" and "sigma/median" over the
            singular values of W in use, "tangent_norm", the norm of the momentum over all layers (0 without):
            from the first step on.
        """
        numbers: dict[str, float] = {
            "rank": sum(self.settled_ranks().values()),
            "adapter_parameters": self.adapter_parameters(),
        }
        states = [self.state[group["params"][0]] for group in self._paired()]
        states = [state for state in states if state]
        sigma = (
            torch.cat([s["sigma"].flatten().cpu() for s in states]) if states else torch.zeros(0)
        )
        sigma = sigma[sigma > 0]
        if len(sigma):
            squares = [norm(s["K"], s["L"], s["U"]).square().sum() for s in states if "K" in s]
            numbers |= {
                "sigma/largest": float(sigma.max()),
                "sigma/median": float(sigma.median()),
                "tangent_norm": math.sqrt(sum(map(float, squares))),
            }
        return numbers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every pair that has a gradient, and of AdamW for the rest.

        A step with lr = 0 leaves A and B bit-identical. What happens, in order:

        1. read: the factor gradients hold K = G V and L = G^T U; masters of pairs that were written by somebody else
           are read again.
        2. skip: nothing moves where a gradient is not finite.
        3. see: gradients above max_tangent_norm are scaled down; K and L are added to the momentum; one pass over the
           long dimension gives the Gram matrices of [U | K] and [V | L].
        4. weigh: what each direction gains is added up, where ranks are judged by it.
        5. solve: the 2r x 2r problems of all layers give the new points, capped at r.
        6. judge: where the cycle says so, ranks are cut by tail and budget.
        7. write: U, sigma, V, the momentum, and A and B, with a probe where ranks grow; slots are turned to where they
           were.
        """
        self._refuse_what_cannot_step(closure)
        steps = self._read()
        if self._skips([total(grad) for step in steps for grad in step.all_gradients()]):
            return
        shrink = shrink_factor(steps)
        for step in steps:
            step.see(shrink)
        for step in steps:
            step.weigh()
        solve_small_problems(steps)
        if all(step.phase == "judge" and step.group["lr"] != 0 for step in steps):
            judge_all(steps, self._paired()[0])
        self._write([step for step in steps if step.changes()])
        for group in self._paired():
            group["steps"] += 1
        self._step_rest()

    def _read(self) -> list[BucketStep]:
        """The buckets that have something to do in this step, split into chunks."""
        steps = []
        for index, group in enumerate(self._paired()):
            live = [A.grad is not None and B.grad is not None for A, B in pairs_of(group["params"])]
            if any(live) or phase_of(group) == "judge":
                steps.append(BucketStep(index, self._masters_of(index, group), live))
        if any(step.fresh for step in steps):
            self._widths.forget()
        for same in alike(steps):
            widths = self._widths.of(same)
            for step in same:
                step.split(widths[: len(step.live)])
                widths = widths[len(step.live) :]
        return steps

    def _write(self, steps: list[BucketStep]) -> None:
        """The new masters and momentum, and A and B; lengths and turns are found for all buckets alike at once."""
        for same in alike(steps):
            for step in same:
                step.state["sigma"].copy_(step.sigma())
            constants = [step.masters.constants() for step in same]
            scale, settled = (torch.cat(rows) for rows in zip(*constants, strict=True))
            sigma = torch.cat([step.state["sigma"] for step in same])
            lengths = slot_lengths(sigma, scale, settled)
            counts = [len(step.live) for step in same]
            turn_slots([*zip(same, *(length.split(counts) for length in lengths), strict=True)])
            turn = torch.cat([step.state["turn"] for step in same])
            gauge = balanced_gauge(turn, scale, *lengths)
            shares = zip(*(side.split(counts) for side in gauge), strict=True)
            for step, share in zip(same, shares, strict=True):
                step.write(Gauge(*share))

    # ---- state -----------------------------------------------------------------------------------

    def _masters_of(self, index: int, group: dict[str, Any]) -> Masters:
        known = self._masters.get(index)
        if known is None or not known.are_of(group, self.state):
            known = self._masters[index] = Masters(group, self.state)
        return known

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:
        return master_shapes(group, saved)

    def _forget(self) -> None:
        super()._forget()
        self._masters: dict[int, Masters] = {}
        self._widths = SlotWidths()
