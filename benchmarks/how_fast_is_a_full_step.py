"""How fast is a whole training step on models of real size, against LoRA with fused AdamW and against AdaLoRA?

    python benchmarks/how_fast_is_a_full_step.py --device cuda [--rounds 20]
    python benchmarks/how_fast_is_a_full_step.py --small          # the same on tiny models, on a CPU

A Llama of Llama-3.2-1B's shape (random weights, bf16, 4 x 1024 tokens) and ViT-B/16 (224 pixels, batches of 64), pairs
of rank 16 on all linear layers of the blocks, AdaLoRA with 24 slots for a target of 16. All contestants stand in one process
and take turns, in an order that rotates; medians of quotients taken within a round. Rounds are whole cycles of
GeoLoRA. The optimizer's step alone is timed too, and LoRA-One's look at the first batch, once.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from record import write
from torch import Tensor, nn

import geolora

RANK, WARM_UP, CYCLE = 16, 3, 25


class Contestant(NamedTuple):
    model: Any
    optimizer: torch.optim.Optimizer
    after: Callable[[int], None] | None = None


def llama(small: bool) -> tuple[nn.Module, str, Callable[[], dict[str, Tensor]]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    if small:
        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 256, "vocab_size": 500, "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).bfloat16()
    shape = (2, 32) if small else (4, 1024)

    def batch() -> dict[str, Tensor]:
        tokens = torch.randint(0, sizes["vocab_size"], shape)
        return {"input_ids": tokens, "labels": tokens}

    return model, r".*layers\.\d+\..*(q|k|v|o|gate|up|down)_proj", batch


def vit(small: bool) -> tuple[nn.Module, str, Callable[[], dict[str, Tensor]]]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 192, "image_size": 32}  # fmt: skip
    torch.manual_seed(0)
    config = ViTConfig(**(sizes if small else {}), num_labels=10)
    model = ViTForImageClassification(config).bfloat16()
    side, rows = (32, 4) if small else (224, 64)

    def batch() -> dict[str, Tensor]:
        pictures = torch.randn(rows, 3, side, side).bfloat16()
        return {"pixel_values": pictures, "labels": torch.randint(0, 10, (rows,))}

    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return model, rf"({'|'.join(name for name in linear if name != 'classifier')})", batch


def contestants(make: Callable, small: bool, device: str, steps: int) -> dict[str, Any]:
    def adapted(config: Any) -> Any:
        return get_peft_model(make(small)[0], config).to(device)

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], 1e-4, fused=True
        )

    _, targets, batch = make(small)
    lora = {"r": RANK, "lora_alpha": RANK, "target_modules": targets}
    made: dict[str, Contestant] = {}
    model = adapted(LoraConfig(**lora))
    made["LoRA, AdamW fused"] = Contestant(model, adamw(model))
    slots = {"init_r": 3 * RANK // 2, "target_r": RANK, "lora_alpha": RANK, "deltaT": 10}
    model = adapted(AdaLoraConfig(**slots, target_modules=targets, total_step=steps + WARM_UP + 1))
    made["AdaLoRA"] = Contestant(model, adamw(model), model.base_model.update_and_allocate)
    model = adapted(LoraConfig(**lora))
    made["GeoLoRA"] = Contestant(model, geolora.GeoLoRA(model))
    model = adapted(LoraConfig(**lora))
    first = {key: value.to(device) for key, value in batch().items()}
    begin = time.perf_counter()
    geolora.initialize_lora_one(model, [first])
    looked = time.perf_counter() - begin
    made["LoRA-One + GeoLoRA"] = Contestant(model, geolora.GeoLoRA(model))
    return {"field": made, "batch": batch, "look_seconds": looked}


def wait(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def one_step(one: Contestant, number: int, batch: dict[str, Tensor], device: str) -> list[float]:
    """Milliseconds of the optimizer's step alone, and of the whole."""
    begin = wait(device)
    one.model(**batch).loss.backward()
    middle = wait(device)
    one.optimizer.step()
    if one.after:
        one.after(number)
    stepped = wait(device)
    one.optimizer.zero_grad()
    return [1e3 * (stepped - middle), 1e3 * (wait(device) - begin)]


def measure(make: Callable, small: bool, device: str, rounds: int) -> dict[str, Any]:
    found = contestants(make, small, device, rounds)
    field, names = found["field"], list(found["field"])
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for number in range(rounds + WARM_UP):
        batch = {key: value.to(device) for key, value in found["batch"]().items()}
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(one_step(field[name], number, batch, device))
    rows = {}
    for name in names:
        mine = times[name][WARM_UP:]
        row: dict[str, Any] = {}
        for index, what in enumerate(("step", "whole")):
            row[f"{what}_ms"] = median(t[index] for t in mine)
            for peer in names[:2]:
                theirs = times[peer][WARM_UP:]
                row[f"{what} / {peer}"] = median(
                    a[index] / b[index] for a, b in zip(mine, theirs, strict=True)
                )
        rows[name] = {key: round(value, 4) for key, value in row.items()}
    pairs = len(geolora.ranks(field["GeoLoRA"].model))
    return {"pairs": pairs, "look_seconds": round(found["look_seconds"], 2), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=CYCLE)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu needs --small: the models of real size are for a GPU")
    results = {
        name: measure(make, arguments.small, arguments.device, arguments.rounds)
        for name, make in (("Llama 1B", llama), ("ViT-B/16", vit))
    }
    if not arguments.small:
        print(write("how_fast_is_a_full_step", results))
    for model, found in results.items():
        print(f"\n{model}{', tiny' if arguments.small else ''}: {found['pairs']} pairs, LoRA-One looks for {found['look_seconds']} s")  # fmt: skip
        print(f"{'':22}{'step ms':>9}{'/ LoRA':>8}{'whole ms':>10}{'/ LoRA':>8}{'/ AdaLoRA':>11}")
        for name, row in found["rows"].items():
            print(
                f"{name:22}{row['step_ms']:9.2f}{row['step / LoRA, AdamW fused']:8.2f}"
                f"{row['whole_ms']:10.2f}{row['whole / LoRA, AdamW fused']:8.3f}"
                f"{row['whole / AdaLoRA']:11.3f}"
            )


if __name__ == "__main__":
    main()
