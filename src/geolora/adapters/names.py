"""What the files of an adapter folder are called, and what models on the Hub are."""

import re
from pathlib import Path

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROBES = Path("geolora") / "probes.safetensors"
"""Inputs and outputs per layer, which `export` writes and `verify` reads."""
LOSSES = Path("geolora") / "export.json"
"""What `export` left out, which `verify` tells."""
HUB_NAME = re.compile(
    r"(?!.*(\.\.|--))(?!.*\.git\Z)\w([\w.-]{0,94}\w)?(/\w([\w.-]{0,94}\w)?)?", re.ASCII
)
"""The name of a model or adapter on the Hub, by its own rules."""
