"""What optimizers share that train LoRA's factors as they are: groups, skipped steps, averages.

All else that is trainable goes to AdamW. Pairs are found by position in the param groups, [A1, B1, A2, B2, …],
one group per shape, so what swaps the Parameter objects of a group (FSDP2) is followed.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from geolora.errors import SettingError, SetupError, UnpairedParametersWarning, at_most_three
from geolora.optim.adamw import SETTINGS, adamw_settings, adamw_step, rest_groups
from geolora.optim.buckets import (
    by_shape,
    load_keeping_dtypes,
    not_finite,
    pairs_of,
    stacked_gradients,
)
from geolora.optim.nonfinite import to_be_skipped, total
from geolora.pairs.find import Pair, refuse_frozen, refuse_unreachable, unpaired_lora_layers
from geolora.pairs.sharded import is_sharded


class Pairwise(torch.optim.Optimizer, ABC):
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
        for group in due:
            if group["kind"] == "pairs" and is_sharded(group["params"][0]):
                refuse_unreachable(group["layers"][0], *group["params"][:2])
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
            live = [any(p.grad is not None for p in pair) for pair in pairs_of(group["params"])]
            group["counts"] = [count + on for count, on in zip(group["counts"], live, strict=True)]
            self._advance(group, *stacks, live)
        for group in rest:
            adamw_step(group, self.state)

    @abstractmethod
    def _advance(self, group: dict[str, Any], on_A: Tensor, on_B: Tensor, live: list[bool]) -> None:
        """One step of a bucket, of which one pair at least has a gradient.

        Args:
            group: its `counts` are the steps with a gradient that every pair has had, this one included.
            on_A, on_B: gradients (n, r, d_in) and (n, d_out, r), float32 or wider, zero where there is none.
            live: which pairs have a gradient.
        """

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


def adam(state: dict[str, Any], grad: Tensor, group: dict[str, Any], live: list[bool]) -> Tensor:
    """Adam's direction from `exp_avg` and `exp_avg_sq`, which move where there is a gradient.

    Args:
        state: holds the two moments, like grad (n, ...); made here. live: which pairs have a gradient.
    """
    moments(state, ("exp_avg", "exp_avg_sq"), (grad, grad))
    first, second = group["betas"]
    move_average(state["exp_avg"], grad, first, live)
    move_average(state["exp_avg_sq"], grad.square(), second, live)
    root = (state["exp_avg_sq"] / unbiased(group, second, grad)).sqrt_().add_(group["eps"])
    return state["exp_avg"] / unbiased(group, first, grad) / root


def moments(state: dict[str, Any], keys: Sequence[str], like: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of a state, zeros at first."""
    for key, tensor in zip(keys, like, strict=True):
        if key not in state:
            state[key] = torch.zeros_like(tensor)
    return [state[key] for key in keys]


def unbiased(group: dict[str, Any], beta: float, like: Tensor) -> Tensor:
    """1 - beta^count of every pair, to divide like (n, ...) by; 1 before its first gradient."""
    shares = [1 - beta**count if count else 1.0 for count in group["counts"]]
    return like.new_tensor(shares).view(-1, *[1] * (like.dim() - 1))


def adamw_of_stacks(
    group: dict[str, Any],
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    live: list[bool],
) -> None:
    """torch's AdamW on stacks (n, ...), in place, for the pairs that have a gradient.

    As long as all pairs have had as many, a stack is one tensor for torch; else every pair of it is.
    """
    rows: list[Any] = [slice(None)]
    if len(set(group["counts"])) > 1 or not all(live):
        rows = [i for i, on in enumerate(live) if on]
    counts = [group["counts"][0 if isinstance(row, slice) else row] - 1 for row in rows]

    def parts(stacks: Sequence[Tensor]) -> list[Tensor]:
        return [stack[row] for stack in stacks for row in rows]

    device = grads[0].device
    adamw(
        parts(values),
        parts(grads),
        parts(means),
        parts(squares),
        [],
        [torch.tensor(n, dtype=torch.float32, device=device) for _ in values for n in counts],
        fused=device.type in ("cpu", "cuda"),
        **adamw_settings(group),
    )


def move_average(average: Tensor, now: Tensor, beta: float, live: list[bool]) -> None:
    """average <- beta average + (1 - beta) now, in place, for the pairs that have a gradient."""
    if all(live):
        average.lerp_(now, 1 - beta)
        return
    for mine, theirs, moves in zip(average, now, live, strict=True):
        if moves:
            mine.lerp_(theirs, 1 - beta)


def write_back(params: list[Tensor], values: Tensor) -> None:
    """Write values (n, ...) into the parameters that have a gradient, in their dtype and shape."""
    kept = [(p, v.view(p.shape)) for p, v in zip(params, values, strict=True) if p.grad is not None]
    if kept:
        targets, sources = ([both[side] for both in kept] for side in (0, 1))
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
