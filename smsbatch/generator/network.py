"""The feed-forward network that a style is distilled into, and its two files.

The residual network of CycleGAN (arXiv 1703.10593, after arXiv 1603.08155) with the anti-aliased sampling of
arXiv 1904.11486, as CUT (arXiv 2007.15651) uses it. Loading it needs torch and safetensors, but no model or Ray.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from smsbatch.errors import WeightsError
from smsbatch.generator.config import CONFIG, FORMAT, VERSION, WEIGHTS, parse_config
from smsbatch.text import one_line

STRIDE = 4  # pixels along a side per entry of the residual blocks
_EPS = 1e-5  # of the normalization


class Moments(NamedTuple):
    """Mean and biased variance [B, C, 1, 1] of every channel."""

    mean: Tensor
    variance: Tensor


class _Convolution(nn.Module):
    """Reflection padding, a convolution, InstanceNorm without affine parameters.

    A bias before a normalization changes nothing, and its gradient is rounding error: it is a parameter, as in the
    papers, but stays zero.
    """

    def __init__(self, in_channels: int, out_channels: int, size: int = 3) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, padding_mode="reflect")
        assert self.convolution.bias is not None
        self.convolution.bias.requires_grad_(False)

    def forward(self, x: Tensor, norms: _Norms) -> Tensor:
        return norms(self.convolution(x))


class _Norms:
    """The normalizations of one forward pass, in order: by every picture's own moments, or by those given."""

    def __init__(self, given: Sequence[Moments] | None = None, found: list[Moments] | None = None) -> None:
        self._given: Iterator[Moments] | None = None if given is None else iter(given)
        self._found = found

    def __call__(self, x: Tensor) -> Tensor:
        if self._given is None and self._found is None:
            return F.instance_norm(x, eps=_EPS)
        mean, variance = self.of(x)
        dtype = torch.promote_types(x.dtype, mean.dtype)  # for half precision the moments stay float32
        return F.batch_norm(x, mean.flatten().to(dtype), variance.flatten().to(dtype), eps=_EPS)

    def of(self, x: Tensor) -> Moments:
        """The moments of `x`, or those given in their place."""
        if self._given is not None:
            return next(self._given)
        variance, mean = torch.var_mean(x.float(), (-2, -1), correction=0, keepdim=True)
        if self._found is not None:
            self._found.append(Moments(mean, variance))
        return Moments(mean, variance)


class _Block(nn.Module):
    """x plus two convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _Convolution(channels, channels), _Convolution(channels, channels)

    def forward(self, x: Tensor, norms: _Norms) -> Tensor:
        y: Tensor = self.second(self.first(x, norms).relu(), norms)
        return x + y


class Generator(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to images of the same size and range, H and W at least 16.

    In CycleGAN's notation c7s1-k, d2k, d4k, R4k times `blocks`, u2k, uk, c7s1-3, with width k. Every convolution has
    stride 1 and reflection padding. Downsampling is the blur [1, 2, 1] and every second pixel; upsampling is
    bilinear, the same as inserting zeros and the blur [1, 3, 3, 1]. The output passes a tanh. Width 64 with 9 blocks
    has 11,378,179 parameters.

    Sides that are not multiples of 4 are padded by reflection at the right and the bottom, and the result is cropped.

    The first normalization removes every channel's mean and contrast: G(a x + b) = G(x) for a > 0, so that the network
    can only guess a picture's brightness and the colour of its light. With `restore` the result gets the input's mean
    and deviation, channel by channel; the parameters are the same.

    Attributes:
        about: its training as plain data: style, manifest, figures.
        reach: with given moments, an output pixel depends on input pixels at most this far to each side.
    """

    def __init__(
        self, width: int = 64, blocks: int = 9, *, restore: bool = False, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.width, self.restore, self.about = width, restore, dict(about or {})
        self.head = _Convolution(3, width, 7)
        self.down = nn.ModuleList([_Convolution(width, 2 * width), _Convolution(2 * width, 4 * width)])
        self.blocks = nn.ModuleList([_Block(4 * width) for _ in range(blocks)])
        self.up = nn.ModuleList([_Convolution(4 * width, 2 * width), _Convolution(2 * width, width)])
        self.tail = nn.Conv2d(width, 3, 7, padding=3, padding_mode="reflect")
        self.reach = 21 + 8 * blocks

    @classmethod
    def initialized(cls, width: int, blocks: int, seed: int, *, restore: bool = False) -> Generator:
        """A generator to train: normal weights of variance 2 / fan-in (arXiv 1502.01852), a tenth of that in the last
        layer, and zero biases.

        A normalization cancels the scale of the weights before it, which then only decides how fast their direction
        changes. With CycleGAN's and CUT's initial gain of 0.02, Adam scrambles them for hundreds of steps first.
        """
        generator = torch.Generator().manual_seed(seed)
        fresh = cls(width, blocks, restore=restore)
        with torch.no_grad():
            for layer in fresh.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, generator=generator)
                    assert layer.bias is not None
                    layer.bias.zero_()
            fresh.tail.weight *= 0.1**0.5
        return fresh

    def forward(self, images: Tensor, moments: Sequence[Moments] | None = None) -> Tensor:
        """The stylized images, normalized by `moments` of another picture if given (see the method `moments`)."""
        return self._run(images, _Norms(moments))

    @torch.no_grad()
    def moments(self, image: Tensor) -> list[Moments]:
        """The moments of every normalization for one picture [1, 3, H, W].

        The tiles of a large picture use those of a small copy of the whole (arXiv 2103.11784): with moments of their
        own, neighbours would differ in colour and contrast.
        """
        found: list[Moments] = []
        self._run(image, _Norms(found=found))
        return found

    def _run(self, images: Tensor, norms: _Norms) -> Tensor:
        height, width = images.shape[-2:]
        x = (images * 2 - 1).to(self.tail.weight.dtype)
        x = F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="reflect")
        x = self.head(x, norms).relu()
        for layer in self.down:
            x = _halved(layer(x, norms).relu())
        for block in self.blocks:
            x = block(x, norms)
        for layer in self.up:
            x = layer(F.interpolate(x, scale_factor=2.0, mode="bilinear"), norms).relu()
        y: Tensor = self.tail(x)[..., :height, :width].float().tanh()
        if self.restore:
            mean, variance = norms.of(images.float())
            return (norms(y) * variance.sqrt() + mean).clamp(0, 1)
        return y / 2 + 0.5

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def files(self) -> dict[str, bytes]:
        """The two files by name, parameters in float32; the same generator gives the same bytes."""
        weights = save({name: value.detach().float().cpu().contiguous() for name, value in self.state_dict().items()})
        config = {
            "format": FORMAT,
            "version": VERSION,
            "width": self.width,
            "blocks": len(self.blocks),
            "restore": self.restore,
            "parameters": self.parameter_count,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "about": self.about,
        }
        return {WEIGHTS: weights, CONFIG: (json.dumps(config, indent=2) + "\n").encode()}

    def save(self, folder: str | Path) -> None:
        """Write the two files into a folder, which is created if absent."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            Path(folder, name).write_bytes(data)

    @classmethod
    def load(cls, folder: str | Path) -> Generator:
        """Load a generator from its two files in a folder, on the CPU, for inference.

        Raises:
            WeightsError: a file is missing, damaged, or not of this format.
        """
        try:
            files = {name: Path(folder, name).read_bytes() for name in (CONFIG, WEIGHTS)}
        except OSError as error:
            raise WeightsError(f"{error.filename}: {error.strerror}; a generator is {WEIGHTS} and {CONFIG}") from error
        return cls.of_files(files, str(folder))

    @classmethod
    def of_files(cls, files: Mapping[str, bytes], where: str = "generator") -> Generator:
        """`load` from the files' bytes; `where` names their source in messages.

        Raises:
            WeightsError: they are damaged, do not belong together, or are not of this format.
        """
        config = parse_config(files[CONFIG], f"{where}/{CONFIG}")
        if hashlib.sha256(files[WEIGHTS]).hexdigest() != config["sha256"]:
            raise WeightsError(f"{where}/{WEIGHTS} is not what {CONFIG} says; copy both files again")
        with torch.device("meta"):  # draws no random numbers, takes no memory
            generator = cls(config["width"], config["blocks"], restore=config["restore"], about=config["about"])
        try:
            generator.load_state_dict(load(files[WEIGHTS]), assign=True)
        except (SafetensorError, RuntimeError) as error:
            reason = one_line(error)
            raise WeightsError(f"{where}/{WEIGHTS}: {reason}; copy both files again") from error
        return generator.requires_grad_(False).eval()


def _halved(x: Tensor) -> Tensor:
    """Every second pixel after the blur [1, 2, 1] / 4 along both sides: the mean of two neighbours, taken twice."""
    return F.avg_pool2d(F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 2, 1), 2, 2)
