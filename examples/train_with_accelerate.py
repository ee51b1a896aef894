"""Fine-tune with accelerate: gradients of several batches a step, a saved state, a resumed run.

Needs geolora. Model: a small Llama with random weights; text: Python's own documentation. In one
process, or in two that share every batch:

    python examples/train_with_accelerate.py
    torchrun --nproc_per_node 2 examples/train_with_accelerate.py
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import geolora

STEPS, CHECKPOINT, BATCHES, ROWS = 60, 30, 2, 16  # steps; batches a step, rows a batch
TEXT = torch.tensor(list("".join(topics.values()).encode()[:200_000]))  # one token per byte


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **size, **heads))


def start():
    # split_batches: ROWS are shared out to the processes, and the scheduler moves once a step
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=0)
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=BATCHES, dataloader_config=loading
    )
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base_model(), config)
    optimizer = geolora.GeoLoRA(model, total_steps=STEPS)  # of the model not wrapped
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    texts = TEXT[: STEPS * BATCHES * ROWS * 32].view(-1, 32)
    rows = DataLoader(texts, batch_size=ROWS, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, rows)


def train(accelerator, model, optimizer, scheduler, rows, save_to=None):
    losses = []
    for ids in rows:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)  # no accelerator.clip_grad_norm_; see max_tangent_norm
            optimizer.step()  # moves with the last of BATCHES batches only
            scheduler.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if save_to is not None and len(losses) == CHECKPOINT * BATCHES:
            accelerator.save_state(save_to)
    return losses


def factors(accelerator, model):
    model = accelerator.unwrap_model(model)
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def main(folder):
    accelerator, model, *others = start()
    losses = train(accelerator, model, *others, save_to=folder / "state")
    trained = factors(accelerator, model)
    everywhere = accelerator.gather(trained).view(accelerator.num_processes, -1)
    alike = torch.equal(everywhere, everywhere[:1].expand_as(everywhere))

    accelerator, resumed, *others, rows = start()
    accelerator.load_state(folder / "state")
    rest = accelerator.skip_first_batches(rows, CHECKPOINT * BATCHES)
    train(accelerator, resumed, *others, rest)
    same = torch.equal(factors(accelerator, resumed), trained)

    model = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        geolora.export(model, folder / "adapter")
    accelerator.wait_for_everyone()
    loaded = PeftModel.from_pretrained(base_model(), folder / "adapter")
    ids = TEXT[None, :64]
    difference = (loaded(ids).logits - model(ids).logits).abs().max().item()
    accelerator.print(
        f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, total rank {sum(geolora.ranks(model).values())}; "
        f"processes: {accelerator.num_processes}, with the same factors: {alike}; "
        f"resumed run the same bit for bit: {same}; stock peft's logits differ by {difference:.0e}"
    )
    accelerator.wait_for_everyone()
    return losses, alike, same, difference


if __name__ == "__main__":
    Accelerator(cpu=True)  # brings the processes together
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(broadcast_object_list([temporary])[0]))  # the folder of the first process
