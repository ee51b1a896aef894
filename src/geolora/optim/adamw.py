"""Everything that is trained and is not a LoRA pair: heads, biases, embeddings, by torch's AdamW."""

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
    grads: list[Tensor] | None = None,
) -> None:
    """One step of AdamW for the parameters of a group that have a gradient; makes their state.

    Args:
        grads: what to use instead of those gradients, in their order.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    for p in params:
        if not state[p]:
            state[p] = {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
    adamw(
        params,
        [p.grad for p in params] if grads is None else grads,
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        **adamw_settings(group),
    )
