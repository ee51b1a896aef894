"""Masters of a bucket: U, sigma, V, the turn and the momentum of its pairs in float32 or wider, and what A and B hold of them.

The stacked masters of a bucket are the state of its first parameter; the pairs are written from them. Where
somebody else has written A or B since (a reload, an initialiser, `prune`), they are read from the pairs again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geolora.kernels.tangent import transport
from geolora.optim.buckets import computed_in, pairs_of, scales_of
from geolora.optim.geolora_step.rank_cycle import by_gain
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import refuse_unreachable
from geolora.pairs.point import Gauge, balanced_gauge, read_pair, slot_lengths, slot_ranks
from geolora.pairs.sharded import gathered, is_sharded, local_shard


def master_shapes(group: dict[str, Any], settings: dict[str, Any]) -> Shapes:
    """Masters U (n, d_out, r), sigma (n, r), V (n, d_in, r), turn (n, r, r), momentum K, L like U, V, and gain (n, r)."""
    A, B = group["params"][:2]
    n, r, d_out, d_in = len(group["layers"]), A.shape[0], B.shape[0], A[0].numel()
    shapes: Shapes = {"U": (n, d_out, r), "sigma": (n, r), "V": (n, d_in, r), "turn": (n, r, r)}
    if settings["moments"] != "none":
        shapes |= {"K": (n, d_out, r), "L": (n, d_in, r)}
    if by_gain(settings):
        shapes["gain"] = (n, r)
    return shapes


class Masters:
    """The masters of one bucket, and what is known of its factors for as long as they are as we left them.

    Only the group and the state are saved; everything else is found again when needed.
    """

    def __init__(self, group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        self.group, self._states = group, states
        self._fingerprints: _Fingerprints | None = None
        """Fingerprints of the factors for which `_gauge` holds; None where that is not known."""
        self._gauge: Gauge | None = None
        self._constants: tuple[list[int], Tensor, Tensor] | None = None

    def are_of(self, group: dict[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether they are those of this group and state, and not of ones that have been replaced."""
        return self.group is group and self._states is states

    @property
    def state(self) -> dict[str, Any]:
        """U, sigma, V, turn, K, L, gain: the state of the first parameter; zeros before the first step."""
        A, *others = self.group["params"]
        state = self._states[A]
        if not state:
            dtype = computed_in(self.group)
            # torch.distributed.checkpoint demands a state of every parameter: the row it stands for
            for number, p in enumerate(others, 1):
                self._states[p]["row"] = number // 2
            shapes = master_shapes(self.group, self.group)
            shapes.pop("turn")
            for key, (n, *rest) in shapes.items():
                # like A: a direction is a row in memory
                zeros = torch.zeros((n, *rest[::-1]), dtype=dtype, device=A.device)
                state[key] = zeros.movedim(-1, 1)
        if "turn" not in state:  # nor has a state that 0.1.0 saved
            n, r = state["sigma"].shape
            state["turn"] = torch.eye(r).to(state["sigma"]).repeat(n, 1, 1)
        if "gain" not in state and by_gain(self.group):  # nor that without a budget
            state["gain"] = torch.zeros_like(state["sigma"])
        return state

    def constants(self) -> tuple[Tensor, Tensor]:
        """LoRA's s and the settled ranks (n,), as tensors while they stay the same."""
        ranks = self.group["ranks"]
        if self._constants is None or self._constants[0] != ranks:
            sigma = self.state["sigma"]
            settled = torch.tensor(ranks, device=sigma.device)
            self._constants = [*ranks], scales_of(self.group, sigma), settled
        return self._constants[1], self._constants[2]

    def gauge(self) -> tuple[Gauge, bool]:
        """How the factors lie in the slots, (n, r, r) each, and whether a pair was read again (its gauge is then any).

        Where A or B are no longer what we wrote, the masters of those pairs are read from them again and
        their momentum is carried over.
        """
        prints = _fingerprints(self.group["params"])
        if self._gauge is not None and prints.same(self._fingerprints):
            return self._gauge, False
        state = self.state
        scale, settled = self.constants()
        gauge = balanced_gauge(state["turn"], scale, *slot_lengths(state["sigma"], scale, settled))
        A, B = gauge.in_A.mT @ state["V"].mT, state["U"] @ gauge.in_B
        factors = [gathered(p) for p in self.group["params"]]
        stale = [
            i
            for i, (a, b) in enumerate(pairs_of(factors))
            if not (_as_written(a.flatten(1), A[i]) and _as_written(b.flatten(1), B[i]))
        ]
        if not stale:
            self.remember(gauge)
            return gauge, False
        for i in stale:
            pair = factors[2 * i], factors[2 * i + 1]
            refuse_unreachable(self.group["layers"][i], *pair)
            read = self._read(i, *(factor.flatten(1) for factor in pair))
            for field, value in zip(gauge, read, strict=True):
                field[i] = value.to(field.dtype)
        return gauge, True

    def _read(self, i: int, A: Tensor, B: Tensor) -> Gauge:
        """Read pair i from its factors; their gauge, (r, r)."""
        state, group = self.state, self.group
        reading = read_pair(A, B, group["scales"][i], group["start_rank"])
        old_U, old_V = state["U"][i].clone(), state["V"][i].clone()
        for key, value in (("U", reading.U), ("sigma", reading.sigma), ("V", reading.V)):
            state[key][i].copy_(value)
        active, trials = slot_ranks(A, B)
        probes = int(((reading.U != 0).any(0) | (reading.V != 0).any(0)).sum()) - active
        group["ranks"][i] = max(1, active - trials if active else probes)
        if "K" in state:
            state["K"][i], state["L"][i] = transport(
                state["K"][i], state["L"][i], old_U, old_V, state["U"][i], state["V"][i]
            )
        in_A, in_B = (A.double() @ reading.V).mT, reading.U.mT @ B.double()
        return Gauge(in_A, in_B, reading.right, reading.left)

    def remember(self, gauge: Gauge) -> None:
        """Remember that this is the gauge of the factors as they are now."""
        self._fingerprints, self._gauge = _fingerprints(self.group["params"]), gauge

    def forget_gauge(self) -> None:
        """Look at the factors again in the next step."""
        self._fingerprints = None


def _as_written(factor: Tensor, ours: Tensor) -> bool:
    """Whether a factor is what we wrote; a product computed again may round another way."""
    eps = torch.finfo(factor.dtype).eps + len(ours) * torch.finfo(ours.dtype).eps
    return bool(((factor.to(ours.dtype) - ours).abs() <= eps * ours.abs().amax()).all())


class _Fingerprints(NamedTuple):
    """What tells whether factors have been written or swapped by somebody else.

    A write counts up a version, but not one through `.data` (exponential moving averages do so): some entries
    of each factor are looked at too. Of sharded factors they are not, since all processes must decide alike.
    """

    versions: list[tuple[int, int]]
    entries: Tensor | None

    def same(self, other: "_Fingerprints | None") -> bool:
        if other is None or self.versions != other.versions:
            return False
        return self.entries is None or bool(
            other.entries is not None and torch.equal(self.entries, other.entries)
        )


ENTRIES = 16
"""Entries of a factor that are looked at."""


def _fingerprints(params: list[Tensor]) -> _Fingerprints:
    versions = [(p._version, local_shard(p).data_ptr()) for p in params]
    if any(map(is_sharded, params)):
        return _Fingerprints(versions, None)
    return _Fingerprints(versions, torch.cat([_some_of(p.detach()) for p in params]))


def _some_of(factor: Tensor) -> Tensor:
    """Entries at equal distances: a view where the factor is contiguous."""
    distance = max(1, factor.numel() // ENTRIES)
    count = min(ENTRIES, factor.numel())
    if not factor.is_contiguous():
        return factor.flatten()[::distance][:count]
    return factor.as_strided((count,), (distance,))
