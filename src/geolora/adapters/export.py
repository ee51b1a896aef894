"""Writes the adapter of a model as a PEFT folder, with probes for `verify` and a model card beside it.

It is an ordinary PEFT LoRA adapter. The default layout is uniform (one rank, alpha = rank, no patterns, scale
folded into the factors): what LoRA servers expect, by their documentation and code; only peft itself is tested here.
"""

import copy
import re
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.adapters.card import model_card
from geolora.adapters.names import LOSSES, PROBES, WEIGHTS
from geolora.errors import AdapterError, GeoloraWarning, SettingError, at_most_three
from geolora.files.folders import replacing
from geolora.files.writing import write_json, write_text
from geolora.pairs.find import (
    PREFIX,
    Pair,
    adapter_of,
    find_pairs,
    lora_layers,
    unpaired_lora_layers,
)
from geolora.pairs.point import read_pair, slot_ranks
from geolora.pairs.sharded import gathered, is_first

LAYOUTS = ("uniform", "compact")
PAIR_ENDINGS = (".lora_A.weight", ".lora_B.weight")
PROBE_COUNT = 4
"""Inputs per layer."""


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Attributes:
        ranks: {layer: rank kept}; 0 where the layer has no direction.
        adapter_parameters: sum of rank * (d_in + d_out) over all layers.
        exported_parameters: numbers in the LoRA tensors of the file, padding included.
        error: ||what was dropped||_F / ||W||_F over all layers; 0 unless `rank` or trials cut.
        dropped_trials: directions left out because they were never judged.
        others: tensors written beside the pairs (heads, biases, embeddings).
    """

    path: Path
    layout: str
    ranks: dict[str, int]
    adapter_parameters: int
    exported_parameters: int
    error: float
    dropped_trials: int
    others: list[str]

    @property
    def server_shaped(self) -> bool:
        """Whether it has the shape LoRA servers expect: uniform, nothing beside the pairs."""
        return self.layout == "uniform" and not self.others


def export(
    model: nn.Module,
    path: str | Path,
    layout: str = "uniform",
    rank: int | None = None,
    adapter_name: str | None = None,
    max_error: float = 0.05,
) -> Export:
    """Write a PEFT adapter that stock `peft` loads, with probes for `verify` beside it.

    Trained heads and biases are kept; `verify` does not check them. Directions that were never
    judged are left out, with a warning. The model is not changed. Of a sharded model (FSDP2) the factors are
    gathered: every process must call, the first one writes. The files take the place of an adapter in
    the folder at once: a process that is killed leaves the old one or the new one, whole.

    Args:
        model: a PeftModel.
        path: folder to write; created where missing. An adapter in it is replaced, other files stay.
        layout: "uniform": one rank, alpha = rank, no patterns; "compact": each layer its own rank
            through rank_pattern and alpha_pattern (peft and diffusers read it, servers do not).
        rank: rank of the uniform file; None for the largest one found. A smaller one truncates,
            a larger one pads with zeros.
        adapter_name: which adapter; None for the active one.
        max_error: what `rank` may cut, ||what is dropped||_F / ||W||_F over all layers; 1 for anything.

    Returns:
        An `Export`; its `error` says what truncation lost.

    Raises:
        AdapterError: the model is not a PeftModel, a trained number is not finite (or not in the
            dtype of the file), or `rank` cuts more than `max_error`. Nothing is written then.
        SettingError: an unknown layout, or a rank that does not fit.
        OutputError: the folder cannot be replaced.
    """
    return write(model, path, layout, rank, adapter_name, max_error)


@torch.no_grad()
def write(
    model: nn.Module,
    path: str | Path,
    layout: str,
    rank: int | None,
    adapter_name: str | None,
    max_error: float,
    lost_before: float = 0.0,
    fresh: bool = False,
) -> Export:
    """Export a model whose adapter had itself lost something of what was trained; else as `export`.

    Args:
        lost_before: the relative error of the export it was read from.
        fresh: whether an adapter in the folder is not to be replaced.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    if layout not in LAYOUTS:
        raise SettingError(f"export: `layout` must be one of {LAYOUTS}; got {layout!r}.")
    if not isinstance(model, PeftModel):
        raise AdapterError(
            f"export: `model` must be a PeftModel; got {type(model).__name__}. "
            "Wrap it with peft.get_peft_model, or save the injected layers with peft yourself."
        )
    adapter_name = adapter_of(model, adapter_name)
    pairs = find_pairs(model, adapter_name, with_sharded=True)
    _refuse_what_a_file_cannot_hold(model, adapter_name, pairs)
    _check_rank(pairs, layout, rank)
    if not 0 <= max_error <= 1:
        raise SettingError(f"export: `max_error` must be in 0..1; got {max_error}.")
    layers = _layers(pairs, layout, rank)
    trials = sum(layer.trials for layer in layers)
    if trials:
        warnings.warn(
            f"export: {trials} directions that were never judged are left out. Export after a "
            "judgement (GeoLoRA's `total_steps`, or geolora.prune) to keep what they hold.",
            GeoloraWarning,
            stacklevel=2,
        )
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    for layer in layers:
        tensors |= layer.tensors()
        bias = f"{PREFIX}{layer.pair.name}.lora_B.bias"
        if bias in tensors:  # peft multiplies it by the scale, which is 1 in the file
            tensors[bias] = layer.pair.scale * tensors[bias]
    copies = {k: gathered(v).detach().cpu().clone().contiguous() for k, v in tensors.items()}
    lost, total = sum(layer.lost for layer in layers), sum(layer.energy for layer in layers)
    done = Export(
        path=Path(path),
        layout=layout,
        ranks={layer.pair.name: layer.rank for layer in layers},
        adapter_parameters=sum(layer.rank * layer.pair.cost for layer in layers),
        exported_parameters=sum(layer.width * layer.pair.cost for layer in layers),
        error=(lost / total) ** 0.5 if total else 0.0,
        dropped_trials=trials,
        others=sorted(key for key in tensors if not key.endswith(PAIR_ENDINGS)),
    )
    _refuse_not_finite(copies)
    if rank is not None and done.error > max_error:
        needed = max(layer.settled for layer in layers)
        raise AdapterError(
            f"export: `rank` {rank} cuts {done.error:.0%} of what was trained, `max_error` allows "
            f"{max_error:.0%}. Give a higher rank ({needed} keeps all), or a higher `max_error`."
        )
    config = _exported_config(model, adapter_name, layers, layout)
    if is_first(model):
        with replacing(done.path, fresh) as folder:
            (folder / PROBES).parent.mkdir()
            save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
            probes = {key: value for layer in layers for key, value in layer.probes().items()}
            save_file(probes, folder / PROBES)
            kept = (1 - done.error**2) * (1 - lost_before**2)
            write_json(folder / LOSSES, {"error": (1 - kept) ** 0.5})
            readers = (
                "peft and LoRA servers" if done.server_shaped else "peft and what is built on it"
            )
            card = model_card(
                config.base_model_name_or_path,
                f"in the {layout} layout, for {readers}",
                done.ranks,
                done.adapter_parameters,
                done.exported_parameters,
                done.others,
            )
            write_text(folder / "README.md", card)
            config.save_pretrained(folder)
    return done


# ---- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layer:
    """What is written of one pair: its first `rank` directions, in `width` slots.

    Attributes:
        U, sigma, V: all active directions, float64.
        trials: how many of them were never judged.
    """

    pair: Pair
    U: Tensor
    sigma: Tensor
    V: Tensor
    trials: int
    rank: int = 0
    width: int = 0

    @property
    def settled(self) -> int:
        """Directions that were judged."""
        return self.sigma.numel() - self.trials

    @property
    def energy(self) -> float:
        """||W||_F squared."""
        return float((self.sigma**2).sum())

    @property
    def lost(self) -> float:
        """What the directions that are not written have of it."""
        return float((self.sigma[self.rank :] ** 2).sum())

    def tensors(self) -> dict[str, Tensor]:
        """The balanced pair of the file, W = B A: zeros beyond the rank, kernels as peft has them."""
        root = self.sigma[: self.rank].sqrt()
        A = self.sigma.new_zeros(self.width, self.pair.d_in)
        B = self.sigma.new_zeros(self.pair.d_out, self.width)
        A[: self.rank] = (self.V[:, : self.rank] * root).mT
        B[:, : self.rank] = self.U[:, : self.rank] * root
        shape_A, shape_B = (-1, *self.pair.A.shape[1:]), (*B.shape, *self.pair.B.shape[2:])
        name = f"{PREFIX}{self.pair.name}"
        return {
            f"{name}.lora_A.weight": A.to(self.pair.A.dtype).view(shape_A),
            f"{name}.lora_B.weight": B.to(self.pair.B.dtype).view(shape_B),
        }

    def probes(self) -> dict[str, Tensor]:
        """Inputs x and W x (n, 4), float32, for the trained W cut to the rank.

        From U, sigma and V, not from the tensors of the file: `verify` is to notice a wrong file.
        """
        name = self.pair.name
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        x = torch.randn(self.pair.d_in, PROBE_COUNT, generator=generator, dtype=torch.float64)
        U, sigma, V = (t[..., : self.rank].cpu() for t in (self.U, self.sigma, self.V))
        return {f"{name}.x": x.float(), f"{name}.y": ((U * sigma) @ (V.mT @ x)).float()}


def _layers(pairs: list[Pair], layout: str, rank: int | None) -> list[_Layer]:
    """What is to be written of all pairs: the settled rank of each, `rank` at most."""
    layers = []
    for pair in pairs:
        A, B = pair.gathered()
        reading = read_pair(A, B, pair.scale)
        active = int((reading.sigma > 0).sum())
        point = (reading.U[:, :active], reading.sigma[:active], reading.V[:, :active])
        layer = _Layer(pair, *point, trials=slot_ranks(A, B)[1])
        layers.append(replace(layer, rank=min(layer.settled, rank or layer.settled)))
    largest = rank or max(1, *(layer.rank for layer in layers))
    return [
        replace(layer, width=largest if layout == "uniform" else max(1, layer.rank))
        for layer in layers
    ]


# ---- writing ------------------------------------------------------------------------------------


def _refuse_what_a_file_cannot_hold(model: Any, adapter_name: str, pairs: list[Pair]) -> None:
    start = model.peft_config[adapter_name].init_lora_weights
    if start not in (True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterError(
            f"export: the start {start!r} changed the base weights, so the pairs alone are not the "
            "adapter. Use peft's save_pretrained with path_initial_model_for_weight_conversion."
        )
    if nested := [pair.name for pair in pairs if ".base_layer." in pair.name]:
        raise AdapterError(
            f"export: `{nested[0]}` is a layer inside a MultiheadAttention, which peft names "
            "differently on load. Use peft's save_pretrained."
        )
    if embeddings := unpaired_lora_layers(model, adapter_name):
        raise AdapterError(
            f"export: LoRA on embeddings ({at_most_three(embeddings)}) has another rank and scale "
            "rule than the pairs. Use peft's save_pretrained, or leave embeddings out."
        )


def _refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AdapterError(
                f"export: `{name}` ({str(tensor.dtype).removeprefix('torch.')}) must be finite: the "
                "training diverged, or the dtype is too small. Nothing was written."
            )


def _check_rank(pairs: list[Pair], layout: str, rank: int | None) -> None:
    if rank is None:
        return
    smallest = min(pairs, key=lambda pair: min(pair.d_in, pair.d_out))
    limit = min(smallest.d_in, smallest.d_out)
    if layout != "uniform":
        raise SettingError("export: `rank` belongs to layout='uniform'; compact keeps every rank.")
    if not 1 <= rank <= limit:
        raise SettingError(
            f"export: `rank` must be in 1..{limit} (the smaller side of {smallest.name}); got {rank}."
        )


def _exported_config(model: Any, adapter_name: str, layers: list[_Layer], layout: str) -> Any:
    """The adapter's PEFT config for what is written."""
    config = copy.deepcopy(model.peft_config[adapter_name])
    config.r = config.lora_alpha = max(layer.width for layer in layers)
    config.use_rslora = False
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights = True
    config.eva_config = None
    config.inference_mode = True
    names = {layer.pair.name for layer in layers}
    held = {  # a router's matrix, say, which no linear layer holds
        name: f"{name}.{layer.parameter_name}"
        for name, layer in lora_layers(model)
        if name in names and hasattr(layer, "parameter_name")
    }
    layered = names - held.keys()
    config.target_modules = _target_modules(model, layered) if layered else None
    config.target_parameters = sorted(held.values()) or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.task_type is None:  # as peft saves it: which class the adapter is for
        kind = type(model.get_base_model())
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    if layout == "compact":
        # PEFT reads the keys as patterns for the end of a path; these name one layer each.
        config.rank_pattern = {f"^{re.escape(layer.pair.name)}": layer.width for layer in layers}
        config.alpha_pattern = dict(config.rank_pattern)
    return config


def _target_modules(model: Any, names: set[str]) -> list[str]:
    """Last components of the layers' names where they fit no other layer; full names otherwise."""
    leaves = {name.rpartition(".")[2] for name in names}
    for name, _ in model.get_base_model().named_modules():
        inside = any(name.startswith(f"{known}.") for known in names)
        if name.rpartition(".")[2] in leaves and name not in names and not inside:
            return sorted(names)
    return sorted(leaves)
