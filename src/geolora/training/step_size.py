"""The step size of a run: the one given, or one found by a search before the first step."""

from pathlib import Path
from typing import Any

from geolora import processes
from geolora.files.reading import read_json
from geolora.files.writing import write_json
from geolora.settings.train_config import TrainConfig
from geolora.starts.find_lr import PROBES, FoundLr, find_lr
from geolora.training.check import microbatches
from geolora.training.recipes import Batches, Recipe

FILE = "step_size.json"
"""Holds the search in the output folder, where a run that goes on finds it again."""
LEAST_PROBES = 4
"""A run in which a search may not have so many keeps the method's default."""


def set_step_size(
    config: TrainConfig,
    recipe: Recipe,
    model: Any,
    optimizer: tuple[Any, dict[str, Any]],
    batches: Batches,
    steps: int,
    resumed: bool,
) -> float:
    """Put a step size among the optimizer's settings where none was given, and return the one it has.

    A search takes a quarter of the steps at most, and is made for pairs alone. All processes must call.

    Args:
        optimizer: what Trainer's `optimizer_cls_and_kwargs` is. batches: gives training batches.
        steps: of the run. resumed: whether it goes on, with what was found.
    """
    factory, settings = optimizer
    probes = min(PROBES, steps // 4)
    if "lr" not in settings and recipe.finds_lr and probes >= LEAST_PROBES:
        file = Path(config.output) / FILE
        if not resumed:
            found = _found(config, model, optimizer, batches, probes)
            if processes.is_first():
                write_json(file, found.as_dict())
            processes.wait_for_all()
        if file.exists():  # not where version 0.1.0 has begun the run
            settings["lr"] = read_json(file)["lr"]
    if "lr" in settings:
        return settings["lr"]
    return float(factory()(model, **settings).param_groups[0]["lr"])


def _found(
    config: TrainConfig,
    model: Any,
    optimizer: tuple[Any, dict[str, Any]],
    batches: Batches,
    probes: int,
) -> FoundLr:
    """A search on the first rows of the run, divided over processes and parts as they will be."""
    factory, settings = optimizer
    parts = microbatches(config)
    drawn = batches(config.batch_size // parts, probes * parts)

    def made(model: Any, **lr: float) -> Any:
        return factory()(model, **settings, **lr)

    return find_lr(
        model,
        drawn[processes.rank() :: processes.count()],
        optimizer=made,
        probes=probes,
        accumulate=config.gradient_accumulation,
    )
