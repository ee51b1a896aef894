"""AdamW for LoRA of any kind: its factors at lr, all else that is trainable at rest_lr."""

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
    refuse_without_lora(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trainable if is_factor(name)], "lr": lr},
        {"params": [p for name, p in trainable if not is_factor(name)], "lr": rest_lr},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=lr, weight_decay=0.0
    )


def is_factor(name: str) -> bool:
    """Whether a parameter is of LoRA (factors, magnitudes), by its name."""
    return ".lora_" in name


def refuse_without_lora(model: nn.Module) -> None:
    """Raise `PairingError` where nothing of LoRA is trainable."""
    if not any(p.requires_grad and is_factor(name) for name, p in model.named_parameters()):
        raise PairingError(
            "for_trainer: `model` must have trainable LoRA layers; found none. "
            "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
