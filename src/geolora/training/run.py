"""A run of `geolora train`: rows in, `transformers.Trainer`, a PEFT adapter and a report out."""

import hashlib
import json
import math
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geolora import processes
from geolora.errors import DataError, DivergedError, SettingError
from geolora.files import read_json, write_json
from geolora.methods import METHODS
from geolora.settings.strict_yaml import written
from geolora.settings.train_config import TrainConfig, check, parts, planned_steps, unfinished
from geolora.tasks.causal_lm import CausalLM
from geolora.tasks.image_classification import ImageClassification
from geolora.tasks.metrics import METRICS_OF, score
from geolora.tasks.task import Data, Rows, Task
from geolora.tasks.text_classification import TextClassification, TextRegression
from geolora.tasks.token_classification import TokenClassification
from geolora.trainer import log_ranks, progress_callback
from geolora.training.batch_order import batch_order
from geolora.training.checkpoints import Stopped, checkpoint_callback, flush, latest
from geolora.training.output_folder import alone, clear, empty, writing
from geolora.training.peak_memory import peak_bytes, reset_peak
from geolora.training.recipes import Kept, Recipe, recipe_of

TASKS: dict[str, Task] = {
    "text-classification": TextClassification(),
    "text-regression": TextRegression(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
    "causal-lm": CausalLM(),
}
WARMUP = 0.06
SECONDS = "seconds.json"
"""Seconds of every step so far, in a checkpoint."""


class Outcome(NamedTuple):
    """What a run gives.

    Attributes:
        report: what report.json holds. history: the logged training losses.
        predictions: per held-out row, what its metric takes. targets: likewise, what is right.
        choice: score on the rows for choosing, where there were any.
    """

    report: dict[str, Any]
    history: list[dict[str, Any]]
    predictions: list[Any]
    targets: list[Any]
    choice: float | None


def load(config: TrainConfig) -> Data:
    """Read and check the files of a run.

    Raises:
        DataError: what is missing or misspelt, with the nearest name.
    """
    return TASKS[config.task].read(config)


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as configured: check, read, load, train, evaluate, export, report.

    Returns:
        The report that also stands in `<output>/report.json`.
    """
    check(config)
    return train(config, load(config)).report


def train(config: TrainConfig, data: Data, choice: Rows | None = None) -> Outcome:
    """Train on data already read, or go on with the run that the output folder holds; see `run`.

    Args:
        choice: further rows to predict, for choosing a learning rate.

    Raises:
        Stopped: it was asked to stop, and has saved a checkpoint.
        DivergedError: the loss or the trained weights are no longer finite.
        OutputError: the disk is full, a file cannot be written, or another process works there.
    """
    check(config)
    from transformers import set_seed

    task = TASKS[config.task]
    if config.metric == "f1" and len(data.names) != 2:
        raise SettingError(
            f"`--metric f1` is of the second of two classes; there are {len(data.names)}. Use macro_f1."
        )
    processes.join()
    reset_peak()
    set_seed(config.seed)
    loaded = task.load(config, data)
    examples = task.encode(loaded, data.train, config)
    total = planned_steps(config, len(examples))
    lengths = [task.length(example) for example in examples]
    order = batch_order(lengths, config.batch_size, total, config.seed)

    def batches(size: int, number: int) -> list[Any]:
        starts = range(0, min(len(order), number * size) - size + 1, size)
        return [loaded.collate([examples[i] for i in order[at : at + size]]) for at in starts]

    recipe = recipe_of(config)
    optimizer = recipe.optimizer(total)
    model = recipe.add_adapter(loaded.model, loaded.new, task.peft_type, total, batches)
    # building one now finds unusable settings before anything is written
    optimizer[0]()(model, **optimizer[1])

    output, data_id = Path(config.output), data.digest()
    run_id = _identity(config, data_id)
    with writing(output), _opened(config, data_id, run_id) as resume:
        if processes.first():
            write_json(output / "run.json", {**asdict(config), "data": data_id})
            again = replace(config, overwrite=False)  # it must not replace what it is the config of
            (output / "config.yaml").write_text(written(again), encoding="utf-8")
            recipe.keep_start(model, output / "start")
        clock = _clock(resume)
        checkpoints = checkpoint_callback(run_id, recipe.method.can_resume)
        trainer = task.trainer(
            loaded,
            examples,
            order,
            _arguments(config, total),
            model=model,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[
                *([progress_callback()] if processes.first() else []),
                clock,
                *recipe.callbacks(model),
                checkpoints,
            ],
        )
        _only_our_bar(trainer)
        log_ranks(trainer)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()  # the embeddings are frozen
        recipe.begin(model, batches, resumed=resume is not None)
        processes.own_dropout(config.seed)
        try:
            trainer.train(resume_from_checkpoint=resume and str(resume))
        except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
            raise _diverged(trainer) from error
        finally:
            checkpoints.give_back()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        trained = [p for p in model.parameters() if p.requires_grad]
        losses = [entry["loss"] for entry in history[-1:]]
        if not all(map(math.isfinite, losses)) or not all(
            bool(p.isfinite().all()) for p in trained
        ):
            raise _diverged(trainer)
        if checkpoints.stopped is not None:
            raise Stopped(_how_to_go_on(config, checkpoints.stopped, total))
        trainable = sum(p.numel() for p in trained)
        recipe.finish(model)
        kept = _save_adapter(model, recipe, loaded.processor) if processes.first() else None

        metric = config.metric or METRICS_OF[config.task][0]
        found = task.predict(trainer, loaded, data.held_out, config)
        chosen_on = None
        if choice is not None:
            chosen_on = score(metric, *task.predict(trainer, loaded, choice, config))
        if kept is not None:
            report = {
                "method": config.method,
                "task": config.task,
                "metric": metric,
                "value": score(metric, *found),
                "train_loss": _last_tenth(history),
                "steps": total,
                "seconds": sum(clock.seconds),
                "seconds_per_step": statistics.median(clock.seconds),
                "trainable_parameters": trainable,
                "adapter_parameters": kept.adapter_parameters,
                "exported_parameters": kept.exported_parameters,
                "ranks": kept.ranks,
                "peak_memory_bytes": peak_bytes(),
                "seed": config.seed,
                "versions": versions(),
                "command": shlex.join(["geolora", *sys.argv[1:]]),
            }
            write_json(output / "history.json", history)
            if data.names:
                write_json(output / "labels.json", data.names)
            write_json(output / "report.json", report)
            for leftover in ("checkpoints", "start"):
                shutil.rmtree(output / leftover, ignore_errors=True)
        processes.wait()
        report = read_json(output / "report.json")
    return Outcome(report, history, *found, chosen_on)


@contextmanager
def _opened(config: TrainConfig, data_id: str, run_id: str) -> Iterator[Path | None]:
    """The output folder, held for this run and emptied unless it is gone on with; gives the checkpoint to go on from.

    Of several processes the first empties and holds it, when all have looked.
    """
    output = Path(config.output)
    resume = None if config.overwrite else _checkpoint(config, data_id, run_id)
    processes.wait()
    if processes.first():
        output.mkdir(parents=True, exist_ok=True)
    processes.wait()
    with alone(output) if processes.first() else nullcontext():
        if processes.first() and resume is None:
            empty(output)
        processes.wait()
        yield resume


def _save_adapter(model: Any, recipe: Recipe, processor: Any) -> Kept:
    """Write `adapter/`, at once or not at all."""
    output = Path(recipe.config.output)
    partial = output / "adapter.partial"
    clear(partial)
    kept = recipe.save(model, partial, output / "start")
    processor.save_pretrained(partial)
    flush(partial)
    clear(output / "adapter")
    partial.rename(output / "adapter")
    return kept


def _diverged(trainer: Any) -> DivergedError:
    return DivergedError(
        f"training diverged: after step {trainer.state.global_step} the loss or the trained weights "
        "are not finite. Lower `--lr`."
    )


def _how_to_go_on(config: TrainConfig, step: int, total: int) -> str:
    """What to say when a run was asked to stop."""
    if not METHODS[config.method].can_resume:
        return f"stopped after step {step} of {total}; {config.method} can only start again."
    command = "The same command without --overwrite" if config.overwrite else "The same command"
    return (
        f"stopped after step {step} of {total}, which is saved in {config.output}. {command} goes on "
        "from there."
    )


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    found = {name: metadata.version(name) for name in ("geolora", "torch", "transformers", "peft")}
    return {"geolora": found.pop("geolora"), "python": sys.version.split()[0], **found}


def _arguments(config: TrainConfig, total: int) -> dict[str, Any]:
    """Settings of `TrainingArguments`."""
    return {
        "output_dir": str(Path(config.output) / "checkpoints"),
        "max_steps": total,
        # rows of a step, however they are split
        "per_device_train_batch_size": config.batch_size // parts(config),
        "gradient_accumulation_steps": config.gradient_accumulation,
        _checkpointing(): config.gradient_checkpointing,
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "per_device_eval_batch_size": max(config.batch_size, 64),
        "lr_scheduler_type": "linear",
        "warmup_steps": round(WARMUP * total),
        # clipping the factors' gradients would change lr per W; AdamW's runs keep Trainer's default
        "max_grad_norm": 1.0 if METHODS[config.method].clips_gradients else 0.0,
        "train_sampling_strategy": "sequential",  # in the order of tasks/order.py
        "logging_steps": max(1, min(10, total // 20)),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or total,
        "seed": config.seed,
        "report_to": config.report_to.split(","),
        "ddp_find_unused_parameters": False,
        "use_cpu": processes.on_cpu(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def _checkpointing() -> str:
    """What `TrainingArguments` calls gradient checkpointing: the newer name where it knows it."""
    from transformers import TrainingArguments

    known = {spec.name for spec in fields(TrainingArguments)}
    return next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in known)


def _only_our_bar(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _clock(resume: Path | None) -> Any:
    """A Trainer callback that takes the seconds of every step, and keeps them in checkpoints.

    Args:
        resume: the checkpoint that is gone on from.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            if resume is not None:
                self.seconds = read_json(resume / SECONDS)
            self.last = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if processes.first():
                write_json(folder / SECONDS, self.seconds, indent=None)

    return Clock()


def _checkpoint(config: TrainConfig, data_id: str, run_id: str) -> Path | None:
    """The last whole checkpoint of an unfinished run over the same data."""
    if not unfinished(config):
        return None
    saved = read_json(Path(config.output) / "run.json")
    if saved.get("data") != data_id:
        raise DataError(
            f"`--output`: {config.output} holds an unfinished run of the same flags over other data. "
            "Choose another folder, or add --overwrite."
        )
    return latest(Path(config.output) / "checkpoints", run_id)


def _identity(config: TrainConfig, data_id: str) -> str:
    """A hash of the settings, data and base of a run; where it writes to does not matter."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "overwrite")}
    text = json.dumps([settings, data_id, base_id(config.model)])
    return hashlib.sha256(text.encode()).hexdigest()


def base_id(model: str) -> str:
    """What tells one local model folder from another: sizes of its files, and how they begin.

    A hub name stands for itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    found = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        found.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            found.update(file.read(1 << 20))
    return found.hexdigest()


def _last_tenth(history: list[dict[str, Any]]) -> float:
    """Mean training loss over the last tenth of the logged steps, without any that was skipped."""
    losses = [entry["loss"] for entry in history]
    tail = [loss for loss in losses[-max(1, len(losses) // 10) :] if math.isfinite(loss)]
    return sum(tail) / len(tail) if tail else float("nan")
