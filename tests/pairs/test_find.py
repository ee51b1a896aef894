"""Which layers are treated, and the reason where one is not."""

from pathlib import Path

import peft
import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import geolora
from geolora.errors import PairingError, SettingError, SetupError, UnpairedParametersWarning
from geolora.pairs.find import find_pairs, refuse_unreachable
from models import lora_net
from tolerances import difference


class Mixed(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.linear = nn.Linear(6, 8)
        self.transposed = Conv1D(8, 6)
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.embedding = nn.Embedding(10, 6)
        self.attention = nn.MultiheadAttention(8, 2)
        self.twin = nn.Linear(6, 8)


def mixed(*targets: str, **config: object) -> nn.Module:
    return get_peft_model(Mixed(), LoraConfig(r=2, target_modules=list(targets), **config))


@pytest.mark.parametrize(
    "target, shapes",
    [
        ("linear", [(8, 6)]),
        ("transposed", [(8, 6)]),
        ("conv", [(8, 27)]),
        ("attention", [(24, 8), (8, 8)]),
    ],
)
def test_treated_layers_are_trained_on_the_manifold(
    target: str, shapes: list[tuple[int, int]]
) -> None:
    model = mixed(target, **({"fan_in_fan_out": True} if target == "transposed" else {}))
    pairs = find_pairs(model)
    assert [(pair.d_out, pair.d_in) for pair in pairs] == shapes
    optimizer = geolora.GeoLoRA(model, lr=0.1, moments="none")
    inputs = {
        "attention": (torch.randn(3, 2, 8),) * 3,
        "conv": (torch.randn(2, 3, 5, 5),),
    }.get(target, (torch.randn(4, 6),))
    layer = getattr(model.base_model.model, target)
    for _ in range(2):
        model.zero_grad()
        out = layer(*inputs)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        optimizer.step()
    for pair in pairs:
        A, B = pair.A.detach().flatten(1), pair.B.detach().flatten(1)
        assert B.any(), "it moved"
        used = B.any(0)
        assert difference((A @ A.mT)[used][:, used], (B.mT @ B)[used][:, used]) < 1e-5, "balanced"


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: nn.Linear(3, 3), "must have LoRA layers; found none.*get_peft_model"),
        (lambda: mixed("grouped"), "`grouped`.*groups=2.*block structure"),
        (lambda: mixed("linear", use_dora=True), "`linear`.*DoraLinearVariant.*LoraConfig"),
        (lambda: mixed("embedding"), "adapter `default`.*at least one linear"),
        (
            lambda: get_peft_model(Mixed(), AdaLoraConfig(target_modules=["linear"], total_step=9)),
            "`linear`.*AdaLoRA",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_refused_layers(build: object, words: str) -> None:
    with pytest.raises(PairingError, match=words):
        geolora.GeoLoRA(build())


def test_tied_pairs_are_refused() -> None:
    model = mixed("linear", "twin")
    layers = model.base_model.model
    layers.twin.lora_A["default"].weight = layers.linear.lora_A["default"].weight
    with pytest.raises(PairingError, match="share storage; linear, twin do"):
        geolora.GeoLoRA(model)


def test_sharded_factors_are_refused_where_they_are_not_gathered() -> None:
    model = mixed("linear")
    weight = model.base_model.model.linear.lora_B["default"].weight
    weight.placements = ("Shard(0)",)
    with pytest.raises(geolora.errors.SetupError, match="`linear` are sharded.*DDP"):
        geolora.RiemannianAdamW(model)


def test_factors_on_mps_are_refused() -> None:
    from types import SimpleNamespace

    factor = SimpleNamespace(device=torch.device("mps"), ndim=2)
    with pytest.raises(geolora.errors.SetupError, match="`layer` are on MPS.*use_cpu"):
        refuse_unreachable("layer", factor)


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(SettingError, match="r=7 for 8 x 6 in `linear`.*Lower"):
        geolora.GeoLoRA(get_peft_model(Mixed(), LoraConfig(r=7, target_modules=["linear"])))


def test_a_scale_that_is_not_positive_is_refused() -> None:
    model = mixed("linear")
    model.base_model.model.linear.scaling["default"] = 0.0
    with pytest.raises(SettingError, match=r"positive; got 0.0 in `linear`.*lora_alpha"):
        geolora.GeoLoRA(model)


def test_frozen_factors_are_refused() -> None:
    model = mixed("linear")
    model.base_model.model.linear.lora_A["default"].weight.requires_grad = False
    with pytest.raises(PairingError, match="`linear`.*A frozen"):
        geolora.GeoLoRA(model)


def test_embeddings_go_to_adamw_with_a_warning() -> None:
    model = mixed("linear", "embedding")
    with pytest.warns(UnpairedParametersWarning, match="embedding"):
        optimizer = geolora.GeoLoRA(model)
    kinds = {group["kind"]: len(group["params"]) for group in optimizer.param_groups}
    assert kinds == {"geometric": 2, "rest": 2}


def test_one_of_two_adapters_is_trained() -> None:
    model = lora_net(modules_to_save=None)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["first"]))
    assert {pair.r for pair in find_pairs(model)} == {4}
    assert [pair.r for pair in find_pairs(model, "second")] == [2]
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(PairingError, match=r"`adapter_name`.*\['default', 'second'\]"):
        find_pairs(model)
    optimizer = geolora.GeoLoRA(model, adapter_name="second")
    assert optimizer.settled_ranks() == {"first": 2}


def test_injected_modules_without_a_peft_model() -> None:
    net = Mixed()
    peft.inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"]), net)
    assert [pair.name for pair in find_pairs(net)] == ["linear"]


def test_layers_of_one_shape_share_a_group_and_geometric_groups_come_first() -> None:
    optimizer = geolora.GeoLoRA(lora_net())
    assert [group["kind"] for group in optimizer.param_groups] == ["geometric", "geometric", "rest"]
    assert optimizer.param_groups[0]["layers"] == ["first", "second"]


def test_factors_without_data_on_two_devices_or_not_finite_are_refused() -> None:
    A, B = torch.randn(2, 6), torch.randn(8, 2)
    refuse_unreachable("x", A, B)
    with pytest.raises(SetupError, match="must be on one device; got cpu and meta"):
        refuse_unreachable("x", A, B.to("meta"))
    with pytest.raises(SetupError, match="on the meta device, without data"):
        refuse_unreachable("x", A.to("meta"), B.to("meta"))
    B[3, 1] = torch.inf
    with pytest.raises(SetupError, match="`x` must be finite; B holds NaN or infinities"):
        refuse_unreachable("x", A, B)
    model = lora_net()
    with torch.no_grad():
        find_pairs(model)[2].A[0, 0] = torch.nan
    for use in (geolora.GeoLoRA, geolora.ranks, geolora.prune):
        with pytest.raises(SetupError, match="`down` must be finite; A holds NaN"):
            use(model)


def test_pairs_of_mixed_dtypes_train_each_in_its_own() -> None:
    model = lora_net(dtype=torch.float32)
    first, second, _ = find_pairs(model)
    first.A.data, first.B.data = first.A.data.bfloat16(), first.B.data.bfloat16()
    second.B.data = second.B.data.double()
    before = [pair.B.detach().clone() for pair in (first, second)]
    optimizer = geolora.GeoLoRA(model)
    for pair in find_pairs(model):
        pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
    optimizer.step()
    for pair, old in zip((first, second), before, strict=True):
        assert pair.B.dtype == old.dtype
        assert pair.B.isfinite().all()
        assert not torch.equal(pair.B, old)


def test_names_are_the_same_under_ddp_and_compile() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module, name: str) -> None:
            super().__init__()
            setattr(self, name, inner)

    model = lora_net()
    names = [pair.name for pair in find_pairs(model)]
    for wrapped in (
        Wrapper(model, "module"),
        Wrapper(Wrapper(model, "_orig_mod"), "module"),
    ):
        assert [pair.name for pair in find_pairs(wrapped)] == names


def test_a_rank_above_the_classes_of_a_head_says_what_helps() -> None:
    base = nn.ModuleDict({"body": nn.Linear(8, 8), "classifier": nn.Linear(8, 2)})
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(
        SettingError, match=r"r=4 for 2 x 8 in `classifier`.*task_type in LoraConfig"
    ):
        find_pairs(model)


def tiny_mixtral(folder: Path) -> Path:
    config = MixtralConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [["q_proj", "gate"], []])
def test_a_router_is_an_ordinary_pair(targets: list[str], tmp_path: Path) -> None:
    """It holds a matrix that no linear layer holds; peft wraps it as it wraps experts, of which it is one."""
    source, ids = tiny_mixtral(tmp_path / "model"), torch.arange(20).reshape(2, 10)

    def base() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(source)

    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=targets, target_parameters=["gate.weight"]
    )
    model = get_peft_model(base(), config)
    optimizer = geolora.GeoLoRA(model, lr=1e-2)
    routers = [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert [pair.name for pair in find_pairs(model) if ".mlp." in pair.name] == routers
    geolora.initialize_lora_one(model, [{"input_ids": ids, "labels": ids}])
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    geolora.prune(model, tail=0.1)
    geolora.export(model, tmp_path / "adapter")
    assert geolora.verify(tmp_path / "adapter").keys() >= set(routers)
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6, rtol=1e-5
        )


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:.*alpha_pattern keys did not match:RuntimeWarning")
def test_what_all_linear_takes_of_a_mixture_is_said(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_mixtral(tmp_path))
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(PairingError, match="experts out of .* where 'all-linear' takes them too"):
        geolora.GeoLoRA(model)
