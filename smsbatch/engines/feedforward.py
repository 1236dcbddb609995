"""The engine of `task: stylize`: one pass of a generator per picture."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smsbatch.engines.base import Description, Engine, Rendered, Weights, finite
from smsbatch.errors import WeightsError
from smsbatch.generator.files import generator_about, read_generator
from smsbatch.manifest import Stylize
from smsbatch.text import code_span

if TYPE_CHECKING:
    from torch import Tensor


class GeneratorEngine(Engine[Stylize]):
    """One pass of a generator per picture; large pictures are processed in tiles."""

    units_in_flight = 4  # a unit takes less time to compute than to read or to commit

    diverged_hint = "the result is not finite; set compute.precision to bf16 or fp32"
    oom_hint = "lower image.resolution or tiles.size, or set metrics to []"
    steps = 1

    def __init__(self, manifest: Stylize, device: str) -> None:
        import torch

        from smsbatch.diffusion.priors.stable_diffusion import DTYPES, GRAPHS
        from smsbatch.engines.memory import BatchFitter
        from smsbatch.generator.network import Generator

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

    @staticmethod
    def steps_per_image(manifest: Stylize) -> None:
        return None

    @staticmethod
    def check_weights(manifest: Stylize) -> Weights:
        read_generator(manifest.generator, manifest.storage)
        about = generator_about(manifest)
        style = about.get("style") or "a style that it does not name"
        return Weights(f"{manifest.generator}: {style}, {about['parameters']:,} parameters", [])

    @staticmethod
    def digests(manifest: Stylize) -> dict[str, str]:
        files = read_generator(manifest.generator, manifest.storage)
        return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}

    @staticmethod
    def about(manifest: Stylize) -> dict[str, Any]:
        return generator_about(manifest)

    @staticmethod
    def describe(settings: Mapping[str, Any], about: Mapping[str, Any] | None) -> Description:
        about = about or {}
        # The name of the run that made the generator, else the generator's location.
        name = str(about.get("name") or settings["generator"])
        facts = [("generator", f"{code_span(settings['generator'])}, {about['parameters']:,} parameters")]
        loras = about.get("lora") or ()
        parts = [code_span(about["style"])] if about.get("style") else []
        parts += [f"LoRA {code_span(path)}" for path in ([loras] if isinstance(loras, str) else loras)]
        facts += [("style", ", ".join(parts))] if parts else []
        facts += [("distilled from", code_span(str(about["model"])))] if about.get("model") else []
        return Description(
            style=about.get("style") or "its style",
            work=f"one pass of the generator {name} each",
            method=f"in one pass of the generator {code_span(name)}",
            facts=facts,
        )

    def prompt(self, caption: str) -> str:
        return str(self.generator.about.get("style", ""))

    def batch_size(self, height: int, width: int) -> int:
        return 1 if max(height, width) > self._tiles.size else self._batch_size

    def render(
        self, images: Tensor, captions: Sequence[str], seeds: Sequence[int], progress: Callable[[int], None]
    ) -> Rendered:
        import torch

        images = images.contiguous(memory_format=self._layout)
        with torch.no_grad():
            if max(images.shape[-2:]) > self._tiles.size:
                results = torch.cat([self._tiled(row[None], progress) for row in images])
            else:
                results = self._call(images)
        progress(1)
        return Rendered(results, torch.ones(len(images), dtype=torch.long), finite(results))

    def _tiled(self, image: Tensor, progress: Callable[[int], None]) -> Tensor:
        import torch

        from smsbatch.generator.tiles import Tiling, overview

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
