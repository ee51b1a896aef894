"""Commands in forks of a warm process, each with one fault of the file system or one signal.

`faults.c` counts the calls that change what lies below a folder and makes the fault at one of them.
Run as a program this file is the warm process: it has imported what the commands need, so that one
takes a second. `Machine` starts it and talks to it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MODES = (
    *("count", "kill", "tear", "power", "full", "short", "once"),
    *("interrupt", "terminate", "stop"),
)
"""As in faults.c."""
SECONDS = 120
"""No command takes longer."""


class Fault(NamedTuple):
    """What happens at the `at`-th call; see faults.c."""

    mode: str
    at: int


NOTHING = Fault("count", 0)


class Done(NamedTuple):
    """How a command ended.

    Attributes:
        code: exit code; the negative number of a signal.
        calls: those that changed the folder, each "what path", in order.
    """

    code: int
    out: str
    err: str
    calls: list[str]


class Unavailable(Exception):
    """There can be no faults on this machine; says why."""


class Machine:
    """A warm process, in which commands are run on one folder.

    Args:
        folder: for what the machine itself writes; new.
        world: the folder whose calls are counted, and in which commands run.
        first: a command that is run in the warm process itself, to fill its caches.

    Raises:
        Unavailable: not Linux with glibc, or no C compiler.
    """

    def __init__(self, folder: Path, world: Path, first: Sequence[str]) -> None:
        self.folder, self.world = folder, world
        folder.mkdir(parents=True)
        library = compiled(folder)
        here = Path(__file__).resolve()
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)]),
            "PYTHONHASHSEED": "0",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (folder / "said").open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(here), *first], env=environment, cwd=world,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            )  # fmt: skip
        self._read()  # it is warm

    def run(self, words: Sequence[str], fault: Fault = NOTHING) -> Done:
        """Run `geolora` with these words, or `python` where the first word is that: a program's text."""
        return self._ask([(words, fault)])[0]

    def race(self, words: Sequence[str], at: int, other: Sequence[str]) -> tuple[Done, Done]:
        """Run a command, halt it at a call, run another one to the end, and let the first go on."""
        first, second = self._ask([(words, Fault("stop", at)), (other, NOTHING)])
        return first, second

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _ask(self, commands: list[tuple[Sequence[str], Fault]]) -> list[Done]:
        files = [self.folder / f"command-{number}" for number in range(len(commands))]
        asked = [
            {
                "words": [*words],
                "mode": MODES.index(fault.mode),
                "at": fault.at,
                "world": str(self.world.resolve()),
                "files": str(file),
            }
            for (words, fault), file in zip(commands, files, strict=True)
        ]
        assert self.process.stdin is not None
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        codes = self._read()
        return [
            Done(
                code,
                *(file.with_suffix(ending).read_text() for ending in (".out", ".err")),
                file.with_suffix(".calls").read_text().splitlines(),
            )
            for code, file in zip(codes, files, strict=True)
        ]

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, (self.folder / "said").read_text()[-2000:]
        return json.loads(line)


def compiled(folder: Path) -> Path:
    """The library of faults.c.

    Raises:
        Unavailable: as for `Machine`.
    """
    if sys.platform != "linux":
        raise Unavailable("LD_PRELOAD is needed, which Linux has")
    compiler = shutil.which("cc")
    if compiler is None:
        raise Unavailable("a C compiler is needed; there is no `cc`")
    source, library = Path(__file__).with_suffix(".c"), folder / "faults.so"
    done = subprocess.run(
        [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise Unavailable(f"faults.c does not compile here: {done.stderr.strip()[-200:]}")
    return library


# ---- the warm process ---------------------------------------------------------------------------


def serve() -> None:
    """Say that it is warm, then answer every line of commands with their exit codes."""
    import ctypes

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up(sys.argv[1:])
    arm = ctypes.CDLL(os.environ.pop("LD_PRELOAD")).faults_arm
    print("[]", file=answers, flush=True)
    for line in sys.stdin:  # a second command is run while the first is halted, or has ended
        first, *others = json.loads(line)
        child = started(first, arm)
        _, status = os.waitpid(child, os.WUNTRACED)
        codes = [os.waitstatus_to_exitcode(os.waitpid(started(c, arm), 0)[1]) for c in others]
        if os.WIFSTOPPED(status):
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(status), *codes]), file=answers, flush=True)


def warm_up(words: list[str]) -> None:
    """Run a command here: what it imports and computes once, forks have."""
    import gc

    import torch
    import tqdm

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread: a fork has none
    code = carried_out(words)
    assert code == 0, words
    gc.collect()
    gc.freeze()  # else every collection of a fork walks through all of it


def started(command: dict[str, Any], arm: Any) -> int:
    """Fork; the child runs the command and ends. Gives its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        for number, ending in ((1, ".out"), (2, ".err")):
            file = os.open(command["files"] + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(file, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        signal.alarm(SECONDS)
        os.chdir(command["world"])
        arm(
            command["world"].encode(),
            command["mode"],
            command["at"],
            (command["files"] + ".calls").encode(),
        )
        code = carried_out(command["words"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def carried_out(words: list[str]) -> int:
    """Exit code of a command, as a shell would see it."""
    from geolora.cli.__main__ import main

    try:
        if words[0] == "python":
            exec(compile(words[1], "script", "exec"), {"__name__": "__main__"})
            return 0
        sys.argv = ["geolora", *words]
        return main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - what Python does with it
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    serve()
