"""What is refused, what is removed, what is replaced at once; full disks and missing rights in one line."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from geolora.errors import OutputError
from geolora.files import folders
from geolora.files.folders import alone, replacing, restore
from geolora.files.ours import RUN, remove_written
from geolora.files.output_folder import check_output, naming_disk_errors


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (SafetensorError("Error while serializing: I/O error: … (os error 28)"), "no space left"),
        (SafetensorError("… IoError(Os { code: 27, kind: FileTooLarge, … })"), "no space left"),
        (Exception("No space left on device (os error 28)"), "no space left"),  # tokenizers
        (RuntimeError("basic_ios::clear: iostream error"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied"), "may not be written"),
        (OSError(errno.EROFS, "Read-only file system"), "may not be written"),
    ],
)
def test_what_a_user_can_mend(error: Exception, message: str) -> None:
    with (
        pytest.raises(OutputError, match=f"`--output`: out: .*{message}"),
        naming_disk_errors("out"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.EIO, "broken")])
def test_anything_else_is_not_hidden(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, naming_disk_errors("out"):
        raise error
    assert caught.value is error


WRITE = """
import resource, sys, torch
from safetensors.torch import save_file
from geolora.errors import OutputError
from geolora.files.output_folder import naming_disk_errors
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
big = {"a": torch.zeros(100_000)}
for write in (lambda p: torch.save(big, p), lambda p: save_file(big, p)):
    try:
        with naming_disk_errors("out"):
            write(sys.argv[1])
    except OutputError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files here")
def test_a_limit_that_is_really_hit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WRITE, str(tmp_path / "file")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("there is no space left") == 2


def write(folder: Path, *names: Any) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def read(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


SETTINGS = '{"model": "m", "train": "t", "method": "lora", "output": "out"}'
OF_RUN = [
    "report.json", "history.json", "config.yaml", "report.html", "ranks.png", "adapter/adapter_config.json",
    "adapter/tokenizer.json", "adapter/geolora/probes.safetensors", "start/adapter_model.safetensors",
    "checkpoints/checkpoint-5/optimizer.pt", "checkpoints/checkpoint-5/rng_state_1.pth", "run.json.partial",
    ".adapter.partial/adapter_model.safetensors",
]  # fmt: skip
MINE = [
    "thesis.tex", "vocab.txt", "notes/report.json", "adapter/optimizer.bin", "adapter/geolora/me.txt",
    "checkpoints/optimizer.pt", "checkpoints/mine/optimizer.pt", "checkpoints/checkpoint-5/notes.md",
    "checkpoints/runs/events.out", "start/notes.md",
]  # fmt: skip


def test_only_what_geolora_wrote_is_removed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(out, *OF_RUN, *MINE)
    (out / "run.json").write_text(SETTINGS)
    (out / "ranks.png").unlink()
    write(elsewhere, "adapter_model.safetensors")
    (out / "ranks.png").symlink_to(elsewhere / "adapter_model.safetensors")
    (out / "labels.json").mkdir()
    write(out, "labels.json/mine")
    check_output(out, overwrite=True)
    remove_written(out, RUN)
    assert read(out) == {name: name for name in [*MINE, "labels.json/mine"]}
    assert not (out / "ranks.png").is_symlink()
    assert read(elsewhere) == {"adapter_model.safetensors": "adapter_model.safetensors"}
    assert not (out / "checkpoints" / "checkpoint-5" / "geolora").exists()
    remove_written(tmp_path / "gone", RUN)


def test_the_mark_is_removed_last_and_an_empty_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        removed.append(path.name)
        real(path, missing_ok)

    write(tmp_path / "out", *OF_RUN, "run.json")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        remove_written(tmp_path / "out", RUN)
    assert removed[-1] == "run.json"
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_folder_is_removed_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    write(tmp_path / "real", "adapter_config.json", "README.md")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter").symlink_to(tmp_path / "real")
    remove_written(tmp_path / "out", RUN)
    assert sorted(read(tmp_path / "real")) == ["README.md", "adapter_config.json"]


@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("run.json", "{}", "run"),
        ("run.json", '{"km": 5}', "run"),
        ("run.json", SETTINGS, "adapter"),
        ("demo.json", '{"slides": 3}', "demo"),
        ("demo.json", "[]", "demo"),
        ("demo.json", "{", "demo"),
        ("comparison.json", '{"price": 3}', "comparison"),
        ("adapter_config.json", "{}", "run"),
        ("adapter_config.json", "{}", "adapter"),  # of another program
    ],
)
def test_a_name_alone_is_no_mark(tmp_path: Path, name: str, content: str, kind: str) -> None:
    (tmp_path / name).write_text(content)
    write(tmp_path, "thesis.tex")
    with pytest.raises(OutputError, match=f"is no {kind} that was written by geolora"):
        check_output(tmp_path, True, kind)
    assert len(read(tmp_path)) == 2


def test_inputs_in_the_output_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text(SETTINGS)
    write(tmp_path, "data/train.jsonl")
    monkeypatch.chdir(tmp_path)
    for output in (".", str(tmp_path), "../" + tmp_path.name, "data/.."):
        for given in ("data/train.jsonl", str(tmp_path / "data"), "."):
            with pytest.raises(OutputError, match=r"holds .*, which is read"):
                check_output(output, True, "run", [given])
    check_output(".", True, "run", ["gone", "x" * 5000, "\0"])


@pytest.mark.parametrize("name", ["a\udcff", "a\0b", "x" * 300, "", " "])
def test_a_name_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        OutputError, match="must be a path in UTF-8 of names of at most 200 bytes"
    ) as e:
        check_output(tmp_path / name if name.strip() else name, True)
    assert str(e.value).isprintable()
    assert len(str(e.value)) < 400


def test_what_an_interrupted_start_leaves_counts_as_empty(tmp_path: Path) -> None:
    write(tmp_path, ".lock", "run.json.partial")
    for kind in ("run", "comparison", "adapter", "demo"):
        check_output(tmp_path, False, kind)
    write(tmp_path, "mine")
    with pytest.raises(OutputError, match="exists"):
        check_output(tmp_path, False)


def test_a_lock_goes_with_who_holds_it(tmp_path: Path) -> None:
    def fail() -> None:
        with alone(tmp_path):
            with pytest.raises(OutputError, match="another process works in"), alone(tmp_path):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


# ---- replaced at once ---------------------------------------------------------------------------

FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "geolora/probes.safetensors",
]


def put(folder: Path, text: str) -> None:
    with replacing(folder) as new:
        assert not list(new.iterdir())
        write(new, *FILES)
        for name in FILES:
            (new / name).write_text(text)


def texts(folder: Path) -> dict[str, str]:
    return {name: text for name, text in read(folder).items() if name in FILES}


@pytest.mark.parametrize("can_exchange", [True, False])
def test_an_adapter_takes_the_place_of_another_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    folder = tmp_path / "deep" / "adapter"
    put(folder, "old")
    write(folder, "notes.md", "geolora/me.txt", "mine/adapter_config.json", "merges.txt")
    (folder / "link").symlink_to(tmp_path)
    put(folder, "new")
    assert texts(folder) == dict.fromkeys(FILES, "new")
    assert {n for n in read(folder) if n not in FILES} == {
        "notes.md", "geolora/me.txt", "mine/adapter_config.json",
    }  # fmt: skip
    assert (folder / "link").is_symlink()
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("there", ["nothing", "an adapter", "something else"])
def test_where_writing_fails_all_is_as_before(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "adapter"
    if there == "an adapter":
        put(folder, "old")
    elif there == "something else":
        write(folder, "notes.md")
    before = read(tmp_path)
    with pytest.raises(TypeError), replacing(folder) as new:
        write(new, *FILES, 3)
    assert read(tmp_path) == before
    assert folder.exists() == (there != "nothing")


def the_last_one(call: Callable[..., Any], after: int) -> Callable[..., Any]:
    left = [after]

    def last(*given: object, **named: object) -> object:
        done = call(*given, **named)
        left[0] -= 1
        if left[0] < 0:
            os._exit(9)
        return done

    return last


@pytest.mark.parametrize("at", ["rename", "replace", "unlink", "rmdir", "link", "mkdir"])
@pytest.mark.parametrize(
    "there, can_exchange",
    [("nothing", True), ("something else", True), ("an adapter", True), ("an adapter", False)],
)
def test_killed_at_any_call_it_holds_the_old_adapter_or_the_new_one(
    tmp_path: Path, there: str, can_exchange: bool, at: str
) -> None:
    """The n-th call of that name, for every n, is the last thing a process does before it is killed."""
    for n in range(20):
        folder = tmp_path / f"{n}" / "adapter"
        if there == "an adapter":
            put(folder, "old")
        if there != "nothing":
            write(folder, "notes.md")
        child = os.fork()
        if not child:
            if not can_exchange:
                folders._exchange = lambda *_: False  # type: ignore[assignment]
            setattr(os, at, the_last_one(getattr(os, at), n))
            put(folder, "new")
            os._exit(0)
        killed = os.waitpid(child, 0)[1]
        restore(folder)  # what every command does first
        found = texts(folder) if folder.exists() else {}
        if "adapter_config.json" in found:
            assert found in (dict.fromkeys(FILES, "old"), dict.fromkeys(FILES, "new"))
        else:
            assert there != "an adapter"
        put(folder, "newest")  # the same command goes on, and tidies up
        assert texts(folder) == dict.fromkeys(FILES, "newest")
        assert [path.name for path in folder.parent.iterdir()] == ["adapter"]
        assert ("notes.md" in read(folder)) == (there != "nothing")
        if not killed:
            return
    raise AssertionError("it was killed 20 times")


@pytest.mark.parametrize("beside", [".", "adapter"])
def test_what_a_killed_process_leaves_beside_is_tidied(tmp_path: Path, beside: str) -> None:
    folder, place = tmp_path / "adapter", tmp_path / beside
    put(folder, "whole")
    for name in (".adapter.lock", ".adapter.partial/README.md", ".adapter.replaced/README.md"):
        write(place, name)
    with alone(place, ".adapter.lock"):  # by a process that is alive: left to it
        restore(folder)
        assert (place / ".adapter.partial" / "README.md").exists()
    write(place, ".adapter.lock")
    restore(folder)
    assert texts(folder) == dict.fromkeys(FILES, "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert sorted(read(folder)) == sorted(FILES)


def test_a_folder_one_stands_in_is_not_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "old")
    monkeypatch.chdir(tmp_path / "geolora")
    with (
        pytest.raises(OutputError, match="the folder you are in. Choose another"),
        replacing(tmp_path),
    ):
        pass
    assert texts(tmp_path) == dict.fromkeys(FILES, "old")
