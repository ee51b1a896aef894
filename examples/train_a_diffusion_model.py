"""Teach a diffusion model a subject from four pictures, and keep what it knew of the kind (DreamBooth).

Needs geolora and diffusers (pip install diffusers). Model: a small UNet2DConditionModel with random
weights, first trained whole on one kind of picture, discs; the subject is a disc with a cross.

    python examples/train_a_diffusion_model.py
"""

import tempfile
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model

import geolora

STEPS, SIZE, PRIOR = 60, 8, 1.0  # PRIOR: weight of the loss on pictures of the kind
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut"]  # of the residual blocks
NOISE = DDPMScheduler(num_train_timesteps=100)
# in the place of a text encoder's output for "a disc" and "a sks disc": 4 tokens of width 16
KIND, SUBJECT = torch.randn(2, 1, 4, 16, generator=torch.Generator().manual_seed(0))


def new_base():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,  # pictures; Stable Diffusion's are latents of a VAE, 4 channels
        out_channels=3,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
    )


def discs(count, seed):
    """Pictures of the kind, in [-1, 1]: any place, any colour."""
    random = torch.Generator().manual_seed(seed)
    y0, x0 = SIZE * (0.3 + 0.4 * torch.rand(2, count, 1, 1, 1, generator=random))
    colour = torch.rand(count, 3, 1, 1, generator=random)
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return torch.where((y - y0) ** 2 + (x - x0) ** 2 < (SIZE / 4) ** 2, colour, -1.0)


def subjects(times):
    pictures = discs(4, seed=1)
    pictures[:, :, SIZE // 2] = pictures[:, :, :, SIZE // 2] = 1.0
    return pictures.repeat(times, 1, 1, 1)


def losses(model, pictures, prompts, seed):
    """Mean squared error of the predicted noise, of every picture."""
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(pictures.shape, generator=random)
    times = torch.randint(len(NOISE.timesteps), (len(pictures),), generator=random)
    found = model(NOISE.add_noise(pictures, noise, times), times, prompts).sample
    return (found - noise).square().mean((1, 2, 3))


@torch.no_grad()
def scores(model):
    """Loss on the subject, and on pictures of the kind that were not trained on."""
    own = losses(model, subjects(16), SUBJECT.expand(64, -1, -1), seed=10**6).mean()
    return own.item(), losses(model, discs(64, 10**6), KIND.expand(64, -1, -1), 10**6).mean().item()


def know_the_kind():
    base = new_base()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for step in range(2 * STEPS):
        losses(base, discs(16, step), KIND.expand(16, -1, -1), step).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return base


def learn_the_subject(base, prior):
    config = LoraConfig(r=8, lora_alpha=8, target_modules=ATTENTION + CONVOLUTIONS)
    model = get_peft_model(base, config)
    optimizer = geolora.GeoLoRA(model, total_steps=STEPS)
    prompts = torch.cat([SUBJECT.expand(8, -1, -1), KIND.expand(8, -1, -1)])
    for step in range(STEPS):
        pictures = torch.cat([subjects(2), discs(8, 2 * STEPS + step)])
        own, kind = losses(model, pictures, prompts, step).chunk(2)
        (own.mean() + prior * kind.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(folder):
    base = know_the_kind()
    base.save_pretrained(folder / "base")
    table = {"before": scores(base)}
    for name, prior in (("without prior", 0.0), ("with prior", PRIOR)):
        base = UNet2DConditionModel.from_pretrained(folder / "base")
        model = learn_the_subject(base, prior)
        table[name] = scores(model)

    geolora.export(model, folder / "adapter")
    base, own_reader = (UNet2DConditionModel.from_pretrained(folder / "base") for _ in range(2))
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    own_reader.load_lora_adapter(
        folder / "adapter", prefix="base_model.model", weight_name="adapter_model.safetensors"
    )
    with torch.no_grad():
        inputs = subjects(1), 50, SUBJECT.expand(4, -1, -1)
        trained = model(*inputs).sample
        differences = [
            ((reader(*inputs).sample - trained).abs().max() / trained.abs().max()).item()
            for reader in (loaded, own_reader)
        ]
    for name, (own, kind) in table.items():
        print(f"{name:<14} loss on the subject {own:.3f}, on the kind {kind:.3f}")
    ranks = geolora.ranks(model)
    convolutions = sum(rank for name, rank in ranks.items() if name.split(".")[-1] in CONVOLUTIONS)
    print(
        f"total rank {sum(ranks.values())}, {convolutions} of it in convolutions; "
        f"stock peft's output differs by {differences[0]:.0e}, diffusers' by {differences[1]:.0e}"
    )
    return table, ranks, differences


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
