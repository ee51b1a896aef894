"""Fine-tune Hugging Face models on the manifold of low-rank matrices.

Importing this package loads torch at most; every public name is resolved when first used.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GeoLoRA": "geolora.optim",
    "export": "geolora.adapter",
    "for_trainer": "geolora.trainer",
    "inspect": "geolora.saved",
    "prune": "geolora.adapter",
    "ranks": "geolora.adapter",
    "verify": "geolora.saved",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'geolora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
