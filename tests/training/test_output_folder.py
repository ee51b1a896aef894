"""Full disks and missing rights, as each library reports them, become one line."""

import errno
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from geolora.errors import OutputError
from geolora.training.output_folder import naming_disk_errors, remove_folder


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space left"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space left"),
        (SafetensorError("Error while serializing: I/O error: … (os error 28)"), "no space left"),
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
from geolora.training.output_folder import naming_disk_errors
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


def test_a_link_is_removed_and_what_it_points_to_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove_folder(tmp_path / "link")
    assert not (tmp_path / "link").exists()
    assert (tmp_path / "real" / "file").read_text() == "kept"
