"""Is W of averaged factors the average of W: for moving averages, stochastic weight averaging and Lookahead?

    python benchmarks/do_averages_of_factors_mean_anything.py tinyshakespeare.txt.gz stories260K babyllama

A text file and folders of small causal models; runs as in do_small_llamas_learn_better.py. Every tool averages A and
B entry by entry, and W = B A is not linear in them. Beside the run, with the same steps:

    EMA         of decay 0.99, from the first step on
    SWA         the mean of the last quarter of the steps
    Lookahead   (1 - 1/2) A before + 1/2 A now, every 5 steps; the median and the largest error after warm-up

Errors are ||W of the averages - average of W|| / ||average of W|| over all layers. "sorted" writes every point as its
singular vectors, sorted, which is how GeoLoRA wrote its pairs before it turned slots to where they were. "Best"
is the error of the nearest W of the pair's rank: no pair can do better. The held-out loss is that at the SWA
average, of the factors and of W.
"""

import argparse
import gzip
import json
import math
from pathlib import Path
from statistics import median
from typing import Any

import torch
from do_small_llamas_learn_better import STEPS, adapted, batches, held_out_loss, tokens_of
from record import RESULTS, write
from torch import Tensor, nn

from geolora.methods import METHODS, resolve
from geolora.pairs.find import find_pairs
from geolora.pairs.point import read_pair, to_pair

NAME = "do_averages_of_factors_mean_anything"
DECAY, TAIL, EVERY = 0.99, 0.25, 5
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"lr": 1e-2}),
    "geolora": ("geolora", {}),
    "geolora, judged once": ("geolora", {"total_steps": STEPS}),
    "geolora, none": ("geolora", {"moments": "none"}),
    "geolora, momentum": ("geolora", {"moments": "momentum"}),
    "riemannian": ("riemannian", {"lr": 1e-2}),
    "lora-pro": ("lora-pro", {}),
    "lora-muon": ("lora-muon", {}),
}
Stack = list[Tensor]


def error(factors: Stack, W: Stack) -> float:
    """||B A - W|| / ||W|| over all layers, of [A1, B1, A2, B2, …]."""
    gaps = [
        (B @ A - w).square().sum() for A, B, w in zip(factors[::2], factors[1::2], W, strict=True)
    ]
    return math.sqrt(float(sum(gaps)) / float(sum(w.square().sum() for w in W)))


def lerp(before: Stack, now: Stack, weight: float) -> Stack:
    return [a.lerp(b, weight) for a, b in zip(before, now, strict=True)]


class Averages:
    """Of the factors, and of W, of a run."""

    def __init__(self) -> None:
        self.steps, self.taken = 0, 0
        self.ema: tuple[Stack, Stack] | None = None
        self.swa: tuple[Stack, Stack] | None = None
        self.anchor: tuple[Stack, Stack] | None = None
        self.lookahead: list[float] = []

    def add(self, factors: Stack) -> None:
        now = factors, [B @ A for A, B in zip(factors[::2], factors[1::2], strict=True)]
        self.steps += 1
        self.ema = self.ema or now
        self.ema = lerp(self.ema[0], now[0], 1 - DECAY), lerp(self.ema[1], now[1], 1 - DECAY)
        if self.steps > (1 - TAIL) * STEPS:
            self.taken += 1
            known, share = self.swa or now, 1 / self.taken
            self.swa = lerp(known[0], now[0], share), lerp(known[1], now[1], share)
        if self.steps % EVERY == 0:
            if self.anchor is not None and self.steps > 0.1 * STEPS:
                slow = [
                    lerp(before, after, 0.5) for before, after in zip(self.anchor, now, strict=True)
                ]
                self.lookahead.append(error(*slow))
            self.anchor = now

    def errors(self) -> dict[str, float]:
        assert self.ema is not None
        assert self.swa is not None
        found = {
            "EMA": error(*self.ema),
            "SWA": error(*self.swa),
            "Lookahead": median(self.lookahead),
            "Lookahead, largest": max(self.lookahead),
        }
        return {name: round(value, 5) for name, value in found.items()}


def sorted_pair(A: Tensor, B: Tensor) -> Stack:
    one, r = torch.tensor(1.0, dtype=A.dtype), torch.tensor(A.shape[0])
    reading = read_pair(A, B, 1.0)
    return [*to_pair(reading.U, reading.sigma, reading.V, one, r)]


def best_pair(W: Tensor, r: int) -> Stack:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    root = sigma[:r].sqrt()
    return [root[:, None] * Vt[:r], U[:, :r] * root]


@torch.no_grad()
def loss_at(model: nn.Module, factors: Stack, tokens: Tensor) -> float:
    for place, p in enumerate(q for pair in find_pairs(model) for q in (pair.A, pair.B)):
        p.copy_(factors[place])
    return round(held_out_loss(model, tokens), 4)


def one(folder: Path, parts: tuple[Tensor, Tensor], run: str, seed: int) -> dict[str, Any]:
    model = adapted(folder, seed)
    method, settings = RUNS[run]
    optimizer = resolve(METHODS[method].optimizer)(model, **settings)
    pairs = find_pairs(model)
    kept, by_sigma = Averages(), Averages()
    warm = round(0.06 * STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda at: (at + 1) / (warm + 1) if at < warm else (STEPS - at) / (STEPS - warm),
    )
    for rows in batches(parts[0], STEPS, seed):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        now = [p.detach().double() for pair in pairs for p in (pair.A, pair.B)]
        kept.add([p.clone() for p in now])
        if method == "geolora":
            by_sigma.add(
                [p for A, B in zip(now[::2], now[1::2], strict=True) for p in sorted_pair(A, B)]
            )
    assert kept.swa is not None
    best = [p for W, pair in zip(kept.swa[1], pairs, strict=True) for p in best_pair(W, pair.r)]
    result = {
        "errors": kept.errors(),
        "best, SWA": round(error(best, kept.swa[1]), 5),
        "held-out loss": {
            "last step": round(held_out_loss(model, parts[1]), 4),
            "SWA of factors": loss_at(model, kept.swa[0], parts[1]),
            "SWA of W": loss_at(model, best, parts[1]),
        },
    }
    if by_sigma.swa is not None:
        result["errors, sorted"] = by_sigma.errors()
        result["held-out loss"]["SWA of sorted factors"] = loss_at(model, by_sigma.swa[0], parts[1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path, help="text, .gz")
    parser.add_argument("models", type=Path, nargs="+", help="folders of causal models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given = parser.parse_args()
    text = gzip.decompress(given.text.read_bytes()).decode()
    path = RESULTS / f"{NAME}.json"
    runs = json.loads(path.read_text())["results"]["runs"] if path.exists() else {}
    for folder in given.models:
        parts = tokens_of(folder, text)
        for run in RUNS:
            for seed in given.seeds:
                key = f"{folder.name}/{run}/{seed}"
                if key not in runs:
                    runs[key] = one(folder, parts, run, seed)
                    print(key, runs[key], flush=True)
                    write(NAME, {"steps": STEPS, "runs": runs})


if __name__ == "__main__":
    main()
