"""Checks that stock peft computes from a saved adapter what was trained, by the probes `export` wrote beside it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from geolora.adapters.base_model import load_base, over_base
from geolora.adapters.read import read_adapter, read_probes
from geolora.errors import VerificationError
from geolora.pairs.find import lora_layers


@torch.no_grad()
def verify(path: str | Path, base: nn.Module | str | Path | None = None) -> dict[str, float]:
    """Check a saved adapter: stock peft's delta W times the probes that export wrote beside it.

    Args:
        path: folder written by `export`.
        base: the base model, fresh, or where to load it from; None for the name in the adapter.
            peft wraps and freezes a module that is given: pass one to spare.

    Returns:
        {layer: max|dW x - expected| / max|expected|}, where expected is zero the absolute error.

    Raises:
        VerificationError: a layer is missing, superfluous or computes something else.
        AdapterError: no adapter that can be read, or no probes, in the folder.
    """
    saved = read_adapter(path)
    probes = read_probes(saved)
    if base is None or isinstance(base, str | Path):
        base = load_base(saved, base)
    stored = next(tensor.dtype for key, tensor in saved.tensors.items() if ".lora_A." in key)
    return _probe_errors(over_base(base, saved), probes, stored)


def _probe_errors(
    loaded: nn.Module, probes: Mapping[str, tuple[Tensor, Tensor]], stored: torch.dtype
) -> dict[str, float]:
    """{layer: relative error of its probes}; raises `VerificationError` for the first one too large.

    Args:
        loaded: the model with the adapter. stored: the dtype in the file, whose rounding is allowed for.
    """
    layers = dict(lora_layers(loaded))
    if wrong := sorted(set(layers) ^ set(probes)):
        raise VerificationError(
            f"verify: the adapter and its probes must have the same layers; {wrong[0]} is only in "
            f"{'the adapter' if wrong[0] in layers else 'the probes'}."
        )
    errors = {}
    for name, layer in layers.items():
        x, y = probes[name]
        delta = layer.get_delta_weight("default").detach().cpu()
        if getattr(layer, "fan_in_fan_out", False):
            delta = delta.mT
        got = delta.flatten(1).double() @ x.double()
        size = float(y.abs().max())
        errors[name] = float((got - y).abs().max()) / (size or 1.0)
        bound = max(100 * torch.finfo(torch.float32).eps, 2 * torch.finfo(stored).eps)
        if not errors[name] <= bound:
            raise VerificationError(
                f"verify: layer `{name}` must compute what was trained; relative error "
                f"{errors[name]:.2e}, allowed {bound:.0e}. The file was changed or a patterned "
                "rank or alpha was not applied; export it again."
            )
    return errors
