"""Samples in, outcomes out: all between a sample's bytes and its row, on one device, without storage or cluster."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smsbatch.data import pixels
from smsbatch.data.sample import Outcome, Sample, Unit
from smsbatch.diffusion.lora import read_style_lora
from smsbatch.diffusion.objectives import Texts
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.prior import Prior
from smsbatch.errors import SampleError
from smsbatch.manifest import Manifest
from smsbatch.metrics import METRICS

__all__ = ["Stylizer", "sample_seed"]

Picture = NDArray[np.uint8]


def sample_seed(run_seed: int, key: str) -> int:
    """The seed of one sample, 63 bits of SHA-256 over run seed and key: the same in any unit, batch or worker."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{key}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class _Item:
    """A sample on its way: decoded, fitted, and its row as far as it is known."""

    picture: Picture
    texts: tuple[str, str]
    outcome: Outcome


class Stylizer:
    """The manifest's models on one device (default: CUDA, if there is any). Building it loads them.

    Raises:
        WeightsError: a model or LoRA is missing or not understood.
    """

    def __init__(self, manifest: Manifest, device: str | None = None) -> None:
        self.manifest = manifest
        if isinstance(manifest.compute.threads, int):
            torch.set_num_threads(manifest.compute.threads)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, style = manifest.model, manifest.style
        self.prior = Prior.load(
            model.path, revision=model.revision, device=device, precision=manifest.compute.precision
        )
        deltas = read_style_lora(style.lora, self.prior.layers())
        self.style = self.prior.with_deltas({name: style.scale * delta for name, delta in deltas.items()})
        self.metrics = {name: METRICS[name]() for name in manifest.metrics}

    def __call__(
        self, picture: bytes | str | Path, caption: str = "", key: str = "image"
    ) -> tuple[Picture, dict[str, Any]]:
        """Stylize one picture, given as a path or as an image file's bytes.

        Returns:
            The result [H, W, 3] uint8 and its row, exactly as a run would give for a sample of this key.

        Raises:
            SampleError: it cannot be read, decoded or stylized.
        """
        url = "" if isinstance(picture, bytes) else str(picture)
        try:
            data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        except OSError as error:
            raise SampleError("read_error", f"{key}: {url}: {error.strerror or error}") from error
        (outcome,) = self.stylize([Sample(key, url, data, "", caption, {})])
        if outcome.image is None:
            raise SampleError(str(outcome.error_code), f"{key}: {outcome.error_message}")
        row = outcome.row(Unit(0, 0, 0, 1), "", "", self.manifest.metrics)
        return pixels.decode(outcome.image), {k: v for k, v in row.items() if k not in _OF_A_RUN}

    def stylize(
        self, samples: Sequence[Sample], progress: Callable[[int, int, int], None] = lambda done, batch, step: None
    ) -> list[Outcome]:
        """One outcome for every sample, in the same order; a sample that fails does not touch the others.

        `progress` is called with the number of samples finished, and size and step of the batch in hand.
        """
        outcomes: list[Outcome | None] = [None] * len(samples)
        items: dict[int, _Item] = {}
        for index, sample in enumerate(samples):
            known = self._known(sample)
            try:
                items[index] = self._item(sample, known)
            except SampleError as error:
                outcomes[index] = _failed(known, error)
        done = len(samples) - len(items)
        for batch in self._batches(items):
            results = self._run([items[index] for index in batch], partial(progress, done, len(batch)))
            for index, outcome in zip(batch, results, strict=True):
                outcomes[index] = outcome
            done += len(batch)
            progress(done, 0, 0)
        return [outcome for outcome in outcomes if outcome is not None]

    def _known(self, sample: Sample) -> Outcome:
        """What the row says of a sample before anything was tried, as an outcome that has not succeeded yet."""
        return Outcome(
            key=sample.key,
            url=sample.url,
            error_code="unfinished",
            caption=sample.caption or None,
            prompt=self._texts(sample)[0],
            source_sha256=sample.sha256,
            seed=sample_seed(self.manifest.seed, sample.key),
            steps=self.manifest.objective.steps,
            original_key=sample.original_key,
            fields=sample.fields,
        )

    def _texts(self, sample: Sample) -> tuple[str, str]:
        return self.manifest.objective.prompts(self.manifest.style.prompt, sample.caption)

    def _item(self, sample: Sample, known: Outcome) -> _Item:
        image = self.manifest.image
        original = pixels.decode(sample.image, min_side=image.min_side, max_pixels=image.max_pixels)
        height, width = original.shape[:2]
        picture = pixels.fit(original, image.resolution, image.fit)
        return _Item(picture, self._texts(sample), replace(known, original_width=width, original_height=height))

    def _batches(self, items: dict[int, _Item]) -> Iterator[list[int]]:
        """Samples of one shape together, in their order, at most `batch_size`."""
        shapes: dict[tuple[int, ...], list[int]] = {}
        for index, item in items.items():
            shapes.setdefault(item.picture.shape, []).append(index)
        size = self.manifest.compute.batch_size
        for indices in shapes.values():
            for start in range(0, len(indices), size):
                yield indices[start : start + size]

    def _run(self, batch: Sequence[_Item], progress: Callable[[int], None]) -> list[Outcome]:
        """Optimize one batch; a batch too large for the device's memory is halved, down to the single sample."""
        try:
            return self._optimize(batch, progress)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            if len(batch) == 1:
                height, width = batch[0].picture.shape[:2]
                message = f"{width}x{height} does not fit the device's memory; lower image.resolution"
                return [_failed(batch[0].outcome, SampleError("oom", message))]
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._run(batch[:half], progress) + self._run(batch[half:], progress)

    def _optimize(self, batch: Sequence[_Item], progress: Callable[[int], None]) -> list[Outcome]:
        started = perf_counter()
        source = torch.stack([_to_tensor(item.picture) for item in batch]).to(self.prior.device)
        z = optimize(
            self.prior,
            self.style,
            self.prior.encode(source),
            Texts(
                target=self.prior.embed([item.texts[0] for item in batch]),
                edit=self.prior.embed([item.texts[1] for item in batch]),
                null=self.prior.embed([""]).expand(len(batch), -1, -1),
            ),
            [item.outcome.seed or 0 for item in batch],
            self.manifest.objective,
            progress,
        )
        size = (source.shape[-2], source.shape[-1])
        # One at a time: decoding is a small part of the work, and the largest peak of memory when batched.
        results = torch.cat([self.prior.decode(row[None], size) for row in z.nan_to_num()])
        finite = (z.isfinite().flatten(1).all(1) & results.isfinite().flatten(1).all(1)).tolist()
        quantized = (results.nan_to_num() * 255).round().to(torch.uint8)
        measured = {name: metric(source, quantized / 255).tolist() for name, metric in self.metrics.items()}
        seconds = (perf_counter() - started) / len(batch)

        outcomes = []
        for index, item in enumerate(batch):
            height, width = size
            known = replace(item.outcome, width=width, height=height, seconds=seconds)
            try:
                if not finite[index]:
                    raise SampleError("diverged", "the latent is not finite; lower objective.learning_rate")
                picture = quantized[index].permute(1, 2, 0).cpu().numpy()
                data = pixels.encode(picture, self.manifest.output.format, self.manifest.output.quality)
            except SampleError as error:
                outcomes.append(_failed(item.outcome, error))
                continue
            outcomes.append(
                replace(
                    known,
                    image=data,
                    image_field=self.manifest.output.format,
                    error_code=None,
                    metrics={name: values[index] for name, values in measured.items()},
                )
            )
        return outcomes


_OF_A_RUN = ("unit", "shard", "generation", "attempt", "attempts", "worker")


def _to_tensor(picture: Picture) -> Tensor:
    """[H, W, 3] uint8 to [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def _failed(known: Outcome, error: SampleError) -> Outcome:
    return replace(known, error_code=error.code, error_message=str(error))
