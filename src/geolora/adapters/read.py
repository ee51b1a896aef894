"""Adapter folders, read as data: nothing in them is trusted, unpickled or run.

| in the folder                                          | treated                             |
|--------------------------------------------------------|-------------------------------------|
| pairs of any rank, scale, pattern, kernel or dtype     | read                                |
| heads, biases and embeddings beside the pairs          | kept as they are                    |
| symbolic links, wherever they lead                     | followed: the Hub's cache is made of |
|                                                        | them, and they too are only data    |
| keys of a newer peft                                   | left out as peft does, with a warning |
| LoRA on embeddings                                     | not read, with a warning            |
| `auto_mapping`, which names a module to import         | its class is looked up in transformers, and nowhere else |
| `adapter_model.bin`                                    | refused: a pickle can run code      |
| other methods, DoRA and other variants, `megatron_core` | refused: not W0 + s B A            |
| pissa, olora, corda, loftq, lora_ga without conversion | refused: W0 is another              |
| factors that are missing, misshapen or not finite      | refused, by name                    |
| patterns that take seconds to match, or are too many   | refused, by name                    |
| a key twice, NaN or Infinity in a JSON file            | refused                             |
"""

import dataclasses
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geolora.adapters.names import CONFIG, HUB_NAME, WEIGHTS
from geolora.adapters.patterns import Table
from geolora.errors import AdapterError, GeoloraWarning, at_most_three, first_line, shown
from geolora.files.reading import exists, is_folder, read_json
from geolora.pairs.find import PREFIX

NOT_PAIRS = {
    "use_dora": "DoRA rescales W0 + s B A with trained magnitudes",
    "use_qalora": "QALoRA pools the inputs of A",
    "use_bdlora": "BD-LoRA holds the blocks of block-diagonal factors",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "arrow_config": "Arrow routes tokens between several adapters",
    "kasa_config": "KaSA takes small singular values out of W0",
    "monteclora_config": "MonteCLoRA samples around its factors",
    "megatron_config": "a layer holds a part of its factors, and a module is imported by name",
}
"""Setting of a LoraConfig → why an adapter that sets it is not W0 + s B A."""

KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave W0 as it is."""

LARGEST = 1e60
"""Bound on s ||A|| ||B||; float32 stays far below it, float64 arithmetic far above."""

LONGEST_NAME = 1_000
"""Characters of the name of a tensor."""
SAVE_AGAIN = "Save the adapter again with peft's save_pretrained."


@dataclass(frozen=True)
class SavedPair:
    """One LoRA pair of a file: A (r, d_in), B (d_out, r), kernels flattened; W = scale * B @ A."""

    name: str
    A: Tensor
    B: Tensor
    scale: float

    @property
    def d_in(self) -> int:
        """Columns of W."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Rows of W."""
        return self.B.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.d_in + self.d_out


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder that has been read and checked.

    Attributes:
        folder: where it is.
        config: adapter_config.json.
        tensors: everything in the weights file, by key.
        pairs: its LoRA pairs, by name and number.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    pairs: list[SavedPair]


def read_adapter(path: str | Path) -> SavedAdapter:
    """Read a PEFT LoRA adapter folder and check all that is used of it.

    Raises:
        AdapterError: it is no such folder, or one of the refused ones (table above).
    """
    folder = Path(path)
    _demand_files(folder)
    config = read_object(folder / CONFIG)
    _check_config(folder / CONFIG, config)
    tensors = read_tensors(folder / WEIGHTS)
    return SavedAdapter(folder, config, tensors, _read_pairs(folder, config, tensors))


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; raises `AdapterError`."""
    try:
        value = read_json(file, finite=True)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {first_line(error)}.") from error
    except ValueError as error:
        raise AdapterError(f"{file} must hold JSON: {first_line(error)}. {SAVE_AGAIN}") from error
    if not isinstance(value, dict):
        raise AdapterError(
            f"{file} must hold a JSON object; got a {type(value).__name__}. {SAVE_AGAIN}"
        )
    return value


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises `AdapterError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AdapterError(
            f"{file} cannot be read: {first_line(error)}. It is no whole safetensors file; copy or "
            "save it again."
        ) from error
    if odd := [key for key in tensors if not key.isprintable() or len(key) > LONGEST_NAME]:
        raise AdapterError(
            f"{file}: names must be printable, and of {LONGEST_NAME:,} characters at most; got {shown(odd[0])}. "
            f"{SAVE_AGAIN}"
        )
    return tensors


# ---- the folder ---------------------------------------------------------------------------------


def _demand_files(folder: Path) -> None:
    needed = "`path` must be a PEFT adapter folder"
    if not exists(folder):
        download = f"; an adapter of the Hub has to be here first: hf download {folder} --local-dir adapter"
        hint = download if HUB_NAME.fullmatch(str(folder)) else ""
        raise AdapterError(f"{needed}; {folder} does not exist{hint}.")
    if not is_folder(folder):
        raise AdapterError(f"{needed}; {folder} is a file. Give the folder that holds {CONFIG}.")
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{needed}; {folder} has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        pickled = "; adapter_model.bin is a pickle, which can run code and is not opened"
        raise AdapterError(
            f"{needed}; {folder} has no {WEIGHTS}"
            + (
                f"{pickled}. Convert it in a trusted environment, with peft's "
                "save_pretrained(safe_serialization=True)."
                if (folder / "adapter_model.bin").exists()
                else f". {SAVE_AGAIN}"
            )
        )


# ---- adapter_config.json ------------------------------------------------------------------------


def _check_config(file: Path, config: dict[str, Any]) -> None:
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in config:
            raise AdapterError(f"{file} must have `{key}`; it does not. {SAVE_AGAIN}")
    if config["peft_type"] != "LORA":
        raise AdapterError(
            f"{file}: `peft_type` must be LORA; got {shown(config['peft_type'])}. Only LoRA is "
            "W0 + s B A."
        )
    _demand(file, "`r`", config["r"], _is_rank, "an integer above 0")
    _demand(file, "`lora_alpha`", config["lora_alpha"], _is_size, "a number above 0")
    rslora = config.get("use_rslora", False)
    _demand(file, "`use_rslora`", rslora, lambda v: v in (True, False, None), "true or false")
    for key, right, needed in (
        ("rank_pattern", _is_rank, "an integer above 0"),
        ("alpha_pattern", _is_size, "a number above 0"),
    ):
        table = config.get(key)
        is_table = table is None or isinstance(table, dict)
        _demand(file, f"`{key}`", table, lambda _, ok=is_table: ok, "an object of names and values")
        for pattern, value in (table or {}).items():
            _demand(file, f"`{key}` of {shown(pattern)}", value, right, needed)
    for key, reason in NOT_PAIRS.items():
        if config.get(key):
            raise AdapterError(
                f"{file}: `{key}` is set: {reason}, so the singular values of s B A are not those "
                "of the update. Use peft itself for this adapter."
            )
    start = config.get("init_lora_weights", True)
    if start not in KEEPS_BASE:
        raise AdapterError(
            f"{file}: the start {shown(start)} changed the base weights, so s B A is not the whole "
            "update. Convert it with peft's save_pretrained("
            "path_initial_model_for_weight_conversion=…)."
        )
    _warn_of_unknown(file, config)


def _demand(file: Path, what: str, value: object, right: Any, needed: str) -> None:
    if not right(value):
        raise AdapterError(f"{file}: {what} must be {needed}; got {shown(value)}. {SAVE_AGAIN}")


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_size(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def _warn_of_unknown(file: Path, config: dict[str, Any]) -> None:
    import peft

    known = {spec.name for spec in dataclasses.fields(peft.LoraConfig)}
    if unknown := [f"`{key}`"[:60] for key, value in config.items() if value and key not in known]:
        warnings.warn(
            f"{file}: peft {peft.__version__} does not know {at_most_three(unknown)} and leaves "
            "them out, and so do we. Upgrade peft if the adapter needs them.",
            GeoloraWarning,
            stacklevel=4,
        )


# ---- the pairs ----------------------------------------------------------------------------------


def _read_pairs(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> list[SavedPair]:
    file = folder / WEIGHTS
    sides: dict[str, dict[str, Tensor]] = {}
    embeddings = []
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", key):
            sides.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
        elif match := re.fullmatch(r"(.+)\.lora_embedding_[AB]", key):
            embeddings.append(match[1].removeprefix(PREFIX))
        elif re.search(r"(^|\.)lora_", key) and not key.endswith(".lora_B.bias"):
            raise AdapterError(
                f"{file}: {shown(key)} is no tensor of a PEFT LoRA file, which has "
                f"<layer>.lora_A.weight and <layer>.lora_B.weight. {SAVE_AGAIN}"
            )
    if not sides:
        raise AdapterError(f"`path` must hold LoRA pairs; {folder} has none.")
    if embeddings := list(dict.fromkeys(embeddings)):
        warnings.warn(
            f"{file}: LoRA on embeddings ({at_most_three(embeddings)}) is left out: it has another "
            "rank and scale rule than the pairs.",
            GeoloraWarning,
            stacklevel=3,
        )
    names = sorted(sides, key=_in_order)
    ranks, alphas = (
        Table(folder / CONFIG, key, config.get(key) or {}, names)
        for key in ("rank_pattern", "alpha_pattern")
    )
    pairs = []
    for name in names:
        r, alpha = ranks.of(name, config["r"]), float(alphas.of(name, config["lora_alpha"]))
        scale = alpha / (r**0.5 if config.get("use_rslora") else r)
        if config.get("target_parameters") and _are_experts(sides[name], r):
            raise AdapterError(
                f"{folder / CONFIG}: `target_parameters` is set: the factors of all experts of {shown(name)} are "
                "interleaved, so the singular values of s B A are not those of the update. Use peft itself for this "
                "adapter."
            )
        pairs.append(_read_pair(file, name, sides[name], r, scale))
    largest = max(max(pair.d_in, pair.d_out, pair.A.shape[0]) for pair in pairs)
    for rank in (
        config["r"],
        *ranks.values,
    ):  # peft makes factors of it before it looks at the file
        if rank > largest:
            raise AdapterError(
                f"{folder / CONFIG}: a rank must be at most {largest}, the longest side in {WEIGHTS}; got {rank}. "
                f"{SAVE_AGAIN}"
            )
    return pairs


def _are_experts(both: dict[str, Tensor], rank: int) -> bool:
    """Whether factors are those of several experts side by side, a rank for each; of one they are an ordinary pair."""
    rows = both["A"].shape[0] if "A" in both and both["A"].dim() else 0
    return rows > rank and rows % rank == 0


def _in_order(name: str) -> list[str | int]:
    """Sorts layer 2 before layer 10."""
    return [int(text) if i % 2 else text for i, text in enumerate(re.split(r"(\d+)", name))]


def _read_pair(
    file: Path, name: str, both: dict[str, Tensor], rank: int, scale: float
) -> SavedPair:
    """The checked pair of a layer, whose rank and scale are as peft computes them on load."""
    for side, other in ("AB", "BA"):
        if side not in both:
            raise AdapterError(
                f"{file}: {shown(name)} has lora_{other} without lora_{side}. {SAVE_AGAIN}"
            )
    shapes = {side: tuple(tensor.shape) for side, tensor in both.items()}
    for side, tensor in both.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or not tensor.numel():
            raise AdapterError(
                f"{file}: lora_{side} of {shown(name)} must be a matrix of floating-point numbers; "
                f"got {tensor.dtype} {shapes[side]}. {SAVE_AGAIN}"
            )
    A, B = both["A"].flatten(1), both["B"].flatten(1)
    if not A.shape[0] == B.shape[1] == rank:
        raise AdapterError(
            f"{file}: {shown(name)} must have A ({rank}, d_in) and B (d_out, {rank}), the rank in "
            f"{CONFIG}; got A {shapes['A']} and B {shapes['B']}. {SAVE_AGAIN}"
        )
    for side, factor in (("A", A), ("B", B)):
        if wrong := int((~torch.isfinite(factor.double())).sum()):
            raise AdapterError(
                f"{file}: lora_{side} of {shown(name)} must be finite; {wrong} of {factor.numel()} "
                "numbers are NaN or infinite. Take an earlier checkpoint."
            )
    if not scale * float(A.double().norm()) * float(B.double().norm()) <= LARGEST:
        raise AdapterError(
            f"{file}: s B A of {shown(name)} must be below {LARGEST:.0e}; s = {scale:.1e}. "
            "Take an earlier checkpoint."
        )
    return SavedPair(name, A, B, scale)
