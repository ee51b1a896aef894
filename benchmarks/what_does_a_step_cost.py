"""What does a training step with GeoLoRA cost, against LoRA with AdamW and against AdaLoRA?

    python benchmarks/what_does_a_step_cost.py [--rounds 75] [--threads 2] [--ranks 8 16]

MiniLM (22.7 million parameters), pairs on all 36 linear layers of its encoder, float32, batches of 16 texts of
64 random tokens, a frozen random head of two classes. One process holds all models; a round takes one
training step of each, in an order that rotates, and every number is the median over rounds of a
quotient taken within a round. Rounds are whole cycles of 25 steps, so GeoLoRA's growing and
judging steps are in; before them every contestant takes three steps that are not counted.

"step" is the optimizer's step alone, cold after the backward pass, as in training; for AdaLoRA with its
allocator, which PEFT asks to be called after it. "whole" adds forward, backward and zero_grad.

AdaLoRA is measured twice: with PEFT's own proportion (12 slots for a target of 8, here 1.5 r for r), and with
the same r slots as the others (for a target of 2 r / 3). It allocates at every tenth step.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from record import write
from torch import Tensor, nn

import geolora
from geolora.cli.demo import model_folder
from geolora.optim.geolora_step.rank_cycle import phase_of
from geolora.pairs.find import find_pairs

CYCLE, WARM_UP = 25, 3
TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
BASELINES = ("LoRA, AdamW loop", "LoRA, AdamW fused", "AdaLoRA, 1.5 r slots", "AdaLoRA, r slots")


class Contestant(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    after: Callable[[int], None] | None = None
    """Called with the number of the step after every step of the optimizer."""


def adapted(config: LoraConfig) -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    return get_peft_model(base, config)


def contestants(r: int, steps: int) -> dict[str, Contestant]:
    """Every contestant by name, each with its own model."""

    def lora() -> Any:
        return adapted(LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))

    def adamw(model: nn.Module, **how: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3, **how)

    def adalora(slots: int, target: int) -> Contestant:
        settings = {"init_r": slots, "target_r": target, "lora_alpha": slots, "deltaT": 10}
        model = adapted(AdaLoraConfig(**settings, target_modules=TARGETS, total_step=steps))  # pyright: ignore[reportArgumentType]
        return Contestant(model, adamw(model, fused=True), model.base_model.update_and_allocate)

    made: dict[str, Contestant] = {}
    for name, how in (
        ("loop", {"foreach": False, "fused": False}),
        ("foreach", {"foreach": True}),
        ("fused", {"fused": True}),
    ):
        model = lora()
        made[f"LoRA, AdamW {name}"] = Contestant(model, adamw(model, **how))
    made["AdaLoRA, 1.5 r slots"] = adalora(3 * r // 2, r)
    made["AdaLoRA, r slots"] = adalora(r, 2 * r // 3)
    model = lora()
    riemannian = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3, fused=True)
    made["LoRA, PEFT Riemannian"] = Contestant(model, riemannian)
    for moments in ("none", "momentum", "adaptive"):
        model = lora()
        made[f"GeoLoRA, {moments}"] = Contestant(model, geolora.GeoLoRA(model, moments=moments))
    model = lora()
    half = sum(pair.A.numel() + pair.B.numel() for pair in find_pairs(model)) // 2
    once = geolora.GeoLoRA(model, budget=half, settle_after=1)
    made["GeoLoRA, half held"] = Contestant(model, once)
    return made


def one_step(one: Contestant, number: int, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Milliseconds of the optimizer's step alone, and of the whole training step."""
    begin = time.perf_counter()
    one.model(input_ids=tokens, labels=labels).loss.backward()
    middle = time.perf_counter()
    one.optimizer.step()
    if one.after:
        one.after(number)
    stepped = time.perf_counter()
    one.optimizer.zero_grad()
    return 1e3 * (stepped - middle), 1e3 * (time.perf_counter() - begin)


def phase(one: Contestant) -> str:
    group = one.optimizer.param_groups[0]
    return phase_of(group) if "prune_every" in group else "every"


def spread(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(value, 4) for value in (low, middle, high)]


def take_turns(
    field: dict[str, Contestant], rounds: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[str]]]:
    """Times of all steps of every contestant, and the phases they were in; warm-up included."""
    names = list(field)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    phases: dict[str, list[str]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + WARM_UP):
        tokens = torch.randint(1000, 30000, (16, 64), generator=generator)
        labels = torch.randint(0, 2, (16,), generator=generator)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            phases[name].append(phase(field[name]))
            taken[name].append(one_step(field[name], number, tokens, labels))
    return taken, phases


def measure(r: int, rounds: int) -> dict[str, Any]:
    field = contestants(r, rounds + WARM_UP)
    names = list(field)
    taken, phases = take_turns(field, rounds)
    results: dict[str, Any] = {}
    for name in names:
        counted, when = taken[name][WARM_UP:], phases[name][WARM_UP:]
        row: dict[str, Any] = {}
        for index, what in enumerate(("step", "whole")):
            mine = [times[index] for times in counted]
            row[f"{what}_ms"] = spread(mine)
            for peer in BASELINES:
                theirs = [times[index] for times in taken[peer][WARM_UP:]]
                quotients = [a / b for a, b in zip(mine, theirs, strict=True)]
                row[f"{what} / {peer}"] = spread(quotients)
        row["step_ms by phase"] = {
            kind: spread([times[0] for times, at in zip(counted, when, strict=True) if at == kind])
            for kind in sorted(set(when))
        }
        row["mean step_ms"] = round(sum(times[0] for times in counted) / len(counted), 4)
        row["steps by phase"] = {kind: when.count(kind) for kind in sorted(set(when))}
        results[name] = row
    return results


def table(r: int, results: dict[str, Any]) -> None:
    print(f"\nr = {r}: milliseconds and quotients, medians (lower to upper quartile)")
    print(
        f"{'':24}{'step ms':>9}{'/ loop':>8}{'':16}{'whole ms':>9}{'/ fused':>9}{'':16}{'/ AdaLoRA':>10}"
    )
    for name, row in results.items():
        step, whole = row["step / LoRA, AdamW loop"], row["whole / LoRA, AdamW fused"]
        print(
            f"{name:24}{row['step_ms'][1]:9.2f}{step[1]:8.2f} ({step[0]:5.2f} to {step[2]:5.2f})"
            f"{row['whole_ms'][1]:9.1f}{whole[1]:9.3f} ({whole[0]:.3f} to {whole[2]:.3f})"
            f"{row['whole / AdaLoRA, 1.5 r slots'][1]:8.3f}"
        )
    for name, row in results.items():
        if len(row["step_ms by phase"]) > 1:
            kinds = (f"{kind} {ms[1]:.2f}" for kind, ms in row["step_ms by phase"].items())
            print(f"{name:24}step ms: {', '.join(kinds)}; mean {row['mean step_ms']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3 * CYCLE, help="paired steps, whole cycles")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    arguments = parser.parse_args()
    if arguments.rounds % CYCLE:
        parser.error(f"--rounds must be a multiple of {CYCLE}; got {arguments.rounds}")
    torch.set_num_threads(arguments.threads)
    results = {}
    for r in arguments.ranks:
        results[f"r = {r}"] = measure(r, arguments.rounds)
        table(r, results[f"r = {r}"])
        sys.stdout.flush()  # the next rank takes minutes
    print(write("what_does_a_step_cost", results))


if __name__ == "__main__":
    main()
