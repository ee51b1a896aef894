"""Packed rows: only where a row learns as it would alone."""

import dataclasses
import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from geolora.errors import DataError, SettingError
from geolora.settings.train_config import TrainConfig
from geolora.tasks import causal_lm
from geolora.tasks.causal_lm import CausalLM
from geolora.training import run as training
from models import tiny_llama
from rows import sums

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:trl.*"),
]
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
WIDE = {**SMALL, "intermediate_size": 48, "max_position_embeddings": 64}
LEAKING = {
    "OPT": {**SMALL, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "Bloom": {**SMALL, "n_layer": 2, "n_head": 2},
    "Falcon": {**SMALL, "alibi": False},
    "BioGpt": WIDE,
    "Mpt": {**SMALL, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
}
APART = {
    "GPT2": {**SMALL, "n_positions": 64},
    "Llama": WIDE,
    "GPTNeoX": WIDE,
    "Mistral": {**WIDE, "num_key_value_heads": 2},
    "Mixtral": {**WIDE, "num_key_value_heads": 2, "num_local_experts": 4},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model")


def config_of(folder: Path, kind: str, settings: dict, tokenizer: Path) -> TrainConfig:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "model")
    rows = "\n".join(json.dumps(row) for row in sums(16, 0))
    (folder / "rows.jsonl").write_text(rows)
    return TrainConfig(
        model=str(folder / "model"), task="causal-lm", prompt="question", completion="answer",
        train=str(folder / "rows.jsonl"), eval=str(folder / "rows.jsonl"), packing=True, rank=4,
        max_length=32, max_steps=1, batch_size=4, output=str(folder / "out"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_whose_packed_rows_see_each_other_is_refused(
    kind: str, tmp_path: Path, tokenizer: Path
) -> None:
    config = config_of(tmp_path, kind, LEAKING[kind], tokenizer)
    with pytest.raises(SettingError, match="`--packing`: .*(a row sees|does not take)") as caught:
        training.train(config, training.load(config))
    assert str(caught.value).endswith("Leave --packing out.")
    assert not (tmp_path / "out").exists()
    alone = dataclasses.replace(config, packing=False)
    CausalLM().load(alone, training.load(alone))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", APART)
def test_others_may_pack(kind: str, dtype: str, tmp_path: Path, tokenizer: Path) -> None:
    config = config_of(tmp_path, kind, APART[kind], tokenizer)
    config = dataclasses.replace(config, dtype=dtype)
    loaded = CausalLM().load(config, training.load(config))
    assert not loaded.model.training


def test_a_model_that_changes_positions_alone_is_refused(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mask keeps rows apart, but the second row does not begin at position 0."""
    config = config_of(tmp_path, "GPT2", APART["GPT2"], tokenizer)
    forward = transformers.GPT2LMHeadModel.forward

    def shifted(self: object, position_ids: Any = None, **batch: object) -> SimpleNamespace:
        if position_ids is None:
            return forward(self, **batch)
        place = torch.arange(position_ids.shape[1])[None] // 2
        keep = position_ids + place * (position_ids > 0)
        return forward(self, position_ids=keep, **batch)

    monkeypatch.setattr(transformers.GPT2LMHeadModel, "forward", shifted)
    with pytest.raises(SettingError, match="`--packing`"):
        CausalLM().load(config, training.load(config))


@pytest.mark.parametrize("silent", [True, False])
def test_progress_bars_are_as_they_were(tmp_path: Path, tokenizer: Path, silent: bool) -> None:
    import datasets

    (datasets.disable_progress_bars if silent else datasets.enable_progress_bars)()
    config = config_of(tmp_path, "Llama", APART["Llama"], tokenizer)
    data = training.load(config)
    task = CausalLM()
    task.encode(task.load(config, data), data.train, config)
    assert datasets.are_progress_bars_disabled() == silent


def test_a_text_file_has_an_end_and_no_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfthe film")
    config = TrainConfig(
        model="m", task="causal-lm", train=str(tmp_path / "a.txt"), eval=str(tmp_path / "a.txt")
    )
    assert training.load(config).train.inputs == [{"text": "the film"}]
    monkeypatch.setattr(causal_lm, "LONGEST_TEXT", 1000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"x" * 1001))
    with pytest.raises(DataError, match="b.txt.gz has more than 1,000 characters, too many for"):
        training.load(dataclasses.replace(config, eval=str(tmp_path / "b.txt.gz")))
