"""Train the autoencoder: 4x down, 4 latent channels, L1 + LPIPS + a little KL.

The latents are scaled to unit standard deviation over the training crops (`scaling_factor`), as Stable Diffusion's are.
From step 500 on, a third of the crops are put through a style filter, so that the decoder can draw strokes.

    torchrun --nproc-per-node 2 tools/tiny/train_vae.py --cache CACHE --extra EXTRA --work WORK \\
        --out smsbatch/tiny/model/vae
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import Average, average_gradients, cosine, join, load_checkpoint, load_lpips, save_checkpoint
from diffusers import AutoencoderKL
from filters import FILTERS
from photos import crop, photos
from torch import Tensor

CONFIG = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,  # attention in the middle would tie it to one resolution
    "sample_size": 128,
}
KL_WEIGHT = 3e-4  # per latent element


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one setting; the learning rate falls from `lr` to `floor * lr` within it."""

    until: int
    side: int  # px of a crop
    batch: int
    lr: float
    floor: float
    l1: float  # weight of L1 relative to LPIPS
    whole: float  # share of crops that show as much of the photograph as fits
    frozen: bool = False  # the encoder
    anchor: float = 0.0  # weight of the latents' squared distance from those of the encoder that was frozen


PHASES = (
    Phase(1200, side=96, batch=8, lr=1.3e-3, floor=1.0, l1=4, whole=0.4),
    # From here the latents are white, and many small steps train better than few big ones.
    Phase(4400, side=64, batch=4, lr=1e-3, floor=0.01, l1=4, whole=0.4),
    # The latents are in use from here on, so the encoder is frozen: the decoder learns the pictures it will draw.
    Phase(6600, side=64, batch=4, lr=1e-3, floor=0.01, l1=0.4, whole=0.8, frozen=True),
    # Both again, with the latents tied to their old values: they move by less than the least noise that SMS adds.
    Phase(8600, side=64, batch=4, lr=6e-4, floor=0.01, l1=0.4, whole=0.8, anchor=5.0),
)
STYLED_FROM = 500


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 [h, w, 3] pictures -> [-1, 1] tensor [n, 3, h, w]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch(
    pictures: list[np.ndarray], size: int, side: int, styled: bool, rng: np.random.Generator, whole: float = 0.4
) -> Tensor:
    out = []
    for index in rng.integers(len(pictures), size=size):
        part = crop(pictures[index], 128, 128, rng, whole)
        if styled and rng.random() < 0.35:
            part = FILTERS[rng.choice(list(FILTERS))](part, rng)
        top, left = rng.integers(128 - side + 1, size=2)
        out.append(part[top : top + side, left : left + side])
    return to_tensor(out)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, distance: torch.nn.Module, held_out: list[np.ndarray]) -> tuple[float, float]:
    """Mean LPIPS and L1 of the reconstruction of every held-out picture's central 128 px crop."""
    rng = np.random.default_rng(0)
    x = to_tensor([crop(p, 128, 128, rng, whole=1.0) for p in held_out])
    y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    return float(distance(x, y).mean()), float((x - y).abs().mean() / 2)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, pictures: list[np.ndarray]) -> float:
    rng = np.random.default_rng(1)
    stds = [vae.encode(batch(pictures, 32, 96, True, rng)).latent_dist.mean for _ in range(8)]
    return float(torch.cat(stds).std())


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: list[np.ndarray]) -> None:
    """Make the latent's channels uncorrelated with unit deviation; the picture does not change.

    Early in training some channels become near copies of others and the information hides in their small differences,
    which learns slowly and would drown in the noise of diffusion. The 1x1 convolutions on both sides absorb the change.
    """
    rng = np.random.default_rng(2)
    z = torch.cat([vae.encode(batch(pictures, 32, 96, True, rng)).latent_dist.mean for _ in range(8)])
    z = z.permute(1, 0, 2, 3).flatten(1)
    mu, n = z.mean(1), len(z)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    forward = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    back = torch.linalg.inv(forward)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:n] = forward @ (into.bias[:n] - mu)
    into.weight[:n] = torch.einsum("ij,jkhw->ikhw", forward, into.weight[:n])
    out.bias += out.weight[..., 0, 0] @ mu
    out.weight.copy_(torch.einsum("ijhw,jk->ikhw", out.weight, back))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--extra", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phases", type=int, default=len(PHASES), help="stop after so many")
    args = parser.parse_args()

    rank, world = join()
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    torch.manual_seed(rank)
    distance = load_lpips()
    average = Average(vae.parameters(), 0.998)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = args.work / "vae.pt"
    start = load_checkpoint(checkpoint, vae=vae, average=average, optimizer=optimizer)
    pictures = [p for _, p in photos("train", args.cache, args.extra)]
    held_out = [p for _, p in photos("held-out", args.cache, args.extra)]

    starts = [0, *(phase.until for phase in PHASES[:-1])]
    began, seen = time.monotonic(), []
    tied = None
    end = PHASES[args.phases - 1].until
    for step in range(start, end):
        begin, phase = next((begin, p) for begin, p in zip(starts, PHASES, strict=True) if step < p.until)
        for group in optimizer.param_groups:
            group["lr"] = cosine(step - begin, phase.until - begin, phase.lr, floor=phase.floor)
        if step in starts[1:]:
            with torch.no_grad():
                torch._foreach_copy_(average.parameters, average.shadow)
            if step == starts[1]:
                whiten(vae, pictures)
                average.shadow = [p.detach().clone() for p in average.parameters]
            if phase.frozen and rank == 0:
                torch.save(vae.state_dict(), args.work / "anchor.pt")
        vae.encoder.requires_grad_(not phase.frozen)
        vae.quant_conv.requires_grad_(not phase.frozen)
        if phase.anchor and tied is None:
            tied = AutoencoderKL(**CONFIG)
            tied.load_state_dict(torch.load(args.work / "anchor.pt", weights_only=True))
        rng = np.random.default_rng([rank, step])
        x = batch(pictures, phase.batch // world, phase.side, step >= STYLED_FROM, rng, phase.whole)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
            perceptual = distance(x, y).mean()
        l1 = (x - y.float()).abs().mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = phase.l1 * l1 + perceptual + KL_WEIGHT * kl
        if tied is not None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                before = tied.encode(x).latent_dist.mean.float()
            moved = (mean - before).square().mean() / before.var()
            loss = loss + phase.anchor * moved
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(vae.parameters())
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update()
        seen.append((float(l1.detach()), float(perceptual.detach()), float(kl.detach())))
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == end):
            with average.applied():
                score = evaluate(vae, distance, held_out)
            pace = (time.monotonic() - began) / (step + 1 - start)
            means = np.mean(seen[-500:], axis=0)
            held = f"held-out lpips {score[0]:.4f} l1 {score[1]:.4f}"
            if tied is not None:
                held += f", latents moved by {float(moved.detach()) ** 0.5:.3f} of their deviation"
            print(f"{step + 1}: l1/lpips/kl {means.round(4)}, {held}, {pace:.2f} s/step", flush=True)
            save_checkpoint(checkpoint, step + 1, vae=vae, average=average, optimizer=optimizer)

    if rank > 0:
        return
    with average.applied():
        std = latent_std(vae, pictures)
        vae.register_to_config(scaling_factor=round(1 / std, 5))
        print(f"held-out lpips, l1: {evaluate(vae, distance, held_out)}, latent std {std:.4f}")
        vae.half().save_pretrained(args.out)


if __name__ == "__main__":
    main()
