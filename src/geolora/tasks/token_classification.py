"""Token classification: a list of words per row and a tag for each (names, parts of speech)."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from geolora.errors import DataError, DataWarning, SettingError, listed, shown
from geolora.settings.train_config import TrainConfig
from geolora.tasks.rows import class_label, class_names
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
    with_head,
)
from geolora.tasks.tokenizers import IGNORED, max_length, pad

MAX_LENGTH = 128


def mean_over_words(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> Any:
    """Cross-entropy over the words of a microbatch, as its share of the mean over all words of the step."""
    flat = outputs.logits.flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(
        flat, labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    words = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(words, device=total.device).clamp(
        min=1
    )  # a batch may have no word


class TokenClassification(Task):
    """Words to tags."""

    peft_type = "TOKEN_CLS"
    extras: ClassVar[dict[str, Any]] = {"compute_loss_func": mean_over_words}

    def read(self, config: TrainConfig) -> Data:
        """Columns `--text` (a list of words) and `--label` (as many tags)."""
        train, held_out = (_words_and_tags(config, flag) for flag in ("--train", "--eval"))
        names = class_names(_flat(train.labels), _flat(held_out.labels), config.label)
        if config.metric in (None, "entity_f1") and not all(
            name == "O" or name[:2] in ("B-", "I-") for name in names
        ):
            raise SettingError(
                f"`--metric entity_f1` needs tags O, B-… and I-…; column `{config.label}` has {listed(names[:4])}. "
                "Use --metric token_accuracy."
            )
        index = {name: i for i, name in enumerate(names)}

        def indexed(rows: Rows) -> Rows:
            return Rows(rows.inputs, [[index[str(tag)] for tag in tags] for tags in rows.labels])

        return Data(indexed(train), indexed(held_out), names)

    def load(self, config: TrainConfig, data: Data) -> Loaded:
        """With a head for the tags."""
        from transformers import (
            AutoModelForTokenClassification,
            AutoTokenizer,
            DataCollatorForTokenClassification,
        )

        def load(source: str) -> Any:
            # byte-level tokenizers need it for words; the others do not know it
            tokenizer = AutoTokenizer.from_pretrained(
                source, add_prefix_space=True, trust_remote_code=False
            )
            return tokenizer, *with_head(
                AutoModelForTokenClassification, source, config, **class_settings(data.names)
            )

        tokenizer, model, info = loading(config, load)
        if not tokenizer.is_fast:
            raise SettingError(
                f"`--model`: token-classification needs a fast tokenizer; {config.model} has none."
            )
        tokenizer.padding_side = "right"  # a word's logits are found from the left
        pad(tokenizer, model, config)
        tokenizer.model_max_length = max_length(tokenizer, model, config, MAX_LENGTH)
        for flag, rows in (("--train", data.train), ("--eval", data.held_out)):
            _tell_unread(tokenizer, rows, flag)
        collate = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
        return Loaded(model, tokenizer, names_of_heads(model, info), collate)

    def encode(
        self,
        loaded: Loaded,
        rows: Rows,
        config: TrainConfig,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """One example per row; a word's tag stands at its first token, its other tokens are ignored."""
        batch, firsts = _first_tokens(loaded.processor, rows)
        examples = []
        for i, (tags, first) in enumerate(zip(rows.labels, firsts, strict=True)):
            labels = [IGNORED] * len(batch["input_ids"][i])
            for word, position in first.items():
                labels[position] = tags[word]
            examples.append({**{key: batch[key][i] for key in batch}, "labels": labels})
        return examples

    def predict(self, trainer: Any, loaded: Loaded, rows: Rows, config: TrainConfig) -> Predictions:
        """Words that are right, and words; or entities that are right and predicted, and those there are.

        All words of a row count: one beyond the longest row, or without a token, is never right, and its entity is
        missed.
        """
        names = loaded.model.config.id2label
        guessed = super().predict(trainer, loaded, rows, config).predictions
        _, firsts = _first_tokens(loaded.processor, rows)
        predictions, targets = [], []
        for tags, first, some in zip(rows.labels, firsts, guessed, strict=True):
            guess: list[int | None] = [None] * len(tags)
            for word, tag in zip(sorted(first), some, strict=True):
                guess[word] = tag
            if config.metric == "token_accuracy":
                predictions.append(sum(a == b for a, b in zip(guess, tags, strict=True)))
                targets.append(len(tags))
                continue
            ours = entities(["O" if tag is None else names[tag] for tag in guess])
            theirs = entities([names[tag] for tag in tags])
            predictions.append([len(ours & theirs), len(ours)])
            targets.append(len(theirs))
        return Predictions(predictions, targets)

    def scored(
        self,
        logits: list[torch.Tensor],
        examples: list[dict[str, Any]],
        loaded: Loaded,  # noqa: ARG002
        config: TrainConfig,  # noqa: ARG002
    ) -> Predictions:
        """The tags of the words that have a token, guessed and right."""
        guessed, right = [], []
        for row, example in zip(logits, examples, strict=True):
            labels = torch.tensor(example["labels"])
            kept = labels != IGNORED
            guessed.append(row[: len(labels)].argmax(-1)[kept].tolist())
            right.append(labels[kept].tolist())
        return Predictions(guessed, right)


def _first_tokens(tokenizer: Any, rows: Rows) -> tuple[Any, list[dict[int, int]]]:
    """The rows' tokens, and for every row {word: place of its first token} of the words that have one."""
    batch = tokenizer(rows.inputs, is_split_into_words=True, truncation=True)
    firsts = []
    for i in range(len(rows)):
        first: dict[int, int] = {}
        for position, word in enumerate(batch.word_ids(i)):
            if word is not None:
                first.setdefault(word, position)
        firsts.append(first)
    return batch, firsts


def _tell_unread(tokenizer: Any, rows: Rows, flag: str) -> None:
    """Warn of words that the model does not see; refuse rows of which it sees none.

    Raises:
        DataError: no word of any row has a token.
    """
    _, firsts = _first_tokens(tokenizer, rows)
    if not any(firsts):
        raise DataError(f"`{flag}`: no word has a token that the model knows. Look at the words.")
    unread = [len(words) - len(first) for words, first in zip(rows.inputs, firsts, strict=True)]
    if lost := sum(unread):
        warnings.warn(
            f"`{flag}`: {lost:,} of {sum(map(len, rows.inputs)):,} words, in {sum(map(bool, unread)):,} rows, "
            f"lie beyond {tokenizer.model_max_length} tokens or have none: they are not learnt, and count as wrong "
            "where they are scored. Raise `--max-length`, or cut the rows.",
            DataWarning,
            stacklevel=2,
        )


def entities(tags: list[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, kind) of every entity.

    One begins at B-X, and at an I-X that follows O or another kind, as conlleval counts.
    """
    result, start, kind = set(), 0, ""
    for number, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            result.add((start, number, kind))
            kind = ""
        if mark != "O" and not kind:
            start, kind = number, name
    return result


def _flat(lists: list[list[Any]]) -> list[Any]:
    return [value for some in lists for value in some]


def _words_and_tags(config: TrainConfig, flag: str) -> Rows:
    rows = rows_of(config, flag)
    name = Path(source_of(config, flag)).name
    words = column_of(rows, config.text, "--text", name)
    tags = column_of(rows, config.label, "--label", name)
    for number, (some, of_them) in enumerate(zip(words, tags, strict=True), 1):
        if not (isinstance(some, list) and some and all(isinstance(word, str) for word in some)):
            raise DataError(
                f"`--text`: column `{config.text}` must hold lists of words; row {number} of {name} has "
                f"{type(some).__name__}. A .jsonl file can hold them."
            )
        if not isinstance(of_them, list) or len(of_them) != len(some):
            raise DataError(
                f"`--label`: column `{config.label}` must hold a tag for every word; row {number} of {name} "
                f"has {len(some)} words and {len(of_them) if isinstance(of_them, list) else shown(of_them)}."
            )
    names = classes_of(tags, config, name)
    return Rows(words, names)


def classes_of(tags: list[list[Any]], config: TrainConfig, name: str) -> list[list[str]]:
    """The tags of every row as names of classes.

    Raises:
        DataError: a tag that is no name and no number.
    """
    result = []
    for number, some in enumerate(tags, 1):
        labels = [class_label(tag) for tag in some]
        if None in labels:
            raise DataError(
                f"`--label`: column `{config.label}` must hold a name or number for every word; row {number} "
                f"of {name} has {shown(some[labels.index(None)])}."
            )
        result.append(labels)
    return result
