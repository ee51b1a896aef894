"""Text classification and regression: rows in, `transformers.Trainer`, a PEFT adapter out."""

import hashlib
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Subset

from geolora import __version__
from geolora.errors import DataError, DivergedError, ModelError, SettingError
from geolora.tasks.checkpoints import Stopped, checkpoint_callback, flush, latest, write_json
from geolora.tasks.config import TrainConfig, check, planned_steps, unfinished
from geolora.tasks.data import class_names, numbers, read_rows, texts
from geolora.tasks.data import column as column_of
from geolora.tasks.memory import peak_bytes, reset_peak
from geolora.tasks.metrics import METRICS_OF, score
from geolora.tasks.order import batch_order
from geolora.tasks.output import alone, clear, writing
from geolora.tasks.peers import (
    CAN_RESUME,
    add_adapter,
    callbacks_of,
    finish,
    keep_start,
    optimizer_of,
    save,
    start,
)
from geolora.trainer import progress_callback

WARMUP = 0.06
SECONDS = "seconds.json"
"""Seconds of every step so far, in a checkpoint."""


@dataclass(frozen=True)
class TextData:
    """Texts (each one or two strings), and labels: class indices, or numbers."""

    train: list[tuple[str, ...]]
    train_labels: list[Any]
    held_out: list[tuple[str, ...]]
    held_out_labels: list[Any]
    names: list[str]
    """Class names by index; empty for regression."""


class Rows(NamedTuple):
    """Texts and their labels, as in `TextData`."""

    texts: list[tuple[str, ...]]
    labels: list[Any]


class Outcome(NamedTuple):
    """What a run gives.

    Attributes:
        report: what report.json holds. history: the logged training losses.
        predictions: class index or number per held-out row.
        choice: score on the rows for choosing, where there were any.
    """

    report: dict[str, Any]
    history: list[dict[str, Any]]
    predictions: list[Any]
    choice: float | None


def load(config: TrainConfig) -> TextData:
    """Read and check the files of a run.

    Raises:
        DataError: what is missing or misspelt, with the nearest name.
    """
    sides = {}
    for flag, path in (("--train", config.train), ("--eval", config.eval)):
        if not path:
            raise DataError(f"`{flag}` must be given: a file of rows, or a hub set.")
        rows = read_rows(path, flag)
        if flag == "--train":
            rows = rows[: config.train_rows]
        columns = [texts(rows, config.text, "--text", Path(path).name)]
        if config.text_pair:
            columns.append(texts(rows, config.text_pair, "--text-pair", Path(path).name))
        labels = column_of(rows, config.label, "--label", Path(path).name)
        sides[flag] = (list(zip(*columns, strict=True)), labels)
    (train, train_labels), (held_out, held_out_labels) = sides["--train"], sides["--eval"]
    if config.task == "text-regression":
        train_labels = numbers(train_labels, config.label, Path(config.train).name)
        held_out_labels = numbers(held_out_labels, config.label, Path(config.eval).name)
        return TextData(train, train_labels, held_out, held_out_labels, [])
    return with_classes(train, train_labels, held_out, held_out_labels, config.label)


def with_classes(
    train: list[tuple[str, ...]],
    train_labels: Sequence[Any],
    held_out: list[tuple[str, ...]],
    held_out_labels: Sequence[Any],
    name: str = "label",
) -> TextData:
    """`TextData` with class names, and labels as their indices."""
    names = class_names(train_labels, held_out_labels, name)
    index = {label: i for i, label in enumerate(names)}
    return TextData(
        train,
        [index[str(label)] for label in train_labels],
        held_out,
        [index[str(label)] for label in held_out_labels],
        names,
    )


def run(config: TrainConfig) -> dict[str, Any]:
    """Train as configured: check, read, load, train, evaluate, export, report.

    Returns:
        The report that also stands in `<output>/report.json`.
    """
    check(config)
    return train(config, load(config)).report


def train(config: TrainConfig, data: TextData, choice: Rows | None = None) -> Outcome:
    """Train on data already read, or go on with the run that the output folder holds; see `run`.

    Args:
        choice: further rows to predict, for choosing a learning rate.

    Raises:
        Stopped: it was asked to stop, and has saved a checkpoint.
        DivergedError: the loss or the trained weights are no longer finite.
        OutputError: the disk is full, a file cannot be written, or another process works there.
    """
    check(config)
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    reset_peak()
    set_seed(config.seed)
    model, tokenizer, new = _load_model(config, data)
    total = planned_steps(config, len(data.train))
    rows = _encode(tokenizer, data.train, data.train_labels)
    lengths = [len(row["input_ids"]) for row in rows]
    order = batch_order(lengths, config.batch_size, total, config.seed)
    collate = DataCollatorWithPadding(tokenizer)

    def batches(size: int, number: int) -> list[Any]:
        starts = range(0, min(len(order), number * size) - size + 1, size)
        return [collate([rows[i] for i in order[at : at + size]]) for at in starts]

    optimizer = optimizer_of(config, total)
    model = add_adapter(model, config, new, total, batches)
    # building one now finds unusable settings before anything is written
    optimizer[0]()(model, **optimizer[1])

    output, data_id = Path(config.output), digest_of(data)
    run_id = _identity(config, data_id)
    with writing(output):
        resume = None if config.overwrite else _checkpoint(config, data_id, run_id)
        if resume is None:
            clear(output)
        output.mkdir(parents=True, exist_ok=True)
    with writing(output), alone(output):
        write_json(output / "run.json", {**asdict(config), "data": data_id})
        keep_start(model, config, output / "start")

        clock = _clock(resume)
        checkpoints = checkpoint_callback(run_id, config.method in CAN_RESUME)
        trainer = Trainer(
            model=model,
            args=_arguments(config, total),
            train_dataset=Subset(rows, order),  # pyright: ignore[reportArgumentType]
            data_collator=collate,
            optimizer_cls_and_kwargs=optimizer,
            callbacks=[progress_callback(), clock, *callbacks_of(model, config), checkpoints],
        )
        _only_our_bar(trainer)
        start(model, config, batches, resumed=resume is not None)
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
        finish(model, config)
        partial = output / "adapter.partial"
        clear(partial)
        kept = save(model, config, partial, output / "start")
        tokenizer.save_pretrained(partial)
        flush(partial)
        clear(output / "adapter")
        partial.rename(output / "adapter")

        metric = config.metric or METRICS_OF[config.task][0]
        predictions = _predict(trainer, _encode(tokenizer, data.held_out, data.held_out_labels))
        report = {
            "method": config.method,
            "task": config.task,
            "metric": metric,
            "value": score(metric, predictions, data.held_out_labels),
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
            "command": " ".join(["geolora", *sys.argv[1:]]),
        }
        chosen_on = None
        if choice is not None:
            found = _predict(trainer, _encode(tokenizer, choice.texts, choice.labels))
            chosen_on = score(metric, found, choice.labels)
        write_json(output / "history.json", history)
        if data.names:
            write_json(output / "labels.json", data.names)
        write_json(output / "report.json", report)
        for leftover in ("checkpoints", "start"):
            shutil.rmtree(output / leftover, ignore_errors=True)
    return Outcome(report, history, predictions, chosen_on)


def _diverged(trainer: Any) -> DivergedError:
    return DivergedError(
        f"training diverged: after step {trainer.state.global_step} the loss or the trained weights "
        "are not finite. Lower `--lr`."
    )


def _how_to_go_on(config: TrainConfig, step: int, total: int) -> str:
    """What to say when a run was asked to stop."""
    if config.method not in CAN_RESUME:
        return f"stopped after step {step} of {total}; {config.method} can only start again."
    command = "The same command without --overwrite" if config.overwrite else "The same command"
    return (
        f"stopped after step {step} of {total}, which is saved in {config.output}. {command} goes on "
        "from there."
    )


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {"geolora": __version__, "python": sys.version.split()[0], **found}


def _load_model(config: TrainConfig, data: TextData) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and the modules that are new (heads, poolers) and so must be saved."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is what we ask for, not news
    # whole, so that the adapter finds its base from anywhere
    source = str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        names = data.names
        if names:
            labels = dict(enumerate(names))
            extra: dict[str, Any] = {
                "id2label": labels,
                "label2id": {v: k for k, v in labels.items()},
            }
        else:
            extra = {"problem_type": "regression"}
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source,
            num_labels=len(names) or 1,
            output_loading_info=True,
            trust_remote_code=False,
            **extra,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"`--model`: {config.model} cannot be loaded: {first}") from error
    finally:
        logging.set_verbosity(level)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"`--model`: the tokenizer of {config.model} has no padding token.")
    model.config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    longest = min(longest, tokenizer.model_max_length)
    if config.max_length is not None and config.max_length > longest:
        raise SettingError(f"`--max-length` must be at most {longest}; got {config.max_length}.")
    tokenizer.model_max_length = min(config.max_length or 128, longest)
    fresh = {key.rpartition(".")[0] for key in info["missing_keys"]}
    kept = {
        name
        for name, module in model.named_modules()
        if _is_head(name) and not list(module.children())
    }
    return model, tokenizer, sorted(fresh | kept)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] in ("classifier", "score")


def _arguments(config: TrainConfig, total: int) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(Path(config.output) / "checkpoints"),
        max_steps=total,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=max(config.batch_size, 64),
        lr_scheduler_type="linear",
        warmup_steps=round(WARMUP * total),
        # clipping the factors' gradients would change lr per W; AdamW's runs keep Trainer's default
        max_grad_norm=0.0 if config.method == "geolora" else 1.0,
        train_sampling_strategy="sequential",  # in the order of tasks/order.py
        logging_steps=max(1, min(10, total // 20)),
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or total,
        seed=config.seed,
        report_to="none",
        use_cpu=torch.backends.mps.is_available(),  # MPS has no float64
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,
    )


def _encode(tokenizer: Any, rows: list[tuple[str, ...]], labels: list[Any]) -> list[dict[str, Any]]:
    sides = [list(side) for side in zip(*rows, strict=True)]
    batch = tokenizer(*sides, truncation=True)
    keys = list(batch.keys())
    return [
        {**{key: batch[key][i] for key in keys}, "labels": label} for i, label in enumerate(labels)
    ]


def _only_our_bar(trainer: Any) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)


def _predict(trainer: Any, rows: list[dict[str, Any]]) -> list[Any]:
    """Class index, or number, for every row; rows of like length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    found = trainer.predict([rows[i] for i in order]).predictions
    found = torch.as_tensor(found[0] if isinstance(found, tuple) else found)  # logits come first
    values = found.argmax(-1) if found.dim() == 2 and found.shape[1] > 1 else found.flatten()
    result: list[Any] = [None] * len(rows)
    for place, value in zip(order, values.tolist(), strict=True):
        result[place] = value
    return result


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
                self.seconds = json.loads((resume / SECONDS).read_text(encoding="utf-8"))
            self.last = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.last = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            now = time.perf_counter()
            self.seconds.append(now - self.last)
            self.last = now

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / SECONDS, self.seconds, indent=None)

    return Clock()


def _checkpoint(config: TrainConfig, data_id: str, run_id: str) -> Path | None:
    """The last whole checkpoint of an unfinished run over the same data."""
    if not unfinished(config):
        return None
    saved = json.loads((Path(config.output) / "run.json").read_text(encoding="utf-8"))
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


def digest_of(data: TextData) -> str:
    """A hash of everything that is learnt from and scored on."""
    return hashlib.sha256(json.dumps(asdict(data)).encode()).hexdigest()


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
