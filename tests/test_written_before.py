"""What version 0.1.0 wrote is still read: adapters, a run folder, its YAML, a checkpoint, optimizer states.

The files were made by that version's code, before it was moved: a BERT of width 12 on made-up reviews.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import geolora
from geolora.cli.__main__ import main
from models import lora_net, train

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0.1.0"
TRAIN = [
    "train", "--model", "base", "--train", "train.jsonl", "--eval", "dev.jsonl", "--rank", "3",
    "--lr", "0.03", "--max-steps", "12", "--batch-size", "8", "--budget", "380",
]  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:geolora.errors.CheckpointWarning"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working directory."""
    shutil.copytree(WRITTEN, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize("layout", ["uniform", "compact", "finished/adapter"])
def test_adapters_verify_and_are_inspected(
    layout: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["verify", layout, "--base", "base"]) == 0
    assert "7 layers are right" in capsys.readouterr().out
    assert main(["inspect", layout, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    ranks = json.loads((folder / "finished" / "report.json").read_text())["ranks"]
    assert {row["layer"]: row["rank"] for row in rows} == ranks
    assert main(["export", layout, "again", "--base", "base", "--layout", "compact"]) == 0
    compact = load_file(folder / "compact" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "again" / "adapter_model.safetensors").items():
        assert torch.allclose(tensor.abs(), compact[name].abs(), atol=1e-6), name


def test_a_finished_run_is_drawn_and_its_settings_train_it_again(folder: Path) -> None:
    (folder / "finished" / "report.html").unlink()
    assert main(["plot", "finished"]) == 0
    assert (folder / "finished" / "report.html").exists()
    assert main(["train", "--config", "config.yaml", "--output", "anew"]) == 0
    new, old = (
        json.loads((folder / name / "report.json").read_text()) for name in ("anew", "finished")
    )
    assert new["ranks"].keys() == old["ranks"].keys(), "judged in another way now"
    assert new["adapter_parameters"] <= 380


def test_a_stopped_run_goes_on_to_what_it_would_have_been(folder: Path) -> None:
    assert main([*TRAIN, "--output", "stopped"]) == 0
    history = json.loads((folder / "stopped" / "history.json").read_text())
    assert history[0] == json.loads((folder / "finished" / "history.json").read_text())[0]
    _same_as_finished(folder, "stopped")


def _same_as_finished(folder: Path, output: str) -> None:
    new, old = (
        json.loads((folder / name / "report.json").read_text()) for name in (output, "finished")
    )
    assert new["ranks"] == old["ranks"]
    assert new["value"] == old["value"]
    assert new["train_loss"] == pytest.approx(old["train_loss"], rel=1e-5)
    wanted = load_file(folder / "finished" / "adapter" / "adapter_model.safetensors")
    trained = load_file(folder / output / "adapter" / "adapter_model.safetensors")
    assert trained.keys() == wanted.keys()
    for name, A in trained.items():  # another processor may round another way
        if ".lora_A." in name:
            other = name.replace(".lora_A.", ".lora_B.")
            assert torch.allclose(trained[other] @ A, wanted[other] @ wanted[name], atol=1e-4), name
        elif ".lora_B." not in name:
            assert torch.allclose(A, wanted[name], atol=1e-4), name


MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "geolora": lambda model: geolora.GeoLoRA(model, budget=120, prune_every=6),
    "geolora-none": lambda model: geolora.GeoLoRA(model, moments="none", prune_every=6),
    "lora-pro": lambda model: geolora.LoRAPro(model, lr=1e-3),
    "lora-pro-full": lambda model: geolora.LoRAPro(model, lr=1e-3, moments="full"),
    "lora-sb": lambda model: geolora.LoRASB(model),
    "rac-lora": lambda model: geolora.RACLoRA(model, steps_per_block=3, blocks=2),
    "riemannian": lambda model: geolora.RiemannianAdamW(model),
}


@pytest.mark.parametrize("name", MAKE)
def test_an_optimizer_goes_on_from_its_state(name: str) -> None:
    saved = torch.load(WRITTEN / "optimizers" / f"{name}.pt", weights_only=True)
    model = lora_net(r=2, dtype=torch.float32)
    model.load_state_dict(saved["model"])
    optimizer = MAKE[name](model)
    optimizer.load_state_dict(saved["optimizer"])
    losses = train(model, optimizer, 6, dtype=torch.float32)
    assert losses == pytest.approx(saved["losses"], rel=1e-5)
