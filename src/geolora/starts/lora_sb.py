"""LoRA-SB's start: bases from the gradient, which stay as they are, and LoRA-One's W between them.

The mathematics: `methods/lora_sb.py`. How the gradient is seen: `gradient_pass.py`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from geolora.methods import lora_one, lora_sb
from geolora.starts.gradient_pass import Loss
from geolora.starts.gradient_state import PASSES, TOLERANCE, GradientSource, GradientStart
from geolora.starts.step_length import check_norm, write_start


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
    source = GradientSource(
        model, batches, loss_fn, adapter_name, state, width, passes, tolerance, fresh_batches
    )
    pairs = source.fresh_pairs()
    gradients = source.gradients(pairs)

    def write_at(norm: float) -> None:
        for pair in pairs:
            if pair.name not in gradients.untouched:
                point = lora_one.start(*gradients.triplets[pair.name], norm)
                pair.set_factors(*lora_sb.start(*point, pair.scale))

    length = write_start(model, pairs, source.batches, loss_fn, norm, write_at)
    return GradientStart(length.norm, gradients.missing, gradients.untouched, *length.losses)
