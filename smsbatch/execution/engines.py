"""What stylizes: pictures in, pictures out, as tensors on one device. One engine for every task that makes rows.

`Optimizing` asks the scores for every picture, `Feedforward` takes one pass of a generator. Neither knows files, rows
or units.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from smsbatch.diffusion.generator import Generator
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.prior import DTYPES, GRAPHS, Prior
from smsbatch.diffusion.tiles import Tiling, thumbnail
from smsbatch.errors import WeightsError
from smsbatch.execution.generators import read_generator
from smsbatch.manifest import Dataset, Optimize, Styled, Stylize

__all__ = ["Engine", "Feedforward", "Fitting", "Optimizing", "Rendered", "engine_of", "load_models"]

Result = TypeVar("Result")


class Rendered(NamedTuple):
    """A batch of results: images [B, 3, H, W] in [0, 1], the steps each took [B], and whether each is finite [B]."""

    images: Tensor
    steps: Tensor
    finite: Tensor


class Engine(Protocol):
    """A style on one device.

    Attributes:
        steps: of a batch, as `render` tells its progress.
        if_diverged, if_too_large: what to do where a result is not finite, or a picture does not fit the memory.
    """

    device: torch.device
    steps: int
    if_diverged: str
    if_too_large: str

    def prompt(self, caption: str) -> str:
        """What the row says a picture with this caption was to become."""

    def together(self, height: int, width: int) -> int:
        """How many pictures of this size are best rendered at once."""

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        """Stylize images [B, 3, H, W] in [0, 1], none of which has any influence on another.

        `progress` is called with finished steps, and may raise to stop. Out of memory is torch's error.
        """


def engine_of(manifest: Dataset, device: str) -> Engine:
    """The engine that a manifest's task wants.

    Raises:
        WeightsError: a model, LoRA or generator is missing or not understood, or two models do not go together.
    """
    if isinstance(manifest, Stylize):
        return Feedforward(manifest, device)
    assert isinstance(manifest, Optimize), "a task that makes rows"
    return Optimizing(manifest, device)


# ------------------------------------------------------------------------------------------------------------- scores


class Optimizing:
    """Every picture on its own, by the scores (paper, Algorithm 1)."""

    if_diverged = "the latent is not finite; lower objective.learning_rate"
    if_too_large = "lower image.resolution"

    def __init__(self, manifest: Optimize, device: str) -> None:
        self.prior, self.style = load_models(manifest, device)
        self.device = self.prior.device
        self.objective, self.steps = manifest.objective, manifest.objective.steps
        self._words, self._batch_size = manifest.style.prompt, manifest.compute.batch_size

    def prompt(self, caption: str) -> str:
        return self.objective.prompts(self._words, caption).target

    def together(self, height: int, width: int) -> int:
        return self._batch_size

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        z, steps = optimize(
            self.prior,
            self.style,
            # One at a time, as below: a small part of the work, and the largest peak of memory when batched.
            torch.cat([self.prior.encode(row[None]) for row in images]),
            [self.objective.prompts(self._words, caption) for caption in captions],
            seeds,
            self.objective,
            progress,
        )
        size = (images.shape[-2], images.shape[-1])
        results = torch.cat([self.prior.decode(row[None], size) for row in z.nan_to_num()])
        return Rendered(results, steps, _finite(z) & _finite(results))


def load_models(manifest: Styled, device: str) -> tuple[Prior, Prior]:
    """The bare prior and the style's, which is the same one where there is neither a LoRA nor another checkpoint.

    Raises:
        WeightsError: a model or LoRA is missing or not understood, or the two models do not go together.
    """
    compute, style = manifest.compute, manifest.style
    load = partial(
        Prior.load,
        device=device,
        precision=compute.precision,
        channels_last=compute.channels_last,
        compile=compute.compile,
    )
    prior = load(manifest.model)
    base = prior
    if style.model is not None and style.model != manifest.model:
        base = load(style.model, key="style.model")
        _check_family(prior, base, manifest.model.path, style.model.path)
    if not style.lora:
        return prior, base
    deltas = read_style(style, base)
    return prior, base.with_deltas(deltas.unet, deltas.text)


def _check_family(prior: Prior, style: Prior, path: str, style_path: str) -> None:
    """One latent is looked at by both models: it must mean the same to them, and a timestep the same noise."""
    other = [
        f"{name} {its} instead of {ours}"
        for name, its, ours in (
            ("latent channels:", style.channels, prior.channels),
            ("pixels per latent entry:", style.factor, prior.factor),
        )
        if its != ours
    ]
    if not torch.allclose(style.schedule.abar, prior.schedule.abar, atol=1e-4):
        other.append("another noise schedule")
    if other:
        raise WeightsError(
            f"style.model: {style_path} does not go with {path} ({', '.join(other)}); choose models of one family"
        )


# ---------------------------------------------------------------------------------------------------------- generator


class Feedforward:
    """Every picture in one pass of a generator; a large one tile by tile."""

    if_diverged = "the result is not finite; set compute.precision to bf16 or fp32"
    if_too_large = "lower image.resolution or tiles.size, or set metrics to []"
    steps = 1

    def __init__(self, manifest: Stylize, device: str) -> None:
        self.device, compute = torch.device(device), manifest.compute
        try:
            files = read_generator(manifest.generator, manifest.storage)
            self.generator = Generator.of_files(files, manifest.generator)
        except WeightsError as error:
            raise WeightsError(str(error) if str(error).startswith("generator:") else f"generator: {error}") from error
        precision = compute.precision
        if precision == "auto":
            precision = "fp16" if self.device.type == "cuda" else "fp32"
        layout = torch.channels_last if compute.channels_last else torch.contiguous_format
        self._layout = layout
        self.generator.to(self.device, DTYPES[precision]).to(memory_format=layout)
        self._call = torch.compile(self.generator, dynamic=False) if compute.compile else self.generator
        if compute.compile:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, GRAPHS)
        self._tiles, self._batch_size = manifest.tiles, compute.batch_size
        self._fitting = Fitting()

    def prompt(self, caption: str) -> str:
        return str(self.generator.about.get("style", ""))

    def together(self, height: int, width: int) -> int:
        return 1 if max(height, width) > self._tiles.size else self._batch_size

    @torch.no_grad()
    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        images = images.contiguous(memory_format=self._layout)
        if max(images.shape[-2:]) > self._tiles.size:
            results = torch.cat([self._tiled(row[None], progress) for row in images])
        else:
            results = self._call(images)
        progress(1)
        return Rendered(results, torch.ones(len(images), dtype=torch.long), _finite(results))

    def _tiled(self, image: Tensor, progress: Callable[[int], None]) -> Tensor:
        tiles = self._tiles
        moments = self.generator.moments(thumbnail(image, tiles.thumbnail))
        tiling = Tiling(image, tiles.size, tiles.overlap, self.generator.reach)

        def compute(chosen: slice) -> Tensor:
            computed: Tensor = self._call(tiling.cut(chosen), moments)
            return computed

        for chosen, computed, error in self._fitting.each(len(tiling), tiling.pixels, self._batch_size, compute):
            if computed is None:
                raise torch.OutOfMemoryError(error)
            tiling.paste(chosen, computed)  # not in `compute`, which may be tried again
            progress(0)
        return tiling.result()


def _finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(1)


# ------------------------------------------------------------------------------------------------------------- memory


class Fitting:
    """How many things of a size fit the device's memory together, found out by trying."""

    def __init__(self) -> None:
        self._most: dict[int, int] = {}

    def each(
        self, count: int, pixels: int, together: int, work: Callable[[slice], Result]
    ) -> Iterator[tuple[slice, Result | None, str]]:
        """Do `work` on `count` things of so many pixels, at most `together` at once; what does not fit is halved, and
        less is tried from then on.

        Yields:
            Which, what came of it, and ''; or, of one that does not fit alone, None and the error's words.
        """
        start = 0
        while start < count:
            chosen = slice(start, min(count, start + min(together, self._most.get(pixels, together))))
            result, error = None, ""
            try:
                result = work(chosen)
            except RuntimeError as raised:
                if not _out_of_memory(raised):
                    raise
                error = str(raised) or "out of memory"
            if error:
                # Not before the exception is gone: its frames hold the tensors that must make room.
                gc.collect()
                torch.cuda.empty_cache()
                number = chosen.stop - chosen.start
                if number > 1:
                    self._most[pixels] = number // 2
                    continue
            yield chosen, result, error
            start = chosen.stop


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of errors for it; the CPU's allocator, the driver, cuBLAS and cuDNN say it in words."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)
