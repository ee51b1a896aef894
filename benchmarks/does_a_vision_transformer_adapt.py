"""Does a small vision transformer, trained on one set of pictures, adapt to another: LoRA, AdaLoRA, GeoLoRA.

    python benchmarks/does_a_vision_transformer_adapt.py DATA FOLDER [--steps 1500]
    geolora compare benchmarks/vision.yaml      # in FOLDER

DATA holds cifar10_train10k_jpeg.npz, cifar10_test2k_jpeg.npz and mnist_t10k_8k2k.npz. The first command trains two
transformers from nothing (width 96, 6 layers, pictures of 32 x 32 in patches of 4, AdamW, cosine schedule), one on CIFAR-10's
10,000 pictures and one on MNIST's 8,000, and writes them and the pictures as .npz files into FOLDER, with their accuracies
(base.json). The second adapts each to the other set: 1,000 training rows, 100 steps of 32, three seeds, step sizes chosen on
held-back rows.
"""

import argparse
import io
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

ROWS = 2000
BATCH = 64


def jpegs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 32, 32, 3) uint8 and labels (n,)."""
    with np.load(path, allow_pickle=False) as file:
        data, ends, labels = file["jpeg"], file["offsets"], file["labels"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
        for a, b in pairwise(ends)
    ]
    return np.stack(pictures), labels


def sets(folder: Path) -> dict[str, tuple[np.ndarray, ...]]:
    """{name: training pictures, labels, test pictures, labels}."""
    cifar = (
        *jpegs(folder / "cifar10_train10k_jpeg.npz"),
        *jpegs(folder / "cifar10_test2k_jpeg.npz"),
    )
    with np.load(folder / "mnist_t10k_8k2k.npz", allow_pickle=False) as file:
        mnist = tuple(file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    return {"cifar10": cifar, "mnist": mnist}


def tensor(pictures: np.ndarray) -> torch.Tensor:
    """(n, 3, 32, 32) float32 in [-1, 1], as the image processor of the model makes them."""
    rgb = pictures if pictures.ndim == 4 else np.repeat(pictures[..., None], 3, axis=-1)
    if rgb.shape[1] != 32:
        rgb = np.stack([np.asarray(Image.fromarray(p).resize((32, 32), 2)) for p in rgb])
    return torch.from_numpy(rgb).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def train(name: str, data: tuple[np.ndarray, ...], folder: Path, steps: int) -> float:
    """Train a transformer from nothing and save it; its accuracy on the test pictures."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=96, num_hidden_layers=6, num_attention_heads=6, intermediate_size=192,
        image_size=32, patch_size=4, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    x, y = tensor(data[0]), torch.from_numpy(data[1].astype(np.int64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    for step in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        pictures = x[rows]
        if name == "cifar10":  # shifted by up to four and mirrored, as is usual there
            a, b = torch.randint(0, 9, (2,)).tolist()
            pictures = pad(pictures, (4, 4, 4, 4))[..., a : a + 32, b : b + 32]
            flipped = torch.rand(BATCH, 1, 1, 1) < 0.5
            pictures = torch.where(flipped, pictures.flip(-1), pictures)
        loss = model(pixel_values=pictures, labels=y[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(name, step, round(loss.item(), 3), flush=True)
    model.eval().save_pretrained(folder / name)
    ViTImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(folder / name)
    held, right = tensor(data[2]), torch.from_numpy(data[3].astype(np.int64))
    with torch.no_grad():
        found = torch.cat([model(pixel_values=some).logits.argmax(-1) for some in held.split(250)])
    return float((found == right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    accuracy = {}
    for name, data in sets(arguments.data).items():
        np.savez(arguments.folder / f"{name}.npz", x=data[0], y=data[1])
        np.savez(arguments.folder / f"{name}_test.npz", x=data[2], y=data[3])
        accuracy[name] = train(name, data, arguments.folder, arguments.steps)
        print(name, accuracy[name])
    told = {"steps": arguments.steps, "accuracy": accuracy}
    (arguments.folder / "base.json").write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
