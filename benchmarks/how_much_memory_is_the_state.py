"""How much memory is GeoLoRA's optimizer state, against AdamW's on the same pairs?

    python benchmarks/how_much_memory_is_the_state.py

Counted in bytes after one step, over pairs shaped like MiniLM's, BERT-base's and Llama-3.2-1B's layers.
"""

import torch
from peft import LoraConfig, get_peft_model
from record import write
from torch import nn

import geolora

SHAPES = {
    "MiniLM": [(384, 384)] * 4 + [(1536, 384), (384, 1536)],
    "BERT-base": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    "Llama-3.2-1B": [(2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048)],
}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def measure(shapes: list[tuple[int, int]], r: int, moments: str | None) -> int:
    net = nn.ModuleList(nn.Linear(d_in, d_out, bias=False) for d_out, d_in in shapes)
    targets = [str(i) for i in range(len(shapes))]
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=r, target_modules=targets))
    pairs = [p for p in model.parameters() if p.requires_grad]
    for p in pairs:
        p.grad = torch.randn_like(p)
    optimizer = (
        torch.optim.AdamW(pairs) if moments is None else geolora.GeoLoRA(model, moments=moments)
    )
    optimizer.step()
    return state_bytes(optimizer)


def main() -> None:
    results = []
    for name, shapes in SHAPES.items():
        for r in (8, 16):
            adamw = measure(shapes, r, None)
            for moments in ("none", "momentum", "adaptive"):
                ratio = measure(shapes, r, moments) / adamw
                results.append({"shapes": name, "r": r, "moments": moments, "ratio": ratio})
                print(f"{name:14} r={r:<3} {moments:9} {ratio:.3f}")
    print(write("how_much_memory_is_the_state", results))


if __name__ == "__main__":
    main()
