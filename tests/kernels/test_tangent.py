"""Tangent parts against the dense projection."""

import pytest
import torch

from geolora.kernels.tangent import (
    core_of,
    distance,
    norm,
    predicted_decrease,
    project,
    to_dense,
    transport,
)
from tolerances import bound, difference


def point(d_out: int = 12, d_in: int = 9, r: int = 3, *batch: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*batch, *shape, generator=generator, dtype=torch.float64)

    U, V = torch.linalg.qr(draw(d_out, r))[0], torch.linalg.qr(draw(d_in, r))[0]
    return U, V, draw(d_out, d_in), draw(d_out, d_in)


def dense(G: torch.Tensor, U: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
    return U @ U.mT @ G + G @ V @ V.mT - U @ U.mT @ G @ V @ V.mT


LIMIT = bound(torch.float64, 12)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_parts_are_the_projection(batch: tuple[int, ...]) -> None:
    U, V, G, _ = point(12, 9, 3, *batch)
    K, L = project(G, U, V)
    assert difference(to_dense(K, L, U, V), dense(G, U, V)) < LIMIT
    assert difference(norm(K, L, U) ** 2, (dense(G, U, V) ** 2).sum((-2, -1))) < LIMIT


def test_projection_is_idempotent_and_self_adjoint() -> None:
    U, V, G, H = point()
    once = dense(G, U, V)
    assert difference(to_dense(*project(once, U, V), U, V), once) < LIMIT
    assert (
        abs((dense(G, U, V) * H).sum() - (G * dense(H, U, V)).sum()) < LIMIT * G.norm() * H.norm()
    )


def test_idle_slots_and_probes() -> None:
    U, V, G, _ = point()
    U[:, 2] = 0  # slot 2 is a probe: seen from the right only
    expected = dense(G, U[:, :2], V)
    assert difference(to_dense(*project(G, U, V), U, V), expected) < LIMIT
    V[:, 2] = 0  # and now idle
    expected = dense(G, U[:, :2], V[:, :2])
    assert difference(to_dense(*project(G, U, V), U, V), expected) < LIMIT


@pytest.mark.parametrize("batch", [(), (4,)])
def test_transport_is_the_projection_at_the_new_point(batch: tuple[int, ...]) -> None:
    U, V, G, _ = point(12, 9, 3, *batch)
    U2, V2, _, _ = point(12, 9, 4, *batch, seed=7)
    M = dense(G, U, V)
    K, L = transport(*project(G, U, V), U, V, U2, V2)
    assert difference(to_dense(K, L, U2, V2), dense(M, U2, V2)) < LIMIT
    assert bool((norm(K, L, U2) <= norm(*project(G, U, V), U) * (1 + LIMIT)).all())
    back = transport(*project(G, U, V), U, V, U, V)
    assert difference(to_dense(*back, U, V), M) < LIMIT


def test_core_is_the_tangent_matrix_in_the_augmented_bases() -> None:
    U, V, G, _ = point()
    K, L = project(G, U, V)
    left, right = (
        torch.linalg.qr(torch.cat([U, K], -1))[0],
        torch.linalg.qr(torch.cat([V, L], -1))[0],
    )
    left[:, :3], right[:, :3] = U, V  # QR has them up to signs
    core = core_of(left.mT @ K, right.mT @ L)
    assert difference(left @ core @ right.mT, dense(G, U, V)) < LIMIT
    assert torch.equal(core[3:, 3:], torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("rank", ["full", "probes", "zero"])
def test_a_decrease_is_that_of_the_dense_projection_whatever_the_gauge(rank: str) -> None:
    """<P(W)G, W - W+> and ||W+ - W|| from factors alone, also where directions of A have no column of B."""
    generator = torch.Generator().manual_seed(0)
    A, new_A = torch.randn(2, 3, 4, 9, generator=generator, dtype=torch.float64)
    B, new_B = torch.randn(2, 3, 12, 4, generator=generator, dtype=torch.float64)
    G = torch.randn(3, 12, 9, generator=generator, dtype=torch.float64)
    B[..., {"full": 4, "probes": 2, "zero": 0}[rank] :] = 0.0
    scale = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    s = scale[:, None, None]
    V = torch.linalg.qr(A.mT)[0]
    U = torch.linalg.qr(B)[0] * (B != 0).any(-2, keepdim=True)
    change = s * (B @ A - new_B @ new_A)
    grads = s * B.mT @ G, s * G @ A.mT
    seen = predicted_decrease((A, B), (new_A, new_B), grads)
    assert difference(seen, (dense(G, U, V) * change).sum((-2, -1))) < 10 * LIMIT
    length = distance((A, B), (new_A, new_B), scale)
    assert difference(length, change.square().sum((-2, -1)).sqrt()) < LIMIT


def test_a_small_step_between_large_factors_has_its_length() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 30, generator=generator)
    B = torch.randn(40, 4, generator=generator)
    new_B = B + 1e-5 * torch.randn(40, 4, generator=generator)
    length = distance((A, B), (A, new_B), torch.tensor(1.0))
    exact = (new_B.double() - B.double()) @ A.double()
    assert float(length) == pytest.approx(float(exact.norm()), rel=1e-4)
