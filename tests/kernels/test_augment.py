"""Augmentation: orthonormal, exact, rank-revealing, the same batched and looped."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geolora.kernels.augment import combine, orthonormal, polish, span_of
from tolerances import bound, difference

DTYPES = [torch.float32, torch.float64]


def basis(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=dtype))[0]


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def augmented(U: torch.Tensor, K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The new columns of the augmented basis, and [U | new]^T K."""
    seen = span_of(U, K)
    T = orthonormal(seen.gram, U.shape[-1])
    return combine(seen, U.double(), K.double(), T).mT[..., U.shape[-1] :], T.mT @ seen.inside


def check(
    U: torch.Tensor, K: torch.Tensor, dtype: torch.dtype, defect: float = 0.0
) -> torch.Tensor:
    """Every promise of the docstrings; returns how many columns are new, per batch member."""
    Q, R = augmented(U, K)
    limit = bound(dtype, U.shape[-2])
    gram = Q.mT @ Q
    unit = torch.linalg.vector_norm(Q, dim=-2) > 0.5
    assert torch.equal(Q == 0, (Q == 0) | ~unit.unsqueeze(-2).expand_as(Q)), "zero or unit columns"
    assert (gram - torch.diag_embed(unit.to(gram.dtype))).abs().max() < max(limit, defect)
    assert torch.linalg.vector_norm(U.to(Q.dtype).mT @ Q) < limit
    whole = torch.cat([U.to(Q.dtype), Q], dim=-1)
    size = torch.linalg.vector_norm(K.to(Q.dtype), dim=-2).clamp(min=torch.finfo(Q.dtype).tiny)
    columns = torch.linalg.vector_norm(whole @ R - K.to(Q.dtype), dim=-2) / size
    assert columns.max() < limit, "every direction is spanned, relative to its own length"
    return unit.sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "d, r, k", [(40, 3, 3), (40, 1, 1), (16, 8, 8), (9, 4, 7), (5, 5, 5), (3, 1, 6)]
)
def test_general_directions(dtype: torch.dtype, d: int, r: int, k: int) -> None:
    new = check(basis(d, r, dtype=dtype), normal(d, k, dtype=dtype), dtype)
    assert int(new) == min(k, d - r)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_very_different_length(dtype: torch.dtype) -> None:
    K = normal(30, 4, dtype=dtype) * torch.tensor([1.0, 1e-6, 1e6, 1e-12], dtype=dtype)
    assert int(check(basis(30, 4, dtype=dtype), K, dtype)) == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_dependent_and_zero_directions_add_nothing(dtype: torch.dtype) -> None:
    U = basis(30, 4, dtype=dtype)
    a, b = normal(30, 2, dtype=dtype).unbind(-1)
    inside = U @ normal(4, dtype=dtype)
    K = torch.stack([a, a, 0 * a, b, a - 2 * b, inside], dim=-1)
    assert int(check(U, K, dtype)) == 2
    assert int(check(U, torch.zeros_like(K), dtype)) == 0
    assert int(check(U, U @ normal(4, 3, dtype=dtype), dtype)) == 0


@pytest.mark.parametrize(
    "dtype, kept, dropped", [(DTYPES[0], 1e-5, 1e-8), (DTYPES[1], 1e-12, 1e-18)]
)
def test_a_direction_barely_outside_is_kept_and_orthogonal(
    dtype: torch.dtype, kept: float, dropped: float
) -> None:
    U = basis(30, 4)
    outside, along = basis(30, 5)[:, 4:], U @ normal(4, 1)
    for size, count in ((kept, 1), (dropped, 0)):
        assert int(check(U.to(dtype), (along + size * outside).to(dtype), dtype)) == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_nearly_repeat_each_other(dtype: torch.dtype) -> None:
    """Orthonormal as said: for float32 the error is 20 eps(float64) over the part squared."""
    U, a, b = basis(30, 4, dtype=dtype), normal(30, 1, seed=2), normal(30, 1, seed=3)
    for power in range(1, 7 if dtype == torch.float32 else 15):
        K = torch.cat([a, a + 10.0**-power * b, 1e3 * a], dim=-1).to(dtype)
        unit = torch.nn.functional.normalize(K.double(), dim=0)
        part = torch.linalg.svdvals(unit - U.double() @ (U.double().mT @ unit))[1]
        defect = 20 * torch.finfo(torch.float64).eps / part**2 if dtype == torch.float32 else 0.0
        new = int(check(U, K, dtype, float(defect)))
        assert new == 2 or power > (5 if dtype == torch.float32 else 13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_columns_of_the_basis_are_idle_slots(dtype: torch.dtype) -> None:
    U = basis(20, 6, dtype=dtype) * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=dtype)
    K = normal(20, 6, dtype=dtype) * torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=dtype)
    assert int(check(U, K, dtype)) == 3


def test_batch_equals_loop() -> None:
    U = torch.stack([basis(20, 3, seed=i) for i in range(6)]).view(2, 3, 20, 3)
    K = torch.stack([normal(20, 4, seed=i) for i in range(6)]).view(2, 3, 20, 4)
    K[0, 1, :, 2] = K[0, 1, :, 0]  # one member is deficient, the others must not notice
    Q, R = augmented(U, K)
    for i in range(2):
        for j in range(3):
            q, r = augmented(U[i, j], K[i, j])
            assert difference(Q[i, j] @ R[i, j, 3:], q @ r[3:]) < bound(torch.float64, 20)
            assert int((Q[i, j] != 0).any(-2).sum()) == int((q != 0).any(-2).sum())


def test_bf16_directions_are_taken_as_they_are() -> None:
    U, K = basis(64, 4).float(), normal(64, 4).bfloat16()
    assert int(check(U, K, torch.float32)) == 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`directions`.*\(20, 3\).*\(19, 3\)"):
        span_of(torch.zeros(20, 3), torch.zeros(19, 3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 12),
    r=st.integers(0, 6),  # an empty basis is allowed
    k=st.integers(1, 8),
    rank=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_any_shape_and_rank(d: int, r: int, k: int, rank: int, seed: int) -> None:
    r = min(r, d)
    U = basis(d, max(r, 1), seed=seed)[:, :r]
    K = normal(d, rank, seed=seed + 1) @ normal(rank, k, seed=seed + 2)
    check(U, K, torch.float64)


def test_polish_takes_rounding_away() -> None:
    U = basis(40, 5)
    U[:, 3:] = 0
    rough = U + 1e-3 * normal(40, 5) * (U != 0)
    polished = rough @ polish(rough.mT @ rough)
    gram = polished.mT @ polished
    assert (gram - torch.diag(torch.tensor([1.0, 1, 1, 0, 0]))).abs().max() < 1e-8
    assert torch.equal(polished[:, 3:], U[:, 3:])
