"""What may be said of a run: every flag has its place, and saying it costs no import of torch."""

import subprocess
import sys
from dataclasses import fields

import pytest

from geolora.settings.train_config import DEFAULTS, HEADINGS, METRICS, ONLY_FOR, TASKS, TrainConfig


@pytest.mark.parametrize("module", ["geolora.settings.train_config", "geolora.cli.__main__"])
def test_settings_and_help_load_no_torch(module: str) -> None:
    code = (
        f"import sys, {module} as module; getattr(module, 'build_parser', int)(); "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_setting_stands_under_one_heading_and_has_help() -> None:
    names = [name for heading in HEADINGS.values() for name in heading]
    assert sorted(names) == sorted(DEFAULTS)
    assert all(spec.metadata["help"] for spec in fields(TrainConfig))


def test_what_belongs_to_some_tasks_names_settings_and_tasks_that_exist() -> None:
    for name, tasks in ONLY_FOR.items():
        assert name in DEFAULTS
        assert set(tasks) < set(TASKS), name
    assert DEFAULTS["metric"] is None
    assert TrainConfig.__dataclass_fields__["metric"].metadata["choices"] == METRICS
