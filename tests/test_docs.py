"""What the pages under docs/ show exists and works as it stands."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import geolora
from geolora.cli.__main__ import build_parser
from geolora.methods import METHODS
from geolora.settings.train_config import TrainConfig
from geolora.training.check import check

ROOT = Path(__file__).parents[1]
FILLED = runpy.run_path(str(ROOT / "docs" / "tables.py"))["filled"]
PAGES = {
    path.relative_to(ROOT / "docs").as_posix(): FILLED(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
OTHERS = {"--cpu", "--max-lora-rank", "--num_processes"}
"""Flags of other programs."""


def named(text: str) -> set[str]:
    """Names of the library's in code: `a` of `geolora.a`."""
    return set(re.findall(r"\bgeolora\.([A-Za-z_]\w*)", text))


def commands(text: str) -> list[str]:
    """Indented command lines `geolora …`, put together where they go on."""
    found = re.findall(r"^ {4}(geolora \w(?:[^\\\n]|\\\n)*)", text, re.MULTILINE)
    return [line.replace("\\\n", " ") for line in found]


COMMAND_LINES = [line for text in PAGES.values() for line in commands(text)]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_commands_are_accepted(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = vars(build_parser().parse_args(shlex.split(line, comments=True)[1:]))
    if given["name"] == "train":
        check(TrainConfig(**{k: v for k, v in given.items() if k in TrainConfig.__dict__}))


def test_commands_are_found() -> None:
    assert len(COMMAND_LINES) > 20
    assert {line.split()[1] for line in COMMAND_LINES} >= {"train", "compare", "export", "verify"}


def test_every_flag_they_name_exists() -> None:
    parsers = build_parser()._subparsers
    assert parsers is not None
    known = set(OTHERS)
    for sub in parsers._group_actions[0].choices.values():  # pyright: ignore
        known |= {flag for action in sub._actions for flag in action.option_strings}
    for name, text in PAGES.items():
        flags = re.findall(r"`(--[a-z][\w-]*)", text)
        assert [flag for flag in flags if flag not in known] == [], name


def test_every_task_and_method_is_described() -> None:
    text = " ".join(PAGES.values())
    assert [
        task for task in geolora.settings.train_config.TASKS if f"`--task {task}`" not in text
    ] == []
    table = PAGES["methods.md"]
    for name, method in METHODS.items():
        assert method.arxiv in table
        assert any(f"{start}{name}`" in table for start in ("--method ", "--init ", "`")), name


def test_links_lead_to_files() -> None:
    for name, text in PAGES.items():
        folder = (ROOT / "docs" / name).parent
        links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
        assert [link for link in links if not (folder / link).exists()] == [], name
        benchmarks = re.findall(r"`?\b(benchmarks/[\w/]+\.(?:py|yaml))", text)
        assert [path for path in benchmarks if not (ROOT / path).exists()] == [], name


def test_all_pages_are_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(nav: list) -> list[str]:
        values = [value for entry in nav for value in entry.values()]
        return [f for v in values for f in (files(v) if isinstance(v, list) else [v])]

    assert sorted(files(settings["nav"])) == sorted(PAGES)


def test_python_blocks_compile() -> None:
    for name, text in PAGES.items():
        if name == "recipes.md":  # single lines of examples/, which test_examples.py runs
            continue
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            ast.parse(block, name)
            assert named(block) <= set(geolora.__all__), name


def test_the_first_example_is_that_of_the_readme() -> None:
    (block, *_) = re.findall(r"```python\n.*?```", PAGES["index.md"], re.DOTALL)
    assert block in (ROOT / "README.md").read_text(encoding="utf-8"), "test_readme.py runs it"


def test_comparisons_can_be_planned(tmp_path: Path) -> None:
    from geolora.comparing.plan import read_plan

    blocks = re.findall(r"```yaml\n(.*?)```", "".join(PAGES.values()), re.DOTALL)
    plans = [block for block in blocks if "\nmethods:" in block]
    assert len(plans) >= 1
    for plan in plans:
        (tmp_path / "plan.yaml").write_text(plan)
        assert read_plan(tmp_path / "plan.yaml").cells


def test_the_reference_holds_every_public_name() -> None:
    shown = re.findall(r"^::: geolora\.(\w+)$", PAGES["api.md"], re.MULTILINE)
    assert sorted(set(geolora.__all__) - set(shown)) == []


@pytest.mark.parametrize("moments", ["adaptive", "momentum", "none"])
@pytest.mark.parametrize("shape", [(24, 40, 4), (64, 32, 8)])
def test_formulas_of_state_and_step(moments: str, shape: tuple[int, int, int]) -> None:
    """Those of docs/scaling.md, which torch counts alike."""
    d_out, d_in, r = shape
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(d_in, d_out, bias=False))
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    optimizer = geolora.GeoLoRA(model, moments=moments, tail=None)
    inputs, wanted = torch.randn(80, d_in), torch.randn(80, d_out)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs) - wanted).square().mean().backward()
        with FlopCounterMode(display=False) as counted:
            optimizer.step()
        products = counted.get_total_flops()
    D = d_out + d_in
    long, small = {"adaptive": (24, 254), "momentum": (20, 190), "none": (16, 190)}[moments]
    assert products == long * D * r**2 + small * r**3
    values = [value for state in optimizer.state.values() for value in state.values()]
    state = sum(t.numel() * t.element_size() for t in values if isinstance(t, torch.Tensor))
    assert state == (4 if moments == "none" else 8) * r * D + 4 * r + 4 * r**2
