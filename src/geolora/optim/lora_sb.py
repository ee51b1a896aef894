"""`LoRASB`; the mathematics is in `methods/lora_sb.py`."""

from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import SetupError
from geolora.methods import lora_sb
from geolora.optim.adamw import adam_direction
from geolora.optim.base import BucketwiseOptimizer
from geolora.optim.buckets import scales_of, stacked_factors
from geolora.optim.saved_state import Shapes
from geolora.pairs.find import Pair, find_pairs
from geolora.pairs.sharded import gathered, write_factors


class LoRASB(BucketwiseOptimizer):
    """LoRA-SB: Adam on the r x r cores R of W = U R V^T; the bases stay those of the start.

    A = V^T is never written, B is kept at U R / s. Call `initialize_lora_sb` first.

    Args:
        model: a PeftModel after `initialize_lora_sb`.
        lr: Adam's step size for the entries of R, in units of W.
        rest_lr: AdamW's step size for everything else that is trainable.
        betas, eps: Adam's.
        adapter_name: which adapter of the model; None for the active one.

    Raises:
        GeoloraError: as `RiemannianAdamW`; SetupError also in the first step where B is zero or the rows of A are not orthonormal.

    Source: arXiv 2411.19557.

    Examples:
        >>> geolora.initialize_lora_sb(model, batches)      # doctest: +SKIP
        >>> optimizer = LoRASB(model)                       # doctest: +SKIP
    """

    method = "lora-sb"
    keeps = ("experts", "counts", "steps")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        *,
        rest_lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adapter_name: str | None = None,
    ) -> None:
        self._demand_adams(betas, eps)
        settings = {"lr": lr, "betas": betas, "eps": eps}
        pairs = find_pairs(model, adapter_name, with_sharded=True)
        super().__init__(model, pairs, settings, rest_lr, adapter_name)

    def _own(
        self, bucket: list[Pair], pairs: list[Pair], settings: dict[str, Any]
    ) -> dict[str, Any]:
        return {**super()._own(bucket, pairs, settings), "steps": 0}

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:  # noqa: ARG002
        n, (d_out, r) = len(group["layers"]), group["params"][1].flatten(1).shape
        return {"U": (n, d_out, r), **dict.fromkeys(("R", "exp_avg", "exp_avg_sq"), (n, r, r))}

    def _advance(
        self,
        group: dict[str, Any],
        grad_A: Tensor,  # noqa: ARG002
        grad_B: Tensor,
        live: list[bool],
    ) -> None:
        state, (A, B) = self.state[group["params"][0]], stacked_factors(group)
        scale = scales_of(group, A)
        s = scale.view(-1, 1, 1)
        factors = group["params"][1::2]
        self._read(state, group["counts"], factors[0].dtype, B, s)
        live = [
            on and factor.grad is not None and bool(b.any())
            for on, factor, b in zip(live, factors, B, strict=True)
        ]
        grad = lora_sb.core_gradient(state["U"], grad_B, scale)
        group["steps"] += 1
        move = group["lr"] * adam_direction(state, grad, group, live)
        if group["lr"] == 0:
            return
        moved = [i for i, on in enumerate(live) if on]
        for i in moved:
            state["R"][i] -= move[i]
        if moved:
            write_factors(
                [factors[i] for i in moved],
                [state["U"][i] @ state["R"][i] / s[i] for i in moved],
            )

    @staticmethod
    def _read(
        state: dict[str, Any], counts: list[int], dtype: torch.dtype, B: Tensor, s: Tensor
    ) -> None:
        """U and R of B = U R / s, where B is not what was written (a start, a reload); moments anew there.

        Args:
            dtype: that of the factors, to whose rounding B is what was written.
        """
        if not state:
            for key, shape in (("U", B.shape), ("R", (len(B), *B.shape[-1:] * 2))):
                state[key] = B.new_zeros(shape)
        close = 100 * torch.finfo(dtype).eps
        apart = torch.linalg.matrix_norm(s * B - state["U"] @ state["R"])
        for i in (apart > close * torch.linalg.matrix_norm(s * B)).nonzero().flatten().tolist():
            U, values, Vt = torch.linalg.svd(s[i] * B[i], full_matrices=False)
            state["U"][i], state["R"][i] = U, values.unsqueeze(-1) * Vt
            counts[i] = 1
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key][i] = 0

    def _refuse(self, group: dict[str, Any]) -> None:
        if group["steps"]:
            return
        pairs = zip(group["layers"], *stacked_factors(group), strict=True)
        for name, rows, columns in pairs:
            gram = rows @ rows.mT - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
            if columns.any() and gram.abs().max() > 0.05:  # bf16 rows are within 0.01
                raise SetupError(
                    f"LoRASB: the rows of A of `{name}` must be orthonormal; they are not. Call "
                    "geolora.initialize_lora_sb(model, batches) first."
                )
        factors = [p for g in self._paired() for p in g["params"][1::2]]
        if not any(bool(gathered(b).any()) for b in factors):
            raise SetupError(
                "LoRASB: the pairs must have bases; B is zero in all of them. Call "
                "geolora.initialize_lora_sb(model, batches) first."
            )
