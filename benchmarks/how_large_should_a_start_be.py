"""How large should LoRA-One's start be, and does the loss of its own batches tell?

    python benchmarks/how_large_should_a_start_be.py DATA --tasks sst2 cola mrpc babyllama stories260K

Models and rows as in does_a_start_help.py, rank 8. Change of the mean loss from before the start, on the rows of the
gradient and on held-back training rows, for norms from 0.0016 to 0.8. Layers alike (`alike`, the paper's), each in
GeoLoRA's unit of a step (`unit`), or also in proportion to its gradient (`unit, shared`). `found` is the norm that the
library takes.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from does_a_start_help import METHODS, adapted, first_of, look_at, task_of
from record import RESULTS, write

import geolora
from geolora.methods import lora_one
from geolora.pairs.find import Pair, find_pairs

NAME = "how_large_should_a_start_be"
NORMS = [0.05 * 2.0**power for power in range(-5, 5)]


def shapes_of(
    model: Any, pairs: list[Pair], state: dict[str, Any]
) -> dict[str, Callable[[Pair], float]]:
    """How large a layer's part is, at norm 1."""
    units = {
        name: float(group["unit"])
        for group in geolora.GeoLoRA(model).param_groups
        if group["kind"] != "rest"
        for name in group["layers"]
    }
    forces = {
        pair.name: units[pair.name] * float(state[f"{pair.name}.sigma"].norm()) for pair in pairs
    }
    middle = math.sqrt(sum(force**2 for force in forces.values()) / len(forces))
    return {
        "alike": lambda _: 1.0,
        "unit": lambda pair: units[pair.name],
        "unit, shared": lambda pair: units[pair.name] * forces[pair.name] / middle,
    }


def changes(task: Any, seed: int) -> dict[str, Any]:
    first = first_of(task.train(seed))
    model, _ = adapted(task, METHODS["lora"], seed, first, None)
    state = geolora.get_lora_one_state(model, first)
    pairs = find_pairs(model)

    def losses() -> tuple[float, float]:
        return look_at(model, first)[0], look_at(model, task.held_back)[0]

    def less(now: tuple[float, float]) -> list[float]:
        return [round(a - b, 5) for a, b in zip(now, before, strict=True)]

    @torch.no_grad()
    def write_start(size: Callable[[Pair], float], norm: float) -> None:
        for pair in pairs:
            triplets = (state[f"{pair.name}.{key}"] for key in ("U", "sigma", "V"))
            U, sigma, V = lora_one.start(*triplets, norm * size(pair))
            pair.A.copy_(V.mT / pair.scale)
            pair.B.copy_(U * sigma)

    before = losses()
    found: dict[str, Any] = {"before": before}
    for name, size in shapes_of(model, pairs, state).items():
        row = {}
        for norm in NORMS:
            write_start(size, norm)
            row[norm] = less(losses())
        found[name] = row
    with torch.no_grad():
        for pair in pairs:
            pair.B.zero_()
    start = geolora.initialize_lora_one(model, first, state=state)
    return {**found, "found": {"norm": start.norm, "change": less(losses())}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in arguments.tasks:
        task = task_of(name, arguments.data)
        for seed in arguments.seeds:
            results[f"{name}/{seed}"] = changes(task, seed)
            print(name, seed, results[f"{name}/{seed}"], flush=True)
            write(NAME, results)


if __name__ == "__main__":
    main()
