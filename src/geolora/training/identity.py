"""What tells one run from another: its settings, its data and its base model; and the versions that made it."""

import hashlib
import json
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from geolora.settings.train_config import TrainConfig

BEGINNING = 1 << 20
"""Bytes of a file that are hashed, to tell it from another of its name and size."""


def run_id(config: TrainConfig, data_id: str) -> str:
    """A hash of the settings, data and base of a run; where it writes to does not matter.

    Args:
        data_id: what `Data.digest` gives.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "overwrite")}
    text = json.dumps([settings, data_id, base_id(config.model)])
    return hashlib.sha256(text.encode()).hexdigest()


def base_id(model: str) -> str:
    """What tells one local model folder from another: sizes of its files, and how they begin.

    A hub name stands for itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(BEGINNING))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    ours, *others = "geolora", "torch", "transformers", "peft"
    return {
        ours: metadata.version(ours),
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in others},
    }
