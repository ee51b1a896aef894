"""The search for a step size: it finds the same from everywhere, and leaves everything as it was."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import geolora
from geolora.errors import DataError, GradientError, PairingError, SettingError
from geolora.optim.lora import adamw
from geolora.optim.lora_plus import lora_plus
from geolora.starts import find_lr as search
from models import D_IN, lora_net, snapshot

MAKERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "geolora": geolora.GeoLoRA,
    "geolora-momentum": partial(geolora.GeoLoRA, moments="momentum"),
    "lora": adamw,
    "lora-plus": lora_plus,
    "lora-muon": geolora.LoRAMuon,
    "lora-pro": geolora.LoRAPro,
    "rac-lora": partial(geolora.RACLoRA, steps_per_block=8),
    "riemannian": geolora.RiemannianAdamW,
}


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).double(), batch[1])


def batches(count: int = 20, rows: int = 24) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count * rows, D_IN, generator=generator)
    targets = inputs[:, :3].argmax(-1)  # something that can be learnt
    return list(zip(inputs.split(rows), targets.split(rows), strict=True))


def net(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    return lora_net(r=4, dtype=torch.float32, lora_dropout=dropout)


def everything(model: nn.Module) -> dict[str, Any]:
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"values": snapshot(model), "grads": grads, "random": states}


def unchanged(model: nn.Module, before: dict[str, Any]) -> bool:
    now = everything(model)
    assert all(torch.equal(value, now["values"][name]) for name, value in before["values"].items())
    assert all(grad is now["grads"][name] for name, grad in before["grads"].items())
    assert torch.equal(before["random"][0], now["random"][0])
    return before["random"][1:] == now["random"][1:]


@pytest.mark.parametrize("name", MAKERS)
def test_it_finds_the_same_from_everywhere(name: str) -> None:
    """From 1/30 of the default, from it, from 30 times it: within a factor of four."""
    default = MAKERS[name](net()).param_groups[0]["lr"]
    found = []
    for times in (1 / 30, 1.0, 30.0):
        given = search.find_lr(
            net(), batches(), optimizer=MAKERS[name], start=times * default, loss_fn=loss_of
        )
        assert given.curve[0].lr == pytest.approx(times * default)
        assert len(given.curve) == search.PROBES
        found.append(given.lr)
    assert max(found) < 4 * min(found), found


def test_without_a_start_it_begins_with_the_default() -> None:
    found = geolora.find_lr(net(), batches(), loss_fn=loss_of, probes=2)
    assert found.curve[0].lr == geolora.GeoLoRA(net()).param_groups[0]["lr"]


def test_steps_of_what_was_found_are_as_long_as_allowed_and_can_be_trusted() -> None:
    found = search.find_lr(net(), batches(40), loss_fn=loss_of, start=0.5, probes=40)
    last = found.curve[20:]
    assert all(probe.length < 2 * search.LENGTH for probe in last)
    assert sum(probe.trust for probe in last) / len(last) > search.TRUST / 2


@pytest.mark.parametrize("name", ["geolora", "lora"])
def test_a_probe_is_a_step_and_its_prediction_the_gradient_along_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a plain loop: the losses before and after each step; a short step falls as predicted."""
    model, given = net(), batches(6)
    plain = copy.deepcopy(model)
    lr = 1e-4
    monkeypatch.setattr(search, "_change", lambda probe: 0.0 * probe.lr)
    found = search.find_lr(
        model, given, optimizer=MAKERS[name], start=lr, loss_fn=loss_of, probes=6
    )
    optimizer = MAKERS[name](plain, lr=lr)
    heads = [p for n, p in plain.named_parameters() if p.requires_grad and "lora_" not in n]
    for probe, batch in zip(found.curve, given, strict=True):
        loss = loss_of(plain, batch)
        loss.backward()
        before = [p.detach().clone() for p in heads]
        optimizer.step()
        ahead = [p.detach().clone() for p in heads]
        with torch.no_grad():
            for p, value in zip(heads, before, strict=True):
                p.copy_(value)
            fall = loss.item() - loss_of(plain, batch).item()
            for p, value in zip(heads, ahead, strict=True):
                p.copy_(value)
        optimizer.zero_grad()
        assert probe.loss == pytest.approx(loss.item(), abs=1e-6)
        assert probe.actual == pytest.approx(fall, abs=1e-6)
        assert probe.predicted == pytest.approx(fall, rel=0.1), "to first order"


def test_everything_is_left_as_it_was(tmp_path: Path) -> None:
    model = net(dropout=0.2)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = everything(model)
    found = geolora.find_lr(model, batches(), loss_fn=loss_of)
    assert unchanged(model, before)
    assert found.plot(tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_search_leaves_everything_as_it_was(error: type[BaseException]) -> None:
    model, seen = net(), []

    def fails(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        if len(seen) == 8:
            raise error
        return loss_of(model, batch)

    before = everything(model)
    with pytest.raises(error):
        geolora.find_lr(model, batches(), loss_fn=fails)
    assert unchanged(model, before)


def test_steps_far_too_long_are_undone_and_the_search_goes_on() -> None:
    """From 1e4 times the default, also where the loss after a step is not finite."""
    found = geolora.find_lr(net(), batches(), loss_fn=loss_of, start=70.0)
    assert found.curve[0].trust < 0 or found.curve[0].length > search.LENGTH
    assert math.isfinite(found.lr)
    assert found.lr < 1.0


@pytest.mark.parametrize("name", ["geolora", "lora"])
def test_a_gradient_that_is_not_finite_moves_nothing_and_does_no_harm(name: str) -> None:
    """One probe whose loss is finite and whose gradient is not; then all of them."""
    seen: list[int] = []

    def sometimes(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        loss = loss_of(model, batch)
        if len(seen) == 3:
            loss = (
                loss + 0 * (loss - loss.detach()).clamp(min=0).sqrt()
            )  # its slope at 0 is infinite
        return loss

    found = geolora.find_lr(net(), batches(), optimizer=MAKERS[name], loss_fn=sometimes)
    usual = geolora.find_lr(net(), batches(), optimizer=MAKERS[name], loss_fn=loss_of)
    assert found.curve[1].trust == -math.inf
    assert usual.lr / 2 < found.lr < 2 * usual.lr

    def always(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_of(model, batch)
        return loss + 0 * (loss - loss.detach()).clamp(min=0).sqrt()

    with pytest.raises(GradientError, match="the loss must fall by some step; it did by none"):
        geolora.find_lr(net(), batches(), optimizer=MAKERS[name], loss_fn=always)


def test_two_halves_of_a_batch_are_the_batch() -> None:
    whole = geolora.find_lr(net(), batches(6, 24), loss_fn=loss_of, probes=6)
    halves = geolora.find_lr(net(), batches(12, 12), loss_fn=loss_of, probes=6, accumulate=2)
    for one, other in zip(whole.curve, halves.curve, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
    assert halves.lr == pytest.approx(whole.lr, rel=1e-3)


def test_few_batches_are_gone_over_again_and_an_iterator_ends_the_search() -> None:
    few = batches(3)
    assert len(geolora.find_lr(net(), few, loss_fn=loss_of, probes=7).curve) == 7

    def once() -> Iterator[Any]:
        yield from few

    assert len(geolora.find_lr(net(), once(), loss_fn=loss_of, probes=7).curve) == 3


def test_what_belongs_to_no_pair_keeps_its_step_and_its_fall_is_not_counted() -> None:
    """With pairs whose gradient is nothing but noise beside a head that learns, the head does not count."""
    model = net()
    made = []

    def optimizer(model: nn.Module, **lr: float) -> torch.optim.Optimizer:
        made.append(geolora.GeoLoRA(model, rest_lr=0.1, **lr))
        return made[-1]

    found = geolora.find_lr(model, batches(), optimizer=optimizer, loss_fn=loss_of)
    assert made[0].param_groups[-1]["lr"] == 0.1
    assert max(probe.trust for probe in found.curve) < 2, "the head's fall would come on top"


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"probes": 0}, SettingError, "`probes` must be a whole number from 1 on; got 0"),
        ({"accumulate": 1.5}, SettingError, "`accumulate` must be a whole number"),
        ({"start": 0.0}, SettingError, "`start` must be None or a number > 0; got 0.0"),
        ({"start": math.inf}, SettingError, "`start` must be"),
        ({"batches": []}, DataError, "`batches` must hold 1 or more; got 0"),
        ({"batches": [1]}, DataError, "mappings"),
        ({"loss_fn": lambda m, b: loss_of(m, b) * math.nan}, GradientError, "is nan"),
        (
            {"optimizer": lambda model, lr=0.0: adamw(model, lr)},
            SettingError,
            "with an lr above 0; got 0.0",
        ),
    ],
)
def test_what_cannot_work_is_said_in_one_line(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    model = net()
    given = {"batches": batches(), "loss_fn": loss_of, **settings}
    if given["batches"] == [1]:
        given["loss_fn"] = None
    before = everything(model)
    with pytest.raises(error, match=text):
        geolora.find_lr(model, given.pop("batches"), **given)
    assert unchanged(model, before)


def test_layers_that_are_no_pairs_are_refused() -> None:
    config = LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    with pytest.raises(PairingError, match="DoRA"):
        geolora.find_lr(model, batches(), optimizer=adamw, loss_fn=loss_of)
