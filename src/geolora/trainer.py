"""`transformers.Trainer` without a patched Trainer: optimizers it can build, and a progress bar.

    Trainer(model=model, optimizer_cls_and_kwargs=geolora.for_trainer("geolora", lr=3e-3), ...)

Trainer's `learning_rate` is not used then: lr belongs to the method. Its gradient clipping
(`max_grad_norm`, 1 by default) rescales the factors' gradients: set it to 0 with moments="none".
"""

import inspect
from typing import Any

import torch
from torch import nn

from geolora.errors import SettingError
from geolora.optim import GeoLoRA
from geolora.pairs import find_pairs


class GeoLoRAFactory:
    """Builds `GeoLoRA` from a model; what Trainer calls as `factory()(model, **kwargs)`."""

    def __call__(self, model: nn.Module, *_args: Any, **kwargs: Any) -> GeoLoRA:
        """The optimizer of a model; kwargs are `GeoLoRA`'s."""
        return GeoLoRA(model, **kwargs)


class LoRAFactory:
    """Builds AdamW for plain LoRA: the pairs at lr, everything else that is trainable at rest_lr."""

    def __call__(
        self, model: nn.Module, *_args: Any, lr: float = 1e-3, rest_lr: float = 1e-3
    ) -> torch.optim.AdamW:
        """The optimizer of a model; no weight decay."""
        paired = {id(p) for pair in find_pairs(model) for p in (pair.A, pair.B)}
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if id(p) in paired], "lr": lr},
            {"params": [p for p in trainable if id(p) not in paired], "lr": rest_lr},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, weight_decay=0.0)


FACTORIES: dict[str, type] = {"geolora": GeoLoRAFactory, "lora": LoRAFactory}


def for_trainer(method: str, **settings: Any) -> tuple[type, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        method: "geolora", or "lora" (AdamW on the pairs).
        settings: keyword arguments of the optimizer, `GeoLoRA`'s or lr and rest_lr; checked here,
            values when the optimizer is built.

    Raises:
        SettingError: an unknown method or setting.
    """
    if method not in FACTORIES:
        raise SettingError(
            f"for_trainer: `method` must be one of {sorted(FACTORIES)}; got {method!r}."
        )
    target: Any = GeoLoRA if method == "geolora" else LoRAFactory.__call__
    known = [name for name in inspect.signature(target).parameters if name[0] != "_"]
    known = [name for name in known if name not in ("self", "model")]
    for name in settings:
        if name not in known:
            raise SettingError(f"for_trainer: `{name}` must be one of {known} for {method}.")
    return FACTORIES[method], settings


def ranks_of(optimizer: Any) -> tuple[int, int] | None:
    """Total settled rank and adapter parameters of a (wrapped) GeoLoRA; None for other optimizers."""
    while not isinstance(optimizer, GeoLoRA):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return sum(optimizer.settled_ranks().values()), optimizer.adapter_parameters()


def progress_callback() -> Any:
    """A Trainer callback: a progress bar with loss, settled rank and adapter parameters.

    It only reads. It also adds `rank` and `adapter_parameters` to what Trainer logs.
    """
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ARG002
            logs = given.get("logs") or {}
            if "loss" not in logs:
                return
            shown = {"loss": f"{logs['loss']:.3f}"}
            found = ranks_of(given.get("optimizer"))
            if found is not None:
                new = {"rank": found[0], "adapter_parameters": found[1]}
                logs.update(new)
                state.log_history[-1].update(new)
                shown |= {"rank": str(found[0]), "parameters": str(found[1])}
            self.bar.set_postfix(shown)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.bar.close()

    return Progress()
