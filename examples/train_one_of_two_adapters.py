"""Preference training (DPO): a policy adapter is trained, a reference adapter on the same model is not.

Needs geolora. Model: a small Llama with random weights, first fine-tuned on Python's own
documentation; then it is to prefer that text to THAT TEXT.

    python examples/train_one_of_two_adapters.py
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

import geolora

STEPS, BETA = 40, 0.1
TEXT = "".join(topics.values()).encode()[:200_000]  # one token per byte


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **size, **heads))


def batch(text, step):
    where = torch.randint(len(text) - 32, (8,), generator=torch.Generator().manual_seed(step))
    return torch.tensor([list(text[i : i + 32]) for i in where])


def margin(model, step):
    """Log-probability of each preferred text, less that of the other."""
    ids = torch.cat([batch(TEXT, step), batch(TEXT.upper(), step)])
    words = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    preferred, other = words.gather(-1, ids[:, 1:, None]).sum((1, 2)).chunk(2)
    return preferred - other


def train(model, loss_of):
    optimizer = geolora.GeoLoRA(model, total_steps=STEPS, adapter_name="policy")
    losses = []
    for step in range(STEPS):
        loss = loss_of(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder):
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config, adapter_name="policy")

    def fine_tuning(step):
        ids = batch(TEXT, step)
        return model(input_ids=ids, labels=ids).loss

    def preference(step):
        with torch.no_grad():
            model.set_adapter("reference")
            reference = margin(model, step)
        model.set_adapter("policy")  # the active adapter is the one that requires gradients
        return -logsigmoid(BETA * (margin(model, step) - reference)).mean()

    train(model, fine_tuning)
    geolora.export(model, folder / "reference")
    model.load_adapter(folder / "reference", adapter_name="reference")
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".policy." not in n}
    losses = train(model, preference)
    same = all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    geolora.export(model, folder / "policy", adapter_name="policy")
    loaded = PeftModel.from_pretrained(base_model(), folder / "policy")
    trained = margin(model, STEPS)
    difference = ((margin(loaded, STEPS) - trained).abs().max() / trained.abs().max()).item()
    ranks = [sum(geolora.ranks(model, name).values()) for name in ("reference", "policy")]
    print(
        f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; base and reference the same bit for bit: {same}; "
        f"total rank {ranks[0]} -> {ranks[1]}; stock peft's log-odds differ by {difference:.0e}"
    )
    return losses, same, ranks, difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
