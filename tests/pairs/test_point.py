"""Pairs read and written: any gauge in, balanced out, gradients turned into K and L."""

import pytest
import torch

from geolora.pairs.point import balanced_gauge, read_pair, slot_lengths, slot_ranks, to_pair
from tolerances import bound, difference

D_OUT, D_IN, R = 9, 13, 5
LIMIT = bound(torch.float64, D_IN)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kinds() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    A, B = normal(R, D_IN), normal(D_OUT, R, seed=1)
    some = torch.tensor([1.0, 0, 1, 0, 1]).double()
    mixed = B * torch.tensor([1.0, 1, 0, 0, 0]).double()
    dependent = A.clone()
    dependent[3] = A[0] + A[1]
    return {
        "general": (A, B),
        "stock": (A, 0 * B),
        "idle slots": (A * some[:, None], B * some),
        "active and probes": (A, mixed),
        "active, probes, idle": (A * torch.tensor([1.0, 1, 1, 0, 0]).double()[:, None], mixed),
        "dependent rows": (dependent, mixed),
        "from the left": (0 * A, B),
        "zero": (0 * A, 0 * B),
        "cancelling": (
            torch.cat([A[:1], A[:1], A[2:]]),
            torch.cat([B[:, :1], -B[:, :1], 0 * B[:, 2:]], 1),
        ),
    }


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("kind", kinds())
def test_any_pair_is_read(kind: str, scale: float) -> None:
    A, B = kinds()[kind]
    reading = read_pair(A, B, scale)
    W, G = scale * B @ A, normal(D_OUT, D_IN, seed=2)
    product = (reading.U * reading.sigma) @ reading.V.mT
    assert (product - W).norm() <= LIMIT * scale * B.norm() * A.norm()
    assert torch.equal(reading.sigma, reading.sigma.sort(descending=True)[0])
    for basis in (reading.U, reading.V):
        used = torch.diag((basis != 0).any(0).double())
        assert (basis.mT @ basis - used).abs().max() < LIMIT
    # what autograd would deliver turns into K = G V and L = G^T U
    K, L = (scale * G @ A.mT) @ reading.right, (scale * B.mT @ G).mT @ reading.left
    assert difference(K, G @ reading.V) < 100 * LIMIT
    assert difference(L, G.mT @ reading.U) < 100 * LIMIT
    # every direction the gradient shows is kept: range(A^T) from the right
    if kind != "from the left":
        V = reading.V
        assert difference(V @ (V.mT @ A.mT), A.mT) < LIMIT


def test_from_the_left_keeps_the_left_range() -> None:
    A, B = kinds()["from the left"]
    U = read_pair(A, B, 1.0).U
    assert difference(U @ (U.mT @ B), B) < LIMIT


def test_start_rank_uses_the_first_rows() -> None:
    A, B = kinds()["stock"]
    V = read_pair(A, B, 1.0, start_rank=2).V
    Q = torch.linalg.qr(A[:2].mT)[0]
    assert difference(V @ V.mT, Q @ Q.mT) < LIMIT
    A, B = kinds()["general"]
    assert int((read_pair(A, B, 1.0, start_rank=2).sigma > 0).sum()) == R, "weights are not dropped"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("turned", [False, True])
def test_balanced_pairs_and_their_maps(dtype: torch.dtype, scale: float, turned: bool) -> None:
    U, V = torch.linalg.qr(normal(D_OUT, R))[0], torch.linalg.qr(normal(D_IN, R))[0]
    sigma = torch.tensor([7.0, 2.0, 1e-3, 0.0, 0.0]).double()
    U[:, 3:], V[:, 4:] = 0, 0  # slot 3 is a probe, slot 4 idle
    s, settled = torch.tensor(scale).double(), torch.tensor(2)
    turn = torch.eye(R).double()
    if turned:  # among the judged slots
        turn[:2, :2] = torch.linalg.qr(normal(2, 2, seed=4))[0]
    gauge = balanced_gauge(turn, s, *slot_lengths(sigma, s, settled))
    A, B = gauge.in_A.mT @ V.mT, U @ gauge.in_B
    if not turned:
        assert all(map(torch.equal, (A, B), to_pair(U, sigma, V, s, settled)))
    assert difference(scale * B @ A, (U * sigma) @ V.mT) < LIMIT
    assert A[3].norm() == pytest.approx(1.0)
    assert not A[4].any()
    assert not B[:, 3:].any()
    ratio = A.norm(dim=1)[:3] / B.norm(dim=0)[:3]
    assert ratio.tolist() == pytest.approx([1.0, 1.0, 4.0])
    G = normal(D_OUT, D_IN, seed=3)
    rounded_A, rounded_B = A.to(dtype).double(), B.to(dtype).double()
    K, L = (scale * G @ rounded_A.mT) @ gauge.right, (scale * rounded_B.mT @ G).mT @ gauge.left
    limit = bound(dtype, D_IN)
    assert difference(K, G @ V) < limit
    assert difference(L, G.mT @ U) < limit
    assert slot_ranks(A.to(dtype), B.to(dtype)) == (3, 1), "the mark survives rounding"


def test_other_adapters_have_no_trials() -> None:
    A, B = kinds()["general"]
    assert slot_ranks(A, B) == (R, 0)
    assert slot_ranks(*kinds()["stock"]) == (0, 0)
    assert slot_ranks(4 * A / A.norm(dim=1, keepdim=True), B / B.norm(dim=0)) == (R, 0)
    one = A[:1] / A[0].norm() * 4, B[:, :1] / B[:, 0].norm()
    assert slot_ranks(*one) == (1, 0), "a pair of ours always has a judged slot"
