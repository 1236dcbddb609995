"""Write every style's reference statistics, for the style distance: 192 filtered training crops through the VAE.

python tools/tiny/references.py --cache CACHE
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from common import TINY
from filters import FILTERS
from photos import crop, photos
from torch import Tensor

from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Model
from smsbatch.metrics.style import StyleReference

REFERENCES = 192
SIDE = 128  # px


def through_vae(prior: Prior, picture: np.ndarray) -> Tensor:
    image = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 255
    return prior.decode(prior.encode(image), (image.shape[2], image.shape[3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", default=str(TINY / "model"))
    parser.add_argument("--out", type=Path, default=TINY / "styles")
    args = parser.parse_args()

    prior = Prior.load(Model(path=args.model), precision="fp32")
    pictures = [p for photo, p in photos("train", args.cache, None) if not photo.name.startswith("stamp-")]
    for name, style in FILTERS.items():
        rng = np.random.default_rng(3)
        chosen = rng.choice(len(pictures), REFERENCES)
        crops = (crop(pictures[i], SIDE, SIDE, rng, whole=0.8) for i in chosen)
        file = args.out / f"{name}.reference.safetensors"
        StyleReference.of(through_vae(prior, style(each, rng)) for each in crops).save(file)
        print(f"{file}: {REFERENCES} crops of {len(pictures)} photographs")


if __name__ == "__main__":
    main()
