"""LoRA-GA's start: half of every pair's slots along the gradient, the other half takes their product away again.

The mathematics: `methods/lora_ga.py`. How the gradient is seen: `gradient_pass.py`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import SettingError
from geolora.methods.lora_ga import start
from geolora.pairs.find import find_pairs
from geolora.starts.gradient_pass import Loss
from geolora.starts.gradient_state import PASSES, TOLERANCE, GradientSource, GradientStart


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

    The first half of the slots of every pair is trained. The second half holds minus the product of the first, so
    that W = 0 at the start, and is frozen: its gradients are made zero. The adapter is saved and loaded like any
    other. For optimizers that leave alone what has no gradient, slot by slot: AdamW or
    SGD without weight decay; not `GeoLoRA`, `RiemannianAdamW` or `LoRAPro`. Hooks keep the gradients zero; a
    copy, a pickle, a checkpoint or FSDP do not take them along: call `keep_second_half(model)` there.

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
    source = GradientSource(
        model, batches, loss_fn, adapter_name, state, width, passes, tolerance, fresh_batches
    )
    pairs = source.fresh_pairs()
    for pair in pairs:
        if pair.r % 2:
            raise SettingError(
                f"initialize_lora_ga: the rank must be even, twice what is trained; got {pair.r} in "
                f"`{pair.name}`."
            )
    gradients = source.gradients(pairs)
    for pair in pairs:
        if pair.name not in gradients.untouched:
            U, _, V = gradients.triplets[pair.name]
            pair.set_factors(*start(U, V, gamma))
    keep_second_half(model, adapter_name)
    return GradientStart(0.0, gradients.missing, gradients.untouched)


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
