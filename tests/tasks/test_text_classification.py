"""Texts with classes and numbers: what a file says is what is learnt."""

import dataclasses
import json
from pathlib import Path

import pytest

from geolora.errors import DataError
from geolora.settings.train_config import TrainConfig
from geolora.tasks.text_classification import labelled_texts
from geolora.training import run as training
from models import tiny_llama


def config_of(folder: Path, train: list, held_out: list, **settings: str) -> TrainConfig:
    for name, labels in (("train", train), ("dev", held_out)):
        rows = [json.dumps({"text": "a film", "label": label}) for label in labels]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return TrainConfig(
        model="m", train=str(folder / "train.jsonl"), eval=str(folder / "dev.jsonl"), **settings
    )


@pytest.mark.parametrize("label", [["joy", "film"], [0, 1], {"name": "joy"}, float("nan")])
@pytest.mark.parametrize("side", ["train", "dev"])
def test_a_label_is_one_class(tmp_path: Path, label: object, side: str) -> None:
    good = ["joy", "fear"]
    given = {"train": good, "dev": good, side: [*good, label]}
    with pytest.raises(DataError, match=f"one name or number per row; row 3 of {side}.jsonl has"):
        training.load(config_of(tmp_path, given["train"], given["dev"]))
    with pytest.raises(DataError, match="one name or number per row; row 2 of train has"):
        labelled_texts([{"text": "a", "label": "joy"}, {"text": "a", "label": label}], [])


def test_classes_are_numbered_alike_in_both_files(tmp_path: Path) -> None:
    data = training.load(config_of(tmp_path, [0.0, 1.0], [1, 0, "1.0"]))
    assert (data.names, data.train.labels, data.held_out.labels) == (["0", "1"], [0, 1], [1, 0, 1])
    data = training.load(config_of(tmp_path, ["nan", "Infinity"], ["nan"]))
    assert (data.names, data.held_out.labels) == (["Infinity", "nan"], [1])


def test_numbers_that_cannot_be_learnt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"up to 1e\+16.*row 2 of dev.jsonl has 1e\+300"):
        training.load(config_of(tmp_path, [1.0], [1, 1e300], task="text-regression"))


def test_a_text_without_a_token_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    config = dataclasses.replace(
        config_of(tmp_path, ["joy", "fear"], ["joy"]), model=str(tmp_path / "model")
    )
    data = training.load(config)
    data.train.inputs[1] = ("  ",)
    task = training.TASKS[config.task]
    loaded = task.load(config, data)
    with pytest.raises(DataError, match="`--text`: '  ' has no token that the model knows"):
        task.encode(loaded, data.train, config)
