"""GeoLoRA: one step on the manifold of low-rank matrices.

Paper: Schotthöfer, Zangrando, Ceruti, Tudisco, Kusch, "GeoLoRA: Geometric integration for
    parameter efficient fine-tuning", arXiv 2410.18720 (ICLR 2025).
What this file computes: W+ = truncate(W - lr P(W)G), with K = G V and L = G^T U given.
Symbols: U, V, S = diag(sigma) as in the paper; K = G V and L = G^T U are its gradients of the K-
    and L-steps; U~ = new columns of U; core = the 2r x 2r coefficient matrix S^ before its SVD.
Differences from the paper and the authors' code: no S^-1 anywhere, so sigma = 0 is an ordinary
    point; the augmentation drops what adds nothing instead of inventing columns; sigma is sorted
    and diagonal after every step; momentum is carried to the new tangent space.
Defaults: soften = 0.01, measured (docs/decisions.md); the paper has no adaptive step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from geolora.kernels.augment import augment, polish
from geolora.kernels.tangent import core_of
from geolora.kernels.truncate import leading, numerical_rank


class Point(NamedTuple):
    """W = U diag(sigma) V^T in r slots, sigma descending.

    U (*batch, d_out, r) and V (*batch, d_in, r): orthonormal columns, zero in idle slots.
    sigma (*batch, r): non-negative. A slot with sigma = 0 and a column of V only is a probe.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


def step(
    point: Point,
    K: Tensor,
    L: Tensor,
    lr: Tensor | float,
    cap: Tensor,
    soften: float | None = None,
) -> Point:
    """W+ = truncate(W - lr M) for a tangent matrix M with parts K = M V and L = M^T U.

    Before truncation the result is exactly W - lr M, of rank at most 2r. With M = P(W)G and
    soften = None this is the paper's step.

    Args:
        point: the current factors.
        K: (*batch, d_out, r). L: (*batch, d_in, r).
        lr: step size, a number or (*batch,). Unit: change of W per unit of M; with `soften` the
            spectral norm of the change.
        cap: (*batch,) integers, the rank to keep at most.
        soften: None, or the constant e of the normalised step, where every singular value t of M
            becomes t / (t + e t_1): all directions move at a like speed. Provisional.

    Returns:
        The new point, in the same slots. Where W+ = 0 the old probes are kept.

    Precision:
        Bases in the dtype of `point`; the core and its SVD in float64. Singular values are kept
        when they exceed eps * sigma_1 of the bases' dtype.
    """
    U, sigma, V = point
    slots = sigma.shape[-1]
    U_new, RK = augment(U, K)
    V_new, RL = augment(V, L)
    move = core_of(K, U, RK, RL).double()
    if soften is not None:
        move = soft_sign(move, soften)
    lr = torch.as_tensor(lr, dtype=torch.float64, device=move.device)
    core = torch.diag_embed(torch.nn.functional.pad(sigma.double(), (0, slots)))
    core = core - lr[..., None, None] * move

    P, values, Qt = torch.linalg.svd(core)
    tolerance = max(torch.finfo(U.dtype).eps, core.shape[-1] * torch.finfo(core.dtype).eps)
    rank = torch.minimum(numerical_rank(values, tolerance), cap)
    keep = leading(rank, slots).to(U.dtype)
    P, Q = P[..., :slots].to(U.dtype), Qt.mT[..., :slots].to(U.dtype)
    U_next = polish((torch.cat([U, U_new], dim=-1) @ P) * keep.unsqueeze(-2))
    V_next = polish((torch.cat([V, V_new], dim=-1) @ Q) * keep.unsqueeze(-2))
    sigma_next = values[..., :slots].to(U.dtype) * keep
    return _or_probes(Point(U_next, sigma_next, V_next), point)


def soft_sign(move: Tensor, soften: float) -> Tensor:
    """Replace every singular value t by t / (t + soften * t_1); zero stays zero.

    A spectral form of steepest descent: as soften -> 0 all directions move by one.
    """
    P, values, Qt = torch.linalg.svd(move, full_matrices=False)
    floor = soften * values[..., :1]
    speed = values / torch.where(floor > 0, values + floor, torch.ones_like(values))
    return (P * speed.unsqueeze(-2)) @ Qt


def cut(point: Point, ranks: Tensor) -> Point:
    """Keep the leading ranks[...] slots of a point; the rest becomes idle.

    The error in W is exactly the norm of the singular values dropped.
    """
    keep = leading(ranks, point.sigma.shape[-1]).to(point.U.dtype)
    kept = Point(point.U * keep.unsqueeze(-2), point.sigma * keep, point.V * keep.unsqueeze(-2))
    return _or_probes(kept, point)


def _or_probes(new: Point, old: Point) -> Point:
    """Where nothing of W is left, keep the old right vectors as probes: sigma = 0, U = 0.

    Without them a layer at W = 0 would never see a gradient again. Slots that only had a left
    vector keep that one.
    """
    empty = (new.sigma[..., :1] == 0).unsqueeze(-1)
    left_only = (old.V == 0).all(-2, keepdim=True)
    return Point(
        torch.where(empty, old.U * left_only, new.U),
        new.sigma,
        torch.where(empty, old.V, new.V),
    )
