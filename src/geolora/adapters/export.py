"""What a model holds, and an adapter written from it: ranks, prune, export.

What is written is an ordinary PEFT LoRA adapter. The default layout is uniform (one rank, alpha =
rank, no patterns, scale folded into the factors): what LoRA servers expect, by their documentation
and code; only peft itself is tested here.
"""

import copy
import re
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import AdapterError, GeoloraWarning, SettingError, at_most_three
from geolora.kernels.truncate import settled_ranks
from geolora.pairs.find import (
    PREFIX,
    Pair,
    adapter_of,
    check_budget,
    find_pairs,
    unpaired_lora_layers,
)
from geolora.pairs.point import read_pair, slot_ranks, to_pair
from geolora.pairs.sharded import gathered, is_first, write_factors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PROBES = Path("geolora") / "probes.safetensors"
LAYOUTS = ("uniform", "compact")
PROBE_COUNT = 4


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


@dataclass(frozen=True)
class BudgetScore:
    """What a trained adapter scores when it is cut to a budget, without training on.

    Attributes:
        adapter_parameters: sum of rank * (d_in + d_out) of what is left.
        exported_parameters: numbers in the uniform file of it.
        error: ||what was cut||_F / ||W||_F over all layers.
        score: what `evaluate` returned.
    """

    budget: int
    adapter_parameters: int
    exported_parameters: int
    error: float
    score: float


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """{layer: settled rank}: active slots, without those that have not been judged yet.

    Args:
        model: a model with LoRA layers, trained by geolora or not. Where it is sharded (FSDP2) every
            process must call, here, in `prune` and in `export`.
        adapter_name: which adapter; None for the active one.
    """
    return {
        pair.name: active - trials
        for pair in find_pairs(model, adapter_name, with_sharded=True)
        for active, trials in [slot_ranks(*_factors(pair))]
    }


@torch.no_grad()
def prune(
    model: nn.Module,
    tail: float = 0.25,
    budget: int | None = None,
    adapter_name: str | None = None,
) -> dict[str, int]:
    """Judge every layer now: cut by `tail`, then to a `budget` over all layers; in place.

    The pairs keep their shape: what is cut is zero on both sides. An optimizer notices and goes on
    from what is left. Works on any LoRA adapter.

    Args:
        tail: fraction of ||sigma||_2 a layer may lose, in [0, 1).
        budget: adapter parameters to keep at most, sum of rank * (d_in + d_out).

    Returns:
        {layer: rank}.

    Raises:
        SettingError: tail outside [0, 1). BudgetError: less than one direction per layer.
    """
    if not 0 <= tail < 1:
        raise SettingError(f"prune: `tail` must be in [0, 1); got {tail}.")
    pairs = find_pairs(model, adapter_name, with_sharded=True)
    costs = [pair.cost for pair in pairs]
    check_budget(costs, budget)
    readings = [read_pair(*_factors(pair), pair.scale) for pair in pairs]
    kept = settled_ranks(
        [reading.sigma for reading in readings],
        costs,
        tail,
        budget,
    )
    result = {}
    for pair, reading, rank in zip(pairs, readings, kept, strict=True):
        active = int((reading.sigma > 0).sum())
        result[pair.name] = min(rank, active)
        if not active:  # nothing but probes: keep them, or the layer would never see a gradient
            continue
        keep = (torch.arange(pair.r, device=reading.sigma.device) < rank).double()
        A, B = to_pair(
            reading.U * keep,
            reading.sigma * keep,
            reading.V * keep,
            torch.tensor(pair.scale, device=keep.device).double(),
            torch.tensor(pair.r, device=keep.device),
        )
        write_factors([pair.A, pair.B], [A, B])
    return result


def suggest_budget(
    model: nn.Module,
    evaluate: Callable[[], float],
    shares: Sequence[float] = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0),
    adapter_name: str | None = None,
) -> list[BudgetScore]:
    """Score against parameters, from the spectra of one trained adapter.

    The adapter is cut to each budget as `prune` does (tail 0), scored, and put back as it was: what a
    smaller budget would cost at least in part; a run trained within it mostly loses less.

    Args:
        evaluate: scores the model as it stands, on rows that were not trained on.
        shares: budgets as shares, in (0, 1], of the parameters in use. Those that do not hold one
            direction in every layer are left out.

    Returns:
        A row per budget, from the smallest on.

    Raises:
        SettingError: a share outside (0, 1].
    """
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise SettingError(f"suggest_budget: `shares` must be in (0, 1]; got {wrong[0]}.")
    pairs = find_pairs(model, adapter_name, with_sharded=True)
    cost = {pair.name: pair.cost for pair in pairs}
    used = sum(rank * cost[name] for name, rank in ranks(model, adapter_name).items())
    kept = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
    size = _size(pairs)
    rows = []
    try:
        for share in sorted(set(shares)):
            budget = round(share * used)
            if budget < sum(cost.values()):
                continue
            _put_back(pairs, kept)
            left = prune(model, 0.0, budget, adapter_name)
            rest = (max(0.0, size**2 - _size(pairs) ** 2)) ** 0.5  # cut at a right angle
            rows.append(
                BudgetScore(
                    budget,
                    sum(rank * cost[name] for name, rank in left.items()),
                    max(1, *left.values()) * sum(cost.values()),
                    rest / size if size else 0.0,
                    float(evaluate()),
                )
            )
    finally:
        _put_back(pairs, kept)
    return rows


@torch.no_grad()
def _put_back(pairs: list[Pair], kept: list[tuple[Tensor, Tensor]]) -> None:
    for pair, (A, B) in zip(pairs, kept, strict=True):
        pair.A.copy_(A)
        pair.B.copy_(B)


def _size(pairs: list[Pair]) -> float:
    """||W||_F over all layers."""
    sigmas = [read_pair(*_factors(pair), pair.scale).sigma for pair in pairs]
    return sum(float((sigma.double() ** 2).sum()) for sigma in sigmas) ** 0.5


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    layout: str = "uniform",
    rank: int | None = None,
    adapter_name: str | None = None,
) -> Export:
    """Write a PEFT adapter that stock `peft` loads, with probes for `verify` beside it.

    Trained heads and biases are kept; `verify` does not check them. Directions that were never
    judged are left out, with a warning. The model is not changed. Of a sharded model (FSDP2) the factors are
    gathered: every process must call, the first one writes.

    Args:
        model: a PeftModel.
        path: folder to write; created where missing, files of the same names are replaced.
        layout: "uniform": one rank, alpha = rank, no patterns; "compact": each layer its own rank
            through rank_pattern and alpha_pattern (peft and diffusers read it, servers do not).
        rank: rank of the uniform file; None for the largest one found. A smaller one truncates,
            a larger one pads with zeros.
        adapter_name: which adapter; None for the active one.

    Returns:
        An `Export`; its `error` says what truncation lost.

    Raises:
        AdapterError: the model is not a PeftModel.
        SettingError: an unknown layout, or a rank that does not fit.
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
    points, settled = _points(pairs)
    trials = sum(sigma.numel() - settled[name] for name, (_, sigma, _) in points.items())
    if trials:
        warnings.warn(
            f"export: {trials} directions that were never judged are left out. Export after a "
            "judgement (GeoLoRA's `settle_after`, or geolora.prune) to keep what they hold.",
            GeoloraWarning,
            stacklevel=2,
        )
    kept = {name: min(count, rank) if rank else count for name, count in settled.items()}
    width = rank or max(1, *kept.values())
    widths = {name: width if layout == "uniform" else max(1, k) for name, k in kept.items()}

    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    exported, probes = 0, {}
    for pair in pairs:
        A, B = _padded_pair(points[pair.name], kept[pair.name], widths[pair.name], pair)
        A, B = A.to(pair.A.dtype), B.to(pair.B.dtype)
        probes |= _probes_of(pair, points[pair.name], kept[pair.name])
        kernel = pair.A.shape[1:], pair.B.shape[2:]
        tensors[f"{PREFIX}{pair.name}.lora_A.weight"] = A.view(-1, *kernel[0])
        tensors[f"{PREFIX}{pair.name}.lora_B.weight"] = B.view(*B.shape, *kernel[1])
        exported += A.numel() + B.numel()
        bias = f"{PREFIX}{pair.name}.lora_B.bias"
        if bias in tensors:  # peft multiplies it by the scale, which is 1 in the file
            tensors[bias] = pair.scale * tensors[bias]
    others = sorted(
        key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))
    )

    folder = Path(path)
    copies = {k: gathered(v).detach().cpu().clone().contiguous() for k, v in tensors.items()}
    config = _exported_config(model, adapter_name, pairs, layout, widths)
    lost = sum(float((s[kept[name] :] ** 2).sum()) for name, (_, s, _) in points.items())
    total = sum(float((s**2).sum()) for _, s, _ in points.values())
    cost = {pair.name: pair.cost for pair in pairs}
    done = Export(
        folder,
        layout,
        kept,
        sum(kept[name] * cost[name] for name in kept),
        exported,
        (lost / total) ** 0.5 if total else 0.0,
        trials,
        others,
    )
    if is_first(model):
        (folder / PROBES).parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})
        save_file(probes, folder / PROBES)
        config.save_pretrained(folder)
        (folder / "README.md").write_text(_model_card(done, config), encoding="utf-8")
    return done


# ---- reading ------------------------------------------------------------------------------------


def _factors(pair: Pair) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r), gathered where they are sharded."""
    return gathered(pair.A).flatten(1), gathered(pair.B).flatten(1)


def _points(
    pairs: list[Pair],
) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], dict[str, int]]:
    """{layer: (U, sigma, V)} of all active directions, float64; and how many were judged."""
    points, settled = {}, {}
    for pair in pairs:
        A, B = _factors(pair)
        reading = read_pair(A, B, pair.scale)
        rank = int((reading.sigma > 0).sum())
        points[pair.name] = (reading.U[:, :rank], reading.sigma[:rank], reading.V[:, :rank])
        settled[pair.name] = rank - slot_ranks(A, B)[1]
    return points, settled


def _padded_pair(
    point: tuple[Tensor, Tensor, Tensor], rank: int, width: int, pair: Pair
) -> tuple[Tensor, Tensor]:
    """Balanced A (width, d_in) and B (d_out, width) with W = B A, float64, zeros beyond `rank`."""
    U, sigma, V = point
    root = sigma[:rank].sqrt()
    A = sigma.new_zeros(width, pair.d_in)
    B = sigma.new_zeros(pair.d_out, width)
    A[:rank], B[:, :rank] = (V[:, :rank] * root).mT, U[:, :rank] * root
    return A, B


def _probes_of(pair: Pair, point: tuple[Tensor, Tensor, Tensor], rank: int) -> dict[str, Tensor]:
    """Inputs x and W x (n, 4), float32, for the trained W cut to `rank`.

    From U, sigma and V, not from the tensors of the file: `verify` is to notice a wrong file.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
    x = torch.randn(pair.d_in, PROBE_COUNT, generator=generator, dtype=torch.float64)
    U, sigma, V = (part[..., :rank].cpu() for part in point)
    return {f"{pair.name}.x": x.float(), f"{pair.name}.y": ((U * sigma) @ (V.mT @ x)).float()}


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


def _exported_config(
    model: Any, adapter_name: str, pairs: list[Pair], layout: str, widths: dict[str, int]
) -> Any:
    config = copy.deepcopy(model.peft_config[adapter_name])
    width = max(widths.values())
    config.r = config.lora_alpha = width
    config.use_rslora = False
    config.rank_pattern, config.alpha_pattern = {}, {}
    config.init_lora_weights = True
    config.eva_config = None
    config.inference_mode = True
    config.target_modules = _target_modules(model, pairs)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)
    if layout == "compact":
        # PEFT reads the keys as patterns for the end of a path; these name one layer each.
        config.rank_pattern = {f"^{re.escape(name)}": k for name, k in widths.items()}
        config.alpha_pattern = dict(config.rank_pattern)
    return config


def _target_modules(model: Any, pairs: list[Pair]) -> list[str]:
    """Leaf names where they name just these layers; whole paths otherwise."""
    names = {pair.name for pair in pairs}
    leaves = {name.rpartition(".")[2] for name in names}
    for name, _ in model.get_base_model().named_modules():
        inside = any(name.startswith(f"{known}.") for known in names)
        if name.rpartition(".")[2] in leaves and name not in names and not inside:
            return sorted(names)
    return sorted(leaves)


def _model_card(done: Export, config: Any) -> str:
    base = config.base_model_name_or_path or "unknown"
    title = Path(base).name if Path(base).is_dir() else base
    readers = "peft and LoRA servers" if done.server_shaped else "peft and what is built on it"
    table = "\n".join(f"| `{name}` | {rank} |" for name, rank in done.ranks.items())
    return f"""---
base_model: {base}
library_name: peft
tags:
- lora
- geolora
---

# LoRA adapter for {title}

Written by geolora {metadata.version("geolora")} in the {done.layout} layout, for {readers}.

- directions in use: {sum(done.ranks.values())} in {len(done.ranks)} layers, {done.adapter_parameters:,} parameters
- numbers in the file: {done.exported_parameters:,}
- beside the pairs: {", ".join(f"`{key}`" for key in done.others) or "nothing"}

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder")
```

`geolora verify` checks that it computes what was trained; `geolora inspect` shows its spectra.

| layer | rank |
|---|---|
{table}
"""
