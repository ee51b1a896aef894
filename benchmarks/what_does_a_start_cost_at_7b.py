"""What does LoRA-One's look at the gradient cost on layers of Llama-2-7B?

    python benchmarks/what_does_a_start_cost_at_7b.py

Measured on single layers of its three shapes, random weights and inputs, 2,048 tokens, float32, pairs of rank 16:
memory and time as in how_well_is_the_gradient_seen.py, against one training step of the same layer and adapter.
The whole model (32 blocks, four layers of 4096 x 4096, two of 11008 x 4096, one of 4096 x 11008) is computed from
these, not run.
"""

from types import SimpleNamespace
from typing import Any

import torch
from how_well_is_the_gradient_seen import memory, times
from peft import LoraConfig, get_peft_model
from record import write
from torch import Tensor, nn

TOKENS, RANK = 2048, 16
LAYERS = {(4096, 4096): 128, (11008, 4096): 64, (4096, 11008): 32}


class One(nn.Module):
    """A layer between an input and a wanted output."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.layer = nn.Linear(d_in, d_out, bias=False)

    def forward(self, x: Tensor, wanted: Tensor) -> Any:
        return SimpleNamespace(loss=(self.layer(x) - wanted).square().mean())


def measured(d_out: int, d_in: int) -> dict[str, Any]:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["layer"])
    model = get_peft_model(One(d_out, d_in), config)  # pyright: ignore[reportArgumentType]
    batch = {"x": torch.randn(TOKENS, d_in), "wanted": torch.randn(TOKENS, d_out)}
    return {**memory(model, batch), **times(model, batch)}


def main() -> None:
    rows = {shape: measured(*shape) for shape in LAYERS}
    results: dict[str, Any] = {"layers": {f"{o} x {i}": row for (o, i), row in rows.items()}}
    adapter = sum(rows[shape]["adapter_bytes"] * count for shape, count in LAYERS.items())
    targets = sum(rows[shape]["target_weight_bytes"] * count for shape, count in LAYERS.items())
    looking = sum(
        rows[shape]["looking_over_adapter"] * rows[shape]["adapter_bytes"] * count
        for shape, count in LAYERS.items()
    )
    dense = sum(
        rows[shape]["dense_over_target_weights"] * rows[shape]["target_weight_bytes"] * count
        for shape, count in LAYERS.items()
    )
    results["model, computed"] = {
        "adapter_bytes": adapter,
        "target_weight_bytes": targets,
        "looking_above_a_step_bytes": looking,
        "dense_above_a_step_bytes": dense,
    }
    for name, row in results["layers"].items():
        print(name, {key: round(value, 3) for key, value in row.items()})
    print(results["model, computed"])
    print(write("what_does_a_start_cost_at_7b", results))


if __name__ == "__main__":
    main()
