"""What the README shows works as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from geolora.cli.__main__ import build_parser, main
from models import tiny_bert
from rows import reviews

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    loader = [{"input_ids": i, "labels": i} for i in torch.randint(50, (3, 8, 6))]
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    names: dict = {"base": base, "loader": loader}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert set(names["geolora"].ranks(names["model"]).values()) != {0}
    start = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[1]
    fresh = LlamaForCausalLM(config)
    names["model"] = get_peft_model(fresh, LoraConfig(r=4, target_modules="all-linear"))
    names["batches"] = loader
    exec(compile(start, "README.md", "exec"), names)
    assert set(names["geolora"].ranks(names["model"]).values()) == {4}


def test_every_command_and_flag_it_names_exists() -> None:
    parser = build_parser()
    commands = [
        line.split("#")[0].strip()
        for line in README.splitlines()
        if re.match(r" {4}geolora \w", line)
    ]
    assert len(commands) >= 4
    for command in commands:
        parser.parse_args(shlex.split(command)[1:])


def test_every_method_is_named() -> None:
    from geolora.methods import METHODS

    named = set(re.findall(r"[\w-]+", README))
    assert [name for name in METHODS if name not in named] == []
    for row in METHODS.values():
        if row.kind == "optimizer" and row.public:
            assert row.public[0] in README


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_commands_on_a_text_column_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_bert(tmp_path / "bert-base-uncased")
    for name, rows in (("train", reviews(40)), ("dev", reviews(10, seed=1))):
        lines = [json.dumps({"sentence": row["text"], "label": row["label"]}) for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (first, *others) = [
        line.split("#")[0].split()[1:]
        for line in README.splitlines()
        if re.match(r" {4}geolora \w+ .*\bout\b", line) and "causal-lm" not in line
    ]
    assert main([*first, "--max-steps", "4"]) == 0
    assert [command[0] for command in others] == ["inspect", "export", "verify"]
    for command in others:
        assert main(command) == 0, command


def test_files_it_links_exist() -> None:
    root = Path(__file__).parents[1]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named = re.findall(r"`(benchmarks/[\w.]+\.py)`", README)
    assert len(links) > 3
    assert [name for name in (*links, *named) if not (root / name).exists()] == []
    assert "@@" not in README


def test_the_comparison_it_shows_can_be_planned(tmp_path: Path) -> None:
    from geolora.comparing.plan import read_plan

    (code,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "comparison.yaml").write_text(code)
    plan = read_plan(tmp_path / "comparison.yaml")
    assert len(plan.cells) == 3 * (4 + 4 + 1)
