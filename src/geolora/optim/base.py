"""The base of all optimizers: LoRA pairs by a method, everything else that is trainable by AdamW.

It owns what they share: buckets as param groups, closures refused, steps skipped where a gradient is not
finite, states of another model or method refused, factors that FSDP2 has sharded gathered and written back.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from geolora.errors import (
    GeoloraWarning,
    SettingError,
    SetupError,
    UnpairedParametersWarning,
    at_most_three,
)
from geolora.methods import METHODS, OPTIMIZERS, resolve, settings_of
from geolora.optim.adamw import SETTINGS, adamw_step, rest_groups
from geolora.optim.buckets import (
    bucket_group,
    by_shape,
    computed_in,
    not_finite,
    pairs_of,
    stacked_gradients,
)
from geolora.optim.layout import Layout
from geolora.optim.nonfinite import to_be_skipped, total
from geolora.optim.saved_state import (
    Expected,
    Shapes,
    load_keeping_dtypes,
    refuse_other_state,
)
from geolora.pairs.find import (
    KEEPS_BASE,
    Pair,
    refuse_frozen,
    start_of,
    unpaired_lora_layers,
)
from geolora.pairs.sharded import gathered


class LowRankOptimizer(torch.optim.Optimizer, ABC):
    """One param group per bucket of pairs of equal shape, one for the rest; `step` is made of the pieces below."""

    method: ClassVar[str]
    """Name of its row in the table of methods."""
    kind: ClassVar[str] = "pairs"
    """What its param groups of pairs are called."""
    holder: ClassVar[int] = 0
    """Which parameter of a bucket has the bucket's tensors as its state."""
    keeps: ClassVar[tuple[str, ...]] = ()
    """What `_own` puts into a param group."""
    same_names: ClassVar[bool] = False
    """Whether a state is of layers of the same names, because numbers depend on them."""
    newer: ClassVar[tuple[str, ...]] = ()
    """What states that version 0.1.0 saved lack."""

    def __init__(
        self,
        model: nn.Module,
        pairs: list[Pair],
        settings: dict[str, Any],
        rest_lr: float,
        adapter_name: str | None,
    ) -> None:
        """`settings` are those of every bucket, `lr` among them."""
        for name, value in (("lr", settings["lr"]), ("rest_lr", rest_lr)):
            self._number(name, value, "a number >= 0", lambda v: v >= 0)
        refuse_frozen(pairs)
        self._warn_of(model, adapter_name)
        self._forget()
        groups = [
            {
                "kind": self.kind,
                **bucket_group(bucket),
                **self._own(bucket, pairs, settings),
                **settings,
            }
            for bucket in by_shape(pairs)
        ]
        groups += rest_groups(model, groups, rest_lr)
        # schedulers that cycle a momentum ask for these
        cycled = {key: settings[key] for key in ("momentum", "betas") if key in settings}
        super().__init__(groups, {"lr": settings["lr"], "rest_lr": rest_lr, **cycled})
        self._layout.remember_shapes(self._paired())

    @abstractmethod
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every pair that has a gradient, and of AdamW for the rest."""

    # ---- what a method says ----------------------------------------------------------------------

    def _own(
        self,
        bucket: list[Pair],  # noqa: ARG002
        pairs: list[Pair],  # noqa: ARG002
        settings: dict[str, Any],  # noqa: ARG002
    ) -> dict[str, Any]:
        """What the param group of a bucket holds beside the settings."""
        return {}

    def _shapes(self, group: dict[str, Any], saved: dict[str, Any]) -> Shapes:  # noqa: ARG002
        """Shapes of the tensors that the state of a bucket must have once it has one."""
        return {}

    def _forget(self) -> None:
        """Drop caches; they are rebuilt when needed."""
        self._layout = Layout()

    # ---- pieces of a step ------------------------------------------------------------------------

    def _refuse_what_cannot_step(self, closure: None) -> None:
        """Refuse a closure, a step size that is none any more, and parameters that have been exchanged through `.data`."""
        for group in self.param_groups:
            if not (group["lr"] >= 0 and math.isfinite(group["lr"])):
                raise SettingError(
                    f"{type(self).__name__}.step: `lr` of a param group must be a number >= 0; got "
                    f"{group['lr']}. Look at the scheduler."
                )
        if closure is not None:
            raise SetupError(
                f"{type(self).__name__}.step: closures are not supported. Compute the loss and call "
                "backward() before step(): the factors' gradients are read once, at the current point."
            )
        self._layout.check(type(self).__name__, self.param_groups, self.state)

    def _paired(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] != "rest"]

    def _rest(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == "rest"]

    def _skips(self, totals: list[Tensor]) -> bool:
        """True, with one warning naming the layers, where a gradient is NaN or infinite.

        Args:
            totals: sums of the gradients of all pairs, as `nonfinite.total` takes them.
        """
        rest = [g for group in self._rest() for p in group["params"] if (g := p.grad) is not None]
        totals = totals + [total(gathered(g)) for g in rest]
        groups = self._paired()

        def culprits() -> list[str]:
            outside = any(not gathered(g).isfinite().all() for g in rest)
            return not_finite(groups) + ["parameters outside the pairs"] * outside

        return to_be_skipped(type(self).__name__, groups[0], totals, culprits)

    def _step_rest(self) -> None:
        for group in self._rest():
            adamw_step(group, self.state)

    # ---- at home in torch ------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state; every tensor keeps the dtype it was saved in (masters stay float32).

        Raises:
            StateError: the state is of another method, of other layers or shapes, or not whole; nothing is
                changed.
        """
        hooks = self._optimizer_load_state_dict_pre_hooks
        for hook in hooks.values():  # torch's come before its own checks, so here too
            state_dict = hook(self, state_dict) or state_dict
        refuse_other_state(self.param_groups, state_dict, self._expected())
        names = [group["layers"] for group in self._paired()]
        self._optimizer_load_state_dict_pre_hooks = type(hooks)()
        try:
            load_keeping_dtypes(self, super().load_state_dict, state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = hooks
        for group, name in zip(self._paired(), names, strict=True):
            group["layers"] = name
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters for AdamW; pairs are found when the optimizer is built, not here."""
        if "kind" not in param_group:
            param_group = {**SETTINGS, "lr": self.defaults["rest_lr"], **param_group}
        super().add_param_group(param_group)
        if param_group["kind"] == "rest":
            param_group.pop("momentum", None)  # a default of the pairs

    def _expected(self) -> Expected:
        of_pairs = {row: set(settings_of(resolve(METHODS[row].optimizer))) for row in OPTIMIZERS}
        beside = {"rest_lr", "adapter_name", "total_steps"}
        settings = of_pairs[self.method] - beside
        common = {"kind", "params", "layers", "scales", "skipped"}
        return Expected(
            type(self).__name__,
            self.method,
            common | settings | set(self.keeps),
            settings,
            set().union(*of_pairs.values()) - beside,
            self.same_names,
            self._shapes,
            self.holder,
            self.newer,
        )

    def _demand(self, name: str, value: object, met: bool, condition: str) -> None:
        """Raise `SettingError` where a setting does not meet its condition."""
        if not met:
            raise SettingError(
                f"{type(self).__name__}: `{name}` must be {condition}; got {value!r}."
            )

    def _number(
        self,
        name: str,
        value: Any,
        condition: str,
        met: Callable[[Any], bool],
        optional: bool = False,
    ) -> None:
        """Demand a finite number (one in a tensor too) that meets a condition, or None where it is optional."""
        good = (optional and value is None) or (_is_number(value) and met(value))
        self._demand(name, value, good, condition)

    def _whole(
        self, name: str, value: Any, least: int, condition: str, optional: bool = False
    ) -> None:
        """Demand a whole number from `least` on, or None where it is optional."""
        good = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
        self._demand(name, value, good or (optional and value is None), condition)

    def _demand_adams(self, betas: tuple[float, float], eps: float) -> None:
        """Adam's settings, where a method has them."""
        self._number("eps", eps, "a number > 0", lambda v: v > 0)
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        good = pair and all(_is_number(beta) and 0 <= beta < 1 for beta in betas)
        self._demand("betas", betas, good, "two numbers in [0, 1)")

    def _warn_of(self, model: nn.Module, adapter_name: str | None) -> None:
        """Say at once what is trained in another way, or cannot be exported."""
        if unpaired := unpaired_lora_layers(model, adapter_name):
            warnings.warn(
                f"{type(self).__name__}: LoRA on embeddings is trained by AdamW: "
                f"{at_most_three(unpaired)}.",
                UnpairedParametersWarning,
                stacklevel=4,
            )
        start = start_of(model, adapter_name)
        if start not in KEEPS_BASE:
            warnings.warn(
                f"{type(self).__name__}: the start {start!r} changed the base weights, so the pairs alone are "
                "not the adapter: geolora.export will refuse it. Save it with peft's save_pretrained("
                "path_initial_model_for_weight_conversion=…), or choose another init_lora_weights.",
                GeoloraWarning,
                stacklevel=4,
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and bool(value.isfinite().all())
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


class BucketGradients(NamedTuple):
    """The gradients of a bucket.

    Attributes:
        group: its param group.
        grad_A, grad_B: (n, r, d_in) and (n, d_out, r), float32 or wider, gathered; zero where there is none.
        live: which pairs have a gradient.
    """

    group: dict[str, Any]
    grad_A: Tensor
    grad_B: Tensor
    live: list[bool]


class BucketwiseOptimizer(LowRankOptimizer):
    """A method that moves the factors of one bucket after the other: what it does is `_advance`."""

    keeps = ("experts", "counts")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every pair that has a gradient, and of AdamW for the rest.

        In order: the gradients of all buckets are read; nothing moves where one is not finite; pairs that the
        method cannot go on from are refused; then every bucket moves, and what is no pair.
        """
        self._refuse_what_cannot_step(closure)
        buckets = self._read_gradients()
        if self._skips(
            [total(grad) for bucket in buckets for grad in (bucket.grad_A, bucket.grad_B)]
        ):
            return
        for bucket in buckets:
            self._refuse(bucket.group)
        for bucket in buckets:
            counts = zip(bucket.group["counts"], bucket.live, strict=True)
            bucket.group["counts"] = [count + on for count, on in counts]
            self._advance(*bucket)
        self._step_rest()

    @abstractmethod
    def _advance(
        self, group: dict[str, Any], grad_A: Tensor, grad_B: Tensor, live: list[bool]
    ) -> None:
        """One step of a bucket, of which one pair at least has a gradient; see `BucketGradients`.

        `group["counts"]`, how many steps with a gradient each pair has had, includes this step.
        """

    def _refuse(self, group: dict[str, Any]) -> None:
        """Raise for pairs that this method cannot go on from, before anything has moved."""

    def _own(
        self,
        bucket: list[Pair],
        pairs: list[Pair],  # noqa: ARG002
        settings: dict[str, Any],  # noqa: ARG002
    ) -> dict[str, Any]:
        return {"experts": bucket[0].experts, "counts": [0] * len(bucket)}

    def _read_gradients(self) -> list[BucketGradients]:
        """Those of the buckets that have one."""
        return [
            BucketGradients(
                group,
                *stacked_gradients(group["params"], computed_in(group)),
                [any(p.grad is not None for p in pair) for pair in pairs_of(group["params"])],
            )
            for group in self._paired()
            if any(p.grad is not None for p in group["params"])
        ]
