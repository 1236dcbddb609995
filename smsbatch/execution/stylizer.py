"""Samples in, outcomes out: all between a sample's bytes and its row, on one device, without storage or cluster."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
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
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.prior import Prior
from smsbatch.errors import SampleError, WeightsError
from smsbatch.manifest import Manifest, Prompts
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
    prompts: Prompts
    outcome: Outcome


class Stylizer:
    """The manifest's models on one device (default: CUDA, if there is any). Building it loads them.

    Raises:
        WeightsError: a model or LoRA is missing or not understood, or the two models do not go together.
    """

    def __init__(self, manifest: Manifest, device: str | None = None) -> None:
        self.manifest = manifest
        compute, style = manifest.compute, manifest.style
        if isinstance(compute.threads, int):
            torch.set_num_threads(compute.threads)
        load = partial(
            Prior.load,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            precision=compute.precision,
            channels_last=compute.channels_last,
            compile=compute.compile,
        )
        self.prior = load(manifest.model)
        bare = self.prior
        if style.model is not None and style.model != manifest.model:
            bare = load(style.model, key="style.model")
            _check_family(self.prior, bare, manifest.model.path, style.model.path)
        self.style = bare
        if style.lora:
            deltas = read_style(style, bare)
            self.style = bare.with_deltas(deltas.unet, deltas.text)
        self.metrics = {name: METRICS[name]() for name in manifest.metrics}
        self._fitting: dict[int, int] = {}  # samples that go into memory together, by their pixels

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
        for waiting in _by_shape(items):
            while waiting:
                batch = waiting[: self._batch_size(items[waiting[0]])]
                results = self._run([items[index] for index in batch], partial(progress, done, len(batch)))
                if results is None:
                    continue  # with fewer
                for index, outcome in zip(batch, results, strict=True):
                    outcomes[index] = outcome
                del waiting[: len(batch)]
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
            prompt=self._prompts(sample).target,
            source_sha256=sample.sha256,
            seed=sample_seed(self.manifest.seed, sample.key),
            steps=self.manifest.objective.steps,
            original_key=sample.original_key,
            fields=sample.fields,
        )

    def _prompts(self, sample: Sample) -> Prompts:
        return self.manifest.objective.prompts(self.manifest.style.prompt, sample.caption)

    def _item(self, sample: Sample, known: Outcome) -> _Item:
        image = self.manifest.image
        original = pixels.decode(sample.image, min_side=image.min_side, max_pixels=image.max_pixels)
        height, width = original.shape[:2]
        picture = pixels.fit(original, image.resolution, image.fit)
        return _Item(picture, self._prompts(sample), replace(known, original_width=width, original_height=height))

    def _batch_size(self, item: _Item) -> int:
        return self._fitting.get(_pixels(item), self.manifest.compute.batch_size)

    def _run(self, batch: Sequence[_Item], progress: Callable[[int], None]) -> list[Outcome] | None:
        """Optimize one batch. None if it does not fit the device's memory: half as many are tried from then on."""
        try:
            return self._optimize(batch, progress)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # Not before the exception is gone: its frames hold the tensors that must make room.
        gc.collect()
        torch.cuda.empty_cache()
        if len(batch) > 1:
            self._fitting[_pixels(batch[0])] = len(batch) // 2
            return None
        height, width = batch[0].picture.shape[:2]
        message = f"{width}x{height} does not fit the device's memory; lower image.resolution"
        return [_failed(batch[0].outcome, SampleError("oom", message))]

    def _optimize(self, batch: Sequence[_Item], progress: Callable[[int], None]) -> list[Outcome]:
        started = perf_counter()
        source = torch.stack([_to_tensor(item.picture) for item in batch]).to(self.prior.device)
        z, steps = optimize(
            self.prior,
            self.style,
            # One at a time, as below: a small part of the work, and the largest peak of memory when batched.
            torch.cat([self.prior.encode(row[None]) for row in source]),
            [item.prompts for item in batch],
            [item.outcome.seed or 0 for item in batch],
            self.manifest.objective,
            progress,
        )
        size = (source.shape[-2], source.shape[-1])
        results = torch.cat([self.prior.decode(row[None], size) for row in z.nan_to_num()])
        taken: list[int] = steps.tolist()
        finite = (z.isfinite().flatten(1).all(1) & results.isfinite().flatten(1).all(1)).tolist()
        quantized = (results.nan_to_num() * 255).round().to(torch.uint8)
        measured = {name: metric(source, quantized / 255).tolist() for name, metric in self.metrics.items()}
        seconds = (perf_counter() - started) / len(batch)

        height, width = size
        outcomes = []
        for index, item in enumerate(batch):
            known = replace(item.outcome, steps=taken[index], batch_size=len(batch))
            try:
                if not finite[index]:
                    raise SampleError("diverged", "the latent is not finite; lower objective.learning_rate")
                picture = quantized[index].permute(1, 2, 0).cpu().numpy()
                data = pixels.encode(picture, self.manifest.output.format, self.manifest.output.quality)
            except SampleError as error:
                outcomes.append(_failed(known, error))
                continue
            outcomes.append(
                replace(
                    known,
                    width=width,
                    height=height,
                    seconds=seconds,
                    image=data,
                    image_field=self.manifest.output.format,
                    error_code=None,
                    metrics={name: values[index] for name, values in measured.items()},
                )
            )
        return outcomes


_OF_A_RUN = ("unit", "shard", "generation", "attempt", "attempts", "worker")


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


def _by_shape(items: Mapping[int, _Item]) -> list[list[int]]:
    """Samples of one shape together, in their order."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, item in items.items():
        shapes.setdefault(item.picture.shape, []).append(index)
    return list(shapes.values())


def _pixels(item: _Item) -> int:
    return int(item.picture.shape[0] * item.picture.shape[1])


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class of errors for it; the CPU's allocator, the driver, cuBLAS and cuDNN say it in words."""
    words = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _to_tensor(picture: Picture) -> Tensor:
    """[H, W, 3] uint8 to [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def _failed(known: Outcome, error: SampleError) -> Outcome:
    return replace(known, error_code=error.code, error_message=str(error))
