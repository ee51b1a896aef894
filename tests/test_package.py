"""What is packed and what is pinned: pyproject.toml, constraints.txt and requirements-demo.txt agree."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(text: str) -> dict[str, set[str]]:
    """{package: versions} of the lines that pin one."""
    rows = [Requirement(line) for line in re.findall(r"^\w[^\\\n]*", text, re.MULTILINE)]
    return {
        canonicalize_name(row.name): {
            str(other.specifier) for other in rows if other.name == row.name
        }
        for row in rows
    }


def test_an_sdist_takes_only_what_stands_at_the_top() -> None:
    patterns = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all(pattern.startswith("/") for pattern in patterns), "else a README anywhere matches"
    assert all((ROOT / pattern[1:]).exists() for pattern in patterns)


def test_the_demo_can_be_installed_by_hashes_of_what_constraints_pin() -> None:
    text = (ROOT / "requirements-demo.txt").read_text()
    hashed, pinned = pins(text), pins((ROOT / "constraints.txt").read_text())
    again = "Run `make hashes`."
    for name, versions in hashed.items():
        assert all(version.startswith("==") for version in versions), again
        assert versions == pinned.get(name, versions), again
    extra = PROJECT["project"]["optional-dependencies"]["demo"]
    needed = [*PROJECT["project"]["dependencies"], *extra, *PROJECT["build-system"]["requires"]]
    for row in map(Requirement, needed):
        (version,) = hashed[canonicalize_name(row.name)]
        assert row.specifier.contains(version[2:]), again
    files = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}$", file, re.MULTILINE) for file in files)
