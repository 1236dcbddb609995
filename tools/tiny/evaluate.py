"""Measure the embedded model on the held-out photographs: VAE, then SMS with each style against that style's oracle.

    gap closed = (d(rec) - d(result)) / (d(rec) - d(oracle))

`rec` is the photograph, `oracle` the filtered photograph and `result` the stylized one; `d` is the style distance
(smsbatch/metrics/style.py) of such a set to the style's reference: filtered training photographs, which references.py
writes for the model in use. All pictures have passed the VAE. Photographs are taken whole, their short side at
`--side` px.

    python tools/tiny/evaluate.py --cache CACHE --model smsbatch/tiny/model --styles oil sketch watercolor \\
        --objective '{"steps": 100, "guidance": 2}' --strip strip.png
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from common import TINY, load_lpips
from filters import FILTERS, PROMPTS
from photos import Photo, photos
from PIL import Image
from torch import Tensor

from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Model, Objective, Style
from smsbatch.metrics.style import StyleReference, style_distance


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255


def picture(image: Tensor) -> np.ndarray:
    return (image[0] * 255 + 0.5).byte().permute(1, 2, 0).numpy()


def at_side(image: np.ndarray, side: int, square: bool) -> np.ndarray:
    """Short side `side`, the other rounded; or the central square."""
    h, w = image.shape[:2]
    if square:
        top, left, s = (h - min(h, w)) // 2, (w - min(h, w)) // 2, min(h, w)
        image, h, w = image[top : top + s, left : left + s], s, s
    scale = side / min(h, w)
    size = (max(side, round(w * scale)), max(side, round(h * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def through_vae(prior: Prior, image: Tensor) -> Tensor:
    return prior.decode(prior.encode(image), (image.shape[2], image.shape[3]))


def stylize(
    prior: Prior, name: str, sources: list[tuple[Photo, Tensor]], config: Objective, args: argparse.Namespace
) -> list[Tensor]:
    """Stylize every source by the objective, pictures of one size in one batch."""
    lora = Style(lora=str(args.loras / f"{name}.safetensors"), scale=args.scale, prompt=PROMPTS[name])
    deltas = read_style(lora, prior)
    style = prior.with_deltas(deltas.unet, deltas.text)
    results: dict[int, Tensor] = {}
    sizes = {image.shape for _, image in sources}
    for size in sorted(sizes):
        rows = [i for i, (_, image) in enumerate(sources) if image.shape == size]
        prompts = [config.prompts(PROMPTS[name], sources[i][0].caption) for i in rows]
        z_src = torch.cat([prior.encode(sources[i][1]) for i in rows])
        seeds = [zlib.crc32(sources[i][0].name.encode()) for i in rows]
        z = optimize(prior, style, z_src, prompts, seeds, config).z
        images = prior.decode(z, (size[2], size[3]))
        results |= {i: image[None] for i, image in zip(rows, images, strict=True)}
    return [results[i] for i in range(len(sources))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=TINY / "model")
    parser.add_argument("--loras", type=Path, default=TINY / "styles")
    parser.add_argument("--styles", nargs="*", default=list(FILTERS))
    parser.add_argument("--objective", type=json.loads, default={}, help="fields of the manifest's objective")
    parser.add_argument("--scale", type=float, default=1.0, help="of the style LoRA")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--square", action="store_true", help="central squares instead of whole photographs")
    parser.add_argument("--limit", type=int, help="only so many photographs")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--strip", type=Path, help="write source | result | oracle here")
    args = parser.parse_args()

    prior = Prior.load(Model(path=str(args.model)), precision=args.precision)
    distance = load_lpips()
    held_out = photos("held-out", args.cache, None)[: args.limit]
    sources = [(photo, tensor(at_side(image, args.side, args.square))) for photo, image in held_out]
    rec = [through_vae(prior, image) for _, image in sources]
    lpips = lambda a, b: float(np.mean([float(distance(x * 2 - 1, y * 2 - 1)) for x, y in zip(a, b, strict=True)]))  # noqa: E731
    plain = [image for _, image in sources]
    print(f"VAE reconstruction: LPIPS {lpips(plain, rec):.4f}, {len(sources)} photographs")

    config = Objective(**args.objective)
    columns = [[picture(image) for image in plain]]
    for name in args.styles:
        rng = np.random.default_rng(4)
        oracle = [through_vae(prior, tensor(FILTERS[name](picture(image), rng))) for image in plain]
        reference = StyleReference.load(args.loras / f"{name}.reference.safetensors")
        began = time.monotonic()
        result = stylize(prior, name, sources, config, args)
        seconds = time.monotonic() - began
        d_rec, d_oracle, d_result = (style_distance(images, reference) for images in (rec, oracle, result))
        closed = (d_rec - d_result) / (d_rec - d_oracle)
        print(
            f"{name}: gap closed {closed:.1%} (d rec {d_rec:.3f}, result {d_result:.3f}, oracle {d_oracle:.3f}), "
            f"LPIPS(source, result) {lpips(plain, result):.3f}, LPIPS(source, oracle) {lpips(plain, oracle):.3f}, "
            f"{seconds:.0f} s",
            flush=True,
        )
        columns += [[picture(image) for image in result], [picture(image) for image in oracle]]
    if args.strip:
        height = max(image.shape[0] for image in columns[0])
        padded = [[np.pad(p, ((0, height - len(p)), (0, 2), (0, 0)), constant_values=255) for p in c] for c in columns]
        Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in padded])).save(args.strip)


if __name__ == "__main__":
    main()
