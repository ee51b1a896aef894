"""Fine-tune Hugging Face models on the manifold of low-rank matrices.

Importing this package loads nothing heavy; every public name is resolved when first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geolora.adapters.export import export
    from geolora.adapters.inspect import inspect
    from geolora.adapters.prune import prune, ranks, suggest_budget
    from geolora.adapters.verify import verify
    from geolora.optim.geolora import GeoLoRA
    from geolora.optim.lora_muon import LoRAMuon
    from geolora.optim.lora_pro import LoRAPro
    from geolora.optim.lora_sb import LoRASB
    from geolora.optim.rac_lora import RACLoRA
    from geolora.optim.riemannian import RiemannianAdamW
    from geolora.starts.find_lr import find_lr
    from geolora.starts.gradient_state import get_lora_one_state
    from geolora.starts.lora_ga import initialize_lora_ga, keep_second_half
    from geolora.starts.lora_one import initialize_lora_one
    from geolora.starts.lora_sb import initialize_lora_sb
    from geolora.trainer import for_trainer, log_ranks

__all__ = [
    "GeoLoRA",
    "LoRAMuon",
    "LoRAPro",
    "LoRASB",
    "RACLoRA",
    "RiemannianAdamW",
    "export",
    "find_lr",
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
    "GeoLoRA": "geolora.optim.geolora",
    "LoRAMuon": "geolora.optim.lora_muon",
    "LoRAPro": "geolora.optim.lora_pro",
    "LoRASB": "geolora.optim.lora_sb",
    "RACLoRA": "geolora.optim.rac_lora",
    "RiemannianAdamW": "geolora.optim.riemannian",
    "export": "geolora.adapters.export",
    "find_lr": "geolora.starts.find_lr",
    "for_trainer": "geolora.trainer",
    "get_lora_one_state": "geolora.starts.gradient_state",
    "initialize_lora_ga": "geolora.starts.lora_ga",
    "initialize_lora_one": "geolora.starts.lora_one",
    "initialize_lora_sb": "geolora.starts.lora_sb",
    "keep_second_half": "geolora.starts.lora_ga",
    "inspect": "geolora.adapters.inspect",
    "log_ranks": "geolora.trainer",
    "prune": "geolora.adapters.prune",
    "ranks": "geolora.adapters.prune",
    "suggest_budget": "geolora.adapters.prune",
    "verify": "geolora.adapters.verify",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        metadata = importlib.import_module("importlib.metadata")
        try:
            return metadata.version("geolora")
        except metadata.PackageNotFoundError:  # run from its folder, not installed
            return "unknown"
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'geolora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
