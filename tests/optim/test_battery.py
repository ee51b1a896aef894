"""Every optimizer of the table of methods, in one battery: a new row is enrolled by being there."""

import collections
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import geolora
import reference
from geolora.errors import (
    NonFiniteGradientError,
    SettingError,
    SetupError,
    SkippedStepWarning,
    StateError,
)
from geolora.methods import METHODS, OPTIMIZERS, TRAINABLE, method_of, resolve
from geolora.pairs.find import find_pairs
from geolora.training.recipes import Recipe
from models import Net, backward, lora_net, products, same, snapshot, train
from optimizers import CASES, OURS, TORCHS, Case, made
from tolerances import difference

Make = Callable[..., torch.optim.Optimizer]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(params=OURS)
def make(request: pytest.FixtureRequest) -> Make:
    return lambda model, **more: made(CASES[request.param], model, **more)


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_wired(name: str) -> None:
    row = METHODS[name]
    assert row.name == name
    assert row.kind in geolora.methods.KINDS
    for implementation in (row.mathematics, row.optimizer, row.start, row.recipe, row.start_recipe):
        if implementation:
            assert callable(resolve(implementation)), implementation
    assert (name in TRAINABLE) == bool(row.optimizer), "what is trained has something to train it"
    assert (row.kind != "start") or (row.start and row.refusal)
    if row.recipe:
        assert issubclass(resolve(row.recipe), Recipe)
        alike = [other.name for other in METHODS.values() if other.recipe == row.recipe]
        assert row.kind == "optimizer" or alike == [name], "trained as another method is"
    assert set(row.starts) <= set(geolora.methods.STARTS)
    for public in row.public:
        assert public in geolora.__all__
    if row.kind == "optimizer" and name not in TORCHS:
        assert row.mathematics, "its row must name the paper's function"
        assert row.public, "its row must name its public class"
        assert resolve(row.optimizer).method == name
        assert resolve(row.optimizer) is getattr(geolora, row.public[0])
        assert name in reference.STEPS, "its plain version stands in tests/reference.py"


def test_nothing_stands_in_for_an_unknown_method() -> None:
    for among in (TRAINABLE, OPTIMIZERS):
        with pytest.raises(
            geolora.errors.SettingError, match="`method` must be one of.*got lora-x"
        ):
            method_of("lora-x", among)


# ---- equal to the paper ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_it_equals_its_plain_reference_at_every_step(case: Case, scale: float) -> None:
    model = lora_net(r=3, scale=scale)
    optimizer = made(case, model)
    twin = copy.deepcopy(model)
    pairs = find_pairs(twin)
    factors = {id(p) for pair in pairs for p in (pair.A, pair.B)}
    others = [p for p in twin.parameters() if p.requires_grad and id(p) not in factors]
    rest = torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0)
    memory: list[dict[str, Any]] = [{} for _ in pairs]
    # of GeoLoRA the product is determined, and not how it is written
    compared = "" if case.name != "geolora" else "lora_"
    for t in range(1, 9):
        train(model, optimizer, 1)
        backward(twin)
        rest.step()
        plain = [
            reference.Pair(
                pair.name, pair.A.detach(), pair.B.detach(), pair.scale, pair.A.grad, pair.B.grad, known
            )
            for pair, known in zip(pairs, memory, strict=True)
        ]  # fmt: skip
        reference.STEPS[case.name](plain, t, case.settings["lr"], **case.plain)
        with torch.no_grad():
            for pair, stepped in zip(pairs, plain, strict=True):
                pair.A.copy_(stepped.A)
                pair.B.copy_(stepped.B)
        wanted = products(twin)
        for name, W in products(model).items():
            assert difference(W, wanted[name]) < case.tolerance, f"{name} after step {t}"
        for name, p in model.named_parameters():
            if not compared or compared not in name:
                gap = difference(p.detach(), twin.get_parameter(name).detach())
                assert gap < case.tolerance, f"{name} after step {t}"


def test_it_learns(case: Case) -> None:
    model = lora_net(r=3)
    losses = train(model, made(case, model, lr=case.learns_at), 100)
    assert losses[-1] < 0.8 * losses[0]


def test_an_average_of_factors_is_about_the_average_of_w(case: Case) -> None:
    """Slots hold about the same directions from step to step, through whole cycles of ranks."""
    model = lora_net(r=3)
    few = {"tail": 0.01} if case.name == "geolora" else {}  # of rank 3, a tenth of the gain is much
    optimizer = made(case, model, lr=case.learns_at, **few)
    train(model, optimizer, 30)
    averaged, each = torch.optim.swa_utils.AveragedModel(model), []
    for _ in range(20):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        each.append(products(model))
    for name, W in products(averaged.module).items():
        assert difference(W, torch.stack([now[name] for now in each]).mean(0)) < 0.03, name


# ---- at home in torch and PEFT -----------------------------------------------------------------


def through_bytes(value: object) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_goes_through_checkpoints_and_copies(case: Case) -> None:
    model = lora_net(r=3)
    optimizer = made(case, model)
    train(model, optimizer, 3)
    other, twin = pickle.loads(pickle.dumps((model, optimizer)))
    third = copy.deepcopy(model)
    loaded = made(case, third)
    loaded.load_state_dict(through_bytes(optimizer.state_dict()))
    fourth, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (other, twin), (third, loaded), (fourth, copied)):
        train(m, o, 3)
    for m in (other, third, fourth):
        assert same(snapshot(model), snapshot(m))


def test_what_it_trains_is_an_ordinary_adapter(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = lora_net(r=3)
    train(model, made(case, model), 6)
    settled = getattr(geolora, "prune")(model, tail=0.0)  # noqa: B009
    done = geolora.export(model, tmp_path)
    assert done.ranks == settled
    torch.manual_seed(3)
    errors = geolora.verify(tmp_path, Net().double())
    assert set(errors) == {"first", "second", "down"}


@pytest.mark.parametrize("theirs", OURS)
@pytest.mark.parametrize("ours", OURS)
def test_the_state_of_another_method_is_refused_and_changes_nothing(ours: str, theirs: str) -> None:
    if CASES[ours].name == CASES[theirs].name:
        return
    other = lora_net(r=3)
    foreign = made(CASES[theirs], other)
    train(other, foreign, 2)
    model = lora_net(r=3)
    optimizer = made(CASES[ours], model)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    for fresh in (optimizer, made(CASES[ours], lora_net(r=3))):
        with pytest.raises(StateError, match=f"must be of `{CASES[ours].name}`; got that of"):
            fresh.load_state_dict(foreign.state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, values in before["state"].items():
        for name, value in values.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][key][name]))
    twin = copy.deepcopy(model)
    again = made(CASES[ours], twin)
    again.load_state_dict(before)
    train(model, optimizer, 2)
    train(twin, again, 2)
    assert same(snapshot(model), snapshot(twin))


@pytest.mark.parametrize("key", [key for key in OURS if key != "lora-pro, full"])
def test_a_state_of_another_rank_is_refused(key: str) -> None:
    """The full moments of LoRA-Pro are of the size of W, whatever the rank."""
    other = lora_net(r=4)
    foreign = made(CASES[key], other)
    train(other, foreign, 2)
    with pytest.raises(StateError, match="Use the rank it was saved with"):
        made(CASES[key], lora_net(r=3)).load_state_dict(foreign.state_dict())


def test_parameters_that_were_swapped_are_followed(make: Make) -> None:
    """As accelerate's FSDP2 does: other Parameter objects in the same places."""
    model = lora_net(r=3)
    twin = copy.deepcopy(model)
    optimizer = make(model)
    for name, parameter in list(model.named_parameters()):
        parent, _, last = name.rpartition(".")
        setattr(
            model.get_submodule(parent),
            last,
            nn.Parameter(parameter.detach().clone(), parameter.requires_grad),
        )
    fresh = dict(zip(map(id, twin.parameters()), model.parameters(), strict=True))
    other = make(twin)
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        ours["params"] = [fresh[id(p)] for p in theirs["params"]]
    train(model, optimizer, 5)
    train(twin, other, 5)
    assert same(snapshot(model), snapshot(twin))


def test_factors_that_were_loaded_are_gone_on_from(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    before = {p.name: p.B.detach().clone() for p in find_pairs(model)}
    train(model, optimizer, 5)
    with torch.no_grad():
        for pair in find_pairs(model):
            pair.B.copy_(before[pair.name] * 3 if before[pair.name].any() else before[pair.name])
    loaded = products(model)
    train(model, optimizer, 1)
    for name, W in products(model).items():
        assert (W - loaded[name]).abs().max() < 0.1, "no jump back"
        assert not torch.equal(W, loaded[name])


# ---- what does not move ------------------------------------------------------------------------


def test_a_step_size_of_zero_changes_no_bit(case: Case) -> None:
    model = lora_net(r=3)
    optimizer = made(case, model, lr=0.0, rest_lr=0.0)
    before = snapshot(model)
    train(model, optimizer, 2)
    assert same(before, snapshot(model))


@pytest.mark.parametrize("key", OURS)
def test_a_pair_without_a_gradient_is_left_alone(key: str) -> None:
    model = lora_net(r=3)
    no_judgement = {"tail": None} if CASES[key].name == "geolora" else {}  # it is of all layers
    optimizer = made(CASES[key], model, **no_judgement)
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
    lead = optimizer.param_groups[0]["params"]
    state = optimizer.state[lead[0]]
    kept = other.state[other.param_groups[0]["params"][0]]
    for key, value in kept.items():
        if isinstance(value, Tensor) and value.dim() > 1:  # the row of the first pair
            assert difference(state[key][0], value[0]) < 1e-12, key


def test_gradients_that_are_not_finite_skip_the_step(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
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


def test_closures_are_refused(make: Make) -> None:
    with pytest.raises(SetupError, match="closures"):
        make(lora_net(r=3)).step(lambda: 0.0)


# ---- torch's contract --------------------------------------------------------------------------


def test_schedulers_at_their_defaults_cycle(make: Make) -> None:
    for scheduler, more in (
        (torch.optim.lr_scheduler.OneCycleLR, {"max_lr": 1e-2, "total_steps": 6}),
        (torch.optim.lr_scheduler.CyclicLR, {"base_lr": 1e-4, "max_lr": 1e-2, "step_size_up": 3}),
        (torch.optim.lr_scheduler.CosineAnnealingLR, {"T_max": 5}),
        (torch.optim.lr_scheduler.LinearLR, {}),
    ):
        model = lora_net(r=3)
        optimizer = make(model)
        schedule = scheduler(optimizer, **more)
        before = snapshot(model)
        for _ in range(4):
            backward(model)
            optimizer.step()
            schedule.step()
        assert not same(before, snapshot(model))


def test_hooks_around_a_step_and_a_state_are_called(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    said: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: said.append("before"))
    optimizer.register_step_post_hook(lambda *_: said.append("after"))
    train(model, optimizer, 1)
    assert said == ["before", "after"]
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["lr"] = 0.125

    def halved(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        said.append("loading")
        groups = [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halved)
    optimizer.register_load_state_dict_post_hook(lambda *_: said.append("loaded"))
    optimizer.load_state_dict(saved)
    assert said[2:] == ["loading", "loaded"]
    assert {group["lr"] for group in optimizer.param_groups} == {0.0625}


def test_a_step_size_that_is_none_is_refused_at_the_step(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    backward(model)
    before = snapshot(model)
    for wrong in (float("nan"), float("inf"), -1.0):
        optimizer.param_groups[-1]["lr"] = wrong
        with pytest.raises(SettingError, match="`lr` of a param group must be a number >= 0; got"):
            optimizer.step()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("value", ["1e-3", True, None, [1e-3], float("nan")])
def test_settings_of_another_type_are_one_line(make: Make, value: Any) -> None:
    for name in ("lr", "rest_lr"):
        if value is None and name == "lr":
            continue  # a default
        with pytest.raises(SettingError, match=f"`{name}` must be a number >= 0; got"):
            make(lora_net(r=3), **{name: value})


def test_a_state_goes_between_optimizers_with_and_without_a_scheduler(make: Make) -> None:
    for first, second in ((True, False), (False, True)):
        model = lora_net(r=3)
        optimizer = make(model)
        if first:
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=9)
        train(model, optimizer, 2)
        twin = copy.deepcopy(model)
        other = make(twin)
        if second:
            torch.optim.lr_scheduler.StepLR(other, 3)
        other.load_state_dict(through_bytes(optimizer.state_dict()))
        train(model, optimizer, 2)
        train(twin, other, 2)
        assert same(snapshot(model), snapshot(twin))
        assert set(make(twin)._expected().keys) <= set(other.param_groups[0])


def test_groups_and_state_that_were_replaced_are_followed(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    train(model, optimizer, 2)
    optimizer.state = collections.defaultdict(
        dict, {p: dict(values) for p, values in optimizer.state.items()}
    )
    optimizer.param_groups = [{**group, "lr": 0.0} for group in optimizer.param_groups]
    before = snapshot(model)
    train(model, optimizer, 1)
    assert same(before, snapshot(model)), "the new groups' lr"
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    twin = copy.deepcopy(model)
    other = make(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 2)
    train(twin, other, 2)
    assert same(snapshot(model), snapshot(twin)), "the new state is what is saved"


def test_a_state_with_nan_is_refused(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    train(model, optimizer, 2)
    saved = through_bytes(optimizer.state_dict())
    for values in saved["state"].values():
        for value in values.values():
            if isinstance(value, Tensor) and value.dim() > 1:
                value[0].fill_(torch.nan)
    with pytest.raises(StateError, match="must be finite; it holds NaN"):
        optimizer.load_state_dict(saved)


def test_finite_gradients_whose_sum_overflows_are_not_called_otherwise(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    backward(model)
    for pair in find_pairs(model):
        pair.A.grad.fill_(1e308)
        pair.B.grad.fill_(1e308)
    before = snapshot(model)
    with pytest.warns(SkippedStepWarning, match="skipped, gradients too large to add up in all"):
        optimizer.step()
    assert same(before, snapshot(model))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changes_the_base_is_warned_of_at_once(start: str) -> None:
    model = lora_net(r=3, dtype=torch.float32, init_lora_weights=start)
    with pytest.warns(geolora.errors.GeoloraWarning, match=f"start '{start}' changed the base"):
        geolora.RiemannianAdamW(model)


@pytest.mark.parametrize("key", OURS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_no_pair_learns_in_half_precision(key: str, dtype: torch.dtype) -> None:
    """In float16 AdamW's eps is zero; in bfloat16 a step of 1e-3 rounds to nothing."""
    model = lora_net(r=3)
    optimizer = made(CASES[key], model, rest_lr=1e-3)
    (head,) = [g for g in optimizer.param_groups if g["kind"] == "rest"]
    with torch.no_grad():
        for p in head["params"]:
            p.data = torch.full_like(p, 1.0, dtype=dtype)
    for step in range(50):
        for p in head["params"]:
            p.grad = torch.full_like(p, 1e-4 if step % 2 else 2e-4)
        optimizer.step()
    for p in head["params"]:
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert (p < 0.97).all(), "fifty steps of 1e-3"
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(through_bytes(optimizer.state_dict()))
    for ours, theirs in zip(head["params"], twin.param_groups[-1]["params"], strict=True):
        for o, p in ((optimizer, ours), (twin, theirs)):
            with torch.no_grad():
                p.copy_(torch.full_like(p, 2.0))  # somebody else
            p.grad = torch.full_like(p, 1e-4)
            o.step()
        assert torch.equal(ours, theirs)
        assert (ours > 1.9).all()


def reshaped(p: Tensor) -> None:
    p.data = p.data.mT.contiguous()


def longer(p: Tensor) -> None:
    p.data = torch.cat([p.data, p.data])


def narrower(p: Tensor) -> None:
    p.data = p.data.float()


@pytest.mark.parametrize(
    "change, side, when",
    [
        (reshaped, "A", "between steps"),
        (longer, "B", "between steps"),
        (narrower, "A", "between steps"),
        (longer, "A", "before the first step"),
        (reshaped, "B", "after backward"),
        (narrower, "B", "after backward"),
    ],
)
def test_a_factor_that_was_exchanged_is_named(
    make: Make, change: Callable[[Tensor], None], side: str, when: str
) -> None:
    """Another tensor under the same parameter, through `.data`: one line, and nothing moves."""
    model = lora_net(r=3)
    optimizer = make(model)
    if when != "before the first step":
        train(model, optimizer, 2)
    backward(model)
    kept = snapshot(model)
    p = getattr(find_pairs(model)[1], side)
    name = find_pairs(model)[1].name
    change(p)
    if when != "after backward":
        p.grad = torch.ones_like(p)
    with pytest.raises(
        StateError, match=rf"step: shape, dtype and device .* {side} of `{name}` (had|was|has)"
    ) as e:
        optimizer.step()
    assert str(e.value).isprintable()
    for other, value in snapshot(model).items():
        if model.get_parameter(other) is not p:
            assert torch.equal(value, kept[other])


def test_a_head_that_was_exchanged_is_refused(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    train(model, optimizer, 1)
    head = next(
        p for name, p in model.named_parameters() if "modules_to_save" in name and p.dim() == 2
    )
    reshaped(head)
    head.grad = torch.ones_like(head)
    with pytest.raises(
        StateError, match=r"a parameter outside the pairs had the shape \(3, 10\), now \(10, 3\)"
    ):
        optimizer.step()


def test_a_model_may_be_cast_as_a_whole_where_the_state_still_fits(make: Make) -> None:
    model = lora_net(r=3)
    optimizer = make(model)
    model.float()  # before the first step: as a model is moved to a GPU
    train(model, optimizer, 2, dtype=torch.float32)
    model.bfloat16()
    before = snapshot(model)
    train(model, optimizer, 2, dtype=torch.bfloat16)
    assert not same(before, snapshot(model))
    model.double()
    backward(model)
    with pytest.raises(StateError, match=r"has a state torch.float32 on cpu, and is torch.float64"):
        optimizer.step()
