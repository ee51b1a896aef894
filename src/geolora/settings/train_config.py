"""What may be said of a run: one field per flag of `geolora train`, with its help and its choices.

Whether what is said can work is checked in `training/check.py`.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from geolora.methods import STARTS, TRAINABLE

METRICS_OF = {
    "text-classification": ("accuracy", "matthews", "f1", "macro_f1"),
    "text-regression": ("pearson",),
    "token-classification": ("entity_f1", "token_accuracy"),
    "image-classification": ("accuracy", "matthews", "f1", "macro_f1"),
    "causal-lm": ("perplexity", "exact_match"),
}
"""Metrics of every task, the default first; `tasks/metrics.py` computes them."""
METRICS = tuple(sorted({metric for metrics in METRICS_OF.values() for metric in metrics}))
TASKS = tuple(METRICS_OF)
LOGGERS = {
    "none": (),
    "mlflow": ("mlflow",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Where Trainer can log to: packages of which one must be there."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
MIXED = ("no", "bf16", "fp16")
INITS = ("default", "gaussian", *STARTS)


def _flag(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """A run of `geolora train`: one field per flag, the same words."""

    model: str = _flag("", "local model folder or hub name")
    train: str = _flag(
        "",
        "training rows: .jsonl, .jsonl.gz, .csv or .parquet file, or hub set OWNER/NAME[:SPLIT]; .txt file "
        "(causal-lm); folder of class folders or .npz file (image-classification)",
    )
    eval: str = _flag("", "evaluation rows, of the same columns")
    train_rows: int | None = _flag(None, "use only the first rows of --train; all if not given")
    task: str = _flag(TASKS[0], "what is learnt", TASKS)
    text: str = _flag("text", "column of the text, or of the list of words (token-classification)")
    image: str = _flag("image", "column of the picture: a path, or the picture itself")
    text_pair: str | None = _flag(None, "column of a second text, for pairs")
    label: str = _flag("label", "column of the class, number or list of tags")
    prompt: str = _flag("prompt", "column of the prompt, for causal-lm with --completion")
    completion: str = _flag("completion", "column of the answer to the prompt, which is learnt")
    packing: bool = _flag(False, "several texts in one row of --max-length tokens (causal-lm)")
    max_new_tokens: int = _flag(256, "tokens of a generated answer (--metric exact_match)")
    metric: str | None = _flag(
        None,
        "score of the evaluation rows; accuracy, pearson, entity_f1 or perplexity if not given",
        METRICS,
    )
    method: str = _flag("geolora", "how the adapter is trained", TRAINABLE)
    init: str = _flag(
        "default",
        "start of the pairs: B = 0, or from the gradient; lora-ga trains half of --rank",
        INITS,
    )
    rank: int = _flag(16, "physical width r of every pair: the most a layer can use")
    start_rank: int | None = _flag(None, "rank to start with (geolora); all of --rank if not given")
    lr: float | None = _flag(
        None,
        "step size; auto, or not given: found by a search before training (dora, adalora: 1e-3)",
    )
    rest_lr: float = _flag(1e-3, "AdamW's step size for head and biases")
    budget: int | None = _flag(None, "adapter parameters to keep at most")
    tail: float = _flag(0.2, "share of what directions gain that may be given up (geolora)")
    epochs: float = _flag(3.0, "passes over the training file")
    max_steps: int | None = _flag(None, "number of steps; overrides --epochs")
    batch_size: int = _flag(32, "rows per step, of all processes together")
    gradient_accumulation: int = _flag(1, "parts that the rows of a step are computed in")
    gradient_checkpointing: bool = _flag(False, "compute activations twice instead of keeping them")
    dtype: str = _flag("auto", "numbers of the base weights; auto: as they are saved", DTYPES)
    mixed_precision: str = _flag("no", "autocast of the forward pass; fp16 needs a GPU", MIXED)
    max_length: int | None = _flag(
        None,
        "tokens per row, longer texts are cut; 128 (causal-lm: 1024) or the model's limit if not given",
    )
    seed: int = _flag(0, "seed of the head, the adapter and the order of the data")
    report_to: str = _flag(
        "none",
        f"where losses and ranks are logged to: {', '.join(LOGGERS)}; several by commas",
    )
    save_every: int | None = _flag(None, "steps between checkpoints; none if not given")
    output: str = _flag("geolora-output", "folder to write")
    overwrite: bool = _flag(False, "replace an output folder that exists")


HEADINGS = {
    "model and data": ["model", "train", "eval", "train_rows", "task"],
    "columns": ["text", "text_pair", "image", "label", "prompt", "completion"],
    "adapter": ["method", "init", "rank", "start_rank", "lr", "rest_lr", "budget", "tail"],
    "training": ["epochs", "max_steps", "batch_size", "max_length", "packing", "seed"],
    "scoring": ["metric", "max_new_tokens"],
    "machine": ["dtype", "mixed_precision", "gradient_accumulation", "gradient_checkpointing"],
    "output": ["output", "overwrite", "save_every", "report_to"],
}
"""The settings under the headings that help shows."""
DEFAULTS = {spec.name: spec.default for spec in fields(TrainConfig)}
ONLY_FOR = {
    "text_pair": ("text-classification", "text-regression"),
    "image": ("image-classification",),
    "prompt": ("causal-lm",),
    "completion": ("causal-lm",),
    "packing": ("causal-lm",),
    "max_new_tokens": ("causal-lm",),
    "max_length": tuple(task for task in TASKS if task != "image-classification"),
}
"""Settings that only some tasks take."""
