"""A run of `geolora train`: rows in, `transformers.Trainer`, a PEFT adapter and a report out."""

import math
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from geolora import processes
from geolora.errors import DivergedError, SettingError
from geolora.files.folders import replacing
from geolora.files.output_folder import naming_disk_errors
from geolora.files.reading import read_json
from geolora.files.writing import write_json, write_text
from geolora.settings.strict_yaml import as_yaml
from geolora.settings.train_config import METRICS_OF, TrainConfig
from geolora.starts.gradient_pass import without_gradient
from geolora.tasks.causal_lm import CausalLM
from geolora.tasks.image_classification import ImageClassification
from geolora.tasks.metrics import score
from geolora.tasks.task import Data, Loaded, Rows, Task, naming_model_errors
from geolora.tasks.text_classification import TextClassification, TextRegression
from geolora.tasks.token_classification import TokenClassification
from geolora.trainer import log_ranks, progress_callback
from geolora.training.batch_order import batch_order
from geolora.training.check import check, microbatches, planned_steps
from geolora.training.checkpoints import Stopped, checkpoint_callback
from geolora.training.clock import clock_callback
from geolora.training.identity import versions
from geolora.training.peak_memory import peak_bytes, reset_peak
from geolora.training.recipes import Batches, Kept, Recipe, recipe_of
from geolora.training.resume import opened, remove_leftovers
from geolora.training.step_size import set_step_size

TASKS: dict[str, Task] = {
    "text-classification": TextClassification(),
    "text-regression": TextRegression(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
    "causal-lm": CausalLM(),
}
Then = Callable[[Path, dict[str, Any]], Any]
WARMUP = 0.06
"""Share of the steps in which the step size rises to its full length."""


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


def run(config: TrainConfig, then: Then | None = None) -> dict[str, Any]:
    """Train as configured: check, read, load, train, evaluate, export, report.

    Args:
        then: what else belongs to the run, as in `train`.

    Returns:
        The report that also stands in `<output>/report.json`.
    """
    check(config)
    return train(config, load(config), then=then).report


def train(
    config: TrainConfig, data: Data, choice: Rows | None = None, then: Then | None = None
) -> Outcome:
    """Train on data already read, or go on with the run that the output folder holds; see `run`.

    Args:
        choice: further rows to predict, for choosing a learning rate.
        then: takes the output folder and the report when all else is written, in the first process. The
            run can be gone on with until it has returned.

    Raises:
        Stopped: it was asked to stop, and has saved a checkpoint.
        DivergedError: the loss or the trained weights are no longer finite.
        OutputError: the disk is full, a file cannot be written, or another process works there.
    """
    check(config)
    _check_classes(config, data)
    processes.join_group()
    reset_peak()
    ready = prepare(config, data)
    recipe, model, output, data_id = ready.recipe, ready.model, Path(config.output), data.digest()

    with naming_disk_errors(output), opened(config, data_id) as (checkpoint, run):
        if processes.is_first():
            _keep_start(ready)
        clock = clock_callback(checkpoint)
        checkpoints = checkpoint_callback(run, recipe.method.can_resume)
        progress = progress_callback()
        trainer = _trainer(ready, clock, checkpoints, progress)
        _expect_unused(ready, trainer)
        with naming_model_errors(config, trainer):
            recipe.begin(model, ready.batches, resumed=checkpoint is not None)
            lr = set_step_size(
                config,
                recipe,
                model,
                ready.optimizer,
                ready.batches,
                ready.steps,
                resumed=checkpoint is not None,
            )
            processes.own_dropout(config.seed)
            with closing(progress):
                _fit(ready, trainer, checkpoints, checkpoint)

        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        recipe.finish(model)
        kept = _save_adapter(ready) if processes.is_first() else None

        metric = config.metric or METRICS_OF[config.task][0]
        predicted = ready.task.predict(trainer, ready.loaded, data.held_out, config)
        choice_score = None
        if choice is not None:
            on_choice = ready.task.predict(trainer, ready.loaded, choice, config)
            choice_score = score(metric, *on_choice)
        if kept is not None:
            report = {
                "method": config.method,
                "task": config.task,
                "metric": metric,
                "value": score(metric, *predicted),
                "lr": lr,
                "train_loss": _last_tenth(history),
                "steps": ready.steps,
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
            _write_report(output, report, history, data.names)
            if then is not None:
                then(output, report)
            remove_leftovers(output)
        processes.wait_for_all()
        report = read_json(output / "report.json")
    return Outcome(report, history, *predicted, choice_score)


# ---- what a run trains with ---------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """All that a run trains with, made before anything is written.

    Attributes:
        loaded: the base model and what goes with it. model: the same with the adapter.
        examples: what is trained on. order: their indices, one batch after the other.
        batches: gives the first batches of a size in this order.
        steps: of the optimizer, in all. optimizer: what Trainer's `optimizer_cls_and_kwargs` takes.
    """

    config: TrainConfig
    task: Task
    recipe: Recipe
    loaded: Loaded
    model: Any
    examples: list[dict[str, Any]]
    order: list[int]
    batches: Batches
    steps: int
    optimizer: tuple[Any, dict[str, Any]]


def _check_classes(config: TrainConfig, data: Data) -> None:
    if config.metric == "f1" and len(data.names) != 2:
        raise SettingError(
            f"`--metric f1` is of the second of two classes; there are {len(data.names)}. Use macro_f1."
        )


def prepare(config: TrainConfig, data: Data) -> Ready:
    """Load the model, encode and order the rows, add the adapter; an optimizer is made for trial.

    Raises:
        ModelError, DataError, SettingError: what does not fit together.
    """
    from transformers import set_seed

    set_seed(config.seed)
    task, recipe = TASKS[config.task], recipe_of(config)
    loaded = task.load(config, data)
    examples = task.encode(loaded, data.train, config)
    steps = planned_steps(config, len(examples))
    lengths = [task.length(example) for example in examples]
    order = batch_order(lengths, config.batch_size, steps, config.seed)
    optimizer = recipe.optimizer(steps)

    def batches(size: int, number: int) -> list[Any]:
        starts = range(0, min(len(order), number * size) - size + 1, size)
        return [loaded.collate([examples[i] for i in order[at : at + size]]) for at in starts]

    model = recipe.add_adapter(loaded.model, loaded.heads, task.peft_type, steps, batches)
    # building one now finds unusable settings before anything is written
    optimizer[0]()(model, **optimizer[1])
    return Ready(config, task, recipe, loaded, model, examples, order, batches, steps, optimizer)


def _trainer(ready: Ready, clock: Any, checkpoints: Any, progress: Any) -> Any:
    """The task's Trainer, with our callbacks."""
    config, model = ready.config, ready.model
    trainer = ready.task.trainer(
        ready.loaded,
        ready.examples,
        ready.order,
        _arguments(ready),
        model=model,
        optimizer_cls_and_kwargs=ready.optimizer,
        callbacks=[
            *([progress] if processes.is_first() else []),
            clock,
            *ready.recipe.callbacks(model),
            checkpoints,
        ],
    )
    _only_our_bar(trainer)
    log_ranks(trainer)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()  # the embeddings are frozen
    return trainer


def _arguments(ready: Ready) -> dict[str, Any]:
    """Settings of `TrainingArguments`."""
    config, steps = ready.config, ready.steps
    return {
        "output_dir": str(Path(config.output) / "checkpoints"),
        "max_steps": steps,
        # the rows of a step stay the same, however many microbatches they are divided into
        "per_device_train_batch_size": config.batch_size // microbatches(config),
        "gradient_accumulation_steps": config.gradient_accumulation,
        _checkpointing(): config.gradient_checkpointing,
        "bf16": config.mixed_precision == "bf16",
        "fp16": config.mixed_precision == "fp16",
        "per_device_eval_batch_size": max(config.batch_size, 64),
        "lr_scheduler_type": "linear",
        "warmup_steps": round(WARMUP * steps),
        # clipping the factors' gradients would change lr per W; AdamW's runs keep Trainer's default
        "max_grad_norm": 1.0 if ready.recipe.method.clips_gradients else 0.0,
        "train_sampling_strategy": "sequential",  # in the order of batch_order.py
        "logging_steps": max(1, min(10, steps // 20)),
        "logging_nan_inf_filter": False,
        "save_strategy": "steps" if config.save_every else "no",
        "save_steps": config.save_every or steps,
        "seed": config.seed,
        "report_to": config.report_to.split(","),
        "ddp_find_unused_parameters": False,  # but see `_expect_unused`
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


def _expect_unused(ready: Ready, trainer: Any) -> None:
    """Have DDP look in every step for parameters without a gradient, where the model has some.

    That is a pooler nobody reads, say, or layers that are dropped at random. Elsewhere looking would only
    cost time, and torch warns of it.
    """
    if not processes.grouped():
        return
    settings = ready.model.config.to_dict()
    drops = any("layerdrop" in key and value for key, value in settings.items())
    (batch,) = ready.batches(ready.config.batch_size // microbatches(ready.config), 1)
    unused = drops or bool(without_gradient(ready.model, batch))
    trainer.accelerator.ddp_handler.find_unused_parameters = processes.true_on_any(unused)


# ---- the training -------------------------------------------------------------------------------


def _fit(ready: Ready, trainer: Any, checkpoints: Any, checkpoint: Path | None) -> None:
    """Train to the last step, from the checkpoint where there is one.

    Raises:
        Stopped: it was asked to stop. DivergedError: a loss or a weight is not finite.
    """
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise _diverged(trainer) from error
    finally:
        checkpoints.restore_handlers()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = [p for p in ready.model.parameters() if p.requires_grad]
    if not all(map(math.isfinite, losses[-1:])) or not all(
        bool(p.isfinite().all()) for p in trained
    ):
        raise _diverged(trainer)
    if checkpoints.stopped is not None:
        raise Stopped(_how_to_go_on(ready, checkpoints.stopped))


def _diverged(trainer: Any) -> DivergedError:
    return DivergedError(
        f"training diverged: after step {trainer.state.global_step} the loss or the trained weights "
        "are not finite. Lower `--lr`."
    )


def _how_to_go_on(ready: Ready, step: int) -> str:
    """What to say when a run was asked to stop."""
    config, done = ready.config, f"stopped after step {step} of {ready.steps}"
    if not ready.recipe.method.can_resume:
        return f"{done}; {config.method} can only start again."
    command = "The same command without --overwrite" if config.overwrite else "The same command"
    return f"{done}, which is saved in {config.output}. {command} goes on from there."


# ---- the output folder --------------------------------------------------------------------------


def _keep_start(ready: Ready) -> None:
    """Write what a run is begun with: config.yaml, and what its method needs later."""
    config, output = ready.config, Path(ready.config.output)
    again = replace(config, overwrite=False)  # it must not replace what it is the config of
    write_text(output / "config.yaml", as_yaml(again))
    ready.recipe.keep_start(ready.model, output / "start")


def _save_adapter(ready: Ready) -> Kept:
    """Write `adapter/`, at once or not at all."""
    output = Path(ready.config.output)
    with replacing(output / "adapter") as folder:
        kept = ready.recipe.save(ready.model, folder, output / "start")
        ready.loaded.processor.save_pretrained(folder)
    return kept


def _write_report(
    output: Path, report: dict[str, Any], history: list[dict[str, Any]], names: list[str]
) -> None:
    """Write the results, report.json last."""
    write_json(output / "history.json", history)
    if names:
        write_json(output / "labels.json", names)
    write_json(output / "report.json", report)


def _last_tenth(history: list[dict[str, Any]]) -> float:
    """Mean training loss over the last tenth of the logged steps, without any that was skipped."""
    losses = [entry["loss"] for entry in history]
    tail = [loss for loss in losses[-max(1, len(losses) // 10) :] if math.isfinite(loss)]
    return sum(tail) / len(tail) if tail else float("nan")
