"""`RACLoRA`; the mathematics is in `methods/rac_lora.py`."""

from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import SetupError
from geolora.methods import rac_lora
from geolora.optim.adamw import SETTINGS, adamw_step
from geolora.optim.base import BucketwiseOptimizer
from geolora.optim.buckets import pairs_of
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import find_pairs
from geolora.pairs.sharded import gathered, is_sharded, write_factors


class RACLoRA(BucketwiseOptimizer):
    """RAC-LoRA: train the columns of B block after block, against random rows of A that stay as they are.

    Over the usual start (B = 0, A random). Block t trains its slots from zero, with AdamW started anew; those
    of earlier blocks are frozen, and their sum is an ordinary adapter: `geolora.export(rank=)` cuts it.

    Args:
        model: a PeftModel, or any module with LoRA layers (see `pairs/find.py`); r slots are split over the blocks.
        steps_per_block: optimizer steps a block is trained for; the last goes on for ever. 1 or more.
        blocks: length of the chain, 1 to r.
        lr: AdamW's step size for the columns of B.
        rest_lr: that for everything else that is trainable.
        betas, eps: AdamW's.
        adapter_name: which adapter of the model; None for the active one.

    Raises:
        GeoloraError: as `RiemannianAdamW`; SetupError also in the first step where B is not zero.

    Source: arXiv 2410.08305.

    Examples:
        >>> optimizer = RACLoRA(model, steps_per_block=500) # doctest: +SKIP
    """

    method = "rac-lora"
    keeps = ("experts", "counts", "steps")
    holder = 1  # every B has its own, as AdamW keeps them

    def __init__(
        self,
        model: nn.Module,
        steps_per_block: int,
        blocks: int = 4,
        lr: float = 1e-3,
        *,
        rest_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapter_name: str | None = None,
    ) -> None:
        self._demand_adams(betas, eps)
        pairs = find_pairs(model, adapter_name, with_sharded=True)
        most = min(pair.r for pair in pairs)
        self._whole("steps_per_block", steps_per_block, 1, "1 or more, a whole number")
        self._whole("blocks", blocks, 1, f"from 1 to the rank, {most}")
        self._demand("blocks", blocks, blocks <= most, f"from 1 to the rank, {most}")
        settings = {
            **SETTINGS,
            "kind": "pairs",
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "steps": 0,
            "steps_per_block": steps_per_block,
            "blocks": blocks,
        }
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:  # noqa: ARG002
        return dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(group["params"][1].shape))

    def _advance(
        self,
        group: dict[str, Any],
        grad_A: Tensor,  # noqa: ARG002
        grad_B: Tensor,
        live: list[bool],  # noqa: ARG002
    ) -> None:
        count, blocks = group["steps_per_block"], group["blocks"]
        block = rac_lora.block_of(group["steps"], count, blocks)
        if group["steps"] and block != rac_lora.block_of(group["steps"] - 1, count, blocks):
            for p in group["params"]:
                self.state.pop(p, None)
        group["steps"] += 1
        first, last = rac_lora.slots_of(block, blocks, grad_B.shape[-1])
        masked = torch.zeros_like(grad_B)
        masked[..., first:last] = grad_B[..., first:last]
        trained = group["params"][1::2]
        # where they are not sharded these are the factors themselves
        values = [gathered(B) for B in trained if B.grad is not None]
        grads = [
            grad.to(B.dtype).reshape(B.shape)
            for B, grad in zip(trained, masked, strict=True)
            if B.grad is not None
        ]
        adamw_step({**group, "params": trained}, self.state, values, grads)
        if is_sharded(trained[0]):
            write_factors([B for B in trained if B.grad is not None], values)

    def _refuse(self, group: dict[str, Any]) -> None:
        for name, (_, B) in zip(group["layers"], pairs_of(group["params"]), strict=True):
            if not group["steps"] and gathered(B).any():
                raise SetupError(
                    f"RACLoRA: a chain starts from B = 0; that of `{name}` is not. Use LoRA's usual start."
                )
