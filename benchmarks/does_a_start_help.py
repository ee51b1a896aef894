"""Does a start from the gradient help: LoRA, LoRA-One, LoRA-GA, GeoLoRA, and LoRA-One with GeoLoRA?

    python benchmarks/does_a_start_help.py DATA --tasks sst2 babyllama [--methods ...] [--seeds 0 1 2]
    python benchmarks/does_a_start_help.py

DATA holds glue/TASK/{train,dev}.jsonl.gz, tinyshakespeare.txt.gz and the folder of every causal model. MiniLM on the GLUE
tasks, the causal models on text; batches, order, schedule (6 % warm-up, then linearly to 0) and rows of the
gradient (64, or 64 windows) are the same for all methods; AdamW's gradients are clipped at norm 1 as Trainer does, GeoLoRA's not. Pairs are 8 wide, GeoLoRA's 16,
cut to the parameters of 8 in the step after 10 % (`-budget`: from the start on). Loss on held-out rows before and after the first step, after 10 %, 50 %
and 100 % of the steps.

Step sizes are chosen for each task and method: from two neighbours half a decade apart on towards the better one, until it gets
worse, with seed 0, by the loss on a tenth of the training rows (500 rows at most; of a text, what is before its last tenth) which
is never trained on. GeoLoRA's neighbours are half decades from its default, whose runs are told as well (`, default`).
Every run is kept as it ends, in results/does_a_start_help/TASK.json: a second call goes on. Without --tasks: the table
and the figure of all runs there are.
"""

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from do_small_llamas_learn_better import LENGTH, WARMUP, batches, tokens_of
from peft import LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from record import COMMIT, FIGURES, RESULTS, write
from torch import Tensor, nn

import geolora
from geolora.cli.demo import model_folder
from geolora.pairs.find import find_pairs
from geolora.tasks.metrics import score
from geolora.tasks.rows import read_rows
from geolora.training.batch_order import batch_order

NAME = "does_a_start_help"
RANK = 8
START_ROWS = 64
ROWS = 500
"""Rows that are held back, and rows that are held out, at most."""
MARKS = (0.1, 0.5, 1.0)

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A start and an optimizer; `rank` slots per pair; `settings` of the optimizer."""

    start: str
    optimizer: str
    rank: int = RANK
    settings: Mapping[str, Any] = ()  # type: ignore[assignment]


METHODS: dict[str, Method] = {
    "lora": Method("zero", "lora"),
    "lora-one": Method("lora-one", "lora"),
    "lora-ga": Method("lora-ga", "lora", 2 * RANK),  # half of the slots are trained
    "lora-ga-of-peft": Method("lora-ga-of-peft", "lora"),
    "geolora": Method("zero", "geolora", 2 * RANK),
    "lora-one+geolora": Method("lora-one", "geolora", 2 * RANK),
    "lora-one-budget+geolora": Method("lora-one-budget", "geolora", 2 * RANK),
    "riemannian": Method("zero", "riemannian"),
    "lora-one+riemannian": Method("lora-one", "riemannian"),
    "lora-pro": Method("zero", "lora-pro"),
    "lora-pro-full": Method("zero", "lora-pro", settings={"moments": "full"}),
    "lora-sb": Method("lora-sb", "lora-sb"),
    "rac-lora": Method("zero", "rac-lora", 4 * RANK, {"blocks": 4}),
}
TABLE = tuple(METHODS)[:6]
GRID = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
AROUND_DEFAULT = (2.2e-4, 7e-4, 2.2e-3, None, 2.2e-2, 7e-2)
"""GeoLoRA's grid; None is its default, 7e-3."""
BEGIN = {"lora": 1e-3, "riemannian": 1e-3, "lora-pro": 1e-4, "lora-sb": 1e-2, "rac-lora": 1e-3}
"""Where the search for a step size begins, by optimizer; one decade higher on text."""


@dataclass(frozen=True)
class Task:
    """A model and its data.

    `base()` is the model; `train(seed)` the batches of a run; `held_back` chooses step sizes, `held_out` is what is told.
    `score` is a metric of the held-out rows, or none.
    """

    base: Callable[[], Any]
    train: Callable[[int], list[Batch]]
    held_back: list[Batch]
    held_out: list[Batch]
    score: str | None
    has_head: bool


# ---- tasks -------------------------------------------------------------------------------------


def glue(folder: Path, columns: tuple[str, ...], metric: str, steps: int, rows: int | None) -> Task:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def encoded(file: Path) -> list[dict[str, Any]]:
        found = read_rows(str(file), "--train")[:rows]
        sides = [[str(row[column]) for row in found] for column in columns]
        tokens = tokenizer(*sides, truncation=True, max_length=64)["input_ids"]
        pairs = tokenizer(*sides, truncation=True, max_length=64)["token_type_ids"]
        return [
            {"input_ids": ids, "token_type_ids": kinds, "labels": int(row["label"])}
            for ids, kinds, row in zip(tokens, pairs, found, strict=True)
        ]

    def collated(some: list[dict[str, Any]]) -> Batch:
        labels = torch.tensor([row["labels"] for row in some])
        inputs = [{k: row[k] for k in ("input_ids", "token_type_ids")} for row in some]
        return {**tokenizer.pad(inputs, return_tensors="pt"), "labels": labels}

    def by_length(some: list[dict[str, Any]]) -> list[Batch]:
        some = sorted(some, key=lambda row: len(row["input_ids"]))
        return [collated(some[at : at + 64]) for at in range(0, len(some), 64)]

    train_file = folder / ("train20k.jsonl.gz" if rows else "train.jsonl.gz")
    every = encoded(train_file)
    shuffled = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    cut = min(ROWS, len(every) // 10)
    held_back, trained = [every[i] for i in shuffled[:cut]], [every[i] for i in shuffled[cut:]]
    lengths = [len(row["input_ids"]) for row in trained]

    def train(seed: int) -> list[Batch]:
        order = batch_order(lengths, 32, steps, seed)
        return [
            collated([trained[i] for i in order[at : at + 32]]) for at in range(0, len(order), 32)
        ]

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(model_folder(), num_labels=2)

    held_out = encoded(folder / "dev.jsonl.gz")
    some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[:ROWS]
    held_out = [held_out[i] for i in some.tolist()]
    return Task(base, train, by_length(held_back), by_length(held_out), metric, True)


def text(folder: Path, file: Path, steps: int) -> Task:
    from transformers import AutoModelForCausalLM

    tokens, last = tokens_of(folder, gzip.decompress(file.read_bytes()).decode())
    cut = len(tokens) - len(last)

    def windows(part: Tensor) -> list[Batch]:
        rows = part[: len(part) // LENGTH * LENGTH].view(-1, LENGTH)
        return [{"input_ids": some, "labels": some} for some in rows.split(32)]

    def train(seed: int) -> list[Batch]:
        return [{"input_ids": some, "labels": some} for some in batches(tokens[:cut], steps, seed)]

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder)

    return Task(base, train, windows(tokens[cut:]), windows(last), None, False)


GLUE: dict[str, tuple[tuple[str, ...], str, int, int | None]] = {
    "mrpc": (("sentence1", "sentence2"), "accuracy", 100, None),
    "cola": (("sentence",), "matthews", 300, None),
    "sst2": (("sentence",), "accuracy", 200, 8000),
}
"""Columns, metric, steps, training rows."""


def task_of(name: str, data: Path) -> Task:
    if name in GLUE:
        return glue(data / "glue" / name, *GLUE[name])
    return text(data / name, data / "tinyshakespeare.txt.gz", 300)


# ---- one run -----------------------------------------------------------------------------------


def adapted(
    task: Task, method: Method, seed: int, first: list[Batch], norm: float | None
) -> tuple[Any, float]:
    """The model with its adapter, started, and the norm of its start (0: none)."""
    torch.manual_seed(seed)
    base = task.base()
    own = {"lora_dropout": 0.0, "target_modules": "all-linear"}
    if task.has_head:
        own |= {"exclude_modules": ["classifier"], "modules_to_save": ["classifier"]}
    config = LoraConfig(r=method.rank, lora_alpha=method.rank, **own)
    if method.start == "lora-ga-of-peft":
        config.init_lora_weights, config.lora_ga_config = "lora_ga", LoraGAConfig()
        config.target_modules = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.Linear) and name not in ("classifier", "lm_head")
        ]
        config.exclude_modules = None

        def look() -> None:
            base.eval()  # no dropout, as in the other starts; PEFT has set train mode, and takes the mean
            for batch in first:
                base(**batch).loss.backward()

        preprocess_loraga(base, config, look)
        base.zero_grad()
    model: Any = get_peft_model(base, config)
    extra = {} if norm is None else {"norm": norm}
    found = 0.0
    if method.start == "lora-one":
        found = geolora.initialize_lora_one(model, first, **extra).norm
    elif method.start == "lora-one-budget":
        found = geolora.initialize_lora_one(model, first, budget=budget_of(model), **extra).norm
    elif method.start == "lora-ga":
        geolora.initialize_lora_ga(model, first)
    elif method.start == "lora-sb":
        found = geolora.initialize_lora_sb(model, first, **extra).norm
    return model, found


def first_of(rows: list[Batch]) -> list[Batch]:
    """The batches that hold the first START_ROWS rows."""
    first, seen = [], 0
    for batch in rows:
        if seen >= START_ROWS:
            break
        first.append(batch)
        seen += len(batch["labels"])
    return first


def budget_of(model: Any) -> int:
    """Adapter parameters of LoRA of rank RANK."""
    return sum(RANK * (pair.d_in + pair.d_out) for pair in find_pairs(model))


def look_at(model: Any, held: list[Batch], metric: str | None = None) -> tuple[float, float | None]:
    """Mean loss over the rows, and a metric, in eval mode."""
    model.eval()
    total, rows, found, labels = 0.0, 0, [], []
    with torch.no_grad():
        for batch in held:
            out, count = model(**batch), len(batch["labels"])
            total, rows = total + out.loss.item() * count, rows + count
            if metric is not None:
                found += out.logits.argmax(-1).tolist()
                labels += batch["labels"].tolist()
    model.train()
    return total / rows, None if metric is None else score(metric, found, labels)


def one(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    norm: float | None,
    watch: Callable[[int, Any, list[Batch]], None] = lambda *_: None,
) -> Any:
    """Train once.

    Args:
        watch: called with the step, the model and the batches of the gradient, before the first step (0) and after each.
    """
    rows = task.train(seed)
    first = first_of(rows)
    begun = time.perf_counter()
    model, size = adapted(task, method, seed, first, norm)
    looked = time.perf_counter() - begun
    steps = len(rows)
    settings = dict(method.settings) | ({} if lr is None else {"lr": lr})
    if method.optimizer == "geolora":
        settings |= {"budget": budget_of(model), "settle_after": steps // 10}
    if method.optimizer == "rac-lora":
        settings["steps_per_block"] = -(-steps // method.settings["blocks"])
    factory, settings = geolora.for_trainer(method.optimizer, **settings)
    optimizer = factory()(model, **settings)
    warm = round(WARMUP * steps)

    def share(step: int) -> float:
        return (step + 1) / (warm + 1) if step < warm else (steps - step) / (steps - warm)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    trained = [p for p in model.parameters() if p.requires_grad]
    marks = {1, *(round(mark * steps) for mark in MARKS)}
    held_out, scores = {0: look_at(model, task.held_out)[0]}, {}
    losses = []
    watch(0, model, first)
    torch.manual_seed(seed)  # the same dropout for all
    model.train()
    for step, batch in enumerate(rows, 1):
        loss = model(**batch).loss
        loss.backward()
        if method.optimizer != "geolora":
            torch.nn.utils.clip_grad_norm_(trained, 1.0)  # as Trainer does
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        watch(step, model, first)
        if step in marks:
            held_out[step], scores[step] = look_at(model, task.held_out, task.score)
    return {
        "held_out_loss": held_out,
        "held_back_loss": look_at(model, task.held_back)[0],
        "score": scores[steps],
        "norm": size,
        "losses": [round(loss, 4) for loss in losses],
        "seconds": round(time.perf_counter() - begun, 1),
        "seconds_of_the_start": round(looked, 1),
    }


# ---- all runs of a task ------------------------------------------------------------------------


class Runs:
    """The runs of a task that are done, kept in its file."""

    def __init__(self, name: str, data: Path) -> None:
        self.name, self.data = name, data
        (RESULTS / NAME).mkdir(exist_ok=True)
        self.path = RESULTS / NAME / f"{name}.json"
        self.done = json.loads(self.path.read_text())["results"] if self.path.exists() else {}
        self.task: Task | None = None

    def of(self, method: str, lr: float | None, seed: int, norm: float | None) -> Any:
        named = method if norm is None else f"{method}@{norm:g}"
        key = f"{named}/{'default' if lr is None else f'{lr:g}'}/{seed}"
        if key not in self.done:
            self.task = self.task or task_of(self.name, self.data)
            self.done[key] = {
                **one(self.task, METHODS[method], lr, seed, norm),
                "commit": COMMIT,
            }
            write(f"{NAME}/{self.name}", self.done)
            told = {k: v for k, v in self.done[key].items() if k not in ("losses", "commit")}
            print(self.name, key, told, flush=True)
        return self.done[key]

    def all_of(self, method: str, seeds: list[int], norm: float | None) -> None:
        """The runs that choose a step size, and those of the chosen one with all seeds."""
        rates = {self.chosen(method, norm)}
        if METHODS[method].optimizer == "geolora":
            rates.add(None)
        for seed in seeds:
            for lr in rates:
                self.of(method, lr, seed, norm)

    def chosen(self, method: str, norm: float | None) -> float | None:
        """With seed 0."""
        optimizer = METHODS[method].optimizer
        grid: tuple[float | None, ...] = GRID
        if optimizer == "geolora":
            grid, at = AROUND_DEFAULT, AROUND_DEFAULT.index(2.2e-3)
        else:
            at = GRID.index(BEGIN[optimizer]) + (0 if self.name in GLUE else 2)

        def loss(at: int) -> float:
            found = self.of(method, grid[at], 0, norm)["held_back_loss"]
            return found if math.isfinite(found) else math.inf

        up = 1 if loss(at + 1) < loss(at) else -1
        while 0 <= at + up < len(grid) and loss(at + up) < loss(at):
            at += up
        return grid[at]


# ---- what they say -----------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error over the seeds."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(spread / len(values))


def chosen_runs(done: Mapping[str, Any]) -> dict[str, tuple[str, dict[int, Any]]]:
    """{method: (step size, {seed: run})}, the step size of the grid with the lowest loss on what is held back.

    GeoLoRA's default and rates between those of the grid, which take no part in the choice, are told on their own. Runs of methods
    that are no longer in the table are left out.
    """
    by_rate: dict[str, dict[str, dict[int, Any]]] = {}
    between: dict[str, tuple[str, dict[int, Any]]] = {}
    for key, run in done.items():
        method, rate, seed = key.split("/")
        if method not in METHODS:
            continue
        if rate != "default" and float(rate) not in (*GRID, *AROUND_DEFAULT):
            between.setdefault(f"{method}, {rate}", (rate, {}))[1][int(seed)] = run
            continue
        by_rate.setdefault(method, {}).setdefault(rate, {})[int(seed)] = run
    found = {name: kept for name, kept in between.items() if len(kept[1]) > 1}
    for method, rates in by_rate.items():
        told = {rate: runs[0]["held_back_loss"] for rate, runs in rates.items() if 0 in runs}
        if not told:
            continue
        rate = min(told, key=lambda rate: told[rate] if math.isfinite(told[rate]) else math.inf)
        found[method] = (rate, dict(sorted(rates[rate].items())))
        if rate != "default" and "default" in rates:
            found[f"{method}, default"] = ("default", dict(sorted(rates["default"].items())))
    return found


def summary(done: Mapping[str, Any]) -> dict[str, Any]:
    """Per method: means and standard errors at every mark, and the difference of LoRA-One with GeoLoRA, by seeds."""
    runs, rows = chosen_runs(done), {}
    both = runs.get("lora-one+geolora", ("", {}))[1]
    for method, (rate, of_seed) in runs.items():
        row: dict[str, Any] = {"lr": rate, "seeds": list(of_seed)}
        steps = len(next(iter(of_seed.values()))["losses"])
        marks = {"start": 0, "first step": 1} | {f"{m:.0%}": round(m * steps) for m in MARKS}
        for name, step in marks.items():
            losses = {seed: run["held_out_loss"][str(step)] for seed, run in of_seed.items()}
            row[name] = mean_and_error(list(losses.values()))
            shared = [seed for seed in losses if seed in both]
            if shared:
                row[f"lora-one+geolora less this, {name}"] = mean_and_error(
                    [both[seed]["held_out_loss"][str(step)] - losses[seed] for seed in shared]
                )
        scores = [run["score"] for run in of_seed.values()]
        row["score"] = None if None in scores else mean_and_error(scores)
        rows[method] = row
    return rows


def join() -> None:
    """Table and figure of all runs there are."""
    tasks = {}
    for path in sorted((RESULTS / NAME).glob("*.json")):
        tasks[path.stem] = json.loads(path.read_text())["results"]
    rows = {name: summary(done) for name, done in tasks.items()}
    for name, methods in rows.items():
        print(name)
        for method, row in methods.items():
            cells = [f"{row[key][0]:.3f} ± {row[key][1]:.3f}" for key in COLUMNS]
            score = "" if row["score"] is None else f"{100 * row['score'][0]:.1f}"
            print(f"  {method:<26} {row['lr']:>8} {len(row['seeds'])}  {'  '.join(cells)}  {score}")
    write(NAME, rows)
    figure({name: done for name, done in tasks.items() if name in DRAWN})


COLUMNS = ("start", "first step", "10%", "50%", "100%")
DRAWN = (*GLUE, "babyllama")


def figure(tasks: Mapping[str, Any]) -> None:
    """Training losses, smoothed over a twentieth of the run, and held-out losses at the marks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(
        1, len(tasks), figsize=(3.7 * len(tasks), 4), layout="constrained", squeeze=False
    )
    for one_of, (name, done) in zip(axes[0], tasks.items(), strict=True):
        runs = chosen_runs(done)
        for color, method in zip(plt.get_cmap("tab10").colors, TABLE, strict=False):
            if method not in runs:
                continue
            of_seed = list(runs[method][1].values())
            losses = torch.tensor([run["losses"] for run in of_seed]).mean(0)
            width = max(1, len(losses) // 20)
            smooth = losses.unfold(0, width, 1).mean(-1)
            steps = torch.arange(len(smooth)) + (width + 1) / 2
            style = "--" if "geolora" in method else "-"
            one_of.plot(steps, smooth, style, color=color, linewidth=1, alpha=0.6)
            held = {
                int(step): sum(run["held_out_loss"][step] for run in of_seed) / len(of_seed)
                for step in of_seed[0]["held_out_loss"]
                if step != "0"
            }
            one_of.plot(list(held), list(held.values()), "o", color=color, label=method)
        one_of.set_xscale("log")
        one_of.set_title(name)
        one_of.set_xlabel("step")
    axes[0][0].set_ylabel("loss (lines: training, dots: held out)")
    axes[0][0].legend(fontsize="small")
    drawn.savefig(FIGURES / f"{NAME}.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--methods", nargs="+", default=list(TABLE), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--norms", nargs="+", type=float, default=[None])
    arguments = parser.parse_args()
    if arguments.tasks and arguments.data is None:
        parser.error("DATA is needed with --tasks")
    for name in arguments.tasks:
        runs = Runs(name, arguments.data)
        for norm in arguments.norms:
            for method in arguments.methods:
                runs.all_of(method, arguments.seeds, norm)
    if not arguments.tasks:
        join()


if __name__ == "__main__":
    main()
