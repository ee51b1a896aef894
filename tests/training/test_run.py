"""Every task and metric that a user may name is wired to what does it."""

from geolora.settings.train_config import METRICS_OF
from geolora.settings.train_config import TASKS as NAMES
from geolora.tasks.metrics import LOWER_IS_BETTER, METRICS
from geolora.tasks.task import Task
from geolora.training.run import TASKS


def test_every_task_is_wired_to_one_of_its_own() -> None:
    assert tuple(TASKS) == NAMES == tuple(METRICS_OF)
    assert all(isinstance(task, Task) for task in TASKS.values())
    assert len({type(task) for task in TASKS.values()}) == len(TASKS)


def test_every_metric_has_a_function_and_every_function_a_task() -> None:
    assert {name for names in METRICS_OF.values() for name in names} == set(METRICS)
    assert set(LOWER_IS_BETTER) < set(METRICS)
