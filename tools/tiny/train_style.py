"""Train one style as a LoRA on photographs put through its filter; write a kohya file.

Rank 16 on the attention's and feed-forward's linear layers and on the ResNet blocks' 3x3 convolutions (LoCon). The
text encoder stays as it is; the prompt is "{style prompt}, {caption}", and one in seven is dropped, so that the LoRA
gives the style without a prompt too, and guidance need not add it.

    torchrun --nproc-per-node 2 tools/tiny/train_style.py oil --cache CACHE --extra EXTRA --work WORK \\
        --model smsbatch/tiny/model --out smsbatch/tiny/styles/oil.safetensors
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import latents
import numpy as np
import torch
from common import Average, average_gradients, cosine, in_turn, join, load_checkpoint, save_checkpoint
from diffusers import StableDiffusionPipeline
from filters import FILTERS, PROMPTS
from safetensors.torch import save_file
from torch import Tensor, nn
from train_unet import denoising_loss, draw_t, tokens

RANK = 16


class Lora(nn.Module):
    """`layer(x) + up(down(x))`, alpha = rank."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.down: nn.Module
        self.up: nn.Module
        if isinstance(layer, nn.Linear):
            self.down = nn.Linear(layer.in_features, RANK, bias=False)
            self.up = nn.Linear(RANK, layer.out_features, bias=False)
        else:
            self.down = nn.Conv2d(layer.in_channels, RANK, 3, layer.stride, 1, bias=False)
            self.up = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor, *args: object) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def add_loras(unet: nn.Module) -> dict[str, Lora]:
    """Replace the layers by adapted ones; returns these by dotted name."""
    wanted = [
        name
        for name, layer in unet.named_modules()
        if (isinstance(layer, nn.Linear) and "transformer_blocks" in name)
        or (isinstance(layer, nn.Conv2d) and name.endswith(("conv1", "conv2")))
    ]
    loras = {name: Lora(unet.get_submodule(name)) for name in wanted}
    for name, lora in loras.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, lora)
    return loras


def kohya(loras: dict[str, Lora]) -> dict[str, Tensor]:
    out = {}
    for name, lora in loras.items():
        key = "lora_unet_" + name.replace(".", "_")
        out[f"{key}.lora_down.weight"] = lora.down.weight.detach().half().contiguous()
        out[f"{key}.lora_up.weight"] = lora.up.weight.detach().half().contiguous()
        out[f"{key}.alpha"] = torch.tensor(float(RANK), dtype=torch.float16)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("style", choices=list(FILTERS))
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--extra", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints and the latents")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    rank, world = join()
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float32, safety_checker=None)
    with in_turn():
        file, change = args.work / f"latents-{args.style}.pt", FILTERS[args.style]
        data = latents.build(file, pipe.vae, args.cache, args.extra, 4, change, seed=1)
    unet, abar = pipe.unet.requires_grad_(False), pipe.scheduler.alphas_cumprod
    loras = nn.ModuleDict({name.replace(".", "/"): lora for name, lora in add_loras(unet).items()})
    weights = [p for p in loras.parameters() if p.requires_grad]
    average = Average(weights, 0.99)
    optimizer = torch.optim.AdamW(weights, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = args.work / f"style-{args.style}.pt"
    start = load_checkpoint(checkpoint, loras=loras, average=average, optimizer=optimizer)

    began, seen = time.monotonic(), []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.lr, warmup=30)
        rng = np.random.default_rng([2, step, rank])
        z, captions = data.batch(rng, 1 / world)
        prompts = ["" if rng.random() < 0.15 else f"{PROMPTS[args.style]}, {caption}" for caption in captions]
        t = draw_t(len(z), rng, full=0.1)
        eps = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                text = pipe.text_encoder(tokens(pipe.tokenizer, prompts))[0]
            loss = denoising_loss(unet, text, z, t, eps, abar).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(weights)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        average.update()
        seen.append(float(loss.detach()))
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == args.steps):
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{args.style} {step + 1} eps-mse {np.mean(seen[-100:]):.4f}  {pace:.2f} s/step", flush=True)
            save_checkpoint(checkpoint, step + 1, loras=loras, average=average, optimizer=optimizer)
            with average.applied():
                args.out.parent.mkdir(parents=True, exist_ok=True)
                save_file(kohya({name.replace("/", "."): lora for name, lora in loras.items()}), args.out)


if __name__ == "__main__":
    main()
