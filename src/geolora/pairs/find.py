"""Finds the LoRA pairs of a PEFT model and accepts or refuses each, with the reason.

This folder and `adapters/` are what knows PEFT; `training/` calls its methods.

| layer                                                     | treated                          |
|-----------------------------------------------------------|----------------------------------|
| Linear, HF Conv1D, every quantised Linear                 | yes: A (r, d_in), B (d_out, r)   |
| Conv1d / Conv2d / Conv3d, groups = 1                      | yes: kernel flattened into d_in  |
| MultiheadAttention                                        | trained; not exported by us      |
| Embedding                                                 | no: AdamW, with a warning        |
| grouped convolution                                       | refused: block structure         |
| DoRA and every other variant (QALoRA, aLoRA, KaSA, …)     | refused: not W0 + s B A          |
| ParamWrapper of a matrix (`target_parameters`, a router)  | yes: A (r, d_in), B (d_out, r)   |
| ParamWrapper of MoE experts                               | refused, but by RiemannianAdamW  |
| AdaLoRA                                                   | refused: three factors           |
| tied pairs (shared storage)                               | refused: one matrix, two layers  |
| FSDP2's DTensors                                          | gathered by optimizers, export, prune; refused by starts |
| tensor-parallel, ZeRO-partitioned factors                 | refused: the step needs whole A, B |
| factors on MPS                                            | refused: no float64              |
| factors on meta, on two devices, with NaN or infinities   | refused                          |
| one of the two factors frozen                             | refused                          |
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn

from geolora.errors import BudgetError, PairingError, SettingError, SetupError, at_most_three
from geolora.pairs.sharded import gathered, local_shard

PREFIX = "base_model.model."
KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` that leave W0 as it is."""
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")
"""What DistributedDataParallel and torch.compile put before a name."""


@dataclass(frozen=True)
class Pair:
    """One LoRA pair, W = scale * B @ A.

    A is (r, d_in) and B (d_out, r); for a convolution A is (r, in, *kernel) and B (out, r, 1, …),
    to be flattened after the first dimension.
    """

    name: str
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    experts: int = 1
    """Pairs that share the factors: expert e has A[e r : (e + 1) r] and B[:, e :: experts]."""

    @property
    def r(self) -> int:
        """Physical width: slots of the pair, of one expert."""
        return self.A.shape[0] // self.experts

    @property
    def d_in(self) -> int:
        """Columns of W; a kernel is flattened."""
        return math.prod(self.A.shape[1:])

    @property
    def d_out(self) -> int:
        """Rows of W."""
        return self.B.shape[0]

    @property
    def cost(self) -> int:
        """Parameters of one direction."""
        return self.d_in + self.d_out

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, d_in) and B (d_out, r), kernels flattened; of sharded factors, for which every process must call."""
        return gathered(self.A).flatten(1), gathered(self.B).flatten(1)

    @torch.no_grad()
    def set_factors(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Write A (r, d_in) and B (d_out, r) into the pair, kernels flattened or not."""
        self.A.copy_(A.reshape(self.A.shape))
        self.B.copy_(B.reshape(self.B.shape))


def find_pairs(
    model: nn.Module,
    adapter_name: str | None = None,
    with_experts: bool = False,
    with_sharded: bool = False,
) -> list[Pair]:
    """All pairs of one adapter of a model, in the model's order.

    Args:
        model: a PeftModel, or any module with injected LoRA layers.
        adapter_name: which adapter; None for the active one.
        with_experts: take the pairs of MoE experts too, instead of refusing them.
        with_sharded: take factors that are DTensors too, instead of refusing them.

    Raises:
        PairingError: the model has no LoRA pair, several active adapters and no name was given, or
            a layer that cannot be treated (table above).
        SettingError: an unknown adapter, a rank above min(d_out, d_in), a scale that is not positive.
        SetupError: sharded or partitioned factors.
    """
    adapter = adapter_of(model, adapter_name)
    pairs = []
    for name, layer in lora_layers(model):
        if adapter in layer.lora_A:
            _refuse(name, layer, adapter, with_experts)
            pair = Pair(
                name,
                layer.lora_A[adapter].weight,
                layer.lora_B[adapter].weight,
                float(layer.scaling[adapter]),
                getattr(layer, "num_experts", 1),
            )
            _check(pair, with_sharded)
            pairs.append(pair)
    if not pairs:
        raise PairingError(
            f"geolora: adapter `{adapter}` must have at least one linear or convolution layer; it "
            "has none (embeddings are left to AdamW). Add linear layers to `target_modules`."
        )
    _refuse_tied(pairs)
    return pairs


def unpaired_lora_layers(model: nn.Module, adapter_name: str | None = None) -> list[str]:
    """Names of the adapter's LoRA layers that are no pairs (embeddings)."""
    adapter = adapter_of(model, adapter_name)
    return [name for name, layer in lora_layers(model) if adapter in layer.lora_embedding_A]


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name in the base model, layer) of every LoRA layer of a model, PEFT's subclasses included."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield WRAPPERS.sub("", name).removeprefix(PREFIX), module


def adapter_of(model: nn.Module, adapter_name: str | None = None) -> str:
    """The adapter of that name, or the active one; raises as `find_pairs`."""
    layers = list(lora_layers(model))
    if not layers:
        raise PairingError(
            "geolora: `model` must have LoRA layers; found none. "
            "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    known = sorted({key for _, layer in layers for key in (*layer.lora_A, *layer.lora_embedding_A)})
    if adapter_name is not None:
        if adapter_name not in known:
            raise SettingError(
                f"geolora: `adapter_name` must be one of {known}; got {adapter_name!r}."
            )
        return adapter_name
    active = sorted({key for _, layer in layers for key in layer.active_adapters if key in known})
    if len(active) != 1:
        raise PairingError(
            f"geolora: `adapter_name` is needed where not exactly one adapter is active; active "
            f"are {active} of {known}."
        )
    return active[0]


def start_of(model: nn.Module, adapter_name: str | None = None) -> Any:
    """`init_lora_weights` of an adapter; None for a model that has no configuration of it."""
    held: Any = getattr(model, "module", model)
    config = getattr(held, "peft_config", {}).get(adapter_of(model, adapter_name))
    return getattr(config, "init_lora_weights", None)


def _refuse(name: str, layer: Any, adapter: str, with_experts: bool) -> None:
    from peft.tuners.lora import ParamWrapper

    kind = type(layer).__name__
    base = layer.get_base_layer()
    reason = None
    if hasattr(layer, "lora_E"):
        reason = "an AdaLoRA layer has three factors. Use LoraConfig instead of AdaLoraConfig"
    elif isinstance(layer, ParamWrapper) and layer.num_experts > 1 and not with_experts:
        reason = (
            "the factors of all experts are interleaved. Leave the experts out of `target_parameters` and "
            "of `target_modules`, where 'all-linear' takes them too"
        )
    elif layer.lora_variant.get(adapter) is not None:
        variant = type(layer.lora_variant[adapter]).__name__
        reason = f"{variant} (DoRA or the like) is not W0 + s B A. Switch it off in LoraConfig"
    elif getattr(base, "groups", 1) != 1:
        reason = (
            f"a convolution with groups={base.groups} has a block structure. "
            "Leave this layer out of `target_modules`"
        )
    elif kind == "LoraParallelLinear":
        reason = "a tensor-parallel layer holds a part of its factor. Use DDP"
    if reason is not None:
        raise PairingError(f"geolora: layer `{name}` ({kind}) cannot be trained: {reason}.")


def _check(pair: Pair, with_sharded: bool) -> None:
    factors = (pair.A, pair.B)
    refuse_unreachable(pair.name, *(map(gathered, factors) if with_sharded else factors))
    if pair.r > min(pair.d_out, pair.d_in):
        raise SettingError(
            f"geolora: rank must be at most min(d_out, d_in); got r={pair.r} for "
            f"{pair.d_out} x {pair.d_in} in `{pair.name}`. Lower `r`, or leave this layer out"
            f"{_of_head(pair.name)}."
        )
    if pair.scale <= 0:
        raise SettingError(
            f"geolora: LoRA's scaling must be positive; got {pair.scale} in `{pair.name}`. "
            "Set `lora_alpha` = r."
        )


def _of_head(name: str) -> str:
    """What else helps where a layer is the head of a classifier."""
    if not {"classifier", "score", "qa_outputs", "classification_head"} & set(name.split(".")):
        return ""
    return ': with task_type in LoraConfig ("SEQ_CLS", say) peft trains and saves the head itself'


def factor_modules(model: nn.Module, adapter: str) -> dict[str, tuple[nn.Module, nn.Module]]:
    """{layer: the modules whose `weight` is A, and B} of an adapter's pairs."""
    return {
        name: (layer.lora_A[adapter], layer.lora_B[adapter])
        for name, layer in lora_layers(model)
        if adapter in layer.lora_A
    }


def refuse_unused(model: nn.Module, adapter: str) -> None:
    """Raise `SetupError` where the forward pass does not go through the adapter."""
    for name, layer in lora_layers(model):
        if adapter in layer.lora_A and (
            adapter not in layer.active_adapters or layer.disable_adapters or layer.merged
        ):
            raise SetupError(
                f"geolora: adapter `{adapter}` must be active and not merged; in `{name}` it is "
                "not. Call model.set_adapter first, or unmerge it."
            )


def refuse_frozen(pairs: list[Pair]) -> None:
    """Raise `PairingError` for pairs of which a factor does not require gradients."""
    for pair in pairs:
        frozen = [n for n, factor in (("A", pair.A), ("B", pair.B)) if not factor.requires_grad]
        if frozen:
            raise PairingError(
                f"geolora: both factors of `{pair.name}` must be trainable; {' and '.join(frozen)} "
                "frozen. Make the adapter active (model.set_adapter) or load it with "
                "is_trainable=True."
            )


def check_budget(
    costs: Iterable[int],
    budget: int | None,
    name: str = "geolora: `budget`",
    advice: str = " Raise it, or target fewer layers.",
) -> None:
    """Raise `BudgetError` where a budget does not hold one direction in every layer.

    Args:
        costs: parameters of one direction of every layer.
        name, advice: how the message begins and ends.
    """
    least = sum(costs)
    if budget is not None and not (isinstance(budget, Real) and budget == budget // 1):
        raise BudgetError(f"{name} must be a whole number of parameters; got {budget!r}.")
    if budget is not None and budget < least:
        raise BudgetError(
            f"{name} must hold one direction in every layer, {least} parameters; got {budget}.{advice}"
        )


def refuse_unreachable(name: str, *factors: torch.Tensor) -> None:
    """Raise `SetupError` for factors that are parts of a matrix (DTensor, ZeRO), on MPS, without
    data (meta), on several devices, or not finite.
    """
    for factor in factors:
        if factor.device.type == "mps":
            raise SetupError(
                f"geolora: the factors of `{name}` are on MPS, which has no float64. "
                "Use the CPU (in TrainingArguments: use_cpu=True)."
            )
        if hasattr(factor, "ds_shape") or hasattr(factor, "ds_id") or factor.ndim < 2:
            raise SetupError(
                f"geolora: the factors of `{name}` are partitioned (DeepSpeed ZeRO hands over flat "
                "pieces). Use DDP, or ZeRO stage 0: the step needs whole factors."
            )
        if hasattr(factor, "placements"):
            raise SetupError(
                f"geolora: the factors of `{name}` are sharded (DTensor), which optimizers "
                "and export can gather and this cannot. Use DDP, or do it before sharding."
            )
    devices = sorted({str(factor.device) for factor in factors})
    if len(devices) > 1:
        raise SetupError(
            f"geolora: the factors of `{name}` must be on one device; got {' and '.join(devices)}. "
            "Move the layer as a whole."
        )
    if devices == ["meta"]:
        raise SetupError(
            f"geolora: the factors of `{name}` are on the meta device, without data. Load the "
            "weights first (low_cpu_mem_usage=False in get_peft_model)."
        )
    for side, factor in zip("AB", factors, strict=False):
        if not bool(torch.isfinite(factor).all()):
            raise SetupError(
                f"geolora: the factors of `{name}` must be finite; {side} holds NaN or infinities. "
                "Take an earlier checkpoint."
            )


def _refuse_tied(pairs: list[Pair]) -> None:
    seen: dict[int, str] = {}
    for pair in pairs:
        for factor in (pair.A, pair.B):
            pointer = local_shard(factor).untyped_storage().data_ptr()
            if pointer and pointer in seen:
                names = at_most_three([seen[pointer], pair.name])
                raise PairingError(
                    f"geolora: pairs must not share storage; {names} do (tied weights). "
                    "Leave one of them out of `target_modules`."
                )
            seen[pointer] = pair.name
