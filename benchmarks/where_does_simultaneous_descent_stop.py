"""Where does simultaneous descent on U, S and V stop? (Fig. 1 of arXiv 2410.18720.)

    python benchmarks/where_does_simultaneous_descent_stop.py

Descent on the three factors at once (with the bases retracted by QR) can reach a point where all three
gradients vanish although the tangent gradient P(W)G does not: U and V see G only through S. GeoLoRA's
step has no such points. One JSON file and one figure, on W* of rank 2, started at S = 0 or nearly so.
"""

import torch
from record import FIGURES, write
from torch import Tensor

from geolora.kernels.augment import combine, span_of, stack_spans
from geolora.kernels.tangent import norm, project
from geolora.methods.geolora import step

STEPS = 300
LR = 0.1
STARTS = (0.0, 1e-6, 1e-3)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """W* = e2 e1^T + e1 e2^T / 2, and the start u = e1, v = e1, where u^T W* v = 0."""
    wanted = torch.zeros(6, 6, dtype=torch.float64)
    wanted[1, 0], wanted[0, 1] = 1.0, 0.5
    return wanted, torch.eye(6, 1, dtype=torch.float64), torch.eye(6, 1, dtype=torch.float64)


def simultaneous(start: float) -> dict[str, list[float]]:
    """U, S, V <- one gradient step each, then U and V orthonormalised."""
    wanted, U, V = problem()
    S = torch.full((1, 1), start, dtype=torch.float64)
    errors, tangents = [], []
    for _ in range(STEPS):
        G = U @ S @ V.mT - wanted
        tangents.append(float(norm(*project(G, U, V), U)))
        errors.append(float(G.norm()))
        U, S, V = U - LR * G @ V @ S.mT, S - LR * U.mT @ G @ V, V - LR * G.mT @ U @ S
        U, RU = torch.linalg.qr(U)
        V, RV = torch.linalg.qr(V)
        S = RU @ S @ RV.mT
    return {"error": errors, "tangent_gradient": tangents}


def geometric(start: float, slots: int) -> dict[str, list[float]]:
    """GeoLoRA with at most `slots` directions."""
    wanted, u, v = problem()
    sigma = torch.tensor([start], dtype=torch.float64)
    U, sigma, V = (torch.nn.functional.pad(x, (0, slots - 1))[None] for x in (u, sigma, v))
    lr, cap = torch.tensor([LR], dtype=torch.float64), torch.tensor([slots])
    errors, tangents = [], []
    for _ in range(STEPS):
        G = (U * sigma) @ V.mT - wanted
        K, L = project(G, U, V)
        tangents.append(float(norm(K, L, U)))
        errors.append(float(G.norm()))
        left, right = span_of(U, K), span_of(V, L)
        on_left, sigma, on_right = step(stack_spans([left, right]), sigma, lr, cap)
        U = combine(left, U, K, on_left[..., :slots]).mT
        V = combine(right, V, L, on_right[..., :slots]).mT
    return {"error": errors, "tangent_gradient": tangents}


def main() -> None:
    from matplotlib.figure import Figure

    results = {"steps": STEPS, "lr": LR, "runs": {}}
    for start in STARTS:
        results["runs"][f"descent on U, S, V, S = {start:g}"] = simultaneous(start)
        results["runs"][f"GeoLoRA, rank 2, S = {start:g}"] = geometric(start, 2)
    results["runs"]["GeoLoRA held at rank 1, S = 0"] = geometric(0.0, 1)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, run in results["runs"].items():
        print(
            f"{name:36} error {run['error'][-1]:.2e}  ||P(W)G|| {run['tangent_gradient'][-1]:.2e}"
        )
        style = "--" if name.startswith("descent") else "-"
        for axes, key in zip(panels, ("error", "tangent_gradient"), strict=True):
            axes.semilogy([max(value, 1e-16) for value in run[key]], style, label=name)
    panels[0].set_title("||W - W*||")
    panels[1].set_title("||P(W)G||: zero only where nothing is left to gain")
    for axes in panels:
        axes.set_xlabel("step")
    panels[0].legend(fontsize="small")
    figure.savefig(FIGURES / "where_does_simultaneous_descent_stop.png", dpi=110)
    print(write("where_does_simultaneous_descent_stop", results))


if __name__ == "__main__":
    main()
