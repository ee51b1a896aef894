"""`transformers.Trainer` without a patched Trainer: optimizers it can build, and a progress bar.

    Trainer(model=model, args=args, optimizer_cls_and_kwargs=geolora.for_trainer("geolora", args=args), ...)

Trainer's `learning_rate` is used with `args=` only, and where it is not the default; else lr belongs to the method.
Its gradient clipping (`max_grad_norm`, 1 by default) rescales the factors' gradients: set it to 0 with
moments="none".
"""

import sys
import warnings
from dataclasses import fields
from functools import partial
from typing import Any

from geolora.errors import GeoloraWarning, SettingError
from geolora.methods import METHODS, OPTIMIZERS, Method, resolve, settings_of
from geolora.optim.geolora import GeoLoRA


def for_trainer(method: str, args: Any = None, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Args:
        method: an optimizer of the table of methods: "lora" (AdamW on the pairs), "geolora", "lora-pro", …
        args: the `TrainingArguments` of the same Trainer. Where `lr` is not among the settings, and their
            learning_rate is not the default, it is lr, as it stands when the optimizer is built: a search over it
            works. Likewise weight_decay, of a method that has one. None: both do nothing.
        settings: keyword arguments of the optimizer, for "lora" lr and rest_lr; their names are checked
            here, their values when the optimizer is built.

    Raises:
        SettingError: an unknown method or setting.
    """
    if method not in OPTIMIZERS:
        raise SettingError(
            f"for_trainer: `method` must be one of {sorted(OPTIMIZERS)}; got {method!r}."
        )
    row = METHODS[method]
    known = settings_of(resolve(row.optimizer))
    for name in settings:
        if name not in known:
            raise SettingError(f"for_trainer: `{name}` must be one of {known} for {method}.")
    if args is None:
        return factory_of(row), settings
    return partial(_with_arguments, row.optimizer, args), settings


def factory_of(method: Method) -> Any:
    """What Trainer calls as `factory()(model, **settings)`; it can be pickled."""
    return partial(resolve, method.optimizer)


def _with_arguments(optimizer: str, args: Any) -> Any:
    """What builds an optimizer with what a person has set in `TrainingArguments`."""

    def build(model: Any, **settings: Any) -> Any:
        known = settings_of(resolve(optimizer))
        changed = _changed(args)
        if unused := [name for name in changed if ALIKE[name] not in known]:
            warnings.warn(
                f"for_trainer: `{unused[0]}` of the TrainingArguments does nothing here: "
                f"{resolve(optimizer).__name__} has none.",
                GeoloraWarning,
                stacklevel=2,
            )
        taken = {ALIKE[name]: value for name, value in changed.items() if name not in unused}
        return resolve(optimizer)(model, **{**taken, **settings})

    return build


ALIKE = {"learning_rate": "lr", "weight_decay": "weight_decay"}
"""Names in `TrainingArguments` → those of our optimizers' settings."""


def _changed(args: Any) -> dict[str, float]:
    """Rate and decay of `TrainingArguments` where they are not the default of their class."""
    usual = {spec.name: spec.default for spec in fields(args)}
    return {name: getattr(args, name) for name in ALIKE if getattr(args, name) != usual[name]}


def _geolora_in(optimizer: Any) -> GeoLoRA | None:
    """The GeoLoRA that accelerate has wrapped; None for other optimizers."""
    while not isinstance(optimizer, GeoLoRA):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None or inner is optimizer:
            return None
        optimizer = inner
    return optimizer


def log_ranks(trainer: Any) -> None:
    """Add ranks and singular values of GeoLoRA's adapter to everything that a Trainer logs, wherever it reports to.

    `rank` (all layers together), `adapter_parameters`, `rank/LAYER`, `sigma/largest` and `sigma/median`
    (singular values of the updates W in use), `tangent_norm` (of the momentum, over all layers; per unit of W),
    `grown` and `pruned` (directions since the log before).

    Args:
        trainer: a `transformers.Trainer`, or one built on it; nothing is added for other optimizers.
    """
    from transformers import TrainerCallback

    class LogRanks(TrainerCallback):
        before: dict[str, int] | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            factory = (trainer.optimizer_cls_and_kwargs or (None,))[0]
            if getattr(factory, "func", None) is resolve and (changed := _changed(args)):
                warnings.warn(
                    f"log_ranks: `{next(iter(changed))}` of the TrainingArguments does nothing: give "
                    "for_trainer(…, args=training_args), or lr itself.",
                    GeoloraWarning,
                    stacklevel=2,
                )

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
            self.close()

        def close(self) -> None:
            """End the bar's line, also where training ends in an error: Trainer calls nobody then."""
            if self.bar is not None:
                self.bar.close()

    return Progress()
