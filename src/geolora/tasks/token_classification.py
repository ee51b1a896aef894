"""Token classification: a list of words per row and a tag for each (names, parts of speech)."""

from pathlib import Path
from typing import Any, ClassVar

import torch

from geolora.errors import DataError, SettingError, listed, shown
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
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


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
        collate = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
        return Loaded(model, tokenizer, names_of_heads(model, info), collate)

    def encode(
        self,
        loaded: Loaded,
        rows: Rows,
        config: TrainConfig,  # noqa: ARG002
    ) -> list[dict[str, Any]]:
        """One example per row; a word's tag stands at its first token, its other tokens are ignored."""
        batch = loaded.processor(rows.inputs, is_split_into_words=True, truncation=True)
        examples = []
        for i, tags in enumerate(rows.labels):
            words, labels = batch.word_ids(i), []
            for position, word in enumerate(words):
                begins = word is not None and (position == 0 or words[position - 1] != word)
                labels.append(tags[word] if begins else IGNORED)
            examples.append({**{key: batch[key][i] for key in batch}, "labels": labels})
        return examples

    def scored(
        self,
        logits: list[torch.Tensor],
        examples: list[dict[str, Any]],
        loaded: Loaded,
        config: TrainConfig,
    ) -> Predictions:
        """Words that are right, and words; or entities that are right and predicted, and those there are.

        Words beyond the longest row are not scored.
        """
        predictions, targets = [], []
        names = loaded.model.config.id2label
        for row, example in zip(logits, examples, strict=True):
            labels = torch.tensor(example["labels"])
            kept = labels != IGNORED
            guess, right = row[: len(labels)].argmax(-1)[kept], labels[kept]
            if config.metric == "token_accuracy":
                predictions.append(int((guess == right).sum()))
                targets.append(len(right))
                continue
            ours, theirs = (entities([names[int(i)] for i in tags]) for tags in (guess, right))
            predictions.append([len(ours & theirs), len(ours)])
            targets.append(len(theirs))
        return Predictions(predictions, targets)


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
