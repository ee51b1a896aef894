"""Every program in examples/ runs, and what it prints as a fact is one."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel

import geolora
from tolerances import bound

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
WIDTH = 64


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def test_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("train_in_a_plain_loop")
    losses, same, difference = program.main(tmp_path)
    assert "resumed run the same bit for bit: True" in capsys.readouterr().out
    assert same
    assert losses[0] == pytest.approx(losses[1], rel=0.1), "the first step has lr = 0"
    assert mean(losses[-5:]) < 0.6 * losses[0]
    assert difference <= bound(torch.float32, WIDTH)
    assert geolora.verify(tmp_path / "adapter", program.base_model())


def test_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("train_with_trainer")
    before, after, written, same, difference = program.main(tmp_path)
    assert "resumed run the same bit for bit: True" in capsys.readouterr().out
    assert same
    assert after < 0.6 * before
    assert program.BUDGET / 2 < written.adapter_parameters <= program.BUDGET
    assert len(written.others) == 2, "the head is in the file"
    assert difference <= bound(torch.float32, WIDTH)
    assert geolora.verify(tmp_path / "adapter", program.base_model())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantised_base(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="the int8 base needs torchao, of the dev group")
    program = example("train_over_a_quantised_base")
    losses, untouched, error, (over_int8, over_original) = program.main(tmp_path, dtype)
    assert untouched
    assert mean(losses[-5:]) < 0.6 * losses[0]
    assert error <= bound(torch.float32, WIDTH), "the pairs are float32 over either base"
    assert over_int8 <= bound(dtype, WIDTH, factor=2.0)
    assert bound(torch.float32, WIDTH) < over_original < 0.1, "what int8 rounds away"
    base = program.load_base(tmp_path / "base", dtype)
    kinds = {type(p.data).__name__ for n, p in base.named_parameters() if "_proj" in n}
    assert kinds == {"Int8Tensor"}
    plain = program.load_base(tmp_path / "base", dtype, quantised=False)
    assert geolora.verify(tmp_path / "adapter", plain)


def test_one_of_two_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("train_one_of_two_adapters")
    losses, same, ranks, difference = program.main(tmp_path)
    assert "base and reference the same bit for bit: True" in capsys.readouterr().out
    assert same
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4), "the policy starts as the reference"
    assert mean(losses[-5:]) < 0.1 * losses[0]
    assert difference <= bound(torch.float32, WIDTH)
    for name, rank in zip(("reference", "policy"), ranks, strict=True):
        loaded = PeftModel.from_pretrained(program.base_model(), tmp_path / name)
        assert sum(geolora.ranks(loaded).values()) == rank > 0


@pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")
def test_trl(tmp_path: Path) -> None:
    for name in ("trl", "torchao"):
        pytest.importorskip(name, reason=f"the program needs {name}, of the dev group")
    program = example("train_with_trl")
    before, after, logs, difference = program.main(tmp_path)
    assert after < 0.7 * before
    assert difference <= bound(torch.float32, WIDTH)
    assert len(logs) == program.STEPS // 10
    assert 14 * 16 > logs[0]["rank"] == logs[-1]["rank"] >= 14, "judged before the first log"
    base = program.load_base(tmp_path / "base")
    kinds = {type(p.data).__name__ for n, p in base.named_parameters() if "_proj" in n}
    assert kinds == {"Int8Tensor"}
    assert geolora.verify(tmp_path / "adapter", base)
    loaded = PeftModel.from_pretrained(program.load_base(tmp_path / "base"), tmp_path / "adapter")
    assert sum(geolora.ranks(loaded).values()) == logs[-1]["rank"]
    tokenizer = program.byte_tokenizer()
    assert len(tokenizer) == 257
    assert tokenizer.decode(tokenizer("sé\n").input_ids) == "sé\n"


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """What accelerate shares between all its objects of a process, as it was."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("fresh_accelerate")
def test_accelerate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("train_with_accelerate")
    losses, alike, same, difference = program.main(tmp_path)
    assert "resumed run the same bit for bit: True" in capsys.readouterr().out
    assert same
    assert alike
    assert len(losses) == program.STEPS * program.BATCHES
    assert mean(losses[-5:]) < 0.6 * losses[0]
    assert difference <= bound(torch.float32, WIDTH)
    assert geolora.verify(tmp_path / "adapter", program.base_model())


@pytest.mark.guard
def test_accelerate_in_two_processes() -> None:
    program = str(ROOT / "examples" / "train_with_accelerate.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", program],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loss ") == 1, "one process prints"
    assert "processes: 2, with the same factors: True" in done.stdout
    assert "resumed run the same bit for bit: True" in done.stdout


def test_a_diffusion_model(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the program needs diffusers, of the dev group")
    program = example("train_a_diffusion_model")
    table, ranks, differences = program.main(tmp_path)
    (own, kind), (_, forgot), (learnt, kept) = table.values()
    assert learnt < 0.8 * own
    assert kept < 1.1 * kind
    assert kept < forgot, "what the prior term is for"
    assert max(differences) <= bound(torch.float32, WIDTH), "by peft's and by diffusers' reader"
    treated = {
        leaf
        for leaf in program.ATTENTION + program.CONVOLUTIONS
        for name in ranks
        if name.endswith(leaf)
    }
    assert treated == {*program.ATTENTION, *program.CONVOLUTIONS}
    base = program.UNet2DConditionModel.from_pretrained(tmp_path / "base")
    assert geolora.verify(tmp_path / "adapter", base).keys() == ranks.keys()


def test_serving(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = example("serve_an_adapter")
    rows, found, merged = program.main(tmp_path)
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)
    close = bound(torch.float32, WIDTH)
    assert merged <= close
    assert 8 < found[-1] <= 16, "rank 8 cuts, 16 and 32 are filled up"
    for name, (r, error, off, met) in rows.items():
        assert all(met.values()) == (name != "compact"), name
        if "rank" in name:
            assert r == int(name.split()[-1])
        elif name != "as peft saves":
            assert r == found[-1]
        if name == "uniform, rank 8":
            assert 0 < error < 1
            assert close < off < 1
        else:
            assert error == 0
            assert off <= close
        if name != "as peft saves":
            assert geolora.verify(tmp_path / name, program.base_model())
    assert not rows["compact"][3]["one r"]
    assert not rows["compact"][3]["no patterns"]


def test_every_example_is_tested_and_described() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(\.\./examples/(\w+)\.py\)", page)
    assert sorted(set(linked)) == EXAMPLES
    tested = re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8"))
    assert sorted(tested) == EXAMPLES
    for name in EXAMPLES:
        text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
        assert f"python examples/{name}.py" in text


def test_lines_shown_on_the_page_are_in_the_examples() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", page, flags=re.MULTILINE)
    shown = 0
    for section in sections:
        linked = re.findall(r"\]\(\.\./examples/(\w+\.py)\)", section)
        program = "".join((ROOT / "examples" / name).read_text("utf-8") for name in linked[:1])
        lines = {line.split("  #")[0].strip() for line in program.splitlines()}
        for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if program else []:
            for line in block.splitlines():
                assert line.split("  #")[0].strip() in lines, line
                shown += 1
    assert shown > 10
