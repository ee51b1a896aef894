"""What do RiemannianAdamW and LoRA-Pro cost, against PEFT's Riemannian optimizer and AdamW?

    python benchmarks/what_do_the_relatives_cost.py [--rounds 30] [--threads 2] [--ranks 8 16]

As what_does_a_step_cost.py: MiniLM, pairs on 36 linear layers, 16 x 64 random tokens, all contestants in one
process, one training step of each in every round, medians over rounds of quotients taken within a round. The step
is the optimizer's alone, after a backward pass. State in bytes after the last round, over that of AdamW.
"""

import argparse
from typing import Any

import torch
from peft import LoraConfig
from peft.optimizers import create_riemannian_optimizer
from record import write
from what_does_a_step_cost import TARGETS, WARM_UP, Contestant, adapted, spread, take_turns

import geolora


def contestants(r: int) -> dict[str, Contestant]:
    made: dict[str, Contestant] = {}
    for name in (
        "AdamW loop",
        "AdamW fused",
        "PEFT loop",
        "PEFT fused",
        "riemannian",
        "tangent",
        "full",
    ):
        model = adapted(LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))
        fused = name.endswith("fused")
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer
        if name.startswith("AdamW"):
            optimizer = torch.optim.AdamW(trained, 1e-3, foreach=False, fused=fused)
        elif name.startswith("PEFT"):
            how = {"foreach": False, "fused": fused}
            optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-3, **how)
        elif name == "riemannian":
            optimizer = geolora.RiemannianAdamW(model)
        else:
            optimizer = geolora.LoRAPro(model, moments=name)
        made[name] = Contestant(model, optimizer)
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = (v for state in optimizer.state.values() for v in state.values())
    return sum(v.numel() * v.element_size() for v in tensors if isinstance(v, torch.Tensor))


def measure(r: int, rounds: int) -> dict[str, Any]:
    field = contestants(r)
    names = list(field)
    taken, _ = take_turns(field, rounds)
    results = {}
    for name in names:
        row: dict[str, Any] = {"step_ms": spread([step for step, _ in taken[name][WARM_UP:]])}
        for place, what, peer in (
            (0, "step", "AdamW loop"),
            (0, "step", "PEFT loop"),
            (0, "step", "PEFT fused"),
            (1, "whole", "AdamW fused"),
        ):
            both = zip(taken[name][WARM_UP:], taken[peer][WARM_UP:], strict=True)
            row[f"{what} / {peer}"] = spread([mine[place] / theirs[place] for mine, theirs in both])
        row["state / AdamW's"] = state_bytes(field[name].optimizer) / state_bytes(
            field["AdamW loop"].optimizer
        )
        results[name] = row
        print(r, name, row, flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = {f"r = {r}": measure(r, arguments.rounds) for r in arguments.ranks}
    print(write("what_do_the_relatives_cost", results))


if __name__ == "__main__":
    main()
