"""Every method as in its paper, plainly: dense matrices, one layer after the other, float64. Imports torch only.

GeoLoRA: W is kept as a full matrix beside orthonormal bases U (d_out, a) and V (d_in, b) of the directions it
may be seen along; the tangent matrix M (gradient or momentum) is a full matrix too. The others are steps of
`Pair`s, listed in STEPS at the end by the names of the table of methods.
"""

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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


def share_ranks(layers: list["Plain"]) -> list[int]:
    """Ranks of layers whose directions, those that gain most per parameter, gain all but a share `tail`.

    All directions in one list, from the least on; every layer keeps its first.
    """
    listed, total = [], 0.0
    for place, layer in enumerate(layers):
        for rank in range(layer.U.shape[1]):
            gain = float(layer.gain[rank]) * layer.unit
            total += gain
            if rank:
                listed.append((gain / sum(layer.W.shape), gain, place))
    lost, ranks = 0.0, [layer.U.shape[1] for layer in layers]
    for _, gain, place in sorted(listed):
        lost += gain
        if lost > layers[0].tail * total:
            break
        ranks[place] -= 1
    return [max(1, rank) for rank in ranks]


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
    tail: float | None = 0.1
    prune_every: int | None = None
    settle_after: int | None = 20
    start_rank: int | None = None
    soften: float = 0.01
    width: float | None = None
    steps: int = 0
    M: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.r = self.A.shape[0]
        self.W = self.scale * self.B @ self.A
        self.M = torch.zeros_like(self.W)
        self.gain = torch.zeros(self.r, dtype=self.A.dtype)
        if self.B.abs().max() == 0:
            self.settled = self.start_rank or self.r
            self.U = self.W[:, :0]
            self.V = torch.linalg.qr(self.A[: self.settled].mT)[0]
        else:
            self.U, _, self.V = truncated(self.W, self.r)
            self.settled = self.V.shape[1]

    @property
    def phase(self) -> str:
        if self.tail is None:
            return "hold"
        if self.settle_after is not None and self.steps >= self.settle_after:
            return "judge" if self.steps == self.settle_after else "hold"
        if self.prune_every is None:
            return "grow"
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

    def step(self, G: Tensor, share: float = 1.0, alone: bool = True) -> None:
        """One step; `share` is what the layer takes of an adaptive step, 1 where it is alone."""
        phase = self.phase
        beta, used = 0.0 if self.moments == "none" else self.momentum, self.V.shape[1]
        before = self.M
        self.M = move = beta * before + projection(G, self.U, self.V)
        lr = self.lr
        if self.moments == "adaptive" and phase != "hold":
            for side in (self.M @ self.V, self.M.mT @ self.U):
                values = torch.linalg.svdvals(side)
                self.gain[: len(values)] += values
        if self.moments == "adaptive":
            U = basis_of(torch.cat([self.U, self.M @ self.V], dim=1))
            V = basis_of(torch.cat([self.V, self.M.mT @ self.U], dim=1))
            ahead = (1 + beta) * self.M - beta * before  # Nesterov: G + beta M
            ahead = U @ U.mT @ ahead @ V @ V.mT
            move = projection(soft_sign(ahead, self.soften), self.U, self.V)
            lr = share * lr * self.unit * (8 / max(1, used)) ** 0.5
        U, values, V = truncated(self.W - lr * move, self.settled if phase == "hold" else self.r)
        if phase == "judge" and self.moments != "adaptive":
            self.settled = max(1, tail_rank(values, self.tail))
            U, values, V = U[:, : self.settled], values[: self.settled], V[:, : self.settled]
        if len(values):
            self.U, self.V = U, V
        else:
            self.U = self.U[:, :0]
        self.W = U @ torch.diag(values) @ V.mT
        if phase == "judge" and self.moments == "adaptive" and alone:
            self.cut(*share_ranks([self]))
        self.steps += 1
        looks = self.phase == "grow" or (self.prune_every == 1 and self.phase == "judge")
        if looks and self.V.shape[1] < self.r:
            self.V = torch.cat([self.V, self.probe(self.steps - 1)], dim=1)
        self.M = projection(self.M, self.U, self.V)

    def cut(self, rank: int) -> None:
        """What is left of the layer when it is judged to have this rank."""
        self.settled = rank
        if self.U.shape[1]:
            self.U, values, self.V = truncated(self.W, rank)
            self.W = self.U @ torch.diag(values) @ self.V.mT
        self.gain.zero_()

    def probe(self, step: int) -> Tensor:
        """The random direction of a grow step, orthogonal to V."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.name}:{step}".encode()))
        w = torch.randn(self.V.shape[0], 1, generator=generator, dtype=torch.float64)
        w = w - self.V @ (self.V.mT @ w)
        w = w - self.V @ (self.V.mT @ w)
        return w / w.norm()


def step_all(layers: list[Plain], gradients: list[Tensor]) -> None:
    """One adaptive step of all layers: their sizes follow their forces, mean square 1."""
    judged = layers[0].phase == "judge"
    forces = [layer.force(G) for layer, G in zip(layers, gradients, strict=True)]
    size = (sum(force**2 for force in forces) / len(forces)) ** 0.5
    for layer, G, force in zip(layers, gradients, forces, strict=True):
        layer.step(G, force / size if size else 1.0, alone=False)
    if judged:
        for layer, rank in zip(layers, share_ranks(layers), strict=True):
            layer.cut(rank)
            layer.M = projection(layer.M, layer.U, layer.V)


def trajectory(plain: Plain, gradient: Callable[[Tensor], Tensor], steps: int) -> Iterator[Plain]:
    """Step, and yield after each."""
    for _ in range(steps):
        plain.step(gradient(plain.W))
        yield plain


# ---- all methods by their factors' gradients -------------------------------------------------------


@dataclass
class Pair:
    """A LoRA pair W = s B A with its gradients, and what a method remembers of it."""

    name: str
    A: Tensor
    B: Tensor
    s: float
    g_A: Tensor
    g_B: Tensor
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def G(self) -> Tensor:
        """A matrix whose factor gradients are these: its tangent projection is that of the gradient."""
        right = torch.linalg.lstsq(self.A, (self.g_B / self.s).mT).solution.mT
        if not self.B.any():
            return right
        used = self.B.any(0)
        U = basis_of(self.B)
        left = torch.linalg.lstsq(self.B[:, used].mT, self.g_A[used] / self.s).solution
        return U @ U.mT @ left + (right - U @ U.mT @ right)


def adam(memory: dict[str, Any], key: str, g: Tensor, t: int, eps: float = 1e-8) -> Tensor:
    """Adam's direction at step t = 1, 2, …, with betas 0.9 and 0.999."""
    m, v = memory.get(key, (torch.zeros_like(g), torch.zeros_like(g)))
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    memory[key] = m, v
    return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + eps)


def lora(pairs: list[Pair], t: int, lr: float) -> None:
    """AdamW on the factors."""
    for pair in pairs:
        pair.A = pair.A - lr * adam(pair.memory, "A", pair.g_A, t)
        pair.B = pair.B - lr * adam(pair.memory, "B", pair.g_B, t)


def lora_plus(pairs: list[Pair], t: int, lr: float, ratio: float = 16.0) -> None:
    """AdamW on the factors, B with `ratio` times the step of A."""
    for pair in pairs:
        pair.A = pair.A - lr * adam(pair.memory, "A", pair.g_A, t)
        pair.B = pair.B - ratio * lr * adam(pair.memory, "B", pair.g_B, t)


def geolora(pairs: list[Pair], t: int, lr: float, moments: str = "adaptive") -> None:
    """`Plain` layers, of one step together; the pair shows V, and U sigma where there is weight."""
    layers = []
    sizes = [(pair.A.shape[1] * pair.B.shape[0]) ** 0.5 for pair in pairs]
    width = math.prod(sizes) ** (1 / len(sizes))
    for pair in pairs:
        if t == 1:
            start = pair.A, pair.B, pair.s, pair.name, lr, moments
            pair.memory["layer"] = Plain(
                *start, prune_every=12, settle_after=None, start_rank=2, width=width
            )
        layers.append(pair.memory["layer"])
    if moments == "adaptive":
        step_all(layers, [pair.G for pair in pairs])
    for pair, layer in zip(pairs, layers, strict=True):
        if moments != "adaptive":
            layer.step(pair.G)
        known, rank = (
            layer.V.shape[1],
            layer.U.shape[1],
        )  # what is beyond the rank is looked along only
        pair.A, pair.B = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
        pair.A[:known] = layer.V.mT
        pair.B[:, :rank] = layer.W @ layer.V[:, :rank] / pair.s


def riemannian(pairs: list[Pair], t: int, lr: float, damping: float = 1e-2) -> None:
    """AdamW on gradients in the metric of the other factor."""
    for pair in pairs:
        one = damping * torch.eye(len(pair.A), dtype=pair.A.dtype)
        on_A = torch.linalg.solve(pair.B.mT @ pair.B + one, pair.g_A)
        on_B = torch.linalg.solve(pair.A @ pair.A.mT + one, pair.g_B.mT).mT
        pair.A = pair.A - lr * adam(pair.memory, "A", on_A, t)
        pair.B = pair.B - lr * adam(pair.memory, "B", on_B, t)


def lora_pro(pairs: list[Pair], t: int, lr: float, moments: str = "tangent") -> None:
    """Adam in W space, and the factors that do what it does, by least squares; without a ridge."""
    first, second, eps = 0.9, 0.999, 1e-8
    for pair in pairs:
        A, B, G = pair.A, pair.B, pair.G
        zeros = (0 * G, 0 * G, 0 * G[:, 0], 0 * G[0])
        M, v, rows, columns = pair.memory.get("moments", zeros)
        M = first * M + (1 - first) * G
        v = second * v + (1 - second) * G**2
        rows = second * rows + (1 - second) * (G**2).mean(1)
        columns = second * columns + (1 - second) * (G**2).mean(0)
        if moments == "full":
            N = M / (1 - first**t) / ((v / (1 - second**t)).sqrt() + eps)
        else:
            outer = rows.unsqueeze(1) * columns / rows.mean() / (1 - second**t)
            N = M / (1 - first**t) / outer.sqrt()
        g_A, g_B = nearest_factors(A, B, B.mT @ N, N @ A.mT, pair.s)
        pair.A, pair.B = A - lr * g_A, B - lr * g_B
        if moments == "tangent":
            M = projection(M, basis_of(pair.B), basis_of(pair.A.mT))
        pair.memory["moments"] = (M, v, rows, columns)


def nearest_factors(
    A: Tensor, B: Tensor, on_A: Tensor, on_B: Tensor, s: float
) -> tuple[Tensor, Tensor]:
    """Of all (g_A, g_B) with s (B g_A + g_B A) = P(W)N, those nearest to s B^T N and s N A^T: least squares."""
    left = torch.linalg.lstsq(B.mT, on_A).solution if B.any() else torch.zeros_like(B @ A)
    right = torch.linalg.lstsq(A, on_B.mT).solution.mT
    U = basis_of(B) if B.any() else B[:, :0]
    wanted = U @ U.mT @ left + right - U @ U.mT @ right
    near = torch.cat([(s * on_A).flatten(), (s * on_B).flatten()])

    def effect(x: Tensor) -> Tensor:
        g_A, g_B = x[: A.numel()].view_as(A), x[A.numel() :].view_as(B)
        return (s * (B @ g_A + g_B @ A)).flatten()

    matrix = torch.stack([effect(e) for e in torch.eye(len(near), dtype=A.dtype)], dim=1)
    x = near + torch.linalg.pinv(matrix, rtol=1e-11) @ (wanted.flatten() - effect(near))
    return x[: A.numel()].view_as(A), x[A.numel() :].view_as(B)


def lora_sb(pairs: list[Pair], t: int, lr: float) -> None:
    """Adam on the core R of W = U R V^T, A = V^T."""
    for pair in pairs:
        if t == 1:
            U, values, Vt = torch.linalg.svd(pair.s * pair.B, full_matrices=False)
            pair.memory["point"] = U, values.unsqueeze(-1) * Vt
        U, R = pair.memory["point"]
        R = R - lr * adam(pair.memory, "R", U.mT @ pair.g_B / pair.s, t)
        pair.memory["point"] = U, R
        pair.B = U @ R / pair.s


def rac_lora(pairs: list[Pair], t: int, lr: float, each: int = 2, blocks: int = 3) -> None:
    """Columns of B by Adam, block after block; Adam starts anew with each."""
    block = min((t - 1) // each, blocks - 1)
    for pair in pairs:
        r = len(pair.A)
        slots = slice(r * block // blocks, r * (block + 1) // blocks)
        pair.B = pair.B.clone()
        direction = adam(pair.memory, f"block {block}", pair.g_B[:, slots], t - each * block)
        pair.B[:, slots] -= lr * direction


def lora_muon(pairs: list[Pair], t: int, lr: float, beta: float = 0.9, decay: float = 0.01) -> None:
    """Polar factors by singular values, inverse roots by pseudo-inverses."""
    for pair in pairs:
        A, B, eta = pair.A, pair.B, lr / pair.s
        m_A = beta * pair.memory.get("A", 0.0 * A) + (1 - beta) * pair.g_A
        m_B = beta * pair.memory.get("B", 0.0 * B) + (1 - beta) * pair.g_B
        pair.memory.update(A=m_A, B=m_B)
        R_A, R_B = inverse_root(A @ A.mT), inverse_root(B.mT @ B)
        D_B, D_A = polar(m_B @ R_A) @ R_A, R_B @ polar(R_B @ m_A)
        c = (1 - decay * eta) ** 0.5
        pair.A, pair.B = c * A - eta / 2 * D_A / c, c * B - eta / 2 * D_B / c


def inverse_root(gram: Tensor) -> Tensor:
    """The pseudo-inverse's root."""
    P, values, _ = torch.linalg.svd(gram)
    real = values > 1e-12 * values[0]
    return P[:, real] @ torch.diag(values[real] ** -0.5) @ P[:, real].mT


def polar(X: Tensor) -> Tensor:
    """P Q^T of X = P diag(t) Q^T, without what is zero."""
    P, values, Qt = torch.linalg.svd(X, full_matrices=False)
    real = values > 1e-6 * values[0]
    return P[:, real] @ Qt[real]


STEPS: dict[str, Callable[..., None]] = {
    "geolora": geolora,
    "lora": lora,
    "lora-plus": lora_plus,
    "riemannian": riemannian,
    "lora-pro": lora_pro,
    "lora-sb": lora_sb,
    "lora-muon": lora_muon,
    "rac-lora": rac_lora,
}
"""Method -> (pairs, t, lr): one step, in place."""
