"""Does stock peft compute what was trained, on a real model, in both layouts?

    python benchmarks/does_stock_peft_compute_the_same.py

MiniLM with a new head, s = 2, a few GeoLoRA steps under a budget on the demo's data; exported, loaded
by `PeftModel.from_pretrained` over a fresh base, and the logits of 64 held-out texts compared.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from record import write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import geolora
from geolora.cli.demo import model_folder
from geolora.cli.demo_texts import docstring_themes

STEPS, BATCH = 26, 16


def main() -> None:
    folder = model_folder()
    train, held_out = docstring_themes()
    names = sorted({row["label"] for row in train})
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(rows: list[dict[str, str]]):
        texts = [row["text"] for row in rows]
        return tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))

    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(fresh(), config)
    optimizer = geolora.GeoLoRA(model, budget=250_000, prune_every=12, settle_after=20)
    for start in range(0, STEPS * BATCH, BATCH):
        rows = train[start : start + BATCH]
        labels = torch.tensor([names.index(row["label"]) for row in rows])
        optimizer.zero_grad()
        model(**encode(rows), labels=labels).loss.backward()
        optimizer.step()
    model.eval()
    batch, results = encode(held_out[:64]), {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as out:
        wanted = model(**batch).logits
        for layout in ("uniform", "compact"):
            done = geolora.export(model, f"{out}/{layout}", layout=layout)
            got = PeftModel.from_pretrained(fresh(), f"{out}/{layout}").eval()(**batch).logits
            results[layout] = {
                "max_logit_difference_over_scale": float((got - wanted).abs().max() / wanted.abs().max()),
                "verify": max(geolora.verify(f"{out}/{layout}", fresh()).values()),
                "adapter_parameters": done.adapter_parameters,
                "exported_parameters": done.exported_parameters,
            }  # fmt: skip
            print(layout, results[layout])
    print(write("does_stock_peft_compute_the_same", results))


if __name__ == "__main__":
    main()
