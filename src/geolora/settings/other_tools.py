"""Words that users of other tools type, and ours for them."""

from collections.abc import Iterable

from geolora.errors import nearest

NONE_YET = ""
OURS = {
    "alpha": NONE_YET,
    "attn-implementation": NONE_YET,
    "base-model": "model",
    "bf16": "mixed-precision",
    "bias": NONE_YET,
    "cutoff-len": "max-length",
    "data-seed": "seed",
    "dataset": "train",
    "dataset-name": "train",
    "dataset-path": "train",
    "dataset-text-field": "text",
    "deepspeed": NONE_YET,
    "dropout": NONE_YET,
    "eval-batch-size": NONE_YET,
    "eval-data": "eval",
    "eval-dataset": "eval",
    "eval-file": "eval",
    "eval-steps": NONE_YET,
    "eval-strategy": NONE_YET,
    "evaluation-strategy": NONE_YET,
    "fp16": "mixed-precision",
    "fsdp": NONE_YET,
    "grad-accum-steps": "gradient-accumulation",
    "gradient-accumulation-steps": "gradient-accumulation",
    "group-by-length": NONE_YET,
    "hub-model-id": NONE_YET,
    "image-column": "image",
    "image-column-name": "image",
    "init-lora-weights": "init",
    "label-column": "label",
    "label-column-name": "label",
    "learning-rate": "lr",
    "load-in-4bit": NONE_YET,
    "load-in-8bit": NONE_YET,
    "logging-dir": NONE_YET,
    "logging-steps": NONE_YET,
    "lora-alpha": NONE_YET,
    "lora-bias": NONE_YET,
    "lora-dim": "rank",
    "lora-dropout": NONE_YET,
    "lora-modules": NONE_YET,
    "lora-r": "rank",
    "lora-rank": "rank",
    "lora-target": NONE_YET,
    "lora-target-modules": NONE_YET,
    "lr-scheduler": NONE_YET,
    "lr-scheduler-type": NONE_YET,
    "max-eval-samples": NONE_YET,
    "max-grad-norm": NONE_YET,
    "max-seq-len": "max-length",
    "max-seq-length": "max-length",
    "max-train-samples": "train-rows",
    "max-train-steps": "max-steps",
    "metric-for-best-model": NONE_YET,
    "micro-batch-size": "batch-size",
    "mixed-precision-training": "mixed-precision",
    "model-id": "model",
    "model-max-length": "max-length",
    "model-name": "model",
    "model-name-or-path": "model",
    "modules-to-save": NONE_YET,
    "n-epochs": "epochs",
    "num-epochs": "epochs",
    "num-samples": "train-rows",
    "num-steps": "max-steps",
    "num-train-epochs": "epochs",
    "optim": NONE_YET,
    "optimizer": "method",
    "out-dir": "output",
    "output-dir": "output",
    "output-path": "output",
    "overwrite-output-dir": "overwrite",
    "peft-method": "method",
    "peft-type": "method",
    "per-device-batch-size": "batch-size",
    "per-device-eval-batch-size": NONE_YET,
    "per-device-train-batch-size": "batch-size",
    "pretrained-model": "model",
    "pretrained-model-name-or-path": "model",
    "problem-type": "task",
    "push-to-hub": NONE_YET,
    "quantization": NONE_YET,
    "quantization-bit": NONE_YET,
    "r": "rank",
    "random-state": "seed",
    "resume": NONE_YET,
    "resume-from-checkpoint": NONE_YET,
    "sample-packing": "packing",
    "save-steps": "save-every",
    "save-strategy": NONE_YET,
    "save-total-limit": NONE_YET,
    "seq-len": "max-length",
    "seq-length": "max-length",
    "sequence-len": "max-length",
    "steps": "max-steps",
    "target-modules": NONE_YET,
    "task-name": "task",
    "task-type": "task",
    "test-file": "eval",
    "text-column": "text",
    "text-column-name": "text",
    "tokenizer": NONE_YET,
    "torch-dtype": "dtype",
    "train-batch-size": "batch-size",
    "train-data": "train",
    "train-file": "train",
    "training-file": "train",
    "use-4bit": NONE_YET,
    "use-8bit": NONE_YET,
    "use-dora": "method",
    "use-rslora": NONE_YET,
    "valid-file": "eval",
    "validation-file": "eval",
    "warmup-ratio": NONE_YET,
    "warmup-steps": NONE_YET,
    "weight-decay": NONE_YET,
}
"""Flags of transformers, trl, peft, axolotl, LLaMA-Factory and torchtune, without dashes before them: ours that sets the
same, or none yet."""


def meant(word: str, known: Iterable[str], what: str) -> str:
    """ " Did you mean `x`?" for the known word that is near or does the same, " There is no such flag yet.", or nothing.

    Args:
        word: as it was typed: `--lora-r`, `lora_r`. known: words of ours, all with dashes or all with underscores.
        what: they are: "flag" or "setting".
    """
    spelt = {_plain(name): name for name in known}
    plain = _plain(word)
    if plain in spelt:
        return f" Did you mean `{spelt[plain]}`?"
    ours = OURS.get(plain.removeprefix("no-"))
    if ours in spelt:
        return f" Did you mean `{spelt[ours]}`?"
    if ours == NONE_YET and "model" in spelt:  # where a training is described
        return f" There is no such {what} yet."
    return nearest(word, spelt.values())


def _plain(word: str) -> str:
    return word.lstrip("-").lower().replace("_", "-")
