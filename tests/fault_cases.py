"""Commands that write, each in a folder that also holds a user's files, and what must hold after a fault.

`Lab` makes the folders once and tries a case with a fault: nothing of the user's is lost, an error is
one line, what was whole is whole (the old or the new), and the same command then goes on to what it
writes undisturbed, bit for bit, and leaves nothing else behind.
"""

import contextlib
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from faults import Done, Fault, Machine
from models import tiny_bert
from rows import reviews

TRAIN = (
    *("train", "--model", "model", "--train", "train.jsonl", "--eval", "dev.jsonl"),
    *("--rank", "4", "--lr", "0.03", "--max-steps", "3", "--batch-size", "8", "--save-every", "1"),
)
PLAN = """
output: {output}
common: {{model: model, max_steps: 2, batch_size: 8, rank: 2, save_every: 1}}
tasks: {{films: {{train: train.jsonl, eval: dev.jsonl}}}}
methods: {methods}
"""
METHODS = ("lora: {lr: 1e-2}", "geolora: {lr: 0.03}")
PRUNE = """
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import geolora

base = AutoModelForSequenceClassification.from_pretrained("model", num_labels=2)
model = PeftModel.from_pretrained(base, "run/adapter")
geolora.prune(model, budget=1500)
geolora.export(model, "pruned")
"""
KILLS, FULL, SIGNALS, SECOND = (
    ("kill", "tear", "power"), ("full", "short", "once"), ("interrupt", "terminate"), ("stop",)
)  # fmt: skip
"""Modes of faults; the last halts the process until a second one has been there."""
NOTE = "mine.md"
LATER = "mine-too.md"
"""What the user wrote before the command, and after the fault."""
TIMES = {
    *("seconds", "seconds_per_step", "peak_memory_bytes", "train_runtime"),
    *("train_samples_per_second", "train_steps_per_second"),
}
"""What differs between two runs of the same bits."""
UNFINISHED = re.compile(r"\.partial|\.replaced|\.tmp|\.lock|/checkpoints/|/start/")
"""In names of what no user takes for a result."""
PASSING = re.compile(r"\.partial|\.replaced|\.tmp|checkpoint-")
"""In names of folders that no user writes into."""
FIRST = "another process works in| exists\\. | holds a stopped run"
"""What a command says where another one was first."""


# ---- the commands -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A command.

    Attributes:
        words: of the command line, or "python" and a program.
        writes: folders it may change.
        before: what was done in the world first.
        keeps: whether an adapter it replaces is there at every moment, the old or the new.
        rival: further words of a command that wants the same folder for something else.
    """

    words: tuple[str, ...]
    writes: tuple[str, ...]
    before: Callable[["Lab"], Any] = lambda _: None
    keeps: bool = False
    rival: tuple[str, ...] = ()


def _train(output: str, *more: str) -> Callable[["Lab"], None]:
    return lambda lab: lab.do(*TRAIN, "--output", output, *more)


def _stopped(lab: "Lab") -> None:
    """A run that was killed after its second checkpoint."""
    words = (*TRAIN, "--output", "out")
    calls = lab.do(*words).calls
    shutil.rmtree(lab.world / "out")
    at = calls.index("rename /out/checkpoints/checkpoint-2/geolora.json") + 2
    assert lab.machine.run(words, Fault("kill", at)).code == -signal.SIGKILL


def _exported(lab: "Lab") -> None:
    lab.do("export", "run/adapter", "served", "--rank", "4")
    lab.do("export", "run/adapter", "pruned", "--rank", "3", "--max-error", "1")


def _compared(count: int) -> Callable[["Lab"], Any]:
    """The comparison with some of its methods."""

    def run(lab: "Lab") -> None:
        (lab.world / "less.yaml").write_text(_plan(count))
        lab.do("compare", "less.yaml")

    return run


def _plan(count: int) -> str:
    return PLAN.format(output="compared", methods=f"{{{', '.join(METHODS[:count])}}}")


def _older(lab: "Lab") -> None:
    """A run and a comparison with figures and pages that are whole, and other than what is drawn now."""
    _compared(2)(lab)
    for path in lab.world.rglob("*.png"):
        path.write_bytes(_png_of_one_pixel())
    for path in lab.world.rglob("report.html"):
        path.write_text("<!doctype html><p>older</p></html>\n")


def _png_of_one_pixel() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "png")
    return file.getvalue()


CASES = {
    "train": Case((*TRAIN, "--output", "out"), ("out",), rival=("--seed", "5")),
    "train on": Case((*TRAIN, "--output", "out"), ("out",), _stopped),
    "train over": Case(
        (*TRAIN, "--output", "out", "--overwrite"), ("out",), _train("out", "--seed", "1")
    ),
    "export": Case(("export", "run/adapter", "new/served"), ("new",), rival=("--rank", "7")),
    "export over": Case(
        ("export", "run/adapter", "served", "--layout", "compact", "--overwrite"),
        ("served",),
        _exported,
        keeps=True,
    ),
    "export itself": Case(
        ("export", "run/adapter", "run/adapter", "--rank", "6", "--overwrite"),
        ("run/adapter",),
        keeps=True,
    ),
    "prune": Case(("python", PRUNE), ("pruned",), keeps=False),
    "prune over": Case(("python", PRUNE), ("pruned",), _exported, keeps=True),
    "compare": Case(("compare", "plan.yaml"), ("compared",)),
    "compare on": Case(("compare", "plan.yaml"), ("compared",), _compared(1)),
    "plot": Case(("plot", "run", "compared"), ("run", "compared"), _older),
    "inspect": Case(("inspect", "run/adapter", "--figures", "drawn", "--overwrite"), ("drawn",)),
}


# ---- trying them --------------------------------------------------------------------------------


@dataclass
class Known:
    """A case without a fault.

    Attributes:
        store: a copy of the world as it is before the command.
        before, after: what is in it then, and when it has ended.
        rival: what the rival leaves.
        calls: of the command.
    """

    store: Path
    before: dict[str, Any]
    after: dict[str, Any]
    rival: dict[str, Any]
    calls: list[str]


class Lab:
    """A world with a model, data and a finished run, and a machine that runs commands in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world = folder, folder / "world"
        self.world.mkdir(parents=True)
        tiny_bert(self.world / "model")
        for name, rows in (("train", reviews(40)), ("dev", reviews(10, seed=1))):
            lines = "\n".join(json.dumps(row) for row in rows)
            (self.world / f"{name}.jsonl").write_text(lines)
        (self.world / "plan.yaml").write_text(_plan(2))
        self.machine = Machine(
            folder / "machine", self.world, first=[*TRAIN, "--seed", "7", "--output", "run"]
        )
        self.base = folder / "base"
        shutil.copytree(self.world, self.base)
        self.known: dict[str, Known] = {}

    def do(self, *words: str) -> Done:
        """Run a command that ends well."""
        done = self.machine.run(words)
        assert done.code == 0, (words, done.err)
        return done

    def close(self) -> None:
        """End the machine."""
        self.machine.close()

    def undisturbed(self, name: str) -> Known:
        """What a case does without a fault; found once."""
        if name not in self.known:
            case = CASES[name]
            self._restore(self.base)
            case.before(self)
            outside = self.world / "outside"
            outside.mkdir()
            for path in case.writes:
                if (self.world / path).is_dir():
                    (self.world / path / "linked").symlink_to(outside)
            plant(self.world, NOTE)
            store = self.folder / name.replace(" ", "-")
            shutil.copytree(self.world, store, symlinks=True)
            before = contents(self.world)
            rival = before
            if case.rival:
                self.do(*case.words, *case.rival)
                rival = contents(self.world)
                self._restore(store)
            calls = self.do(*case.words).calls
            self.known[name] = Known(store, before, contents(self.world), rival, calls)
        return self.known[name]

    def trials(
        self, name: str, modes: tuple[str, ...], count: int, seed: int
    ) -> Iterator[dict[str, Any]]:
        """Try a case with faults at random calls; gives what each was, and what went wrong.

        Every second time the user writes into the folders before starting the command again; every fifth
        time that start fails too.
        """
        calls, draw = self.undisturbed(name).calls, random.Random(seed)
        for number, at in enumerate(drawn(calls, count, draw)):
            begun, fault = time.perf_counter(), Fault(draw.choice(modes), at)
            again = [Fault(fault.mode, 1 + at // 2)] if number % 5 == 4 else []
            if fault.mode == "stop":
                wrong = self.race(name, at)
            else:
                wrong = self.problems(name, fault, *again, later=number % 2 == 1)
            yield {
                "command": name,
                "fault": fault.mode,
                "at": at,
                "of": len(calls),
                "call": calls[at - 1],
                "wrong": wrong,
                "seconds": round(time.perf_counter() - begun, 1),
            }

    def problems(self, name: str, *faults: Fault, later: bool = False) -> list[str]:
        """What goes wrong with a case when faults strike, one per start; nothing where all is well.

        Args:
            later: whether the user writes files into the folders before starting the command again.
        """
        case, known = CASES[name], self.undisturbed(name)
        self._restore(known.store)
        found: list[str] = []
        notes: dict[str, Any] = {}
        ended = False
        for fault in faults:
            done = self.machine.run(case.words, fault)
            middle = contents(self.world)
            found += [
                *lost(case, known, middle),
                *said(case, fault, done),
                *torn(case, known, middle, self.world),
            ]
            if done.code == 0:
                break
        else:
            if later:
                notes = plant(self.world, LATER, case.writes)
            done = self.machine.run(case.words)
            ended = not any(differs(results(known.after), results(middle)))
            if done.code != 0 and not (ended and " exists. " in done.err):
                found.append(f"the same command: {done.code}, {done.err.strip()[-300:]}")
        end = self._end(name, {**known.after, **notes})
        if name == "export itself" and ended:  # it is exported a second time
            end = [line for line in end if not line.endswith(" differs")]
        return found + [f"at the end: {line}" for line in end]

    def race(self, name: str, at: int) -> list[str]:
        """What goes wrong when a command is at a call, and it or its rival is run meanwhile."""
        case, known = CASES[name], self.undisturbed(name)
        found = []
        for other in [(), case.rival] if case.rival else [()]:
            self._restore(known.store)
            both = self.machine.race(case.words, at, (*case.words, *other))
            for number, done in zip(("first", "second"), both, strict=True):
                if done.code != 0 and not _waits(done, case.words[0] == "python"):
                    found.append(f"the {number}: {done.code}, {done.err.strip()[-300:]}")
            successes = sum(one.code == 0 for one in both)
            if not successes or (other and successes == 2):
                found.append("both did it" if successes else "neither did it")
            after = known.rival if other and both[0].code else known.after
            found += [f"at the end: {line}" for line in self._end(name, after)]
        return found

    def _end(self, name: str, expected: dict[str, Any]) -> list[str]:
        end = contents(self.world)
        return [*lost(CASES[name], self.known[name], end), *differs(expected, end)]

    def _restore(self, store: Path) -> None:
        shutil.rmtree(self.world)
        shutil.copytree(store, self.world, symlinks=True)


def drawn(calls: list[str], count: int, draw: random.Random) -> Iterator[int]:
    """Numbers of random calls, of which those alike (the same of one file) count as one."""
    alike: dict[str, list[int]] = {}
    for at, call in enumerate(calls, 1):
        alike.setdefault(re.sub(r"\.tmp\w{6}", ".tmp", call), []).append(at)
    groups = list(alike.values())
    while count:
        for group in draw.sample(groups, min(count, len(groups))):
            yield draw.choice(group)
            count -= 1


# ---- what must hold -----------------------------------------------------------------------------


def plant(world: Path, name: str, below: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """Write a file of the user's into every folder that is a result, and say which."""
    planted: dict[str, Any] = {}
    for start in below:
        for folder in sorted([world / start, *(world / start).rglob("*")]):
            path = folder / name
            relative = path.relative_to(world).as_posix()
            if folder.is_dir() and not folder.is_symlink() and not PASSING.search(relative):
                path.write_text(f"{relative}, {name}")
                planted[relative] = path.read_bytes()
                planted |= {parent.as_posix(): "a folder" for parent in Path(relative).parents[:-1]}
    return planted


def contents(world: Path) -> dict[str, Any]:
    """What every path below a folder is: bytes, the target of a link, or that it is a folder."""
    found: dict[str, Any] = {}
    for path in sorted(world.rglob("*")):
        name = path.relative_to(world).as_posix()
        if path.is_symlink():
            found[name] = f"leads to {path.readlink()}"
        else:
            found[name] = "a folder" if path.is_dir() else path.read_bytes()
    return found


def results(found: dict[str, Any]) -> dict[str, Any]:
    """What a user takes for a result."""
    return {path: value for path, value in found.items() if not UNFINISHED.search(f"/{path}/")}


def lost(case: Case, known: Known, now: dict[str, Any]) -> Iterator[str]:
    """Files of the user's, and inputs, that are gone or changed."""
    for path, value in known.before.items():
        ours = any(f"{path}/".startswith(f"{folder}/") for folder in case.writes)
        if (not ours or Path(path).name in (NOTE, "linked")) and now.get(path) != value:
            yield f"{path} {'changed' if path in now else 'lost'}"


def said(case: Case, fault: Fault, struck: Done) -> Iterator[str]:
    """What is wrong with how a command ended that a fault struck."""
    if struck.code == 0 or fault.mode in KILLS:
        return
    program = case.words[0] == "python"
    expected = {"interrupt": (1 if program else 130,), "terminate": (130, -signal.SIGTERM)}
    if struck.code not in expected.get(fault.mode, (1 if program else 2,)):
        yield f"exit code {struck.code}"
    last = struck.err.strip().rpartition("\n")[2]
    if "Traceback" in struck.err and not program:
        yield f"a traceback: {struck.err.strip()[-600:]}"
    elif struck.code == 2 and not re.match("geolora: .*there is no space left", last):
        yield f"says: {last}"


def _waits(done: Done, program: bool) -> bool:
    """Whether a command said in one line that another one was first."""
    last = done.err.strip().rpartition("\n")[2]
    told = re.match(f"geolora(.errors.OutputError)?: .*({FIRST})", last)
    return told is not None and (program or "Traceback" not in done.err)


def torn(case: Case, known: Known, now: dict[str, Any], world: Path) -> Iterator[str]:
    """Results that are not whole, or a mix of old and new."""
    for path, value in results(now).items():
        changed = isinstance(value, bytes) and known.before.get(path) != value
        if changed and not whole(world / path):
            yield f"{path} is torn"
    for path in known.after:
        if not path.endswith("adapter_model.safetensors"):
            continue
        folder = path.rpartition("/")[0]
        old, new, here = (
            {
                k: comparable(k, v)
                for k, v in of.items()
                if k.startswith(f"{folder}/") and isinstance(v, bytes) and _ours(k)
            }
            for of in (known.before, known.after, now)
        )
        loads = {path, f"{folder}/adapter_config.json"} <= here.keys()
        if here not in (old, new) and (loads or case.keeps):
            yield f"{folder} is neither the old adapter nor the new one: {sorted(here)}"
    for path in results(now):
        folder, _, name = path.rpartition("/")
        if name == "report.json" and f"{folder}/adapter/adapter_config.json" not in now:
            yield f"{path} without its adapter"


def _ours(path: str) -> bool:
    return Path(path).name not in (NOTE, LATER, "linked") and not UNFINISHED.search(f"/{path}/")


def whole(path: Path) -> bool:
    """Whether a result can be read to its end."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix == ".png":
            return path.read_bytes().endswith(b"IEND\xaeB`\x82")
        elif path.suffix == ".html":
            return path.read_text().endswith("</html>\n")
        else:
            return path.read_bytes().endswith(b"\n")
    except (ValueError, SafetensorError):
        return False
    return True


def differs(expected: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What is not as it is without a fault."""
    for path in sorted(expected.keys() | now.keys()):
        if path not in now:
            yield f"{path} is missing"
        elif path not in expected:
            yield f"{path} is left over"
        elif comparable(path, expected[path]) != comparable(path, now[path]):
            yield f"{path} differs"


def comparable(path: str, value: Any) -> Any:
    """What must be the same of a file: all but times and memory, in pages and tables all but numbers."""
    if not isinstance(value, bytes):
        return value
    if path.endswith(".json"):
        with contextlib.suppress(ValueError):
            return timeless(json.loads(value))
    if path.endswith(("report.html", "table.txt")):
        return re.sub(rb"[\d.,]+ *", b"0", value)
    return value


def timeless(value: Any) -> Any:
    """A JSON value without what depends on how fast the machine was."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in TIMES}
    return [timeless(v) for v in value] if isinstance(value, list) else value
