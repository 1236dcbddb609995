"""The stylizer turns samples into outcomes on one device, without storage or cluster.

It is a pipeline: threads decode ahead of the device, one thread stacks the next batch, other threads encode results.
Concurrent calls take turns on the device; each prepares its first batch before its turn.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smsbatch.data import pixels
from smsbatch.data.sample import Outcome, Sample, Unit, hashed_seed
from smsbatch.engines.memory import BatchFitter
from smsbatch.engines.table import ENGINES
from smsbatch.errors import RequestError, SampleError
from smsbatch.manifest import Dataset, Manifest
from smsbatch.metrics import METRICS, Metric

Picture = NDArray[np.uint8]
Item = TypeVar("Item")

_OF_A_RUN = ("unit", "shard", "generation", "attempt", "attempts", "worker")  # columns without meaning outside of a run
_AHEAD = 2  # batches whose pictures are decoded before they are stacked
_AHEAD_BYTES = 1 << 29  # limit for pictures that are decoded and fitted, but not stacked; a single one may exceed it
_BEHIND = 4  # batches that are encoded while the device continues


def sample_seed(run_seed: int, key: str) -> int:
    """The seed of one sample, 63 bits of SHA-256 over run seed and key: the same in any unit, batch or worker."""
    return hashed_seed(f"{run_seed}:{key}")


@dataclass(frozen=True)
class _Head:
    """A sample after its file's header is read: its row so far, and its size after fitting, None if it failed."""

    outcome: Outcome
    size: tuple[int, int] | None = None  # width, height
    bytes: int = 0  # of the picture after fitting


@dataclass(frozen=True)
class _Call:
    """A call of `stylize`: its arguments, and the outcomes so far, None for the samples that are not done."""

    samples: Sequence[Sample]
    heads: Sequence[_Head]
    outcomes: list[Outcome | Future[Outcome] | None]
    progress: Callable[[int, int, int], None]

    @property
    def done(self) -> int:
        return len(self.outcomes) - self.outcomes.count(None)


@dataclass(frozen=True)
class _Batch:
    """Pictures of one size, [B, H, W, 3] uint8 in host memory, with their indices in the call and their rows."""

    places: Sequence[int]
    outcomes: Sequence[Outcome]
    pixels: Tensor


@dataclass(frozen=True)
class _Launched:
    """A batch queued on the device, and the host tensors that hold the results once `ended` has passed."""

    places: Sequence[int]
    outcomes: Sequence[Outcome]
    began: _Moment
    ended: _Moment
    pictures: Tensor  # [B, H, W, 3] uint8
    steps: Tensor
    finite: Tensor
    metrics: Mapping[str, Tensor]


class _Moment:
    """The time at which the device has finished the work queued so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._time = perf_counter()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: _Moment) -> float:
        """Seconds between two moments that have passed."""
        if self._event is None or other._event is None:
            return self._time - other._time
        return float(other._event.elapsed_time(self._event)) / 1000


class Stylizer:
    """The manifest's models on one device (default: CUDA if available, else the CPU). The constructor loads them.

    May be called from several threads at once.

    Raises:
        RequestError: the manifest's task makes no pictures.
        WeightsError: a model, LoRA or generator is missing or not supported, or the two models are incompatible.
    """

    def __init__(self, manifest: Manifest, device: str | None = None) -> None:
        if manifest.task not in ENGINES:
            raise RequestError(f"task {manifest.task} makes no pictures; a manifest of task stylize uses its generator")
        assert isinstance(manifest, Dataset), "every task with an engine makes a dataset"
        self.manifest, threads = manifest, manifest.compute.threads
        if isinstance(threads, int):
            torch.set_num_threads(threads)
        self.engine = ENGINES[manifest.task](manifest, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.metrics: dict[str, Metric] = {name: METRICS[name]() for name in manifest.metrics}
        self._threads = threads if isinstance(threads, int) else os.cpu_count() or 1
        self._decoders = ThreadPoolExecutor(self._threads, thread_name_prefix="smsbatch-decode")
        self._encoders = ThreadPoolExecutor(self._threads, thread_name_prefix="smsbatch-encode")
        self._turn = threading.Lock()
        self._fitting = BatchFitter()
        self._last: _Moment | None = None
        self._busy_s = 0.0
        self._idle_s: float | None = None

    @property
    def idle_fraction(self) -> float | None:
        """The share of the time from the first to the last batch in which the device was idle; None before two."""
        return None if self._idle_s is None else self._idle_s / (self._idle_s + self._busy_s)

    def __call__(
        self, picture: bytes | str | Path, caption: str = "", key: str = "image"
    ) -> tuple[Picture, dict[str, Any]]:
        """Stylize one picture, given as a path or as the bytes of an image file.

        Returns:
            The result [H, W, 3] uint8 and its row, exactly as in a run that has a sample with this key.

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
        """One outcome for every sample, in the same order; a sample that fails does not affect the others.

        During this call's turn on the device, `progress` is called with the number of finished samples and the size and
        step of the current batch. An exception that it raises ends the call.
        """
        heads = list(self._decoders.map(self._head, samples))
        call = _Call(samples, heads, [None if head.size else head.outcome for head in heads], progress)
        with closing(_one_ahead(self._batches(call))) as batches:
            first = next(batches, None)
            with self._turn:
                progress(call.done, 0, 0)
                behind: deque[Future[Outcome]] = deque()
                for launched in self._rendered(chain([first] if first else [], batches), call):
                    encoding = self._finished(launched)
                    for place, outcome in zip(launched.places, encoding, strict=True):
                        call.outcomes[place] = outcome
                    progress(call.done, 0, 0)
                    behind += encoding
                    while len(behind) > _BEHIND * len(encoding):
                        behind.popleft().result()
        assert call.done == len(call.outcomes), "every sample is an outcome"
        return [outcome.result() if isinstance(outcome, Future) else outcome for outcome in call.outcomes if outcome]

    # -------------------------------------------------------------------------------------------- ahead of the device

    def _head(self, sample: Sample) -> _Head:
        image = self.manifest.image
        known = Outcome(
            key=sample.key,
            url=sample.url,
            error_code="unfinished",
            caption=sample.caption or None,
            caption_from=sample.caption_from,
            prompt=self.engine.prompt(sample.caption),
            source_sha256=sample.sha256,
            seed=sample_seed(self.manifest.seed, sample.key),
            steps=self.engine.steps,
            original_key=sample.original_key,
            fields=sample.fields,
        )
        try:
            width, height = pixels.size(sample.image, min_side=image.min_side, max_pixels=image.max_pixels)
            size = pixels.fitted(width, height, image.resolution, image.fit)
        except SampleError as error:
            return _Head(_failed(known, error))
        return _Head(known, size, 3 * size[0] * size[1])

    def _batches(self, call: _Call) -> Generator[_Batch, None, None]:
        """Batches of samples of one size, in their order; a sample that cannot be decoded becomes a failed outcome."""

        def decoded() -> Iterator[tuple[int, Outcome, Picture]]:
            for place, future in self._ahead(call):
                try:
                    outcome, picture = future.result()
                except SampleError as error:
                    call.outcomes[place] = _failed(call.heads[place].outcome, error)
                else:
                    yield place, outcome, picture

        # Grouped by decoded size, because a header may be wrong.
        for (height, width, _), group in groupby(decoded(), key=lambda item: item[2].shape):
            while batch := list(islice(group, self.engine.batch_size(height, width))):
                places, known, pictures = zip(*batch, strict=True)
                stacked = torch.from_numpy(np.stack(pictures))
                yield _Batch(places, known, stacked.pin_memory() if self._on_cuda else stacked)

    def _ahead(self, call: _Call) -> Iterator[tuple[int, Future[tuple[Outcome, Picture]]]]:
        """The index and decoding of every sample, grouped by size, started ahead within limits of number and bytes."""
        sizes: dict[tuple[int, int], list[int]] = {}
        for place, head in enumerate(call.heads):
            if head.size:
                sizes.setdefault(head.size, []).append(place)
        waiting = deque(chain.from_iterable(sizes.values()))
        begun: deque[tuple[int, Future[tuple[Outcome, Picture]]]] = deque()
        number, taken = max(_AHEAD * self.manifest.compute.batch_size, 2 * self._threads), 0
        try:
            while waiting or begun:
                while waiting and len(begun) < number:
                    if begun and taken + call.heads[waiting[0]].bytes > _AHEAD_BYTES:
                        break
                    place = waiting.popleft()
                    sample, head = call.samples[place], call.heads[place]
                    begun.append((place, self._decoders.submit(self._decode, sample, head.outcome)))
                    taken += head.bytes
                place, future = begun.popleft()
                yield place, future
                taken -= call.heads[place].bytes
        finally:
            for _, future in begun:
                future.cancel()

    def _decode(self, sample: Sample, known: Outcome) -> tuple[Outcome, Picture]:
        picture, (width, height) = pixels.source_picture(sample.image, self.manifest.image)
        return replace(known, original_width=width, original_height=height), picture

    # -------------------------------------------------------------------------------------------------- on the device

    @property
    def _on_cuda(self) -> bool:
        return self.engine.device.type == "cuda"

    def _rendered(self, batches: Iterator[_Batch], call: _Call) -> Iterator[_Launched]:
        """The batches in order; on CUDA each is yielded after the next one is queued, to keep the device busy."""
        before: _Launched | None = None
        for batch in batches:
            height, width = batch.pixels.shape[1:3]
            launch = partial(self._launch, batch, call)
            for chosen, launched, _ in self._fitting.each(len(batch.places), height * width, len(batch.places), launch):
                if launched is None:
                    message = f"{width}x{height} does not fit the device's memory; {self.engine.oom_hint}"
                    known = batch.outcomes[chosen.start]
                    call.outcomes[batch.places[chosen.start]] = _failed(known, SampleError("oom", message))
                elif self._on_cuda:
                    if before is not None:
                        yield before
                    before = launched
                else:
                    yield launched
        if before is not None:
            yield before

    def _launch(self, batch: _Batch, call: _Call, chosen: slice) -> _Launched:
        """Queue a part of a batch on the device without waiting for it, unless the engine does."""
        device, places, outcomes = self.engine.device, batch.places[chosen], batch.outcomes[chosen]
        began, done = _Moment(device), call.done
        source = batch.pixels[chosen].to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 255
        rendered = self.engine.render(
            source,
            [outcome.caption or "" for outcome in outcomes],
            [outcome.seed or 0 for outcome in outcomes],
            lambda step: call.progress(done, len(places), step),
        )
        quantized = (rendered.images.nan_to_num() * 255).round().to(torch.uint8)
        measured = {name: metric(source, quantized / 255) for name, metric in self.metrics.items()}
        pictures = quantized.permute(0, 2, 3, 1).contiguous()
        pictures, steps, finite, *values = (
            tensor.to("cpu", non_blocking=True)  # on CUDA to pinned memory
            for tensor in (pictures, rendered.steps, rendered.finite, *measured.values())
        )
        metrics = dict(zip(measured, values, strict=True))
        return _Launched(places, outcomes, began, _Moment(device), pictures, steps, finite, metrics)

    # ----------------------------------------------------------------------------------------------- after the device

    def _finished(self, launched: _Launched) -> list[Future[Outcome]]:
        """Wait for a batch, add up busy and idle time, and start encoding its outcomes."""
        launched.ended.wait()
        seconds = launched.ended.since(launched.began)
        self._busy_s += seconds
        if self._last is not None:
            self._idle_s = (self._idle_s or 0.0) + launched.began.since(self._last)
        self._last = launched.ended
        each = seconds / len(launched.places)
        return [self._encoders.submit(self._encode, launched, index, each) for index in range(len(launched.places))]

    def _encode(self, launched: _Launched, index: int, seconds: float) -> Outcome:
        output = self.manifest.output
        number = len(launched.places)
        known = replace(launched.outcomes[index], steps=int(launched.steps[index]), batch_size=number)
        picture = launched.pictures[index].numpy()
        try:
            if not launched.finite[index]:
                raise SampleError("diverged", self.engine.diverged_hint)
            data = pixels.encode(picture, output.format, output.quality)
        except SampleError as error:
            return _failed(known, error)
        return replace(
            known,
            width=picture.shape[1],
            height=picture.shape[0],
            seconds=seconds,
            image=data,
            image_field=output.format,
            error_code=None,
            metrics={name: float(values[index]) for name, values in launched.metrics.items()},
        )


def _one_ahead(items: Generator[Item, None, None]) -> Generator[Item, None, None]:
    """The same items; a thread makes each one while the consumer uses the one before."""
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="smsbatch-stack") as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _failed(known: Outcome, error: SampleError) -> Outcome:
    return replace(known, error_code=error.code, error_message=str(error))
