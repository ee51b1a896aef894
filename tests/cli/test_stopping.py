"""Runs that are stopped, killed, or find their checkpoints damaged, and go on exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TorchAoConfig

from geolora import LoRAPro, LoRASB, RACLoRA, RiemannianAdamW
from geolora.cli.__main__ import main
from geolora.optim import geolora as optim
from geolora.training import run as task
from geolora.training.recipes import Recipe
from models import tiny_bert, tiny_llama, tiny_vit
from rows import pictures, reviews, sentences, sums

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("always::geolora.errors.CheckpointWarning"),  # read on stderr
]
STEPS = 30
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    tiny_bert(folder / "model")
    for name, rows in (("train", reviews(120)), ("dev", reviews(30, seed=1))):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def words(files: Path, output: Path, *more: object) -> list[str]:
    """A run of more than three passes over its rows, with dropout, through a whole cycle of ranks."""
    given = [
        "train", "--model", files / "model", "--train", files / "train.jsonl",
        "--eval", files / "dev.jsonl", "--rank", 4, "--lr", 0.03, "--max-steps", STEPS,
        "--batch-size", 16, "--save-every", 5, "--output", output, *more,
    ]  # fmt: skip
    return [str(word) for word in given]


@pytest.fixture
def run(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run into a folder of `tmp_path`, keeping its checkpoints to look at; exit code and stderr."""
    monkeypatch.setattr(task, "remove_leftovers", lambda _: None)

    def call(folder: str, *more: object) -> tuple[int, str]:
        code = main(words(files, tmp_path / folder, *more))
        return code, capsys.readouterr().err

    return call


def at_step(
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    act: Callable[[], None],
    optimizer: type = optim.GeoLoRA,
) -> list[int]:
    """Do something right after the optimizer's step of that number; steps made, in a list."""
    step, done = optimizer.step, [0]

    def counted(self: Any, closure: None = None) -> None:
        step(self, closure)
        done[0] += 1
        if done[0] == number:
            act()

    monkeypatch.setattr(optimizer, "step", counted)
    return done


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def everything(output: Path) -> dict[str, Any]:
    """Adapter, optimizer, scheduler, random numbers and losses at the end of a run."""
    last = output / "checkpoints" / f"checkpoint-{STEPS}"
    saved = torch.load(last / "optimizer.pt", weights_only=True)
    found: dict[str, Any] = dict(load_file(last / "adapter_model.safetensors"))
    found |= {f"{k} {n}": v for k, state in saved["state"].items() for n, v in state.items()}
    found |= {f"{i} {n}": v for i, g in enumerate(saved["param_groups"]) for n, v in g.items()}
    found["scheduler"] = torch.load(last / "scheduler.pt", weights_only=True)
    found["random"] = torch.load(last / "rng_state.pth", weights_only=False)["cpu"]
    found["losses"] = json.loads((output / "history.json").read_text())
    return found


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, theirs[name]), name
        else:
            assert value == theirs[name], name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_is_exact(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert run("whole")[0] == 0
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 13, lambda: os.kill(os.getpid(), number))
        code, err = run("out")
    assert code == 130
    assert f"{signal.Signals(number).name}: saving after this step; again to quit at once." in err
    assert "stopped after step 13 of 30, which is saved in" in err
    assert "The same command goes on from there." in err
    assert "Traceback" not in err
    assert signal.getsignal(number) == before
    assert not (tmp_path / "out" / "report.json").exists()
    steps = at_step(monkeypatch, 0, ctrl_c)
    assert run("out")[0] == 0
    assert steps == [STEPS - 13]
    assert_same(tmp_path / "whole", tmp_path / "out")


def rows_of(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def quantised(folder: Path) -> None:
    """The model of a folder, saved again with torchao's int8 weights."""
    torchao = pytest.importorskip("torchao.quantization", reason="of the dev group")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(folder)


@pytest.fixture
def files_of_a_task(request: pytest.FixtureRequest, tmp_path: Path) -> list[object]:
    """The flags of a run of one task, on a model and rows of its own."""
    (name, *how), folder = request.param.split(" over "), tmp_path
    model = {"image-classification": tiny_vit, "causal-lm": tiny_llama}.get(name, tiny_bert)
    model(folder / "model")
    if how:
        quantised(folder / "model")
    ending = "npz" if name == "image-classification" else "jsonl"
    for split, count, seed in (("train", 120, 0), ("dev", 30, 1)):
        if name == "image-classification":
            images, labels = pictures(count, seed)
            np.savez(folder / f"{split}.npz", images=images, labels=labels)
        else:
            make = {"token-classification": sentences, "causal-lm": sums}.get(name, reviews)
            rows_of(folder, split, make(count, seed))
    flags = {
        "token-classification": ["--text", "words", "--label", "tags"],
        "image-classification": [],
        "causal-lm": ["--prompt", "question", "--completion", "answer", "--packing"],
        "text-regression": ["--label", "score"],
    }
    return [
        "--task", name, "--model", folder / "model", "--train", folder / f"train.{ending}",
        "--eval", folder / f"dev.{ending}", *flags[name],
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning:trl.*")
@pytest.mark.parametrize(
    "files_of_a_task",
    ["token-classification", "image-classification", "causal-lm over int8", "text-regression"],
    indirect=True,
)
def test_every_task_goes_on_exactly(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_of_a_task: list[object]
) -> None:
    assert run("whole", *files_of_a_task)[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 13, ctrl_c)
        assert run("out", *files_of_a_task)[0] == 130
    steps = at_step(monkeypatch, 0, ctrl_c)
    assert run("out", *files_of_a_task)[0] == 0
    assert steps == [STEPS - 13]
    assert_same(tmp_path / "whole", tmp_path / "out")
    if "causal-lm" in files_of_a_task:
        assert main(["verify", str(tmp_path / "out" / "adapter")]) == 0, "over the quantised base"


WITHOUT = ("--save-every", STEPS)  # nothing is saved before the end, unless the run is stopped


@pytest.mark.parametrize(
    "flags, optimizer",
    [
        (("--method", "pissa"), torch.optim.AdamW),
        (("--method", "eva"), torch.optim.AdamW),
        (("--method", "lora-then-truncate", "--budget", 2000), torch.optim.AdamW),
        (("--method", "lora", "--init", "lora-one"), torch.optim.AdamW),
        (("--method", "lora", "--init", "lora-ga"), torch.optim.AdamW),
        (("--method", "lora-pro"), LoRAPro),
        (("--method", "lora-sb"), LoRASB),
        (("--method", "rac-lora"), RACLoRA),
        (("--method", "riemannian", "--init", "lora-one"), RiemannianAdamW),
    ],
)
def test_peers_go_on_exactly(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[object, ...],
    optimizer: type,
) -> None:
    more = [*flags, *WITHOUT]
    assert run("whole", *more)[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 8, ctrl_c, optimizer)
        assert run("out", *more)[0] == 130
    steps = at_step(monkeypatch, 0, ctrl_c, optimizer)
    assert run("out", *more)[0] == 0
    assert steps == [STEPS - 8]
    ours, theirs = (
        load_file(tmp_path / folder / "adapter" / "adapter_model.safetensors")
        for folder in ("whole", "out")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seconds"] > report["seconds_per_step"] * (STEPS - 1) / 2


def test_a_stop_in_the_last_step_or_after_it_loses_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, STEPS, ctrl_c)
        code, err = run("out", *WITHOUT)
    assert code == 130
    assert "stopped after step 30 of 30, which is saved" in err
    steps = at_step(monkeypatch, 0, ctrl_c)
    with monkeypatch.context() as patch:

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Recipe, "save", interrupted)
        assert run("out", *WITHOUT)[0] == 130
    with monkeypatch.context() as patch:
        patch.setattr("geolora.report.pages.write_run", interrupted)
        assert run("out", *WITHOUT)[0] == 130
    assert (tmp_path / "out" / "report.json").exists()
    assert run("out", *WITHOUT)[0] == 0
    assert steps == [0]
    assert (tmp_path / "out" / "report.html").exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["seconds_per_step"] > 0


def test_what_a_kill_at_the_very_end_leaves_is_tidied_by_the_same_command(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(words(files, out)) == 0
    whole = sorted(out.rglob("*"))
    for name in (".lock", "checkpoints/checkpoint-30/optimizer.pt", "start/.tmp2aB_cd"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("left")
    (out / "checkpoints" / "mine.md").write_text("mine")
    assert main(words(files, out)) == 2
    assert "out exists. Choose another folder, or add --overwrite." in capsys.readouterr().err
    assert (out / "checkpoints" / "mine.md").read_text() == "mine"
    left = {out / "checkpoints", out / "checkpoints" / "mine.md"}
    assert sorted(set(out.rglob("*")) - left) == whole


def test_what_cannot_go_on_says_so(
    run: Run, monkeypatch: pytest.MonkeyPatch, files: Path, tmp_path: Path
) -> None:
    command = words(files, tmp_path / "out", "--method", "adalora")
    at = command.index("--save-every")
    del command[at : at + 2]
    with monkeypatch.context() as patch:
        at_step(patch, 16, ctrl_c, torch.optim.AdamW)
        assert main(command) == 130
    steps = at_step(monkeypatch, 0, ctrl_c, torch.optim.AdamW)
    assert main(command) == 0
    assert steps == [STEPS]


def test_overwrite_starts_anew_and_is_not_said_to_go_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 8, ctrl_c)
        code, err = run("out", "--overwrite")
    assert code == 130
    assert "The same command without --overwrite goes on from there." in err
    steps = at_step(monkeypatch, 0, ctrl_c)
    assert run("out")[0] == 0
    assert steps == [STEPS - 8]


def test_a_changed_flag_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 8, ctrl_c)
        assert run("out")[0] == 130
    code, err = run("out", "--rank", 3)
    assert code == 2
    assert "holds a stopped run with --rank 4, now 3. Give the same flags to go on" in err


def test_a_changed_base_is_refused_and_a_note_beside_it_is_no_change(
    run: Run, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One number beyond the first megabyte of the weights, and files that transformers does not read."""
    base = tmp_path / "model"
    shutil.copytree(files / "model", base)
    weights = load_file(base / "model.safetensors")
    save_file({"a": torch.zeros(400_000), **weights}, base / "model.safetensors")
    with monkeypatch.context() as patch:
        at_step(patch, 8, ctrl_c)
        assert run("out", "--model", base)[0] == 130
    kept = (base / "model.safetensors").read_bytes()
    for place in (-1, len(kept) // 2, 1_500_000):
        changed = bytearray(kept)
        changed[place] ^= 1
        (base / "model.safetensors").write_bytes(changed)
        code, err = run("out", "--model", base)
        assert code == 2
        assert f"`--model`: {base} has changed since the run in {tmp_path}/out was stopped." in err
    (base / "model.safetensors").write_bytes(kept)
    (base / "notes.txt").write_text("mine")
    (base / "card.pdf").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    steps = at_step(monkeypatch, 0, ctrl_c)
    assert run("out", "--model", base)[0] == 0
    assert steps == [STEPS - 8]
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_stopped_comparison_goes_on_within_its_run(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"""
output: {tmp_path}/compared
common: {{model: {files}/model, max_steps: {STEPS}, batch_size: 16, rank: 4}}
tasks: {{t: {{train: {files}/train.jsonl, eval: {files}/dev.jsonl}}}}
methods:
  lora: {{lr: [1e-2, 1e30]}}
  geolora: {{lr: 0.03}}
"""
    )
    with monkeypatch.context() as patch:
        at_step(patch, 7, ctrl_c)
        assert main(["compare", str(plan)]) == 130
    assert "stopped after step 7 of 30, which is saved in" in capsys.readouterr().err
    steps = at_step(monkeypatch, 0, ctrl_c)
    assert main(["compare", str(plan)]) == 0
    assert steps == [STEPS - 7]
    out = capsys.readouterr().out
    assert "3 runs, 2 of them done" in out
    found = json.loads((tmp_path / "compared" / "comparison.json").read_text())
    sweep = {(row["method"], row["lr"]): row for row in found["learning_rates"]}
    assert sweep["lora", 1e30]["diverged"] == 1
    assert [row["lr"] for row in found["rows"]] == [1e-2, 0.03]
    assert not (tmp_path / "compared" / "running").exists()


def test_a_second_ctrl_c_quits_at_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def twice() -> None:
        ctrl_c()
        ctrl_c()

    at_step(monkeypatch, 7, twice)
    code, err = run("out")
    assert code == 130
    assert err.rstrip().endswith("geolora: stopped.") or "geolora: stopped." in err
    found = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert found == ["checkpoint-5"]


KILLED = """
import os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
from geolora.optim import geolora as optim
from geolora.cli.__main__ import main
number, delay = int(sys.argv[1]), float(sys.argv[2])
step, done = optim.GeoLoRA.step, [0]
def shoot():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
def counted(self, closure=None):
    step(self, closure)
    done[0] += 1
    if done[0] == number:
        threading.Thread(target=shoot).start()
optim.GeoLoRA.step = counted
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.guard
@pytest.mark.parametrize("number, delay", [(18, 0.0), (20, 0.005)])
def test_a_killed_run_goes_on_exactly(
    run: Run, files: Path, tmp_path: Path, number: int, delay: float
) -> None:
    killed = subprocess.run(
        [
            *(sys.executable, "-W", "ignore", "-c", KILLED, str(number), str(delay)),
            *words(files, tmp_path / "out"),
        ],
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-500:]
    assert not (tmp_path / "out" / "report.json").exists()
    assert run("whole")[0] == 0
    assert run("out")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("whole")[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 12, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("out")[0] == 130
    with (tmp_path / "out/checkpoints/checkpoint-10/optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    code, err = run("out")
    assert code == 0
    assert "checkpoint-10 has a changed or torn optimizer.pt: not used." in err
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_checkpoint_of_another_run_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("other", "--seed", 1)[0] == 0
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run("out")[0] == 130
    foreign = tmp_path / "other/checkpoints/checkpoint-30"
    shutil.copytree(foreign, tmp_path / "out/checkpoints/checkpoint-25")
    code, err = run("out")
    assert code == 2
    assert "checkpoint-25 belongs to another run: not used." in err
    assert "out/checkpoints holds checkpoints of another run. Choose another folder, or" in err
    shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-25")
    assert run("out")[0] == 0
    assert run("whole")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")


def test_a_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, [0]

    def full(value: Any, path: Any, *rest: Any, **options: Any) -> None:
        calls[0] += 1
        if calls[0] > 4:  # amid the second checkpoint
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704")
        real(value, path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, err = run("out")
    assert code == 2
    assert "`--output`:" in err
    assert "there is no space left. Free some, and start the same command again." in err
    assert "Traceback" not in err
    code, err = run("out")
    assert code == 0
    assert "checkpoint-10 was not written to its end: not used." in err
    assert run("whole")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "out")
