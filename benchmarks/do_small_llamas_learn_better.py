"""Does GeoLoRA at its default reach a lower loss than LoRA at its best step size, on causal models?

    python benchmarks/do_small_llamas_learn_better.py tinyshakespeare.txt.gz stories260K babyllama

A text file and one or more folders of small causal models. Same rank, parameters, batches and schedule for
all: linear decay after 6 % warm-up, batches of 16 x 128 tokens out of the first 90 % of the text; the loss
is that of the first 16,384 tokens of the last 10 %. Every run is kept as it ends: a second call goes on.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import RESULTS, write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from geolora import GeoLoRA

NAME = "do_small_llamas_learn_better"
RANK = 8
STEPS = 300
BATCH, LENGTH = 16, 128
HELD_OUT = 16_384
WARMUP = 0.06
SEEDS = (0, 1, 2)
LORA_LRS = (3e-3, 1e-2, 1.7e-2, 3e-2, 5e-2)


def tokens_of(folder: Path, text: str) -> tuple[Tensor, Tensor]:
    """Token numbers of the first 90 % of a text, and of its last 10 % (the first 16,384)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = int(0.9 * len(text))
    parts = []
    for part in (text[:cut], text[cut:]):
        numbers = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(numbers))
    return parts[0], parts[1][:HELD_OUT]


def batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Random windows of LENGTH tokens, the same for all methods."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH,), generator=generator)
        yield torch.stack([tokens[at : at + LENGTH] for at in starts.tolist()])


def adapted(folder: Path, seed: int) -> nn.Module:
    """The model with LoRA on all its linear layers but the head."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", lora_dropout=0.0)
    return get_peft_model(model, config)


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: Tensor) -> float:
    """Mean loss per token of windows of LENGTH."""
    model.eval()
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows.split(32)]
    model.train()
    return sum(losses) / len(rows)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    steps: int,
    seed: int,
) -> list[float]:
    """The losses of all steps."""
    warm = round(WARMUP * steps)

    def share(step: int) -> float:
        return (step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    losses = []
    for rows in batches(tokens, steps, seed):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def one(folder: Path, parts: tuple[Tensor, Tensor], lr: float | None, seed: int) -> Any:
    """Train once, LoRA at lr or GeoLoRA at its default; the held-out loss, and the mean of the last tenth of the training losses."""
    model = adapted(folder, seed)
    if lr is not None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: Any = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    else:
        optimizer = GeoLoRA(model, tail=None)
    begun = time.perf_counter()
    losses = train(model, optimizer, parts[0], STEPS, seed)
    return {
        "held_out_loss": held_out_loss(model, parts[1]),
        "train_loss": sum(losses[-STEPS // 10 :]) / len(losses[-STEPS // 10 :]),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="text, .gz")
    parser.add_argument("models", type=Path, nargs="+", help="folders of causal models")
    parser.add_argument("--methods", nargs="+", default=["lora", "geolora"])
    arguments = parser.parse_args()
    text = gzip.decompress(arguments.text.read_bytes()).decode()
    path = RESULTS / f"{NAME}.json"
    runs = json.loads(path.read_text())["results"]["runs"] if path.exists() else {}
    for folder in arguments.models:
        parts = tokens_of(folder, text)
        for method in arguments.methods:
            for lr in LORA_LRS if method == "lora" else (None,):
                for seed in SEEDS:
                    key = f"{folder.name}/{method}/{'default' if lr is None else f'{lr:g}'}/{seed}"
                    if key in runs:
                        continue
                    runs[key] = one(folder, parts, lr, seed)
                    print(key, runs[key], flush=True)
                    write(NAME, {"steps": STEPS, "rank": RANK, "runs": runs})


if __name__ == "__main__":
    main()
