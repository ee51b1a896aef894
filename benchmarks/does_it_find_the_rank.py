"""Does GeoLoRA find the rank of a matrix, from every start? (Fig. 5 of arXiv 2410.18720, and more.)

    python benchmarks/does_it_find_the_rank.py

Four questions, one JSON file and one figure:
1. Regression on a target of rank 5: ½||W - W*||², n = 20, 100, 500, start ranks 1, 2, 10, steps
   0.1, 0.5, 1, 600 steps, through a real PEFT layer in float64 and float32.
2. The same with plain LoRA, AdamW and gradient descent, each at the best of a grid of step sizes, and
   with an AdaLoRA-style run (P Λ Q with an orthogonality penalty, cut to a budget by |λ|).
3. Matrix completion: only some of the entries are seen.
4. How far is a low-rank path from the full gradient path?
The paper does not give matrix size and target rank; these are ours.
"""

import itertools
import warnings

import torch
from peft import LoraConfig, get_peft_model
from record import FIGURES, write
from torch import Tensor, nn

import geolora

STEPS = 600
TARGET_RANK = 5
R = 20
COMPLETIONS = {
    "held at rank 5": {"start_rank": 5, "tail": None},
    "held at rank 8": {"start_rank": 8, "tail": None},
    "tail 0.1, cycle of 6": {"start_rank": 2, "tail": 0.1, "prune_every": 6},
    "tail 0.1, cycle of 25": {"start_rank": 2, "tail": 0.1, "prune_every": 25},
    "tail 0.2, cycle of 25": {"start_rank": 2, "tail": 0.2, "prune_every": 25},
}


def target(n: int, rank: int = TARGET_RANK, seed: int = 0) -> Tensor:
    """A random (n, n) matrix of that rank and norm 1, singular values 1, 1/2, 1/3, …"""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, rank, generator=generator, dtype=torch.float64) for _ in "uv"]
    U, V = (torch.linalg.qr(side)[0] for side in sides)
    return (U / torch.arange(1, rank + 1)) @ V.mT


class Layer:
    """A PEFT LoRA layer of (n, n) over a zero weight."""

    def __init__(self, n: int, r: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(n, n, bias=False)).to(dtype)
        config = LoraConfig(r=r, lora_alpha=r, target_modules=["0"])
        self.model = get_peft_model(base, config, autocast_adapter_dtype=False)
        layer = self.model.base_model.model[0]
        self.A, self.B = layer.lora_A["default"].weight, layer.lora_B["default"].weight

    @property
    def W(self) -> Tensor:
        return self.B @ self.A


def relative(W: Tensor, wanted: Tensor) -> float:
    return float((W.detach().double() - wanted).norm() / wanted.norm())


def train(layer: Layer, optimizer: torch.optim.Optimizer, loss, steps: int = STEPS):
    """Descend a loss of W; yields W after every step."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss(layer.W).backward()
        optimizer.step()
        yield layer.W.detach()


def regression(n: int, start: int, lr: float, dtype: torch.dtype) -> dict:
    """One GeoLoRA run: errors and settled ranks along the way, and where it ended."""
    layer, wanted = Layer(n, R, dtype), target(n)
    goal = wanted.to(dtype)
    optimizer = geolora.GeoLoRA(
        layer.model, lr=lr, moments="none", start_rank=start, tail=1e-3, prune_every=25
    )
    errors, ranks = [], []
    for W in train(layer, optimizer, lambda W: 0.5 * (W - goal).square().sum()):
        errors.append(relative(W, wanted))
        ranks.append(optimizer.settled_ranks()["0"])
    return {
        "n": n, "start_rank": start, "lr": lr, "dtype": str(dtype).removeprefix("torch."),
        "error": errors[-1], "rank": ranks[-1], "last_100_at_5": ranks[-100:].count(TARGET_RANK),
        "errors": thin(errors), "ranks": thin(ranks),
        "reached": bool(errors[-1] <= 1e-5 and ranks[-1] == TARGET_RANK),
    }  # fmt: skip


def thin(values: list) -> list:
    """Every tenth value and the last, to four digits."""
    kept = [*values[::10], values[-1]]
    return [float(f"{v:.4g}") if isinstance(v, float) else v for v in kept]


def floored(values: list[float]) -> list[float]:
    return [max(value, 1e-16) for value in values]


def lora(n: int, r: int, name: str, lr: float) -> list[float]:
    layer, wanted = Layer(n, r), target(n)
    kind = {"adamw": torch.optim.AdamW, "gd": torch.optim.SGD}[name]
    extra = {"weight_decay": 0.0} if name == "adamw" else {}
    optimizer = kind([layer.A, layer.B], lr=lr, **extra)
    loss = train(layer, optimizer, lambda W: 0.5 * (W - wanted).square().sum())
    return [relative(W, wanted) for W in loss]


def adalora_style(n: int, r: int, lr: float, budget: int) -> tuple[list[float], list[int]]:
    """W = P Λ Q, AdamW, orthogonality penalty 0.5; from step 100 to 300 cut to a budget by |λ|."""
    torch.manual_seed(0)
    wanted = target(n)
    P, Q = ((torch.randn(n, r).double() / n**0.5).requires_grad_() for _ in "pq")
    lam = torch.zeros(r, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([P, lam, Q], lr=lr, weight_decay=0.0)
    eye = torch.eye(r, dtype=torch.float64)
    errors, ranks = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        W = (P * lam) @ Q.mT
        penalty = (P.mT @ P - eye).square().sum() + (Q.mT @ Q - eye).square().sum()
        (0.5 * (W - wanted).square().sum() + 0.5 * penalty).backward()
        optimizer.step()
        left = min(1.0, max(0.0, (300 - step) / 200))
        keep = round(budget + (r - budget) * left**3)
        with torch.no_grad():
            lam[lam.abs().argsort(descending=True)[keep:]] = 0.0
        errors.append(relative((P * lam) @ Q.mT, wanted))
        ranks.append(int((lam != 0).sum()))
    return errors, ranks


def best(runs: dict[float, list[float]]) -> dict:
    """The step size with the smallest final error, and all final errors."""
    finals = {lr: errors[-1] for lr, errors in runs.items()}
    lr = min(finals, key=lambda key: finals[key] if finals[key] == finals[key] else 1e9)
    return {"lr": lr, "error": finals[lr], "errors": thin(runs[lr]), "grid": finals}


def baselines(n: int = 100) -> dict:
    grid = {"adamw": (3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0), "gd": (0.1, 0.3, 1.0, 3.0, 10.0)}
    result = {}
    for name, r in itertools.product(grid, (2, 5, 10)):
        result[f"lora_{name}_r{r}"] = best({lr: lora(n, r, name, lr) for lr in grid[name]})
    for budget in (2, 5, 8):
        runs = {lr: adalora_style(n, 10, lr, budget) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 0.1)}
        entry = best({lr: errors for lr, (errors, _) in runs.items()})
        ranks = runs[entry["lr"]][1]
        result[f"adalora_style_budget{budget}"] = {**entry, "ranks": thin(ranks), "rank": ranks[-1]}
    return result


def completion(n: int = 100, seen: float = 0.4, steps: int = 1500) -> dict:
    """Only a share of the entries is seen; the error counts all of them."""
    wanted = target(n)
    generator = torch.Generator().manual_seed(1)
    mask = (torch.rand(n, n, generator=generator) < seen).double()

    def loss(W: Tensor) -> Tensor:
        return 0.5 * (mask * (W - wanted)).square().sum() / seen

    runs = {}
    for name, settings in COMPLETIONS.items():
        layer = Layer(n, R)
        # the loss is 1 / seen = 2.5-smooth: above 0.8 nothing is stable
        optimizer = geolora.GeoLoRA(layer.model, lr=0.6, moments="none", **settings)
        errors = [relative(W, wanted) for W in train(layer, optimizer, loss, steps)]
        rank = optimizer.settled_ranks()["0"]
        runs[name] = {"error": errors[-1], "rank": rank, "errors": thin(errors)}
    adamw = {}
    for r, lr in itertools.product((5, R), (1e-3, 3e-3, 1e-2, 3e-2, 0.1)):
        layer = Layer(n, r)
        optimizer = torch.optim.AdamW([layer.A, layer.B], lr=lr, weight_decay=0.0)
        adamw[r, lr] = [relative(W, wanted) for W in train(layer, optimizer, loss, steps)]
    by_rank = {
        f"lora_adamw_r{r}": best({lr: e for (rr, lr), e in adamw.items() if rr == r})
        for r in (5, R)
    }
    return {"seen": seen, "steps": steps, "geolora": runs, **by_rank}


def gradient_path(n: int = 100, steps: int = 200, lr: float = 0.05) -> dict:
    """Distance of W(t) to full gradient descent at the same lr, relative to ||W*||."""
    wanted = target(n, rank=10)
    full, path = torch.zeros(n, n, dtype=torch.float64), []
    for _ in range(steps):
        full = full - lr * (full - wanted)
        path.append(full)

    def distances(layer: Layer, optimizer: torch.optim.Optimizer) -> list[float]:
        every = train(layer, optimizer, lambda W: 0.5 * (W - wanted).square().sum(), steps)
        return [float((W - F).norm() / wanted.norm()) for W, F in zip(every, path, strict=True)]

    result = {}
    for start in (1, 4, 10):
        layer = Layer(n, R)
        optimizer = geolora.GeoLoRA(
            layer.model, lr=lr, moments="none", start_rank=start, tail=1e-6, prune_every=25
        )
        result[f"geolora_start{start}"] = distances(layer, optimizer)
    for r in (10, R):
        grids = {}
        for factor in (1, 3, 10, 30, 100):
            layer = Layer(n, r)
            grids[lr * factor] = distances(
                layer, torch.optim.SGD([layer.A, layer.B], lr=lr * factor)
            )
        key = min(grids, key=lambda k: sum(grids[k]) if grids[k][-1] == grids[k][-1] else 1e9)
        result[f"lora_gd_r{r}"] = grids[key]
        result[f"lora_gd_r{r}_lr"] = key
    return result


def draw(results: dict) -> None:
    """One figure of six panels from the results alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8.5), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    steps = [*range(0, STEPS, 10), STEPS - 1]

    axes = panels[0]
    for run in results["regression"]:
        if run["n"] == 100 and run["dtype"] == "float64" and run["lr"] != 1.0:
            label = f"start rank {run['start_rank']}, step {run['lr']}"
            axes.semilogy(steps, floored(run["errors"]), label=label)
    axes.set_title("GeoLoRA, n = 100, target rank 5: relative error")

    axes = panels[1]
    for offset, run in enumerate(
        r for r in results["regression"] if r["n"] == 100 and r["lr"] == 0.1
    ):
        if run["dtype"] == "float64":
            axes.plot(
                steps,
                [k + 0.06 * offset for k in run["ranks"]],
                label=f"start rank {run['start_rank']}",
            )
    for name, run in results["baselines"].items():
        if name.startswith("adalora"):
            axes.plot(steps, run["ranks"], "--", label=name.replace("_", " "))
    axes.axhline(5, color="k", lw=0.5)
    axes.set_title("settled rank (GeoLoRA, step 0.1; AdaLoRA style)")

    axes = panels[2]
    for name, run in results["baselines"].items():
        style = "--" if name.startswith("adalora") else "-"
        label = f"{name.replace('_', ' ')}, lr {run['lr']:g}"
        axes.semilogy(steps, floored(run["errors"]), style, label=label)
    axes.set_title("LoRA and AdaLoRA style at their best lr: relative error")

    axes = panels[3]
    data = results["completion"]
    x = [*range(0, data["steps"], 10), data["steps"] - 1]
    for name, run in data["geolora"].items():
        axes.semilogy(x, run["errors"], label=f"GeoLoRA, {name}: rank {run['rank']}")
    for name in ("lora_adamw_r5", f"lora_adamw_r{R}"):
        axes.semilogy(
            x,
            data[name]["errors"],
            "--",
            label=f"{name.replace('_', ' ')}, lr {data[name]['lr']:g}",
        )
    axes.set_title(f"completion, {data['seen']:.0%} of the entries seen: error on all")

    axes = panels[4]
    for name, values in results["gradient_path"].items():
        if isinstance(values, list):
            axes.semilogy([max(v, 1e-16) for v in values], label=name.replace("_", " "))
    axes.set_title("distance to the full gradient path")

    axes = panels[5]
    worst = [(f"n={r['n']}, {r['start_rank']}, {r['lr']}", r) for r in results["regression"]]
    for dtype, mark in (("float64", "o"), ("float32", "x")):
        chosen = [(i, r["error"]) for i, (_, r) in enumerate(worst) if r["dtype"] == dtype]
        axes.semilogy([i % 27 for i, _ in chosen], [e for _, e in chosen], mark, label=dtype)
    axes.axhline(1e-5, color="k", lw=0.5)
    axes.set_title("final error of all 27 runs (n × start × step)")
    for axes in panels:
        axes.legend(fontsize="x-small")
        axes.set_xlabel("run" if axes is panels[5] else "step")
    figure.savefig(FIGURES / "does_it_find_the_rank.png", dpi=110)


def main() -> None:
    warnings.simplefilter("ignore", UserWarning)
    runs = [
        regression(n, start, lr, dtype)
        for dtype in (torch.float64, torch.float32)
        for n, start, lr in itertools.product((20, 100, 500), (1, 2, 10), (0.1, 0.5, 1.0))
    ]
    for dtype in ("float64", "float32"):
        chosen = [run for run in runs if run["dtype"] == dtype]
        print(dtype, sum(run["reached"] for run in chosen), "of", len(chosen), "reached, worst error",
              max(run["error"] for run in chosen))  # fmt: skip
    results = {
        "regression": runs,
        "baselines": baselines(),
        "completion": completion(),
        "gradient_path": gradient_path(),
    }
    for name, run in results["baselines"].items():
        print(f"{name:28} lr {run['lr']:<6g} error {run['error']:.2e}", run.get("rank", ""))
    for name, run in results["completion"]["geolora"].items():
        print("completion", name, f"{run['error']:.2e} rank {run['rank']}")
    for name in ("lora_adamw_r5", f"lora_adamw_r{R}"):
        print("completion", name, f"{results['completion'][name]['error']:.2e}")
    for name, values in results["gradient_path"].items():
        if isinstance(values, list):
            print("path", name, f"mean {sum(values) / len(values):.2e} last {values[-1]:.2e}")
    print(write("does_it_find_the_rank", results))
    draw(results)


if __name__ == "__main__":
    main()
