"""Fine-tune Hugging Face models on the manifold of low-rank matrices.

Importing this package loads nothing heavy; every public name is resolved when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geolora.adapter import export, prune, ranks, suggest_budget
    from geolora.initialize import (
        get_lora_one_state,
        initialize_lora_ga,
        initialize_lora_one,
        initialize_lora_sb,
        keep_second_half,
    )
    from geolora.optim import GeoLoRA
    from geolora.relatives import LoRAPro, LoRASB, RACLoRA, RiemannianAdamW
    from geolora.saved import inspect, verify
    from geolora.trainer import for_trainer, log_ranks

__version__ = "0.1.0"

__all__ = [
    "GeoLoRA",
    "LoRAPro",
    "LoRASB",
    "RACLoRA",
    "RiemannianAdamW",
    "export",
    "for_trainer",
    "get_lora_one_state",
    "initialize_lora_ga",
    "initialize_lora_one",
    "initialize_lora_sb",
    "inspect",
    "keep_second_half",
    "log_ranks",
    "prune",
    "ranks",
    "suggest_budget",
    "verify",
]

_HOME = {
    "GeoLoRA": "geolora.optim",
    "LoRAPro": "geolora.relatives",
    "LoRASB": "geolora.relatives",
    "RACLoRA": "geolora.relatives",
    "RiemannianAdamW": "geolora.relatives",
    "export": "geolora.adapter",
    "for_trainer": "geolora.trainer",
    "get_lora_one_state": "geolora.initialize",
    "initialize_lora_ga": "geolora.initialize",
    "initialize_lora_one": "geolora.initialize",
    "initialize_lora_sb": "geolora.initialize",
    "keep_second_half": "geolora.initialize",
    "inspect": "geolora.saved",
    "log_ranks": "geolora.trainer",
    "prune": "geolora.adapter",
    "ranks": "geolora.adapter",
    "suggest_budget": "geolora.adapter",
    "verify": "geolora.saved",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'geolora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
