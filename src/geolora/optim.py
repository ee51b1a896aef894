"""`torch.optim.Optimizer` shells: group pairs of equal shape, stack, call a method, write back.

The mathematics is in `methods/`; this file owns state, grouping and the cycle grow, judge, hold.

One param group per bucket of equal shape, params [A1, B1, A2, B2, …] paired by position, so that
whatever swaps the Parameter objects of a group is followed. The stacked masters of a bucket are the
state of its first parameter. Everything that must survive a checkpoint is in `state` or in
`param_groups`; what is not there is rebuilt when needed.
"""

import math
import warnings
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geolora.buckets import (
    by_gain,
    fingerprints,
    load_keeping_dtypes,
    make_masters,
    new_groups,
    new_probes,
    not_finite,
    pairs_of,
    phase_of,
    refuse_other_state,
    scales_of,
    stacked_gradients,
)
from geolora.errors import SettingError, SetupError, UnpairedParametersWarning, at_most_three
from geolora.factors import balanced_maps, read_pair, slot_ranks, to_pair
from geolora.finite import to_be_skipped, total
from geolora.kernels.tangent import norm, transport
from geolora.kernels.truncate import settled_ranks
from geolora.methods import geolora as method
from geolora.pairs import (
    check_budget,
    find_pairs,
    refuse_frozen,
    refuse_unreachable,
    unpaired_lora_layers,
)
from geolora.rest import SETTINGS, adamw_step, rest_groups
from geolora.sharded import whole, write

MOMENTS = ("adaptive", "momentum", "none")
DEFAULT_LR = {"adaptive": 7e-3, "momentum": 1e-2, "none": 1e-1}
SOFTEN = 0.01
REFERENCE_RANK = 8.0
"""Rank at which an adaptive step has the size that `lr` says; elsewhere sqrt(8 / rank) of it."""


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
        check_budget(pairs, budget)
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
        moves = [
            move
            for index, group in enumerate(self._geometric())
            if (move := self._read(index, group)) is not None
        ]
        if self._skip_non_finite(moves):
            return
        moves = self._bounded(moves)
        self._weigh(moves)
        moves = self._judged(self._advanced(moves))
        for move in moves:
            self._commit(move)
        for group in self._geometric():
            group["steps"] += 1
        for group in self._rest():
            adamw_step(group, self.state)

    # ---- reading -------------------------------------------------------------------------------

    def _read(self, index: int, group: dict[str, Any]) -> "_Move | None":
        """Masters and tangent gradient of a bucket; None where there is nothing to do."""
        live = [A.grad is not None and B.grad is not None for A, B in pairs_of(group["params"])]
        if not any(live) and phase_of(group) != "judge":
            return None
        state = self.state[group["params"][0]]
        if not state:
            make_masters(self.state, group)
        right, left = self._maps(index, group, state)
        grad_A, grad_B = stacked_gradients(group["params"], state["U"].dtype)
        (K, L), beta = _memory(group, state)
        K = torch.baddbmm(K.mT, right.mT, grad_B.mT, beta=beta).mT
        L = torch.baddbmm(L.mT, left.mT, grad_A, beta=beta).mT
        point, M = method.Point(state["U"], state["sigma"], state["V"]), method.Momentum(K, L)
        return _Move(index, group, live, point, M, point, M, written=False)

    def _maps(
        self, index: int, group: dict[str, Any], state: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """What turns factor gradients into K and L: matrices (n, r, r).

        Where A or B are no longer what we wrote (a reload, an initialiser, `prune`), the masters of
        those pairs are read from them again and their momentum is carried over.
        """
        settled = torch.tensor(group["ranks"], device=state["sigma"].device)
        scale = scales_of(group, state["sigma"])
        right, left = (x.diag_embed() for x in balanced_maps(state["sigma"], scale, settled))
        if self._seen.get(index) == fingerprints(group["params"]):
            return right, left
        A, B = to_pair(state["U"], state["sigma"], state["V"], scale, settled)
        factors = [whole(p) for p in group["params"]]
        stale = [
            i
            for i, (a, b) in enumerate(pairs_of(factors))
            if not (
                torch.equal(A[i].to(a.dtype), a.flatten(1))
                and torch.equal(B[i].to(b.dtype), b.flatten(1))
            )
        ]
        if not stale:
            self._seen[index] = fingerprints(group["params"])
            return right, left
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
        return right, left

    def _skip_non_finite(self, moves: list["_Move"]) -> bool:
        """True, with one warning naming the layers, where a gradient is NaN or infinite."""
        rest = [g for group in self._rest() for p in group["params"] if (g := p.grad) is not None]
        totals = [total(part) for move in moves for part in move.M] + [
            total(whole(g)) for g in rest
        ]
        groups = self._geometric()
        return to_be_skipped("GeoLoRA", groups[0], totals, lambda: not_finite(groups))

    # ---- moving --------------------------------------------------------------------------------

    def _bounded(self, moves: list["_Move"]) -> list["_Move"]:
        """Scale all tangent gradients down where their joint norm exceeds max_tangent_norm."""
        if not moves or moves[0].group["max_tangent_norm"] is None:
            return moves
        squares, memories = [], []
        for move in moves:
            before, beta = _memory(move.group, self.state[move.group["params"][0]])
            memories.append([beta * part for part in before])
            K, L = (part - old for part, old in zip(move.M, memories[-1], strict=True))
            squares.append(norm(K, L, move.point.U).square().sum())
        size = torch.stack([s.to(squares[0].device) for s in squares]).sum().sqrt()
        factor = (moves[0].group["max_tangent_norm"] / size.clamp(min=1e-30)).clamp(max=1.0)
        bounded = []
        for move, old in zip(moves, memories, strict=True):
            parts = (a.lerp(b, factor.to(b)) for a, b in zip(old, move.M, strict=True))
            M = method.Momentum(*parts)
            bounded.append(move._replace(M=M, carried=M))
        return bounded

    def _weigh(self, moves: list["_Move"]) -> None:
        """Add up what directions gain, from the growing to the judgement."""
        for move in moves:
            group = move.group
            if by_gain(group) and phase_of(group) != "hold":
                gain = self.state[group["params"][0]]["gain"]
                now = group["unit"] * method.gains(move.M)
                gain += _where(move.live, now, torch.zeros_like(now))

    def _advanced(self, moves: list["_Move"]) -> list["_Move"]:
        """The new points of all buckets, capped but not yet judged."""
        together: dict[Any, list[int]] = defaultdict(list)
        sizes = self._rates(moves)
        for i, move in enumerate(moves):
            if move.group["lr"] != 0.0 and any(move.live):
                sigma = move.point.sigma
                together[sigma.shape[-1], sigma.dtype, sigma.device].append(i)
        for (slots, _, device), indices in together.items():
            due = [moves[i] for i in indices]
            caps = []
            for move in due:
                group, count = move.group, len(move.live)
                caps += group["ranks"] if phase_of(group) == "hold" else [slots] * count
            adaptive = due[0].group["moments"] == "adaptive"
            ends = method.step(
                [move.point for move in due],
                [move.M for move in due],
                torch.cat([sizes[i] for i in indices]),
                torch.tensor(caps, device=device),
                method.Spectral([self._ahead(move) for move in due], SOFTEN) if adaptive else None,
                self._width(due),
            )
            for i, (new, carried) in zip(indices, ends, strict=True):
                moves[i] = moves[i]._replace(new=new, carried=carried, written=True)
        return moves

    def _width(self, due: list["_Move"]) -> int:
        """Slots that may be filled after this step: those filled now, at most twice as many."""
        place = torch.arange(1, due[0].point.V.shape[-1] + 1, device=due[0].point.V.device)
        filled = [
            (_filled(part) * place).amax() for move in due for part in (move.point.U, move.point.V)
        ]
        last = max(1, int(torch.stack(filled).amax()))
        if all(phase_of(move.group) == "hold" for move in due):
            cap = max(rank for move in due for rank in move.group["ranks"])
            return max(last, min(2 * last, cap))
        return 2 * last

    def _rates(self, moves: list["_Move"]) -> list[Tensor]:
        """The step sizes of the layers of every bucket, (n,) float64 each."""
        rates = [
            move.point.sigma.new_full((len(move.live),), move.group["lr"], dtype=torch.float64)
            for move in moves
        ]
        if not moves or moves[0].group["moments"] != "adaptive":
            return rates
        forces = [move.group["unit"] * norm(*move.M, move.point.U).double() for move in moves]
        device = forces[0].device  # layers may lie on several
        live = torch.tensor([live for move in moves for live in move.live], device=device)
        shares = method.shares(torch.cat([force.to(device) for force in forces]), live)
        for rate, share, move in zip(rates, shares.split([*map(len, rates)]), moves, strict=True):
            used = _filled(move.point.V).sum(-1).clamp(min=1)  # directions, probes included
            rate *= move.group["unit"] * (REFERENCE_RANK / used.double()).sqrt()
            rate *= share.to(rate.device)
        return rates

    def _ahead(self, move: "_Move") -> method.Momentum:
        """Nesterov's look ahead: the gradient + b M = (1 + b) M - b M_before, for M = b M_before + G."""
        before, beta = _memory(move.group, self.state[move.group["params"][0]])
        parts = ((1 + beta) * now - beta * old for now, old in zip(move.M, before, strict=True))
        return method.Momentum(*parts)

    def _judged(self, moves: list["_Move"]) -> list["_Move"]:
        """Cut every bucket whose cycle says so, by tail and then by the budget over all layers."""
        if not all(phase_of(m.group) == "judge" and m.group["lr"] != 0 for m in moves):
            return moves
        # a layer without a gradient in this step is judged as it stands
        due = [move.standing() for move in moves]
        settings = self._geometric()[0]
        ranks = settled_ranks(
            [sigma for move in due for sigma in move.new.sigma.double().cpu()],
            [move.group["cost"] for move in due for _ in move.live],
            settings["tail"],
            settings["budget"],
            self._worth(due) if by_gain(settings) else None,
        )
        judged = []
        for move in due:
            settle = move.group["settle_after"]
            move.group["settled"] = settle is not None and move.group["steps"] >= settle
            move.group["ranks"], ranks = ranks[: len(move.live)], ranks[len(move.live) :]
            kept = torch.tensor(move.group["ranks"], device=move.new.sigma.device)
            new, carried = method.cut(move.new, move.carried, kept)
            live = [True] * len(move.live)
            judged.append(move._replace(new=new, carried=carried, live=live, written=True))
        return judged

    def _worth(self, due: list["_Move"]) -> list[Tensor]:
        """What the directions of all layers have gained since the last judgement; counted anew."""
        gains = [self.state[move.group["params"][0]]["gain"] for move in due]
        worth = [row for gain in gains for row in gain.double().cpu()]
        for gain in gains:
            gain.zero_()
        return worth

    # ---- writing -------------------------------------------------------------------------------

    def _commit(self, move: "_Move") -> None:
        """Store the new masters and momentum; write A and B unless nothing moved."""
        group, params = move.group, move.group["params"]
        state = self.state[params[0]]
        new, carried = move.new, move.carried
        if move.written and phase_of({**group, "steps": group["steps"] + 1}) == "grow":
            omega, slot = new_probes(new.U, new.V, group["layers"], group["steps"])
            new = new._replace(V=new.V + omega * slot)
            U, _, V = move.point
            along, _ = transport(*move.M, U, V, U[..., :0], omega)
            carried = carried._replace(K=carried.K + along * slot)
        fresh = new._asdict() | (carried._asdict() if "K" in state else {})
        state.update({key: _where(move.live, fresh[key], state[key]) for key in fresh})
        if not move.written:
            return
        settled = torch.tensor(group["ranks"], device=new.sigma.device)
        A, B = to_pair(
            state["U"], state["sigma"], state["V"], scales_of(group, state["sigma"]), settled
        )
        rows, columns = A.unbind(), B.unbind()
        targets, sources = [], []
        for i, (a, b) in enumerate(pairs_of(params)):
            if move.live[i]:
                targets += [a, b]
                sources += [rows[i].view(a.shape), columns[i].view(b.shape)]
        write(targets, sources)
        if all(move.live):
            self._seen[move.place] = fingerprints(params)
        else:
            self._seen.pop(move.place, None)

    # ---- state ---------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; every tensor keeps the dtype it was saved in (masters stay float32).

        Raises:
            StateError: the state is of other layers or shapes, or not whole; nothing is changed.
        """
        refuse_other_state(self.param_groups, state_dict)
        load_keeping_dtypes(self, super().load_state_dict, state_dict)
        self._seen = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seen: dict[int, list[tuple[int, int]]] = {}

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
            self._seen = {}


class _Move(NamedTuple):
    """A bucket on its way through one step."""

    place: int
    group: dict[str, Any]
    live: list[bool]
    point: method.Point
    M: method.Momentum
    new: method.Point
    carried: method.Momentum
    written: bool

    def standing(self) -> "_Move":
        """The same, where the layers without a gradient stay at their old point."""
        new = (_where(self.live, a, b) for a, b in zip(self.new, self.point, strict=True))
        carried = (_where(self.live, a, b) for a, b in zip(self.carried, self.M, strict=True))
        return self._replace(new=method.Point(*new), carried=method.Momentum(*carried))


def _memory(group: dict[str, Any], state: dict[str, Any]) -> tuple[method.Momentum, float]:
    """The momentum of the steps before, and its factor; with none, anything and zero."""
    if group["moments"] == "none":
        return method.Momentum(state["U"], state["V"]), 0.0
    return method.Momentum(state["K"], state["L"]), group["momentum"]


def _filled(basis: Tensor) -> Tensor:
    """Which columns (n, r) of a basis are not zero; a norm is 12 times as fast as `any`."""
    return torch.linalg.vector_norm(basis, dim=-2) > 0


def _where(live: list[bool], new: Tensor, old: Tensor) -> Tensor:
    """Rows of the new tensor for the layers that are live, of the old one for the others."""
    if all(live):
        return new
    mask = torch.tensor(live, device=new.device).view(-1, *[1] * (new.dim() - 1))
    return torch.where(mask, new, old)


def _choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SettingError(f"GeoLoRA: `{name}` must be one of {choices}; got {value!r}.")


def _demand(name: str, value: object, met: bool, condition: str) -> None:
    if not met:
        raise SettingError(f"GeoLoRA: `{name}` must be {condition}; got {value!r}.")
