"""What a run is: one field per flag of `geolora train`, checked before anything is loaded."""

import math
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from geolora import processes
from geolora.errors import ModelError, OutputError, SettingError, nearest
from geolora.files import read_json
from geolora.methods import STARTS, TRAINABLE
from geolora.tasks.metrics import METRICS, METRICS_OF
from geolora.training.output_folder import check_output

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
        tuple(METRICS),
    )
    method: str = _flag("geolora", "how the adapter is trained", TRAINABLE)
    init: str = _flag(
        "default",
        "start of the pairs: B = 0, or from the gradient; lora-ga trains half of --rank",
        INITS,
    )
    rank: int = _flag(16, "physical width r of every pair: the most a layer can use")
    start_rank: int | None = _flag(None, "rank to start with (geolora); all of --rank if not given")
    lr: float | None = _flag(None, "step size; a default per method if not given")
    rest_lr: float = _flag(1e-3, "AdamW's step size for head and biases")
    budget: int | None = _flag(None, "adapter parameters to keep at most")
    tail: float = _flag(0.25, "share of a layer's singular values that may be cut (geolora)")
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


def check(config: TrainConfig) -> None:
    """Refuse settings that cannot work, before anything is loaded or written.

    Raises:
        SettingError: a flag out of its range. OutputError: an output folder that exists.
    """
    for spec in fields(config):
        value, choices = getattr(config, spec.name), spec.metadata["choices"]
        flag = f"--{spec.name.replace('_', '-')}"
        unbounded = spec.name in ("seed", "tail", "lr", "rest_lr")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and not unbounded and not value > 0:
            raise SettingError(f"`{flag}` must be above 0; got {value}.")
        if choices and value not in (None, *choices):
            known = ", ".join(choices)
            raise SettingError(
                f"`{flag}` must be one of {known}; got {value}.{nearest(str(value), choices)}"
            )
    if not config.model:
        raise ModelError("`--model` must be given: a local folder or a hub name.")
    if not 0 <= config.seed < 2**32:
        raise SettingError(f"`--seed` must be 0 or above and below 2^32; got {config.seed}.")
    for flag, value in (("--lr", config.lr), ("--rest-lr", config.rest_lr)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise SettingError(f"`{flag}` must be a number >= 0; got {value}.")
    if not math.isfinite(config.epochs):
        raise SettingError(f"`--epochs` must be finite; got {config.epochs}.")
    if config.metric not in (None, *METRICS_OF[config.task]):
        raise SettingError(
            f"`--metric` must be one of {', '.join(METRICS_OF[config.task])} for {config.task}; "
            f"got {config.metric}."
        )
    for name, tasks in ONLY_FOR.items():
        if config.task not in tasks and getattr(config, name) != DEFAULTS[name]:
            raise SettingError(
                f"`--{name.replace('_', '-')}` belongs to --task {', '.join(tasks)}; got {config.task}."
            )
    if "none" in config.report_to.split(",") and config.report_to != "none":
        raise SettingError(f"`--report-to` must be none or loggers; got {config.report_to}.")
    for name in config.report_to.split(","):
        if name not in LOGGERS:
            raise SettingError(
                f"`--report-to` must be of {', '.join(LOGGERS)}; got {name}.{nearest(name, LOGGERS)}"
            )
        if LOGGERS[name] and not any(map(find_spec, LOGGERS[name])):
            raise SettingError(
                f"`--report-to` {name} needs the package `{LOGGERS[name][0]}`. Install it."
            )
    if config.batch_size % parts(config):
        raise SettingError(
            f"`--batch-size` must be a multiple of {parts(config)} (processes times "
            f"--gradient-accumulation); got {config.batch_size}."
        )
    from geolora.training.recipes import recipe_of

    recipe_of(config).check()
    if not config.overwrite:
        _refuse_changed(config)
    if not unfinished(config) or config.overwrite:
        check_output(config.output, config.overwrite, (config.model, config.train, config.eval))


def parts(config: TrainConfig) -> int:
    """Parts of the rows of a step that are computed apart, over all processes."""
    return processes.count() * config.gradient_accumulation


def unfinished(config: TrainConfig) -> bool:
    """Whether the output folder holds a run of the same settings that was stopped."""
    saved = _stopped(config)
    return saved is not None and not _changed(config, saved)


def _stopped(config: TrainConfig) -> dict[str, Any] | None:
    """Settings of the run that was stopped in the output folder, whatever they are."""
    output = Path(config.output)
    if (output / "report.json").exists():
        return None
    try:
        saved = read_json(output / "run.json")
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


def _changed(config: TrainConfig, saved: dict[str, Any]) -> list[str]:
    ours = {key: value for key, value in asdict(config).items() if key != "overwrite"}
    theirs = {key: value for key, value in saved.items() if key not in ("overwrite", "data")}
    return sorted(k for k in {*ours, *theirs} if ours.get(k, ...) != theirs.get(k, ...))


def _refuse_changed(config: TrainConfig) -> None:
    """Raise `OutputError` where the folder holds a stopped run of other settings."""
    saved = _stopped(config)
    changed = _changed(config, saved) if saved else []
    if saved and changed and changed != ["output"]:
        flag = changed[0].replace("_", "-")
        raise OutputError(
            f"`--output`: {config.output} holds a stopped run with --{flag} "
            f"{saved.get(changed[0])}, now {getattr(config, changed[0], None)}. Give the same flags "
            "to go on, choose another folder, or add --overwrite to lose it."
        )


def planned_steps(config: TrainConfig, rows: int) -> int:
    """Number of optimizer steps of a run."""
    if config.max_steps:
        return config.max_steps
    return max(1, round(config.epochs * -(-rows // config.batch_size)))
