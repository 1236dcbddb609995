"""Measure the embedded model on the held-out photographs: VAE, then SMS with each style against that style's oracle.

    gap closed = (d(rec) - d(result)) / (d(rec) - d(oracle))

`rec` is the photograph, `oracle` the filtered photograph and `result` the stylized one; `d` is the distance of such a
set to the style's reference set: filtered training photographs. All of them have gone through the VAE. The distance is
the sum over AlexNet's five LPIPS layers of the Frechet distance between the positions' features (each normalised over
channels, as LPIPS does). Photographs are taken whole, their short side at `--side` px.

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
from photos import Photo, crop, photos
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from smsbatch.diffusion.lora import read_style_lora
from smsbatch.diffusion.objectives import Texts
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.prior import Prior
from smsbatch.manifest import Objective

REFERENCES = 192  # filtered training crops that stand for a style


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


@torch.no_grad()
def statistics(distance: nn.Module, images: list[Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Mean and covariance of the normalised features of every AlexNet layer, over images and positions."""
    layers: list[list[Tensor]] = [[] for _ in range(5)]
    for image in images:
        for kept, features in zip(layers, distance.net(distance.scaling_layer(image * 2 - 1)), strict=True):
            kept.append(nn.functional.normalize(features, dim=1).flatten(2)[0].T)
    stacked = [torch.cat(kept).double().numpy() for kept in layers]
    return [(x.mean(0), np.cov(x, rowvar=False)) for x in stacked]


def frechet(a: list[tuple[np.ndarray, np.ndarray]], b: list[tuple[np.ndarray, np.ndarray]]) -> float:
    total = 0.0
    for (mean_a, cov_a), (mean_b, cov_b) in zip(a, b, strict=True):
        root = sqrtm(cov_a @ cov_b).real
        total += float(np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root))
    return total


def references(prior: Prior, name: str, args: argparse.Namespace) -> list[Tensor]:
    """Filtered training crops through the VAE."""
    rng = np.random.default_rng(3)
    pictures = [p for photo, p in photos("train", args.cache, None) if not photo.name.startswith("stamp-")]
    chosen = rng.choice(len(pictures), REFERENCES)
    return [through_vae(prior, tensor(FILTERS[name](crop(pictures[i], 128, 128, rng, whole=0.8), rng))) for i in chosen]


def stylize(
    prior: Prior, name: str, sources: list[tuple[Photo, Tensor]], config: Objective, args: argparse.Namespace
) -> list[Tensor]:
    """SMS on every source, pictures of one size together."""
    deltas = read_style_lora(str(args.loras / f"{name}.safetensors"), prior.layers())
    style = prior.with_deltas({key: args.scale * delta for key, delta in deltas.items()})
    results: dict[int, Tensor] = {}
    sizes = {image.shape for _, image in sources}
    for size in sorted(sizes):
        rows = [i for i, (_, image) in enumerate(sources) if image.shape == size]
        prompts = [config.prompts(PROMPTS[name], sources[i][0].caption) for i in rows]
        texts = Texts(*(prior.embed(list(p)) for p in (*zip(*prompts, strict=True), [""] * len(rows))))
        z_src = torch.cat([prior.encode(sources[i][1]) for i in rows])
        seeds = [zlib.crc32(sources[i][0].name.encode()) for i in rows]
        z = optimize(prior, style, z_src, texts, seeds, config)
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

    prior = Prior.load(str(args.model), precision=args.precision)
    distance = load_lpips()
    held_out = photos("held-out", args.cache, None)[: args.limit]
    sources = [(photo, tensor(at_side(image, args.side, args.square))) for photo, image in held_out]
    rec = [through_vae(prior, image) for _, image in sources]
    lpips = lambda a, b: float(np.mean([float(distance(x * 2 - 1, y * 2 - 1)) for x, y in zip(a, b, strict=True)]))  # noqa: E731
    plain = [image for _, image in sources]
    print(f"VAE reconstruction: LPIPS {lpips(plain, rec):.4f}, {len(sources)} photographs")

    config = Objective(**args.objective)
    rec_statistics = statistics(distance, rec)
    columns = [[picture(image) for image in plain]]
    for name in args.styles:
        rng = np.random.default_rng(4)
        oracle = [through_vae(prior, tensor(FILTERS[name](picture(image), rng))) for image in plain]
        reference = statistics(distance, references(prior, name, args))
        began = time.monotonic()
        result = stylize(prior, name, sources, config, args)
        seconds = time.monotonic() - began
        d_rec = frechet(rec_statistics, reference)
        d_oracle = frechet(statistics(distance, oracle), reference)
        d_result = frechet(statistics(distance, result), reference)
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
