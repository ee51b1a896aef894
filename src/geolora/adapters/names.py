"""What the files of an adapter folder are called."""

from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROBES = Path("geolora") / "probes.safetensors"
"""Inputs and outputs per layer, which `export` writes and `verify` reads."""
LOSSES = Path("geolora") / "export.json"
"""What `export` left out, which `verify` tells."""
