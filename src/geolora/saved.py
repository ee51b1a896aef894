"""Adapters read back from files: verify, inspect, load.

Any PEFT LoRA adapter can be inspected; `verify` needs the probes that `export` writes.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.adapter import CONFIG, PROBES, WEIGHTS
from geolora.errors import AdapterError, SettingError, VerificationError
from geolora.factors import read_pair
from geolora.kernels.truncate import rank_by_tail
from geolora.pairs import PREFIX


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
        AdapterError: no adapter, or no probes, in the folder.
    """
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
    return _probe_errors(_over(base, folder), probes, _stored_dtype(folder))


def inspect(path: str | Path, tail: float = 0.25) -> list[LayerReport]:
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
    if not 0 <= tail < 1:
        raise SettingError(f"inspect: `tail` must be in [0, 1); got {tail}.")
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
    folder = Path(path)
    _demand_adapter(folder)
    return _over(load_base(folder, base), folder)


def _over(base: nn.Module, folder: Path) -> Any:
    """PeftModel of a base and a saved adapter; every tensor of the file must find its place."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    name = type(base).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys: told below, by name
            loaded = PeftModel.from_pretrained(base, str(folder))
            held = get_peft_model_state_dict(loaded)
    except (ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise AdapterError(f"geolora: {folder} does not fit {name}: {first}") from error
    wrong = sorted(set(held) ^ set(load_file(folder / WEIGHTS)))
    if wrong:
        raise AdapterError(
            f"geolora: {folder} does not fit {name}: `{wrong[0]}` is only in one of them. Give the "
            "model the adapter was trained on, with its head."
        )
    return loaded


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the pairs in the file."""
    from safetensors.torch import load_file

    return next(t.dtype for k, t in load_file(folder / WEIGHTS).items() if ".lora_A." in k)


def load_base(folder: Path, base: str | Path | None = None) -> nn.Module:
    """The base model an adapter folder belongs to, loaded with `transformers`."""
    import transformers
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    name = str(base or config.get("base_model_name_or_path") or "")
    if not name:
        raise AdapterError(
            f"geolora: {folder / CONFIG} names no base model. Say which one with `base`."
        )
    options = {}
    if config.get("task_type") == "SEQ_CLS":
        heads = [
            value.shape[0]
            for key, value in load_file(folder / WEIGHTS).items()
            if value.dim() == 2
            and re.search(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$", key)
        ]
        options = {"num_labels": heads[-1]} if heads else {}
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the head comes with the adapter
    logging.disable_progress_bar()
    kinds = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
    try:
        auto = kinds.get(config.get("task_type") or "")
        if auto is None:  # the class the base was saved as
            saved_as = transformers.AutoConfig.from_pretrained(name).architectures or ["AutoModel"]
            auto = saved_as[0] if hasattr(transformers, saved_as[0]) else "AutoModel"
        return getattr(transformers, auto).from_pretrained(name, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise AdapterError(f"geolora: base model `{name}` cannot be loaded: {first}") from error
    finally:
        logging.set_verbosity(level)


def as_rows(reports: list[LayerReport]) -> list[dict[str, Any]]:
    """Plain dicts of `inspect`'s rows, for JSON."""
    return [asdict(report) for report in reports]


def _probe_errors(
    loaded: nn.Module, probes: Mapping[str, Tensor], stored: torch.dtype
) -> dict[str, float]:
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
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
        bound = max(100 * torch.finfo(torch.float32).eps, 2 * torch.finfo(stored).eps)
        if not errors[name] <= bound:
            raise VerificationError(
                f"verify: layer `{name}` must compute what was trained; relative error "
                f"{errors[name]:.2e}, allowed {bound:.0e}. The file was changed or a patterned "
                "rank or alpha was not applied; export it again."
            )
    return errors


def _saved_scale(config: dict[str, Any], name: str) -> float:
    """s of a layer as peft computes it on load."""
    from peft.utils.other import get_pattern_key

    def of(pattern: str, default: float) -> float:
        table = config.get(pattern) or {}
        return table.get(get_pattern_key(list(table), name), default)

    r, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
    return alpha / (r**0.5 if config.get("use_rslora") else r)


def _demand_adapter(folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterError(
                f"geolora: `path` must be a PEFT adapter folder; {folder} has no {name}."
            )
    try:
        json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        load_file(folder / WEIGHTS)
    except (ValueError, OSError, SafetensorError) as error:
        raise AdapterError(f"geolora: {folder} cannot be read: {error}.") from error
