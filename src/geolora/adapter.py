"""Adapters as files: export, verify, inspect, prune, ranks. With `pairs.py` all that knows PEFT.

What is written is an ordinary PEFT LoRA adapter. The default layout is uniform (one rank, alpha =
rank, no patterns, scale folded into the factors), the only form every server reads right.
"""

import copy
import json
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.errors import AdapterError, GeoloraWarning, SettingError, VerificationError
from geolora.factors import read_pair, slot_ranks, to_pair
from geolora.kernels.truncate import rank_by_tail, settled_ranks
from geolora.pairs import PREFIX, Pair, check_budget, find_pairs

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
        """Whether every LoRA server can read it: uniform, and nothing beside the pairs."""
        return self.layout == "uniform" and not self.others


@dataclass(frozen=True)
class LayerReport:
    """A row of `inspect`."""

    layer: str
    d_out: int
    d_in: int
    rank: int
    sigma: list[float]
    tail_rank: int
    share_of_tail: float


def ranks(model: nn.Module, adapter_name: str | None = None) -> dict[str, int]:
    """{layer: settled rank}: active slots, without those that have not been judged yet.

    Args:
        model: a model with LoRA layers, trained by geolora or not.
        adapter_name: which adapter; None for the active one.
    """
    return {
        pair.name: active - trials
        for pair in find_pairs(model, adapter_name)
        for active, trials in [slot_ranks(pair.A.flatten(1), pair.B.flatten(1))]
    }


@torch.no_grad()
def prune(
    model: nn.Module,
    tail: float = 0.1,
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
    pairs = find_pairs(model, adapter_name)
    check_budget(pairs, budget)
    readings = [read_pair(pair.A.flatten(1), pair.B.flatten(1), pair.scale) for pair in pairs]
    kept = settled_ranks(
        [reading.sigma for reading in readings],
        [pair.d_in + pair.d_out for pair in pairs],
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
        pair.A.copy_(A.view(pair.A.shape))
        pair.B.copy_(B.view(pair.B.shape))
    return result


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    layout: str = "uniform",
    rank: int | None = None,
    adapter_name: str | None = None,
) -> Export:
    """Write a PEFT adapter that stock `peft` loads, with probes for `verify` beside it.

    Trained heads and biases are kept. Directions that were never judged are left out, with a
    warning. The model is not changed.

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
    pairs = find_pairs(model, adapter_name)
    adapter_name = adapter_name or model.active_adapter
    _check_rank(pairs, layout, rank)
    points, trials = _settled_points(pairs)
    if trials:
        warnings.warn(
            f"export: {trials} directions that were never judged are left out. Export after a "
            "judgement (GeoLoRA's `settle_after`, or geolora.prune) to keep what they hold.",
            GeoloraWarning,
            stacklevel=2,
        )
    kept = {
        name: min(sigma.numel(), rank) if rank else sigma.numel()
        for name, (_, sigma, _) in points.items()
    }
    width = rank or max(1, *kept.values())
    widths = {name: width if layout == "uniform" else max(1, k) for name, k in kept.items()}

    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    exported, probes = 0, {}
    for pair in pairs:
        A, B = _padded_pair(points[pair.name], kept[pair.name], widths[pair.name], pair)
        probes |= _probes_of(pair, A, B)
        for key, value in (("lora_A", A), ("lora_B", B)):
            full = f"{PREFIX}{pair.name}.{key}.weight"
            like = tensors[full]
            tensors[full] = value.to(like.dtype).view(-1, *like.shape[1:]) if key == "lora_A" else (
                value.to(like.dtype).view(like.shape[0], -1, *like.shape[2:])
            )
            exported += tensors[full].numel()
    others = sorted(key for key in tensors if ".lora_A." not in key and ".lora_B." not in key)

    folder = Path(path)
    (folder / PROBES).parent.mkdir(parents=True, exist_ok=True)
    whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})
    save_file(probes, folder / PROBES)
    _exported_config(model, adapter_name, pairs, layout, widths).save_pretrained(folder)
    lost = sum(float((s**2).sum() - (s[: kept[n]] ** 2).sum()) for n, (_, s, _) in points.items())
    total = sum(float((s**2).sum()) for _, s, _ in points.values())
    cost = {pair.name: pair.d_in + pair.d_out for pair in pairs}
    return Export(
        folder,
        layout,
        kept,
        sum(kept[name] * cost[name] for name in kept),
        exported,
        (max(lost, 0.0) / total) ** 0.5 if total else 0.0,
        trials,
        others,
    )


@torch.no_grad()
def verify(path: str | Path, base: nn.Module | str | Path | None = None) -> dict[str, float]:
    """Check a saved adapter: stock peft's delta W times the probes that export wrote beside it.

    Args:
        path: folder written by `export`.
        base: the base model, fresh, or where to load it from; None for the name in the adapter.
            A module is given back unchanged.

    Returns:
        {layer: max|dW x - expected| / max|expected|}, where expected is zero the absolute error.

    Raises:
        VerificationError: a layer is missing, superfluous or computes something else.
        AdapterError: no adapter, or no probes, in the folder.
    """
    from peft import PeftModel
    from safetensors.torch import load_file

    folder = Path(path)
    _demand_adapter(folder)
    if not (folder / PROBES).is_file():
        raise AdapterError(
            f"verify: `path` must hold {PROBES}; {folder} does not. Write it with geolora.export."
        )
    probes = load_file(folder / PROBES)
    if base is None or isinstance(base, str | Path):
        base = load_base(folder, base)
    loaded = PeftModel.from_pretrained(base, str(folder))
    try:
        errors = _probe_errors(loaded, probes)
    finally:
        loaded.unload()
    return errors


def inspect(path: str | Path, tail: float = 0.1) -> list[LayerReport]:
    """Rank and singular values of every layer of a saved LoRA adapter, geolora's or not.

    Args:
        path: a PEFT adapter folder; the base model is not needed.
        tail: the tail for which `tail_rank` and `share_of_tail` are given.

    Returns:
        One row per layer: its numerical rank, singular values of s B A in descending order, the
        rank needed for the given tail, and ||what that would drop|| / ||sigma||.
    """
    from safetensors.torch import load_file

    folder = Path(path)
    _demand_adapter(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / WEIGHTS)
    rows = []
    for key in tensors:
        if not key.endswith(".lora_A.weight"):
            continue
        name = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
        A = tensors[key].flatten(1)
        B = tensors[key.replace(".lora_A.", ".lora_B.")].flatten(1)
        sigma = read_pair(A, B, _saved_scale(config, name)).sigma
        sigma = sigma[sigma > 0]
        rank = int(rank_by_tail(sigma, tail)) if sigma.numel() else 0
        size = float(torch.linalg.vector_norm(sigma))
        share = float(torch.linalg.vector_norm(sigma[rank:])) / size if size else 0.0
        shape = (B.shape[0], A.shape[1])
        rows.append(LayerReport(name, *shape, sigma.numel(), sigma.tolist(), rank, share))
    if not rows:
        raise AdapterError(f"inspect: `path` must hold LoRA pairs; {folder} has none.")
    return rows


def load_adapter(path: str | Path, base: str | Path | None = None) -> Any:
    """A saved LoRA adapter over its base model, as a PeftModel.

    Raises:
        AdapterError: no adapter in the folder, or a base model that cannot be loaded.
    """
    from peft import PeftModel

    folder = Path(path)
    _demand_adapter(folder)
    return PeftModel.from_pretrained(load_base(folder, base), str(folder))


def load_base(folder: Path, base: str | Path | None = None) -> nn.Module:
    """The base model an adapter folder belongs to, loaded with `transformers`."""
    import transformers
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = str(base or config.get("base_model_name_or_path") or "")
    if not name:
        raise AdapterError(
            f"geolora: {folder / CONFIG} names no base model. Say which one with `base`."
        )
    kinds = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
    auto = getattr(transformers, kinds.get(config.get("task_type") or "", "AutoModel"))
    options = {}
    if config.get("task_type") == "SEQ_CLS":
        heads = [
            value.shape[0]
            for key, value in load_file(folder / WEIGHTS).items()
            if value.dim() == 2 and re.search(r"(classifier|score)(\.out_proj)?\.weight$", key)
        ]
        options = {"num_labels": heads[-1]} if heads else {}
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the head comes with the adapter
    logging.disable_progress_bar()
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise AdapterError(f"geolora: base model `{name}` cannot be loaded: {first}") from error
    finally:
        logging.set_verbosity(level)


# ---- reading ------------------------------------------------------------------------------------


def _settled_points(pairs: list[Pair]) -> tuple[dict[str, tuple[Tensor, Tensor, Tensor]], int]:
    """{layer: (U, sigma, V)} of the settled directions, float64; and how many trials were left."""
    points, trials = {}, 0
    for pair in pairs:
        A, B = pair.A.flatten(1), pair.B.flatten(1)
        reading = read_pair(A, B, pair.scale)
        on_trial = slot_ranks(A, B)[1]
        rank = int((reading.sigma > 0).sum()) - on_trial
        trials += on_trial
        points[pair.name] = (reading.U[:, :rank], reading.sigma[:rank], reading.V[:, :rank])
    return points, trials


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


def _probes_of(pair: Pair, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(zlib.crc32(pair.name.encode()))
    x = torch.randn(pair.d_in, PROBE_COUNT, generator=generator, dtype=torch.float64)
    y = B.cpu() @ (A.cpu() @ x)
    return {f"{pair.name}.x": x.float(), f"{pair.name}.y": y.float()}


def _probe_errors(loaded: nn.Module, probes: Mapping[str, Tensor]) -> dict[str, float]:
    from peft.tuners.lora import LoraLayer

    layers = {
        name.removeprefix(PREFIX): module
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
    expected = {key.removesuffix(".x") for key in probes if key.endswith(".x")}
    if wrong := sorted(set(layers) ^ expected):
        raise VerificationError(
            f"verify: the adapter and its probes must have the same layers; {wrong[0]} is only in "
            f"{'the adapter' if wrong[0] in layers else 'the probes'}."
        )
    errors = {}
    for name, layer in layers.items():
        x, y = probes[f"{name}.x"], probes[f"{name}.y"]
        delta = layer.get_delta_weight("default").detach().cpu()
        if getattr(layer, "fan_in_fan_out", False):
            delta = delta.mT
        got = delta.flatten(1).double() @ x.double()
        size = float(y.abs().max())
        errors[name] = float((got - y).abs().max()) / (size or 1.0)
        stored = next(iter(layer.lora_A.values())).weight.dtype
        bound = 100 * max(torch.finfo(stored).eps, torch.finfo(torch.float32).eps)
        if not errors[name] <= bound:
            raise VerificationError(
                f"verify: layer `{name}` must compute what was trained; relative error "
                f"{errors[name]:.2e}, allowed {bound:.0e}. The file was changed or a patterned "
                "rank or alpha was not applied; export it again."
            )
    return errors


# ---- writing ------------------------------------------------------------------------------------


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


def _saved_scale(config: dict[str, Any], name: str) -> float:
    """s of a layer as peft computes it on load."""
    from peft.utils.other import get_pattern_key

    def of(pattern: str, default: float) -> float:
        table = config.get(pattern) or {}
        return table.get(get_pattern_key(table.keys(), name), default)

    r, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _demand_adapter(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"geolora: `path` must be a PEFT adapter folder; {folder} has no {name}."
            )


def as_rows(reports: list[LayerReport]) -> list[dict[str, Any]]:
    """Plain dicts of `inspect`'s rows, for JSON."""
    return [asdict(report) for report in reports]
