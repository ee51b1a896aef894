"""`transformers.Trainer` without a patched Trainer: optimizers it can build, and a progress bar.

    Trainer(model=model, optimizer_cls_and_kwargs=geolora.for_trainer("geolora", lr=3e-3), ...)

Trainer's `learning_rate` is not used then: lr belongs to the method. Its gradient clipping
(`max_grad_norm`, 1 by default) rescales the factors' gradients: set it to 0 with moments="none".
"""

import inspect
import sys
from typing import Any

import torch
from torch import nn

from geolora.errors import PairingError, SettingError
from geolora.optim.geolora import GeoLoRA
from geolora.optim.lora_pro import LoRAPro
from geolora.optim.lora_sb import LoRASB
from geolora.optim.rac_lora import RACLoRA
from geolora.optim.riemannian import RiemannianAdamW


class _Factory:
    """Builds an optimizer from a model; what Trainer calls as `factory()(model, **kwargs)`."""

    optimizer: Any

    def __call__(self, model: nn.Module, *_args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer of a model; kwargs are its own."""
        return self.optimizer(model, **kwargs)


class GeoLoRAFactory(_Factory):
    """Builds `GeoLoRA`."""

    optimizer = GeoLoRA


class RiemannianFactory(_Factory):
    """Builds `RiemannianAdamW`."""

    optimizer = RiemannianAdamW


class LoRAProFactory(_Factory):
    """Builds `LoRAPro`."""

    optimizer = LoRAPro


class LoRASBFactory(_Factory):
    """Builds `LoRASB`."""

    optimizer = LoRASB


class RACLoRAFactory(_Factory):
    """Builds `RACLoRA`."""

    optimizer = RACLoRA


class LoRAFactory:
    """Builds AdamW for LoRA of any kind: its factors at lr, all else that is trainable at rest_lr."""

    def __call__(
        self, model: nn.Module, *_args: Any, lr: float = 1e-3, rest_lr: float = 1e-3
    ) -> torch.optim.AdamW:
        """The optimizer of a model; no weight decay."""
        return torch.optim.AdamW(split_rest(model, lr, rest_lr), lr=lr, weight_decay=0.0)


def split_rest(model: nn.Module, lr: float, rest_lr: float) -> list[dict[str, Any]]:
    """Param groups of a PEFT model: LoRA's tensors (factors, magnitudes) at lr, others at rest_lr.

    Raises:
        PairingError: nothing of LoRA is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    factors = [p for name, p in trainable if ".lora_" in name]
    others = [p for name, p in trainable if ".lora_" not in name]
    if not factors:
        raise PairingError(
            "for_trainer: `model` must have trainable LoRA layers; found none. "
            "Wrap it with peft.get_peft_model(model, LoraConfig(...)) first."
        )
    groups = [{"params": factors, "lr": lr}, {"params": others, "lr": rest_lr}]
    return [group for group in groups if group["params"]]


FACTORIES: dict[str, tuple[type, Any]] = {
    "geolora": (GeoLoRAFactory, GeoLoRA),
    "lora": (LoRAFactory, LoRAFactory.__call__),
    "lora-pro": (LoRAProFactory, LoRAPro),
    "lora-sb": (LoRASBFactory, LoRASB),
    "rac-lora": (RACLoRAFactory, RACLoRA),
    "riemannian": (RiemannianFactory, RiemannianAdamW),
}
"""Method: what builds its optimizer, and whose arguments it takes."""


def for_trainer(method: str, **settings: Any) -> tuple[type, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        method: "lora" (AdamW on the pairs), "geolora", "lora-pro", "lora-sb", "rac-lora" or "riemannian".
        settings: keyword arguments of the optimizer, for "lora" lr and rest_lr; checked here,
            values when the optimizer is built.

    Raises:
        SettingError: an unknown method or setting.
    """
    if method not in FACTORIES:
        raise SettingError(
            f"for_trainer: `method` must be one of {sorted(FACTORIES)}; got {method!r}."
        )
    factory, target = FACTORIES[method]
    known = [name for name in inspect.signature(target).parameters if name[0] != "_"]
    known = [name for name in known if name not in ("self", "model")]
    for name in settings:
        if name not in known:
            raise SettingError(f"for_trainer: `{name}` must be one of {known} for {method}.")
    return factory, settings


def _geolora_in(optimizer: Any) -> GeoLoRA | None:
    """The GeoLoRA that accelerate has wrapped; None for other optimizers."""
    while not isinstance(optimizer, GeoLoRA):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return optimizer


def log_ranks(trainer: Any) -> None:
    """Add what GeoLoRA's adapter is like to everything that a Trainer logs, wherever it reports to.

    `rank` (all layers together), `adapter_parameters`, `rank/LAYER`, `sigma/largest` and `sigma/median`
    (singular values of the updates W in use), `tangent_norm` (of the momentum, over all layers; per unit of W),
    `grown` and `pruned` (directions since the log before).

    Args:
        trainer: a `transformers.Trainer`, or one built on it; nothing is added for other optimizers.
    """
    from transformers import TrainerCallback

    class LogRanks(TrainerCallback):
        before: dict[str, int] | None = None

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
            optimizer, logs = _geolora_in(given.get("optimizer")), given.get("logs") or {}
            if optimizer is None or "loss" not in logs:
                return
            new, ranks = optimizer.measures(), optimizer.settled_ranks()
            state.log_history[-1].update(new)  # what a resumed run knows as well
            changes = [rank - (self.before or ranks)[name] for name, rank in ranks.items()]
            self.before = ranks
            logs |= new | {f"rank/{name}": rank for name, rank in ranks.items()}
            logs["grown"] = sum(change for change in changes if change > 0)
            logs["pruned"] = -sum(change for change in changes if change < 0)

    # before the loggers, which come first in Trainer's list
    trainer.callback_handler.callbacks.insert(0, LogRanks())


def progress_callback() -> Any:
    """A Trainer callback: a progress bar with loss, settled rank and parameters of the budget; it only reads."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            often = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file is no screen
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", mininterval=often
            )

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
            logs = given.get("logs") or {}
            if "loss" not in logs:
                return
            shown = {"loss": f"{logs['loss']:.3f}"}
            optimizer = _geolora_in(given.get("optimizer"))
            if optimizer is not None:
                budget = optimizer.param_groups[0]["budget"]
                limit = f" of {budget:,}" if budget is not None else ""
                shown |= {
                    "rank": str(sum(optimizer.settled_ranks().values())),
                    "parameters": f"{optimizer.adapter_parameters():,}{limit}",
                }
            self.bar.set_postfix(shown, refresh=False)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.bar.close()

    return Progress()
