"""Adapters read back from files: verify, inspect, load.

Any PEFT LoRA adapter can be inspected; `verify` needs the probes that `export` writes.
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from geolora.adapters.export import CONFIG
from geolora.adapters.read import (
    HUB_NAME,
    SavedAdapter,
    first_line,
    read_adapter,
    read_json,
    read_probes,
    shown,
)
from geolora.errors import AdapterError, BudgetError, SettingError, VerificationError
from geolora.kernels.truncate import rank_by_tail, settled_ranks
from geolora.pairs.find import PREFIX
from geolora.pairs.point import read_pair

FAILURES = (
    OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError, re.error,
    SafetensorError,
)  # fmt: skip
"""What peft and transformers raise for files that do not fit; their reason is passed on."""


@dataclass(frozen=True)
class LayerReport:
    """A row of `inspect`.

    Attributes:
        layer: name in the base model.
        d_out, d_in: shape of W; a kernel is flattened into d_in.
        rank: directions in use, the numerical rank of W = s B A.
        sigma: singular values of W, descending, as many as `rank`.
        tail_rank: rank needed for the tail.
        share_of_tail: ||what that would drop|| / ||sigma||.
        settled_rank: rank needed for the tail and within the budget over all layers, what
            `geolora.prune` leaves; `tail_rank` without a budget.
        share_dropped: ||what that would drop|| / ||sigma||.
    """

    layer: str
    d_out: int
    d_in: int
    rank: int
    sigma: list[float]
    tail_rank: int
    share_of_tail: float
    settled_rank: int
    share_dropped: float


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
    return _probe_errors(_over(base, saved), probes, stored)


def inspect(path: str | Path, tail: float = 0.25, budget: int | None = None) -> list[LayerReport]:
    """Rank and singular values of every layer of a saved LoRA adapter, geolora's or not.

    Args:
        path: a PEFT adapter folder; the base model is not needed.
        tail: fraction of ||sigma||_2 a layer may lose, in [0, 1).
        budget: adapter parameters to keep at most, sum of rank * (d_in + d_out); None for any.

    Returns:
        One row per layer, by name and number.

    Raises:
        SettingError: tail outside [0, 1). BudgetError: less than one direction per layer.
        AdapterError: no LoRA adapter that can be read in the folder.
    """
    if not 0 <= tail < 1:
        raise SettingError(f"inspect: `tail` must be in [0, 1); got {tail}.")
    pairs = read_adapter(path).pairs
    costs = [pair.B.shape[0] + pair.A.shape[1] for pair in pairs]
    if budget is not None and budget < sum(costs):
        raise BudgetError(
            f"inspect: `budget` must hold one direction in every layer, {sum(costs)} parameters; "
            f"got {budget}. Raise it."
        )
    sigmas = [read_pair(pair.A, pair.B, pair.scale).sigma for pair in pairs]
    sigmas = [sigma[sigma > 0] for sigma in sigmas]
    settled = settled_ranks(sigmas, costs, tail, budget)
    rows = []
    for pair, sigma, kept in zip(pairs, sigmas, settled, strict=True):
        by_tail, kept = int(rank_by_tail(sigma, tail)), min(kept, len(sigma))
        rows.append(
            LayerReport(
                pair.name,
                pair.B.shape[0],
                pair.A.shape[1],
                len(sigma),
                sigma.tolist(),
                by_tail,
                _share_after(sigma, by_tail),
                kept,
                _share_after(sigma, kept),
            )
        )
    return rows


def _share_after(sigma: Tensor, rank: int) -> float:
    """||sigma beyond a rank|| / ||sigma||; 0 for nothing at all."""
    size = float(torch.linalg.vector_norm(sigma))
    return float(torch.linalg.vector_norm(sigma[rank:])) / size if size else 0.0


def as_rows(reports: list[LayerReport]) -> list[dict[str, Any]]:
    """Plain dicts of `inspect`'s rows, for JSON, text and figures."""
    return [asdict(report) for report in reports]


# ---- over a base model --------------------------------------------------------------------------


def load_adapter(path: str | Path, base: str | Path | None = None) -> Any:
    """A saved LoRA adapter over its base model, as a PeftModel.

    Raises:
        AdapterError: no adapter that can be read, or a base model that cannot be loaded.
    """
    saved = read_adapter(path)
    return _over(load_base(saved, base), saved)


def _over(base: nn.Module, saved: SavedAdapter) -> Any:
    """PeftModel of a base and a saved adapter; every tensor of the file must find its place."""
    from peft import PeftModel, get_peft_model_state_dict

    name = type(base).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing keys: told below, by name
            loaded = PeftModel.from_pretrained(base, str(saved.folder))
            held = get_peft_model_state_dict(loaded)
    except FAILURES as error:
        raise AdapterError(
            f"{saved.folder} does not fit {name}: {first_line(error)}. Give the model the adapter "
            "was trained on as `base`."
        ) from error
    wrong = sorted(set(held) ^ set(saved.tensors))
    if wrong:
        where = "the adapter" if wrong[0] in saved.tensors else "the model"
        raise AdapterError(
            f"{saved.folder} does not fit {name}: `{wrong[0]}` is only in {where}. Give the model "
            "the adapter was trained on, with its head."
        )
    return loaded


def load_base(saved: SavedAdapter, base: str | Path | None = None) -> nn.Module:
    """The base model of an adapter, loaded with `transformers`; code beside it is never run.

    Args:
        saved: the adapter.
        base: a model folder or a name on the Hub; None for the one the adapter names, which must
            not climb out of the working directory.

    Raises:
        AdapterError: there is no such model, or it cannot be loaded.
    """
    import transformers

    name = _base_name(saved, base)
    options: dict[str, Any] = {}
    task = saved.config.get("task_type")
    if task == "SEQ_CLS":
        heads = [
            value.shape[0]
            for key, value in saved.tensors.items()
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
        if task in kinds:
            auto = getattr(transformers, kinds[task])
        else:  # the class the base was saved as
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            auto = getattr(transformers, (config.architectures or ["AutoModel"])[0], None)
            if not (isinstance(auto, type) and issubclass(auto, transformers.PreTrainedModel)):
                auto = transformers.AutoModel
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except FAILURES as error:
        raise AdapterError(
            f"base model `{name}` cannot be loaded: {first_line(error)}. Say another one with `base`."
        ) from error
    finally:
        logging.set_verbosity(level)


def _base_name(saved: SavedAdapter, given: str | Path | None) -> str:
    """The folder or Hub name of the base model, as far as it may be loaded."""
    name = str(given) if given else saved.config.get("base_model_name_or_path")
    file = saved.folder / CONFIG
    if not name:
        raise AdapterError(f"{file} names no base model. Say which one with `base`.")
    what = "`base`" if given else f"{file}: `base_model_name_or_path`"
    needed = f"{what} must be a model folder that exists, or a name on the Hub; got {shown(name)}"
    if not isinstance(name, str):
        raise AdapterError(f"{needed}. Say which one with `base`.")
    if not given and ".." in name.replace("\\", "/").split("/"):
        raise AdapterError(
            f"{needed}, which climbs out of the folder it was written in. If that is the model, "
            "say so with `base`."
        )
    if os.path.isdir(name):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        _check_model_folder(Path(name))
    elif not HUB_NAME.fullmatch(name):
        raise AdapterError(f"{needed}, which is neither. Say where it is with `base`.")
    return name


def _check_model_folder(folder: Path) -> None:
    """Refuse a base model folder that would lead transformers to files elsewhere."""
    if (folder / CONFIG).exists():
        raise AdapterError(
            f"base model `{folder}` cannot be loaded: it holds {CONFIG}, so it is an adapter itself. "
            "Say which model it was trained on with `base`."
        )
    for file in sorted(folder.glob("*.index.json")):
        shards = read_json(file).get("weight_map")
        for shard in shards.values() if isinstance(shards, dict) else [shards]:
            if not isinstance(shard, str) or _leads_elsewhere(shard):
                raise AdapterError(
                    f"{file}: `weight_map` must name files of its own folder; got {shown(shard)}. "
                    "Save the model again."
                )


def _leads_elsewhere(name: str) -> bool:
    """Whether a path is absolute or climbs, on any system."""
    paths = (PurePosixPath(name), PureWindowsPath(name))
    return any(path.anchor or ".." in path.parts for path in paths)


# ---- probes -------------------------------------------------------------------------------------


def _probe_errors(
    loaded: nn.Module, probes: Mapping[str, tuple[Tensor, Tensor]], stored: torch.dtype
) -> dict[str, float]:
    from peft.tuners.lora import LoraLayer

    layers: dict[str, Any] = {
        name.removeprefix(PREFIX): module
        for name, module in loaded.named_modules()
        if isinstance(module, LoraLayer)
    }
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
