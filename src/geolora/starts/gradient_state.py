"""What the starts share: the gradient's leading singular triplets, seen by passes over batches or read from a state.

How it is seen, without ever forming it: `gradient_pass.py`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geolora.adapters.read import read_tensors
from geolora.errors import GradientError, SettingError, SetupError, StateError
from geolora.kernels.sketch import Triplets, missing
from geolora.pairs.find import (
    Pair,
    adapter_of,
    factor_modules,
    find_pairs,
    refuse_frozen,
    refuse_unused,
)
from geolora.starts.gradient_pass import Loss, sketch_gradients

PASSES, TOLERANCE = 6, 0.1


@dataclass(frozen=True)
class GradientStart:
    """What a start did.

    Attributes:
        norm: ||W||_2 of every layer it started, in units of W.
        missing: {layer: estimated share of the energy of the gradient's best rank-r part that was not seen}.
        untouched: layers the loss does not depend on; they keep the start they had.
        loss_before, loss_after: means over the batches, where the norm was searched for.
    """

    norm: float
    missing: dict[str, float]
    untouched: list[str]
    loss_before: float | None = None
    loss_after: float | None = None


@dataclass(frozen=True)
class Gradients:
    """What is known of the gradients of all layers.

    Attributes:
        triplets: {layer: leading singular triplets of +G, as many as the pair has slots}.
        missing: {layer: estimated share of the energy of the gradient's best rank-r part that was not seen}.
    """

    triplets: dict[str, Triplets]
    missing: dict[str, float]

    @cached_property
    def untouched(self) -> list[str]:
        """Layers the loss does not depend on."""
        return [name for name, (_, sigma, _) in self.triplets.items() if not sigma.any()]


@dataclass
class GradientSource:
    """Where a start has the gradient from: a state, or passes over batches.

    The attributes are the arguments that all `initialize_*` share, under the same names.
    """

    model: nn.Module
    batches: Iterable[Any] | None
    loss_fn: Loss | None
    adapter_name: str | None
    state: dict[str, Tensor] | str | Path | None
    width: int | None
    passes: int
    tolerance: float
    fresh_batches: bool

    def fresh_pairs(self) -> list[Pair]:
        """The pairs to start; raises where one cannot be started."""
        return _fresh_pairs(self.model, adapter_of(self.model, self.adapter_name))

    def gradients(self, pairs: list[Pair]) -> Gradients:
        """The gradients of the pairs. Unless `fresh_batches`, the batches are drawn here, and kept."""
        if self.batches is not None and not self.fresh_batches:
            self.batches = list(self.batches)
        if self.state is not None:
            return _read_state(self.state, pairs)
        if self.batches is None:
            raise SettingError("`batches` must be given, or a `state`.")
        state = get_lora_one_state(
            self.model,
            self.batches,
            self.loss_fn,
            self.adapter_name,
            width=self.width,
            passes=self.passes,
            tolerance=self.tolerance,
            fresh_batches=self.fresh_batches,
        )
        return _read_state(state, pairs)


def get_lora_one_state(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None = None,
    adapter_name: str | None = None,
    *,
    width: int | None = None,
    passes: int = PASSES,
    tolerance: float = TOLERANCE,
    fresh_batches: bool = False,
) -> dict[str, Tensor]:
    """The leading singular triplets of every pair's gradient: to be saved, and used again.

        save_file(geolora.get_lora_one_state(model, batches), "start.safetensors")

    Passes over the batches go on until no layer misses more than `tolerance` of the energy of its
    best rank-r part, by estimate, or until there were `passes`. Dropout is off, all else is as the
    model stands (train or eval mode). The model is left as it was, gradients included.

    Args:
        model, batches, loss_fn, adapter_name: as in `initialize_lora_one`.
        width: k, directions that are followed, the adapter's rank or more; None for twice the
            rank. A layer has at most min(d_out, d_in).
        passes: at most so many passes over the batches, 2 or more.
        tolerance: share of energy, in [0, 1); 0 makes all `passes`.
        fresh_batches: iterate over `batches` anew in every pass (a DataLoader that shuffles then
            gives others); else they are drawn once and kept. All `passes` are made then, and what is
            missing is not known (NaN). A start without a `norm` draws them once more, and keeps those.

    Returns:
        For every layer, float32 on the CPU: `NAME.U` (d_out, r), `NAME.sigma` (r,), `NAME.V` (d_in, r) of
        +G, and `NAME.missing` (1,), the estimate. sigma is zero where the loss does not depend on the layer.

    Raises:
        GeoloraError: as `initialize_lora_one`.
    """
    adapter = adapter_of(model, adapter_name)
    pairs = _fresh_pairs(model, adapter)
    least = max(pair.r for pair in pairs)
    if width is not None and width < least:
        raise SettingError(f"`width` must be the adapter's rank, {least}, or more; got {width}.")
    if passes < 2:
        raise SettingError(f"`passes` must be 2 or more; got {passes}.")
    if not 0 <= tolerance < 1:
        raise SettingError(f"`tolerance` must be in [0, 1); got {tolerance}.")
    if not fresh_batches:
        batches = list(batches)
    modules, enough = factor_modules(model, adapter), -1.0 if fresh_batches else tolerance
    sketches = sketch_gradients(model, pairs, modules, batches, loss_fn, width, passes, enough)
    if not any(sketch.energies[-1] > 0 for sketch in sketches):
        raise GradientError("the loss of `batches` must depend on a LoRA layer; it does on none.")
    state = {}
    for sketch in sketches:
        name = sketch.pair.name
        assert sketch.triplets is not None  # noqa: S101 (there was a pass)
        for key, value in sketch.triplets._asdict().items():
            state[f"{name}.{key}"] = value.cpu().contiguous()
        share = math.nan if fresh_batches else missing(sketch.energies)
        state[f"{name}.missing"] = torch.tensor([share])
    return state


def _fresh_pairs(model: nn.Module, adapter: str) -> list[Pair]:
    """The adapter's pairs; raises `SetupError` where one is trained already or not in use."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SetupError(
            "a start needs the model itself; got one in DistributedDataParallel. Call it before wrapping, "
            "on every process."
        )
    pairs = find_pairs(model, adapter)
    refuse_unused(model, adapter)
    refuse_frozen(pairs)
    for pair in pairs:
        if bool(pair.B.ne(0).any()):
            raise SetupError(
                f"a start needs a pair that is not trained yet; B of `{pair.name}` is not zero. Add a new "
                "adapter, with LoRA's usual start."
            )
    return pairs


def _read_state(state: dict[str, Tensor] | str | Path, pairs: list[Pair]) -> Gradients:
    """What a state says of the pairs; raises `StateError` where layers or shapes differ."""
    if not isinstance(state, dict):
        state = read_tensors(Path(state))
    triplets, unseen = {}, {}
    for pair in pairs:
        values = [state.get(f"{pair.name}.{key}") for key in (*Triplets._fields, "missing")]
        shapes = [None if value is None else tuple(value.shape) for value in values]
        right = [(pair.d_out, pair.r), (pair.r,), (pair.d_in, pair.r), (1,)]
        if shapes != right:
            raise StateError(
                f"`state` must be of this model and rank; for `{pair.name}` it has "
                f"{shapes}, needed are {right}. Compute it again with get_lora_one_state."
            )
        U, sigma, V, share = (value for value in values if value is not None)
        triplets[pair.name], unseen[pair.name] = Triplets(U, sigma, V), float(share)
    return Gradients(triplets, unseen)
