"""Kills, full disks, signals and a second process, at random calls of every command that writes."""

import signal
from collections.abc import Iterator
from typing import Any

import pytest

from fault_cases import CASES, FULL, KILLS, SECOND, SIGNALS, Lab
from faults import Fault, Unavailable

WRITERS = """
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

value = torch.ones(5000)
writers = {
    "python": lambda path: path.write_text("text" * 5000),
    "torch": lambda path: torch.save({"a": value}, path),
    "safetensors": lambda path: save_file({"a": value}, path),
    "matplotlib": lambda path: Figure().savefig(path, format="png"),
}
for name, write in writers.items():
    try:
        write(Path("written") / name)
    except Exception as error:
        print(name, type(error).__name__)
"""
TWO_FILES = """
import os
from pathlib import Path

with open("kept", "w") as kept, open("lost", "w") as lost:
    for file in (kept, lost):
        file.write("a" * 100)
        file.flush()
    os.fsync(kept.fileno())
Path("end").mkdir()
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    try:
        lab = Lab(tmp_path_factory.mktemp("faults") / "lab")
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield lab
    lab.close()


def tried(lab: Lab, name: str, modes: tuple[str, ...], count: int) -> list[dict[str, Any]]:
    """What goes wrong with a command at random calls, the same ones at every start."""
    seed = sum(map(ord, repr((name, modes))))
    return [found for found in lab.trials(name, modes, count, seed) if found["wrong"]]


@pytest.mark.guard
def test_no_byte_of_any_language_passes_a_full_disk(lab: Lab) -> None:
    written = lab.world / "written"
    written.mkdir()
    assert lab.machine.run(["python", WRITERS]).out == ""
    assert all(
        (written / name).stat().st_size > 5000 for name in ("python", "torch", "safetensors")
    )
    for path in written.iterdir():
        path.unlink()
    refused = lab.machine.run(["python", WRITERS], Fault("full", 1)).out
    names = [line.split()[0] for line in refused.splitlines()]
    assert names == ["python", "torch", "safetensors", "matplotlib"]
    assert not any(written.iterdir())


@pytest.mark.guard
def test_a_power_cut_takes_what_was_not_brought_to_disk(lab: Lab) -> None:
    done = lab.machine.run(["python", TWO_FILES], Fault("count", 0))
    at = done.calls.index("mkdir /end") + 1
    (lab.world / "end").rmdir()
    assert lab.machine.run(["python", TWO_FILES], Fault("power", at)).code == -signal.SIGKILL
    assert [(lab.world / name).read_text() for name in ("kept", "lost")] == ["a" * 100, ""]


FEW = [
    *(("train", KILLS, 2), ("train", FULL, 1), ("train", SECOND, 1)),
    *(("export itself", KILLS, 1), ("export over", FULL, 2), ("export over", SIGNALS, 1)),
    *(("prune over", KILLS, 1), ("prune over", SECOND, 1)),
]


def test_a_few_faults(lab: Lab) -> None:
    """One test, so that one process starts the machine."""
    for name, modes, count in FEW:
        assert tried(lab, name, modes, count) == []


@pytest.mark.guard
@pytest.mark.parametrize("modes, count", [(KILLS, 5), (FULL, 5), (SIGNALS, 3), (SECOND, 3)])
@pytest.mark.parametrize("name", CASES)
def test_many_faults(lab: Lab, name: str, modes: tuple[str, ...], count: int) -> None:
    assert tried(lab, name, modes, count) == []
