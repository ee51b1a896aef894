"""Heads that are trained in full are saved so that stock peft finds them again."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from geolora.settings.train_config import TrainConfig
from geolora.tasks.text_classification import labelled_texts
from geolora.training import run as training
from models import tiny_bert
from rows import WORDS, reviews

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
SMALL = {
    "vocab_size": len(WORDS) + 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "Roberta": ({}, ["classifier"]),
    "Electra": ({"embedding_size": 32}, ["classifier"]),
    "MPNet": ({}, ["classifier"]),
    "DistilBert": (
        {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
        ["classifier", "pre_classifier"],
    ),
}
"""Models with what their configuration needs, and their heads: the first three are of two layers, dense and out_proj."""


def model_folder(kind: str, folder: Path) -> Path:
    tiny_bert(folder / "bert")
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SMALL, **KINDS[kind][0])
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(folder / "bert").save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize(
    "kind, method", [*((kind, "geolora") for kind in KINDS), ("Roberta", "dora")]
)
def test_stock_peft_loads_the_head_and_predicts_the_same(
    kind: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, data = model_folder(kind, tmp_path), labelled_texts(reviews(60), reviews(20, seed=1))
    config = TrainConfig(
        model=str(source), method=method, rank=4, max_steps=4, batch_size=16, max_length=16,
        output=str(tmp_path / "out"),
    )  # fmt: skip
    seen: dict[str, Any] = {}
    predict = training.TASKS[config.task].predict

    def kept(trainer: Any, loaded: Any, rows: Any, given: Any) -> Any:
        seen["model"] = trainer.model
        return predict(trainer, loaded, rows, given)

    monkeypatch.setattr(training.TASKS[config.task], "predict", kept)
    training.train(dataclasses.replace(config), data)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    stock = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "adapter")
    batch = tokenizer([text for (text,) in data.held_out.inputs], padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted, logits = seen["model"].eval()(**batch).logits, stock(**batch).logits
    assert torch.allclose(logits, wanted, atol=1e-5)
    heads = seen["model"].peft_config["default"].modules_to_save
    assert heads == KINDS[kind][1]
