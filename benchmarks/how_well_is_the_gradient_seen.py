"""How much of the gradient does LoRA-One's start see through the adapter, and what does looking cost?

    python benchmarks/how_well_is_the_gradient_seen.py mrpc.jsonl.gz sentence1 sentence2

MiniLM (22.7 million parameters), pairs of rank 8 on the 36 linear layers of its encoder, the gradient of the
first 64 rows of a file (JSON lines with a column `label`), 64 tokens at most, float32; one batch.

seen: energy of G between the bases that were found, over that of the best rank-8 part by a dense SVD in float64:
mean and worst layer, for every width k and number of passes, with the estimate that the library gives.
memory: most bytes allocated at once, by torch's own profiler, above the same for one training step of the same
adapter (forward, backward) on the same batch. Both ways look at the batch twice, as gradients are kept from one
batch to the next; the authors' keeps one of every target weight.
time: one pass against that training step with AdamW, both in one run, medians of quotients; SVDs apart.
"""

import argparse
import gzip
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from record import write
from torch import Tensor, nn

import geolora
from geolora.cli.demo import model_folder
from geolora.pairs.find import find_pairs
from geolora.starts import gradient_pass

TARGETS = r".*encoder\.layer\.\d+\..*(query|key|value|dense)"
RANK, ROWS, TOKENS, ROUNDS = 8, 64, 64, 5
WIDTHS, PASSES = (8, 16, 24, 32), (3, 4, 5)


def adapted() -> Any:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    return model.eval()  # no dropout, also in the training step and the dense gradient


def batch_of(file: str, columns: list[str]) -> dict[str, Tensor]:
    from transformers import AutoTokenizer

    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(ROWS), strict=False)]
    texts = [[row[column] for row in rows] for column in columns]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    batch = tokenizer(*texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return {**batch, "labels": torch.tensor([int(row["label"]) for row in rows])}


def weights(model: Any) -> dict[str, nn.Parameter]:
    return {
        pair.name: model.base_model.model.get_submodule(pair.name).base_layer.weight
        for pair in find_pairs(model)
    }


def dense(model: Any, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The authors' way: a gradient beside every target weight, summed over batches."""
    chosen = weights(model)
    for weight in chosen.values():
        weight.requires_grad_(True)
    for batch in batches:
        model(**batch).loss.backward()
    found = {}
    for name, weight in chosen.items():
        found[name], weight.grad = weight.grad, None
        weight.requires_grad_(False)
    model.zero_grad()
    return {name: grad for name, grad in found.items() if grad is not None}


def seen(
    model: Any, batch: dict[str, Tensor], gradients: dict[str, Tensor]
) -> list[dict[str, Any]]:
    best = {
        name: float(torch.linalg.svdvals(G.double())[:RANK].square().sum())
        for name, G in gradients.items()
    }
    table = []
    for width in WIDTHS:
        for passes in PASSES:
            state = geolora.get_lora_one_state(
                model, [batch], width=width, passes=passes, tolerance=0
            )
            table.append({"k": width, "passes": passes, **shares(state, gradients, best)})
            print(table[-1], flush=True)
    return table


def shares(
    state: dict[str, Tensor], gradients: dict[str, Tensor], best: dict[str, float]
) -> dict[str, float]:
    found, told = [], []
    for name, G in gradients.items():
        U, V = state[f"{name}.U"].double(), state[f"{name}.V"].double()
        found.append(float((U.mT @ G.double() @ V).square().sum()) / best[name])
        told.append(float(state[f"{name}.missing"]))
    return {
        "mean": statistics.fmean(found),
        "worst": min(found),
        "told_missing_mean": statistics.fmean(told),
        "told_missing_worst": max(told),
    }


def peak(call: Callable[[], Any]) -> int:
    """Most bytes that were allocated at once during a call, above those before it."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def memory(model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    def training_step() -> None:
        model(**batch).loss.backward()
        model.zero_grad()

    adapter = 4 * sum(pair.A.numel() + pair.B.numel() for pair in find_pairs(model))
    targets = 4 * sum(weight.numel() for weight in weights(model).values())
    training_step()
    step = peak(training_step)
    ours = (
        peak(lambda: geolora.get_lora_one_state(model, [batch] * 2, passes=4, tolerance=0)) - step
    )
    theirs = peak(lambda: dense(model, [batch] * 2)) - step
    return {
        "step_bytes": step,
        "adapter_bytes": adapter,
        "target_weight_bytes": targets,
        "looking_over_adapter": ours / adapter,
        "looking_over_target_weights": ours / targets,
        "dense_over_target_weights": theirs / targets,
    }


def times(model: Any, batch: dict[str, Tensor]) -> dict[str, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    add, spent = gradient_pass.GradientSketch.add, [0.0]

    def timed(self: Any, product: Tensor, from_right: bool) -> None:
        begun = time.perf_counter()
        add(self, product, from_right)
        spent[0] += time.perf_counter() - begun

    gradient_pass.GradientSketch.add = timed
    quotients, parts = [], []
    for number in range(ROUNDS + 1):
        begun = time.perf_counter()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step, begun, spent[0] = time.perf_counter() - begun, time.perf_counter(), 0.0
        geolora.get_lora_one_state(model, [batch], passes=4, tolerance=0)
        passes = time.perf_counter() - begun
        if number:  # the first is warm-up
            quotients.append(passes / 4 / step)
            parts.append(spent[0] / passes)
    gradient_pass.GradientSketch.add = add
    return {
        "pass_over_training_step": statistics.median(quotients),
        "decomposition_over_passes": statistics.median(parts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="JSON lines, gzipped")
    parser.add_argument("columns", nargs="+", help="one or two columns of text")
    arguments = parser.parse_args()
    model, batch = adapted(), batch_of(arguments.file, arguments.columns)
    results = {"memory": memory(model, batch), "time": times(model, batch)}
    print(results, flush=True)
    results["seen"] = seen(model, batch, dense(model, [batch]))
    print(write("how_well_is_the_gradient_seen", results))


if __name__ == "__main__":
    main()
