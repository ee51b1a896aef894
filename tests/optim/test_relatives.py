"""What is peculiar to each of GeoLoRA's relatives; what all must do is in `test_battery.py`."""

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor, nn

import geolora
from geolora.errors import (
    PairingError,
    SettingError,
    SetupError,
    UnpairedParametersWarning,
)
from geolora.pairs.find import find_pairs
from models import backward, batch, lora_net, products, same, snapshot, train
from tolerances import bound, difference


def started(model: nn.Module) -> nn.Module:
    """After `initialize_lora_sb`, unless it is already."""
    if not find_pairs(model)[0].B.any():
        geolora.initialize_lora_sb(model, [batch()], one_loss)
    return model


def one_loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])


def peer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """PEFT's, with its default damping, 1e-2."""
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=lr, weight_decay=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_equals_pefts_on_linear_layers(dtype: torch.dtype) -> None:
    model = lora_net(r=4, scale=2.0, dtype=dtype)
    twin = copy.deepcopy(model)
    train(model, geolora.RiemannianAdamW(model, lr=1e-2, rest_lr=1e-2), 15, dtype=dtype)
    train(twin, peer(twin, 1e-2), 15, dtype=dtype)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert difference(ours.detach(), theirs.detach()) < bound(dtype, 12, factor=1e3), name


class Experts(nn.Module):
    """Two experts of a mixture in one 3-D parameter, both used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 6) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eod,nd->neo", self.weight, x).flatten(1)


def with_experts() -> Any:
    torch.manual_seed(0)
    base = nn.ModuleDict({"experts": Experts()}).double()
    base.forward = lambda x: base["experts"](x)  # type: ignore[method-assign]
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.weight"])
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def expert_loss(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(5, 6)
    return (model(x) - 1).square().mean()


def test_a_pair_that_waits_has_the_bias_correction_of_its_own_steps() -> None:
    """With a damping far above B^T B and A A^T the metric is flat, and Adam does not see its scale."""
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    ours = geolora.RiemannianAdamW(model, lr=1e-2, damping=1e12, eps=1e-40)
    factors = [p for pair in find_pairs(twin) for p in (pair.A, pair.B)]
    others = [p for p in twin.parameters() if p.requires_grad and all(p is not q for q in factors)]
    theirs = torch.optim.AdamW(
        [{"params": factors, "lr": 1e-2, "eps": 1e-40}, {"params": others}], weight_decay=0.0
    )
    for step in range(7):
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            backward(each)
            if step in (1, 2, 4):
                pair = find_pairs(each)[0]
                pair.A.grad = pair.B.grad = None
            optimizer.step()
    for pair, other in zip(find_pairs(model), find_pairs(twin), strict=True):
        assert difference(pair.A.detach(), other.A.detach()) < 1e-9, pair.name
        assert difference(pair.B.detach(), other.B.detach()) < 1e-9, pair.name


def test_a_factor_frozen_on_the_way_stays_as_it_is() -> None:
    model = lora_net(r=3)
    optimizer = geolora.RiemannianAdamW(model, weight_decay=0.1)
    train(model, optimizer, 2)
    for pair in find_pairs(model):
        pair.A.requires_grad_(False)
    before = [pair.A.detach().clone() for pair in find_pairs(model)]
    optimizer.zero_grad()
    backward(model)
    moved = find_pairs(model)[0].B.detach().clone()
    optimizer.step()
    assert all(torch.equal(pair.A, A) for pair, A in zip(find_pairs(model), before, strict=True))
    assert not torch.equal(find_pairs(model)[0].B, moved)


def test_experts_are_separate_pairs() -> None:
    model = with_experts()
    (pair,) = find_pairs(model, with_experts=True)
    assert (pair.experts, pair.r) == (2, 2)
    torch.nn.init.normal_(pair.B)
    expert_loss(model).backward()
    want = {}
    for e in range(2):
        rows, columns = slice(2 * e, 2 * e + 2), slice(e, None, 2)
        A, B = pair.A.detach()[rows], pair.B.detach()[:, columns]
        one = 1e-2 * torch.eye(2, dtype=torch.float64)
        want[e] = (
            torch.linalg.solve(B.mT @ B + one, pair.A.grad[rows]),
            torch.linalg.solve(A @ A.mT + one, pair.B.grad[:, columns].mT).mT,
        )
    before = pair.A.detach().clone(), pair.B.detach().clone()
    geolora.RiemannianAdamW(model, lr=1.0, eps=1e3).step()  # eps large: the step is grad / eps
    for e in range(2):
        rows, columns = slice(2 * e, 2 * e + 2), slice(e, None, 2)
        moved_A = (before[0] - pair.A.detach())[rows] * 1e3
        moved_B = (before[1] - pair.B.detach())[:, columns] * 1e3
        assert difference(moved_A, want[e][0]) < 1e-2
        assert difference(moved_B, want[e][1]) < 1e-2


def test_experts_are_still_refused_by_geolora() -> None:
    with pytest.raises(PairingError, match="factors of all experts are interleaved"):
        geolora.GeoLoRA(with_experts())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lr": -1.0}, "`lr` must be a number >= 0"),
        ({"rest_lr": float("nan")}, "`rest_lr` must be a number >= 0"),
        ({"damping": 0.0}, "`damping` must be a number > 0"),
        ({"eps": 0.0}, "`eps` must be a number > 0"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
        ({"weight_decay": -1.0}, "`weight_decay` must be a number >= 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        geolora.RiemannianAdamW(lora_net(r=3), **settings)


@pytest.mark.parametrize("moments", ["full", "tangent"])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_lora_pros_first_step_is_lr_in_w_whatever_the_scale(moments: str, scale: float) -> None:
    model = lora_net(r=3, scale=scale)
    train(model, geolora.LoRAPro(model, lr=1e-3, moments=moments), 1)
    for name, W in products(model).items():
        assert 1e-4 < W.square().mean().sqrt() < 2e-3, name


def test_lora_pros_state_is_as_large_as_an_adapter() -> None:
    base = nn.ModuleDict({"wide": nn.Linear(96, 96)})
    base.forward = lambda x: base["wide"](x)  # type: ignore[method-assign]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["wide"]))
    sizes = {}
    for moments in ("tangent", "full"):
        optimizer = geolora.LoRAPro(model, moments=moments)
        model(torch.randn(5, 96)).square().mean().backward()
        optimizer.step()
        sizes[moments] = sum(v.numel() for v in optimizer.state[find_pairs(model)[0].A].values())
    assert sizes == {"tangent": 5 * 192, "full": 2 * 96 * 96}


def test_lora_pro_is_stable_where_a_gradient_has_few_directions() -> None:
    """The layer before a head of two classes has a gradient of rank 1; float32."""
    for moments in ("tangent", "full"):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16), nn.Linear(16, 2))
        model = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "2"]))
        x, labels = torch.randn(64, 12), torch.randint(0, 2, (64,))
        optimizer = geolora.LoRAPro(model, moments=moments)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert max(losses) < losses[0] + 0.01


def test_lora_sb_refuses_another_start() -> None:
    plain = lora_net(r=3)
    backward(plain)
    with pytest.raises(SetupError, match="B is zero in all of them"):
        geolora.LoRASB(plain).step()
    chain = started(lora_net(r=3))
    backward(chain)
    with pytest.raises(SetupError, match="a chain starts from B = 0; that of `first` is not"):
        geolora.RACLoRA(chain, 5, 2).step()
    model = lora_net(r=3)
    geolora.initialize_lora_one(model, [batch()], one_loss)
    backward(model)
    with pytest.raises(SetupError, match="rows of A of `first` must be orthonormal"):
        geolora.LoRASB(model).step()


def test_bf16_factors_have_float32_moments() -> None:
    model = lora_net(r=3, dtype=torch.float32)
    for pair in find_pairs(model):
        pair.A.data, pair.B.data = pair.A.data.bfloat16(), pair.B.data.bfloat16()
    optimizer = geolora.LoRAPro(model)
    train(model, optimizer, 3, dtype=torch.float32)
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    kinds = {v.dtype for s in optimizer.state.values() for v in s.values()}
    assert kinds == {torch.float32}


def test_bad_settings_of_the_others() -> None:
    with pytest.raises(SettingError, match="`moments` must be one of"):
        geolora.LoRAPro(lora_net(r=3), moments="half")
    with pytest.raises(
        SettingError, match="RACLoRA: `blocks` must be from 1 to the rank, 3; got 4"
    ):
        geolora.RACLoRA(lora_net(r=3), 5, blocks=4)
    with pytest.raises(SettingError, match="`steps_per_block` must be 1 or more"):
        geolora.RACLoRA(lora_net(r=3), 0)


def test_closures_and_embeddings() -> None:
    with pytest.raises(SetupError, match="closures"):
        geolora.RiemannianAdamW(lora_net(r=3)).step(lambda: 0.0)  # type: ignore[arg-type]
    base = nn.ModuleDict({"words": nn.Embedding(9, 4), "linear": nn.Linear(4, 4)})
    model = get_peft_model(base, peft.LoraConfig(r=2, target_modules=["words", "linear"]))
    with pytest.warns(UnpairedParametersWarning, match="words"):
        optimizer = geolora.RiemannianAdamW(model)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3] * 3


def test_through_trainer() -> None:
    factory, settings = geolora.for_trainer("riemannian", lr=0.1, rest_lr=0.2, damping=1.0)
    optimizer = factory()(lora_net(r=4), **settings)
    assert isinstance(optimizer, geolora.RiemannianAdamW)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1, 0.2]
    with pytest.raises(SettingError, match="`momentum` must be one of"):
        geolora.for_trainer("riemannian", momentum=0.9)


def test_lora_plus_with_ratio_one_is_adamw_and_leaves_the_head_its_step() -> None:
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    plus, adamw = (
        geolora.for_trainer(name, lr=1e-2, rest_lr=3e-3, **more)
        for name, more in (("lora-plus", {"ratio": 1.0}), ("lora", {}))
    )
    train(model, plus[0]()(model, **plus[1]), 5)
    train(twin, adamw[0]()(twin, **adamw[1]), 5)
    assert same(snapshot(model), snapshot(twin))
    groups = plus[0]()(model, lr=1e-3, rest_lr=5e-4).param_groups
    assert [group["lr"] for group in groups] == [1e-3, 16e-3, 5e-4]
    with pytest.raises(SettingError, match="`ratio` must be a number >= 1; got 0.5"):
        plus[0]()(model, ratio=0.5)
