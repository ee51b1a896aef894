"""Tiny random models of many architectures, and files for every task, for the matrix of what works with what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from models import tiny_bert, tiny_llama
from rows import WORDS, pictures, reviews, sentences

WIDE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 66, "pad_token_id": 0, "vocab_size": 64,
}  # fmt: skip
"""What most configurations call it."""
CAUSAL = {**WIDE, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 1}
OTHER_NAMES = {"d_model": 32, "vocab_size": 64, "pad_token_id": 0, "eos_token_id": 3}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
          "image_size": 16, "patch_size": 4}  # fmt: skip
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": WIDE,
    "Roberta": WIDE,
    "XLMRoberta": WIDE,
    "Electra": {**WIDE, "embedding_size": 32},
    "MPNet": {**WIDE, "pad_token_id": 1},
    "DistilBert": {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "Deberta": {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "DebertaV2": {**WIDE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "Albert": {**WIDE, "embedding_size": 16},
    "ModernBert": {**WIDE, "cls_token_id": 2, "sep_token_id": 3},
    "XLNet": {**OTHER_NAMES, "n_layer": 2, "n_head": 2, "d_inner": 48},
    "Esm": {**WIDE, "position_embedding_type": "rotary", "mask_token_id": 4},
}
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 66,
             "bos_token_id": 1, "eos_token_id": 1},
    "Llama": CAUSAL,
    "Mistral": CAUSAL,
    "Qwen3": CAUSAL,
    "Gemma3Text": {**CAUSAL, "query_pre_attn_scalar": 16},
    "Phi3": CAUSAL,
    "GPTNeoX": CAUSAL,
    "OPT": {**CAUSAL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0},
    "Falcon": {k: v for k, v in CAUSAL.items() if k != "head_dim"},
    "Mixtral": {**CAUSAL, **EXPERTS},
    "Qwen2Moe": {**CAUSAL, **EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "DeepseekV3": {**CAUSAL, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                   "moe_intermediate_size": 16, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
    "Mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
}  # fmt: skip
BOTH_SIDES: dict[str, dict[str, Any]] = {
    "T5": {**OTHER_NAMES, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2,
           "decoder_start_token_id": 0},
    "Bart": {**OTHER_NAMES, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
             "max_position_embeddings": 66},
}  # fmt: skip
PICTURES: dict[str, dict[str, Any]] = {
    "ViT": VISION,
    "DeiT": VISION,
    "ConvNext": {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "patch_size": 2},
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"},
    "Swin": {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
             "window_size": 4},
    "MobileNetV2": {"depth_multiplier": 0.35, "image_size": 16},
}  # fmt: skip
LONG, TEXTS = 40, ("text", "other", "words", "tags", "prompt")
"""One row is so many times as long, beyond what any of the models holds."""
TEXT_TASKS = ("text-classification", "text-regression", "token-classification")
CELLS = [
    *((name, task) for name in ENCODERS for task in TEXT_TASKS),
    *((name, task) for name in DECODERS for task in (*TEXT_TASKS, "causal-lm")),
    *((name, task) for name in BOTH_SIDES for task in TEXT_TASKS),
    *((name, "causal-lm") for name in ("Bert", "Roberta", "XLNet", "Bart")),
    *((name, "image-classification") for name in PICTURES),
]
CONFIGS = {**ENCODERS, **DECODERS, **BOTH_SIDES, **PICTURES}


def model_folder(name: str, folder: Path) -> Path:
    """A model with random weights, and what reads its inputs, saved as a model folder."""
    torch.manual_seed(0)
    source = transformers.AutoModelForCausalLM if name in DECODERS else transformers.AutoModel
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    source.from_config(config).save_pretrained(folder)
    if name in PICTURES:
        size = {"height": 16, "width": 16}
        transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    else:
        make = tiny_llama if name in DECODERS else tiny_bert
        source = make(folder.parent / f"{make.__name__}-tokenizer")
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def write_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Files for every task in a folder; {task: settings that read them}."""
    made: dict[str, Callable[[int, int], list[dict[str, Any]]]] = {
        "text": reviews,
        "tokens": sentences,
        "lm": lambda count, seed: [
            {"prompt": f"the {word} is ", "completion": "very good"}
            for word in (WORDS[8:12] * count)[seed : seed + count]
        ],
    }
    for kind, rows in made.items():
        for side, count in (("train", 24), ("eval", 6)):
            some = rows(count, int(side == "eval"))
            some[0] = {
                key: LONG * value if key in TEXTS else value for key, value in some[0].items()
            }
            (folder / f"{kind}-{side}.jsonl").write_text("\n".join(map(json.dumps, some)))
    for side, count in (("train", 24), ("eval", 6)):
        _write_pictures(folder / f"pictures-{side}", count)

    def files(kind: str, ending: str = ".jsonl") -> dict[str, Any]:
        return {side: str(folder / f"{kind}-{side}{ending}") for side in ("train", "eval")}

    return {
        "text-classification": files("text"),
        "text-regression": {**files("text"), "label": "score"},
        "token-classification": {**files("tokens"), "text": "words", "label": "tags"},
        "causal-lm": files("lm"),
        "image-classification": files("pictures", ""),
    }


def _write_pictures(folder: Path, count: int) -> None:
    from PIL import Image

    for number, (image, label) in enumerate(zip(*pictures(count, 0), strict=True)):
        path = folder / f"class-{label}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
