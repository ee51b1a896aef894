"""The optimizer over real PEFT models: equal to the plain reference, and at home in torch."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import geolora
import reference
from geolora.errors import (
    BudgetError,
    NonFiniteGradientError,
    SettingError,
    SetupError,
    SkippedStepWarning,
    StateError,
)
from geolora.kernels.tangent import to_dense
from geolora.optim.geolora_step import bucket_step, slot_widths
from geolora.pairs.find import find_pairs
from geolora.pairs.point import slot_ranks
from models import OneLayer, backward, lora_net, pairs_of, products, same, snapshot, train
from tolerances import bound, difference

EPS = torch.finfo(torch.float64).eps
MOMENTS = ["none", "momentum", "adaptive"]
LR = {"none": 0.2, "momentum": 0.03, "adaptive": 2e-3}


def masters(optimizer: geolora.GeoLoRA, group: int = 0) -> dict[str, torch.Tensor]:
    return optimizer.state[optimizer.param_groups[group]["params"][0]]


# ---- equal to the paper ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("start", ["stock", "general", "scattered"])
def test_t1_one_step_of_a_peft_layer_is_w_minus_lr_pg(scale: float, start: str) -> None:
    """Through autograd, from B = 0 (one-sided, T8) and from any A, B in any gauge (T7)."""
    layer = OneLayer(r=8, scale=scale)
    with torch.no_grad():
        if start == "general":  # rank 4 in 8 rows, so that nothing is cut by the number of slots
            layer.A[4:], layer.B.data[:, :4] = 0.0, torch.randn(14, 4)
        if start == "scattered":  # rank 2 in slots 2 and 6
            layer.A[[0, 1, 3, 4, 5, 7]], layer.B.data[:, 2::4] = 0.0, torch.randn(14, 2)
    W = layer.W
    G = layer.gradient(W)
    U = torch.linalg.qr(layer.B[:, layer.B.any(0)].detach())[0]
    V = torch.linalg.qr(layer.A[layer.A.any(1)].detach().mT)[0]
    optimizer = geolora.GeoLoRA(layer.model, lr=0.3, moments="none", tail=0.0, prune_every=1)
    layer.backward()
    optimizer.step()
    assert difference(layer.W, W - 0.3 * reference.projection(G, U, V)) < 1e-12


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("cycle", ["cycle", "paper", "fixed", "settle", "once"])
def test_fast_step_equals_the_plain_reference(moments: str, scale: float, cycle: str) -> None:
    """50 steps, W and momentum after every one, ranks too."""
    settings = {
        "cycle": {"prune_every": 12, "settle_after": None, "start_rank": 2, "tail": 0.1},
        "paper": {"prune_every": 1, "settle_after": None, "start_rank": 1, "tail": 0.05},
        "fixed": {"tail": None, "start_rank": 3},
        "settle": {"prune_every": 12, "settle_after": 30, "tail": 0.2},
        "once": {"settle_after": 10, "start_rank": 2, "tail": 0.2},
    }[cycle]
    layer = OneLayer(r=8, scale=scale)
    start = layer.A.detach().clone(), layer.B.detach().clone(), scale, layer.name, LR[moments]
    plain, nudged = (reference.Plain(*start, moments=moments, **settings) for _ in range(2))
    optimizer = geolora.GeoLoRA(layer.model, lr=LR[moments], moments=moments, **settings)
    noise = torch.randn(50, 14, 11, generator=torch.Generator().manual_seed(1)).double()
    limit = 0.0
    for done in range(1, 51):
        layer.backward()
        optimizer.step()
        G = layer.gradient(nudged.W)
        plain.step(layer.gradient(plain.W))
        # What rounding may do is what it does to the plain algorithm itself: rounding in the
        # gradient turns directions that are small, and what follows from them.
        nudged.step(G + 4 * EPS * G.abs().max() * noise[done - 1])
        limit = max(limit, 20 * difference(nudged.W, plain.W), done * bound(torch.float64, 14))
        assert limit < 1e-7, "the comparison means something"
        assert difference(layer.W, plain.W) < limit, f"W after step {done}"
        state = masters(optimizer)
        if moments != "none":
            M = to_dense(*(state[key][0] for key in ("K", "L", "U", "V")))
            allowed = max(limit, 20 * difference(nudged.M, plain.M))
            assert difference(M, plain.M) < allowed, f"momentum after step {done}"
        assert int((state["sigma"] > 0).sum()) == torch.linalg.matrix_rank(plain.W, rtol=1e-12)
        assert optimizer.settled_ranks() == {"0": plain.settled}


def test_layers_share_a_step_by_shape_and_gradient_as_the_plain_reference_does() -> None:
    """A square and a wide layer, one with ten times the gradient: 20 steps equal to the plain ones."""
    base = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 32, bias=False)).double()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["0", "1"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    optimizer = geolora.GeoLoRA(model, lr=1e-3, tail=None)
    width = math.sqrt(math.sqrt(8 * 8) * math.sqrt(8 * 32))
    found = pairs_of(model)
    plain = [
        reference.Plain(
            A.detach().clone(), B.detach().clone(), scale, name, 1e-3, "adaptive", tail=None
        )
        for name, A, B, scale in found
    ]
    for layer in plain:
        layer.width = width
    starts = [layer.V for layer in plain]
    targets = [
        size * torch.randn_like(layer.W) for size, layer in zip((10.0, 1.0), plain, strict=True)
    ]
    for done in range(1, 21):
        gradients = [layer.W - T for layer, T in zip(plain, targets, strict=True)]
        for (_, A, B, scale), T in zip(found, targets, strict=True):
            G = scale * B.detach() @ A.detach() - T
            A.grad, B.grad = scale * B.detach().mT @ G, scale * G @ A.detach().mT
        optimizer.step()
        reference.step_all(plain, gradients)
        if done == 1:
            # one-sided, W = -size soft_sign(G V V^T): the largest value is exactly size / (1 + 0.01)
            forces, sizes = [], []
            for (_, A, B, scale), V, T in zip(found, starts, targets, strict=True):
                unit = math.sqrt(1024 * max(T.shape)) / width
                forces.append(float((T @ V @ V.mT).norm()) * unit)
                size = torch.linalg.matrix_norm((scale * B @ A).detach(), 2)
                sizes.append(float(size) / (1e-3 * unit * math.sqrt(8 / 2) / 1.01))
            mean_square = sum(force**2 for force in forces) / 2
            wanted = [force / math.sqrt(mean_square) for force in forces]
            assert sizes == pytest.approx(wanted, rel=1e-9)
            assert sizes[0] > 2 * sizes[1], "the larger gradient goes further"
        for (_, A, B, scale), layer in zip(found, plain, strict=True):
            assert difference(scale * (B @ A).detach(), layer.W) < done * bound(torch.float64, 32)


def test_a_budget_goes_where_the_loss_falls_and_survives_a_checkpoint() -> None:
    """Two layers of one shape: the one has the large sigmas, the other the gradients."""
    settings = {"budget": 5 * 16, "tail": 0.0, "settle_after": 4}

    def made() -> tuple[nn.Module, geolora.GeoLoRA]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).double()
        config = LoraConfig(r=4, lora_alpha=4, target_modules=["0", "1"])
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
        (_, A, B, _) = pairs_of(model)[1]
        with torch.no_grad():
            B.copy_(torch.linalg.qr(torch.randn(8, 4).double())[0])
            A.copy_(torch.linalg.qr(torch.randn(8, 4).double())[0].mT)
        return model, geolora.GeoLoRA(model, **settings)

    def advance(model: nn.Module, optimizer: geolora.GeoLoRA, steps: range) -> None:
        for number in steps:
            generator = torch.Generator().manual_seed(number)
            for size, (_, A, B, scale) in zip((1.0, 0.1), pairs_of(model), strict=True):
                G = size * torch.randn(8, 8, generator=generator).double()
                A.grad, B.grad = scale * B.detach().mT @ G, scale * G @ A.detach().mT
            optimizer.step()

    model, optimizer = made()
    advance(model, optimizer, range(3))
    again, resumed = made()
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    sigma = masters(optimizer)["sigma"]
    assert sigma[0].max() < sigma[1].min()
    for one, its in ((model, optimizer), (again, resumed)):
        advance(one, its, range(3, 7))
        assert its.settled_ranks() == {"0": 4, "1": 1}
        assert its.adapter_parameters() == settings["budget"]
    assert same(products(model), products(again))
    assert not masters(optimizer)["gain"].any(), "counted anew after the judgement"


@pytest.mark.parametrize("moments", MOMENTS)
def test_float32_follows_float64(moments: str) -> None:
    wide, narrow = OneLayer(r=8, scale=1.0), OneLayer(r=8, scale=1.0, dtype=torch.float32)
    with torch.no_grad():
        wide.A.copy_(narrow.A)
        wide.layer.base_layer.weight.copy_(narrow.layer.base_layer.weight)
    optimizers = [
        geolora.GeoLoRA(one.model, lr=LR[moments], moments=moments, tail=None)
        for one in (wide, narrow)
    ]
    magnified = 100 if moments == "adaptive" else 1
    for done in range(1, 31):
        for one, optimizer in zip((wide, narrow), optimizers, strict=True):
            one.backward()
            optimizer.step()
        limit = bound(torch.float32, 14, factor=10 * done * magnified)
        assert difference(narrow.W, wide.W) < limit


def test_orthonormality_does_not_drift() -> None:
    layer = OneLayer(r=6, scale=1.0, dtype=torch.float32)
    optimizer = geolora.GeoLoRA(layer.model, lr=1e-3, moments="adaptive", tail=0.0)
    for _ in range(1500):
        layer.backward()
        optimizer.step()
    for basis in (masters(optimizer)["U"], masters(optimizer)["V"]):
        gram = basis.mT @ basis
        active = torch.diag_embed((masters(optimizer)["sigma"] > 0).float())
        assert (gram - active).abs().max() < bound(torch.float32, 14)


def test_t10_matrix_regression_finds_rank_five() -> None:
    """From ranks 1, 2 and 10, at steps 0.1 and 1 (where a rank-1 tangent space is blind)."""
    target = torch.randn(20, 5).double() @ torch.randn(5, 20).double()
    target = target / torch.linalg.matrix_norm(target, 2)
    for start in (1, 2, 10):
        for lr in (0.1, 1.0):
            layer = OneLayer(r=16, scale=1.0, d_out=20, d_in=20)
            optimizer = geolora.GeoLoRA(
                layer.model, lr=lr, moments="none", start_rank=start, tail=1e-3
            )
            for _ in range(400):
                layer.model.zero_grad()
                W = layer.scale * layer.B @ layer.A
                (0.5 * (W - target).square().sum()).backward()
                optimizer.step()
            assert difference(layer.W, target) < 1e-5
            assert optimizer.settled_ranks() == {"0": 5}


def test_max_tangent_norm_bounds_the_joint_norm() -> None:
    changes = []
    for limit in (None, 1e-3):
        torch.manual_seed(0)
        model = lora_net()
        before = products(model)
        optimizer = geolora.GeoLoRA(model, lr=1.0, moments="none", max_tangent_norm=limit)
        backward(model)
        optimizer.step()
        changes.append({name: W - before[name] for name, W in products(model).items()})
    free, bounded = (torch.stack([c.norm() for c in change.values()]).norm() for change in changes)
    assert float(free) > 1e-2
    assert float(bounded) == pytest.approx(1e-3, rel=1e-9)
    for name, change in changes[0].items():
        assert difference(changes[1][name] / 1e-3, change / free) < 1e-9


# ---- slots and the cycle -----------------------------------------------------------------------


def test_start_is_not_written_before_the_first_step_nor_by_lr_zero() -> None:
    model = lora_net()
    before = snapshot(model)
    optimizer = geolora.GeoLoRA(model, lr=0.0, rest_lr=0.0)
    train(model, optimizer, 3)
    assert same(snapshot(model), before)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    train(model, optimizer, 2)
    middle = snapshot(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 2)
    assert same(snapshot(model), middle)


def test_momentum_is_gathered_while_lr_is_zero() -> None:
    """Warm-up from 0: the first written step uses the momentum of the ones before."""
    warm, cold = (OneLayer(r=4, scale=1.0) for _ in range(2))
    with torch.no_grad():
        cold.A.copy_(warm.A)
        cold.layer.base_layer.weight.copy_(warm.layer.base_layer.weight)
    optimizer = geolora.GeoLoRA(warm.model, lr=0.0, moments="momentum")
    for _ in range(2):
        warm.backward()
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    warm.backward()
    optimizer.step()
    once = geolora.GeoLoRA(cold.model, lr=0.01 * (1 + 0.8 + 0.64), moments="momentum")
    cold.backward()
    once.step()
    assert difference(warm.W, cold.W) < 1e-10


def test_trials_are_marked_and_settle() -> None:
    layer = OneLayer(r=8, scale=1.0)
    optimizer = geolora.GeoLoRA(
        layer.model, lr=0.1, moments="none", start_rank=2, prune_every=18, tail=0.0
    )
    seen = []
    for _ in range(6):
        layer.backward()
        optimizer.step()
        seen.append((slot_ranks(layer.A, layer.B), geolora.ranks(layer.model)["0"]))
    assert [ranks for ranks, _ in seen[:3]] == [(2, 0), (3, 1), (6, 4)]
    # one-sided from two probes; then B's side doubles but K adds nothing where lr G V is in range(U)
    assert all(settled == 2 for _, settled in seen[:3]), "not judged yet"
    assert seen[3] == ((8, 0), 8), "judged"


def test_budget_is_kept_over_all_layers() -> None:
    model = lora_net(r=6)
    cost = {name: A.shape[1] + B.shape[0] for name, A, B, _ in pairs_of(model)}
    optimizer = geolora.GeoLoRA(model, lr=1e-3, budget=200, tail=0.0, prune_every=6)
    train(model, optimizer, 14)
    ranks = geolora.ranks(model)
    assert ranks == optimizer.settled_ranks()
    spent = sum(rank * cost[name] for name, rank in ranks.items())
    assert 200 - max(cost.values()) < spent <= 200
    assert optimizer.adapter_parameters() == spent
    assert min(ranks.values()) >= 1


def test_ranks_are_kept_once_settled() -> None:
    model = lora_net(r=6)
    optimizer = geolora.GeoLoRA(model, lr=1e-3, tail=0.5, prune_every=6, settle_after=8)
    train(model, optimizer, 9)
    settled = geolora.ranks(model)
    assert 1 <= min(settled.values()) <= max(settled.values()) < 6
    for _ in range(12):
        train(model, optimizer, 1)
        assert geolora.ranks(model) == settled
        assert all(slot_ranks(A, B)[1] == 0 for _, A, B, _ in pairs_of(model))


def test_the_last_judgement_waits_for_a_step_that_moves() -> None:
    model = lora_net(r=6)
    optimizer = geolora.GeoLoRA(model, lr=1e-3, tail=0.0, budget=100, settle_after=3)
    for lr in (1e-3, 1e-3, 1e-3, 0.0, 0.0, 1e-3, 1e-3):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = lr
        assert optimizer.adapter_parameters() == 6 * 70 or lr != 0.0
        train(model, optimizer, 1)
    assert optimizer.adapter_parameters() <= 100
    settled = geolora.ranks(model)
    train(model, optimizer, 3)
    assert geolora.ranks(model) == settled


def test_a_pruned_or_reloaded_model_is_read_again() -> None:
    layer = OneLayer(r=6, scale=2.0)
    optimizer = geolora.GeoLoRA(layer.model, lr=0.05, moments="momentum", tail=None)
    for _ in range(5):
        layer.backward()
        optimizer.step()
    kept = geolora.prune(layer.model, tail=0.3)["0"]
    assert kept < 6
    W, state = layer.W, masters(optimizer)
    M = to_dense(*(state[key][0] for key in ("K", "L", "U", "V")))
    U, _, V = reference.truncated(W, kept)
    momentum = 0.8 * reference.projection(M, U, V) + reference.projection(layer.gradient(W), U, V)
    layer.backward()
    optimizer.step()
    expected, values, right = reference.truncated(W - 0.05 * momentum, kept)
    assert difference(layer.W, (expected * values) @ right.mT) < 1e-12
    assert optimizer.settled_ranks() == {"0": kept}


def test_layers_without_a_gradient_stand_still() -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3, moments="momentum")
    train(model, optimizer, 3)
    before = snapshot(model)
    still = {k: v.clone() for k, v in masters(optimizer).items()}
    backward(model)
    skipped = [p for n, p in model.named_parameters() if ".second." in n and p.requires_grad]
    for p in skipped:
        p.grad = None
    optimizer.step()
    after = snapshot(model)
    for name in before:
        moved = not torch.equal(before[name], after[name])
        assert moved == (("lora_" in name or "modules_to_save" in name) and ".second." not in name)
    layers = optimizer.param_groups[0]["layers"]
    for key, value in masters(optimizer).items():
        assert torch.equal(value[layers.index("second")], still[key][layers.index("second")])
    train(model, optimizer, 1)
    name = "base_model.model.second.lora_A.default.weight"
    assert not torch.equal(snapshot(model)[name], after[name])


def test_layers_never_used_count_in_the_budget_but_not_more_than_they_hold() -> None:
    model = lora_net(r=6)
    cost = {name: A.shape[1] + B.shape[0] for name, A, B, _ in pairs_of(model)}
    optimizer = geolora.GeoLoRA(model, lr=1e-3, budget=150, tail=0.0, prune_every=6)
    for _ in range(9):
        backward(model)
        for name, p in model.named_parameters():
            if ".second." in name or ".down." in name:
                p.grad = None
        optimizer.step()
    assert optimizer.adapter_parameters() <= 150
    ranks = geolora.ranks(model)
    assert ranks["first"] == 4, "what the others do not hold is left to it"
    assert ranks["second"] == ranks["down"] == 0
    assert sum(rank * cost[name] for name, rank in ranks.items()) <= 150
    losses = train(model, optimizer, 12)
    assert losses[-1] < losses[0], "and they can still be trained"
    assert min(geolora.ranks(model).values()) == 1


def test_slots_are_counted_once_while_ranks_are_held_also_beside_layers_never_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = lora_net(r=8)
    optimizer = geolora.GeoLoRA(model, prune_every=12, tail=0.3)
    steps = set()
    count = slot_widths.filled_slots

    def counted(basis: torch.Tensor) -> torch.Tensor:
        steps.add(optimizer.param_groups[0]["steps"])
        return count(basis)

    monkeypatch.setattr("geolora.optim.geolora_step.slot_widths.filled_slots", counted)
    for _ in range(12):
        backward(model)
        for name, p in model.named_parameters():
            if ".second." in name:
                p.grad = None
        optimizer.step()
    assert steps == {0, 1, 2, 3}, "grow, grow, judge, and the first that holds"


def test_training_lowers_the_loss_and_the_head_is_trained() -> None:
    for moments in MOMENTS:
        torch.manual_seed(0)
        model = lora_net(dtype=torch.float32)
        head = model.base_model.model.head.modules_to_save["default"].weight.detach().clone()
        base = model.base_model.model.first.base_layer.weight.detach().clone()
        optimizer = geolora.GeoLoRA(model, lr={"adaptive": 8e-3}.get(moments, 0.5), moments=moments)
        losses = train(model, optimizer, 80, dtype=torch.float32)
        assert losses[-1] < 0.7 * losses[0]
        assert not torch.equal(head, model.base_model.model.head.modules_to_save["default"].weight)
        assert torch.equal(base, model.base_model.model.first.base_layer.weight)


# ---- at home in torch --------------------------------------------------------------------------


def through_bytes(value: object) -> object:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("moments", MOMENTS)
def test_state_dict_resumes_bit_exactly(moments: str, dtype: torch.dtype) -> None:
    def build() -> tuple[nn.Module, geolora.GeoLoRA]:
        torch.manual_seed(0)
        model = lora_net(dtype=dtype)
        lr = 3e-4 if moments == "adaptive" else 0.05
        return model, geolora.GeoLoRA(model, lr=lr, moments=moments, prune_every=6, start_rank=2)

    model, optimizer = build()
    train(model, optimizer, 8, dtype=dtype)
    other, resumed = build()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(through_bytes(optimizer.state_dict()))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    for group in range(2):
        saved, loaded = masters(optimizer, group), masters(resumed, group)
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[k], loaded[k]) and loaded[k].dtype == wanted for k in saved)
    for _ in range(7):
        assert train(model, optimizer, 1, dtype=dtype) == train(other, resumed, 1, dtype=dtype)
        assert same(snapshot(model), snapshot(other))
    assert optimizer.settled_ranks() == resumed.settled_ranks()


@pytest.mark.parametrize("copier", ["deepcopy", "pickle"])
def test_copies_go_on_alike(copier: str) -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    train(model, optimizer, 4)
    both = (model, optimizer)
    other, twin = copy.deepcopy(both) if copier == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert isinstance(twin, geolora.GeoLoRA)
    train(model, optimizer, 4)
    train(other, twin, 4)
    assert same(snapshot(model), snapshot(other))


def test_schedulers_and_extra_groups() -> None:
    model = lora_net()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = geolora.GeoLoRA(model, lr=1e-3, rest_lr=1e-2)
    optimizer.add_param_group({"params": [extra]})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    backward(model)
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-4, 5e-3, 5e-3]
    assert bool((extra < 1).all())


def test_the_rest_is_torchs_adamw() -> None:
    model = lora_net()
    twin = copy.deepcopy(model)
    head = [p for n, p in twin.named_parameters() if "modules_to_save" in n]
    optimizer = geolora.GeoLoRA(model, lr=0.0, rest_lr=1e-2)
    adamw = torch.optim.AdamW(head, lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        backward(model)
        optimizer.step()
        backward(twin)
        adamw.step()
    assert same(snapshot(model), snapshot(twin))


def test_grad_scaler_skips_overflow() -> None:
    model = lora_net(dtype=torch.float32)
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for overflow in (False, True, False):
        before = snapshot(model)
        backward(model, torch.float32)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(float("inf") if overflow else scaler.get_scale())
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        assert same(snapshot(model), before) == overflow


def test_optimizer_state_is_at_most_one_and_a_half_times_adamws() -> None:
    model = lora_net(dtype=torch.float32)
    pairs = [p for _, A, B, _ in pairs_of(model) for p in (A, B)]
    optimizer, adamw = geolora.GeoLoRA(model), torch.optim.AdamW(pairs)
    backward(model, torch.float32)
    optimizer.step()
    adamw.step()
    paired = {id(p) for p in pairs}

    def size(optimizer: torch.optim.Optimizer) -> int:
        tensors = [
            t for p, s in optimizer.state.items() if id(p) in paired
            for t in s.values() if isinstance(t, torch.Tensor)
        ]  # fmt: skip
        return sum(t.numel() * t.element_size() for t in tensors)

    assert 0 < size(optimizer) <= 1.5 * size(adamw)


# ---- refusals ----------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_skips_everything() -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    train(model, optimizer, 2)
    before, steps = snapshot(model), optimizer.param_groups[0]["steps"]
    backward(model)
    model.base_model.model.down.lora_A["default"].weight.grad[0, 0] = float("nan")
    with pytest.warns(SkippedStepWarning, match="down"):
        optimizer.step()
    assert same(snapshot(model), before)
    assert optimizer.param_groups[0]["steps"] == steps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkippedStepWarning)
        for _ in range(18):
            optimizer.step()
        with pytest.raises(NonFiniteGradientError, match="20 steps in a row.*down"):
            optimizer.step()
    train(model, optimizer, 1)
    assert not same(snapshot(model), before)


def test_closures_are_refused() -> None:
    optimizer = geolora.GeoLoRA(lora_net())
    with pytest.raises(SetupError, match="closures"):
        optimizer.step(lambda: 0.0)


def test_partitioned_factors_are_refused() -> None:
    model = lora_net()
    model.base_model.model.first.lora_A["default"].weight.ds_shape = (4, 12)
    with pytest.raises(SetupError, match="`first`.*ZeRO.*DDP"):
        geolora.GeoLoRA(model)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lr": -1.0}, "`lr`.*-1.0"),
        ({"lr": float("nan")}, "`lr`.*nan"),
        ({"rest_lr": -1.0}, "`rest_lr`"),
        ({"moments": "adam"}, "`moments`.*adaptive.*'adam'"),
        ({"momentum": 1.0}, "`momentum`"),
        ({"tail": 1.0}, "`tail`.*1.0"),
        ({"prune_every": 0}, "`prune_every`"),
        ({"start_rank": 0}, "`start_rank`"),
        ({"start_rank": 1.5}, "`start_rank`.*whole number; got 1.5"),
        ({"prune_every": 2.5}, "`prune_every`.*whole number; got 2.5"),
        ({"settle_after": True}, "`settle_after`.*whole number; got True"),
        ({"budget": float("nan")}, "`budget` must be a whole number of parameters; got nan"),
        ({"budget": 100.5}, "`budget` must be a whole number"),
        ({"tail": "0.2"}, "`tail`.*got '0.2'"),
        ({"settle_after": -1}, "`settle_after`.*-1"),
        ({"budget": 99, "tail": None}, "`budget`.*None where"),
        ({"start_rank": 5}, "`start_rank`.*5.*r=4"),
        ({"max_tangent_norm": 0.0}, "`max_tangent_norm`"),
        ({"adapter_name": "other"}, "`adapter_name`.*default.*'other'"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        geolora.GeoLoRA(lora_net(), **settings)


def test_a_budget_below_one_direction_per_layer_is_refused() -> None:
    least = 24 + 24 + 22
    geolora.GeoLoRA(lora_net(), budget=least)
    with pytest.raises(BudgetError, match=f"`budget`.*{least}.*got {least - 1}"):
        geolora.GeoLoRA(lora_net(), budget=least - 1)


def test_a_state_of_another_model_is_refused_and_changes_nothing() -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    fewer = geolora.GeoLoRA(lora_net(target_modules=["first"]))
    with pytest.raises(StateError, match="same layers; got 1 pairs, expected 3"):
        optimizer.load_state_dict(fewer.state_dict())
    other = lora_net(r=2)
    wider = geolora.GeoLoRA(other)
    train(other, wider, 1)
    with pytest.raises(StateError, match=r"`U` must be \(2, 12, 4\).*\(2, 12, 2\)"):
        optimizer.load_state_dict(wider.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, values in before["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][name]))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.pop("state"), "must have `state` and `param_groups`; got .'param_groups'."),
        (lambda s: s["state"][0].pop("V"), "must be whole; `V` of first is missing"),
        (lambda s: s["state"][0].pop("K"), "must be whole; `K` of first is missing"),
        (lambda s: s["param_groups"][0].pop("ranks"), "must be whole; `ranks` of first is missing"),
        (
            lambda s: s["state"][0].update(L=s["state"][0]["L"][..., :2]),
            r"`L` must be \(2, 12, 4\) for first; got \(2, 12, 2\)",
        ),
    ],
)
def test_a_state_that_is_not_whole_is_refused(damage: Callable, message: str) -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    with pytest.raises(StateError, match=message):
        optimizer.load_state_dict(state)
    train(model, optimizer, 1)


def test_a_nan_that_appears_in_a_factor_is_named() -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model, lr=1e-3)
    train(model, optimizer, 2)
    pair = find_pairs(model)[1]
    with torch.no_grad():
        pair.B[0, 0] = math.nan
    backward(model)
    with pytest.raises(SetupError, match="factors of `second` must be finite; B holds NaN"):
        optimizer.step()


def test_import_is_light_and_step_has_no_side_effect_on_gradients() -> None:
    model = lora_net()
    optimizer = geolora.GeoLoRA(model)
    backward(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert torch.equal(p.grad, grads[name])


@pytest.mark.parametrize("moments", ["adaptive", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_can_be_gone_over_in_chunks(
    moments: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for size in (1 << 21, 1):  # all layers of a shape at once, each for itself
        monkeypatch.setitem(bucket_step.CHUNK_BYTES, "cpu", size)
        torch.manual_seed(0)
        model = lora_net(dtype=dtype)
        optimizer = geolora.GeoLoRA(model, moments=moments, prune_every=6, max_tangent_norm=0.5)
        train(model, optimizer, 20, dtype=dtype)
        ends.append((snapshot(model), optimizer.settled_ranks()))
    assert ends[0][1] == ends[1][1]
    for name, value in ends[0][0].items():
        assert difference(ends[1][0][name], value) < bound(dtype, 12, factor=1e3), name


def test_a_chunk_has_layers_of_one_width_and_one_for_every_core() -> None:
    chunks = bucket_step.layers_of_chunks
    assert chunks([4, 4, 4], 100, 1) == [(4, [0, 1, 2])]
    assert chunks([4, 4, 4], 1, 1) == [(4, [0]), (4, [1]), (4, [2])], "each for itself"
    assert chunks([4, 4, 4], 1, 2) == [(4, [0, 1]), (4, [2])], "no core is left idle"
    assert chunks([4, 8, 4, 8], 8, 1) == [(4, [0, 2]), (8, [1]), (8, [3])]
    assert chunks([4, 8, 4, 8], None, 1) == [(4, [0, 2]), (8, [1, 3])], "sharded: all at once"


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_with_few_slots_in_use_go_apart(
    moments: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one shape and rank 1 or 9 in turn, one of them without a gradient in some steps."""
    generator = torch.Generator().manual_seed(0)
    true = [
        torch.randn(24, k, generator=generator) @ torch.randn(k, 24, generator=generator) / 24
        for k in (9, 1, 9, 1, 2)
    ]
    base = nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in true))
    config = LoraConfig(r=12, lora_alpha=12, target_modules=list("01234"))
    widths, ends = [], []
    cheapest = slot_widths.cheapest_widths

    def recorded(needed: list[int], r: int) -> list[int]:
        widths.append(cheapest(needed, r))
        return widths[-1]

    monkeypatch.setattr(slot_widths, "cheapest_widths", recorded)
    for worth in (10**9, 0):  # never, always
        monkeypatch.setattr(slot_widths, "WORTH", worth)
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), config).to(dtype)
        tail = 0.05 if moments == "adaptive" else 0.3
        optimizer = geolora.GeoLoRA(
            model, lr=LR[moments], moments=moments, prune_every=10, tail=tail
        )
        found = pairs_of(model)
        for step in range(25):
            for place, (_, A, B, scale) in enumerate(found):
                G = scale * B.detach() @ A.detach() - true[place].to(dtype)
                A.grad, B.grad = scale * B.detach().mT @ G, scale * G @ A.detach().mT
                if place == step % 7:
                    A.grad = B.grad = None
            optimizer.step()
        assert (max(len(set(row)) for row in widths) > 1) == (worth == 0), "two widths in a step"
        widths.clear()
        ends.append((products(model), optimizer.settled_ranks()))
    assert ends[0][1] == ends[1][1]
    assert max(ends[0][1].values()) > 4 >= sorted(ends[0][1].values())[1]
    limit = 1e-5 if dtype == torch.float32 else 1e-10  # a soft sign carries rounding on
    for name, value in ends[0][0].items():
        assert difference(ends[1][0][name], value) < limit, name


def test_the_cheapest_numbers_of_slots_are_taken() -> None:
    assert slot_widths.cheapest_widths([16] * 36, 16) == [16] * 36
    assert slot_widths.cheapest_widths([3] * 30 + [16], 16) == [4] * 30 + [16], (
        "30 x (256 - 16) > 2,500"
    )
    assert slot_widths.cheapest_widths([3] * 4 + [16], 16) == [16] * 5, "4 x 240 < 2,500"
    assert slot_widths.cheapest_widths([2] * 9 + [7] * 9 + [30], 30) == [8] * 18 + [30]
    assert slot_widths.cheapest_widths([5], 6) == [6], "never more than there are"


def test_slots_are_counted_anew_after_every_judgement_whichever_layers_take_part() -> None:
    ends = []
    for remembers in (True, False):
        torch.manual_seed(0)
        model = lora_net(r=8)
        optimizer = geolora.GeoLoRA(model, start_rank=1, tail=0.0, prune_every=6)
        ranks = []
        for step in range(30):
            backward(model)
            if step % 6 in (3, 5):  # held: one shape alone
                for name, p in model.named_parameters():
                    if ".down." in name:
                        p.grad = None
            if not remembers:
                optimizer.load_state_dict(optimizer.state_dict())  # found again from what is saved
            optimizer.step()
            ranks.append(optimizer.settled_ranks()["first"])
        assert ranks[5] < 4 < ranks[-1], "more than what the first count holds"
        ends.append(snapshot(model))
    assert same(*ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("write", ["mul_", "copy_", "assigned"])
def test_factors_written_through_data_are_read_again(write: str, dtype: torch.dtype) -> None:
    """As moving averages do it: no version counts up."""
    model = lora_net(dtype=dtype)
    twin = copy.deepcopy(model)
    optimizers = [geolora.GeoLoRA(one, lr=1e-3, tail=None) for one in (model, twin)]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, 3, dtype=dtype)
    average = {name: 0.1 * p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                if write == "mul_":
                    p.data.mul_(0.1)
                elif write == "copy_":
                    p.data.copy_(average[name])
                else:
                    p.data = average[name].clone()
        for name, p in twin.named_parameters():
            if "lora_" in name:
                p.copy_(average[name])
    before = products(model)
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, 1, dtype=dtype)
    after, wanted = products(model), products(twin)
    for name in before:
        assert torch.equal(after[name], wanted[name])
        assert not torch.equal(after[name], before[name])
