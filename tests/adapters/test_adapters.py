"""Adapters as files: what stock peft loads is what was trained."""

import copy
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.utils import logging

import geolora
from geolora.adapters.base_model import quietly
from geolora.adapters.names import CONFIG, PROBES, WEIGHTS
from geolora.adapters.verify import read_loss
from geolora.errors import (
    AdapterError,
    BudgetError,
    GeoloraWarning,
    SettingError,
    VerificationError,
)
from models import D_IN, Net, backward, lora_net, pairs_of, products, same, snapshot, train


def trained(steps: int = 16, dtype: torch.dtype = torch.float32, scale: float = 2.0, **kwargs):
    """A net trained until layers have different ranks; its fresh base; and fixed inputs."""
    torch.manual_seed(0)
    model = lora_net(r=6, scale=scale, dtype=dtype)
    settings = {"lr": 1e-3, "prune_every": 6, "tail": 0.05, "settle_after": 12} | kwargs
    optimizer = geolora.GeoLoRA(model, **settings)
    train(model, optimizer, steps, dtype=dtype)
    torch.manual_seed(0)
    return model, Net().to(dtype), torch.randn(50, D_IN).to(dtype)


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5 * expected.abs().max())


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_stock_peft_computes_what_was_trained(layout: str, tmp_path: Path) -> None:
    model, base, x = trained()
    before = snapshot(model)
    done = geolora.export(model, tmp_path, layout=layout)
    assert done.ranks == geolora.ranks(model)
    assert len(set(done.ranks.values())) > 1
    assert done.error == 0.0
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert close(loaded(x), model(x)), "head included"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    errors = geolora.verify(tmp_path, Net())
    assert errors.keys() == done.ranks.keys()
    assert max(errors.values()) < 1e-5


def test_uniform_files_are_what_servers_read(tmp_path: Path) -> None:
    model, _, _ = trained()
    done = geolora.export(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    top = max(done.ranks.values())
    assert config["r"] == config["lora_alpha"] == top
    assert isinstance(config["lora_alpha"], int)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["init_lora_weights"] is True
    assert not config["use_rslora"]
    assert sorted(config["target_modules"]) == ["down", "first", "second"]
    tensors = load_file(tmp_path / WEIGHTS)
    for name in done.ranks:
        A = tensors[f"base_model.model.{name}.lora_A.weight"]
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert A.shape[0] == B.shape[1] == top
        rank = done.ranks[name]
        assert torch.allclose(A[:rank].norm(dim=1), B[:, :rank].norm(dim=0)), "balanced"
    assert done.exported_parameters == top * (24 + 24 + 22)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert f"{done.adapter_parameters:,} parameters" in card
    assert "uniform layout, for peft" in card, "there is a head"
    assert done.others == ["base_model.model.head.bias", "base_model.model.head.weight"]
    assert not done.server_shaped


def test_compact_files_hold_what_was_found(tmp_path: Path) -> None:
    model, _, _ = trained()
    done = geolora.export(model, tmp_path, layout="compact")
    assert done.exported_parameters == done.adapter_parameters
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["rank_pattern"] == {f"^{name}": rank for name, rank in done.ranks.items()}


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_an_asked_rank_truncates_or_pads_and_says_the_error(rank: int, tmp_path: Path) -> None:
    model, base, _x = trained()
    if rank < 9:
        with pytest.raises(
            AdapterError, match=rf"`rank` {rank} cuts \d+% .* allows 5%. Give a high"
        ):
            geolora.export(model, tmp_path, rank=rank)
        assert not list(tmp_path.iterdir())
    done = geolora.export(model, tmp_path, rank=rank, max_error=1.0)
    assert read_loss(tmp_path) == pytest.approx(done.error)
    lost = total = 0.0
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    got = {name: (s * B @ A) for name, A, B, s in pairs_of(loaded)}
    for name, A, B, s in pairs_of(model):
        W = (s * B @ A).detach()
        lost += float((got[name].detach() - W).square().sum())
        total += float(W.square().sum())
        assert int(torch.linalg.matrix_rank(got[name], rtol=1e-4)) == min(rank, done.ranks[name])
    assert done.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert (done.error == 0) == (rank == 9)
    assert geolora.verify(tmp_path, Net())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_what_is_not_finite_is_not_written(name: str, value: float, tmp_path: Path) -> None:
    """Of a head, which no reader of pairs looks at; of what was there before all stays."""
    model = lora_net(r=2, dtype=torch.float32)
    geolora.export(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    head = dict(model.named_parameters())[f"base_model.model.head.modules_to_save.default.{name}"]
    head.data.view(-1)[-1] = value
    with pytest.raises(AdapterError, match=rf"`.*head.{name}` \(float32\) must be finite"):
        geolora.export(model, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_directions_never_judged_are_left_out_with_a_warning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(r=6, dtype=torch.float32)
    optimizer = geolora.GeoLoRA(model, lr=1e-3, start_rank=1, prune_every=30)
    train(model, optimizer, 3, dtype=torch.float32)
    with pytest.warns(GeoloraWarning, match="never judged"):
        done = geolora.export(model, tmp_path)
    assert set(done.ranks.values()) == {1}
    assert done.dropped_trials > 0
    assert 0 < done.error < 1


def test_rslora_bf16_and_a_second_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(r=4, scale=1.0, dtype=torch.bfloat16, use_rslora=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"]))
    optimizer = geolora.GeoLoRA(model, lr=1e-3, adapter_name="default")
    train(model, optimizer, 4, dtype=torch.bfloat16)
    done = geolora.export(model, tmp_path, adapter_name="default")
    tensors = load_file(tmp_path / WEIGHTS)
    assert all(value.dtype == torch.bfloat16 for value in tensors.values())
    assert not any("other" in key for key in tensors)
    assert geolora.verify(tmp_path, Net().to(torch.bfloat16)).keys() == done.ranks.keys()
    for name, A, B, s in pairs_of(model):
        loaded = [tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB"]
        W = s * B.float() @ A.float()
        assert (loaded[1] @ loaded[0] - W).norm() < 0.02 * W.norm(), "bf16 factors"


def test_empty_layers_are_written_as_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(r=4, dtype=torch.float32, modules_to_save=None)
    done = geolora.export(model, tmp_path)
    assert set(done.ranks.values()) == {0}
    assert done.server_shaped
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    assert all(not (s * B @ A).any() for _, A, B, s in pairs_of(loaded))


def test_only_the_targeted_layers_are_named(tmp_path: Path) -> None:
    """Where a leaf name would hit more layers than were trained, whole paths are written."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0.0"]))
    geolora.export(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["0.0"]
    torch.manual_seed(0)
    fresh = nn.Sequential(nn.Sequential(nn.Linear(5, 5)), nn.Sequential(nn.Linear(5, 5)))
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path))
    assert [name for name, *_ in pairs_of(loaded)] == ["0.0"]


def test_a_conv_and_a_transposed_layer(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(2, 6, 3), "turned": Conv1D(8, 5)})

    config = LoraConfig(r=2, target_modules=["conv", "turned"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), config)
    for _, A, B, _ in pairs_of(model):
        nn.init.normal_(A)
        nn.init.normal_(B)
    geolora.export(model, tmp_path)
    assert max(geolora.verify(tmp_path, build()).values()) < 1e-5
    loaded = {
        n: s * B.flatten(1) @ A.flatten(1)
        for n, A, B, s in pairs_of(PeftModel.from_pretrained(build(), str(tmp_path)))
    }
    for name, A, B, s in pairs_of(model):
        assert close(loaded[name], s * B.flatten(1) @ A.flatten(1))


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    pissa = get_peft_model(
        Net(), LoraConfig(r=2, target_modules=["first"], init_lora_weights="pissa")
    )
    with pytest.raises(AdapterError, match="'pissa' changed the base weights"):
        geolora.export(pissa, tmp_path / "a")
    net = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12), nn.MultiheadAttention(12, 2))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(AdapterError, match=r"LoRA on embeddings \(0\)"):
        geolora.export(model, tmp_path / "a")
    net = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 12), nn.MultiheadAttention(12, 2))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["2"]))
    with pytest.raises(AdapterError, match="inside a MultiheadAttention"):
        geolora.export(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 3 LoRA tensor")
def test_biases_of_the_pairs_keep_their_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(r=2, scale=2.0, dtype=torch.float32, lora_bias=True)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    done = geolora.export(model, tmp_path)
    assert "base_model.model.first.lora_B.bias" in done.others
    torch.manual_seed(0)
    x = torch.randn(5, D_IN)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path))
    model.eval()
    torch.manual_seed(0)
    assert close(loaded(x), model(x))


def tiny_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("layout", ["uniform", "compact"])
def test_a_transformers_model_by_folder(layout: str, tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules="all-linear")
    model = get_peft_model(base, config)
    ids = torch.randint(1, 50, (6, 7))
    optimizer = geolora.GeoLoRA(model, lr=1e-2, prune_every=3, tail=0.3)
    for _ in range(6):
        model.zero_grad()
        model(input_ids=ids, labels=torch.tensor([0, 1, 2] * 2)).loss.backward()
        optimizer.step()
    geolora.export(model, tmp_path / "out", layout=layout)
    assert geolora.verify(tmp_path / "out")
    fresh = LlamaForSequenceClassification.from_pretrained(folder)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "out")).eval()
    assert close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    merged = loaded.merge_and_unload()
    assert close(merged(input_ids=ids).logits, model(input_ids=ids).logits)


def loudness() -> tuple[int, bool, bool]:
    """How loud transformers is: level of its log, its progress bars, the Hub's."""
    return (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        not are_progress_bars_disabled(),
    )


@pytest.fixture
def loud() -> Iterator[tuple[int, bool, bool]]:
    """As loud as nobody leaves it by accident; put back in the end."""
    level, bars, hub_bars = loudness()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    yield (logging.INFO, True, True)
    logging.set_verbosity(level)
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    (enable_progress_bars if hub_bars else disable_progress_bars)()


def test_verify_leaves_logs_and_progress_bars_as_they_were(
    loud: tuple[int, bool, bool], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny_llama(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear")
    geolora.export(get_peft_model(base, config), tmp_path / "out")
    assert loudness() == loud
    capsys.readouterr()
    assert geolora.verify(tmp_path / "out")
    assert loudness() == loud
    (folder / "config.json").write_text("[]")
    with pytest.raises(AdapterError, match="cannot be loaded"):
        geolora.verify(tmp_path / "out")
    assert loudness() == loud
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("bars", [True, False])
@pytest.mark.parametrize("hub_bars", [True, False])
def test_quiet_is_put_back_whatever_happens(
    bars: bool, hub_bars: bool, loud: tuple[int, bool, bool]
) -> None:
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    (enable_progress_bars if hub_bars else disable_progress_bars)()
    before = (loud[0], bars, hub_bars)
    quiet = (logging.ERROR, False, False)
    with quietly():
        assert loudness() == quiet
        with pytest.raises(KeyboardInterrupt), quietly():
            raise KeyboardInterrupt
        assert loudness() == quiet, "an inner one ends as it began"
    assert loudness() == before


def test_verify_notices_what_was_changed(tmp_path: Path) -> None:
    model, _, _ = trained()
    geolora.export(model, tmp_path)
    good = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.second.lora_A.weight"
    save_file({**good, name: 1.01 * good[name]}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="layer `second`.*1.00e-02"):
        geolora.verify(tmp_path, Net())
    save_file(good, tmp_path / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(VerificationError, match="patterned rank or alpha"):
        geolora.verify(tmp_path, Net())
    (tmp_path / CONFIG).write_text(json.dumps(config))
    geolora.verify(tmp_path, Net())
    with pytest.raises(AdapterError, match=r"does not fit Sequential"):
        geolora.verify(tmp_path, nn.Sequential(nn.Linear(3, 3)))
    (tmp_path / PROBES).unlink()
    with pytest.raises(AdapterError, match="must hold"):
        geolora.verify(tmp_path, Net())


def test_refusals(tmp_path: Path) -> None:
    model = lora_net(dtype=torch.float32)
    with pytest.raises(SettingError, match="`layout`.*'flat'"):
        geolora.export(model, tmp_path / "a", layout="flat")
    with pytest.raises(SettingError, match=r"`rank` must be in 1..10.*down.*got 11"):
        geolora.export(model, tmp_path / "a", rank=11)
    with pytest.raises(SettingError, match="compact keeps every rank"):
        geolora.export(model, tmp_path / "a", rank=2, layout="compact")
    net = Net()
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["first"]), net)
    with pytest.raises(AdapterError, match="PeftModel; got Net"):
        geolora.export(net, tmp_path / "a")
    assert not (tmp_path / "a").exists(), "nothing half-written"
    with pytest.raises(AdapterError, match=CONFIG):
        geolora.inspect(tmp_path)
    with pytest.raises(SettingError, match="`tail`"):
        geolora.prune(model, tail=1.0)
    with pytest.raises(BudgetError, match="70 parameters; got 69"):
        geolora.prune(model, budget=69)


# ---- prune, ranks, inspect -----------------------------------------------------------------------


def test_prune_cuts_any_lora_model_in_place() -> None:
    torch.manual_seed(0)
    model = lora_net(r=6, scale=2.0)
    for _, A, B, _ in pairs_of(model):
        nn.init.normal_(A)
        nn.init.normal_(B)
    before = {name: (s * B @ A).detach() for name, A, B, s in pairs_of(model)}
    found = geolora.prune(model, tail=0.3)
    assert found == geolora.ranks(model)
    for name, A, B, s in pairs_of(model):
        W, values = (s * B @ A).detach(), torch.linalg.svdvals(before[name])
        expected = next(r for r in range(7) if values[r:].norm() <= 0.3 * values.norm())
        assert found[name] == expected
        assert float((W - before[name]).norm()) == pytest.approx(float(values[expected:].norm()))
        assert A.shape[0] == 6
    assert geolora.prune(model, tail=0.0, budget=80) == geolora.ranks(model)
    assert (
        sum(r * c for r, c in zip(geolora.ranks(model).values(), [24, 24, 22], strict=True)) <= 80
    )


def test_suggest_budget_scores_cuts_and_puts_the_adapter_back() -> None:
    model = lora_net(r=4)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 20)
    before, whole = snapshot(model), products(model)
    pairs = pairs_of(model)
    used = sum(A.numel() + B.numel() for _, A, B, _ in pairs)
    seen = []

    def evaluate() -> float:
        left = products(model)
        lost = sum(float((whole[name] - left[name]).square().sum()) for name in whole)
        seen.append((geolora.ranks(model), lost))
        return -lost

    rows = geolora.suggest_budget(model, evaluate, shares=(0.5, 0.1, 1.0, 0.75))
    assert [row.budget for row in rows] == [round(share * used) for share in (0.5, 0.75, 1.0)]
    total = sum(float(W.square().sum()) for W in whole.values())
    cost = {name: A.shape[1] + B.shape[0] for name, A, B, _ in pairs}
    for row, (ranks, lost) in zip(rows, seen, strict=True):
        assert row.score == -lost
        assert row.error == pytest.approx(math.sqrt(lost / total), abs=1e-7)
        assert row.adapter_parameters == sum(ranks[name] * cost[name] for name in cost)
        assert row.adapter_parameters <= row.budget
        assert row.exported_parameters == max(ranks.values()) * sum(cost.values())
    errors = [row.error for row in rows]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-7
    assert same(before, snapshot(model))

    def broken() -> float:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        geolora.suggest_budget(model, broken)
    assert same(before, snapshot(model))
    with pytest.raises(SettingError, match=r"`shares` must be in \(0, 1\]; got 1.5"):
        geolora.suggest_budget(model, evaluate, shares=(0.5, 1.5))


def test_prune_leaves_an_untrained_model_trainable() -> None:
    model = lora_net()
    before = snapshot(model)
    assert set(geolora.prune(model).values()) == {0}
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_inspect_reads_any_lora_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(
        r=4, scale=2.0, dtype=torch.float32, modules_to_save=None,
        rank_pattern={"down": 3}, alpha_pattern={"down": 12}, use_rslora=False,
    )  # fmt: skip
    for _, A, B, _ in pairs_of(model):
        nn.init.normal_(A)
        nn.init.normal_(B)
    model.save_pretrained(tmp_path)
    rows = {row.layer: row for row in geolora.inspect(tmp_path, tail=0.5)}
    for name, A, B, s in pairs_of(model):
        values = torch.linalg.svdvals((s * B @ A).detach())[: A.shape[0]]
        row = rows[name]
        assert row.sigma == pytest.approx(values.tolist(), rel=1e-4)
        assert row.rank == A.shape[0]
        share = float(values[row.tail_rank :].norm() / values.norm())
        assert share <= 0.5 < float(values[row.tail_rank - 1 :].norm() / values.norm())
        assert row.share_of_tail == pytest.approx(share, abs=1e-5)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 5 LoRA tensor")
@pytest.mark.parametrize("rslora", [False, True])
def test_inspect_agrees_with_what_peft_adds(rslora: bool, tmp_path: Path) -> None:
    """Scale, patterns and kernels as peft reads them; heads and biases are no layers."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = {
            f"{i}": nn.ModuleDict({"fc": nn.Linear(12, 10), "up": nn.Linear(10, 14)})
            for i in (2, 10)
        }
        return nn.ModuleDict({**layers, "conv": nn.Conv2d(3, 6, (2, 3)), "head": nn.Linear(4, 2)})

    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["fc", "up", "conv"], lora_bias=True,
        rank_pattern={"10.fc": 2, "^2.up": 3}, alpha_pattern={"up": 5.5}, modules_to_save=["head"],
    )  # fmt: skip
    model = get_peft_model(build(), config)
    for _, A, B, _ in pairs_of(model):
        nn.init.normal_(A)
        nn.init.normal_(B)
    model.save_pretrained(tmp_path)
    rows = geolora.inspect(tmp_path, tail=0.5)
    assert [row.layer for row in rows] == ["2.fc", "2.up", "10.fc", "10.up", "conv"]
    loaded = PeftModel.from_pretrained(build(), str(tmp_path)).get_base_model()
    for row in rows:
        delta = loaded.get_submodule(row.layer).get_delta_weight("default").detach().flatten(1)
        assert (row.d_out, row.d_in) == delta.shape
        values = torch.linalg.svdvals(delta)
        assert row.rank == {"10.fc": 2, "2.up": 3}.get(row.layer, 4)
        assert row.sigma == pytest.approx(values[: row.rank].tolist(), rel=1e-4)
        assert (row.settled_rank, row.share_dropped) == (row.tail_rank, row.share_of_tail)


def test_inspect_foretells_what_prune_leaves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = lora_net(r=6, scale=2.0, dtype=torch.float32)
    for name, A, B, _ in pairs_of(model):
        nn.init.normal_(A)
        if name != "second":  # never trained: no direction, but it keeps a slot that is paid for
            nn.init.normal_(B)
    model.save_pretrained(tmp_path)
    for tail, budget in ((0.3, None), (0.3, 130), (0.0, 100), (0.9, 70)):
        rows = {row.layer: row for row in geolora.inspect(tmp_path, tail, budget)}
        found = geolora.prune(copy.deepcopy(model), tail, budget)
        assert {name: row.settled_rank for name, row in rows.items()} == found
        for row in rows.values():
            size, lost = (math.hypot(*part) for part in (row.sigma, row.sigma[row.settled_rank :]))
            assert row.share_dropped == pytest.approx(lost / size if size else 0.0)
    assert found["second"] == 0
    assert sum(found[row.layer] * (row.d_in + row.d_out) for row in rows.values()) <= 70
    with pytest.raises(BudgetError, match="`budget` .*, 70 parameters; got 69"):
        geolora.inspect(tmp_path, budget=69)
    with pytest.raises(SettingError, match="`tail`.*got 1.0"):
        geolora.inspect(tmp_path, tail=1.0)


def test_a_trained_adapter_can_be_trained_on(tmp_path: Path) -> None:
    model, base, _ = trained()
    geolora.export(model, tmp_path)
    again = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True)
    loss = backward(again, torch.float32)
    assert loss == pytest.approx(backward(model, torch.float32), rel=1e-4)
    optimizer = geolora.GeoLoRA(again, lr=1e-4, tail=None)
    assert train(again, optimizer, 5, dtype=torch.float32)[-1] < loss
