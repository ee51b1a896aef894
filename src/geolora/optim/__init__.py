"""Optimizers over LoRA pairs: one base, one file each; the mathematics is in `methods/`."""
