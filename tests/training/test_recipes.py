"""PEFT's methods through `geolora train`: what is trained is what the file holds, for stock peft."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

import geolora
from architectures import CONFIGS
from geolora.adapters.truncate import TRUNCATED, truncate
from geolora.errors import DivergedError, GeoloraWarning, ModelError, SettingError
from geolora.methods import TRAINABLE
from geolora.pairs.find import find_pairs
from geolora.pairs.point import read_pair
from geolora.settings.train_config import TrainConfig
from geolora.tasks.task import Data
from geolora.tasks.text_classification import labelled_texts
from geolora.training import run as task
from geolora.training.check import check
from geolora.training.recipes import adapted_layers
from models import lora_net, tiny_bert, tiny_vit
from rows import pictures, reviews

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
RANK = 6
LEARNT = 0.8
LRS = {
    "geolora": 3e-2,
    "lora-pro": 1e-2,
    "lora-sb": 1e-1,
    "rac-lora": 0.15,
    "adalora": 5e-2,
    "rslora": 1e-2,
    "lora-plus": 2e-3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "model"
    tiny_bert(folder)
    return folder


@pytest.fixture(scope="module")
def data() -> Data:
    train, held_out = reviews(120), reviews(60, seed=1)
    return labelled_texts(train, held_out)


def settings(model: Path, method: str, **more: object) -> TrainConfig:
    budget = 3000 if method == "lora-then-truncate" else None
    base = TrainConfig(
        model=str(model), method=method, rank=RANK, lr=LRS.get(method, 2e-2),
        max_steps=60, batch_size=16,
        output=str(model.parent / method), budget=budget, tail=0.01,
    )  # fmt: skip
    return dataclasses.replace(base, **more)


@pytest.fixture(scope="module")
def outcomes(model: Path, data: Data) -> dict[str, task.Outcome]:
    """Every method of the table, at its step size here or, where it has learnt nothing, another one."""
    trained = {}
    for method in TRAINABLE:
        for lr in (LRS.get(method, 2e-2), 6e-2, 5e-3):
            trained[method] = task.train(settings(model, method, lr=lr, overwrite=True), data)
            if trained[method].report["value"] > LEARNT:
                break
    return trained


# peft 0.21 says this of every AdaLoRA adapter it wrote itself
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("method", TRAINABLE)
def test_stock_peft_predicts_what_was_scored(
    model: Path, data: Data, outcomes: dict[str, task.Outcome], method: str
) -> None:
    outcome = outcomes[method]
    folder = model.parent / method / "adapter"
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [text for (text,) in data.held_out.inputs]
    with torch.no_grad():
        logits = loaded(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    close = (logits[:, 0] - logits[:, 1]).abs() < 1e-4
    wrong = (logits.argmax(-1) != torch.tensor(outcome.predictions)) & ~close
    assert not wrong.any()
    assert outcome.report["value"] > LEARNT, (
        f"{method} learnt nothing at any step size tried: give it one in LRS"
    )
    assert outcome.report["method"] == method
    card = (folder / "README.md").read_text()
    assert str(model.parent) not in card, "a folder of this machine is nobody else's"
    assert "# LoRA adapter for a local model, `model`" in card


@pytest.mark.parametrize("method", ["lora", "geolora"])
def test_a_start_from_the_gradient(model: Path, data: Data, method: str) -> None:
    output = model.parent / f"lora-one-{method}"
    config = settings(model, method, init="lora-one", lr=0.0, max_steps=2, output=str(output))
    task.train(config, data)
    for layer in geolora.inspect(output / "adapter"):
        assert layer.sigma[0] == pytest.approx(0.05, rel=1e-5), layer.layer


def test_the_parameters_are_counted(outcomes: dict[str, task.Outcome]) -> None:
    reports = {method: outcome.report for method, outcome in outcomes.items()}
    full = reports["lora"]["adapter_parameters"]
    for method in ("lora", "rslora", "riemannian", "lora-pro", "lora-sb", "rac-lora"):
        assert reports[method]["adapter_parameters"] == full
        assert reports[method]["exported_parameters"] == full
        assert set(reports[method]["ranks"].values()) == {RANK}
    assert reports["dora"]["exported_parameters"] == reports["dora"]["adapter_parameters"] > full
    assert reports["pissa"]["adapter_parameters"] == full
    assert reports["pissa"]["exported_parameters"] == 2 * full
    assert len(set(reports["eva"]["ranks"].values())) > 1, "EVA shares ranks out"
    assert reports["lora-then-truncate"]["adapter_parameters"] <= 3000


def test_adalora_gets_its_allocator(outcomes: dict[str, task.Outcome]) -> None:
    ranks = outcomes["adalora"].report["ranks"].values()
    assert len(ranks) * RANK * 2 // 3 == sum(ranks)
    assert len(set(ranks)) > 1


def test_methods_differ(outcomes: dict[str, task.Outcome]) -> None:
    losses = [round(outcome.report["train_loss"], 9) for outcome in outcomes.values()]
    alike = [("lora", "lora-then-truncate")]  # the same training
    assert len(set(losses)) == len(losses) - len(alike)


def test_truncation_is_the_best_within_the_budget() -> None:
    torch.manual_seed(0)
    model = lora_net(r=4)
    for pair in find_pairs(model):
        torch.nn.init.normal_(pair.B)
    energies = [read_pair(p.A, p.B, p.scale).sigma ** 2 for p in find_pairs(model)]
    costs = [p.d_in + p.d_out for p in find_pairs(model)]
    for budget in (sum(costs), 130, 200, 4 * sum(costs)):
        fresh = lora_net(r=4)
        fresh.load_state_dict(model.state_dict())
        truncate(fresh, budget)
        ranks = [pair.r for pair in find_pairs(fresh, TRUNCATED)]
        used = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
        assert used <= budget
        shares = [float(e[:rank].sum() / e.sum()) for e, rank in zip(energies, ranks, strict=True)]
        # one direction more in the layer that has lost most would not fit
        worst = min(range(len(ranks)), key=lambda i: shares[i])
        assert ranks[worst] == 4 or used + costs[worst] > budget
    with pytest.raises(SettingError, match="must hold one direction in every layer"):
        truncate(lora_net(r=4), sum(costs) - 1)


def test_eva_sees_rows_enough_for_a_pooler(model: Path, data: Data) -> None:
    """PEFT waits for ever for a layer that sees fewer vectors in a batch than it has directions."""
    config = settings(model, "eva", batch_size=4, output=str(model.parent / "small-batches"))
    assert task.train(config, data).report["steps"] == 60
    few = Data(data.train.at(range(10)), data.held_out, data.names)
    config = settings(model, "eva", max_steps=2, batch_size=5, output=str(model.parent / "few"))
    with pytest.raises(SettingError, match="`--rank` 6 with eva needs 12 training rows or more"):
        task.train(config, few)


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value).*:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::geolora.errors.SkippedStepWarning")
@pytest.mark.parametrize("method", ["lora", "eva", "riemannian", "adalora"])
def test_a_peer_that_diverges_is_an_error(model: Path, data: Data, method: str) -> None:
    output = model.parent / f"diverged-{method}"
    config = settings(model, method, lr=1e30, max_steps=12, output=str(output))
    with pytest.raises(DivergedError, match="training diverged: after step .* Lower `--lr`"):
        task.train(config, data)
    assert not (output / "report.json").exists()
    assert not (output / "adapter").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ({"method": "lora", "budget": 9}, "`--budget` belongs to geolora, lora-then-truncate; got"),
        ({"method": "adalora", "rank": 1}, "`--rank` must be 2 or more with adalora"),
        ({"method": "lora-then-truncate"}, "`--budget` must be given with lora-then-truncate"),
        ({"method": "dora", "start_rank": 2}, "`--start-rank` belongs to --method geolora"),
        ({"method": "pissa", "init": "gaussian"}, "`--init` must be default with pissa"),
        ({"method": "dora", "init": "lora-one"}, "`--init lora-one` needs plain LoRA pairs"),
        ({"method": "geolora", "init": "lora-ga"}, "`--init lora-ga` belongs to lora and rslora"),
        ({"method": "lora", "init": "lora-ga", "rank": 5}, "`--rank` must be even"),
        ({"init": "lora-one", "start_rank": 2}, "`--start-rank` belongs to --init default"),
        ({"method": "adalora", "save_every": 5}, "`--save-every` cannot be used with adalora"),
    ],
)
def test_flags_belong_to_methods(more: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check(TrainConfig(model="m", output="none-such", **more))


def test_narrow_layers_heads_and_what_peft_refuses_get_no_pair() -> None:
    class Model(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.config = type("Config", (), {"model_type": kind})
            self.wide, self.out_proj = nn.Linear(12, 10), nn.Linear(10, 12)
            self.conv1d, self.gate = nn.Conv1d(4, 4, 2), nn.Linear(12, 1)
            self.head = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 3))
            self.lm_head = nn.Linear(12, 30)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    heads = ["head", "head.0", "head.1"]
    with pytest.warns(GeoloraWarning, match=r"1 of 3 layers are left .* rank of 4: gate\."):
        found = adapted_layers(Model("bert"), ["head"], 4)
    assert found == (["wide", "out_proj"], [*heads, "lm_head", "gate"])
    with pytest.warns(GeoloraWarning, match=r"1 of 2 layers are left"):
        targets, others = adapted_layers(Model("mamba"), ["head"], 4)
    assert targets == ["wide"]
    assert "out_proj" in others
    # a rank that is too large for most is the rank's fault: making the pairs says so
    assert adapted_layers(Model("bert"), ["head"], 11)[0] == ["wide", "out_proj", "gate"]
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(8, 2))
    assert adapted_layers(convolutions, ["2"], 4) == (["0"], ["2"])


def test_a_model_of_convolutions_alone_gets_pairs_on_them(tmp_path: Path) -> None:
    """A ResNet: convolutions and a head. Where peft finds nothing to adapt, it is said."""
    tiny_vit(tmp_path / "vit")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetModel(config).save_pretrained(tmp_path / "resnet")
    AutoImageProcessor.from_pretrained(tmp_path / "vit").save_pretrained(tmp_path / "resnet")
    for name in ("train", "dev"):
        images, labels = pictures(8, 0)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=labels, names=["up", "down"])
    run = TrainConfig(
        model=str(tmp_path / "resnet"), task="image-classification", rank=2, max_steps=1,
        train=str(tmp_path / "train.npz"), eval=str(tmp_path / "dev.npz"), batch_size=4,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geolora.training.recipes.adapted_layers", lambda *_: ([], []))
        with pytest.raises(
            ModelError, match="peft cannot add GeoLoRA to the linear layers of .*ResNet"
        ):
            task.run(run)
    assert not (tmp_path / "out").exists()
    report = task.run(run)
    assert set(report["ranks"]) == {
        name
        for name, layer in ResNetForImageClassification(config).named_modules()
        if isinstance(layer, nn.Conv2d)
    }


@pytest.mark.parametrize(
    "name, kinds",
    [
        # peft would take `mlp.gate_proj` for a part of the experts
        ("DeepseekV3", {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}),
        ("Mamba", {"in_proj"}),
        ("Qwen2Moe", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_layers_that_an_adapter_would_miss_get_none(name: str, kinds: set[str]) -> None:
    with torch.device("meta"):
        config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
        model = transformers.AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GeoloraWarning)  # narrow ones
        found, _ = adapted_layers(model, [], 2)
    assert {layer.rpartition(".")[2] for layer in found} == kinds
