"""Starts of an adapter from the model's own gradient, which is never formed.

    model = get_peft_model(base, LoraConfig(...))
    geolora.initialize_lora_one(model, batches)

How it is seen: `gradient_pass.py`. What is then written into the pairs: one file of `methods/` for each start.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geolora.adapters.read import read_tensors
from geolora.errors import GradientError, SettingError, SetupError, StateError
from geolora.kernels.sketch import Triplets, missing
from geolora.kernels.truncate import settled_ranks
from geolora.methods import lora_ga, lora_one, lora_sb
from geolora.pairs.find import (
    Pair,
    adapter_of,
    check_budget,
    factor_modules,
    find_pairs,
    refuse_frozen,
    refuse_unused,
)
from geolora.pairs.point import to_pair
from geolora.starts.gradient_pass import Loss, look_at
from geolora.starts.step_length import check_norm, sized

PASSES, TOLERANCE = 6, 0.1


@dataclass(frozen=True)
class GradientStart:
    """What a start did.

    Attributes:
        norm: ||W||_2 of every layer it started, in units of W.
        missing: {layer: estimated share, of the energy of the gradient's best rank-r part, not seen}.
        untouched: layers the loss does not depend on; they keep the start they had.
        loss_before, loss_after: means over the batches, where the norm was searched for.
    """

    norm: float
    missing: dict[str, float]
    untouched: list[str]
    loss_before: float | None = None
    loss_after: float | None = None


def initialize_lora_one(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    adapter_name: str | None = None,
    *,
    norm: float | None = None,
    budget: int | None = None,
    state: dict[str, Tensor] | str | Path | None = None,
    width: int | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
    fresh_batches: bool = False,
) -> GradientStart:
    """LoRA-One (arXiv 2502.01235): start every pair at the best rank-r part of one step along -G.

    Base weights are not touched: the adapter is saved and loaded like any other. Call it after
    get_peft_model, before the model is wrapped (DDP, FSDP) or trained; with several processes on all of
    them, each with its own batches.

    Args:
        model: a PeftModel with LoRA pairs whose B is zero.
        batches: what the gradient is a mean over: mappings for model(**batch).loss, or what loss_fn
            takes; moved to the model's device. Not needed with `state` and `norm`.
        loss_fn: (model, batch) -> scalar loss.
        adapter_name: which adapter; None for the active one.
        norm: ||W||_2 of every layer after the start, whatever LoRA's scale is; above 0. None for 0.05, halved for
            as long as that lowers the loss of the batches, eight times at most (three forward passes over
            them without gradients, one more for every halving). Some models need a quarter of it; larger ones lower
            the loss further on some tasks, and training then ends worse.
        budget: adapter parameters to start with, sum of rank * (d_in + d_out): directions are shared out
            over all layers by how fast the loss falls along them, per parameter. Slots that are left over
            are zero on both sides: `GeoLoRA` may fill them where its rank grows, AdamW never does.
        state: what `get_lora_one_state` returned, or a safetensors file of it, instead of the passes.
        width, passes, tolerance, fresh_batches: as in `get_lora_one_state`.

    Raises:
        SettingError: an argument out of its range, an unknown adapter. BudgetError: less than one
            direction per layer.
        PairingError: no pairs, or layers that cannot be treated (table in geolora.pairs.find).
        SetupError: a pair that is trained already (B is not zero), an adapter that is not in use.
        DataError: no batches, or one that gives no loss.
        GradientError: a loss or gradient that is not finite; no gradient in any layer.
        StateError: a state of another model. AdapterError: a file that cannot be read.
    """
    check_norm("initialize_lora_one", norm, batches)
    pairs = _fresh_pairs(model, adapter_of(model, adapter_name))
    check_budget(pairs, budget)
    batches = batches if batches is None or fresh_batches else list(batches)
    looking = _Looking(width, passes, tolerance, fresh_batches)
    found, unseen = _find(model, pairs, batches, loss_fn, adapter_name, state, looking)
    ranks = _ranks(pairs, found, budget)

    def write(norm: float) -> None:
        _write(pairs, found, norm, ranks)

    done = sized(model, pairs, batches, loss_fn, norm, write)
    return GradientStart(done.norm, unseen, _untouched(pairs, found), *done.losses)


def initialize_lora_ga(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    adapter_name: str | None = None,
    *,
    gamma: float = 16.0,
    state: dict[str, Tensor] | str | Path | None = None,
    width: int | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
    fresh_batches: bool = False,
) -> GradientStart:
    """LoRA-GA (arXiv 2407.05000) as its authors define it, without touching the base weights.

    Half of the slots of every pair are trained; the other half holds what takes their start away, so that the
    function is unchanged, and is kept as it is: their gradients are made zero. The adapter is saved
    and loaded like any other. For optimizers that leave alone what has no gradient, slot by slot: AdamW or
    SGD without weight decay; not `GeoLoRA`, `RiemannianAdamW` or `LoRAPro`. What keeps the gradients zero are
    hooks, which a copy, a pickle, a checkpoint or FSDP do not take along: call `keep_second_half(model)` there.

    Args:
        model: a PeftModel with LoRA pairs of even rank 2h, to train with rank h, whose B is zero.
        gamma: the factors are d_out^(1/4) / sqrt(gamma) long; above 0.
        batches, loss_fn, adapter_name, state: as in `initialize_lora_one`; the states are the same.
        width, passes, tolerance, fresh_batches: as in `get_lora_one_state`.

    Raises:
        GeoloraError: as `initialize_lora_one`; SettingError also for a rank that is odd.
    """
    if not (gamma > 0 and math.isfinite(gamma)):
        raise SettingError(f"initialize_lora_ga: `gamma` must be above 0; got {gamma}.")
    pairs = _fresh_pairs(model, adapter_of(model, adapter_name))
    for pair in pairs:
        if pair.r % 2:
            raise SettingError(
                f"initialize_lora_ga: the rank must be even, twice what is trained; got {pair.r} in "
                f"`{pair.name}`."
            )
    looking = _Looking(width, passes, tolerance, fresh_batches)
    found, unseen = _find(model, pairs, batches, loss_fn, adapter_name, state, looking)
    untouched = _untouched(pairs, found)
    with torch.no_grad():
        for pair in pairs:
            if pair.name not in untouched:
                A, B = lora_ga.start(found[pair.name].U, found[pair.name].V, gamma)
                pair.A.copy_(A.reshape(pair.A.shape))
                pair.B.copy_(B.reshape(pair.B.shape))
    keep_second_half(model, adapter_name)
    return GradientStart(0.0, unseen, untouched)


def initialize_lora_sb(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    adapter_name: str | None = None,
    *,
    norm: float | None = None,
    state: dict[str, Tensor] | str | Path | None = None,
    width: int | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
    fresh_batches: bool = False,
) -> GradientStart:
    """LoRA-SB's start (arXiv 2411.19557): bases from the gradient, for `LoRASB` to train what lies between.

    The same W as after `initialize_lora_one`, in a pair whose A has orthonormal rows. Layers that the loss
    does not depend on get no bases, and `LoRASB` leaves them alone.

    Args:
        model, batches, loss_fn, adapter_name, norm, state: as in `initialize_lora_one`.
        width, passes, tolerance, fresh_batches: as in `get_lora_one_state`.

    Raises:
        GeoloraError: as `initialize_lora_one`.
    """
    check_norm("initialize_lora_sb", norm, batches)
    pairs = _fresh_pairs(model, adapter_of(model, adapter_name))
    batches = batches if batches is None or fresh_batches else list(batches)
    looking = _Looking(width, passes, tolerance, fresh_batches)
    found, unseen = _find(model, pairs, batches, loss_fn, adapter_name, state, looking)
    untouched = _untouched(pairs, found)

    def write(norm: float) -> None:
        for pair in pairs:
            if pair.name not in untouched:
                point = lora_one.start(*found[pair.name], norm)
                A, B = lora_sb.start(*point, pair.scale)
                pair.A.copy_(A.reshape(pair.A.shape))
                pair.B.copy_(B.reshape(pair.B.shape))

    done = sized(model, pairs, batches, loss_fn, norm, write)
    return GradientStart(done.norm, unseen, untouched, *done.losses)


def keep_second_half(model: nn.Module, adapter_name: str | None = None) -> None:
    """Make the gradients of the second half of every pair's slots zero, from now on.

    Args:
        model: a PeftModel after `initialize_lora_ga`, or one that a checkpoint of it was loaded into.
        adapter_name: which adapter; None for the active one.

    Raises:
        GeoloraError: as `initialize_lora_ga`.
    """
    for pair in find_pairs(model, adapter_name):
        kept = torch.arange(pair.r) < pair.r // 2

        def on_A(grad: Tensor, kept: Tensor = kept) -> Tensor:
            return grad * kept.to(grad).view(-1, *[1] * (grad.dim() - 1))

        def on_B(grad: Tensor, kept: Tensor = kept) -> Tensor:
            return grad * kept.to(grad).view(1, -1, *[1] * (grad.dim() - 2))

        pair.A.register_hook(on_A)
        pair.B.register_hook(on_B)


def get_lora_one_state(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None = None,
    adapter_name: str | None = None,
    *,
    width: int | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
    fresh_batches: bool = False,
) -> dict[str, Tensor]:
    """The leading singular triplets of every pair's gradient: to be saved, and used again.

        save_file(geolora.get_lora_one_state(model, batches), "start.safetensors")

    Passes over the batches go on until no layer misses more than `tolerance` of the energy of its
    best rank-r part, by estimate, or until there were `passes`. Dropout is off, all else is as the
    model stands (train or eval mode). The model is left as it was, gradients included.

    Args:
        model, batches, loss_fn, adapter_name: as in `initialize_lora_one`.
        width: k, directions that are followed, the adapter's rank or more; None for twice the
            rank. A layer has at most min(d_out, d_in).
        passes: at most so many passes over the batches, 2 or more.
        tolerance: share of energy, in [0, 1); 0 makes all `passes`.
        fresh_batches: iterate over `batches` anew in every pass (a DataLoader that shuffles then
            gives others); else they are drawn once and kept. All `passes` are made then, and what is
            missing is not known (NaN). A start without a `norm` draws them once more, and keeps those.

    Returns:
        For every layer, float32 on the CPU: `NAME.U` (d_out, r), `NAME.sigma` (r,), `NAME.V` (d_in, r) of
        +G, and `NAME.missing` (1,), the estimate. sigma is zero where the loss does not depend on the layer.

    Raises:
        GeoloraError: as `initialize_lora_one`.
    """
    adapter = adapter_of(model, adapter_name)
    pairs = _fresh_pairs(model, adapter)
    least = max(pair.r for pair in pairs)
    if width is not None and width < least:
        raise SettingError(f"`width` must be the adapter's rank, {least}, or more; got {width}.")
    if passes < 2:
        raise SettingError(f"`passes` must be 2 or more; got {passes}.")
    if not 0 <= tolerance < 1:
        raise SettingError(f"`tolerance` must be in [0, 1); got {tolerance}.")
    if not fresh_batches:
        batches = list(batches)
    modules, enough = factor_modules(model, adapter), -1.0 if fresh_batches else tolerance
    seats = look_at(model, pairs, modules, batches, loss_fn, width, passes, enough)
    if not any(seat.energies[-1] > 0 for seat in seats):
        raise GradientError("the loss of `batches` must depend on a LoRA layer; it does on none.")
    state = {}
    for seat in seats:
        assert seat.seen is not None  # noqa: S101 (there was a pass)
        for key, value in seat.seen._asdict().items():
            state[f"{seat.pair.name}.{key}"] = value.cpu().contiguous()
        share = math.nan if fresh_batches else missing(seat.energies)
        state[f"{seat.pair.name}.missing"] = torch.tensor([share])
    return state


class _Looking(NamedTuple):
    """How the gradient is looked at: see `get_lora_one_state`."""

    width: int | None
    passes: int
    tolerance: float
    fresh_batches: bool


def _find(
    model: nn.Module,
    pairs: list[Pair],
    batches: Iterable[Any] | None,
    loss_fn: Loss | None,
    adapter_name: str | None,
    state: dict[str, Tensor] | str | Path | None,
    looking: _Looking,
) -> tuple[dict[str, Triplets], dict[str, float]]:
    """{layer: triplets} and {layer: estimate of what is missing}, from a state or by passes."""
    if state is None:
        if batches is None:
            raise SettingError("`batches` must be given, or a `state`.")
        state = get_lora_one_state(model, batches, loss_fn, adapter_name, **looking._asdict())
    return _of_state(state, pairs)


# ---- reading and writing -----------------------------------------------------------------------


def _fresh_pairs(model: nn.Module, adapter: str) -> list[Pair]:
    """The adapter's pairs; raises `SetupError` where one is trained already or not in use."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SetupError(
            "a start needs the model itself; got one in DistributedDataParallel. Call it before wrapping, "
            "on every process."
        )
    pairs = find_pairs(model, adapter)
    refuse_unused(model, adapter)
    refuse_frozen(pairs)
    for pair in pairs:
        if bool(pair.B.ne(0).any()):
            raise SetupError(
                f"a start needs a pair that is not trained yet; B of `{pair.name}` is not zero. Add a new "
                "adapter, with LoRA's usual start."
            )
    return pairs


def _untouched(pairs: list[Pair], found: dict[str, Triplets]) -> list[str]:
    """Layers the loss does not depend on."""
    return [pair.name for pair in pairs if not found[pair.name].sigma.any()]


def _of_state(
    state: dict[str, Tensor] | str | Path, pairs: list[Pair]
) -> tuple[dict[str, Triplets], dict[str, float]]:
    """{layer: triplets} and {layer: estimate}; raises `StateError` where layers or shapes differ."""
    if not isinstance(state, dict):
        state = read_tensors(Path(state))
    found, unseen = {}, {}
    for pair in pairs:
        parts = [state.get(f"{pair.name}.{key}") for key in (*Triplets._fields, "missing")]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        right = [(pair.d_out, pair.r), (pair.r,), (pair.d_in, pair.r), (1,)]
        if shapes != right:
            raise StateError(
                f"`state` must be of this model and rank; for `{pair.name}` it has "
                f"{shapes}, needed are {right}. Compute it again with get_lora_one_state."
            )
        U, sigma, V, share = (part for part in parts if part is not None)
        found[pair.name], unseen[pair.name] = Triplets(U, sigma, V), float(share)
    return found, unseen


def _ranks(pairs: list[Pair], found: dict[str, Triplets], budget: int | None) -> list[int]:
    """Slots to start with. The fall of the loss along a direction, for a step in the unit of `GeoLoRA`'s
    lr (proportional to sqrt(max(d_out, d_in)) within a model), is sigma times that unit.
    """
    if budget is None:
        return [pair.r for pair in pairs]
    sigmas = [found[pair.name].sigma for pair in pairs]
    costs = [pair.d_in + pair.d_out for pair in pairs]
    units = [math.sqrt(max(pair.d_in, pair.d_out)) for pair in pairs]
    worth = [unit * sigma for unit, sigma in zip(units, sigmas, strict=True)]
    return settled_ranks(sigmas, costs, 0.0, budget, worth)


@torch.no_grad()
def _write(pairs: list[Pair], found: dict[str, Triplets], norm: float, ranks: list[int]) -> None:
    """Write the start into the pairs; layers without a gradient keep theirs.

    Slots within the rank that have no gradient become probes, so that they can still learn.
    """
    for pair, rank in zip(pairs, ranks, strict=True):
        if not found[pair.name].sigma.any():
            continue
        U, sigma, V = lora_one.start(*found[pair.name], norm)
        A, B = to_pair(U, sigma, V, torch.tensor(pair.scale), torch.tensor(pair.r))
        kept = torch.arange(pair.r) < rank
        pair.A.copy_((A * kept.unsqueeze(-1)).reshape(pair.A.shape))
        pair.B.copy_((B * (kept & (sigma > 0))).reshape(pair.B.shape))
