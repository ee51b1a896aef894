"""Hand an adapter to a server: merged, or filled up or cut to a rank; what every form looks like.

Needs geolora. Model: a small Llama with random weights; text: Python's own documentation. No server
is started: the table says which files have the shape that LoRA servers ask for.

    python examples/serve_an_adapter.py
"""

import json
import re
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import geolora

STEPS, BUDGET = 60, 20_000
TEXT = torch.tensor(list("".join(topics.values()).encode()[:200_000]))  # one token per byte
KEY = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **size, **heads))


def trained_model():
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    optimizer = geolora.GeoLoRA(model, budget=BUDGET, total_steps=STEPS)
    for step in range(STEPS):
        where = torch.randint(len(TEXT) - 32, (16,), generator=torch.Generator().manual_seed(step))
        ids = torch.stack([TEXT[i : i + 32] for i in where])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def what_servers_ask(folder):
    """{demand: whether the folder meets it}."""
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [KEY.fullmatch(key) for key in tensors]
    ranks = {t.shape[0] if ".lora_A." in key else t.shape[1] for key, t in tensors.items()}
    return {
        "one r": ranks == {config["r"]},
        "alpha = r": config["lora_alpha"] == config["r"] and not config["use_rslora"],
        "no patterns": not config["rank_pattern"] and not config["alpha_pattern"],
        "names": all(names),
        "A and B only": not config["modules_to_save"] and config["bias"] == "none" and all(names),
        "modules a list": isinstance(config["target_modules"], list),
    }


@torch.no_grad()
def difference(model, logits):
    """Largest difference of a logit, over the largest logit."""
    return ((model(TEXT[None, :64]).logits - logits).abs().max() / logits.abs().max()).item()


def main(folder):
    model = trained_model()
    model.save_pretrained(folder / "as peft saves")
    forms = {"as peft saves": 0.0}
    forms["compact"] = geolora.export(model, folder / "compact", layout="compact").error
    forms["uniform"] = geolora.export(model, folder / "uniform").error
    for rank in (8, 16, 32):
        name = f"uniform, rank {rank}"
        forms[name] = geolora.export(model, folder / name, rank=rank, max_error=1.0).error

    with torch.no_grad():
        logits = model(TEXT[None, :64]).logits
    rows = {}
    for name, error in forms.items():
        loaded = PeftModel.from_pretrained(base_model(), folder / name)
        met = what_servers_ask(folder / name)
        rows[name] = (loaded.peft_config["default"].r, error, difference(loaded, logits), met)
    whole = PeftModel.from_pretrained(base_model(), folder / "uniform").merge_and_unload()
    merged = difference(whole, logits)

    kept = sorted(set(geolora.ranks(model).values()))
    print(
        f"ranks found: {kept[0]} to {kept[-1]}; merged with stock peft: logits differ by {merged:.0e}"
    )
    print(f"{'form':<18}{'r':>3} {'cut off':>8} {'logits':>7}  {'  '.join(met)}")
    for name, (r, error, off, met) in rows.items():
        marks = "  ".join(
            f"{'yes' if good else 'no':<{len(demand)}}" for demand, good in met.items()
        )
        print(f"{name:<18}{r:>3} {error:>8.1e} {off:>7.0e}  {marks}")
    return rows, kept, merged


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
