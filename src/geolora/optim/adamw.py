"""AdamW: torch's, of everything that is no LoRA pair (heads, biases, embeddings), and of stacks of pairs.

In a stack (n, ...) a pair whose factors had no gradient waits: its moments and its count of steps stand still.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

SETTINGS = {"kind": "rest", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
"""What a param group of AdamW holds beside its parameters and its lr."""


def rest_groups(model: nn.Module, paired: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
    """One param group of all that is trainable in a model and not in the groups given; none if nothing is."""
    taken = {id(p) for group in paired for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    return [{**SETTINGS, "params": rest, "lr": lr}] if rest else []


def adamw_settings(group: dict[str, Any]) -> dict[str, Any]:
    """What torch's functional AdamW takes of a param group."""
    return {
        "amsgrad": False,
        "beta1": group["betas"][0],
        "beta2": group["betas"][1],
        "lr": group["lr"],
        "weight_decay": group["weight_decay"],
        "eps": group["eps"],
        "maximize": False,
    }


def adamw_step(
    group: dict[str, Any],
    state: dict[Tensor, dict[str, Any]],
    values: list[Tensor] | None = None,
    grads: list[Tensor] | None = None,
) -> None:
    """One step of AdamW for the parameters of a group that have a gradient; makes their state.

    Parameters narrower than float32 have float32 masters, `master` in their state.

    Args:
        values: tensors updated in place instead of the parameters. grads: used instead of their gradients;
            both in the parameters' order.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    values = params if values is None else values
    moved = [_master_of(state[p], value) for p, value in zip(params, values, strict=True)]
    grads = [p.grad for p in params] if grads is None else grads
    adamw(
        moved,
        [grad.to(master.dtype) for grad, master in zip(grads, moved, strict=True)],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        **adamw_settings(group),
    )
    for value, master in zip(values, moved, strict=True):
        if master is not value:
            value.copy_(master)


def _master_of(state: dict[str, Any], value: Tensor) -> Tensor:
    """What AdamW moves for a parameter: the value itself or, where that is narrower than float32, its master.

    In float16 AdamW's eps is zero and a head is NaN after one step; in bfloat16 most steps round to nothing.
    Where somebody else has written the value since, the master is that value.
    """
    narrow = torch.finfo(value.dtype).bits < 32
    if not state:
        like = value.float() if narrow else value
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
    if not narrow:
        return value
    if "master" not in state:  # as version 0.1.0 left it
        state["master"] = value.detach().float()
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].float()
    master = state["master"]
    master.copy_(torch.where(master.to(value.dtype) == value, master, value.float()))
    return master


# ---- stacks of pairs -----------------------------------------------------------------------------


def adam_direction(
    state: dict[str, Any], grad: Tensor, group: dict[str, Any], live: list[bool]
) -> Tensor:
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


def move_average(average: Tensor, now: Tensor, beta: float, live: list[bool]) -> None:
    """average <- beta average + (1 - beta) now, in place, for the pairs that have a gradient."""
    if all(live):
        average.lerp_(now, 1 - beta)
        return
    for mean, value, is_live in zip(average, now, live, strict=True):
        if is_live:
            mean.lerp_(value, 1 - beta)


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

    While all pairs have had equally many steps, a stack is updated as one tensor, otherwise pair by pair.
    """
    rows: list[Any] = [slice(None)]
    if len(set(group["counts"])) > 1 or not all(live):
        rows = [i for i, on in enumerate(live) if on]
    counts = [group["counts"][0 if isinstance(row, slice) else row] - 1 for row in rows]

    def tensors_of(stacks: Sequence[Tensor]) -> list[Tensor]:
        return [stack[row] for stack in stacks for row in rows]

    device = grads[0].device
    adamw(
        tensors_of(values),
        tensors_of(grads),
        tensors_of(means),
        tensors_of(squares),
        [],
        [torch.tensor(n, dtype=torch.float32, device=device) for _ in values for n in counts],
        fused=device.type in ("cpu", "cuda"),
        **adamw_settings(group),
    )
