"""AdamW for LoRA of any kind: its factors at lr, all else that is trainable at rest_lr."""

from typing import Any

import torch
from torch import nn

from geolora.errors import PairingError


def adamw(model: nn.Module, lr: float = 1e-3, rest_lr: float = 1e-3) -> torch.optim.AdamW:
    """torch's AdamW over a model with LoRA layers, without weight decay.

    Args:
        model: a PeftModel, or any module with LoRA layers.
        lr: step size of LoRA's tensors (factors, magnitudes). rest_lr: that of heads and biases.

    Raises:
        PairingError: nothing of LoRA is trainable.
    """
    return torch.optim.AdamW(split_rest(model, lr, rest_lr), lr=lr, weight_decay=0.0)


def split_rest(model: nn.Module, lr: float, rest_lr: float) -> list[dict[str, Any]]:
    """Param groups of a PEFT model: LoRA's tensors (factors, magnitudes) at lr, others at rest_lr.

    Raises:
        PairingError: nothing of LoRA is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = [p for name, p in trainable if ".lora_" in name]
    others = [p for name, p in trainable if ".lora_" not in name]
    if not factors:
        raise PairingError(
            "for_trainer: `model` must have trainable LoRA layers; found none. "
            "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    groups = [{"params": factors, "lr": lr}, {"params": others, "lr": rest_lr}]
    return [group for group in groups if group["params"]]
