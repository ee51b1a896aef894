"""Fine-tune with transformers.Trainer: a parameter budget, a resumed run, an adapter with its head.

Needs geolora. Model: a small BERT with random weights; rows: documentation and code of Python
itself, to be told apart.

    python examples/train_with_trainer.py
"""

import argparse
import inspect
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import geolora

STEPS, BUDGET = 120, 12_000  # parameters of the adapter: sum of rank * (d_in + d_out)
PROSE = "".join(topics.values()).encode()[:64_000]
CODE = inspect.getsource(argparse).encode()[:64_000]
ROWS = [
    {"input_ids": torch.tensor(list(text[i : i + 64])), "labels": label}
    for i in range(0, 64_000, 64)
    for label, text in enumerate((PROSE, CODE))
]


def base_model():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=256, **size, num_attention_heads=4, initializer_range=0.1)
    )


def start(folder):
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    return Trainer(
        model=get_peft_model(base_model(), config),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=32,
            warmup_steps=5,
            max_grad_norm=0,  # clipping acts on the factors' gradients; see max_tangent_norm
            save_steps=30,
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=ROWS[:-200],
        eval_dataset=ROWS[-200:],
        # learning_rate of TrainingArguments is not used: lr and rest_lr belong to the optimizer
        optimizer_cls_and_kwargs=geolora.for_trainer(
            "geolora", lr=1e-2, rest_lr=1e-2, budget=BUDGET, total_steps=STEPS
        ),
    )


def main(folder):
    trainer = start(folder / "run")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]

    resumed = start(folder / "again")
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-30"))
    pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(p, q) for p, q in pairs)

    written = geolora.export(trainer.model, folder / "adapter")
    loaded = PeftModel.from_pretrained(base_model(), folder / "adapter").eval()
    ids = torch.stack([row["input_ids"] for row in ROWS[-8:]])
    with torch.no_grad():
        difference = (loaded(ids).logits - trainer.model.eval()(ids).logits).abs().max().item()
    print(
        f"held-out loss {before:.2f} -> {after:.2f} with {written.adapter_parameters} of {BUDGET} "
        f"parameters and the head {written.others}; resumed run the same bit for bit: {same}; "
        f"stock peft's logits differ by {difference:.0e}"
    )
    return before, after, written, same, difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
