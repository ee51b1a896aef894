"""RiemannianAdamW: PEFT's optimizer where PEFT is right, and right where it is not."""

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor, nn

import geolora
from geolora.errors import (
    NonFiniteGradientError,
    PairingError,
    SettingError,
    SetupError,
    SkippedStepWarning,
    UnpairedParametersWarning,
)
from geolora.pairs import find_pairs
from models import backward, lora_net, same, snapshot, train
from tolerances import bound, difference


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
    with pytest.raises(PairingError, match="interleaved"):
        geolora.GeoLoRA(with_experts())


def test_parameters_that_were_swapped_are_followed() -> None:
    """As accelerate's FSDP2 does: other Parameter objects in the same places."""
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    optimizer = geolora.RiemannianAdamW(model, lr=1e-2)
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            last,
            nn.Parameter(parameter.detach().clone(), parameter.requires_grad),
        )
    fresh = dict(zip(map(id, twin.parameters()), model.parameters(), strict=True))
    other = geolora.RiemannianAdamW(twin, lr=1e-2)
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        ours["params"] = [fresh[id(p)] for p in theirs["params"]]
    train(model, optimizer, 5)
    train(twin, other, 5)
    assert same(snapshot(model), snapshot(twin))


def test_a_pair_without_a_gradient_is_left_alone() -> None:
    model = lora_net(r=3)
    optimizer = geolora.RiemannianAdamW(model, lr=1e-2)
    backward(model)
    pair = find_pairs(model)[0]
    pair.A.grad = pair.B.grad = None
    before = snapshot(model)
    optimizer.step()
    changed = {n for n, p in snapshot(model).items() if not torch.equal(p, before[n])}
    assert changed
    assert not any(".first." in name for name in changed)


def test_state_goes_through_checkpoints_and_copies() -> None:
    model = lora_net(r=3)
    optimizer = geolora.RiemannianAdamW(model, lr=1e-2)
    train(model, optimizer, 3)
    other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    third = copy.deepcopy(model)
    loaded = geolora.RiemannianAdamW(third, lr=1e-2)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, twin), (third, loaded)):
        train(m, o, 3)
    assert same(snapshot(model), snapshot(other))
    assert same(snapshot(model), snapshot(third))


def test_gradients_that_are_not_finite_skip_the_step() -> None:
    model = lora_net(r=3)
    optimizer = geolora.RiemannianAdamW(model)
    backward(model)
    find_pairs(model)[1].A.grad[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.warns(SkippedStepWarning, match="RiemannianAdamW.step: skipped.*second"):
        optimizer.step()
    assert same(before, snapshot(model))
    for _ in range(18):
        with pytest.warns(SkippedStepWarning):
            optimizer.step()
    with pytest.raises(NonFiniteGradientError, match="20 steps in a row"):
        optimizer.step()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lr": -1.0}, "`lr` must be a number >= 0"),
        ({"rest_lr": float("nan")}, "`rest_lr` must be a number >= 0"),
        ({"damping": 0.0}, "`damping` must be a number > 0"),
        ({"eps": 0.0}, "`eps` must be a number > 0"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        geolora.RiemannianAdamW(lora_net(r=3), **settings)


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
