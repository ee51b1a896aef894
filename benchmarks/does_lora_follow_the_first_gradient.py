"""Do LoRA's factors turn to the singular spaces of the first gradient, as LoRA-One's paper says?

    python benchmarks/does_lora_follow_the_first_gradient.py DATA [--lr 3e-3] [--steps 200]

MiniLM on MRPC as in does_a_start_help.py, rank 8, AdamW, seed 0, from LoRA's start and from LoRA-One's. G is the gradient of
64 rows before training. For every kind of layer, means over the depths, every five steps:

distance: sqrt(1 - ||X^T Y||_F^2 / 8) of the span Y of B's columns (left) or A's rows (right) from the first eight singular
    vectors X of G: 0 for the same space, 1 for orthogonal ones, sqrt(1 - 8 / d) for a random one (0.990 for d = 384).
energy: of the best rank-8 part of G, the share inside that span.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from does_a_start_help import GLUE, METHODS, Task, one, task_of
from record import FIGURES, write
from torch import Tensor

import geolora
from geolora.pairs.find import find_pairs

NAME = "does_lora_follow_the_first_gradient"
EVERY = 5
KINDS = {
    "query": "query",
    "key": "key",
    "value": "value",
    "attention.output": "attention output",
    "intermediate": "MLP in",
    "output": "MLP out",
    "pooler": "pooler",
}


def kind_of(layer: str) -> str:
    return next(kind for part, kind in KINDS.items() if part in layer)


def basis(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns; none for zeros."""
    U, sigma, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    return U[:, sigma > 1e-9 * sigma[:1].clamp(min=1e-300)] if columns.any() else U[:, :0]


def seen(model: Any, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """{kind of layer: means of the four numbers}."""
    rows: dict[str, list[list[float]]] = {}
    for pair in find_pairs(model):
        U, sigma, V = (state[f"{pair.name}.{key}"].double() for key in ("U", "sigma", "V"))
        row = []
        for X, columns in ((U, pair.B.detach()), (V, pair.A.detach().mT)):
            inside = basis(columns).mT @ X  # (rank, 8)
            share = float(inside.square().sum()) / X.shape[1]
            energy = float((inside * sigma).square().sum() / sigma.square().sum())
            row += [math.sqrt(max(0.0, 1 - share)), energy]
        rows.setdefault(kind_of(pair.name), []).append(row)
    names = ("left distance", "left energy", "right distance", "right energy")
    return {
        kind: dict(zip(names, torch.tensor(some).mean(0).tolist(), strict=True))
        for kind, some in rows.items()
    }


def curves(task: Task, method: str, lr: float, state: dict[str, Tensor]) -> dict[str, Any]:
    """What is seen at every fifth step; fills the state from the first run's model."""
    found: dict[int, Any] = {}

    def watch(step: int, model: Any, first: list[Any]) -> None:
        if not state:
            state.update(geolora.get_lora_one_state(model, first, tolerance=0.0))
        if step % EVERY == 0:
            found[step] = seen(model, state)

    run = one(task, METHODS[method], lr, 0, None, watch)
    return {"seen": found, "held_out_loss": run["held_out_loss"], "score": run["score"]}


def figure(results: dict[str, Any]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained", sharex=True)
    for row, method in zip(axes, ("lora", "lora-one"), strict=True):
        by_step = results[method]["seen"]
        for axis, side in zip(row, ("left", "right"), strict=True):
            for kind in next(iter(by_step.values())):
                values = [at[kind][f"{side} distance"] for at in by_step.values()]
                axis.plot([int(step) for step in by_step], values, label=kind)
            axis.set_ylim(0, 1.03)
            axis.set_title(f"{method}: {'columns of B' if side == 'left' else 'rows of A'}")
    axes[0][0].legend(fontsize="small", ncols=2)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel("distance from G's first 8")
    drawn.savefig(FIGURES / f"{NAME}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    columns, metric, _, rows = GLUE["mrpc"]
    GLUE["mrpc"] = columns, metric, arguments.steps, rows
    task = task_of("mrpc", arguments.data)
    state: dict[str, Tensor] = {}
    results = {name: curves(task, name, arguments.lr, state) for name in ("lora", "lora-one")}
    for name, result in results.items():
        last = list(result["seen"].values())[-1]
        for kind, row in last.items():
            print(name, kind, {key: round(value, 3) for key, value in row.items()})
    write(NAME, results)
    figure(results)


if __name__ == "__main__":
    main()
