"""RiemannianAdamW and LoRAPro: equal to a plain reference or to PEFT, and safe where PEFT is not."""

import copy
import pickle
from collections.abc import Callable
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
from geolora.pairs.find import find_pairs
from models import backward, batch, lora_net, products, same, snapshot, train
from reference import basis_of, projection
from tolerances import bound, difference

KINDS = {
    "riemannian": lambda model, **more: geolora.RiemannianAdamW(model, **{"lr": 1e-2, **more}),
    "lora-pro": lambda model, **more: geolora.LoRAPro(model, **{"lr": 1e-3, **more}),
    "lora-pro, full": lambda model, **more: geolora.LoRAPro(
        model, moments="full", **{"lr": 1e-3, **more}
    ),
    "lora-sb": lambda model, **more: geolora.LoRASB(started(model), **{"lr": 1e-2, **more}),
    "rac-lora": lambda model, **more: geolora.RACLoRA(model, 2, 3, **{"lr": 1e-2, **more}),
}


def started(model: nn.Module) -> nn.Module:
    """After `initialize_lora_sb`, unless it is already."""
    if not find_pairs(model)[0].B.any():
        geolora.initialize_lora_sb(model, [batch()], one_loss)
    return model


def one_loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., torch.optim.Optimizer]:
    return KINDS[request.param]


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
    with pytest.raises(PairingError, match="interleaved"):
        geolora.GeoLoRA(with_experts())


def test_parameters_that_were_swapped_are_followed(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    """As accelerate's FSDP2 does: other Parameter objects in the same places."""
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    optimizer = kind(model)
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            last,
            nn.Parameter(parameter.detach().clone(), parameter.requires_grad),
        )
    fresh = dict(zip(map(id, twin.parameters()), model.parameters(), strict=True))
    other = kind(twin)
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        ours["params"] = [fresh[id(p)] for p in theirs["params"]]
    train(model, optimizer, 5)
    train(twin, other, 5)
    assert same(snapshot(model), snapshot(twin))


def test_a_pair_without_a_gradient_is_left_alone(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    model = lora_net(r=3)
    optimizer = kind(model)
    train(model, optimizer, 2)
    backward(model)
    pair = find_pairs(model)[0]
    pair.A.grad = pair.B.grad = None
    before = snapshot(model)
    optimizer.step()
    changed = {n for n, p in snapshot(model).items() if not torch.equal(p, before[n])}
    assert changed
    assert not any(".first." in name for name in changed)
    twin, other = copy.deepcopy((model, optimizer))
    for _ in range(3):  # however long it has none, it goes on as if it had not waited
        pair.A.grad = pair.B.grad = None
        optimizer.step()
    assert torch.equal(find_pairs(twin)[0].B, pair.B)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    kept = other.state[other.param_groups[0]["params"][0]]
    rows = {key: value for key, value in kept.items() if key != "step"}
    for key, value in rows.items():
        one = len(value) > 1 and value.dim() == 3 and key in ("R", "exp_avg", "exp_avg_sq")
        if one or key not in ("U", "rows", "columns", "on_A", "on_B", "R", "exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][0], value[0]), key


def test_a_step_size_of_zero_changes_no_bit(kind: Callable[..., torch.optim.Optimizer]) -> None:
    model = lora_net(r=3)
    optimizer = kind(model, lr=0.0, rest_lr=0.0)
    before = snapshot(model)
    train(model, optimizer, 2)
    assert same(before, snapshot(model))


def test_factors_that_were_loaded_are_gone_on_from(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    model = lora_net(r=3)
    optimizer = kind(model)
    before = {p.name: p.B.detach().clone() for p in find_pairs(model)}
    train(model, optimizer, 5)
    with torch.no_grad():
        for pair in find_pairs(model):
            pair.B.copy_(before[pair.name] * 3 if before[pair.name].any() else before[pair.name])
    loaded = {p.name: p.B.detach().clone() for p in find_pairs(model)}
    train(model, optimizer, 1)
    for pair in find_pairs(model):
        assert (pair.B.detach() - loaded[pair.name]).abs().max() < 0.1, "no jump back"
        assert not torch.equal(pair.B.detach(), loaded[pair.name])


def test_state_goes_through_checkpoints_and_copies(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    model = lora_net(r=3)
    optimizer = kind(model)
    train(model, optimizer, 3)
    other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    third = copy.deepcopy(model)
    loaded = kind(third)
    loaded.load_state_dict(optimizer.state_dict())
    for m, o in ((model, optimizer), (other, twin), (third, loaded)):
        train(m, o, 3)
    assert same(snapshot(model), snapshot(other))
    assert same(snapshot(model), snapshot(third))


def test_gradients_that_are_not_finite_skip_the_step(
    kind: Callable[..., torch.optim.Optimizer],
) -> None:
    model = lora_net(r=3)
    optimizer = kind(model)
    backward(model)
    find_pairs(model)[1].A.grad[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.warns(SkippedStepWarning, match=r"step: skipped.*second"):
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
        ({"weight_decay": -1.0}, "`weight_decay` must be a number >= 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        geolora.RiemannianAdamW(lora_net(r=3), **settings)


def nearest_factors(
    A: Tensor, B: Tensor, on_A: Tensor, on_B: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Of all (g_A, g_B) with s (B g_A + g_B A) = P(W)N, those nearest to s B^T N and s N A^T: least squares."""
    left = torch.linalg.lstsq(B.mT, on_A).solution if B.any() else torch.zeros_like(B @ A)
    right = torch.linalg.lstsq(A, on_B.mT).solution.mT
    U = basis_of(B) if B.any() else B[:, :0]
    wanted = U @ U.mT @ left + right - U @ U.mT @ right
    near = torch.cat([(s * on_A).flatten(), (s * on_B).flatten()])

    def effect(x: Tensor) -> Tensor:
        g_A, g_B = x[: A.numel()].view_as(A), x[A.numel() :].view_as(B)
        return (s * (B @ g_A + g_B @ A)).flatten()

    matrix = torch.stack([effect(e) for e in torch.eye(len(near), dtype=A.dtype)], dim=1)
    x = near + torch.linalg.pinv(matrix, rtol=1e-11) @ (wanted.flatten() - effect(near))
    return x[: A.numel()].view_as(A), x[A.numel() :].view_as(B)


def plain_lora_pro(model: nn.Module, lr: float, steps: int, moments: str) -> None:
    """Dense matrices, one layer after the other; the head by AdamW. In place."""
    first, second, eps = 0.9, 0.999, 1e-8
    pairs = find_pairs(model)
    factors = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    rest = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad and id(p) not in factors],
        lr=1e-3,
        weight_decay=0.0,
    )
    memory: dict[str, Any] = {}
    for t in range(1, steps + 1):
        backward(model)
        rest.step()
        for pair in pairs:
            A, B, s = pair.A.detach().clone(), pair.B.detach().clone(), pair.scale
            U = basis_of(B) if B.any() else B[:, :0]
            # any matrix with these factor gradients has the same projection
            left = torch.linalg.lstsq(B.mT, pair.A.grad / s).solution if B.any() else None
            right = torch.linalg.lstsq(A, (pair.B.grad / s).mT).solution.mT
            G = right if left is None else U @ U.mT @ left + (right - U @ U.mT @ right)
            M, v, rows, columns = memory.get(pair.name, (0 * G, 0 * G, 0 * G[:, 0], 0 * G[0]))
            M = first * M + (1 - first) * G
            v = second * v + (1 - second) * G**2
            rows = second * rows + (1 - second) * (G**2).mean(1)
            columns = second * columns + (1 - second) * (G**2).mean(0)
            if moments == "full":
                N = M / (1 - first**t) / ((v / (1 - second**t)).sqrt() + eps)
            else:
                outer = rows.unsqueeze(1) * columns / rows.mean() / (1 - second**t)
                N = M / (1 - first**t) / outer.sqrt()
            parts = (B.mT @ N, N @ A.mT)
            g_A, g_B = nearest_factors(A, B, *parts, s)
            with torch.no_grad():
                pair.A.sub_(lr * g_A)
                pair.B.sub_(lr * g_B)
            if moments == "tangent":
                M = projection(M, basis_of(pair.B.detach()), basis_of(pair.A.detach().mT))
            memory[pair.name] = (M, v, rows, columns)


@pytest.mark.parametrize("moments", ["full", "tangent"])
def test_lora_pro_equals_the_plain_algorithm_on_dense_matrices(moments: str) -> None:
    model = lora_net(r=3, scale=2.0)
    twin = copy.deepcopy(model)
    train(model, geolora.LoRAPro(model, lr=1e-3, moments=moments, ridge=0.0), 8)
    plain_lora_pro(twin, 1e-3, 8, moments)
    for name, W in products(model).items():
        assert difference(W, products(twin)[name]) < 1e-6, name


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


@pytest.mark.parametrize("name", KINDS)
def test_they_learn(name: str) -> None:
    model = lora_net(r=3)
    slow = {"lora-sb": 3e-2, "rac-lora": 3e-2}  # fewer numbers are trained
    losses = train(model, KINDS[name](model, lr=slow.get(name, 3e-3)), 100)
    assert losses[-1] < 0.8 * losses[0]


def test_lora_sb_is_adam_on_the_core_and_nothing_else() -> None:
    model = started(lora_net(r=3, scale=2.0))
    twin = copy.deepcopy(model)
    train(model, geolora.LoRASB(model, lr=1e-2), 6)
    head = [p for name, p in twin.named_parameters() if p.requires_grad and "lora_" not in name]
    rest = torch.optim.AdamW(head, lr=1e-3, weight_decay=0.0)
    points = {}
    for pair in find_pairs(twin):
        assert torch.allclose(pair.A @ pair.A.mT, torch.eye(3, dtype=torch.float64), atol=1e-6)
        U, values, Vt = torch.linalg.svd(pair.scale * pair.B.detach(), full_matrices=False)
        R = (values.unsqueeze(-1) * Vt).requires_grad_()
        points[pair.name] = (U, R, torch.optim.Adam([R], lr=1e-2))
    for _ in range(6):
        backward(twin)
        rest.step()
        for pair in find_pairs(twin):
            U, R, adam = points[pair.name]
            R.grad = U.mT @ pair.B.grad / pair.scale
            adam.step()
            with torch.no_grad():
                pair.B.copy_(U @ R / pair.scale)
    for name, p in model.named_parameters():
        assert difference(p.detach(), twin.get_parameter(name).detach()) < 1e-9, name


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


def test_rac_lora_trains_block_after_block() -> None:
    model = lora_net(r=5)
    twin = copy.deepcopy(model)
    optimizer = geolora.RACLoRA(model, steps_per_block=3, blocks=2, lr=1e-2)
    train(model, optimizer, 8)
    rest = torch.optim.AdamW(
        [p for name, p in twin.named_parameters() if p.requires_grad and "lora_" not in name],
        lr=1e-3,
        weight_decay=0.0,
    )
    adam: Any = None
    for t in range(8):
        if t in (0, 3):
            slots = slice(0, 2) if t == 0 else slice(2, 5)
            parts = [p.B.detach()[:, slots].clone().requires_grad_() for p in find_pairs(twin)]
            adam = torch.optim.AdamW(parts, lr=1e-2, weight_decay=0.0)
        backward(twin)
        rest.step()
        for part, pair in zip(parts, find_pairs(twin), strict=True):
            part.grad = pair.B.grad[:, slots].clone()
        adam.step()
        with torch.no_grad():
            for part, pair in zip(parts, find_pairs(twin), strict=True):
                pair.B[:, slots] = part
    for name, p in model.named_parameters():
        assert difference(p.detach(), twin.get_parameter(name).detach()) < 1e-9, name
    assert optimizer.param_groups[0]["steps"] == 8


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
