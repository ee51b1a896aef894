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

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from geolora.kernels.augment import KEEP, Span, orthonormal
from geolora.kernels.decompose import eigh, leading_eigenvectors
from geolora.kernels.tangent import core_of
from geolora.kernels.truncate import leading, numerical_rank

REFERENCE_WIDTH = 1024.0
"""Width of a model at which an adaptive step of a square layer has spectral norm lr."""


class Move(NamedTuple):
    """A step in the coordinates of the spans, for N layers: [U+ | K+] = Z left, [V+ | L+] = Z right.

    left, right: (N, 2w, 2w), float64. sigma: (N, w), descending, of the factors' dtype.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor


def tangent_norms(span: Span) -> Tensor:
    """||M||_F (N,), float64, of tangent matrices M, given what both sides span."""
    left, right = span.square.diagonal(dim1=-2, dim2=-1).sum(-1).chunk(2)
    w = span.square.shape[-1]
    overlap = span.inside[: len(left), :w, :w].square().sum((-2, -1))
    return (left + right - overlap).clamp(min=0).sqrt()


def step(span: Span, sigma: Tensor, lr: Tensor, cap: Tensor, soften: float | None = None) -> Move:
    """W+ = truncate(W - lr D) along D = M for tangent matrices M, and M carried to W+.

    Before truncation the result is exactly W - lr M, of rank at most 2w. With M = P(W)G this is the
    paper's step. M is carried by orthogonal projection, P(W+)M.

    With `soften` the step is D = P(W) soft_sign(N): N is what Nesterov's rule looks ahead to, as
    far as it lies in the span of [U | K] and [V | L], and every singular value t of N becomes
    t / (t + e t_1), so that all directions move at a like speed. The soft sign alone would leave
    the tangent space; P(W) makes the lower right block of the core zero again.

    Layers of any shape with the same number of slots are one problem.

    Args:
        span: `augment.span_of` at (U, K) of every layer and then at (V, L) of every layer, and with `soften`
            at the parts of N too.
        sigma: (N, w), of the factors' dtype.
        lr: step sizes (N,), float64. Unit: change of W per unit of M; with `soften` about the spectral
            norm of the change (before P(W) exactly that, as e -> 0).
        cap: (N,) integers, the rank to keep at most.
        soften: e, for a normalised step along what is ahead.

    Returns:
        A `Move` to w slots. Where W+ = 0 the old probes are kept: without them a layer at W = 0 would
        never see a gradient again. Slots that only had a left vector keep that one.

    Precision:
        float64. Singular values are kept when they exceed eps * sigma_1 of the factors' dtype, 8 eps
        for factors of float32.
    """
    slots, dtype = sigma.shape[-1], sigma.dtype
    T = orthonormal(span.gram, slots)  # [U | U~] = Z T
    M, *ahead = (T.mT @ span.inside).split(slots, dim=-1)
    move = along = core_of(*M.chunk(2))
    if soften is not None:
        along = soft_sign(core_of(*ahead[0].chunk(2)), soften)  # of N
        along[..., slots:, slots:] = 0
    core = torch.diag_embed(torch.nn.functional.pad(sigma.double(), (0, slots)))
    core = torch.addcmul(core, lr[:, None, None], along, value=-1.0)

    P, values, Q, tolerance = _leading_singular(core, cap, slots, dtype)
    keep = leading(torch.minimum(numerical_rank(values, tolerance), cap), slots)
    values = values * keep
    # where W+ = 0: keep the old right vectors, and left vectors of slots without a right one
    old = torch.eye(2 * slots, slots, device=core.device, dtype=core.dtype)
    alone = ~slots_with_right_vector(span, slots)[:, None]
    keep = keep.unsqueeze(-2)
    P = torch.where(keep[..., :1], P * keep, old * alone)
    Q = torch.where(keep[..., :1], Q * keep, old)
    onto = torch.cat([torch.cat([P, Q]), torch.cat([move @ Q, move.mT @ P])], dim=-1)
    left, right = (T @ onto).chunk(2)
    return Move(left, values.to(dtype), right)


def _leading_singular(
    core: Tensor, cap: Tensor, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The k largest singular values of cores (N, 2k, 2k), their vectors, and what counts as zero beside the first.

    For factors of float32 from the eigenvalues of core^T core: exact in the product, since core Q Q^T
    is what is kept whatever the error of a value; left vectors of values of 8 eps sigma_1 are
    orthogonal to 1e-2.
    """
    if dtype == torch.float64:
        P, values, Qt = torch.linalg.svd(core)
        least = core.shape[-1] * torch.finfo(core.dtype).eps
        return P[..., :k], values[:, :k], Qt.mT[..., :k], least
    squares, Q = leading_eigenvectors(core.mT @ core, cap, k)
    values = squares.clamp(min=0).sqrt()
    P = (core @ Q) / torch.where(values > 0, values, 1.0).unsqueeze(-2)
    return P, values, Q, KEEP * torch.finfo(torch.float32).eps


def units(shapes: Sequence[tuple[int, int]]) -> list[float]:
    """What a step size is multiplied by in every layer of a model, given their (d_out, d_in).

    1 for square layers of width 1024, proportional to sqrt(max(d_out, d_in)) within a model and to 1 / width
    between models; the width of a model is the geometric mean of sqrt(d_out d_in) over its layers.
    """
    width = math.exp(sum(math.log(d_out * d_in) / 2 for d_out, d_in in shapes) / len(shapes))
    return [math.sqrt(REFERENCE_WIDTH * max(shape)) / width for shape in shapes]


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


def slots_with_right_vector(span: Span, slots: int) -> Tensor:
    """Which slots (N, w) have a right vector, probes included."""
    return span.gram.diagonal(dim1=-2, dim2=-1).chunk(2)[1][:, :slots] > 0


def gains(span: Span) -> Tensor:
    """What directions are worth, (N, w) descending: how fast the loss falls along each, to first order.

    A step of spectral norm 1 in all of K = M V lowers <M, W> by the sum of its singular values, and one
    in L = M^T U likewise: per direction the two together, in float64. They do not depend on the
    basis inside the subspace, nor on sigma.
    """
    left, right = torch.linalg.eigvalsh(span.square).clamp(min=0).sqrt().chunk(2)
    return (left + right).flip(-1)


def soft_sign(move: Tensor, soften: float) -> Tensor:
    """Replace every singular value t by t / (t + soften * t_1); zero stays zero.

    A spectral form of steepest descent: as soften -> 0 all directions move by one. With M^T M =
    W t^2 W^T it is M W (t + soften t_1)^-1 W^T: one eigenvalue problem, and no division by t.
    """
    squares, W = eigh(move.mT @ move)
    values = squares.clamp(min=0).sqrt()
    floor = soften * values[..., -1:]
    speed = torch.where(floor > 0, values + floor, torch.ones_like(values)).reciprocal()
    return move @ ((W * speed.unsqueeze(-2)) @ W.mT)


def kept(sigma: Tensor, ranks: Tensor) -> Tensor:
    """Mask (N, w) of the slots that stay when sigma (N, w) is cut to ranks (N,); where W = 0 all do.

    The error in W is exactly the norm of the singular values dropped.
    """
    return leading(ranks, sigma.shape[-1]) | (sigma[..., :1] == 0)
