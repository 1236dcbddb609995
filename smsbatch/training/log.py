"""The log of a training: figures as JSON lines and for TensorBoard, and pictures of the generator's results.

    _smsbatch/training/log-<first step>-<id>.jsonl    one file per attempt, stored whole each time it grows
    _smsbatch/training/progress.json                  the current state, for observers
    training.jsonl                                    all attempts as one, when the training has ended
    tensorboard/                                      event files; each holds the new events and never changes
    grids/<step>.jpg                                  sources above results

An attempt goes on from a checkpoint, so it repeats steps that the previous one had logged: the later attempt's figures
count, here and in TensorBoard. A thread stores the files; if it fails, the next call raises its StorageError.
"""

from __future__ import annotations

import io
import json
import time
from collections import deque
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from math import isfinite
from typing import Any, Self

import numpy as np

from smsbatch.data.pixels import Pixels, encode
from smsbatch.errors import StorageError
from smsbatch.manifest import Distill
from smsbatch.runs.records import PARSE_ERRORS, new_attempt
from smsbatch.storage.store import Store

TRAINING = "training.jsonl"
GRIDS = "grids"
TENSORBOARD = "tensorboard"
EVENTS = f"{TENSORBOARD}/events.out.tfevents."
FOLDER = "_smsbatch/training"
ATTEMPTS = f"{FOLDER}/log-"
PROGRESS = f"{FOLDER}/progress.json"

PROGRESS_S = 1.0
# There are many event files, because an open TensorBoard does not see that a file was replaced: a new one is due after
# this much of the attempt's time, which makes some hundreds of them in days.
EVENTS_S = 10.0
EVENTS_FRACTION = 0.02
WINDOW_S = 60.0  # over which the rate is taken


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a training.

    Attributes:
        step: finished steps, of `steps`; both include the warm-up.
        losses: the last logged ones; None for one that is not finite.
        failed: how often a sample failed and another one took its place.
        time: of this state, seconds since 1970.
    """

    step: int
    steps: int
    phase: str
    steps_per_second: float | None = None
    images_per_second: float | None = None
    losses: Mapping[str, float | None] = field(default_factory=dict)
    failed: int = 0
    time: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TrainingLog:
    """The log of the attempt that goes on after `first_step` finished steps; a context manager that calls `close`."""

    def __init__(self, store: Store, manifest: Distill, first_step: int = 0, failed: int = 0) -> None:
        self._store, self._training = store, manifest.distill
        self._path = f"{ATTEMPTS}{first_step:08d}-{new_attempt()}.jsonl"
        self._attempt = sum(path.startswith(ATTEMPTS) for path in store.list(FOLDER))
        self._lines: list[bytes] = []
        self._events = _Events(store, first_step)
        self._begun = self._told = time.monotonic()
        self._seen: deque[tuple[float, int]] = deque([(self._begun, first_step)])
        steps, phase = self._training.all_steps, self._training.phase(first_step)
        self._now = TrainingProgress(first_step, steps, phase, failed=failed, time=time.time())
        self._waiting: dict[str, bytes] = {}  # to be stored: the last content of each path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="smsbatch-log")
        self._storing: Future[None] | None = None
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        with suppress(StorageError):  # it must not hide the first error
            self.close()

    def step(self, step: int, failed: int = 0) -> TrainingProgress:
        """Log a finished step and the number of samples that failed in it; returns the state of the training."""
        now = time.monotonic()
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
            self._seen.popleft()
        began, first = self._seen[0]
        rate = (step - first) / (now - began) if step > first and now > began else None
        self._now = replace(
            self._now,
            step=step,
            phase=self._training.phase(step),
            steps_per_second=rate,
            images_per_second=None if rate is None else rate * self._training.images_per_step,
            failed=self._now.failed + failed,
            time=time.time(),
        )
        if now - self._told >= PROGRESS_S or step == self._now.steps:
            self._told = now
            self._waiting[PROGRESS] = _json(self._now.to_dict())
        self._store_waiting()
        return self._now

    def scalars(self, step: int, values: Mapping[str, float], losses: Collection[str] | None = None) -> None:
        """Log figures of a step, after `step(step)`; those named in `losses`, default all, are shown as progress."""
        # JSON has no NaN and no infinity.
        figures = {name: float(value) if isfinite(value) else None for name, value in values.items()}
        self._now = replace(self._now, losses={k: v for k, v in figures.items() if losses is None or k in losses})
        rates = {
            "steps_per_second": self._now.steps_per_second,
            "images_per_second": self._now.images_per_second,
            "failed": self._now.failed,
        }
        known = {"step": step, "phase": self._training.phase(step), "attempt": self._attempt, "time": time.time()}
        known["seconds"] = time.monotonic() - self._begun
        self._lines.append(_json(known | rates | figures))
        self._waiting[self._path] = b"".join(self._lines)
        self._events.scalars(step, {name: value for name, value in (rates | figures).items() if value is not None})
        self._store_waiting()

    def grid(self, step: int, sources: Pixels, results: Pixels) -> None:
        """Store `sources` and `results` [n, H, W, 3] uint8 as one picture, the results below."""
        rows = [np.concatenate(list(pictures), axis=1) for pictures in (sources, results)]
        grid = np.concatenate(rows)
        data = encode(grid, "jpg", 90)
        self._waiting[f"{GRIDS}/{step:08d}.jpg"] = data
        self._events.picture(step, "grid", data, grid.shape[0], grid.shape[1])
        self._store_waiting()

    def flush(self) -> None:
        """Store everything pending now: a checkpoint must not be ahead of its log.

        Raises:
            StorageError: something could not be stored.
        """
        if self._storing is not None:
            self._storing.result()
        self._store_waiting()
        if self._storing is not None:
            self._storing.result()

    def close(self, finished: bool = False) -> None:
        """Store everything pending, and `training.jsonl` if the training has finished.

        Raises:
            StorageError: something could not be stored.
        """
        if self._closed:
            return
        self._closed = True
        with self._thread:
            self._waiting[PROGRESS] = _json(self._now.to_dict())
            self._store_waiting(closing=True)
            if self._storing is not None:
                self._storing.result()
        if finished:
            self._store.put(TRAINING, b"".join(map(_json, read_log(self._store))))

    def _store_waiting(self, closing: bool = False) -> None:
        """Pass everything pending to the thread; if it is busy, the next call does."""
        if self._storing is not None:
            if not closing and not self._storing.done():
                return
            self._storing.result()
        self._waiting |= self._events.due(closing)
        if self._waiting:
            waiting, self._waiting = self._waiting, {}
            self._storing = self._thread.submit(self._put, waiting)

    def _put(self, contents: Mapping[str, bytes]) -> None:
        for path, content in contents.items():
            self._store.put(path, content)


class _Events:
    """TensorBoard's event files of one attempt, made in memory."""

    def __init__(self, store: Store, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # half a second, needed for writing only
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        # TensorBoard reads in the order of names: ours follow earlier attempts' even if our clock is behind theirs.
        numbers = (path.removeprefix(EVENTS).partition(".")[0] for path in store.list(TENSORBOARD))
        self._name = f"{EVENTS}{max([int(time.time()), *(1 + int(n) for n in numbers if n.isdigit())]):010d}"
        self._number = 0
        self._begun = self._stored = time.monotonic()
        self._begin()
        # TensorBoard forgets what earlier attempts logged from this step on.
        self._add(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        found = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step=step, summary=self._summary(value=found))

    def picture(self, step: int, name: str, data: bytes, height: int, width: int) -> None:
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._add(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def due(self, closing: bool) -> dict[str, bytes]:
        """The next file by its path, if it is time for one and there are new events."""
        now = time.monotonic()
        pause = max(EVENTS_S, EVENTS_FRACTION * (now - self._begun))
        if self._empty or (now - self._stored < pause and not closing):
            return {}
        found = {f"{self._name}.{self._number:06d}": self._file.getvalue()}
        self._stored, self._number = now, self._number + 1
        self._begin()
        return found

    def _begin(self) -> None:
        self._file = io.BytesIO()
        self._add(file_version="brain.Event:2")
        self._empty = True

    def _add(self, **content: Any) -> None:
        self._writer(self._file).write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._empty = False


def read_log(store: Store) -> list[dict[str, Any]]:
    """The lines of all attempts by step; a later attempt's replace earlier ones from its first step on.

    Raises:
        StorageError: a file is not a log.
    """
    attempts = []
    for path, data in store.read_all(path for path in store.list(FOLDER) if path.startswith(ATTEMPTS)).items():
        try:
            lines = [json.loads(line) for line in data.splitlines()]
            attempts.append((lines[0]["attempt"], lines[0]["time"], int(path.removeprefix(ATTEMPTS)[:8]), lines))
        except (*PARSE_ERRORS, IndexError) as error:
            raise StorageError(f"{store.locate(path)} is not a training's log; delete it") from error
    merged: list[dict[str, Any]] = []
    for _, _, first_step, lines in sorted(attempts, key=lambda attempt: attempt[:2]):
        merged = [line for line in merged if line["step"] <= first_step] + lines
    return merged


def read_progress(store: Store) -> TrainingProgress | None:
    """The last stored state of a training; None before the first."""
    data = store.read_all([PROGRESS]).get(PROGRESS)
    if data is None:
        return None
    try:
        return TrainingProgress(**json.loads(data))
    except PARSE_ERRORS as error:
        raise StorageError(f"{store.locate(PROGRESS)} is not a training's progress; delete it") from error


def _json(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"
