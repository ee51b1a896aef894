"""The architecture: what may import what, what is public, what importing loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import geolora

SRC = Path(geolora.__file__).parent
KERNELS = ("kernels",)
CORE = ("errors", "factors", *KERNELS)
MODEL = (*CORE, "methods", "pairs")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "factors": (),
    "kernels": ("kernels",),
    "methods": CORE,
    "pairs": ("errors", "sharded"),
    "sharded": (),
    "buckets": ("errors", "pairs", "sharded"),
    "rest": (),
    "finite": ("errors",),
    "work": (*MODEL, "buckets", "sharded"),
    "optim": (*MODEL, "buckets", "finite", "rest", "sharded", "work"),
    "relatives": (*MODEL, "buckets", "finite", "rest", "relatives", "sharded"),
    "adapter": (*CORE, "pairs", "sharded"),
    "folders": ("errors", "pairs", "adapter"),
    "gradient_pass": (*CORE, "pairs"),
    "size": ("errors", "gradient_pass", "pairs"),
    "initialize": (*MODEL, "folders", "gradient_pass", "size"),
    "saved": (*CORE, "pairs", "adapter", "folders"),
    "trainer": (*MODEL, "optim", "relatives"),
    "tasks": (*MODEL, "optim", "initialize", "adapter", "saved", "trainer", "tasks"),
    "report": ("report",),
    "cli": (*MODEL, "optim", "adapter", "saved", "trainer", "tasks", "report", "cli"),
}
"""Part of the package → the parts it may import; nothing else of ours."""

OTHERS = {
    "kernels": {"torch"},
    "methods": {"torch"},
    "factors": {"torch"},
    "errors": set(),
    "buckets": {"torch"},
    "finite": {"torch"},
    "rest": {"torch"},
    "sharded": {"torch"},
    "work": {"torch"},
    "optim": {"torch"},
    "relatives": {"torch"},
}
"""What the numerical parts may import from other packages, beside the standard library."""

FILES = sorted(
    path for path in SRC.rglob("*.py") if path.parent != SRC or path.name != "__init__.py"
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    part = path.relative_to(SRC).parts[0].removesuffix(".py")
    allowed = MAY_IMPORT[part]
    for name in imports(path):
        first, _, rest = name.partition(".")
        if first == "geolora":
            target = rest.partition(".")[0]
            if target in MAY_IMPORT:
                same_method = part == "methods" and path.name == "__init__.py"
                assert target in allowed or same_method, f"{part} must not import {target}"
        elif part in OTHERS and first not in sys.stdlib_module_names:
            assert first in OTHERS[part], f"{part} must not import {first}"


def test_few_files_know_peft() -> None:
    knowing = {
        path.relative_to(SRC).as_posix()
        for path in FILES
        if any(name.split(".")[0] == "peft" for name in imports(path))
    }
    assert knowing == {"adapter.py", "folders.py", "pairs.py", "saved.py", "tasks/peers.py"}


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


def test_methods_are_listed_with_their_paper() -> None:
    from geolora.methods import METHODS

    files = {path.stem for path in (SRC / "methods").glob("*.py")} - {"__init__"}
    assert {method.function.__module__.rpartition(".")[2] for method in METHODS.values()} == files
    for method in METHODS.values():
        module = sys.modules[method.function.__module__]
        assert method.arxiv in module.__doc__
        assert method.kind in ("step", "start")
