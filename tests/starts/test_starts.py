"""Starts from the gradient: what is seen equals the dense gradient, and nothing else is changed."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

import geolora
from geolora.errors import (
    BudgetError,
    DataError,
    GradientError,
    PairingError,
    SettingError,
    SetupError,
    StateError,
)
from geolora.pairs.find import find_pairs
from geolora.starts.gradient_pass import without_gradient
from models import D_IN, lora_net, products, same, snapshot, tiny_bert, train
from tolerances import bound, difference

Loss = Callable[[nn.Module, Any], Tensor]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).double(), batch[1])


def batches(count: int = 3, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(24, D_IN, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(0, 3, (24,), generator=generator),
        )
        for _ in range(count)
    ]


def base_weight(model: PeftModel, name: str) -> nn.Parameter:
    return model.base_model.model.get_submodule(name).get_base_layer().weight


def dense(model: PeftModel, given: list[Any], loss_fn: Loss) -> dict[str, Tensor]:
    """The reference: dL/dW0 of every target layer by autograd, (d_out, d_in)."""
    model = copy.deepcopy(model)
    weights = {pair.name: base_weight(model, pair.name) for pair in find_pairs(model)}
    for weight in weights.values():
        weight.requires_grad_(True)
    loss = torch.stack([loss_fn(model, batch) for batch in given]).mean()
    return dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))


def best(G: Tensor, r: int) -> Tensor:
    U, sigma, Vt = torch.linalg.svd(G.double(), full_matrices=False)
    return U[:, :r] * sigma[:r] @ Vt[:r]


def of_state(state: dict[str, Tensor], name: str) -> Tensor:
    return (state[f"{name}.U"] * state[f"{name}.sigma"] @ state[f"{name}.V"].mT).double()


@pytest.mark.parametrize("scale", [1.0, 0.25, 7.0])
def test_it_sees_the_gradient_of_every_layer(scale: float) -> None:
    model = lora_net(r=4, scale=scale)
    gradients = dense(model, batches(), loss_of)
    state = geolora.get_lora_one_state(model, batches(), loss_of, width=10, tolerance=0)
    for name, G in gradients.items():  # 10 directions of at most 12: nearly all there is
        assert difference(of_state(state, name), best(G, 4)) < 1e-4
        assert state[f"{name}.missing"] < 1e-4


def test_the_start_is_along_minus_the_gradient_and_as_large_as_asked() -> None:
    model = lora_net(r=4, scale=2.0)
    gradients = dense(model, batches(), loss_of)
    start = geolora.initialize_lora_one(model, batches(), loss_of, norm=0.03, width=10, tolerance=0)
    for name, W in products(model).items():
        first = torch.linalg.matrix_norm(gradients[name], 2)
        assert difference(W, -0.03 * best(gradients[name], 4) / first) < 1e-4
        assert torch.linalg.matrix_norm(W.detach(), 2) == pytest.approx(0.03)
    assert start.norm == 0.03
    assert start.untouched == []
    assert set(start.missing) == set(gradients)
    assert start.loss_before is None


def test_the_pair_is_balanced_so_that_geolora_goes_on_from_it() -> None:
    model = lora_net(r=3, scale=2.0)
    geolora.initialize_lora_one(model, batches(), loss_of)
    before = products(model)
    for pair in find_pairs(model):
        on_A, on_B = pair.A.detach().norm(dim=1), pair.B.detach().norm(dim=0)
        assert torch.allclose(on_A, on_B)
    assert geolora.ranks(model) == {"first": 3, "second": 3, "down": 3}
    losses = train(model, geolora.GeoLoRA(model, lr=0.01), 20)
    assert losses[-1] < losses[0]
    assert any(difference(W, before[name]) > 0 for name, W in products(model).items())


def test_the_model_is_left_as_it_was() -> None:
    model = lora_net(r=3, lora_dropout=0.3)
    model.train()
    model.base_model.model.second.eval()
    head = model.base_model.model.head.modules_to_save["default"].weight
    head.grad = torch.ones_like(head)
    names = {name: id(p) for name, p in model.named_parameters()}
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    before, random = snapshot(model), torch.get_rng_state()
    geolora.get_lora_one_state(model, batches(), loss_of)
    assert same(before, snapshot(model))
    assert {name: id(p) for name, p in model.named_parameters()} == names
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(head.grad, torch.ones_like(head))
    assert all(p.grad is None for pair in find_pairs(model) for p in (pair.A, pair.B))
    rates = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    assert rates == {0.3}


def test_an_interrupted_pass_leaves_the_model_as_it_was() -> None:
    model = lora_net(r=3, lora_dropout=0.3)
    before = snapshot(model)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if batch is None:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    with pytest.raises(KeyboardInterrupt):
        geolora.initialize_lora_one(model, [*batches(), None], loss_fn)
    assert same(before, snapshot(model))
    assert all(p.requires_grad for pair in find_pairs(model) for p in (pair.A, pair.B))
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_dropout_is_off_and_on_again() -> None:
    given = batches()
    with_dropout, without = lora_net(r=3, lora_dropout=0.5), lora_net(r=3)
    without.load_state_dict(with_dropout.state_dict())
    with_dropout.train()
    left = geolora.get_lora_one_state(with_dropout, given, loss_of)
    right = geolora.get_lora_one_state(without, given, loss_of)
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_same_start_every_time_and_out_of_a_file(tmp_path: Path) -> None:
    model, twin, third = (lora_net(r=3) for _ in range(3))
    for other in (twin, third):
        other.load_state_dict(model.state_dict())
    start = geolora.initialize_lora_one(model, batches(), loss_of)
    state = geolora.get_lora_one_state(twin, batches(), loss_of)
    save_file(state, tmp_path / "start.safetensors")
    geolora.initialize_lora_one(twin, state=state, norm=start.norm)
    geolora.initialize_lora_one(third, batches(), loss_of, state=tmp_path / "start.safetensors")
    assert same(snapshot(model), snapshot(twin))
    assert same(snapshot(model), snapshot(third))


def test_batches_are_drawn_once_or_anew() -> None:
    drawn = []

    class Drawn:
        def __iter__(self) -> Any:
            drawn.append(0)
            return iter(batches(2))

    geolora.get_lora_one_state(lora_net(r=3), Drawn(), loss_of, passes=3, tolerance=0)
    assert len(drawn) == 1
    state = geolora.get_lora_one_state(
        lora_net(r=3), Drawn(), loss_of, passes=3, tolerance=0.9, fresh_batches=True
    )
    assert len(drawn) == 4, "all passes"
    assert state["first.missing"].isnan()


class Kinds(nn.Module):
    """Layers of other kinds, and small ones."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.conv = nn.Conv2d(2, 6, (2, 3))
        self.turned = Conv1D(5, 6)
        self.narrow = nn.Linear(5, 2)
        self.wide = nn.Linear(2, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).mean((-1, -2))
        return self.wide(torch.tanh(self.narrow(torch.tanh(self.turned(x)))))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_convolutions_conv1d_and_layers_narrower_than_the_sketch() -> None:
    torch.manual_seed(0)
    targets = ["conv", "turned", "narrow", "wide"]
    model = get_peft_model(
        Kinds().double(), LoraConfig(r=2, target_modules=targets), autocast_adapter_dtype=False
    )
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(30, 2, 5, 6, generator=generator, dtype=torch.float64)]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()

    gradients = dense(model, given, loss_fn)
    state = geolora.get_lora_one_state(model, given, loss_fn, width=99, tolerance=0)
    for name, G in gradients.items():
        G = G.mT if name == "turned" else G.flatten(1)
        assert difference(of_state(state, name), best(G, 2)) < 1e-5
    geolora.initialize_lora_one(model, state=state, norm=0.05)
    for name, W in {
        p.name: p.scale * p.B.flatten(1) @ p.A.flatten(1) for p in find_pairs(model)
    }.items():
        assert torch.linalg.matrix_norm(W.detach(), 2) == pytest.approx(0.05), name


def test_multi_head_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model = get_peft_model(
        Attends().double(),
        LoraConfig(r=2, target_modules=["attention"]),
        autocast_adapter_dtype=False,
    )
    x = torch.randn(5, 4, 8, dtype=torch.float64)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()

    before = loss_fn(model, x).item()
    start = geolora.initialize_lora_one(model, [x], loss_fn)
    assert start.untouched == []
    assert loss_fn(model, x).item() < before


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
def test_a_bert_under_checkpointing_autocast_and_int8_sees_the_same(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="of the dev group")
    from transformers import AutoModelForSequenceClassification

    folder = tiny_bert(tmp_path)

    def bert() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def with_lora(base: nn.Module) -> PeftModel:
        torch.manual_seed(1)
        config = LoraConfig(r=3, target_modules=["query", "dense"], exclude_modules=["classifier"])
        return get_peft_model(base, config).train()

    generator = torch.Generator().manual_seed(0)
    given = [
        {
            "input_ids": torch.randint(4, 20, (8, 12), generator=generator),
            "labels": torch.randint(0, 2, (8,), generator=generator),
        }
        for _ in range(2)
    ]

    def state(model: nn.Module) -> dict[str, Tensor]:
        return geolora.get_lora_one_state(model, given, width=8, passes=4, tolerance=0)

    model = with_lora(bert())
    plain = state(model)
    names = [pair.name for pair in find_pairs(model)]

    def apart(other: dict[str, Tensor]) -> float:
        return max(difference(of_state(other, n), of_state(plain, n)) for n in names)

    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert apart(state(model)) < 1e-4
    with torch.autocast("cpu", torch.bfloat16):
        assert apart(state(model)) < 0.2
    base = bert()
    torchao.quantize_(base.bert.encoder, torchao.Int8WeightOnlyConfig())
    assert apart(state(with_lora(base))) < 0.2


def test_a_bf16_adapter_is_looked_at_in_float32() -> None:
    model = lora_net(r=3, dtype=torch.float32)
    for pair in find_pairs(model):
        pair.A.data = pair.A.data.bfloat16()
        pair.B.data = pair.B.data.bfloat16()
    given = batches(dtype=torch.float32)
    gradients = dense(lora_net_like(model), given, loss_of)
    state = geolora.get_lora_one_state(model, given, loss_of, width=10, tolerance=0)
    for name, G in gradients.items():
        assert difference(of_state(state, name), best(G, 3)) < 1e-3


def lora_net_like(model: PeftModel) -> PeftModel:
    other = lora_net(r=3, dtype=torch.float32)
    other.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    return other


def curved(weight: float) -> Loss:
    """`loss_of` + weight ||W||^2: the same gradient at W = 0, but a step is sooner too far."""

    def loss_fn(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        squares = torch.stack([W.square().sum() for W in products(model).values()])
        return loss_of(model, given) + weight * squares.sum()

    return loss_fn


@pytest.mark.parametrize("initialize", [geolora.initialize_lora_one, geolora.initialize_lora_sb])
@pytest.mark.parametrize(("weight", "halved"), [(0.0, False), (30.0, True)])
def test_the_norm_is_halved_for_as_long_as_the_loss_falls(
    initialize: Callable[..., Any], weight: float, halved: bool
) -> None:
    loss_fn = curved(weight)

    def mean(model: nn.Module) -> float:
        return sum(float(loss_fn(model, given).detach()) for given in batches()) / 3

    fresh = lora_net(r=3)
    before = mean(fresh)
    state = geolora.get_lora_one_state(fresh, batches(), loss_fn)
    losses = {}
    for norm in (0.05 / 2**power for power in range(9)):
        model = copy.deepcopy(fresh)
        initialize(model, state=state, norm=norm)
        losses[norm] = mean(model)
    start = initialize(fresh, batches(), loss_fn)
    best = min(losses, key=lambda norm: losses[norm])
    assert start.norm == best
    assert (start.norm < 0.05) == halved
    assert start.loss_before == pytest.approx(before)
    assert start.loss_after == pytest.approx(losses[best])
    assert mean(fresh) == pytest.approx(losses[best])
    assert losses[best] < before


def test_the_norm_is_halved_until_the_loss_falls_even_on_a_plateau() -> None:
    """A loss that is far too high, and flat or falling, above 0.01: no stop on the way down."""
    for slope in (0.0, 1.0):

        def saturates(
            model: nn.Module, given: tuple[Tensor, Tensor], slope: float = slope
        ) -> Tensor:
            size = torch.linalg.matrix_norm(products(model)["first"], 2)
            return torch.where(size > 0.01, 100 - slope * size, loss_of(model, given))

        model = lora_net(r=3)
        start = geolora.initialize_lora_one(model, batches(), saturates)
        assert start.norm == 0.05 / 8
        assert start.loss_after < start.loss_before < 99


def test_fresh_batches_may_come_from_an_iterable_without_length() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(batches())

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    start = geolora.initialize_lora_one(model, loader, loss_of, fresh_batches=True)
    other = geolora.initialize_lora_one(twin, batches(), loss_of, tolerance=0.0)
    assert start.norm == other.norm
    assert same(snapshot(model), snapshot(twin))


def test_without_a_finite_loss_nothing_is_written() -> None:
    model = lora_net(r=3)
    state = geolora.get_lora_one_state(model, batches(), loss_of)
    before = snapshot(model)
    with pytest.raises(GradientError, match="must be finite"):
        geolora.initialize_lora_one(
            model, batches(), lambda m, given: loss_of(m, given) * math.inf, state=state
        )
    assert same(before, snapshot(model))


def test_a_norm_that_breaks_the_loss_is_not_taken_and_what_fails_is_undone() -> None:
    for bad in (torch.inf, torch.nan):

        def explodes(model: nn.Module, given: tuple[Tensor, Tensor], bad: float = bad) -> Tensor:
            big = max(float(W.norm()) for W in products(model).values())
            return loss_of(model, given) + (bad if big > 0.02 else 0.0)

        start = geolora.initialize_lora_one(lora_net(r=3), batches(), explodes)
        assert start.norm < 0.02
        assert start.loss_after is not None
        assert math.isfinite(start.loss_after)
    model = lora_net(r=3)
    before = snapshot(model)

    def breaks(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        if any(W.any() for W in products(model).values()):
            raise RuntimeError("out of memory")
        return loss_of(model, given)

    for initialize in (geolora.initialize_lora_one, geolora.initialize_lora_sb):
        with pytest.raises(RuntimeError, match="out of memory"):
            initialize(model, batches(), breaks)
        assert same(before, snapshot(model))


def test_running_statistics_are_put_back() -> None:
    base = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "3"])).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(8, 2, 5, 5)
    geolora.initialize_lora_one(model, [x], lambda m, x: (m(x) - 1).square().mean())
    assert len(before) == 3
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_lora_sb_starts_at_lora_ones_point() -> None:
    model = lora_net(r=3, scale=2.0)
    twin = copy.deepcopy(model)
    state = geolora.get_lora_one_state(model, batches(), loss_of)
    geolora.initialize_lora_one(model, state=state, norm=0.07)
    geolora.initialize_lora_sb(twin, state=state, norm=0.07)
    for name, W in products(model).items():
        assert difference(products(twin)[name], W) < 1e-6
    for pair in find_pairs(twin):
        A = pair.A.detach()
        assert torch.allclose(A @ A.mT, torch.eye(3, dtype=A.dtype), atol=1e-6)


def test_where_no_norm_descends_the_last_one_is_what_is_told() -> None:
    def climbs(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model, given) + 1e3 * sum(float(W.norm()) for W in products(model).values())

    model = lora_net(r=3)
    start = geolora.initialize_lora_one(model, batches(), climbs)
    assert start.norm == 0.05 / 256
    assert start.loss_after == pytest.approx(
        sum(float(climbs(model, given).detach()) for given in batches()) / 3
    )
    assert torch.linalg.matrix_norm(products(model)["first"], 2) == pytest.approx(0.05 / 256)


class Apart(nn.Module):
    """The loss sees `used` only."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.unused(x).detach()


def test_a_layer_the_loss_does_not_depend_on_keeps_its_start() -> None:
    model = get_peft_model(Apart(), LoraConfig(r=2, target_modules=["used", "unused"]))
    before = snapshot(model)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()

    model.forward = lambda x: {"loss": loss_fn(model.base_model, x)}
    names = without_gradient(model, {"x": torch.randn(9, 4)})
    assert [name.split(".")[-4:-2] for name in names] == [
        ["unused", "lora_A"],
        ["unused", "lora_B"],
    ]
    assert same(before, snapshot(model))
    assert all(p.grad is None for p in model.parameters())
    del model.forward

    start = geolora.initialize_lora_one(model, [torch.randn(9, 4)], loss_fn)
    assert start.untouched == ["unused"]
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split("lora_")[0].split(".")[-2] for name in changed} == {"used"}


def test_a_gradient_of_lower_rank_leaves_probes_behind() -> None:
    model = get_peft_model(Apart(), LoraConfig(r=3, target_modules=["used"]))
    x = torch.randn(1, 4)  # one row: G has rank 1

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()

    geolora.initialize_lora_one(model, [x], loss_fn)
    (pair,) = find_pairs(model)
    assert geolora.ranks(model) == {"used": 1}
    assert pair.B.ne(0).any(0).tolist() == [True, False, False]
    assert pair.A.ne(0).any(1).all(), "slots that can still learn"


def test_a_budget_goes_where_the_loss_falls_fastest() -> None:
    model = lora_net(r=4)
    gradients = dense(model, batches(), loss_of)
    given = {"width": 10, "tolerance": 0}
    geolora.initialize_lora_one(model, batches(), loss_of, budget=150, **given)
    ranks = geolora.ranks(model)
    costs = {pair.name: pair.d_in + pair.d_out for pair in find_pairs(model)}
    used = sum(ranks[name] * costs[name] for name in costs)
    assert 150 - max(costs.values()) < used <= 150
    worth = {  # all layers are 12 at their widest: the unit is the same
        name: torch.linalg.svdvals(G)[:4] / costs[name] for name, G in gradients.items()
    }
    least = min(float(worth[name][ranks[name] - 1]) for name in ranks if ranks[name] > 1)
    first_out = max(float(worth[name][ranks[name]]) for name in ranks if ranks[name] < 4)
    assert least > first_out
    for pair in find_pairs(model):
        assert pair.A.ne(0).any(1).sum() == pair.B.ne(0).any(0).sum() == ranks[pair.name]
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), 5)
    assert geolora.ranks(model) == ranks, "AdamW leaves idle slots idle"


def test_lora_ga_changes_nothing_and_then_moves_along_the_best_2h_directions() -> None:
    model = lora_net(r=4, scale=2.0)
    gradients = dense(model, batches(1), loss_of)
    x, labels = batches(1)[0]
    before = model(x).detach()
    start = geolora.initialize_lora_ga(model, batches(1), loss_of, gamma=4.0, width=10, tolerance=0)
    assert start.untouched == []
    assert difference(model(x).detach(), before) < 1e-6, "the function is the same"
    lr, pairs = 1e-6, find_pairs(model)
    kept = [(p.A.detach()[2:].clone(), p.B.detach()[:, 2:].clone()) for p in pairs]
    optimizer = torch.optim.SGD([p for pair in pairs for p in (pair.A, pair.B)], lr=lr)
    nn.functional.cross_entropy(model(x).double(), labels).backward()
    optimizer.step()
    for pair, (A, B) in zip(pairs, kept, strict=True):
        c2 = pair.d_out**0.5 / 4.0
        moved = (pair.scale * pair.B @ pair.A).detach() / (-lr * pair.scale**2 * c2)
        assert difference(moved, best(gradients[pair.name], 4)) < 1e-3, pair.name
        assert torch.equal(pair.A.detach()[2:], A)
        assert torch.equal(pair.B.detach()[:, 2:], B)


@pytest.mark.parametrize("initialize", [geolora.initialize_lora_one, geolora.initialize_lora_ga])
def test_every_start_is_saved_and_loaded_like_any_adapter(
    initialize: Callable[..., Any], tmp_path: Path
) -> None:
    model = lora_net(r=4, dtype=torch.float32)
    base = copy.deepcopy(model).unload()
    x = batches(1, torch.float32)[0][0]
    initialize(model, batches(dtype=torch.float32), loss_of)
    factors = [p for pair in find_pairs(model) for p in (pair.A, pair.B)]
    train(model, torch.optim.AdamW(factors, lr=1e-3, weight_decay=0.0), 5, dtype=torch.float32)
    model.save_pretrained(tmp_path / "by-peft")
    geolora.export(model, tmp_path / "by-us")
    for folder in ("by-peft", "by-us"):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        assert difference(loaded(x).detach(), model.eval()(x).detach()) < 1e-5, folder


def test_lora_ga_needs_an_even_rank_and_a_positive_gamma() -> None:
    with pytest.raises(SettingError, match="the rank must be even"):
        geolora.initialize_lora_ga(lora_net(r=3), batches(), loss_of)
    with pytest.raises(SettingError, match="`gamma` must be above 0"):
        geolora.initialize_lora_ga(lora_net(r=4), batches(), loss_of, gamma=0.0)
    with pytest.raises(SettingError, match="`batches` must be given"):
        geolora.initialize_lora_ga(lora_net(r=4))


def bad(**change: Any) -> Callable[[PeftModel], Any]:
    def call(model: PeftModel) -> Any:
        given: dict[str, Any] = {"batches": batches(), "loss_fn": loss_of, **change}
        return geolora.initialize_lora_one(model, **given)

    return call


@pytest.mark.parametrize(
    "call, error, words",
    [
        (bad(batches=[]), DataError, "`batches` must hold at least one"),
        (bad(batches=None), SettingError, "`batches` must be given"),
        (bad(batches=None, state={}), SettingError, "`batches` must be given, or a `norm`"),
        (bad(loss_fn=None), DataError, "must hold mappings"),
        (bad(loss_fn=None, batches=[{"x": batches()[0][0]}]), DataError, "scalar loss"),
        (bad(loss_fn=lambda model, batch: model(batch[0])), DataError, "scalar loss"),
        (bad(loss_fn=lambda m, b: loss_of(m, b) * torch.nan), GradientError, "is nan"),
        (
            bad(loss_fn=lambda m, b: loss_of(m, b).detach().requires_grad_()),
            GradientError,
            "on none",
        ),
        (bad(norm=0.0), SettingError, "`norm` must be above 0"),
        (bad(norm=float("nan")), SettingError, "`norm` must be above 0"),
        (bad(width=2), SettingError, "`width` must be the adapter's rank, 3"),
        (bad(budget=10), BudgetError, "`budget` must hold one direction"),
        (bad(passes=1), SettingError, "`passes` must be 2"),
        (bad(tolerance=1.0), SettingError, r"`tolerance` must be in \[0, 1\)"),
        (bad(state={}), StateError, "must be of this model"),
        (bad(adapter_name="other"), SettingError, "adapter_name"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    call: Callable[[PeftModel], Any], error: type[Exception], words: str
) -> None:
    model = lora_net(r=3)
    before = snapshot(model)
    with pytest.raises(error, match=words):
        call(model)
    assert same(before, snapshot(model))


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * torch.inf

    model = lora_net(r=3)
    with pytest.raises(GradientError, match="gradient of `first` is not finite"):
        geolora.initialize_lora_one(model, batches(), lambda m, b: Burst.apply(loss_of(m, b)))


def test_trained_inactive_and_merged_adapters_are_refused() -> None:
    frozen = lora_net(r=4).requires_grad_(False)
    before = snapshot(frozen)
    for initialize in (geolora.initialize_lora_one, geolora.initialize_lora_ga):
        with pytest.raises(PairingError, match="must be trainable"):
            initialize(frozen, batches(), loss_of)
    assert same(before, snapshot(frozen))
    model = lora_net(r=3)
    train(model, geolora.GeoLoRA(model), 1)
    with pytest.raises(SetupError, match="B of `first` is not zero"):
        geolora.initialize_lora_one(model, batches(), loss_of)
    model = lora_net(r=3)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    with pytest.raises(SetupError, match="adapter `other` must be active"):
        geolora.initialize_lora_one(model, batches(), loss_of, "other")
    model.merge_adapter()
    with pytest.raises(SetupError, match="not merged"):
        geolora.initialize_lora_one(model, batches(), loss_of)


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(lora_net(r=3))
        with pytest.raises(SetupError, match="Call it before wrapping"):
            geolora.initialize_lora_one(wrapped, batches(), loss_of)
    finally:
        torch.distributed.destroy_process_group()


def test_a_state_of_another_rank_is_refused() -> None:
    state = geolora.get_lora_one_state(lora_net(r=3), batches(), loss_of)
    with pytest.raises(StateError, match="of this model and rank"):
        geolora.initialize_lora_one(lora_net(r=4), state=state, norm=0.05)


TWO = """
import sys
import torch
sys.path[:0] = {path!r}
import geolora
import geolora.errors
from models import lora_net
from test_starts import batches, loss_of
torch.distributed.init_process_group("gloo", init_method="file://{file}", rank=int(sys.argv[1]), world_size=2)
torch.manual_seed(0)
given = batches(4)
mine = given[:1] if sys.argv[1] == "0" else given[1:]
model = lora_net(r=3)
state = geolora.get_lora_one_state(model, mine, loss_of)
start = geolora.initialize_lora_one(model, mine, loss_of, state=state)
torch.save((state, start.norm, start.loss_after), sys.argv[2])
model = lora_net(r=3)
try:  # one process has a batch that gives no loss: both end
    geolora.get_lora_one_state(model, [0] if sys.argv[1] == "0" else mine, loss_of)
except TypeError:
    assert sys.argv[1] == "0"
except geolora.errors.GradientError as error:
    assert "another process failed" in str(error)
else:
    raise SystemExit("no error")
"""


def test_two_processes_see_the_gradient_of_all_their_batches_and_fail_together(
    tmp_path: Path,
) -> None:
    here = str(Path(__file__).parents[1])
    code = TWO.format(path=[here, str(Path(__file__).parent)], file=tmp_path / "meet")
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(file)], env=env, stderr=subprocess.PIPE
        )
        for rank, file in enumerate(files)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors.decode()[-2000:]
    (left, *mine), (right, *theirs) = (torch.load(file) for file in files)
    assert mine == theirs, "norm, loss"
    torch.manual_seed(0)
    model = lora_net(r=3)
    alone = geolora.get_lora_one_state(model, batches(4), loss_of)
    start = geolora.initialize_lora_one(model, batches(4), loss_of, state=alone)
    assert mine == [start.norm, pytest.approx(start.loss_after)]
    for name in ("first", "second", "down"):
        assert (
            difference(of_state(left, name), of_state(alone, name)) < bound(torch.float32, 12) * 10
        )
    assert all(torch.equal(left[key], right[key]) for key in left)
