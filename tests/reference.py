"""GeoLoRA as in the papers, plainly: dense matrices, one layer, float64. Imports torch only.

W is kept as a full matrix beside orthonormal bases U (d_out, a) and V (d_in, b) of the directions it
may be seen along; the tangent matrix M (gradient or momentum) is a full matrix too.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


def projection(G: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """P(W)G = U U^T G + G V V^T - U U^T G V V^T."""
    return U @ U.mT @ G + G @ V @ V.mT - U @ U.mT @ G @ V @ V.mT


def truncated(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets of W, without those that are zero to rounding."""
    P, values, Qt = torch.linalg.svd(W, full_matrices=False)
    rank = min(rank, int((values > 1e-13 * values[0]).sum())) if values[0] > 0 else 0
    return P[:, :rank], values[:rank], Qt[:rank].mT


def basis_of(X: Tensor) -> Tensor:
    """Orthonormal columns that span those of X."""
    X = X / torch.linalg.vector_norm(X, dim=0).clamp(min=1e-300)
    P, values, _ = torch.linalg.svd(X, full_matrices=False)
    return P[:, values > 1e-13]


def tail_rank(values: Tensor, tail: float) -> int:
    """Smallest rank whose discarded values have norm <= tail * ||values||."""
    for rank in range(len(values) + 1):
        if values[rank:].norm() <= tail * values.norm():
            return rank
    raise AssertionError


def soft_sign(M: Tensor, soften: float) -> Tensor:
    """Every singular value t of M becomes t / (t + soften * t_1)."""
    P, values, Qt = torch.linalg.svd(M, full_matrices=False)
    if values[0] == 0:
        return M
    return P @ torch.diag(values / (values + soften * values[0])) @ Qt


@dataclass
class Plain:
    """One layer trained by the plain algorithm; see `geolora.GeoLoRA` for the arguments."""

    A: Tensor
    B: Tensor
    scale: float
    name: str
    lr: float
    moments: str = "none"
    momentum: float = 0.8
    tail: float = 0.1
    prune_every: int | None = 25
    settle_after: int | None = None
    start_rank: int | None = None
    soften: float = 0.01
    width: float | None = None
    steps: int = 0
    M: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.r = self.A.shape[0]
        self.W = self.scale * self.B @ self.A
        self.M = torch.zeros_like(self.W)
        if self.B.abs().max() == 0:
            self.settled = self.start_rank or self.r
            self.U = self.W[:, :0]
            self.V = torch.linalg.qr(self.A[: self.settled].mT)[0]
        else:
            self.U, _, self.V = truncated(self.W, self.r)
            self.settled = self.V.shape[1]

    @property
    def phase(self) -> str:
        if self.settle_after is not None and self.steps >= self.settle_after:
            return "judge" if self.steps == self.settle_after else "hold"
        if self.prune_every is None:
            return "hold" if self.settle_after is None else "grow"
        at, growing = self.steps % self.prune_every, self.prune_every // 6
        return "grow" if at < growing else "judge" if at == growing else "hold"

    @property
    def unit(self) -> float:
        d_out, d_in = self.W.shape
        width = self.width or (d_out * d_in) ** 0.5
        return (1024 * max(d_out, d_in)) ** 0.5 / width

    def force(self, G: Tensor) -> float:
        """The norm of the momentum that a step along G would have, in the layer's unit."""
        M = self.momentum * self.M + projection(G, self.U, self.V)
        return self.unit * float(M.norm())

    def step(self, G: Tensor, share: float = 1.0) -> None:
        """One step; `share` is what the layer takes of an adaptive step, 1 where it is alone."""
        phase = self.phase
        beta, used = 0.0 if self.moments == "none" else self.momentum, self.V.shape[1]
        before = self.M
        self.M = move = beta * before + projection(G, self.U, self.V)
        lr = self.lr
        if self.moments == "adaptive":
            U = basis_of(torch.cat([self.U, self.M @ self.V], dim=1))
            V = basis_of(torch.cat([self.V, self.M.mT @ self.U], dim=1))
            ahead = (1 + beta) * self.M - beta * before  # Nesterov: G + beta M
            ahead = U @ U.mT @ ahead @ V @ V.mT
            move = projection(soft_sign(ahead, self.soften), self.U, self.V)
            lr = share * lr * self.unit * (8 / max(1, used)) ** 0.5
        U, values, V = truncated(self.W - lr * move, self.settled if phase == "hold" else self.r)
        if phase == "judge":
            self.settled = max(1, tail_rank(values, self.tail))
            U, values, V = U[:, : self.settled], values[: self.settled], V[:, : self.settled]
        if len(values):
            self.U, self.V = U, V
        else:
            self.U = self.U[:, :0]
        self.W = U @ torch.diag(values) @ V.mT
        self.steps += 1
        if self.phase == "grow" and self.V.shape[1] < self.r:
            self.V = torch.cat([self.V, self.probe(self.steps - 1)], dim=1)
        self.M = projection(self.M, self.U, self.V)

    def probe(self, step: int) -> Tensor:
        """The random direction of a grow step, orthogonal to V."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}:{step}".encode()))
        w = torch.randn(self.V.shape[0], 1, generator=generator, dtype=torch.float64)
        w = w - self.V @ (self.V.mT @ w)
        w = w - self.V @ (self.V.mT @ w)
        return w / w.norm()


def step_all(layers: list[Plain], gradients: list[Tensor]) -> None:
    """One adaptive step of all layers: their sizes follow their forces, mean square 1."""
    forces = [layer.force(G) for layer, G in zip(layers, gradients, strict=True)]
    size = (sum(force**2 for force in forces) / len(forces)) ** 0.5
    for layer, G, force in zip(layers, gradients, forces, strict=True):
        layer.step(G, force / size if size else 1.0)


def trajectory(plain: Plain, gradient: Callable[[Tensor], Tensor], steps: int) -> Iterator[Plain]:
    """Step, and yield after each."""
    for _ in range(steps):
        plain.step(gradient(plain.W))
        yield plain
