"""Sealed checkpoints: what is torn or foreign is named and not used, what is whole is."""

import json
from pathlib import Path

import pytest

from geolora.errors import CheckpointWarning
from geolora.files.writing import write_json
from geolora.training.checkpoints import SEAL, flaw, latest, seal

RUN = "this run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (5, 10, 100):
        checkpoint = tmp_path / f"checkpoint-{step}"
        (checkpoint / "inner").mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(bytes(range(200)) * step)
        (checkpoint / "inner" / "state.json").write_text("{}")
        seal(checkpoint, RUN)
    return tmp_path


def test_the_newest_whole_one_is_used(folder: Path) -> None:
    assert latest(folder, RUN) == folder / "checkpoint-100"
    assert latest(folder / "none", RUN) is None


def truncate(checkpoint: Path) -> None:
    with (checkpoint / "optimizer.pt").open("r+b") as file:
        file.truncate(7)


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "optimizer.pt").read_bytes())
    content[100] ^= 1
    (checkpoint / "optimizer.pt").write_bytes(content)


def other_run(checkpoint: Path) -> None:
    seal(checkpoint, "another run")


DAMAGE = {
    "was not written to its end": lambda c: (c / SEAL).unlink(),
    "has a changed or torn optimizer.pt": truncate,
    "has a changed or torn optimizer.pt ": flip,
    "has lost inner/state.json": lambda c: (c / "inner" / "state.json").unlink(),
    "belongs to another run": other_run,
    f"has an unreadable {SEAL}": lambda c: (c / SEAL).write_text('{"run": '),
    f"has an unreadable {SEAL} ": lambda c: (c / SEAL).write_text("[]"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_one_is_named_and_the_one_before_is_used(folder: Path, message: str) -> None:
    DAMAGE[message](folder / "checkpoint-100")
    with pytest.warns(CheckpointWarning, match=f"checkpoint-100 {message.strip()}: not used"):
        assert latest(folder, RUN) == folder / "checkpoint-10"


def test_where_all_are_damaged_there_is_none(folder: Path) -> None:
    for step in (5, 10, 100):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    with pytest.warns(CheckpointWarning, match="has lost optimizer.pt"):
        assert latest(folder, RUN) is None


def test_a_seal_survives_being_moved_and_sealed_again(folder: Path) -> None:
    moved = (folder / "checkpoint-5").rename(folder / "checkpoint-6")
    assert flaw(moved, RUN) is None
    flip(moved)
    seal(moved, RUN)
    assert flaw(moved, RUN) is None


def test_json_is_replaced_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
