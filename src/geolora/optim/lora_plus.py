"""LoRA+ by PEFT's own optimizer: AdamW with a larger step for B than for A."""

import math

import torch
from torch import nn

from geolora.errors import SettingError
from geolora.optim.lora import is_factor, refuse_without_lora


def lora_plus(
    model: nn.Module, lr: float = 7e-4, rest_lr: float = 1e-3, ratio: float = 16.0
) -> torch.optim.AdamW:
    """PEFT's LoRA+ over torch's AdamW, without weight decay.

    Args:
        model: a PeftModel.
        lr: step size of A. rest_lr: that of all that is no factor (heads, biases), to which PEFT would give
            the step size of A or, where they are vectors, of B.
        ratio: step size of B / step size of A, 1 or more.

    Raises:
        PairingError: nothing of LoRA is trainable. SettingError: a ratio below 1.

    Source: arXiv 2402.12354; `peft.optimizers.create_loraplus_optimizer`.
    """
    from peft.optimizers import create_loraplus_optimizer

    if not (ratio >= 1 and math.isfinite(ratio)):
        raise SettingError(f"lora-plus: `ratio` must be a number >= 1; got {ratio!r}.")
    refuse_without_lora(model)
    optimizer = create_loraplus_optimizer(
        model,  # pyright: ignore[reportArgumentType]
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=ratio,
    )
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rest = [p for name, p in trainable if not is_factor(name)]
    others = {id(p) for p in rest}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in others]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if rest:
        optimizer.add_param_group({"params": rest, "lr": rest_lr, "weight_decay": 0.0})
    return optimizer  # pyright: ignore[reportReturnType]
