"""Fine-tune in a plain PyTorch loop: a schedule, a checkpoint, a resumed run, an adapter for stock peft.

Needs geolora. Model: a small Llama with random weights; text: Python's own documentation.

    python examples/train_in_a_plain_loop.py
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft import get_peft_model_state_dict as adapter_state
from peft import set_peft_model_state_dict as load_adapter_state
from transformers import LlamaConfig, LlamaForCausalLM

import geolora

STEPS, WARMUP, CHECKPOINT = 80, 5, 40
TEXT = torch.tensor(list("".join(topics.values()).encode()[:200_000]))  # one token per byte


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **size, **heads))


def start():
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    optimizer = geolora.GeoLoRA(model, total_steps=STEPS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(  # scales lr of the pairs and rest_lr alike
        optimizer, lambda step: min(1.0, step / WARMUP) * (1 - step / STEPS)
    )
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    losses = []
    for step in steps:
        where = torch.randint(len(TEXT) - 32, (16,), generator=torch.Generator().manual_seed(step))
        ids = torch.stack([TEXT[i : i + 32] for i in where])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()  # no clipping of the factors' gradients; see max_tangent_norm
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(folder):
    model, *others = start()
    losses = train(model, *others, range(CHECKPOINT))
    states = [adapter_state(model), *(each.state_dict() for each in others)]
    torch.save(states, folder / "checkpoint.pt")
    losses += train(model, *others, range(CHECKPOINT, STEPS))

    resumed, *others = start()
    states = torch.load(folder / "checkpoint.pt")
    load_adapter_state(resumed, states[0])
    for each, state in zip(others, states[1:], strict=True):
        each.load_state_dict(state)
    train(resumed, *others, range(CHECKPOINT, STEPS))
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(p, q) for p, q in pairs)

    geolora.export(model, folder / "adapter")
    loaded = PeftModel.from_pretrained(base_model(), folder / "adapter")
    ids = TEXT[None, :64]
    difference = (loaded(ids).logits - model(ids).logits).abs().max().item()
    print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, total rank {sum(geolora.ranks(model).values())}; "
        f"resumed run the same bit for bit: {same}; stock peft's logits differ by {difference:.0e}"
    )
    return losses, same, difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
