"""The step itself: tests T1 to T9 and T11 of a geometric integrator, on tensors.

L(W) = ½||W - W*||² unless said otherwise, so G = W - W*.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import nn

import reference
from geolora.kernels.augment import Span, combine, span_of, stack_spans
from geolora.kernels.tangent import project, to_dense
from geolora.methods.geolora import gains, kept, soft_sign, step, tangent_norms
from tolerances import bound, difference

D_OUT, D_IN, R = 14, 11, 4
SPECTRA = {
    "plain": [3.0, 2.0, 1.0, 0.5],
    "ill-conditioned": [1.0, 1e-4, 1e-8, 1e-14],
    "equal": [1.0, 1.0, 1.0, 1.0],
    "zero": [0.0, 0.0, 0.0, 0.0],
}
LRS = [0.1, 0.7, 1.0, 1.9]
LIMIT = 1e-12


class Point(NamedTuple):
    """W = U diag(sigma) V^T in r slots, sigma descending.

    U (n, d_out, r) and V (n, d_in, r): orthonormal columns, zero in idle slots.
    sigma (n, r): non-negative. A slot with sigma = 0 and a column of V only is a probe.
    """

    U: torch.Tensor
    sigma: torch.Tensor
    V: torch.Tensor


class Momentum(NamedTuple):
    """A tangent matrix M by its parts K = M V (n, d_out, r) and L = M^T U (n, d_in, r)."""

    K: torch.Tensor
    L: torch.Tensor


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def start(spectrum: list[float], *batch: int, seed: int = 0) -> Point:
    """A point with 2R slots, so that nothing is cut by the number of slots."""
    U = torch.zeros(*batch, D_OUT, 2 * R, dtype=torch.float64)
    V = torch.zeros(*batch, D_IN, 2 * R, dtype=torch.float64)
    U[..., :R] = torch.linalg.qr(normal(*batch, D_OUT, R, seed=seed))[0]
    V[..., :R] = torch.linalg.qr(normal(*batch, D_IN, R, seed=seed + 1))[0]
    sigma = torch.zeros(*batch, 2 * R, dtype=torch.float64)
    sigma[..., :R] = torch.tensor(spectrum, dtype=torch.float64)
    return Point(U, sigma, V)


def dense(point: Point) -> torch.Tensor:
    return (point.U * point.sigma.unsqueeze(-2)) @ point.V.mT


def tangent(G: torch.Tensor, point: Point) -> Momentum:
    return Momentum(*project(G, point.U, point.V))


def steps_of(
    points: Sequence[Point],
    moves: Sequence[Momentum],
    lr: torch.Tensor,
    cap: torch.Tensor,
    soften: float | None = None,
    width: int | None = None,
) -> list[tuple[Point, Momentum]]:
    """`step` for stacks of layers, the normalised one along the momentum itself."""
    w = points[0].sigma.shape[-1] if width is None else width
    sides = []
    for basis, part in (("U", "K"), ("V", "L")):
        pairs = [
            (getattr(point, basis)[..., :w], getattr(M, part)[..., :w])
            for point, M in zip(points, moves, strict=True)
        ]
        sides.append([(*pair, span_of(*pair, *pair[1:] * (soften is not None))) for pair in pairs])
    turn = step(
        stack_spans([span for side in sides for *_, span in side]),
        torch.cat([point.sigma[..., :w] for point in points]), lr, cap, soften,
    )  # fmt: skip
    count = [len(point.sigma) for point in points]
    idle = points[0].sigma.shape[-1] - w
    ends = []
    for *parts, on_left, sigma, on_right in zip(
        *sides, *(part.split(count) for part in turn), strict=True
    ):
        (U, K), (V, L) = (
            (nn.functional.pad(x, (0, idle)) for x in combine(span, X, Y, on).mT.split(w, -1))
            for (X, Y, span), on in zip(parts, (on_left, on_right), strict=True)
        )
        ends.append((Point(U, nn.functional.pad(sigma, (0, idle)), V), Momentum(K, L)))
    return ends


def one_step(
    point: Point, M: Momentum, lr: float, cap: int | None = None, soften: float | None = None
) -> tuple[Point, Momentum]:
    """`step` for a single layer; without a cap nothing is cut."""
    stacked = Point(*(part[None] for part in point)), Momentum(*(part[None] for part in M))
    rank = torch.tensor([point.sigma.shape[-1] if cap is None else cap])
    rate = torch.tensor([lr], dtype=torch.float64)
    [(new, carried)] = steps_of(stacked[:1], stacked[1:], rate, rank, soften)
    return Point(*(part[0] for part in new)), Momentum(*(part[0] for part in carried))


def pruned(point: Point, rank: int) -> Point:
    return Point(*(part * kept(point.sigma, torch.tensor(rank)) for part in point))


def advance(point: Point, G: torch.Tensor, lr: float, **kwargs: float) -> Point:
    return one_step(point, tangent(G, point), lr, **kwargs)[0]


cases = pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
steps = pytest.mark.parametrize("lr", LRS)


@cases
@steps
def test_t1_before_truncation_the_step_is_w_minus_lr_pg(spectrum: list[float], lr: float) -> None:
    point, G = start(spectrum), normal(D_OUT, D_IN, seed=5)
    PG = reference.projection(G, point.U, point.V)
    new = advance(point, G, lr)
    assert difference(dense(new), dense(point) - lr * PG) < LIMIT
    assert int((new.sigma > 0).sum()) <= 2 * R


@cases
@steps
def test_t2_loss_falls_by_the_exact_amount(spectrum: list[float], lr: float) -> None:
    point, target = start(spectrum), normal(D_OUT, D_IN, seed=6)
    W = dense(point)
    G = W - target
    PG = reference.projection(G, point.U, point.V)
    after = 0.5 * (dense(advance(point, G, lr)) - target).square().sum()
    expected = 0.5 * G.square().sum() - lr * (1 - lr / 2) * PG.square().sum()
    assert abs(after - expected) < LIMIT * G.square().sum()


@cases
def test_t3_descent_with_truncation_and_a_smooth_loss(spectrum: list[float]) -> None:
    """L(W+) <= L(W) - lr (1 - c lr / 2)||PG||² + ||grad L(W^)|| theta + c theta² / 2."""
    point, target = start(spectrum), normal(D_OUT, D_IN, seed=7)
    C = torch.diag(torch.linspace(0.2, 2.0, D_OUT, dtype=torch.float64))  # L = ½<W-W*, C(W-W*)>
    c = 2.0

    def loss(W: torch.Tensor) -> torch.Tensor:
        return 0.5 * ((W - target) * (C @ (W - target))).sum()

    for lr, rank in itertools.product((0.1, 0.5, 1.0), (1, 2, 4, 6)):
        G = C @ (dense(point) - target)
        PG = reference.projection(G, point.U, point.V)
        hat = advance(point, G, lr)
        new = pruned(hat, rank)
        theta = float(hat.sigma[rank:].norm())
        bounded = (
            loss(dense(point))
            - lr * (1 - c * lr / 2) * PG.square().sum()
            + (C @ (dense(hat) - target)).norm() * theta
            + c * theta**2 / 2
        )
        assert loss(dense(new)) <= bounded + LIMIT * abs(bounded)


@cases
def test_t4_t11_truncation_errs_by_the_tail_and_nothing_else(spectrum: list[float]) -> None:
    point, G = start(spectrum), normal(D_OUT, D_IN, seed=8)
    hat = advance(point, G, 0.3)
    for rank in range(1, 2 * R):
        new = pruned(hat, rank)
        assert (
            abs((dense(new) - dense(hat)).norm() - hat.sigma[rank:].norm())
            < LIMIT * dense(hat).norm()
        )


@cases
@steps
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_t5_bases_stay_orthonormal_and_sigma_sorted(
    spectrum: list[float], lr: float, dtype: torch.dtype
) -> None:
    point = Point(*(part.to(dtype) for part in start(spectrum)))
    target = normal(D_OUT, D_IN, seed=9).to(dtype)
    for _ in range(30):
        point = advance(point, dense(point) - target, lr)
        for basis in (point.U, point.V):
            active = torch.diag((point.sigma > 0).to(dtype))
            assert (basis.mT @ basis - active).abs().max() < bound(dtype, D_OUT)
        assert bool((point.sigma >= 0).all())
        assert torch.equal(point.sigma, point.sigma.sort(descending=True)[0])


def test_t6_the_error_does_not_grow_as_sigma_shrinks() -> None:
    G = normal(D_OUT, D_IN, seed=10)
    for small in (1.0, 1e-8, 1e-14, 1e-30, 0.0):
        point = start([1.0, small, small**2, 0.0])
        expected = dense(point) - 0.5 * reference.projection(G, point.U, point.V)
        assert difference(dense(advance(point, G, 0.5)), expected) < 1e-14


@cases
@pytest.mark.parametrize("soften", [None, 0.01])
def test_t7_the_step_does_not_depend_on_the_gauge(
    spectrum: list[float], soften: float | None
) -> None:
    """Turning U and V where the singular values are equal is another SVD of the same W."""
    point, G = start([1.0, 1.0, 1.0, 1.0] if soften else spectrum), normal(D_OUT, D_IN, seed=11)
    turn = torch.linalg.qr(normal(R, R, seed=12))[0]
    turned = Point(point.U.clone(), point.sigma, point.V.clone())
    if torch.allclose(point.sigma[:R], point.sigma[0]):
        turned.U[:, :R], turned.V[:, :R] = point.U[:, :R] @ turn, point.V[:, :R] @ turn
    else:  # distinct values: only signs and order of slots are free
        order = torch.tensor([2, 0, 3, 1])
        signs = torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)
        turned.U[:, :R] = point.U[:, order] * signs
        turned.V[:, :R] = point.V[:, order] * signs
        turned = Point(turned.U, torch.cat([point.sigma[order], point.sigma[R:]]), turned.V)
    assert difference(dense(turned), dense(point)) < LIMIT
    after, expected = (dense(advance(p, G, 0.5, soften=soften)) for p in (turned, point))
    assert difference(after, expected) < LIMIT * (1 if soften is None else 100)


def test_t8_at_sigma_zero_the_rank_doubles_at_once() -> None:
    point, G = start([0.0] * R), normal(D_OUT, D_IN, seed=13)
    new = advance(point, G, 0.5)
    assert difference(dense(new), -0.5 * reference.projection(G, point.U, point.V)) < LIMIT
    assert int((new.sigma > 0).sum()) == 2 * R
    assert all(bool(part.isfinite().all()) for part in new)


def test_t8_one_sided_where_only_v_is_known() -> None:
    point, G = start([0.0] * R), normal(D_OUT, D_IN, seed=13)
    point = Point(torch.zeros_like(point.U), point.sigma, point.V)
    new = advance(point, G, 0.5)
    assert difference(dense(new), -0.5 * G @ point.V @ point.V.mT) < LIMIT
    assert int((new.sigma > 0).sum()) == R


@cases
def test_t9_where_the_tangent_gradient_vanishes_nothing_moves(spectrum: list[float]) -> None:
    point = start(spectrum)
    G = normal(D_OUT, D_IN, seed=14)
    G = G - reference.projection(G, point.U, point.V)  # normal to the manifold, not zero
    assert difference(dense(advance(point, G, 1.0)), dense(point)) < LIMIT
    nothing = Momentum(torch.zeros_like(point.U), torch.zeros_like(point.V))
    exact, _ = one_step(point, nothing, 1.0)
    assert difference(dense(exact), dense(point)) < LIMIT


@pytest.mark.parametrize("soften", [None, 0.01])
def test_batch_equals_loop(soften: float | None) -> None:
    """Two stacks of different shapes at once, one layer of which is empty."""
    tall, wide = start(SPECTRA["plain"], 3), start(SPECTRA["plain"], 2, seed=4)
    wide = Point(wide.V, wide.sigma, wide.U)
    tall.sigma[1] = 0.0
    gradients = normal(3, D_OUT, D_IN, seed=15), normal(2, D_IN, D_OUT, seed=19)
    moves = [tangent(G, point) for G, point in zip(gradients, (tall, wide), strict=True)]
    lr, cap = normal(5, seed=16).abs(), torch.tensor([2, 8, 1, 3, 4])
    at = 0
    for G, point, (new, carried) in zip(
        gradients, (tall, wide), steps_of([tall, wide], moves, lr, cap, soften), strict=True
    ):
        for i in range(len(G)):
            one = Point(*(part[i] for part in point))
            parts = tangent(G[i], one)
            expected, _ = one_step(one, parts, float(lr[at]), int(cap[at]), soften)
            assert difference(dense(new)[i], dense(expected)) < LIMIT
            rank = int((new.sigma[i] > 0).sum())
            assert rank == int((expected.sigma > 0).sum()) <= int(cap[at])
            M = to_dense(*parts, one.U, one.V)
            wanted = reference.projection(M, new.U[i], new.V[i])
            there = to_dense(carried.K[i], carried.L[i], new.U[i], new.V[i])
            assert difference(there, wanted) < LIMIT, "the momentum is carried by projection"
            at += 1


@pytest.mark.parametrize("soften", [None, 0.01])
def test_idle_slots_can_be_left_out(soften: float | None) -> None:
    point = start(SPECTRA["plain"])
    M = tangent(normal(D_OUT, D_IN, seed=21), point)
    lr, cap = torch.tensor([0.3], dtype=torch.float64), torch.tensor([2 * R])
    wide, far = (type(x)(*(nn.functional.pad(part, (0, 9)) for part in x)) for x in (point, M))
    stacked = [type(x)(*(part[None] for part in x)) for x in (wide, far)]
    ends = [
        steps_of(stacked[:1], stacked[1:], lr, cap, soften, width)[0] for width in (None, 2 * R, R)
    ]
    for new, carried in ends:
        assert new.U.shape == stacked[0].U.shape
        assert carried.L.shape == stacked[1].L.shape
    (whole, moved), (narrow, also), (held, _) = ends
    assert difference(dense(narrow), dense(whole)) < LIMIT
    there, wanted = (to_dense(*m, p.U, p.V) for p, m in ((narrow, also), (whole, moved)))
    assert difference(there, wanted) < LIMIT
    assert int((whole.sigma > 0).sum()) == 2 * R, "it did grow"
    assert int((held.sigma > 0).sum()) == R, "no more than the width"
    assert difference(held.sigma[..., :R], whole.sigma[..., :R]) < LIMIT


def test_every_direction_moves_at_a_like_speed() -> None:
    M = normal(D_OUT, D_IN, seed=17)
    assert difference(soft_sign(M, 0.01), reference.soft_sign(M, 0.01)) < LIMIT
    values = torch.linalg.svdvals(M)
    moved = torch.linalg.svdvals(soft_sign(M, 0.01))
    assert difference(moved, values / (values + 0.01 * values[0])) < LIMIT
    assert torch.equal(soft_sign(0 * M, 0.01), 0 * M)
    point = start([0.0] * R)
    change = dense(advance(point, M, 0.25, soften=0.01))
    soft = reference.soft_sign(reference.projection(M, point.U, point.V), 0.01)
    assert difference(change, -0.25 * reference.projection(soft, point.U, point.V)) < LIMIT


def seen(point: Point, M: torch.Tensor) -> Span:
    pairs = zip((point.U, point.V), tangent(M, point), strict=True)
    return stack_spans([span_of(X[None], part[None]) for X, part in pairs])


def gains_at(point: Point, M: torch.Tensor) -> torch.Tensor:
    return gains(seen(point, M))[0]


def test_gains_are_those_of_the_two_parts_in_any_basis() -> None:
    point, M = start(SPECTRA["plain"]), normal(D_OUT, D_IN, seed=23)
    found = gains_at(point, M)
    wanted = torch.linalg.svdvals(M @ point.V) + torch.linalg.svdvals(M.mT @ point.U)
    assert difference(found, wanted) < LIMIT
    turn = torch.eye(2 * R, dtype=torch.float64)
    turn[:R, :R] = torch.linalg.qr(normal(R, R, seed=24))[0]
    turned = Point(point.U @ turn, point.sigma, point.V @ turn)
    assert difference(gains_at(turned, M), wanted) < LIMIT
    whole = to_dense(*tangent(M, point), point.U, point.V)
    assert difference(tangent_norms(seen(point, M))[0], torch.linalg.matrix_norm(whole)) < LIMIT


def test_an_empty_layer_keeps_its_probes() -> None:
    point = start([0.0] * R)
    point = Point(torch.zeros_like(point.U), point.sigma, point.V)
    zero = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    new = advance(point, zero, 1.0)
    assert difference(new.V, point.V) < bound(torch.float64, D_IN)
    assert not new.U.any()
    # and a layer whose weight cancels in one step falls back on its right vectors
    U, V = torch.zeros(D_OUT, 3).double(), torch.zeros(D_IN, 3).double()
    U[0, 0] = V[1, 0] = 1.0
    there = Point(U, torch.tensor([1.0, 0.0, 0.0]).double(), V)
    gone, _ = one_step(there, Momentum(U, V), 1.0)  # M = u v^T, so W - M = 0
    assert not gone.sigma.any()
    assert difference(gone.V, V) < bound(torch.float64, D_IN)
    assert not gone.U.any()


def test_rank_doubles_up_to_the_slots_on_a_full_rank_target() -> None:
    """From rank 1: 2^t after t steps, exact, where the loss weighs its entries unevenly.

    With the plain ½||W - W*||² the new directions are a Krylov sequence that adds less than it
    could (rank 1, 2, 3, 5, …): see docs/decisions.md.
    """
    target = normal(40, 40, seed=18)
    left, right = (torch.diag(torch.linspace(0.5, 1.5, 40, dtype=torch.float64)) for _ in "lr")
    U = torch.zeros(40, 32, dtype=torch.float64)
    V = torch.zeros(40, 32, dtype=torch.float64)
    U[:, 0], V[:, 0] = (torch.nn.functional.normalize(normal(40, seed=s), dim=0) for s in (1, 2))
    point = Point(U, torch.zeros(32, dtype=torch.float64), V)
    ranks = []
    for _ in range(7):
        G = left @ (dense(point) - target) @ right
        point = advance(point, G, 0.3)
        ranks.append(int((point.sigma > 0).sum()))
    assert ranks == [2, 4, 8, 16, 32, 32, 32]


def test_simultaneous_descent_stops_where_geolora_goes_on() -> None:
    """Fig. 1: descent on U, S and V at once stalls at S = 0, U^T G V = 0 although P(W)G is not 0."""
    target = torch.zeros(6, 6, dtype=torch.float64)
    target[1, 0] = target[0, 1] = 1.0
    U, V = torch.eye(6, 1, dtype=torch.float64), torch.eye(6, 1, dtype=torch.float64)
    S = torch.zeros(1, 1, dtype=torch.float64)
    for _ in range(200):  # the three gradients are G V S^T, U^T G V and G^T U S: all zero here
        G = U @ S @ V.mT - target
        U, S, V = U - 0.1 * G @ V @ S.mT, S - 0.1 * U.mT @ G @ V, V - 0.1 * G.mT @ U @ S
    stuck = U @ S @ V.mT
    G = stuck - target
    assert reference.projection(G, U, V).norm() > 1.0
    assert (stuck - target).norm() == pytest.approx(2**0.5)

    slots = torch.zeros(6, 2, dtype=torch.float64)
    slots[0, 0] = 1.0
    point = Point(slots, torch.zeros(2, dtype=torch.float64), slots.clone())
    for _ in range(200):
        point = advance(point, dense(point) - target, 0.5)
    end = to_dense(*project(dense(point) - target, point.U, point.V), point.U, point.V)
    assert end.norm() < 1e-12
    assert (dense(point) - target).norm() < 1e-12
