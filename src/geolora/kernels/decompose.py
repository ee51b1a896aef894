"""Batched symmetric problems: a cheap factorisation where it is accurate enough, else an eigendecomposition.

On the CPU a batch of eigenvalue problems is solved one by one, and a product of small matrices is a
hundredth of the price: triangular factors or a few products are tried first, and only layers where they fail
are decomposed. On other devices, where asking which layers those are would halt the
queue, all are decomposed.
"""

import warnings

import torch
from torch import Tensor


def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (*batch, n), ascending, and eigenvectors (*batch, n, n) of positive semidefinite matrices.

    A matrix whose iteration does not converge is decomposed by its singular values instead, with one
    `RuntimeWarning`.

    Args:
        matrices: (*batch, n, n), symmetric positive semidefinite up to rounding, finite.
    """
    try:
        return torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        each = [_one(matrix) for matrix in matrices.reshape(-1, *matrices.shape[-2:])]
        warnings.warn(
            f"geolora: an eigenvalue problem of the step did not converge ({error}); solved by "
            "singular values. Training goes on.",
            RuntimeWarning,
            stacklevel=2,
        )
        values, vectors = (torch.stack(field) for field in zip(*each, strict=True))
        return values.view(matrices.shape[:-1]), vectors.view(matrices.shape)


def inverse_root(gram: Tensor, tolerance: float) -> Tensor:
    """T (N, n, n) such that T^T gram T is the identity on what the columns span, and zero elsewhere.

    Args:
        gram: (N, n, n), float64, unit or zero diagonal, positive semidefinite up to rounding.
        tolerance: eigenvalues up to this, times the largest where that is above 1, span nothing.

    Precision:
        Triangular factors are taken where every pivot exceeds 1e-3, so the defect is below 1e-9.
    """
    if gram.device.type != "cpu":
        return _spectral_root(gram, tolerance)
    nonzero = gram.diagonal(dim1=-2, dim2=-1) > 0
    factor, failed = torch.linalg.cholesky_ex(gram + (~nonzero).double().diag_embed())
    factor = factor.mT.contiguous()
    poor = (failed != 0) | ~(factor.diagonal(dim1=-2, dim2=-1).amin(-1) > 1e-3)
    one = torch.eye(gram.shape[-1], dtype=gram.dtype).expand_as(gram)
    root = torch.linalg.solve_triangular(factor, one, upper=True) * nonzero.unsqueeze(-2)
    if bool(poor.any()):
        root[poor] = _spectral_root(gram[poor], tolerance)
    return root


def _spectral_root(gram: Tensor, tolerance: float) -> Tensor:
    values, W = eigh(gram)
    keep = values > tolerance * values[..., -1:].clamp(min=1.0)
    return W * torch.where(keep, values.rsqrt(), 0.0).unsqueeze(-2)


def polar(matrices: Tensor) -> Tensor:
    """The orthogonal matrices (N, n, n) nearest to given ones: P R^T of P diag(t) R^T.

    Args:
        matrices: (N, n, n), float64. What a singular one sends to zero is turned anyhow, the same on every process.

    Precision:
        Orthogonal to 1e-14. On the CPU eigenvalues of M^T M are taken where t is above 1e-5 of the largest, and
        what they leave of 1e-6 is polished away.
    """
    if matrices.device.type != "cpu":
        return _polar_by_svd(matrices)
    size = matrices.abs().amax((-2, -1), keepdim=True)
    matrices = matrices / torch.where(size > 0, size, 1.0)
    squares, W = eigh(matrices.mT @ matrices)
    Q = matrices @ (W * squares.clamp(min=1e-300).rsqrt().unsqueeze(-2)) @ W.mT
    for _ in range(2):
        Q = 1.5 * Q - 0.5 * Q @ (Q.mT @ Q)
    poor = ~(squares[..., 0] > 1e-10 * squares[..., -1])
    if bool(poor.any()):
        Q[poor] = _polar_by_svd(matrices[poor])
    return Q


def _polar_by_svd(matrices: Tensor) -> Tensor:
    P, _, Rt = torch.linalg.svd(matrices)
    return P @ Rt


def leading_eigenvectors(gram: Tensor, count: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues (N, k), descending, and their vectors (N, n, k).

    Only the first count[...] are guaranteed; the others may be zero. Where gram is nearly diagonal, large
    entries first, as after a small step, three subspace iterations from the first unit vectors find
    the space; they are taken for a layer where the last one turned it by less than 1e-5.

    Args:
        gram: (N, n, n), float64, positive semidefinite up to rounding.
        count: (N,) integers, how many of the k are wanted.
    """
    if gram.device.type != "cpu":
        return _last_of(*eigh(gram), k)
    wanted = torch.arange(k) < count.unsqueeze(-1)
    idle = (~wanted).double().diag_embed()
    before = Q = gram[..., :k] * wanted.unsqueeze(-2)
    failures = []
    for number in range(ITERATIONS):
        if number:
            before, Q = Q, gram @ Q
        factor, failed = torch.linalg.cholesky_ex(torch.baddbmm(idle, Q.mT, Q))
        Q = torch.linalg.solve_triangular(factor, Q.mT, upper=False).mT
        failures.append(failed)
    turned = wanted.sum(-1) - (before.mT @ Q).square().sum((-2, -1))
    poor = (sum(failures) != 0) | ~(turned < TURNED)
    Q = torch.where(poor[:, None, None], 0.0, Q)
    values, W = eigh(Q.mT @ gram @ Q)
    values, Q = values.flip(-1), Q @ W.flip(-1)
    if bool(poor.any()):
        values[poor], Q[poor] = _last_of(*eigh(gram[poor]), k)
    return values, Q


ITERATIONS, TURNED = 3, 1e-10
"""Subspace iterations, and how far the last one may turn the space (sine squared) where it is taken."""


def _last_of(values: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return values[..., -k:].flip(-1), vectors[..., -k:].flip(-1)


def _one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        U, values, _ = torch.linalg.svd(matrix)
        return values.flip(-1), U.flip(-1)
