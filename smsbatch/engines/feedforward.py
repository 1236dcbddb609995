"""Every picture in one pass of a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from smsbatch.diffusion.priors.stable_diffusion import DTYPES, GRAPHS
from smsbatch.engines.base import Rendered, _finite
from smsbatch.engines.memory import BatchFitter
from smsbatch.errors import WeightsError
from smsbatch.generator.files import read_generator
from smsbatch.generator.network import Generator
from smsbatch.generator.tiles import Tiling, overview
from smsbatch.manifest import Stylize


class GeneratorEngine:
    """Every picture in one pass of a generator; a large one tile by tile."""

    diverged_hint = "the result is not finite; set compute.precision to bf16 or fp32"
    oom_hint = "lower image.resolution or tiles.size, or set metrics to []"
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
        self._fitting = BatchFitter()

    def prompt(self, caption: str) -> str:
        return str(self.generator.about.get("style", ""))

    def batch_size(self, height: int, width: int) -> int:
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
        moments = self.generator.moments(overview(image, tiles.thumbnail))
        tiling = Tiling(image, tiles.size, tiles.overlap, self.generator.reach)

        def compute(chosen: slice) -> Tensor:
            computed: Tensor = self._call(tiling.cut(chosen), moments)
            return computed

        for chosen, computed, error in self._fitting.each(len(tiling), tiling.pixels, self._batch_size, compute):
            if computed is None:
                raise torch.OutOfMemoryError(error)
            tiling.paste(chosen, computed)  # not in `compute`, which may be retried
            progress(0)
        return tiling.result()
