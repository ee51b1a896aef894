"""Text classification and regression: rows in, `transformers.Trainer`, a PEFT adapter out."""

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from geolora import __version__
from geolora.adapter import export
from geolora.errors import DataError, ModelError, SettingError
from geolora.pairs import find_pairs
from geolora.tasks.config import TrainConfig, check, planned_steps, unfinished
from geolora.tasks.data import class_names, numbers, read_rows, texts
from geolora.tasks.data import column as column_of
from geolora.tasks.output import clear
from geolora.trainer import for_trainer, progress_callback

WARMUP = 0.06
SETTLE = 0.9
"""Share of the steps after which ranks are judged a last time and then kept."""


@dataclass(frozen=True)
class TextData:
    """Texts (each one or two strings), and labels: class indices, or numbers."""

    train: list[tuple[str, ...]]
    train_labels: list[Any]
    held_out: list[tuple[str, ...]]
    held_out_labels: list[Any]
    names: list[str]
    """Class names by index; empty for regression."""


def load(config: TrainConfig) -> TextData:
    """Read and check the files of a run.

    Raises:
        DataError: what is missing or misspelt, with the nearest name.
    """
    sides = {}
    for flag, path in (("--train", config.train), ("--eval", config.eval)):
        if not path:
            raise DataError(f"`{flag}` must be given: a .jsonl, .jsonl.gz or .csv file.")
        rows = read_rows(path, flag)
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
    return train(config, load(config))


def train(config: TrainConfig, data: TextData) -> dict[str, Any]:
    """Train on data already read; see `run`."""
    check(config)
    from transformers import DataCollatorWithPadding, Trainer, set_seed

    set_seed(config.seed)
    model, tokenizer, new = _load_model(config, data)
    total = planned_steps(config, len(data.train))
    optimizer = _optimizer(config, total)
    model = _with_adapter(model, config, new)
    # building one now finds unusable settings before anything is written
    optimizer[0]()(model, **optimizer[1])

    output = Path(config.output)
    resume = None if config.overwrite else _checkpoint(config, data)
    if resume is None:
        clear(output)
    output.mkdir(parents=True, exist_ok=True)
    _write_json(output / "run.json", {**asdict(config), "data": _digest(data)})

    trainer = Trainer(
        model=model,
        args=_arguments(config, total),
        train_dataset=_encode(tokenizer, data.train, data.train_labels),
        eval_dataset=_encode(tokenizer, data.held_out, data.held_out_labels),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=_pearson if not data.names else _accuracy,
        optimizer_cls_and_kwargs=optimizer,
        callbacks=[progress_callback()],
    )
    _only_our_bar(trainer)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume and str(resume))
    seconds = time.perf_counter() - start
    exported = export(model, output / "adapter")
    tokenizer.save_pretrained(output / "adapter")
    score = trainer.evaluate()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    metric = "accuracy" if data.names else "pearson"
    report = {
        "method": config.method,
        "task": config.task,
        "metric": metric,
        "value": score[f"eval_{metric}"],
        "train_loss": _last_tenth(history),
        "steps": total,
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, total - (_step_of(resume) if resume else 0)),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapter_parameters": exported.adapter_parameters,
        "exported_parameters": exported.exported_parameters,
        "ranks": exported.ranks,
        "peak_memory_bytes": _peak_memory(),
        "seed": config.seed,
        "versions": versions(),
        "command": " ".join(["geolora", *sys.argv[1:]]),
    }
    _write_json(output / "history.json", history)
    if data.names:
        _write_json(output / "labels.json", data.names)
    _write_json(output / "report.json", report)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return report


def versions() -> dict[str, str]:
    """Versions of what made a result."""
    import peft
    import transformers

    return {
        "geolora": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def _load_model(config: TrainConfig, data: TextData) -> tuple[Any, Any, list[str]]:
    """Model, tokenizer, and the modules that are new (heads, poolers) and so must be saved."""
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is what we ask for, not news
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
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
            config.model, num_labels=len(names) or 1, output_loading_info=True, **extra
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


def _with_adapter(model: Any, config: TrainConfig, new: list[str]) -> Any:
    from peft import LoraConfig, TaskType, get_peft_model

    init: Any = True if config.init == "default" else config.init
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules="all-linear",
        exclude_modules=new,
        modules_to_save=new,
        init_lora_weights=init,
    )
    # the task type only now: with it, PEFT would take any module whose name ends like a head
    model = get_peft_model(model, lora)
    model.peft_config["default"].task_type = TaskType.SEQ_CLS
    find_pairs(model)
    return model


def _optimizer(config: TrainConfig, total: int) -> tuple[type, dict[str, Any]]:
    settings: dict[str, Any] = {"rest_lr": config.rest_lr}
    if config.lr is not None:
        settings["lr"] = config.lr
    if config.method == "geolora":
        settings |= {
            "start_rank": config.start_rank,
            "tail": config.tail,
            "budget": config.budget,
            "settle_after": int(SETTLE * total),
        }
    elif config.budget is not None or config.start_rank is not None:
        raise SettingError("`--budget` and `--start-rank` belong to --method geolora.")
    return for_trainer(config.method, **settings)


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
        train_sampling_strategy="group_by_length",  # less padding
        logging_steps=max(1, min(10, total // 20)),
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or total,
        save_total_limit=2,
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


def _accuracy(prediction: Any) -> dict[str, float]:
    hits = _logits(prediction).argmax(-1) == prediction.label_ids
    return {"accuracy": float(hits.mean())}


def _pearson(prediction: Any) -> dict[str, float]:
    """Pearson correlation; 0 where the predictions or the labels are constant."""
    x = torch.as_tensor(_logits(prediction)).double().flatten()
    y = torch.as_tensor(prediction.label_ids).double().flatten()
    x, y = x - x.mean(), y - y.mean()
    size = float(x.norm() * y.norm())
    return {"pearson": float(x @ y) / size if size else 0.0}


def _logits(prediction: Any) -> Any:
    """Some models return more than logits."""
    found = prediction.predictions
    return found[0] if isinstance(found, tuple) else found


def _checkpoint(config: TrainConfig, data: TextData) -> Path | None:
    """The last whole checkpoint of an unfinished run over the same data."""
    if not unfinished(config):
        return None
    saved = json.loads((Path(config.output) / "run.json").read_text(encoding="utf-8"))
    if saved.get("data") != _digest(data):
        raise DataError(
            f"`--output`: {config.output} holds an unfinished run of the same flags over other data. "
            "Choose another folder, or add --overwrite."
        )
    whole = [
        path
        for path in (Path(config.output) / "checkpoints").glob("checkpoint-*")
        if all((path / name).is_file() for name in ("trainer_state.json", "optimizer.pt"))
    ]
    return max(whole, key=_step_of, default=None)


def _digest(data: TextData) -> str:
    """A hash of everything that is learnt from and scored on."""
    return hashlib.sha256(json.dumps(asdict(data)).encode()).hexdigest()


def _last_tenth(history: list[dict[str, Any]]) -> float:
    """Mean training loss over the last tenth of the logged steps."""
    losses = [entry["loss"] for entry in history]
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail) if tail else float("nan")


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the whole file or none."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
