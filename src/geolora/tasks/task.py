"""What a task is: what differs between text, images and language, behind the one training of `training/run.py`."""

import hashlib
import json
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils.data import Subset

from geolora.adapters.base_model import FAILURES, quietly
from geolora.errors import DataError, ModelError, first_line
from geolora.files.reading import is_folder
from geolora.processes import one_device
from geolora.settings.train_config import TrainConfig
from geolora.tasks.rows import class_names, read_rows

NO_CLASS = re.compile(
    r"Unrecognized configuration class <class '[\w.]*?(\w+)'> for this kind of AutoModel: (\w+)"
)
"""What transformers says of an architecture that it has no class for."""


@dataclass(frozen=True)
class Rows:
    """Inputs, in the form a task's `encode` takes, and their labels; as many of both."""

    inputs: list[Any]
    labels: list[Any]

    def __len__(self) -> int:
        return len(self.inputs)

    def at(self, indices: Sequence[int]) -> "Rows":
        """The rows of these indices."""
        return Rows([self.inputs[i] for i in indices], [self.labels[i] for i in indices])


@dataclass(frozen=True)
class Data:
    """Rows to train on and rows to score on.

    Attributes:
        names: class names by index; empty where there are no classes.
    """

    train: Rows
    held_out: Rows
    names: list[str]

    def digest(self) -> str:
        """A hash of everything that is learnt from and scored on."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for values in (
            side for rows in (self.train, self.held_out) for side in (rows.inputs, rows.labels)
        ):
            digest.update(f"{len(values)} values\n".encode())
            for value in values:
                digest.update(_bytes_of(value) + b"\n")
        return digest.hexdigest()


def _bytes_of(value: Any) -> bytes:
    if hasattr(value, "tobytes"):  # an array
        return f"{value.dtype} {value.shape} ".encode() + value.tobytes()
    return json.dumps(value).encode()


class Loaded(NamedTuple):
    """A base model, ready for an adapter.

    Attributes:
        processor: its tokenizer or image processor; saved beside the adapter.
        heads: names of modules that are trained in full and saved beside the pairs.
        collate: examples to a batch of tensors.
    """

    model: Any
    processor: Any
    heads: list[str]
    collate: Callable[[list[Any]], Any]


class Predictions(NamedTuple):
    """What is scored, a number or a short list of numbers per row; see `metrics.py`."""

    predictions: list[Any]
    targets: list[Any]


class Task(ABC):
    """A kind of task; holds no state.

    Attributes:
        peft_type: PEFT's name of it, written into the adapter's config.
        arguments: what it adds to `TrainingArguments`. extras: what it adds to those of Trainer.
    """

    peft_type = "SEQ_CLS"
    arguments: ClassVar[dict[str, Any]] = {}
    extras: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def read(self, config: TrainConfig) -> Data:
        """Read and check the files of a run.

        Raises:
            DataError: what is missing or misspelt, with the nearest name.
        """

    @abstractmethod
    def load(self, config: TrainConfig, data: Data) -> Loaded:
        """The base model and what goes with it.

        Raises:
            ModelError: it cannot be loaded, or is of another kind. SettingError: a flag that does not fit it.
        """

    @abstractmethod
    def encode(self, loaded: Loaded, rows: Rows, config: TrainConfig) -> list[dict[str, Any]]:
        """Examples to train on, not always one per row; `length(example)` sorts them."""

    def length(self, example: dict[str, Any]) -> int:
        """Tokens of an example: those of like length share a batch."""
        return len(example["input_ids"])

    def trainer(
        self,
        loaded: Loaded,
        examples: list[Any],
        order: list[int],
        settings: dict[str, Any],
        **more: Any,
    ) -> Any:
        """A `transformers.Trainer` that trains on examples in an order.

        Args:
            settings: those of `TrainingArguments`. more: arguments of the trainer.
        """
        from transformers import Trainer, TrainingArguments

        trainer = Trainer(
            args=one_device(TrainingArguments(**settings, **self.arguments)),
            train_dataset=Subset(examples, order),  # pyright: ignore[reportArgumentType]
            data_collator=loaded.collate,
            **self.extras,
            **more,
        )
        # a model with a head takes the mean over the rows it is given, whatever else it is told: Trainer
        # must take the mean over the microbatches of a step
        trainer.model_accepts_loss_kwargs = False
        return trainer

    def predict(self, trainer: Any, loaded: Loaded, rows: Rows, config: TrainConfig) -> Predictions:
        """Predictions for rows by the trained model."""
        examples = self.encode(loaded, rows, config)
        by_length = sorted(range(len(examples)), key=lambda i: self.length(examples[i]))
        output = trainer.predict([examples[i] for i in by_length]).predictions
        first = output[0] if isinstance(output, tuple) else output  # logits come first
        logits: list[Any] = [None] * len(examples)
        for i, row in zip(by_length, torch.as_tensor(first), strict=True):
            logits[i] = row
        return self.scored(logits, examples, loaded, config)

    def scored(
        self,
        logits: list[torch.Tensor],
        examples: list[dict[str, Any]],
        loaded: Loaded,  # noqa: ARG002
        config: TrainConfig,  # noqa: ARG002
    ) -> Predictions:
        """What is scored of the logits (classes,) of every example: the class index."""
        return Predictions(
            [int(row.argmax()) for row in logits], [example["labels"] for example in examples]
        )


def source_of(config: TrainConfig, flag: str) -> str:
    """What `--train` or `--eval` names.

    Raises:
        DataError: nothing.
    """
    source = config.train if flag == "--train" else config.eval
    if not source:
        raise DataError(f"`{flag}` must be given: a file of rows, or a hub set.")
    return source


def rows_of(config: TrainConfig, flag: str) -> list[dict[str, Any]]:
    """Rows of the file of a flag, of the first `--train-rows` where it is the training file.

    Raises:
        DataError: no file is given, or it cannot be read.
    """
    rows = read_rows(source_of(config, flag), flag)
    return rows[: config.train_rows] if flag == "--train" else rows


def loading(config: TrainConfig, load: Callable[[str], Any]) -> Any:
    """What `load(source)` gives for the model of a run, quietly.

    Args:
        load: takes the absolute path of the folder, so that the adapter finds its base from anywhere, or the hub name.

    Raises:
        ModelError: it cannot be loaded, in one line.
    """
    from pathlib import Path

    source = str(Path(config.model).resolve()) if is_folder(config.model) else config.model
    try:
        with quietly():  # a new head is what we ask for, not news
            return load(source)
    except FAILURES as error:
        if missing := NO_CLASS.search(str(error)):
            raise ModelError(
                f"`--model`: {config.model} cannot be trained for {config.task}: transformers has no "
                f"{missing[2]} with a {missing[1]}. Choose another model or task."
            ) from error
        raise ModelError(
            f"`--model`: {config.model} cannot be loaded: {first_line(error)}.{_advice(source, error)}"
        ) from error


@contextmanager
def naming_model_errors(config: TrainConfig, trainer: Any = None) -> Iterator[None]:
    """Say in one line what a model's own code raises at the first batch it is given, before a step is made.

    Its image processor makes pictures of another size, say, or it reads settings of a layer that an adapter wraps.

    Args:
        trainer: knows of the steps, where there can be any.

    Raises:
        ModelError: it cannot compute a batch. Other errors pass: a full disk, a lack of memory, one of later.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except FAILURES as error:
        inside = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        late = trainer is not None and trainer.state.global_step
        if late or isinstance(error, OSError) or "forward" not in inside:
            raise
        raise ModelError(
            f"`--model`: {config.model} cannot compute a batch: {type(error).__name__}: "
            f"{first_line(error)}. Check that its tokenizer or image processor is the model's own, or choose another "
            "model."
        ) from error


def _advice(source: str, error: Exception) -> str:
    """What helps where transformers cannot read quantised weights as another class than they were saved from."""
    from transformers import PretrainedConfig

    with quietly(), suppress(*FAILURES):
        config, _ = PretrainedConfig.get_config_dict(source)
        if isinstance(error, RuntimeError) and "quantization_config" in config:
            return " It is quantised: save it as the class of the task, with its head."
    return ""


def names_of_heads(model: Any, info: Mapping[str, Any]) -> list[str]:
    """Modules to train in full: those whose weights the checkpoint did not have, and the classifier.

    A module that is made of several of them alone (RoBERTa's `classifier`, of `dense` and `out_proj`) is named
    instead of them: on loading a classifier peft looks for it by that name.

    Args:
        info: what `from_pretrained(output_loading_info=True)` gives.
    """
    missing = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    kept = {
        name
        for name, module in model.named_modules()
        if {"classifier", "score"} & set(name.split("."))
        and not list(module.children())
        and list(module.parameters())
    }
    heads = {key.rpartition(".")[0] for key in missing} | kept
    while wider := _made_of_heads(model, heads):
        heads = {name for name in heads if not name.startswith(f"{wider}.")} | {wider}
    return sorted(heads)


def _made_of_heads(model: Any, heads: set[str]) -> str | None:
    """A module with a forward pass whose parameters are those of several heads, and of nothing else."""
    for parent in sorted({name.rpartition(".")[0] for name in heads} - {""}):
        inside = [name for name in heads if name.startswith(f"{parent}.")]
        module = model.get_submodule(parent)
        theirs = {id(p) for name in inside for p in model.get_submodule(name).parameters()}
        if (
            len(inside) > 1
            and all(id(p) in theirs for p in module.parameters())
            and not isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict)
        ):
            return parent
    return None


def with_head(auto: Any, source: str, config: TrainConfig, **head: Any) -> tuple[Any, Any]:
    """A model of an auto class, with a new head where its own is missing or of another size, and what was missing.

    Args:
        head: `class_settings`, or what else the head takes.
    """
    return auto.from_pretrained(
        source,
        dtype=config.dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
        **head,
    )


def with_classes(train: Rows, held_out: Rows, name: str = "label") -> Data:
    """`Data` with class names, and labels as their indices."""
    names = class_names(train.labels, held_out.labels, name)
    index = {label: i for i, label in enumerate(names)}

    def indexed(labels: Sequence[Any]) -> list[int]:
        return [index[str(label)] for label in labels]

    return Data(
        Rows(train.inputs, indexed(train.labels)),
        Rows(held_out.inputs, indexed(held_out.labels)),
        names,
    )


def class_settings(names: list[str]) -> dict[str, Any]:
    """What `from_pretrained` takes for a head of these classes."""
    return {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }
