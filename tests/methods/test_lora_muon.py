"""LoRA-Muon's step: its length, its invariances, and where a factor is zero."""

import copy

import pytest
import torch
from torch import Tensor

import geolora
from geolora.errors import SettingError
from geolora.methods.lora_muon import directions, sign, step
from models import lora_net, products, train
from tolerances import difference

D_OUT, D_IN, R = 9, 14, 4


def pair() -> tuple[Tensor, Tensor, Tensor]:
    A, B = torch.randn(3, R, D_IN).double(), torch.randn(3, D_OUT, R).double()
    return A, B, torch.randn(3, D_OUT, D_IN).double()


def test_each_factor_moves_w_by_one_in_the_spectral_norm() -> None:
    A, B, G = pair()
    D_A, D_B = directions(A, B, B.mT @ G, G @ A.mT)
    for change in (D_B @ A, B @ D_A):
        values = torch.linalg.svdvals(change)[..., :R]
        assert difference(values, torch.ones_like(values)) < 1e-10, "all singular values are 1"
    assert ((D_B @ A + B @ D_A) * G).sum((-2, -1)).min() > 0, "against the gradient is downhill"


def test_the_step_of_w_depends_on_neither_gauge_nor_the_scale_of_the_loss() -> None:
    A, B, G = pair()
    turn = torch.randn(3, R, R).double()
    D_A, D_B = directions(A, B, B.mT @ G, G @ A.mT)
    other_A, other_B = turn @ A, B @ torch.linalg.inv(turn)
    E_A, E_B = directions(other_A, other_B, 7 * other_B.mT @ G, 7 * G @ other_A.mT)
    assert difference(E_B @ other_A, D_B @ A) < 1e-8
    assert difference(other_B @ E_A, B @ D_A) < 1e-8


def test_where_b_is_zero_only_b_moves_and_where_a_gradient_is_zero_nothing() -> None:
    A, B, G = pair()
    D_A, D_B = directions(A, 0 * B, 0 * A, G @ A.mT)
    assert not D_A.any()
    assert difference(torch.linalg.matrix_norm(D_B @ A, 2), torch.ones(3).double()) < 1e-10
    D_A, D_B = directions(A, B, 0 * A, 0 * B)
    assert not D_A.any()
    assert not D_B.any()
    flat = torch.diag(torch.tensor([3.0, 0.0])).double()
    assert torch.equal(sign(flat), torch.diag(torch.tensor([1.0, 0.0])).double())


def test_decay_shrinks_w_by_lr_times_decay() -> None:
    A, B, _ = pair()
    new_A, new_B = step(A, B, 0 * A, 0 * B, torch.full((3,), 0.5), 0.1)
    assert difference(new_B @ new_A, 0.95 * B @ A) < 1e-12


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_lr_is_the_size_of_a_step_of_w_whatever_the_scale(scale: float) -> None:
    model = lora_net(r=3, scale=scale)
    train(model, geolora.LoRAMuon(model, lr=1e-2, decay=0.0), 1)
    for name, W in products(model).items():  # B = 0: half of it, by B alone
        assert float(torch.linalg.matrix_norm(W, 2)) == pytest.approx(5e-3, rel=1e-6), name


def test_bad_settings() -> None:
    model = lora_net(r=3, scale=0.5)
    for settings, words in (
        ({"momentum": 1.0}, "`momentum` must be in"),
        ({"decay": -1.0}, "`decay` must be a number >= 0"),
        ({"lr": 1.0, "decay": 0.5}, "`decay` must be below LoRA's scale / lr, 0.5 / 1.0; got 0.5"),
        ({"lr": -1.0}, "`lr` must be a number >= 0"),
    ):
        with pytest.raises(SettingError, match=words):
            geolora.LoRAMuon(copy.deepcopy(model), **settings)
