"""Fine-tune with TRL's SFTTrainer over an int8 base: prompts, completions, ranks in the log.

Needs geolora, trl and torchao (pip install trl torchao). Model: a small Llama with random weights;
rows: lines of Python's own documentation, the first 24 characters and what comes after them.

    python examples/train_with_trl.py
"""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer
from trl import SFTConfig, SFTTrainer

import geolora

STEPS = 80
LINES = [line for line in "".join(topics.values())[:200_000].splitlines() if len(line) > 40]
ROWS = [{"prompt": line[:24], "completion": line[24:]} for line in LINES]


def byte_tokenizer():
    """One token per byte, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return FastTokenizer(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def save_base(folder):
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    ends = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **size, **heads, **ends)).save_pretrained(folder)


def load_base(folder):
    int8 = TorchAoConfig(Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=int8
    )


def main(folder):
    save_base(folder / "base")
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=get_peft_model(load_base(folder / "base"), config),
        args=SFTConfig(
            output_dir=str(folder / "run"),
            max_steps=STEPS,
            per_device_train_batch_size=16,
            max_length=128,
            max_grad_norm=0,  # clipping acts on the factors' gradients; see max_tangent_norm
            bf16=False,  # TRL's default is True
            activation_checkpointing=False,  # TRL's default is True: less memory, more time
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,  # of use with a GPU
        ),
        train_dataset=Dataset.from_list(ROWS[:-100]),
        eval_dataset=Dataset.from_list(ROWS[-100:]),
        processing_class=byte_tokenizer(),
        # learning_rate of SFTConfig is not used: lr and rest_lr belong to the optimizer
        optimizer_cls_and_kwargs=geolora.for_trainer("geolora", total_steps=STEPS),
    )
    geolora.log_ranks(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    logs = [log for log in trainer.state.log_history if "rank" in log]

    geolora.export(trainer.model, folder / "adapter")
    loaded = PeftModel.from_pretrained(load_base(folder / "base"), folder / "adapter")
    ids = torch.tensor([trainer.eval_dataset[0]["input_ids"]])
    with torch.no_grad():
        logits = trainer.model.eval()(ids).logits
        difference = ((loaded(ids).logits - logits).abs().max() / logits.abs().max()).item()
    print(
        f"held-out loss of the completions {before:.2f} -> {after:.2f}; total rank in the log "
        f"{[log['rank'] for log in logs]}; stock peft's logits over the int8 base differ by {difference:.0e}"
    )
    return before, after, logs, difference


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
