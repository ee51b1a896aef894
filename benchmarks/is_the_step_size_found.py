"""Does the search find the same step size wherever it begins, and is it a good one?

    python benchmarks/is_the_step_size_found.py five_tasks.yaml tinyshakespeare.txt.gz stories260K babyllama

The tasks of a plan of `geolora compare` (its methods do not count), and small causal models on a text: for GeoLoRA and for
LoRA of rank 8 with AdamW, the step size that `geolora.find_lr` finds from 1/30, 1/10, 1, 10 and 30 times the
default, 16 probes each. `--score` trains at what was found from the starts it names as well: held-out score of the
tasks, held-out loss of the causal models. Every number is kept as it comes: a second call goes on.
"""

import argparse
import dataclasses
import gzip
import json
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import do_small_llamas_learn_better as llamas
import torch
from record import RESULTS, write

import geolora
from geolora.comparing.plan import read_plan
from geolora.optim.lora import adamw
from geolora.starts.find_lr import PROBES
from geolora.training import run as training

NAME = "is_the_step_size_found"
STARTS = (1 / 30, 1 / 10, 1.0, 10.0, 30.0)
DEFAULT = {"geolora": 7e-3, "lora": 1e-3}
RANK = {"geolora": 16, "lora": 8}
MAKE: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "geolora": geolora.GeoLoRA,
    "lora": adamw,
}


class Glue:
    """A task of a plan, for a method and a seed."""

    def __init__(self, config: Any, method: str, seed: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.config = dataclasses.replace(
            config, method=method, seed=seed, rank=RANK[method], budget=None, lr=None,
            output=f"{self.folder.name}/run",
        )  # fmt: skip
        self.data = training.load(self.config)

    def search(self) -> tuple[Any, list[Any]]:
        """The model, and the batches of a search."""
        ready = training.prepare(self.config, self.data)
        return ready.model, ready.batches(self.config.batch_size, PROBES)

    def score(self, lr: float) -> float:
        """Train at a step size, and score the held-out rows."""
        run = training.train(dataclasses.replace(self.config, lr=lr, overwrite=True), self.data)
        return run.report["value"]


class Llama:
    """A small causal model on a text, for a method and a seed."""

    def __init__(self, folder: Path, text: str, method: str, seed: int) -> None:
        self.folder, self.method, self.seed = folder, method, seed
        self.parts = llamas.tokens_of(folder, text)

    def model(self) -> Any:
        """With the pairs of the method."""
        llamas.RANK = RANK[self.method]
        return llamas.adapted(self.folder, self.seed)

    def search(self) -> tuple[Any, list[Any]]:
        """The model, and the batches of a search."""
        drawn = llamas.batches(self.parts[0], PROBES, self.seed)
        return self.model(), [{"input_ids": rows, "labels": rows} for rows in drawn]

    def score(self, lr: float) -> float:
        """Train at a step size; the held-out loss."""
        model = self.model()
        settings = {"total_steps": llamas.STEPS} if self.method == "geolora" else {}
        optimizer = MAKE[self.method](model, lr=lr, **settings)
        llamas.train(model, optimizer, self.parts[0], llamas.STEPS, self.seed)
        return llamas.held_out_loss(model, self.parts[1])


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable[[], Any]]]:
    """(task, method, seed, what makes it)."""
    configs = {cell.task: cell.config for cell in read_plan(arguments.plan).cells}
    text = gzip.decompress(arguments.text.read_bytes()).decode()
    for seed in arguments.seeds:
        for method in arguments.methods:
            for folder in arguments.models:
                yield (
                    folder.name,
                    method,
                    seed,
                    lambda f=folder, m=method, s=seed: Llama(f, text, m, s),
                )
            for task, config in configs.items():
                yield task, method, seed, lambda c=config, m=method, s=seed: Glue(c, m, s)


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", help="YAML of geolora compare")
    parser.add_argument("text", type=Path, help="text, .gz")
    parser.add_argument("models", type=Path, nargs="+", help="folders of causal models")
    parser.add_argument("--methods", nargs="+", default=["geolora", "lora"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--score", type=float, nargs="*", default=[], help="of these starts")
    arguments = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    known = (
        json.loads(path.read_text())["results"] if path.exists() else {"found": {}, "scores": {}}
    )
    found, scores = known["found"], known["scores"]
    for task, method, seed, make in cases(arguments):
        case = None
        for start in STARTS:
            key = f"{task}/{method}/seed-{seed}/{start:.3g}"
            if key not in found:
                case = case or make()
                model, batches = case.search()
                search = geolora.find_lr(
                    model, batches, optimizer=MAKE[method], start=start * DEFAULT[method]
                )
                found[key] = search.lr
                print(key, f"{search.lr:.3g}", flush=True)
                write(NAME, {"found": found, "scores": scores})
            named = any(math.isclose(start, other, rel_tol=0.2) for other in arguments.score)
            if named and key not in scores:
                case = case or make()
                scores[key] = case.score(found[key])
                print(key, f"{scores[key]:.4f}", flush=True)
                write(NAME, {"found": found, "scores": scores})


if __name__ == "__main__":
    main()
