"""GeoLoRA: one step on the manifold of low-rank matrices.

Paper: Schotthöfer, Zangrando, Ceruti, Tudisco, Kusch, "GeoLoRA: Geometric integration for
    parameter efficient fine-tuning", arXiv 2410.18720 (ICLR 2025).
What this file computes: W+ = truncate(W - lr P(W)G), with K = G V and L = G^T U given.
Symbols: U, V, S = diag(sigma) as in the paper; K = G V and L = G^T U are its gradients of the K-
    and L-steps; U~ = new columns of U; core = the 2r x 2r coefficient matrix S^ before its SVD.
Differences from the paper and the authors' code: no S^-1 anywhere, so sigma = 0 is an ordinary
    point; the augmentation drops what adds nothing instead of inventing columns; sigma is sorted
    and diagonal after every step; momentum is carried to the new tangent space.
Defaults: soften = 0.01, momentum 0.8, measured (docs/decisions.md); the paper has no adaptive step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geolora.kernels.augment import orthonormal, span
from geolora.kernels.tangent import core_of
from geolora.kernels.truncate import leading, numerical_rank


class Point(NamedTuple):
    """W = U diag(sigma) V^T in r slots, sigma descending.

    U (n, d_out, r) and V (n, d_in, r): orthonormal columns, zero in idle slots.
    sigma (n, r): non-negative. A slot with sigma = 0 and a column of V only is a probe.
    """

    U: Tensor
    sigma: Tensor
    V: Tensor


class Momentum(NamedTuple):
    """A tangent matrix M by its parts K = M V (n, d_out, r) and L = M^T U (n, d_in, r)."""

    K: Tensor
    L: Tensor


class Spectral(NamedTuple):
    """A normalised step: tangent matrices N to look along, and the constant e of the soft sign."""

    ahead: Sequence[Momentum]
    soften: float


def step(
    points: Sequence[Point],
    moves: Sequence[Momentum],
    lr: Tensor,
    cap: Tensor,
    spectral: Spectral | None = None,
    width: int | None = None,
) -> list[tuple[Point, Momentum]]:
    """W+ = truncate(W - lr D) along D = M for tangent matrices M, and M carried to W+.

    Before truncation the result is exactly W - lr M, of rank at most 2r. With M = P(W)G this is the
    paper's step. M is carried by orthogonal projection, P(W+)M.

    With `spectral` the step is D = P(W) soft_sign(N): N is what Nesterov's rule looks ahead to, as
    far as it lies in the span of [U | K] and [V | L], and every singular value t of N becomes
    t / (t + e t_1), so that all directions move at a like speed. The soft sign alone would leave
    the tangent space; P(W) makes the lower right block of the core zero again.

    Layers of one shape come as a stack; stacks of different shapes with the same number of slots
    come together, because their 2r x 2r problems are one problem.

    Args:
        points: the current factors, (n_i, ...) each, N layers in all.
        moves: the tangent matrices, by their parts there.
        lr: step sizes (N,). Unit: change of W per unit of M; with `spectral` about the spectral
            norm of the change (before P(W) exactly that, as e -> 0).
        cap: (N,) integers, the rank to keep at most.
        spectral: None, or what makes the step a normalised one.
        width: leading slots that are filled now or may be after the step, at most twice those filled
            now; all others are idle and cost nothing. None for all slots.

    Returns:
        The new points, in the same slots, and the parts of P(W+)M there. Where W+ = 0 the old
        probes are kept: without them a layer at W = 0 would never see a gradient again. Slots
        that only had a left vector keep that one.

    Precision:
        Factors in the dtype of the points, everything between in float64. Singular values are
        kept when they exceed eps * sigma_1 of the factors' dtype.
    """
    idle, dtype = 0, points[0].sigma.dtype
    slots = points[0].sigma.shape[-1]
    if width is not None and width < slots:
        slots, idle = width, slots - width
    bases = [point.U[..., :slots] for point in points] + [point.V[..., :slots] for point in points]
    parts = [M.K[..., :slots] for M in moves] + [M.L[..., :slots] for M in moves]
    spans = [span(basis, part) for basis, part in zip(bases, parts, strict=True)]
    grams = torch.cat([gram for _, gram, _ in spans])
    turns = orthonormal(grams, slots)  # [U | U~] = Z @ turn
    move = core_of(*(turns.mT @ torch.cat([C for _, _, C in spans])).chunk(2))
    along = move
    if spectral is not None:
        parts = [N.K[..., :slots] for N in spectral.ahead]
        parts += [N.L[..., :slots] for N in spectral.ahead]
        seen = [Z.mT @ part.double() for (Z, _, _), part in zip(spans, parts, strict=True)]
        along = core_of(*(turns.mT @ torch.cat(seen)).chunk(2))
        along = soft_sign(along, spectral.soften)
        along[..., slots:, slots:] = 0
    sigma = torch.cat([point.sigma[..., :slots] for point in points]).double()
    core = torch.diag_embed(torch.nn.functional.pad(sigma, (0, slots)))
    core = core - lr[:, None, None] * along

    P, values, Qt = torch.linalg.svd(core)
    tolerance = max(torch.finfo(dtype).eps, core.shape[-1] * torch.finfo(core.dtype).eps)
    keep = leading(torch.minimum(numerical_rank(values, tolerance), cap), slots)
    values = torch.nn.functional.pad((values[:, :slots] * keep).to(dtype), (0, idle))
    # where nothing is left of W: the old right vectors, and left ones that have no right one
    old = torch.eye(2 * slots, slots, device=core.device, dtype=core.dtype)
    alone = grams.chunk(2)[1].diagonal(dim1=-2, dim2=-1)[:, None, :slots] == 0
    keep = keep.unsqueeze(-2)
    P = torch.where(keep[..., :1], P[..., :slots] * keep, old * alone)
    Q = torch.where(keep[..., :1], Qt.mT[..., :slots] * keep, old)
    P, Q = torch.nn.functional.pad(P, (0, idle)), torch.nn.functional.pad(Q, (0, idle))
    onto = turns @ torch.cat([torch.cat([P, Q]), torch.cat([move @ Q, move.mT @ P])], dim=-1)
    count = [len(point.sigma) for point in points]
    ends = [  # U+ and K+, then V+ and L+
        [part.to(dtype).mT for part in torch.bmm(on.mT, Z.mT).split(slots + idle, dim=-2)]
        for (Z, _, _), on in zip(spans, onto.split(count * 2), strict=True)
    ]
    return [
        (Point(U, value, V), Momentum(K, L))
        for (U, K), value, (V, L) in zip(
            ends[: len(count)], values.split(count), ends[len(count) :], strict=True
        )
    ]


def shares(forces: Tensor, live: Tensor) -> Tensor:
    """How far each layer goes in an adaptive step, in its unit u_l: in proportion to its force.

    A bound on the largest ||D_l|| / u_l lets every layer go equally far, also one that the loss
    hardly depends on and that then moves by noise. Steepest descent under a bound on the sum of their
    squares goes u_l ||N_l||* far, ||.||* being the dual norm of the gradient there. The size of a step
    of a layer of rank k falls as 1 / sqrt(k), and its dual norm, the sum of k singular values, is about
    sqrt(k) times the Frobenius norm: u_l ||N_l||_F is the force, whatever k.

    Args:
        forces: (N,), u_l ||M_l||_F >= 0 of every layer.
        live: (N,) booleans, the layers that have a gradient; the others take no part in the mean.

    Returns:
        (N,), of mean square 1 over the live layers; 1 where no force is known (all of them zero).
    """
    size = (forces.square() * live).sum().div(live.sum().clamp(min=1)).sqrt()
    return torch.where(size > 0, forces / size, torch.ones_like(forces))


def gains(M: Momentum) -> Tensor:
    """What directions are worth, (n, r) descending: how fast the loss falls along each, to first order.

    A step of spectral norm 1 in all of K = M V lowers <M, W> by the sum of its singular values, and one
    in L = M^T U likewise: per direction the two together, in float64. They do not depend on the
    basis inside the subspace, nor on sigma.
    """
    squares = torch.stack([part.double().mT @ part.double() for part in M])
    return torch.linalg.eigvalsh(squares).clamp(min=0).sqrt().sum(0).flip(-1)


def soft_sign(move: Tensor, soften: float) -> Tensor:
    """Replace every singular value t by t / (t + soften * t_1); zero stays zero.

    A spectral form of steepest descent: as soften -> 0 all directions move by one. With M^T M =
    W t^2 W^T it is M W (t + soften t_1)^-1 W^T: one eigenvalue problem, and no division by t.
    """
    squares, W = torch.linalg.eigh(move.mT @ move)
    values = squares.clamp(min=0).sqrt()
    floor = soften * values[..., -1:]
    speed = torch.where(floor > 0, values + floor, torch.ones_like(values)).reciprocal()
    return move @ ((W * speed.unsqueeze(-2)) @ W.mT)


def cut(point: Point, M: Momentum, ranks: Tensor) -> tuple[Point, Momentum]:
    """Keep the leading ranks[...] slots of a point, and of a momentum there; the rest becomes idle.

    The error in W is exactly the norm of the singular values dropped. Where W = 0 nothing is cut.
    """
    keep = leading(ranks, point.sigma.shape[-1]) | (point.sigma[..., :1] == 0)
    sigma, keep = point.sigma * keep, keep.unsqueeze(-2)
    return Point(point.U * keep, sigma, point.V * keep), Momentum(M.K * keep, M.L * keep)
