"""`torch.optim.Optimizer` shells: group pairs of equal shape, stack, call a method, write back.

The mathematics is in `methods/`, the long dimension in `work.py`; this file owns state, grouping and
the cycle grow, judge, hold.

One param group per bucket of equal shape, params [A1, B1, A2, B2, …] paired by position, so that
whatever swaps the Parameter objects of a group is followed. The stacked masters of a bucket are the
state of its first parameter. Everything that must survive a checkpoint is in `state` or in
`param_groups`; what is not there is rebuilt when needed.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geolora.errors import SettingError, SetupError, UnpairedParametersWarning, at_most_three
from geolora.kernels.augment import Span
from geolora.kernels.tangent import norm, transport
from geolora.kernels.truncate import settled_ranks
from geolora.methods import geolora as method
from geolora.optim.adamw import SETTINGS, adamw_step, rest_groups
from geolora.optim.bucket_step import (
    Part,
    Work,
    by_slots,
    by_width,
    filled_slots,
    of_live,
    of_sides,
    widths_of,
)
from geolora.optim.buckets import (
    by_gain,
    fingerprints,
    load_keeping_dtypes,
    make_masters,
    new_groups,
    not_finite,
    pairs_of,
    phase_of,
    refuse_other_state,
    scales_of,
)
from geolora.optim.nonfinite import to_be_skipped, total
from geolora.pairs.find import (
    check_budget,
    find_pairs,
    refuse_frozen,
    refuse_unreachable,
    unpaired_lora_layers,
)
from geolora.pairs.point import balanced_maps, read_pair, scaled_pair, slot_lengths, slot_ranks
from geolora.pairs.sharded import gathered

MOMENTS = ("adaptive", "momentum", "none")
DEFAULT_LR = {"adaptive": 7e-3, "momentum": 1e-2, "none": 1e-1}
SOFTEN = 0.01
REFERENCE_RANK = 8.0
"""Rank at which an adaptive step has the size that `lr` says; elsewhere sqrt(8 / rank) of it."""


class Seen(NamedTuple):
    """How the factors of a bucket were left by us, and what turns their gradients into K and L, (n, r)."""

    prints: list[tuple[int, int]]
    right: Tensor
    left: Tensor


class GeoLoRA(torch.optim.Optimizer):
    """Descent on the manifold of low-rank matrices, over unmodified PEFT LoRA pairs.

    For every pair W = s B A = U diag(sigma) V^T with gradient G = dL/dW,

        W+ = truncate(W - lr M),    M = P(W)G  or a momentum of it,

    where P(W)G = U U^T G + G V V^T - U U^T G V V^T. Ranks change in a cycle of `prune_every` steps:
    for the first sixth the rank may double at each step up to the pair's r (grow), then it is
    judged once by `tail` and `budget` (judge), then kept (hold). In grow steps a layer with a free
    slot also looks along one random direction w, adding G w w^T to M: the tangent space alone can
    be blind. The pair keeps its shape: slots that are not in use are zero on both sides.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs.py` for which are treated).
            It is not written before the first step. Whatever else is trainable (heads, biases,
            embeddings) is trained by AdamW.
        lr: step size; None takes a default per `moments`. Unit for "none" and "momentum": change
            of W per unit of gradient, whatever lora_alpha. For "adaptive": about the spectral norm of
            one step's change of a square layer of rank 8 in a model of width 1024; elsewhere times
            sqrt(1024 * max(d_out, d_in)) / width, where width is the geometric mean of
            sqrt(d_out * d_in) over the layers, and times sqrt(8 / rank): the Frobenius norm of a
            step is the same at every rank. Layers take more or less of that in proportion to the
            Frobenius norm of their momentum in that unit; the mean square of their shares is 1.
        rest_lr: step size of AdamW for everything else that is trainable.
        moments: "adaptive" (momentum with Nesterov's look ahead, then every direction moves at a like
            speed), "momentum" (heavy ball, carried to each new tangent space) or "none" (the
            paper's step).
        momentum: factor of the momentum before, in [0, 1); not used with moments="none".
        start_rank: slots to start with where B = 0; None for all r of the pair.
        tail: fraction of ||sigma||_2 a layer may lose when judged, in [0, 1).
        prune_every: steps in a cycle; 1 judges at every step, as in the paper; None has no cycle: the
            rank grows until it is judged once, at `settle_after`, or is kept where that is None.
        settle_after: number of steps after which the rank is judged a last time and then kept.
        budget: adapter parameters, sum of rank * (d_in + d_out), kept at every judgement. Shared out by
            what directions gain per parameter: with moments="adaptive" the fall of the loss, to first
            order, in the steps before; else sigma^2.
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
        SetupError: partitioned or sharded factors; a closure given to `step`.
        NonFiniteGradientError: 20 steps in a row without a finite gradient.

    Source: arXiv 2410.18720. Geometric momentum: arXiv 2506.17475.

    Examples:
        >>> optimizer = GeoLoRA(model)                      # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        rest_lr: float = 1e-3,
        moments: str = "adaptive",
        momentum: float = 0.8,
        start_rank: int | None = None,
        tail: float = 0.25,
        prune_every: int | None = 25,
        settle_after: int | None = None,
        budget: int | None = None,
        max_tangent_norm: float | None = None,
        adapter_name: str | None = None,
    ) -> None:
        _choose("moments", moments, MOMENTS)
        lr = DEFAULT_LR[moments] if lr is None else lr
        _demand("lr", lr, lr >= 0 and math.isfinite(lr), "a number >= 0")
        _demand("rest_lr", rest_lr, rest_lr >= 0 and math.isfinite(rest_lr), "a number >= 0")
        _demand("momentum", momentum, 0 <= momentum < 1, "in [0, 1)")
        _demand("tail", tail, 0 <= tail < 1, "in [0, 1)")
        _demand("prune_every", prune_every, prune_every is None or prune_every >= 1, "None or >= 1")
        _demand("start_rank", start_rank, start_rank is None or start_rank >= 1, "None or >= 1")
        judged = settle_after is None or settle_after >= 0
        _demand("settle_after", settle_after, judged, "None or >= 0")
        kept = budget is None or prune_every is not None or settle_after is not None
        _demand("budget", budget, kept, "None where `prune_every` and `settle_after` are None")
        bounded = max_tangent_norm is None or max_tangent_norm > 0
        _demand("max_tangent_norm", max_tangent_norm, bounded, "None or > 0")

        pairs = find_pairs(model, adapter_name, with_sharded=True)
        refuse_frozen(pairs)
        for pair in pairs:
            if start_rank is not None and start_rank > pair.r:
                raise SettingError(
                    f"GeoLoRA: `start_rank` must be at most the rank of the pair; got {start_rank} "
                    f"for r={pair.r} in `{pair.name}`. Lower it, or raise `r` in LoraConfig."
                )
        check_budget([pair.cost for pair in pairs], budget)
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
        groups = new_groups(pairs, settings)
        groups += rest_groups(model, groups, rest_lr)
        unpaired = unpaired_lora_layers(model, adapter_name)
        if unpaired:
            warnings.warn(
                f"GeoLoRA: LoRA on embeddings is trained by AdamW: {at_most_three(unpaired)}.",
                UnpairedParametersWarning,
                stacklevel=2,
            )
        super().__init__(groups, {"lr": lr, "rest_lr": rest_lr})

    def settled_ranks(self) -> dict[str, int]:
        """{layer: rank} as last judged; before the first step the starting rank."""
        return {
            name: rank
            for group in self._geometric()
            for name, rank in zip(group["layers"], group["ranks"], strict=True)
        }

    def adapter_parameters(self) -> int:
        """Sum of rank * (d_in + d_out) over all layers, at the settled ranks."""
        return sum(sum(group["ranks"]) * group["cost"] for group in self._geometric())

    @torch.no_grad()
    def measures(self) -> dict[str, float]:
        """Numbers to watch a training by; costs a read from the device, so not for every step.

        Returns:
            "rank" and "adapter_parameters" as settled; "sigma/largest" and "sigma/median" over the
            singular values of W in use, "tangent_norm", the norm of the momentum over all layers (0 without):
            from the first step on.
        """
        found: dict[str, float] = {
            "rank": sum(self.settled_ranks().values()),
            "adapter_parameters": self.adapter_parameters(),
        }
        states = [self.state[group["params"][0]] for group in self._geometric()]
        states = [state for state in states if state]
        sigma = (
            torch.cat([s["sigma"].flatten().cpu() for s in states]) if states else torch.zeros(0)
        )
        sigma = sigma[sigma > 0]
        if len(sigma):
            squares = [norm(s["K"], s["L"], s["U"]).square().sum() for s in states if "K" in s]
            found |= {
                "sigma/largest": float(sigma.max()),
                "sigma/median": float(sigma.median()),
                "tangent_norm": math.sqrt(sum(map(float, squares))),
            }
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every pair that has a gradient, and of AdamW for the rest.

        A step with lr = 0 leaves A and B bit-identical. A step with a gradient that is not finite
        is skipped as a whole.
        """
        if closure is not None:
            raise SetupError(
                "GeoLoRA.step: closures are not supported. Compute the loss and call backward() "
                "before step(): the factors' gradients are read once, at the current point."
            )
        works = [
            work
            for index, group in enumerate(self._geometric())
            if (work := self._begin(index, group)) is not None
        ]
        self._divide(works)
        if self._skip_non_finite(works):
            return
        self._see(works)
        self._weigh(works)
        self._turn(works)
        self._judge(works)
        self._write(works)
        for group in self._geometric():
            group["steps"] += 1
        for group in self._rest():
            adamw_step(group, self.state)

    # ---- reading -------------------------------------------------------------------------------

    def _begin(self, index: int, group: dict[str, Any]) -> Work | None:
        """A bucket that has something to do in this step, or None."""
        live = [A.grad is not None and B.grad is not None for A, B in pairs_of(group["params"])]
        if not any(live) and phase_of(group) != "judge":
            return None
        state = self.state[group["params"][0]]
        if not state:
            make_masters(self.state, group)
        maps, fresh = self._maps(index, group, state)
        return Work(index, group, state, live, maps, fresh)

    def _maps(
        self, index: int, group: dict[str, Any], state: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor], bool]:
        """What turns factor gradients into K and L: matrices (n, r, r), and whether they are not all diagonal.

        Where A or B are no longer what we wrote (a reload, an initialiser, `prune`), the masters of
        those pairs are read from them again and their momentum is carried over.
        """
        prints = fingerprints(group["params"])
        seen = self._seen.get(index)
        if seen is not None and seen.prints == prints:
            return (seen.right.diag_embed(), seen.left.diag_embed()), False
        scale, settled = self._constants(index, group, state)
        sizes = slot_lengths(state["sigma"], scale, settled)
        maps = balanced_maps(scale, *sizes)
        right, left = (slots.diag_embed() for slots in maps)
        A, B = scaled_pair(state["U"], state["V"], *sizes)
        factors = [gathered(p) for p in group["params"]]
        stale = [
            i
            for i, (a, b) in enumerate(pairs_of(factors))
            if not (
                torch.equal(A[i].to(a.dtype), a.flatten(1))
                and torch.equal(B[i].to(b.dtype), b.flatten(1))
            )
        ]
        if not stale:
            self._seen[index] = Seen(prints, *maps)
            return (right, left), False
        self._widths = {}
        for i in stale:
            refuse_unreachable(group["layers"][i], *factors[2 * i : 2 * i + 2])
            a, b = (p.flatten(1) for p in factors[2 * i : 2 * i + 2])
            reading = read_pair(a, b, group["scales"][i], group["start_rank"])
            old_U, old_V = state["U"][i].clone(), state["V"][i].clone()
            for key, value in (("U", reading.U), ("sigma", reading.sigma), ("V", reading.V)):
                state[key][i].copy_(value)
            right[i], left[i] = reading.right.to(right.dtype), reading.left.to(left.dtype)
            active, trials = slot_ranks(a, b)
            probes = int(((reading.U != 0).any(0) | (reading.V != 0).any(0)).sum()) - active
            group["ranks"][i] = max(1, active - trials if active else probes)
            if "K" in state:
                state["K"][i], state["L"][i] = transport(
                    state["K"][i], state["L"][i], old_U, old_V, state["U"][i], state["V"][i]
                )
        return (right, left), True

    def _constants(
        self, place: int, group: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """LoRA's s and the settled ranks of a bucket (n,), as tensors while they stay the same."""
        known = self._known.get(place)
        if known is None or known[0] != group["ranks"]:
            sigma = state["sigma"]
            settled = torch.tensor(group["ranks"], device=sigma.device)
            self._known[place] = known = ([*group["ranks"]], scales_of(group, sigma), settled)
        return known[1], known[2]

    def _skip_non_finite(self, works: list[Work]) -> bool:
        """True, with one warning naming the layers, where a gradient is NaN or infinite."""
        rest = [g for group in self._rest() for p in group["params"] if (g := p.grad) is not None]
        totals = [total(g) for work in works for g in work.all_gradients()]
        totals += [total(gathered(g)) for g in rest]
        groups = self._geometric()
        return to_be_skipped("GeoLoRA", groups[0], totals, lambda: not_finite(groups))

    # ---- seeing --------------------------------------------------------------------------------

    def _divide(self, works: list[Work]) -> None:
        """Say how many slots every layer takes in this step, of which there may be one or a few numbers."""
        for due in by_slots(works):
            widths = self._widths_of(due)
            for work in due:
                work.divide(widths[: len(work.live)])
                widths = widths[len(work.live) :]

    def _widths_of(self, due: list[Work]) -> list[int]:
        """Slots of all layers that may be filled after this step: twice those filled now; held, up to the rank.

        Layers without a gradient need none. Counting reads from the device; while ranks are held the count
        stands.
        """
        live = [live for work in due for live in work.live]
        places = tuple(work.place for work in due)
        held = all(phase_of(work.group) == "hold" for work in due)
        if not held:
            self._widths = {}  # of all, also where other layers take part
        elif (known := self._widths.get(places)) and known[0] == live:
            return known[1]
        filled = [
            torch.maximum(filled_slots(work.state["U"]), filled_slots(work.state["V"]))
            for work in due
        ]
        last = torch.cat(filled).clamp(min=1).tolist()
        caps = [rank for work in due for rank in work.group["ranks"]]
        if not held:
            caps = [2 * slots for slots in last]
        bounds = [
            (slots, cap) if on else (1, 1) for on, slots, cap in zip(live, last, caps, strict=True)
        ]
        needed = [min(due[0].slots, max(bound)) for bound in bounds]
        apart = due[0].state["V"].device.type == "cpu" and not any(work.sharded for work in due)
        widths = widths_of(needed if apart else [max(needed)] * len(needed), due[0].slots)
        if held and needed == [cap for _, cap in bounds]:
            # counted again, as after a resume, it would be the same
            self._widths[places] = live, widths
        return widths

    def _see(self, works: list[Work]) -> None:
        """Move the momentum on, and see it from where the layers are; the long dimension, once."""
        shrink = self._shrink(works)
        for work in works:
            for part in work.parts:
                work.see(part, shrink)

    def _shrink(self, works: list[Work]) -> Tensor | None:
        """What the gradients are multiplied by where their joint tangent norm exceeds max_tangent_norm."""
        bound = works[0].group["max_tangent_norm"] if works else None
        if bound is None:
            return None
        squares = []
        for work in works:
            for part in work.parts:
                K, L = work.tangent(part)
                squares.append(norm(K, L, work.rows("U", part, work.slots).mT).square().sum())
        size = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        return (bound / size.clamp(min=1e-30)).clamp(max=1.0)

    def _weigh(self, works: list[Work]) -> None:
        """Add up what directions gain, from the growing to the judgement."""
        for work in works:
            if not by_gain(work.group) or phase_of(work.group) == "hold" or not any(work.live):
                continue
            for part in work.parts:
                now = work.group["unit"] * method.gains(of_sides([part]))
                now = of_live(work.live_of(part), now, torch.zeros_like(now))
                work.state["gain"][part.at, : part.width] += now

    # ---- moving --------------------------------------------------------------------------------

    def _turn(self, works: list[Work]) -> None:
        """Solve the small problems: the new points of all buckets, capped but not yet judged."""
        going = [work for work in works if work.group["lr"] != 0.0 and any(work.live)]
        alike = by_width(going)
        seen = [of_sides([part for _, part in due]) for due in alike]
        for due, spans, rate in zip(alike, seen, self._rates(alike, seen), strict=True):
            caps = []
            for work, part in due:
                held = phase_of(work.group) == "hold"
                caps += [work.group["ranks"][at] if held else work.slots for at in part.layers]
            turn = method.step(
                spans,
                torch.cat(
                    [
                        work.first(work.of(work.state["sigma"], part), part.width)
                        for work, part in due
                    ]
                ),
                rate,
                torch.tensor(caps, device=rate.device),
                SOFTEN if due[0][0].adaptive else None,
            )
            counts = [len(part.layers) for _, part in due]
            shares = zip(*(tensor.split(counts) for tensor in turn), strict=True)
            for (_, part), share in zip(due, shares, strict=True):
                part.turn = method.Turn(*share)

    def _rates(self, alike: list[list[tuple[Work, Part]]], seen: list[Span]) -> list[Tensor]:
        """The step sizes of all layers, (N,) float64 for each group of parts."""

        def of_layers(due: list[tuple[Work, Part]], key: str) -> Tensor:
            values = [work.group[key] for work, part in due for _ in part.layers]
            return torch.tensor(values, dtype=torch.float64, device=due[0][0].state["sigma"].device)

        rates = [of_layers(due, "lr") for due in alike]
        if not alike or not alike[0][0][0].adaptive:
            return rates
        units = [of_layers(due, "unit") for due in alike]
        forces = [unit * method.force(spans) for unit, spans in zip(units, seen, strict=True)]
        device = forces[0].device  # layers may lie on several
        live = [live for due in alike for work, part in due for live in work.live_of(part)]
        shares = method.shares(
            torch.cat([force.to(device) for force in forces]), torch.tensor(live, device=device)
        )
        for rate, unit, share, spans, due in zip(
            rates, units, shares.split([*map(len, rates)]), seen, alike, strict=True
        ):
            used = method.directions(spans, due[0][1].width).sum(-1).clamp(min=1).double()
            rate *= unit * (REFERENCE_RANK / used).sqrt() * share.to(rate.device)
        return rates

    def _judge(self, works: list[Work]) -> None:
        """Cut every bucket whose cycle says so, by tail and then by the budget over all layers."""
        if not all(phase_of(w.group) == "judge" and w.group["lr"] != 0 for w in works):
            return
        settings = self._geometric()[0]
        ranks = settled_ranks(
            [sigma for work in works for sigma in work.sigma().double().cpu()],
            [work.group["cost"] for work in works for _ in work.live],
            settings["tail"],
            settings["budget"],
            self._worth(works) if by_gain(settings) else None,
        )
        for work in works:
            settle = work.group["settle_after"]
            work.group["settled"] = settle is not None and work.group["steps"] >= settle
            work.group["ranks"], ranks = ranks[: len(work.live)], ranks[len(work.live) :]
            sigma = work.sigma()
            work.keep = method.kept(sigma, torch.tensor(work.group["ranks"], device=sigma.device))

    def _worth(self, works: list[Work]) -> list[Tensor]:
        """What the directions of all layers have gained since the last judgement; counted anew."""
        gains = [work.state["gain"] for work in works]
        worth = [row for gain in gains for row in gain.double().cpu()]
        for gain in gains:
            gain.zero_()
        return worth

    # ---- writing -------------------------------------------------------------------------------

    def _write(self, works: list[Work]) -> None:
        """The new masters and momentum, and A and B, where something moved."""
        moved = [work for work in works if work.changes()]
        for due in by_slots(moved):
            counts = [len(work.live) for work in due]
            for work in due:
                work.state["sigma"].copy_(work.sigma())
            constants = [self._constants(work.place, work.group, work.state) for work in due]
            scale, settled = (torch.cat(part) for part in zip(*constants, strict=True))
            sizes = slot_lengths(torch.cat([work.state["sigma"] for work in due]), scale, settled)
            found = (*sizes, *balanced_maps(scale, *sizes))
            shares = zip(*(part.split(counts) for part in found), strict=True)
            for work, (on_A, on_B, right, left) in zip(due, shares, strict=True):
                grows = phase_of({**work.group, "steps": work.group["steps"] + 1}) == "grow"
                for part in work.parts:
                    work.write(part, on_A, on_B, grows)
                if all(work.live) or work.keep is not None:
                    self._seen[work.place] = Seen(fingerprints(work.group["params"]), right, left)
                else:
                    self._seen.pop(work.place, None)

    # ---- state ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the dtype it was saved in (masters stay float32).

        Raises:
            StateError: the state is of other layers or shapes, or not whole; nothing is changed.
        """
        refuse_other_state(self.param_groups, state_dict)
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Look again at what is in the parameters, and at how many slots are filled."""
        self._seen: dict[int, Seen] = {}
        self._widths: dict[tuple[int, ...], tuple[list[bool], list[int]]] = {}
        self._known: dict[int, tuple[list[int], Tensor, Tensor]] = {}

    def _geometric(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == "geometric"]

    def _rest(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == "rest"]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters for AdamW; pairs are found when the optimizer is built, not here."""
        if "kind" not in param_group:
            param_group = {"lr": self.defaults["rest_lr"], **SETTINGS, **param_group}
        super().add_param_group(param_group)
        if "_seen" not in self.__dict__:
            self._forget()


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingError(f"GeoLoRA: `{name}` must be one of {choices}; got {value!r}.")


def _demand(name: str, value: object, met: bool, condition: str) -> None:
    if not met:
        raise SettingError(f"GeoLoRA: `{name}` must be {condition}; got {value!r}.")
