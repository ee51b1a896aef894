"""Every task and metric that a user may name is wired to what does it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geolora.methods import METHODS, TRAINABLE
from geolora.settings.train_config import METRICS_OF, TrainConfig
from geolora.settings.train_config import TASKS as NAMES
from geolora.tasks.metrics import LOWER_IS_BETTER, METRICS
from geolora.tasks.task import Task
from geolora.training import run
from geolora.training.check import check
from geolora.training.recipes import recipe_of
from geolora.training.run import TASKS


def test_every_task_is_wired_to_one_of_its_own() -> None:
    assert tuple(TASKS) == NAMES == tuple(METRICS_OF)
    assert all(isinstance(task, Task) for task in TASKS.values())
    assert len({type(task) for task in TASKS.values()}) == len(TASKS)


def test_every_metric_has_a_function_and_every_function_a_task() -> None:
    assert {name for names in METRICS_OF.values() for name in names} == set(METRICS)
    assert set(LOWER_IS_BETTER) < set(METRICS)


def test_trainers_clipping_is_left_out_where_it_would_change_lr_per_w() -> None:
    config = TrainConfig(model="m", output="none-such")
    for name in TRAINABLE:
        wanted = name != "geolora"
        assert METHODS[name].clips_gradients == wanted, name
        here = dataclasses.replace(
            config, method=name, budget=9 if METHODS[name].takes_budget else None
        )
        ready: Any = SimpleNamespace(config=here, recipe=recipe_of(here), steps=10)
        assert run._arguments(ready)["max_grad_norm"] == float(wanted), name


def test_rows_of_a_program_lie_in_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `make demo` calls it: no files to train on, and an output in the working directory."""
    monkeypatch.chdir(tmp_path)
    check(TrainConfig(model="model", output="output/lora"))
