"""The architecture: what may import what, what is public, what importing loads."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import geolora

SRC = Path(geolora.__file__).parent

CALLS_PEFT = {"optim.lora_plus", "training.recipes", "training.peft_recipes"}
"""Beside `pairs` and `adapters`, which know PEFT's layers and files: what calls its methods."""

TABLE = """
    adapters.base_model              : errors files pairs adapters.names adapters.patterns adapters.read
    adapters.card                    : errors adapters.names
    adapters.export                  : errors files pairs adapters.card adapters.names
    adapters.inspect                 : errors kernels pairs adapters.read
    adapters.names                   :
    adapters.patterns                : errors
    adapters.prune                   : errors kernels pairs
    adapters.read                    : errors files pairs adapters.names adapters.patterns
    adapters.truncate                : pairs
    adapters.verify                  : errors pairs adapters.base_model adapters.names adapters.read
    cli.__main__                     : errors cli.compare cli.demo cli.export cli.inspect cli.plot cli.train cli.terminal cli.verify settings
    cli.compare                      : comparing files report cli.plot cli.terminal
    cli.demo                         : adapters errors files report settings tasks training cli.demo_texts cli.terminal
    cli.demo_texts                   : errors
    cli.export                       : adapters files cli.terminal
    cli.inspect                      : adapters errors files report cli.terminal
    cli.plot                         : errors files report tasks cli.terminal
    cli.train                        : processes settings training cli.plot cli.terminal
    cli.terminal                     : errors
    cli.verify                       : adapters cli.terminal
    comparing.bootstrap              : tasks
    comparing.plan                   : errors settings
    comparing.run                    : errors files processes settings tasks training comparing.plan comparing.summary
    comparing.summary                : methods tasks comparing.bootstrap comparing.plan
    errors                           :
    files.folders                    : errors files.ours files.writing
    files.ours                       : files.reading files.writing
    files.output_folder              : errors files.folders files.ours files.reading
    files.reading                    : errors
    files.writing                    :
    kernels.augment                  : kernels.decompose
    kernels.decompose                :
    kernels.sketch                   :
    kernels.solve                    :
    kernels.tangent                  :
    kernels.truncate                 :
    methods                          : errors
    methods.*                        : kernels
    optim.*                          : errors methods pairs optim.adamw optim.base optim.buckets optim.saved_state
    optim.adamw                      :
    optim.base                       : errors methods pairs optim.adamw optim.buckets optim.layout optim.nonfinite optim.saved_state
    optim.buckets                    : pairs
    optim.geolora                    : errors kernels methods pairs optim.base optim.buckets optim.geolora_step.across_layers optim.geolora_step.bucket_step optim.geolora_step.masters optim.geolora_step.rank_cycle optim.geolora_step.slot_widths optim.nonfinite optim.saved_state
    optim.geolora_step.across_layers : kernels methods optim.geolora_step.bucket_step optim.geolora_step.rank_cycle
    optim.geolora_step.bucket_step   : kernels methods pairs optim.buckets optim.geolora_step.masters optim.geolora_step.rank_cycle
    optim.geolora_step.masters       : kernels pairs optim.buckets optim.geolora_step.rank_cycle optim.saved_state
    optim.geolora_step.rank_cycle    :
    optim.geolora_step.slot_widths   : optim.geolora_step.bucket_step
    optim.layout                     : errors optim.buckets
    optim.lora                       : errors
    optim.lora_plus                  : errors optim.lora
    optim.nonfinite                  : errors
    optim.saved_state                : errors
    pairs.find                       : errors pairs.sharded
    pairs.point                      :
    pairs.sharded                    :
    processes                        :
    report.clean                     : files
    report.comparison                : errors report.clean report.figures report.inline report.layout report.panels report.text report.view
    report.figures                   : files report.clean report.inline report.layout report.panels
    report.inline                    : report.clean
    report.layout                    :
    report.pages                     : errors files report.clean report.figures report.inline report.panels report.view
    report.panels                    : report.layout report.view
    report.shape                     :
    report.text                      : errors report.layout report.view
    report.view                      : report.clean
    settings.other_tools             : errors
    settings.strict_yaml             : errors settings.other_tools
    settings.train_config            : methods
    starts.find_lr                   : errors kernels methods pairs processes report starts.gradient_pass starts.put_back
    starts.gradient_pass             : errors kernels pairs processes starts.put_back
    starts.gradient_state            : adapters errors kernels pairs starts.gradient_pass
    starts.lora_ga                   : errors methods pairs starts.gradient_pass starts.gradient_state
    starts.lora_one                  : kernels methods pairs starts.gradient_pass starts.gradient_state starts.step_length
    starts.lora_sb                   : methods starts.gradient_pass starts.gradient_state starts.step_length
    starts.put_back                  :
    starts.step_length               : errors pairs starts.gradient_pass
    tasks.answers                    : errors tasks.chat_tokens tasks.task
    tasks.causal_lm                  : errors processes settings tasks.answers tasks.chat_tokens tasks.rows tasks.task tasks.tokenizers
    tasks.chat_tokens                : errors tasks.tokenizers
    tasks.csv_rows                   : errors
    tasks.image_classification       : errors files settings tasks.csv_rows tasks.rows tasks.task
    tasks.metrics                    :
    tasks.rows                       : errors files tasks.csv_rows
    tasks.task                       : adapters errors files processes settings tasks.rows
    tasks.text_classification        : errors settings tasks.rows tasks.task tasks.tokenizers
    tasks.token_classification       : errors settings tasks.rows tasks.task tasks.tokenizers
    tasks.tokenizers                 : errors settings
    trainer                          : errors methods optim
    training.batch_order             :
    training.check                   : errors files processes settings training.recipes training.resume
    training.checkpoints             : errors files processes training.identity
    training.clock                   : files processes
    training.identity                : files settings
    training.peak_memory             :
    training.peft_recipes            : adapters errors pairs training.recipes
    training.recipes                 : adapters errors methods pairs settings starts trainer
    training.resume                  : errors files processes settings training.checkpoints training.identity
    training.run                     : errors files processes settings starts tasks trainer training.batch_order training.check training.checkpoints training.clock training.identity training.peak_memory training.recipes training.resume training.step_size
    training.step_size               : files processes settings starts training.check training.recipes
"""
"""Module : what it may import of ours: whole rooms (folders, or files at the top), and files of its own room.

`room.*` stands for the files of a room that have no row of their own: papers, and optimizers of one paper.
Every import counts, also one in a function, under TYPE_CHECKING or by `importlib` of a name in quotes. The rows of
the table of methods name what a method is made of: they are the only arrows upwards. The face,
`geolora/__init__.py`, is imported by nobody here.
"""

OTHERS = {
    "errors": set(),
    "kernels": {"torch"},
    "methods": {"torch"},
    "optim": {"torch"},
    "pairs": {"torch", "peft"},
}
"""What the numerical rooms may import from other packages, beside the standard library."""


def name_of(path: Path, src: Path = SRC) -> str:
    """`kernels.augment`; a room's own name for its `__init__`, "" for the face."""
    parts = path.relative_to(src).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def table() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for line in TABLE.strip().splitlines():
        name, _, allowed = line.partition(":")
        assert name.strip() not in found, f"{name.strip()} has two rows"
        found[name.strip()] = set(allowed.split())
    return found


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything a file imports, wherever it stands; name is "" for `import x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            for alias in node.names:
                yield str(node.module), alias.name
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                for word in node.args:
                    if isinstance(word, ast.Constant):
                        yield str(word.value), ""


class Graph:
    """The imports between the modules of a package folder."""

    def __init__(self, src: Path) -> None:
        self.files = {name_of(path, src): path for path in sorted(src.rglob("*.py"))}
        self.arrows: dict[str, set[str]] = {name: set() for name in self.files}
        self.others: dict[str, set[str]] = {name: set() for name in self.files}
        self.wrong: list[str] = []
        for name, path in self.files.items():
            for module, attribute in imports(path):
                first, _, inner = module.partition(".")
                if first != "geolora":
                    self.others[name].add(first)
                    continue
                whole = f"{inner}.{attribute}".strip(".") if attribute else inner
                target = whole if whole in self.files else inner
                if target not in self.files:
                    self.wrong.append(f"{name} imports geolora.{target}, which is no module")
                elif target == "":
                    self.wrong.append(f"{name} imports the package's face")
                else:
                    self.arrows[name].add(target)

    def faults(self, rows: dict[str, set[str]]) -> list[str]:
        """What the table does not allow, in words."""
        found = list(self.wrong)
        rooms = {name.partition(".")[0] for name in self.files}
        for name, allowed in rows.items():
            if name not in self.files and name.removesuffix(".*") not in rooms:
                found.append(f"the row {name} is of no module")
            for target in allowed - rooms - set(self.files):
                found.append(f"the row {name} names {target}, which is no module")
        for name, targets in self.arrows.items():
            if name == "":  # the face names what is public, and is checked with it
                continue
            empty = self.files[name].name == "__init__.py" and not targets
            room_row = name.partition(".")[0] + ".*" if "." in name else name
            allowed = rows.get(name, rows.get(room_row))
            if not empty and allowed is None:
                found.append(f"{name} has no row")
            for target in targets:
                room = target.partition(".")[0]
                own = room == name.partition(".")[0] and "." in target
                if (target if own else room) not in (allowed or ()):
                    found.append(f"{name} must not import {target}")
        return found

    def cycles(self) -> list[str]:
        """Modules, and rooms, that import each other around."""
        rooms: dict[str, set[str]] = {}
        for name, targets in self.arrows.items():
            room = name.partition(".")[0]
            rooms.setdefault(room, set()).update(t.partition(".")[0] for t in targets)
            rooms[room].discard(room)
        return [*_around(self.arrows, "module"), *_around(rooms, "room")]


def _around(arrows: dict[str, set[str]], what: str) -> list[str]:
    left = {name: set(targets) for name, targets in arrows.items() if name}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    return [f"{what} {name} is in a cycle or above one" for name in left]


GRAPH = Graph(SRC)
FILES = [path for name, path in GRAPH.files.items() if name]


def test_imports_point_one_way() -> None:
    assert GRAPH.faults(table()) == []


def test_nothing_is_imported_around() -> None:
    assert GRAPH.cycles() == []


@pytest.mark.parametrize(
    "module, line, fault",
    [
        (
            "kernels/solve",
            "from geolora import GeoLoRA",
            "kernels.solve imports the package's face",
        ),
        ("kernels/solve", "import geolora", "kernels.solve imports the package's face"),
        ("kernels/solve", "x = __import__('geolora')", "kernels.solve imports the package's face"),
        (
            "tasks/rows",
            "import importlib\nx = importlib.import_module('geolora.training.run')",
            "tasks.rows must not import training.run",
        ),
        (
            "tasks/rows",
            "from geolora.training import run",
            "tasks.rows must not import training.run",
        ),
        (
            "tasks/rows",
            "def late():\n    from geolora.training.run import train",
            "tasks.rows must not import training.run",
        ),
        (
            "tasks/rows",
            "if TYPE_CHECKING:\n    from geolora.training.run import Outcome",
            "tasks.rows must not import training.run",
        ),
        (
            "kernels/solve",
            "from geolora.kernels import truncate",
            "kernels.solve must not import kernels.truncate",
        ),
        (
            "report/text",
            "from geolora.nowhere import x",
            "report.text imports geolora.nowhere, which is no module",
        ),
        (
            "methods/rac_lora",
            "import geolora.optim.base",
            "methods.rac_lora must not import optim.base",
        ),
        (
            "kernels/new",
            '"""A module without a row."""\nimport geolora.errors',
            "kernels.new has no row",
        ),
        (
            "pairs/sharded",
            "from geolora.pairs import find",
            "module pairs.find is in a cycle or above one",
        ),
        (
            "errors",
            "from geolora.trainer import for_trainer",
            "room errors is in a cycle or above one",
        ),
    ],
)
def test_the_rule_can_fail(module: str, line: str, fault: str, tmp_path: Path) -> None:
    src = shutil.copytree(SRC, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with (src / f"{module}.py").open("a", encoding="utf-8") as file:
        file.write(f"\n\n{line}\n")
    graph = Graph(src)
    assert fault in [*graph.faults(table()), *graph.cycles()]


@pytest.mark.parametrize("folder", [SRC, *(path for path in SRC.rglob("*") if path.is_dir())])
def test_rooms_are_small(folder: Path) -> None:
    if folder.name == "__pycache__":
        return
    files = [path for path in folder.iterdir() if path.is_file()]
    one_thing_a_file = folder.name in ("methods", "optim", "cli")
    assert len(files) <= (6 if folder == SRC else 20 if one_thing_a_file else 12)
    for path in files:
        if path.suffix == ".py":
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


@pytest.mark.parametrize("room", OTHERS)
def test_the_numerical_rooms_import_torch_at_most(room: str) -> None:
    for name, others in GRAPH.others.items():
        if name.partition(".")[0] == room and name not in CALLS_PEFT:
            assert others - set(sys.stdlib_module_names) <= OTHERS[room], name


def test_few_files_know_peft() -> None:
    knowing = {name for name, others in GRAPH.others.items() if "peft" in others}
    assert {
        name for name in knowing if name.split(".")[0] not in ("adapters", "pairs")
    } == CALLS_PEFT


def test_importing_loads_torch_at_most() -> None:
    code = (
        "import sys; before = set(sys.modules); import geolora; geolora.GeoLoRA; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'transformers', 'matplotlib', 'peft', 'sklearn', 'accelerate'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    light = "import sys, geolora; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_public_names_are_sorted_documented_and_there() -> None:
    assert geolora.__all__ == sorted(geolora.__all__)
    assert set(geolora.__all__) <= set(dir(geolora))
    for name in geolora.__all__:
        thing = getattr(geolora, name)
        assert thing.__doc__, name
        assert len(thing.__doc__.splitlines()) > 1, f"{name}: arguments and errors are said"
    with pytest.raises(AttributeError, match="no attribute 'GeoLora'"):
        geolora.GeoLora  # noqa: B018


def test_every_module_says_what_it_is_and_none_is_a_drawer() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert path.stem not in ("utils", "misc", "common", "helpers"), path


def test_errors_are_drawn_in_their_docstring() -> None:
    from geolora import errors

    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    assert len(kinds) > 10
    for kind in (*kinds, *(w for w in kinds if issubclass(w, Warning))):
        assert kind.__name__ in errors.__doc__
    for kind in kinds:
        if kind not in (errors.GeoloraError, errors.GeoloraWarning):
            assert issubclass(kind, errors.GeoloraError | errors.GeoloraWarning)


def test_the_table_of_methods_is_read_without_torch() -> None:
    code = "import sys, geolora.methods; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_every_paper_file_has_a_row_and_says_what_it_is() -> None:
    from geolora.methods import METHODS, resolve

    files = {path.stem for path in (SRC / "methods").glob("*.py")} - {"__init__"}
    rows = [row for row in METHODS.values() if row.mathematics]
    stems = {row.name: resolve(row.mathematics).__module__.rpartition(".")[2] for row in rows}
    assert set(stems.values()) == files, (
        "methods/ without a row, or rows without a file in methods/"
    )
    for row in rows:
        text = sys.modules[resolve(row.mathematics).__module__].__doc__ or ""
        assert row.arxiv, f"{row.name}: its row must name the paper's arXiv id"
        for word in ("Paper:", "What this file computes:", "Differences", row.arxiv):
            assert word in text, f"methods/{stems[row.name]}.py: the docstring must have `{word}`"


def test_every_optimizer_and_recipe_is_named_by_a_row() -> None:
    from geolora.methods import METHODS, resolve
    from geolora.training import peft_recipes, recipes

    shared = {"__init__", "adamw", "base", "buckets", "layout", "nonfinite", "saved_state"}
    files = {path.stem for path in (SRC / "optim").glob("*.py")} - shared
    named = [row.optimizer.partition(":")[0] for row in METHODS.values() if row.optimizer]
    assert {module.rpartition(".")[2] for module in named} == files
    made = [resolve(row.recipe) for row in METHODS.values() if row.recipe]
    classes = {
        kind
        for module in (recipes, peft_recipes)
        for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, recipes.Recipe)
    }
    assert classes - {peft_recipes.SavedByPEFT} == set(made)


def test_what_a_row_names_is_there_or_an_error() -> None:
    from geolora.methods import Method, resolve

    for missing in ("geolora.nowhere:X", "geolora.optim.lora:nothing"):
        with pytest.raises((ImportError, AttributeError)):
            resolve(missing)
    for kind in ("optimizer", "peft", "start", "other"):
        with pytest.raises(geolora.errors.SettingError, match="the row of x must have"):
            Method("x", "X", "nothing", "", kind)
