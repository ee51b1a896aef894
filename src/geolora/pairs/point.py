"""A LoRA pair as a point: a low-rank matrix U diag(sigma) V^T in slots, read from a pair and written as one.

W = scale * B @ A, A (r, d_in), B (d_out, r), is kept as U, sigma and V. Written balanced,

    B = U sqrt(sigma / scale),    A = sqrt(sigma / scale) V^T,

a column of grad_B is sqrt(scale * sigma_i) G v_i and a row of grad_A is sqrt(scale * sigma_i) u_i^T G:
one division by a number per slot gives K = G V and L = G^T U, and no S^-1 appears.

A slot is one of
    active    both sides non-zero;
    trial     active and not yet judged: A's row is doubled and B's column halved, which leaves W as it is
              and marks the slot in the pair itself, wherever that is saved;
    probe     A is a unit vector orthogonal to V, B is zero: W does not see it, grad_B does;
    idle      both sides zero: its gradient is exactly zero.

A pair may be turned: with T orthogonal among judged slots and the identity elsewhere, B T and T^T A are the
same W, balanced, in slots of other directions. The optimizer takes the T that leaves A and B nearest to
what they were, so averages of factors over steps mean something.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TRIAL = 2.0
"""Factor on A, and 1 / factor on B, of a direction that has not been judged."""


class Reading(NamedTuple):
    """A LoRA pair read as a point, with the matrices that turn its gradients into K and L (see `Gauge`)."""

    U: Tensor
    sigma: Tensor
    V: Tensor
    right: Tensor
    left: Tensor


class Gauge(NamedTuple):
    """How the factors of a pair lie in the slots of its point; all (*batch, r, r).

    Attributes:
        in_A, in_B: A = in_A^T V^T and B = U in_B.
        right, left: K = grad_B @ right and L = grad_A^T @ left.
    """

    in_A: Tensor
    in_B: Tensor
    right: Tensor
    left: Tensor


def to_pair(
    U: Tensor, sigma: Tensor, V: Tensor, scale: Tensor, settled: Tensor
) -> tuple[Tensor, Tensor]:
    """Balanced LoRA pair (A, B) of U diag(sigma) V^T, not turned; slots from settled[...] on are trials.

    Args:
        U, sigma, V: (*batch, d_out, r), (*batch, r), (*batch, d_in, r).
        scale: (*batch,), LoRA's factor s = alpha / r or alpha / sqrt(r), positive.
        settled: (*batch,) integers, how many leading slots have been judged.
    """
    length_A, length_B = slot_lengths(sigma, scale, settled)
    return (V * length_A.unsqueeze(-2)).mT, U * length_B.unsqueeze(-2)


def balanced_gauge(turn: Tensor, scale: Tensor, length_A: Tensor, length_B: Tensor) -> Gauge:
    """The gauge of a balanced pair.

    Args:
        turn: T (*batch, r, r). scale: (*batch,).
        length_A, length_B: (*batch, r), of the slots before they are turned, as `slot_lengths` gives them.
    """
    scale = scale.unsqueeze(-1)
    right, left = ((scale * length).reciprocal() for length in (length_A, length_B))
    return Gauge(
        length_A.unsqueeze(-1) * turn,
        length_B.unsqueeze(-1) * turn,
        turn.mT * right.unsqueeze(-2),
        turn.mT * left.unsqueeze(-2),
    )


def slot_lengths(sigma: Tensor, scale: Tensor, settled: Tensor) -> tuple[Tensor, Tensor]:
    """Length of A's row and B's column per slot (*batch, r); 1 where sigma = 0 (a probe, or an idle zero)."""
    active = sigma > 0
    root = torch.where(active, (sigma / scale.unsqueeze(-1)).sqrt(), 1.0)
    trial = torch.arange(sigma.shape[-1], device=sigma.device) >= settled.unsqueeze(-1)
    gauge = torch.where(trial & active, TRIAL, 1.0)
    return root * gauge, root / gauge


def read_pair(A: Tensor, B: Tensor, scale: float, start_rank: int | None = None) -> Reading:
    """Read any LoRA pair as a point, however W's lengths are shared out between A and B; in float64.

    Every direction of the row space of A that does not carry weight becomes a probe, so the stock
    start (B = 0) is all probes. Likewise from the left where A = 0 and B is not.

    Args:
        A: (r, d_in). B: (d_out, r). scale: s > 0.
        start_rank: how many rows of A to use as probes when B = 0; None for all.

    Returns:
        A `Reading`, in float64, with r slots: active (sigma descending), probes, idle.
    """
    A, B = A.detach().double(), B.detach().double()
    r = A.shape[0]
    rows = A.ne(0).any(-1)
    columns = B.ne(0).any(0)
    if start_rank is not None and not columns.any():
        rows = rows & (rows.cumsum(0) <= start_rank)
    row_index, column_index = rows.nonzero().flatten(), columns.nonzero().flatten()
    Qv, to_Qv = _range(A[row_index].mT)  # (d_in, a), (rows, a): A^T @ to_Qv = Qv
    Qu, to_Qu = _range(B[:, column_index])  # (d_out, b), (columns, b)
    active = rows & columns
    core_B, core_A = Qu.mT @ B[:, active], A[active] @ Qv  # (b, n), (n, a)
    P, values, Qt = torch.linalg.svd(scale * core_B @ core_A, full_matrices=True)  # of (b, a)
    # rounding is relative to the factors: a product that cancels is zero
    rounding = max(r, 2) * torch.finfo(torch.float64).eps
    k = int((values > rounding * scale * core_B.norm() * core_A.norm()).sum())

    a, b = Qv.shape[1], Qu.shape[1]
    # right slots 0..a-1 (active, then probes); left slots 0..k-1, then after the right probes
    left_slots = list(range(k)) + list(range(max(a, k), r))[: b - k]
    turn_v, turn_u = Qt.mT, P[:, : len(left_slots)]
    U, V = A.new_zeros(B.shape[0], r), A.new_zeros(A.shape[1], r)
    right, left, sigma = A.new_zeros(r, r), A.new_zeros(r, r), A.new_zeros(r)
    V[:, :a] = Qv @ turn_v
    U[:, left_slots] = Qu @ turn_u
    sigma[:k] = values[:k]
    right[row_index, :a] = to_Qv @ turn_v / scale
    left_columns = left.new_zeros(r, len(left_slots))
    left_columns[column_index] = to_Qu @ turn_u / scale
    left[:, left_slots] = left_columns
    return Reading(U, sigma, V, right, left)


def _range(X: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis Q (d, a) of the columns of X (d, c), and T (c, a) with X T = Q."""
    if not X.numel():
        return X.new_zeros(X.shape[0], 0), X.new_zeros(X.shape[1], 0)
    Q, values, Wt = torch.linalg.svd(X, full_matrices=False)
    # Factors may be rounded to bf16 or float32: dependence below 1e-9 is not a direction.
    keep = values > 1e-9 * values[0]
    return Q[:, keep], Wt[keep].mT / values[keep]


def slot_ranks(A: Tensor, B: Tensor) -> tuple[int, int]:
    """How many slots of a pair are active, and how many of those are trials.

    A trial is told by |A row| = 4 |B column| in a pair that is otherwise balanced (A A^T = B^T B) and whose trials
    are orthogonal to all other slots, as only geolora writes it; any other adapter has none.
    """
    A, B = A.detach().double(), B.detach().double()
    length_A, length_B = torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)
    active = (length_A > 0) & (length_B > 0)
    count = int(active.sum())
    if not count:
        return 0, 0
    ratio = length_A[active] / length_B[active]
    close = 0.02  # bf16 factors have norms right to 0.4 %
    balanced = (ratio - 1).abs() < close
    trial = (ratio / TRIAL**2 - 1).abs() < close
    rows, columns = A[active] / length_A[active, None], B[:, active] / length_B[active]
    gram = columns.mT @ columns
    same = (rows @ rows.mT - gram).abs() < close
    apart = (gram - torch.eye(count).to(gram))[trial].abs() < close
    judged = balanced & ~trial  # there is always one
    if not bool(judged.any() and (balanced | trial).all() and same.all() and apart.all()):
        return count, 0
    return count, int(trial.sum())
