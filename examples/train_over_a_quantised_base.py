"""Fine-tune over an int8 base: what is trained, what is not, and where the adapter can be loaded.

Needs geolora and torchao (pip install torchao). Model: a small Llama with random weights; text:
Python's own documentation.

    python examples/train_over_a_quantised_base.py
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig

import geolora

STEPS = 80
TEXT = torch.tensor(list("".join(topics.values()).encode()[:200_000]))  # one token per byte


def save_base(folder):
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **size, **heads)).save_pretrained(folder)


def load_base(folder, dtype, quantised=True):
    int8 = TorchAoConfig(Int8WeightOnlyConfig()) if quantised else None
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=int8)


def plain_weights(model):
    weights = {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n}
    return {n: p.dequantize() if hasattr(p, "qdata") else p.clone() for n, p in weights.items()}


def main(folder, dtype=torch.float32):
    save_base(folder / "base")
    base = load_base(folder / "base", dtype)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)  # factors are float32, also over a bfloat16 base
    optimizer = geolora.GeoLoRA(model, total_steps=STEPS)
    weights, losses = plain_weights(model), []
    for step in range(STEPS):
        where = torch.randint(len(TEXT) - 32, (16,), generator=torch.Generator().manual_seed(step))
        ids = torch.stack([TEXT[i : i + 32] for i in where])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    untouched = all(torch.equal(weights[n], p) for n, p in plain_weights(model).items())

    geolora.export(model, folder / "adapter")
    errors = geolora.verify(folder / "adapter", load_base(folder / "base", dtype))
    differences = []
    with torch.no_grad():
        logits = model(TEXT[None, :64]).logits
        for quantised in (True, False):
            base = load_base(folder / "base", dtype, quantised)
            loaded = PeftModel.from_pretrained(base, folder / "adapter")(TEXT[None, :64]).logits
            differences.append(((loaded - logits).abs().max() / logits.abs().max()).item())
    over_int8, over_original = differences
    print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}; base untouched: {untouched}; stock peft's logits "
        f"differ by {over_int8:.0e} over the int8 base, by {over_original:.0e} over the original"
    )
    return losses, untouched, max(errors.values()), differences


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
