"""Text classification and regression: one or two texts per row, a class or a number."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from geolora.errors import DataError, shown
from geolora.settings.train_config import TrainConfig
from geolora.tasks.rows import classes, numbers, texts
from geolora.tasks.rows import column as column_of
from geolora.tasks.task import (
    Data,
    Loaded,
    Predictions,
    Rows,
    Task,
    class_settings,
    loading,
    names_of_heads,
    rows_of,
    source_of,
    with_classes,
    with_head,
)
from geolora.tasks.tokenizers import max_length, pad

MAX_LENGTH = 128


class TextClassification(Task):
    """Texts (one or two) to a class."""

    def read(self, config: TrainConfig) -> Data:
        """Columns `--text`, `--text-pair` and `--label`."""
        train, held_out = (
            Rows(rows.inputs, classes(rows.labels, config.label, Path(path).name))
            for path, rows in self._sides(config)
        )
        return with_classes(train, held_out, config.label)

    def _sides(self, config: TrainConfig) -> list[tuple[str, Rows]]:
        """(source, its rows) to train and to score on."""
        return [
            (source_of(config, flag), self._rows(config, flag)) for flag in ("--train", "--eval")
        ]

    def _rows(self, config: TrainConfig, flag: str) -> Rows:
        rows = rows_of(config, flag)
        name = Path(source_of(config, flag)).name
        columns = [texts(rows, config.text, "--text", name)]
        if config.text_pair:
            columns.append(texts(rows, config.text_pair, "--text-pair", name))
        labels = column_of(rows, config.label, "--label", name)
        return Rows(list(zip(*columns, strict=True)), labels)

    def load(self, config: TrainConfig, data: Data) -> Loaded:
        """With a head for the classes, or for a number where there are none."""
        from transformers import (
            AutoModelForSequenceClassification,
            AutoTokenizer,
            DataCollatorWithPadding,
        )

        extra: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        if data.names:
            extra = class_settings(data.names)

        def load(source: str) -> Any:
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            return tokenizer, *with_head(
                AutoModelForSequenceClassification, source, config, **extra
            )

        tokenizer, model, info = loading(config, load)
        pad(tokenizer, model, config)
        tokenizer.model_max_length = max_length(tokenizer, model, config, MAX_LENGTH)
        return Loaded(
            model, tokenizer, names_of_heads(model, info), DataCollatorWithPadding(tokenizer)
        )

    def encode(
        self,
        loaded: Loaded,
        rows: Rows,
        config: TrainConfig,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """One example per row."""
        sides = [list(side) for side in zip(*rows.inputs, strict=True)]
        batch = loaded.processor(*sides, truncation=True)
        keys = list(batch.keys())
        if [] in batch["input_ids"]:
            number = batch["input_ids"].index([]) + 1
            text = shown(rows.inputs[number - 1][0])
            raise DataError(
                f"`--text`: {text} has no token that the model knows. Take the row out."
            )
        return [
            {**{key: batch[key][i] for key in keys}, "labels": label}
            for i, label in enumerate(rows.labels)
        ]


class TextRegression(TextClassification):
    """Texts (one or two) to a number."""

    def read(self, config: TrainConfig) -> Data:
        """Columns as for classes; labels must be numbers."""
        train, held_out = (
            Rows(rows.inputs, numbers(rows.labels, config.label, Path(path).name))
            for path, rows in self._sides(config)
        )
        return Data(train, held_out, [])

    def scored(
        self,
        logits: list[torch.Tensor],
        examples: list[dict[str, Any]],
        loaded: Loaded,  # noqa: ARG002
        config: TrainConfig,  # noqa: ARG002
    ) -> Predictions:
        """The number itself."""
        return Predictions(
            [float(row) for row in logits], [example["labels"] for example in examples]
        )


def labelled_texts(
    train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]
) -> Data:
    """`Data` of rows {"text": ..., "label": class}."""
    learnt, scored = (
        Rows(
            [(row["text"],) for row in rows], classes([row["label"] for row in rows], "label", name)
        )
        for name, rows in (("train", train), ("held_out", held_out))
    )
    return with_classes(learnt, scored)
