"""What LoRA-One's paper (arXiv 2502.01235) proves of one layer, checked in float64.

    python benchmarks/does_lora_ones_theory_hold.py

W (d_out, d_in) = B A is learnt from N Gaussian rows x: loss 1/2 mean ||act(W x) - act(D x)||^2, act the identity or ReLU, D
of rank 3. In this library's notation A is the right factor, which LoRA draws at random, and B starts at zero.

invariance (theorem 3.1): from B = 0, descent keeps the columns of B inside the columns of the first gradient, exactly.
alignment (3.2): from a small random A its leading right space turns to that of the first gradient, in about
    ln(sqrt(d) / angle) / ln(1 + lr * lambda) steps, lambda the last singular value of that gradient that counts.
start (3.3): ||W0 - D|| / ||D|| after LoRA-One's start, against the number of rows; LoRA's start has 1.
rate (4.2): error against steps from that start, for condition numbers of D from 1 to 1e4, with the preconditioner, which
    is bound by (1 - lr / 4)^t, and without.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from record import FIGURES, write
from torch import Tensor

from geolora.methods import lora_one
from geolora.methods.riemannian import precondition

D_OUT, D_IN, TRUE_RANK, R = 40, 60, 3, 6
KINDS = ("linear", "relu")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target(condition: float = 2.0, seed: int = 0) -> Tensor:
    U = torch.linalg.qr(normal(D_OUT, TRUE_RANK, seed=seed))[0]
    V = torch.linalg.qr(normal(D_IN, TRUE_RANK, seed=seed + 1))[0]
    return U * torch.logspace(0, -math.log10(condition), TRUE_RANK, dtype=torch.float64) @ V.mT


def gradient_of(kind: str, D: Tensor, rows: int, seed: int = 7) -> Callable[[Tensor], Tensor]:
    X = normal(rows, D_IN, seed=seed)
    if kind == "linear":
        second = X.mT @ X / rows
        return lambda W: (W - D) @ second
    wanted = (X @ D.mT).clamp(min=0)

    def of_relu(W: Tensor) -> Tensor:
        before = X @ W.mT
        slope = (before >= 0).double()  # 1 at W = 0, as in the paper
        return ((before.clamp(min=0) - wanted) * slope).mT @ X / rows

    return of_relu


def triplets(G: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    U, sigma, Vt = torch.linalg.svd(G, full_matrices=False)
    return U[:, :r], sigma[:r], Vt[:r].mT


def angle(X: Tensor, Y: Tensor) -> float:
    """Sine of the largest principal angle between the columns of two orthonormal bases."""
    return float(torch.linalg.matrix_norm(X - Y @ (Y.mT @ X), 2))


def descent(
    grad: Callable[[Tensor], Tensor], size: float, lr: float, steps: int
) -> list[tuple[Tensor, Tensor]]:
    A, B = (
        size * normal(R, D_IN, seed=3) / math.sqrt(D_IN),
        torch.zeros(D_OUT, R, dtype=torch.float64),
    )
    path = [(A, B)]
    for _ in range(steps):
        G = grad(B @ A)
        A, B = A - lr * B.mT @ G, B - lr * G @ A.mT
        path.append((A, B))
    return path


def invariance() -> dict[str, float]:
    """Largest part of B outside the columns of the first gradient, over 300 steps; for the linear model, as proven."""
    grad = gradient_of("linear", target(), 500)
    U = triplets(grad(torch.zeros(D_OUT, D_IN, dtype=torch.float64)), TRUE_RANK)[0]
    path = descent(grad, 0.1, 0.1, 300)
    return {
        "outside": max(float((B - U @ (U.mT @ B)).norm() / B.norm()) for _, B in path[1:]),
        "size_of_B_at_the_end": float(path[-1][1].norm()),
    }


def alignment() -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        for size in (1e-2, 1e-4, 1e-6):
            grad, lr = gradient_of(kind, target(), 2000), 0.1
            _, sigma, V = triplets(grad(torch.zeros(D_OUT, D_IN, dtype=torch.float64)), TRUE_RANK)
            wanted = 0.1
            predicted = math.log(math.sqrt(D_IN) / wanted) / math.log1p(lr * float(sigma[-1]))
            path = descent(grad, size, lr, 400)
            curve = [angle(V, triplets(A, TRUE_RANK)[2]) for A, _ in path]
            reached = next((t for t, value in enumerate(curve) if value <= wanted), None)
            found.append(
                {
                    "kind": kind,
                    "size": size,
                    "predicted": predicted,
                    "reached": reached,
                    "curve": curve[::4],
                }
            )
    return found


def start() -> list[dict[str, Any]]:
    found = []
    for kind in KINDS:
        for rows in (100, 300, 1000, 3000, 10_000, 30_000):
            D = target()
            G = gradient_of(kind, D, rows)(torch.zeros(D_OUT, D_IN, dtype=torch.float64))
            U, sigma, V = triplets(G, R)
            scale = 1.0 if kind == "linear" else 2.0  # E[G] = -D, or -D / 2 with ReLU
            W = (lambda u, s, v: u * s @ v.mT)(
                *lora_one.start(U, sigma, V, scale * float(sigma[0]))
            )
            error = float(torch.linalg.matrix_norm(W - D, 2) / torch.linalg.matrix_norm(D, 2))
            found.append({"kind": kind, "rows": rows, "error": error})
    return found


def rate() -> list[dict[str, Any]]:
    found = []
    for condition in (1.0, 1e1, 1e2, 1e3, 1e4):
        for damping in (1e-16, None):
            D, lr = target(condition), 0.5
            grad = gradient_of("linear", D, 200_000)
            U, sigma, V = triplets(grad(torch.zeros(D_OUT, D_IN, dtype=torch.float64)), TRUE_RANK)
            U, sigma, V = lora_one.start(U, sigma, V, float(sigma[0]))
            B, A = U * sigma.sqrt(), (V * sigma.sqrt()).mT
            curve = []
            for _ in range(200):
                curve.append(float((B @ A - D).norm()))
                G = grad(B @ A)
                on_A, on_B = B.mT @ G, G @ A.mT
                if damping is not None:
                    on_A, on_B = precondition(A, B, on_A, on_B, damping)
                A, B = A - lr * on_A, B - lr * on_B
            bound = max(
                (value / curve[0]) / (1 - lr / 4) ** t
                for t, value in enumerate(curve)
                if value > 1e-13
            )
            found.append(
                {
                    "condition": condition,
                    "preconditioned": damping is not None,
                    "least_singular_value_over_start_error": float(sigma[-1]) / curve[0],
                    "most_over_bound": bound,
                    "curve": curve[::2],
                }
            )
    return found


def figure(results: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for run in results["alignment"]:
        color = "C0" if run["kind"] == "linear" else "C1"
        style = {1e-2: "-", 1e-4: "--", 1e-6: ":"}[run["size"]]
        steps = [4 * t for t in range(len(run["curve"]))]
        left.semilogy(
            steps, run["curve"], style, color=color, label=f"{run['kind']}, |A| {run['size']:g}"
        )
    for run in results["alignment"][::3]:
        left.axvline(run["predicted"], color="C0" if run["kind"] == "linear" else "C1", lw=0.7)
    left.set(
        title="Alignment of A (3.2); line: 0.1 predicted",
        xlabel="step",
        ylabel="sine of largest angle",
    )
    left.legend(fontsize=7)
    for kind in KINDS:
        runs = [run for run in results["start"] if run["kind"] == kind]
        middle.loglog(
            [run["rows"] for run in runs],
            [run["error"] for run in runs],
            "o-",
            label=f"LoRA-One, {kind}",
        )
    middle.axhline(1, color="black", lw=0.7, label="LoRA: W = 0")
    middle.set(title="Error of the start (3.3)", xlabel="rows N", ylabel="||W0 - D|| / ||D||")
    middle.legend(fontsize=7)
    for run in results["rate"]:
        place = math.log10(run["condition"]) / 4
        style = "-" if run["preconditioned"] else ":"
        steps = [2 * t for t in range(len(run["curve"]))]
        label = f"condition {run['condition']:g}" if run["preconditioned"] else None
        right.semilogy(
            steps, run["curve"], style, color=plt.get_cmap("viridis")(0.9 * place), label=label
        )
    right.set(
        title="Error (4.2); dotted: not preconditioned",
        xlabel="step",
        ylabel="||W - D||",
        ylim=(1e-15, 10),
    )
    right.legend(fontsize=7)
    drawn.savefig(FIGURES / "does_lora_ones_theory_hold.png", dpi=120)


def main() -> None:
    results = {
        "invariance": invariance(),
        "alignment": alignment(),
        "start": start(),
        "rate": rate(),
    }
    figure(results)
    print(results["invariance"])
    for run in results["alignment"]:
        print({key: run[key] for key in ("kind", "size", "predicted", "reached")})
    for run in (*results["start"], *results["rate"]):
        print({key: value for key, value in run.items() if key != "curve"})
    print(write("does_lora_ones_theory_hold", results))


if __name__ == "__main__":
    main()
