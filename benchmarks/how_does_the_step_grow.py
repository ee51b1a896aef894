"""What does the optimizer's step alone cost on pairs shaped like real models, and how does it grow?

    python benchmarks/how_does_the_step_grow.py [--threads 2] [--device cpu|cuda] [--seconds 12] [--shapes minilm ...]

Pairs of the shapes of MiniLM, BERT-base (ViT-B has the same), Llama-3.2-1B, Llama-2-7B and a layer of 64 experts,
without base weights; gradients are random numbers that change sign and shrink from step to step. All
contestants of one shape stand in one process and take turns, in an order that rotates; every quotient is
taken within a round; medians and quartiles. Shapes with few numbers go through ranks 4 to 128.

The floor is bytes on paper: what a step must read and write once. For AdamW p, g, m, v and p, m, v; for GeoLoRA
g, U, V, K, L and U, V, K, L, A, B. "of floor" is the time over that of these bytes at the speed at which fused AdamW
moves its own. Calls are torch's operators dispatched from Python (CUDA: kernels launched).

LoRA-SB and RAC-LoRA are left out: they want a start from data, and their steps are AdamW's on less.
"textbook" is the step of arXiv 2410.18720 layer by layer: QR of [U | K] and [V | L], SVD of the 2r x 2r core.

"as found": the same 16 slots, with the ranks that training on SST-2 gave MiniLM's layers (results/five_tasks,
seed 0), dealt out in a fixed random order: 1 to 9, 3.3 in the mean, on MiniLM, whose pairs here are without the
pooler; 1 to 15, 3.6 in the mean, with the pooler's, on 7B. The others train 16.

Then: growth with layers, width and rank (fitted exponents of the largest three); the defect of orthonormality after
10,000 steps in float32; the step of float32 factors against the one of float64 factors over 1,000 steps.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from record import FIGURES, RESULTS, write
from torch import Tensor, nn

import geolora
from geolora.pairs.find import find_pairs

Shapes = list[tuple[int, int]]
"""(d_out, d_in) of every pair."""
SHAPES: dict[str, Shapes] = {
    "minilm": [(384, 384)] * 24 + [(1536, 384)] * 6 + [(384, 1536)] * 6,
    "bert": [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12,
    "llama-1b": ([(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)]) * 16,
    "llama-7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]) * 32,
    "64 experts": [(1408, 2048)] * 128 + [(2048, 1408)] * 64,
}
RANKS = {"minilm": (4, 8, 16, 32, 64, 128)}
AS_FOUND = ("minilm", "llama-7b")
LONG = 6e7
"""Numbers in the factors from which only a few contestants take part, for memory."""


def found_ranks(count: int) -> list[int]:
    """Ranks of as many layers, as training found them."""
    run = RESULTS / "five_tasks" / "runs" / "sst2" / "geolora" / "lr-default" / "seed-0.json"
    ranks = sorted(json.loads(run.read_text())["report"]["ranks"].values())
    dealt = [ranks[i % len(ranks)] for i in range(count)]
    random.Random(0).shuffle(dealt)
    return dealt


def model_of(shapes: Shapes, ranks: list[int], r: int, device: str) -> nn.Module:
    """Pairs of PEFT over linear layers without data, of these ranks in r slots."""
    with torch.device("meta"):
        base = nn.ModuleList([nn.Linear(d_in, d_out, bias=False) for d_out, d_in in shapes])
    base.forward = lambda x: x  # type: ignore[method-assign]
    names = [str(i) for i in range(len(shapes))]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=names)
    model = get_peft_model(base, config, low_cpu_mem_usage=True)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(0)
    numbers = {"A": iter(ranks), "B": iter(ranks)}
    for name, module in model.named_modules():
        if "lora_A.default" in name or "lora_B.default" in name:
            shape, side = module.weight.shape, name.split("lora_")[1][0]
            start = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            rank = next(numbers[side])
            if side == "B" and rank == r:
                start = torch.zeros(shape)
            (start if side == "A" else start.mT)[rank:] = 0
            module.weight = nn.Parameter(start.to(device))
    return model


class Textbook(torch.optim.Optimizer):
    """GeoLoRA's step as on paper: one layer after the other, QR and SVD."""

    def __init__(self, model: nn.Module, lr: float = 1e-3) -> None:
        self.pairs = find_pairs(model)
        super().__init__([p for pair in self.pairs for p in (pair.A, pair.B)], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002
        lr = self.param_groups[0]["lr"]
        for pair in self.pairs:
            state = self.state[pair.A]
            if not state:
                V, _ = torch.linalg.qr(pair.A.mT)
                state["U"] = torch.linalg.qr(torch.randn_like(pair.B))[0]
                state["S"], state["V"] = torch.eye(pair.r, device=V.device) * 1e-3, V
            U, S, V = state["U"], state["S"], state["V"]
            root = S.diagonal().clamp(min=1e-12).sqrt()
            K, L = pair.B.grad / root, pair.A.grad.mT / root  # pyright: ignore
            left, _ = torch.linalg.qr(torch.cat([U, K], dim=1))
            right, _ = torch.linalg.qr(torch.cat([V, L], dim=1))
            at, to = left.mT @ U, V.mT @ right
            move = (left.mT @ K) @ to + at @ (L.mT @ right) - at @ (U.mT @ K) @ to
            P, values, Qt = torch.linalg.svd(at @ S @ to - lr * move)
            U, V = left @ P[:, : pair.r], right @ Qt.mT[:, : pair.r]
            state["U"], state["S"], state["V"] = U, values[: pair.r].diag(), V
            root = values[: pair.r].sqrt()
            pair.A.copy_((V * root).mT)
            pair.B.copy_(U * root)


def makers(device: str, **held: Any) -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    def adamw(**how: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda model: torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], 1e-3, **how
        )

    plain = {"foreach": False, "fused": False}
    return {
        "AdamW loop": adamw(**plain),
        "AdamW foreach": adamw(foreach=True),
        "AdamW fused": adamw(fused=True),
        "textbook": Textbook,
        "PEFT Riemannian": lambda model: create_riemannian_optimizer(
            model, torch.optim.AdamW, lr=1e-3, fused=device != "cpu"
        ),
        "GeoLoRA none": lambda model: geolora.GeoLoRA(model, moments="none", **held),
        "GeoLoRA momentum": lambda model: geolora.GeoLoRA(model, moments="momentum", **held),
        "GeoLoRA adaptive": lambda model: geolora.GeoLoRA(model, **held),
        "RiemannianAdamW": geolora.RiemannianAdamW,
        "LoRAPro": lambda model: geolora.LoRAPro(
            model, lr=1e-9
        ),  # a made-up gradient is no descent
    }


FEW = ("AdamW loop", "AdamW foreach", "AdamW fused", "textbook", "GeoLoRA none", "GeoLoRA adaptive")
MOVED = {"AdamW": 7, "GeoLoRA none": 7, "GeoLoRA momentum": 11, "GeoLoRA adaptive": 11}
"""Numbers read or written per number of A and B: g; U, V (K, L) twice; A and B."""


class Field:
    """All contestants of one shape, with the same gradients."""

    def __init__(
        self, shapes: Shapes, r: int, names: list[str], device: str, as_found: bool = False
    ) -> None:
        self.device = device
        made = makers(device, **{"tail": None} if as_found else {})
        ranks = found_ranks(len(shapes)) if as_found else [r] * len(shapes)
        self.models = {name: model_of(shapes, ranks, r, device) for name in names}
        first = [p for p in self.models[names[0]].parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(1)
        self.grads = [torch.randn(p.shape, generator=generator).to(device) * 1e-3 for p in first]
        self.trained = {}
        for name, model in self.models.items():
            self.trained[name] = [p for p in model.parameters() if p.requires_grad]
            for p in self.trained[name]:
                p.grad = torch.empty_like(p)
        self.numbers = sum(p.numel() for p in first)
        self.optimizers = {name: made[name](self.models[name]) for name in names}
        self.took: dict[str, list[float]] = {name: [] for name in names}

    def step(self, name: str) -> float:
        own = [p.grad for p in self.trained[name] if p.grad is not None]  # PEFT's writes into them
        torch._foreach_copy_(own, self.grads)  # pyright: ignore[reportPrivateImportUsage]
        if self.device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        self.optimizers[name].step()
        if self.device != "cpu":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    def round(self, number: int) -> None:
        """A step of every contestant, in an order that rotates."""
        names, turn = list(self.took), number % len(self.took)
        torch._foreach_mul_(self.grads, -0.9)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self.grads, 1e-4)  # pyright: ignore[reportPrivateImportUsage]
        for name in names[turn:] + names[:turn]:
            self.took[name].append(self.step(name))

    def calls(self, name: str) -> dict[str, int]:
        """Operators dispatched in a step; on CUDA also kernels and waits of the host."""
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.device != "cpu":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as seen:
            self.step(name)
        events = seen.events() or []
        counted = {
            "operators": sum(
                e.name.startswith("aten::") and not str(getattr(e.cpu_parent, "name", "")).startswith("aten::")
                for e in events
            )
        }  # fmt: skip
        if self.device != "cpu":
            names = [e.name for e in events]
            counted["kernels"] = names.count("cudaLaunchKernel")
            counted["host waits"] = names.count("cudaStreamSynchronize") - 1  # our own is one
        return counted


def compete(fields: list[Field], seconds: float) -> None:
    """Take turns for some seconds; the first rounds, in which states are made and ranks judged, do not count."""
    number, end = 0, time.perf_counter() + seconds
    while number < 18 or time.perf_counter() < end:
        for field in fields:
            field.round(number)
        number += 1
    for field in fields:
        field.took = {name: times[6:] for name, times in field.took.items()}


def spread(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [round(v, 4) for v in quantiles(values, n=4)]


def measure(
    name: str, r: int, device: str, seconds: float, as_found: bool = False
) -> dict[str, Any]:
    shapes = SHAPES[name]
    numbers = r * sum(map(sum, shapes))
    few = numbers > LONG / 2 or as_found
    field = Field(shapes, r, list(FEW if few else makers(device)), device, as_found)
    compete([field], seconds)
    rows: dict[str, Any] = {}
    speed = 28 * field.numbers / (median(field.took["AdamW fused"]) / 1e3)  # bytes per second
    for who, times in field.took.items():
        row: dict[str, Any] = {"ms": spread(times)}
        for peer in ("AdamW loop", "AdamW fused", "textbook"):
            row[f"/ {peer}"] = spread([a / b for a, b in zip(times, field.took[peer], strict=True)])
        moved = next((count for key, count in MOVED.items() if who.startswith(key)), None)
        if moved and not as_found:
            floor = 4e3 * moved * field.numbers / speed
            row["floor_ms"], row["of floor"] = round(floor, 3), round(median(times) / floor, 2)
        rows[who] = row | field.calls(who)
    return {"pairs": len(shapes), "numbers": field.numbers, "rounds": len(times), "rows": rows}


def growth(device: str) -> dict[str, Any]:
    """ms of GeoLoRA's step as one of layers, width and rank grows, and the exponent of the last three."""
    import math

    found: dict[str, Any] = {}
    for what, values, shape in (
        ("layers", (36, 72, 144, 288), lambda n: ([(384, 384)] * n, 8)),
        ("width", (1024, 2048, 4096, 8192), lambda d: ([(d, d)] * 16, 16)),
        ("rank", (16, 32, 64, 128), lambda r: ([(1024, 1024)] * 16, r)),
    ):
        fields = [Field(*shape(value), ["GeoLoRA adaptive"], device) for value in values]
        compete(fields, 16.0)
        times = [median(field.took["GeoLoRA adaptive"]) for field in fields]
        x, y = [math.log(v) for v in values[-3:]], [math.log(t) for t in times[-3:]]
        mx, my = sum(x) / 3, sum(y) / 3
        slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
            (a - mx) ** 2 for a in x
        )
        found[what] = {
            "at": values,
            "ms": [round(t, 3) for t in times],
            "exponent": round(slope, 3),
        }
    return found


class Small(nn.Module):
    """Two layers of one shape and one of another, to be fitted to a made-up map."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48, bias=False), nn.Linear(48, 48, bias=False)
        self.last = nn.Linear(48, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def small(dtype: torch.dtype, **settings: Any) -> tuple[Any, torch.optim.Optimizer, Callable]:
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["first", "second", "last"])
    model = get_peft_model(Small().double(), config, autocast_adapter_dtype=False).to(dtype)  # pyright: ignore
    x, y = torch.randn(64, 48).double(), torch.randn(64, 16).double()

    def loss() -> Tensor:
        return (model(x.to(dtype)) - y.to(dtype)).square().mean()

    return model, geolora.GeoLoRA(model, **settings), loss


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def products(model: nn.Module) -> Tensor:
    return torch.cat(
        [(p.scale * p.B.double() @ p.A.double()).flatten() for p in find_pairs(model)]
    ).detach()


def accuracy(steps: int = 1000) -> dict[str, Any]:
    """||dW - dW of float64 factors|| / ||dW|| on the way, ranks held; the float64 step is the one the tests hold to the paper."""
    found = {}
    for name, settings in {
        "none": {"moments": "none", "lr": 0.1},
        "momentum": {"moments": "momentum", "lr": 0.02},
        "adaptive, lr 1e-4": {"lr": 1e-4},
        "adaptive, lr 1e-3": {"lr": 1e-3},
    }.items():
        pair = [small(dtype, tail=None, **settings) for dtype in (torch.float32, torch.float64)]
        gaps = {}
        for at in (1, 10, 100, steps):
            for _, optimizer, loss in pair:
                train(optimizer, loss, at - (max(gaps) if gaps else 0))
            short, exact = (products(model) for model, *_ in pair)
            gaps[at] = float((short - exact).norm() / exact.norm())
        found[name] = gaps
    return found


def orthonormality(steps: int = 10_000) -> dict[str, float]:
    """max|U^T U - 1| over all bases in use, float32, after many steps at the default."""
    found = {}
    for moments in ("none", "adaptive"):
        _, optimizer, loss = small(torch.float32, moments=moments)
        train(optimizer, loss, steps)
        worst = 0.0
        for state in optimizer.state.values():
            for key in ("U", "V"):
                if key in state:
                    X = state[key].double()
                    there = X.norm(dim=-2) > 0
                    gram = X.mT @ X - torch.diag_embed(there.double())
                    worst = max(worst, float(gram.abs().max()))
        found[moments] = worst
    return found


def figure(results: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4), layout="constrained")
    left, right = drawn.subplots(1, 2)
    ranks = [key for key in results["shapes"] if key.startswith("minilm, r")]
    for who in ("AdamW loop", "AdamW fused", "textbook", "PEFT Riemannian", "GeoLoRA none", "GeoLoRA adaptive"):  # fmt: skip
        points = [(int(k.split("r = ")[1]), results["shapes"][k]["rows"][who]["ms"][1]) for k in ranks]  # fmt: skip
        left.loglog(*zip(*points, strict=True), "o-", label=who)
    left.set_xlabel("rank")
    left.set_ylabel("ms")
    left.set_title("MiniLM, 36 pairs")
    left.legend(fontsize=7)
    for what, row in results["growth"].items():
        base = row["at"][0]
        right.loglog([v / base for v in row["at"]], [t / row["ms"][0] for t in row["ms"]], "o-", label=f"{what}: exponent {row['exponent']:.2f}")  # fmt: skip
    right.set_xlabel("times as many, as wide, as high a rank")
    right.set_title("GeoLoRA adaptive, times as long")
    right.legend(fontsize=8)
    drawn.savefig(FIGURES / "how_does_the_step_grow.png", dpi=150)


def table(shapes: dict[str, Any]) -> None:
    print(
        f"{'':18}{'':18}{'ms':>9}{'/ loop':>8}{'/ fused':>9}{'/ textbook':>11}{'of floor':>9}{'calls':>7}"
    )
    for shape, result in shapes.items():
        for who, row in result["rows"].items():
            print(
                f"{shape:18}{who:18}{row['ms'][1]:9.2f}{row['/ AdamW loop'][1]:8.2f}"
                f"{row['/ AdamW fused'][1]:9.2f}{row['/ textbook'][1]:11.3f}"
                f"{row.get('of floor', ''):>9}{row.get('kernels', row['operators']):7}"
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=12.0, help="for each shape and rank")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device
    results: dict[str, Any] = {"device": device, "shapes": {}}
    for name in arguments.shapes:
        for r in RANKS.get(name, (16,)):
            key = f"{name}, r = {r}"
            results["shapes"][key] = measure(name, r, device, arguments.seconds)
            table({key: results["shapes"][key]})
        if name in AS_FOUND:
            key = f"{name}, as found"
            results["shapes"][key] = measure(name, 16, device, arguments.seconds, as_found=True)
            table({key: results["shapes"][key]})
    results["growth"] = growth(device)
    results["orthonormality after 10,000 steps, float32"] = orthonormality()
    results["float32 against float64"] = accuracy()
    if set(arguments.shapes) == set(SHAPES):
        figure(results)
        print(write("how_does_the_step_grow", results))
    print()
    table(results["shapes"])
    for what in list(results)[2:]:
        print(what, results[what])


if __name__ == "__main__":
    main()
