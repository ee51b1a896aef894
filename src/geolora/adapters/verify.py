"""Checks that stock peft computes from a saved adapter what was trained, by the probes `export` wrote beside it."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from geolora.adapters.base_model import load_base, over_base
from geolora.adapters.names import LOSSES, PROBES
from geolora.adapters.read import SavedAdapter, read_adapter, read_object, read_tensors
from geolora.errors import AdapterError, VerificationError, shown
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


def read_loss(folder: str | Path) -> float | None:
    """||what exports left out||_F / ||W||_F of what was trained; None where it was not written down.

    Raises:
        AdapterError: it is no number from 0 to 1.
    """
    file = Path(folder) / LOSSES
    if not file.exists():
        return None
    error = read_object(file).get("error")
    if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error <= 1:
        raise AdapterError(f"{file}: `error` must be a number from 0 to 1; got {shown(error)}.")
    return float(error)


def read_probes(saved: SavedAdapter) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer: (x (d_in, n), W x (d_out, n))} that `export` wrote beside an adapter.

    Raises:
        AdapterError: there are none, or they do not fit the adapter.
    """
    file = saved.folder / PROBES
    if not file.is_file():
        raise AdapterError(
            f"verify: `path` must hold {PROBES}; {saved.folder} does not. Write it with "
            "geolora.export."
        )
    tensors = read_tensors(file)
    sizes = {pair.name: (pair.d_in, pair.d_out) for pair in saved.pairs}
    probes = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        x, y = tensors.get(f"{name}.x"), tensors.get(f"{name}.y")
        if x is None or y is None or x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1]:
            raise AdapterError(
                f"{file}: layer {shown(name)} must have x (d_in, n) and y (d_out, n). "
                "Export the adapter again."
            )
        got = (x.shape[0], y.shape[0])
        if name in sizes and got != sizes[name]:
            raise AdapterError(
                f"{file}: the probes of {shown(name)} must be for {sizes[name][0]} inputs and "
                f"{sizes[name][1]} outputs; got {got[0]} and {got[1]}. Export the adapter again."
            )
        probes[name] = (x, y)
    return probes


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
