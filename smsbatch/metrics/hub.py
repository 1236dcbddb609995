"""The paper's other metrics, whose networks are too large to bundle: CFSD, ArtFID's FID, PickScore, HPSv2.

Contract: nothing is downloaded. Weights are looked for by name in the folder SMSBATCH_WEIGHTS and in the caches of
torch and Hugging Face, and only tensors are unpickled. `MEASURES` lists the files each needs, `missing` finds absences.
Images are float [B, 3, H, W] in [0, 1]; PickScore, whose library prepares them itself, takes uint8 [H, W, 3].
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from smsbatch.errors import RequestError, WeightsError

MEASURES = {
    "CFSD": ("vgg19-dcbb9e9d.pth",),
    "ArtFID": ("matthias-wright/art_inception/art_inception.pth",),
    "PickScore": ("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "HPSv2": ("xswu/HPSv2/HPS_v2_compressed.pt",),
}
"""By name, the files and folders that a measure needs; `owner/repository[/file]` if a hub has them."""

_ADVICE = "put it into a folder, and set the environment variable SMSBATCH_WEIGHTS to that folder"


def locate_weights(name: str) -> Path | None:
    """The path of `file` or `owner/repository[/file]` on this machine, None if it is absent."""
    parts = name.split("/")
    candidates = [Path(os.environ["SMSBATCH_WEIGHTS"], parts[-1])] if "SMSBATCH_WEIGHTS" in os.environ else []
    if len(parts) == 1:
        candidates.append(Path(torch.hub.get_dir(), "checkpoints", name))
    else:
        home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
        cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"), "models--" + "--".join(parts[:2]), "snapshots")
        newest_first = sorted(cache.glob("*"), key=lambda snapshot: snapshot.stat().st_mtime, reverse=True)
        candidates += [snapshot.joinpath(*parts[2:]) for snapshot in newest_first]
    return next((path for path in candidates if path.exists()), None)


def missing(measure: str) -> str | None:
    """A message on what `measure` lacks on this machine; None if nothing."""
    if measure == "HPSv2" and find_spec("open_clip") is None:
        return "open_clip is not installed; pip install open_clip_torch"
    absent = [name for name in MEASURES[measure] if locate_weights(name) is None]
    return f"{absent[0]} is not on this machine; {_ADVICE}" if absent else None


def _found(name: str) -> Path:
    path = locate_weights(name)
    if path is None:
        raise WeightsError(f"{name} is not on this machine; {_ADVICE}")
    return path


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise WeightsError(f"{path}: not a file of weights ({error}); download it again") from error
    state = state.get("state_dict", state)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _fill(network: nn.Module, path: Path, prefix: str = "") -> nn.Module:
    """Load the file's weights into the network, and freeze it; other entries, heads mostly, are ignored."""
    state = {name.removeprefix(prefix): value for name, value in _tensors(path).items() if name.startswith(prefix)}
    wanted = network.state_dict()
    absent = [name for name in wanted if name not in state and not name.endswith("num_batches_tracked")]
    if absent:
        raise WeightsError(f"{path} has no {prefix}{absent[0]}: it is for another network; download it again")
    network.load_state_dict({name: state.get(name, value) for name, value in wanted.items()})
    return network.eval().requires_grad_(False)


class Cfsd:
    """Content feature structural distance: KL(S(source) || S(result)), summed over positions.

    S = row-wise softmax of F F^T, where F [h w, 256] are the features of VGG-19's relu3_1 divided by 256. The sum
    grows with the number of positions, so that only images of one size are comparable: the paper's are 512x512.
    """

    MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ROWS = 1024  # of S at a time: the whole is 1 GB for 512x512

    def __init__(self) -> None:
        widths = [(3, 64), (64, 64), None, (64, 128), (128, 128), None, (128, 256)]  # VGG-19 up to relu3_1
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.MaxPool2d(2)] if width is None else [nn.Conv2d(*width, 3, padding=1), nn.ReLU()]
        self._vgg = _fill(nn.Sequential(*layers), _found(*MEASURES["CFSD"]), "features.")

    @torch.no_grad()
    def __call__(self, source: Tensor, result: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1], twice -> `[B]`."""
        pairs = zip(self._features(source), self._features(result), strict=True)
        return torch.stack([self._divergence(a, b) for a, b in pairs])

    def _features(self, image: Tensor) -> Tensor:
        mean, deviation = (image.new_tensor(values)[:, None, None] for values in (self.MEAN, self.DEVIATION))
        features: Tensor = self._vgg.to(image.device)((image - mean) / deviation)
        return features.flatten(2).transpose(1, 2) / features.shape[1]

    def _divergence(self, source: Tensor, result: Tensor) -> Tensor:
        total = source.new_zeros(())
        for start in range(0, len(source), self.ROWS):
            p, q = (torch.log_softmax(f[start : start + self.ROWS] @ f.T, 1) for f in (source, result))
            total += (p.exp() * (p - q)).sum()
        return total


class ArtInception:
    """Inception v3 as trained for ArtFID on artists and styles; images in [0, 1], neither normalized nor resized."""

    def __init__(self) -> None:
        from torchvision.models import Inception3

        network = Inception3(aux_logits=False, init_weights=False)
        network.dropout, network.fc = nn.Identity(), nn.Identity()
        self._network = _fill(network, _found(*MEASURES["ArtFID"]))

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` -> `[B, 2048]`, sides of at least 75 pixels."""
        if min(image.shape[2:]) < 75:
            raise RequestError(f"ArtFID needs sides of 75 pixels, got {image.shape[3]}x{image.shape[2]}: enlarge them")
        features: Tensor = self._network.to(image.device)(image)
        return features


def fid(features: Tensor, reference: Tensor) -> float:
    """The Frechet distance of two samples of features, [N, D] and [M, D], with N and M at least 2.

    tr (C C')^(1/2) is the sum of the singular values of X X'^T, centred, over ((N - 1)(M - 1))^(1/2): exact, with a
    matrix of the size of the samples and not of their dimension.
    """
    if min(len(features), len(reference)) < 2:
        raise RequestError("FID needs at least two images in each of the two sets")
    x, y = (sample.double().cpu() for sample in (features, reference))
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = ((sample - sample.mean(0)) / (len(sample) - 1) ** 0.5 for sample in (x, y))
    spread = x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()
    return float((mean_x - mean_y).square().sum() + spread)


class PickScore:
    """exp(logit scale) cos(image, prompt) of CLIP ViT-H/14, tuned on human preferences (arXiv 2305.01569)."""

    def __init__(self) -> None:
        from transformers import CLIPModel, CLIPProcessor

        weights, processor = (_found(name) for name in MEASURES["PickScore"])
        try:
            self._processor: Any = CLIPProcessor.from_pretrained(processor, local_files_only=True)
            self._model: Any = CLIPModel.from_pretrained(weights, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{weights}: not CLIP's weights ({error}); download it again") from error
        self._model.eval()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> Tensor:
        """A score `[B]` for every picture with its own prompt."""
        scores = []
        for picture, prompt in zip(pictures, prompts, strict=True):
            inputs = self._processor(
                images=picture, text=prompt, padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            scores.append(self._model(**inputs).logits_per_image[0, 0])
        return torch.stack(scores).float()


class HpsV2:
    """cos(image, prompt) of CLIP ViT-H/14 in open_clip, tuned on human preferences (arXiv 2306.09341)."""

    SIDE = 224
    MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def __init__(self) -> None:
        import open_clip

        self._network: Any = _fill(open_clip.create_model("ViT-H-14"), _found(*MEASURES["HPSv2"]))
        self._tokenizer = open_clip.get_tokenizer("ViT-H-14")

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor], prompts: Sequence[str]) -> Tensor:
        """A score `[B]` for every image `[1, 3, H, W]` in [0, 1] with its own prompt."""
        texts = nn.functional.normalize(self._network.encode_text(self._tokenizer(list(prompts))), dim=1)
        pictures = torch.cat([self._network.encode_image(self._prepared(image)) for image in images])
        return (nn.functional.normalize(pictures, dim=1) * texts).sum(1)

    def _prepared(self, image: Tensor) -> Tensor:
        """The image with its longer side at 224 pixels, padded with black to a square, normalized."""
        scale = self.SIDE / max(image.shape[2:])
        height, width = (max(1, round(side * scale)) for side in image.shape[2:])
        image = nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (self.SIDE - height) // 2, (self.SIDE - width) // 2
        image = nn.functional.pad(image, (left, self.SIDE - width - left, top, self.SIDE - height - top))
        mean, deviation = (image.new_tensor(values)[:, None, None] for values in (self.MEAN, self.DEVIATION))
        return (image - mean) / deviation
