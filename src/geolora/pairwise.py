"""What optimizers share that train LoRA's factors as they are (`relatives.py`): groups, skipped steps, averages.

All else that is trainable goes to AdamW. Pairs are found by position in the param groups, [A1, B1, A2, B2, …],
one group per shape, so what swaps the Parameter objects of a group (FSDP2) is followed.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from geolora.buckets import (
    by_shape,
    load_keeping_dtypes,
    not_finite,
    stacked_gradients,
)
from geolora.errors import SettingError, SetupError, UnpairedParametersWarning, at_most_three
from geolora.finite import to_be_skipped, total
from geolora.pairs import Pair, refuse_frozen, unpaired_lora_layers
from geolora.rest import SETTINGS, adamw_step, rest_groups


class Pairwise(torch.optim.Optimizer):
    """One group per bucket of pairs of equal shape, one for the rest; steps skipped where not finite."""

    def __init__(
        self,
        model: nn.Module,
        pairs: list[Pair],
        own: dict[str, Any],
        rest_lr: float,
        adapter_name: str | None,
    ) -> None:
        who = type(self).__name__
        for name, value in (("lr", own["lr"]), ("rest_lr", rest_lr)):
            self._demand(name, value, value >= 0 and math.isfinite(value), "a number >= 0")
        self._demand("eps", own["eps"], own["eps"] > 0, "a number > 0")
        good = all(0 <= beta < 1 for beta in own["betas"])
        self._demand("betas", own["betas"], good, "two numbers in [0, 1)")
        refuse_frozen(pairs)
        groups: list[dict[str, Any]] = [
            {
                "kind": "pairs",
                "params": [p for pair in bucket for p in (pair.A, pair.B)],
                "layers": [pair.name for pair in bucket],
                "scales": [pair.scale for pair in bucket],
                "experts": bucket[0].experts,
                "skipped": 0,
                "counts": [0] * len(bucket),
                **own,
            }
            for bucket in by_shape(pairs)
        ]
        groups += rest_groups(model, groups, rest_lr)
        if unpaired := unpaired_lora_layers(model, adapter_name):
            warnings.warn(
                f"{who}: LoRA on embeddings is trained by AdamW: {at_most_three(unpaired)}.",
                UnpairedParametersWarning,
                stacklevel=3,
            )
        super().__init__(groups, {"lr": own["lr"], "rest_lr": rest_lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; one with a gradient that is not finite is skipped as a whole."""
        who = type(self).__name__
        if closure is not None:
            raise SetupError(
                f"{who}.step: closures are not supported. Compute the loss and call backward() "
                "before step()."
            )
        due = [g for g in self.param_groups if any(p.grad is not None for p in g["params"])]
        paired = [g for g in due if g["kind"] == "pairs"]
        rest = [g for g in due if g["kind"] == "rest"]
        grads = [stacked_gradients(g["params"], _width(g)) for g in paired]
        totals = [total(stack) for both in grads for stack in both]
        totals += [total(p.grad) for g in rest for p in g["params"] if p.grad is not None]
        if to_be_skipped(who, self.param_groups[0], totals, lambda: not_finite(paired)):
            return
        for group in paired:
            self._refuse(group)
        for group, stacks in zip(paired, grads, strict=True):
            self._advance(group, *stacks)
        for group in rest:
            adamw_step(group, self.state)

    def _advance(self, group: dict[str, Any], on_A: Tensor, on_B: Tensor) -> None:
        """One step of a bucket, of which one pair at least has a gradient.

        Args:
            on_A, on_B: gradients (n, r, d_in) and (n, d_out, r), float32 or wider, zero where there is none.
        """
        raise NotImplementedError

    def _refuse(self, group: dict[str, Any]) -> None:
        """Raise for pairs that this method cannot go on from, before anything has moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state; every tensor keeps the dtype it was saved in."""
        load_keeping_dtypes(self, super().load_state_dict, state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters for AdamW; pairs are found when the optimizer is built, not here."""
        if "kind" not in param_group:
            param_group = {**SETTINGS, "lr": self.defaults["rest_lr"], **param_group}
        super().add_param_group(param_group)

    def _demand(self, name: str, value: object, met: bool, condition: str) -> None:
        if not met:
            raise SettingError(
                f"{type(self).__name__}: `{name}` must be {condition}; got {value!r}."
            )


def _width(group: dict[str, Any]) -> torch.dtype:
    """What a bucket is computed in: float32, or the wider dtype of its factors."""
    return torch.promote_types(group["params"][0].dtype, torch.float32)


def stacked(group: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A (n, r, d_in) and B (n, d_out, r) of a bucket."""
    A, B = (torch.stack([p.flatten(1) for p in group["params"][side::2]]) for side in (0, 1))
    return A.to(_width(group)), B.to(_width(group))


def adam(
    state: dict[str, Any],
    grad: Tensor,
    group: dict[str, Any],
    live: list[bool],
    keys: tuple[str, str] = ("exp_avg", "exp_avg_sq"),
) -> Tensor:
    """Adam's direction from the two moments, which move where there is a gradient; zeros at first.

    Args:
        state: holds the moments, like grad, and `count` (n,) as `counted` left it.
        grad: (n, ...). live: which pairs have a gradient. keys: names of the moments.
    """
    mean, square = (state.setdefault(key, torch.zeros_like(grad)) for key in keys)
    first, second = group["betas"]
    move_average(mean, grad, first, live)
    move_average(square, grad.square(), second, live)
    bias = unbiased(state, second, grad).sqrt_()
    root = torch.sqrt(square).div_(bias).add_(group["eps"])
    return torch.div(mean, root, out=root).div_(unbiased(state, first, grad))


def adamw_of_stacks(
    group: dict[str, Any],
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    live: list[bool],
) -> None:
    """torch's AdamW on stacks (n, ...), in place, for the pairs that have a gradient.

    `counts` of the group are the steps that every pair has taken. As long as they are all the same, a stack is
    one tensor for torch; else every pair of it is.
    """
    before = group["counts"]
    group["counts"] = [count + on for count, on in zip(before, live, strict=True)]
    rows: list[Any] = [slice(None)]
    if not all(live) or len(set(before)) > 1:
        rows = [i for i, on in enumerate(live) if on]

    def parts(stacks: Sequence[Tensor]) -> list[Tensor]:
        return [stack[row] for stack in stacks for row in rows]

    device = grads[0].device
    counts = [float(before[0 if isinstance(row, slice) else row]) for row in rows] * len(values)
    adamw(
        parts(values),
        parts(grads),
        parts(means),
        parts(squares),
        [],
        [torch.tensor(count, device=device) for count in counts],
        fused=device.type in ("cpu", "cuda"),
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def counted(state: dict[str, Any], live: list[bool], like: Tensor) -> None:
    """Count a step for the pairs that have a gradient: `count` (n,)."""
    count = state.setdefault("count", like.new_zeros(len(live)))
    count += 1 if all(live) else like.new_tensor(live)


def unbiased(state: dict[str, Any], beta: float, like: Tensor) -> Tensor:
    """1 - beta^count of every pair, to divide like (n, ...) by; 1 before its first gradient."""
    share = (1 - beta ** state["count"]).to(like)
    return torch.where(share > 0, share, 1.0).view(-1, *[1] * (like.dim() - 1))


def move_average(average: Tensor, now: Tensor, beta: float, live: list[bool]) -> None:
    """average <- beta average + (1 - beta) now, in place, for the pairs that have a gradient."""
    if all(live):
        average.lerp_(now, 1 - beta)
        return
    for mine, theirs, moves in zip(average, now, live, strict=True):
        if moves:
            mine.lerp_(theirs, 1 - beta)


def write_back(params: list[Tensor], values: Tensor, live: list[bool]) -> None:
    """Write values (n, ...) into the parameters that have a gradient, in their dtype and shape."""
    kept = [
        (p, value.view(p.shape))
        for p, value, moves in zip(params, values, live, strict=True)
        if moves
    ]
    targets, sources = ([both[side] for both in kept] for side in (0, 1))
    torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def live_pairs(pairs: list[tuple[Tensor, Tensor]]) -> list[bool]:
    """Which pairs have a gradient."""
    return [any(p.grad is not None for p in pair) for pair in pairs]
