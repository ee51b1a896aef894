"""Words and tags: alignment with tokens, entities, and that stock peft computes what was scored."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForTokenClassification, AutoTokenizer

from geolora.errors import DataError, DataWarning, SettingError
from geolora.settings.train_config import TrainConfig
from geolora.tasks.task import Predictions
from geolora.tasks.token_classification import (
    IGNORED,
    TokenClassification,
    entities,
    mean_over_words,
)
from geolora.training import run as training
from models import tiny_bert
from rows import sentences

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    tiny_bert(tmp_path / "model")
    for name, rows in (("train", sentences(120, 0)), ("dev", sentences(40, 1))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return TrainConfig(
        model=str(tmp_path / "model"), task="token-classification", text="words", label="tags",
        train=str(tmp_path / "train.jsonl"), eval=str(tmp_path / "dev.jsonl"), rank=8, lr=2e-2,
        rest_lr=1e-2, max_steps=120, batch_size=16, output=str(tmp_path / "out"),
    )  # fmt: skip


@pytest.mark.parametrize("side", ["right", "left"])
def test_tags_are_learnt_and_scored_as_stock_peft_computes_them(
    config: TrainConfig, side: str
) -> None:
    file = Path(config.model) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "padding_side": side}))
    outcome = training.train(config, training.load(config))
    assert outcome.report["metric"] == "entity_f1"
    assert outcome.report["value"] > 0.7
    folder = Path(config.output) / "adapter"
    names = json.loads((Path(config.output) / "labels.json").read_text())
    base = AutoModelForTokenClassification.from_pretrained(config.model, num_labels=len(names))
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hits = found = there = 0
    for row in sentences(40, 1):
        with torch.no_grad():
            logits = loaded(**tokenizer(" ".join(row["words"]), return_tensors="pt")).logits[
                0, 1:-1
            ]
        ours = entities([names[i] for i in logits.argmax(-1).tolist()])
        theirs = entities(row["tags"])
        hits, found, there = hits + len(ours & theirs), found + len(ours), there + len(theirs)
    assert outcome.report["value"] == pytest.approx(2 * hits / (found + there), abs=0.01)


def test_a_tag_stands_at_the_first_token_of_its_word(config: TrainConfig) -> None:
    task, data = TokenClassification(), training.load(config)
    loaded = task.load(config, data)
    data.train.inputs[0][:2] = ["good-film", "bad"]  # three tokens, then one
    example = task.encode(loaded, data.train, config)[0]
    tags = data.train.labels[0]
    assert example["labels"][:6] == [IGNORED, tags[0], IGNORED, IGNORED, tags[1], tags[2]]
    assert example["labels"][-1] == IGNORED


def test_the_accuracy_of_words(config: TrainConfig) -> None:
    config = dataclasses.replace(config, metric="token_accuracy", max_steps=5)
    outcome = training.train(config, training.load(config))
    assert outcome.targets == [len(row["words"]) for row in sentences(40, 1)]
    words = sum(outcome.targets)
    assert outcome.report["value"] == pytest.approx(sum(outcome.predictions) / words)


def test_the_loss_is_the_mean_over_the_words_of_a_step_in_however_many_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, 3, generator=generator)
    labels = torch.randint(0, 3, (6, 5), generator=generator)
    labels[:2, 1:] = IGNORED  # the microbatches have other numbers of words
    wanted = torch.nn.functional.cross_entropy(logits.mT, labels)
    count = (labels != IGNORED).sum()
    parts = [
        mean_over_words(SimpleNamespace(logits=logits[some]), labels[some], count)
        for some in (slice(0, 2), slice(2, 6))
    ]
    assert sum(parts) == pytest.approx(wanted)
    assert mean_over_words(SimpleNamespace(logits=logits), labels) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()), ("B-A I-A O", {(0, 2, "A")}), ("B-A B-A", {(0, 1, "A"), (1, 2, "A")}),
        ("I-A I-B", {(0, 1, "A"), (1, 2, "B")}), ("O I-A", {(1, 2, "A")}), ("B-A O I-A", {(0, 1, "A"), (2, 3, "A")}),
    ],
)  # fmt: skip
def test_entities_as_conlleval_counts_them(tags: str, found: set) -> None:
    assert entities(tags.split()) == found


def test_tags_are_the_same_however_their_numbers_are_written(
    config: TrainConfig, tmp_path: Path
) -> None:
    for name, tags in (("train", [0.0, 1.0]), ("dev", ["1", "0"])):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"words": ["a", "the"], "tags": tags}))
    data = training.load(dataclasses.replace(config, metric="token_accuracy"))
    assert (data.names, data.train.labels, data.held_out.labels) == (["0", "1"], [[0, 1]], [[1, 0]])


def test_what_is_no_row_of_words_and_tags_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    def refused(rows: list[dict], error: type[Exception], match: str, **changes: object) -> None:
        file = tmp_path / "bad.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        with pytest.raises(error, match=match):
            training.load(dataclasses.replace(config, train=str(file), **changes))

    refused(
        [{"words": "the film", "tags": ["O"]}],
        DataError,
        "must hold lists of words; row 1 of bad.jsonl has str",
    )
    refused(
        [{"words": ["the"], "tags": ["O", "O"]}], DataError, "row 1 of bad.jsonl has 1 words and 2"
    )
    refused([{"words": ["the"], "tags": "O"}], DataError, "has 1 words and 'O'")
    for tag in (["O"], None, {}, ""):
        refused(
            [{"words": ["a"], "tags": ["O"]}, {"words": ["a", "the"], "tags": ["O", tag]}],
            DataError,
            "must hold a name or number for every word; row 2 of bad.jsonl has",
        )
    refused(
        [{"words": ["a", "b"], "tags": ["DT", "NN"]}],
        DataError,
        "does not occur in the training data",
    )
    refused(
        [{"words": ["a", "b"], "tags": ["DT", "NN"]}], SettingError, "needs tags O, B-… and I-…",
        eval=str(tmp_path / "bad.jsonl"),
    )  # fmt: skip


# ---- words that the model does not see ----------------------------------------------------------


def unread(config: TrainConfig, metric: str, **rows: list[dict]) -> Predictions:
    """What is scored of a model that guesses the right tag of every word that it sees."""
    for name, some in rows.items():
        Path(getattr(config, name)).write_text("\n".join(json.dumps(row) for row in some))
    config = dataclasses.replace(config, max_length=6, metric=metric)
    data = training.load(config)
    task = TokenClassification()
    loaded = task.load(config, data)

    def right(examples: list[dict]) -> SimpleNamespace:
        logits = torch.zeros(len(examples), 6, len(data.names))
        for row, example in zip(logits, examples, strict=True):
            for place, label in enumerate(example["labels"]):
                row[place, max(label, 0)] = 1
        return SimpleNamespace(predictions=logits.numpy())

    return task.predict(SimpleNamespace(predict=right), loaded, data.held_out, config)


ROWS = [
    {"words": ["the", "film", "is", "a", "plot", "good"], "tags": ["O", "B-ART", "O", "O", "B-ART", "I-ART"]},
    {"words": ["a", "is", "the", "film", "good"], "tags": ["O", "O", "O", "B-ART", "I-ART"]},
    {"words": ["\u200b", "film", " ", "good"], "tags": ["O", "B-ART", "O", "B-ART"]},
]  # fmt: skip
"""Of six tokens four are words: the first row's second entity is not seen, and half of the second row's."""


def test_a_word_that_is_not_seen_is_missed_and_told(config: TrainConfig) -> None:
    with pytest.warns(DataWarning) as told:
        found = unread(config, "entity_f1", train=ROWS[:1], eval=ROWS)
    assert found.predictions == [[1, 1], [0, 1], [2, 2]]
    assert found.targets == [2, 1, 2]
    said = [str(warning.message) for warning in told]
    assert said[0].startswith(
        "`--train`: 2 of 6 words, in 1 rows, lie beyond 6 tokens or have none"
    )
    assert said[1].startswith("`--eval`: 4 of 15 words, in 3 rows,")
    with pytest.warns(DataWarning):
        found = unread(config, "token_accuracy", train=ROWS[:1], eval=ROWS)
    assert (found.predictions, found.targets) == ([4, 4, 3], [6, 5, 4])


@pytest.mark.filterwarnings("ignore::geolora.errors.DataWarning")
def test_a_batch_without_a_word_is_no_divergence(config: TrainConfig) -> None:
    rows = [{"words": [" "], "tags": ["O"]}] * 8 + ROWS[:1]
    for file in (config.train, config.eval):
        Path(file).write_text("\n".join(json.dumps(row) for row in rows))
    config = dataclasses.replace(config, batch_size=1, max_steps=9)
    report = training.train(config, training.load(config)).report
    assert math.isfinite(report["train_loss"])
    logits, none = torch.randn(2, 3, 4, requires_grad=True), torch.full((2, 3), IGNORED)
    for count in (None, 0, torch.tensor(0)):
        loss = mean_over_words(SimpleNamespace(logits=logits), none, count)
        assert float(loss.detach()) == 0
        loss.backward()
        assert not logits.grad.any()


def test_words_of_which_none_is_known_are_refused(config: TrainConfig) -> None:
    Path(config.eval).write_text(json.dumps({"words": [" ", "\t"], "tags": ["O", "O"]}))
    with pytest.raises(DataError, match="`--eval`: no word has a token that the model knows"):
        TokenClassification().load(config, training.load(config))
