"""LoRA-One's start: every pair at the best rank-r part of one step along -G, its length given or searched for.

    model = get_peft_model(base, LoraConfig(...))
    geolora.initialize_lora_one(model, batches)

The mathematics: `methods/lora_one.py`. How the gradient is seen: `gradient_pass.py`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.kernels.sketch import Triplets
from geolora.kernels.truncate import settled_ranks
from geolora.methods.lora_one import start
from geolora.pairs.find import Pair, check_budget
from geolora.pairs.point import to_pair
from geolora.starts.gradient_pass import Loss
from geolora.starts.gradient_state import PASSES, TOLERANCE, GradientSource, GradientStart
from geolora.starts.step_length import check_norm, write_start


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
    source = GradientSource(
        model, batches, loss_fn, adapter_name, state, width, passes, tolerance, fresh_batches
    )
    pairs = source.fresh_pairs()
    check_budget([pair.cost for pair in pairs], budget)
    gradients = source.gradients(pairs)
    ranks = _start_ranks(pairs, gradients.triplets, budget)

    def write_at(norm: float) -> None:
        for pair, rank in zip(pairs, ranks, strict=True):
            if pair.name not in gradients.untouched:
                _write_pair(pair, gradients.triplets[pair.name], norm, rank)

    length = write_start(model, pairs, source.batches, loss_fn, norm, write_at)
    return GradientStart(length.norm, gradients.missing, gradients.untouched, *length.losses)


def _start_ranks(pairs: list[Pair], triplets: dict[str, Triplets], budget: int | None) -> list[int]:
    """How many slots of each pair to start with: all, or what the budget gives it.

    A direction is worth what the loss falls along it to first order: sigma times the length of a step, which in
    the unit of `GeoLoRA`'s lr is proportional to sqrt(max(d_out, d_in)) within a model.
    """
    if budget is None:
        return [pair.r for pair in pairs]
    sigmas = [triplets[pair.name].sigma for pair in pairs]
    costs = [pair.cost for pair in pairs]
    lengths = [math.sqrt(max(pair.d_in, pair.d_out)) for pair in pairs]
    worth = [length * sigma for length, sigma in zip(lengths, sigmas, strict=True)]
    return settled_ranks(sigmas, costs, 0.0, budget, worth)


def _write_pair(pair: Pair, triplets: Triplets, norm: float, rank: int) -> None:
    """Write the start into a pair. Slots within the rank that have no gradient become probes, to learn later."""
    U, sigma, V = start(*triplets, norm)
    A, B = to_pair(U, sigma, V, torch.tensor(pair.scale), torch.tensor(pair.r))
    kept = torch.arange(pair.r) < rank
    pair.set_factors(A * kept.unsqueeze(-1), B * (kept & (sigma > 0)))
