"""The log of a training: its attempts are merged, in JSON lines and in TensorBoard, on disk and on S3."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.s3server import Server
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from smsbatch.data.pixels import decode
from smsbatch.errors import StorageError
from smsbatch.manifest import Distill, Manifest
from smsbatch.storage.store import Store
from smsbatch.training import log as module
from smsbatch.training.log import TrainingLog, TrainingProgress, read_log, read_progress


@pytest.fixture
def manifest() -> Distill:
    found = Manifest.model_validate(
        {
            "task": "distill",
            "name": "test",
            "source": {"format": "folder", "urls": "tiny:photos"},
            "model": "tiny",
            "style": {"prompt": "wavy"},
            "distill": {"warmup_steps": 10, "steps": 40, "images_per_step": 3},
            "output": {"path": "out"},
        }
    )
    assert isinstance(found, Distill)
    return found


def attempt(store: Store, manifest: Distill, first: int, last: int, value: float, finished: bool = False) -> None:
    """Log an attempt at the steps (first, last], with the figures of every fifth."""
    with TrainingLog(store, manifest, first) as log:
        for step in range(first + 1, last + 1):
            log.step(step)
            if step % 5 == 0:
                log.scalars(step, {"objective": value + step, "learning_rate": 2e-4}, losses=["objective"])
        if finished:
            log.close(finished=True)


def test_what_a_later_attempt_says_of_a_step_counts(tmp_path: Path, manifest: Distill) -> None:
    store = Store(tmp_path)
    assert read_log(store) == []
    assert read_progress(store) is None
    attempt(store, manifest, 0, 33, 1000)
    attempt(store, manifest, 20, 22, 2000)  # ends before its first figures
    attempt(store, manifest, 20, 25, 3000)
    assert [(line["step"], line["objective"]) for line in read_log(store)] == [
        (5, 1005), (10, 1010), (15, 1015), (20, 1020), (25, 3025),
    ]  # fmt: skip
    assert not store.exists("training.jsonl")
    attempt(store, manifest, 20, 50, 4000, finished=True)
    lines = [json.loads(line) for line in store.read("training.jsonl").splitlines()]
    assert lines == read_log(store)
    assert [line["step"] for line in lines] == list(range(5, 51, 5))
    assert [line["objective"] for line in lines[4:]] == [4000 + step for step in range(25, 51, 5)]
    assert [line["phase"] for line in lines] == ["warm-up"] * 2 + ["distillation"] * 8
    assert lines[-1]["attempt"] > lines[0]["attempt"] == 0
    assert lines[-1]["learning_rate"] == 2e-4


def shown(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_tensorboard_shows_all_attempts_as_one(
    request: pytest.FixtureRequest, tmp_path: Path, manifest: Distill, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # hides the expected messages on discarded events
    store, folder = Store(tmp_path / "out"), tmp_path / "out"
    if kind == "s3":
        s3: Server = request.getfixturevalue("s3")
        store = Store(f"s3://{s3.bucket()}/out", s3.storage)
    monkeypatch.setattr(module, "EVENTS_S", 0)
    monkeypatch.setattr(module, "EVENTS_FRACTION", 0)
    pictures, before = np.zeros((2, 16, 24, 3), np.uint8), dict[str, Any]()
    for first, last, value in ((0, 12, 100), (10, 20, 200)):
        with TrainingLog(store, manifest, first) as log:
            for step in range(first + 1, last + 1):
                log.step(step)
                log.scalars(step, {"objective": value + step})
                if step % 5 == 0:
                    log.grid(step, pictures, pictures + 255)
        # A stored file never changes, because an open TensorBoard would not see the change.
        files = {path: (store.read(path), store.modified(path)) for path in store.list("tensorboard")}
        assert len(files) > (1 if first == 0 else 2)
        assert before.items() <= files.items()
        before = files
    if kind == "s3":
        s3.download(store.url, folder)
    found = shown(folder / "tensorboard")
    assert [(event.step, event.value) for event in found.Scalars("objective")] == [
        *((step, 100 + step) for step in range(1, 11)),
        *((step, 200 + step) for step in range(11, 21)),
    ]
    assert [event.step for event in found.Images("grid")] == [5, 10, 15, 20]
    picture = found.Images("grid")[-1]
    assert (picture.width, picture.height) == (48, 32)
    assert picture.encoded_image_string == store.read("grids/00000020.jpg")


def test_event_files_are_read_in_the_order_of_attempts_whatever_the_clock_says(
    tmp_path: Path, manifest: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    for hours in (0, -2, 0):
        with monkeypatch.context() as patch:
            late = SimpleNamespace(monotonic=time.monotonic, time=lambda hours=hours: time.time() + 3600 * hours)
            patch.setattr(module, "time", late)
            before = store.list("tensorboard")
            attempt(store, manifest, 0, 5, hours)
        assert store.list("tensorboard")[: len(before)] == before
    assert len(store.list("tensorboard")) == 3
    assert [line["objective"] for line in read_log(store)] == [5]
    assert [line["attempt"] for line in read_log(store)] == [2]


def test_few_event_files_are_made_however_long_it_takes(
    tmp_path: Path, manifest: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    events = module._Events(Store(tmp_path), 0)
    files: dict[str, bytes] = {}
    for step in range(4000):  # ten days
        clock[0] += 216
        events.scalars(step, {"objective": 1.0})
        files |= events.due(closing=False)
    files |= events.due(closing=True)
    assert events.due(closing=True) == {}
    assert 100 < len(files) < 500
    for name, data in files.items():
        Store(tmp_path).put(name, data)
    assert [event.step for event in shown(tmp_path / "tensorboard").Scalars("objective")] == list(range(4000))


def test_a_grid_has_the_sources_above_the_results(tmp_path: Path, manifest: Distill) -> None:
    store = Store(tmp_path)
    sources = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (0, 80, 160)])
    with TrainingLog(store, manifest) as log:
        log.grid(7, sources, 255 - sources)
    grid = decode(store.read("grids/00000007.jpg")).astype(int)
    assert grid.shape == (32, 48, 3)
    middles = grid[8::16, 8::16, 0]
    assert abs(middles - [[0, 80, 160], [255, 175, 95]]).max() <= 4


def test_progress_has_rate_and_time_left_and_is_stored_now_and_then(
    tmp_path: Path, manifest: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, puts = [100.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    original = Store.put

    def put(store: Store, path: str, content: bytes) -> None:
        puts.append(path)
        original(store, path, content)

    monkeypatch.setattr(Store, "put", put)
    store = Store(tmp_path)
    with TrainingLog(store, manifest, first_step=20, failed=3) as log:
        for step in range(21, 31):
            clock[0] += 0.5
            now = log.step(step, failed=step == 25)
            if step == 30:
                log.scalars(step, {"objective": 4.0, "fake": float("nan"), "rate": 1.0}, losses=("objective", "fake"))
    assert (now.step, now.steps, now.phase, now.failed) == (30, 50, "distillation", 4)
    assert (now.steps_per_second, now.images_per_second) == (2, 6)
    stored = read_progress(store)
    assert stored is not None
    assert stored.losses == {"objective": 4.0, "fake": None}
    assert (stored.step, stored.failed) == (30, 4)
    assert abs(stored.time - time.time()) < 60
    assert puts.count("_smsbatch/training/progress.json") <= 7  # at most one a second in five seconds, and a last one
    (line,) = read_log(store)
    assert (line["fake"], line["steps_per_second"], line["images_per_second"], line["failed"]) == (None, 2, 6, 4)
    assert line["seconds"] == 5
    # The rate follows a machine that slows down, within about a minute.
    with TrainingLog(store, manifest) as log:
        assert log.step(0).steps_per_second is None
        for step, pause in enumerate([0.1] * 30 + [20] * 10, start=1):
            clock[0] += pause
            now = log.step(step)
    assert now.steps_per_second == pytest.approx(1 / 20)


def test_phases(tmp_path: Path, manifest: Distill) -> None:
    without = manifest.model_copy(update={"distill": manifest.distill.model_copy(update={"warmup_steps": 0})})
    with TrainingLog(Store(tmp_path), manifest) as log, TrainingLog(Store(tmp_path), without) as other:
        assert [log.step(step).phase for step in (0, 1, 10, 11)] == ["warm-up"] * 3 + ["distillation"]
        assert [other.step(step).phase for step in (0, 1)] == ["distillation"] * 2


def test_a_store_that_fails_is_said_at_the_next_call(
    tmp_path: Path, manifest: Distill, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def train(error: Exception | None = None) -> None:
        with TrainingLog(Store(tmp_path), manifest) as log:
            log.step(1)
            log.scalars(1, {"objective": 1})
            if error:
                raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot write .*training/.*: No space left on device; free some space"):
            train()
        with pytest.raises(ZeroDivisionError):  # the first error is not hidden by the later one
            train(ZeroDivisionError())
    train()
    assert [line["step"] for line in read_log(Store(tmp_path))] == [1]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]\n", b'{"step": 1}\n'])
def test_files_of_others_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.put("_smsbatch/training/log-00000000-abc.jsonl", content)
    store.put("_smsbatch/training/progress.json", content)
    with pytest.raises(StorageError, match=r"log-00000000-abc\.jsonl is not a training's log; delete it"):
        read_log(store)
    with pytest.raises(StorageError, match=r"progress\.json is not a training's progress; delete it"):
        read_progress(store)


def test_progress_as_plain_data() -> None:
    values: dict[str, Any] = TrainingProgress(5, 10, "warm-up").to_dict()
    assert values["losses"] == {}
    assert json.loads(json.dumps(values)) == values
