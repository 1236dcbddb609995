"""The training stream: the same for any number of workers, first step and storage, also if samples fail."""

from __future__ import annotations

import csv
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from PIL import Image
from support.jobs import make_photos
from support.s3server import Server

from smsbatch.data.index import SAMPLES, StoredFile
from smsbatch.data.indexing import build_index
from smsbatch.data.sample import Entry, Sample
from smsbatch.data.sources import load_sample, parts, scan
from smsbatch.errors import RunError, SampleError, StorageError
from smsbatch.manifest import Distill, Manifest
from smsbatch.storage.store import Store
from smsbatch.training import loader as module
from smsbatch.training.loader import Batch, SampleOrder, TrainingLoader, position_seed

KEYS = [f"photo-{number:02d}" for number in range(11)]


def distill(source: dict[str, Any], **sections: dict[str, Any]) -> Distill:
    """A manifest of twelve steps of four squares of 32 pixels."""
    manifest = Manifest.model_validate(
        {
            "task": "distill",
            "name": "test",
            "seed": 5,
            "source": source,
            "model": "tiny",
            "style": {"prompt": "wavy"},
            "image": {"resolution": 32, "zoom": 1.5} | sections.pop("image", {}),
            "distill": {"warmup_steps": 2, "steps": 10, "images_per_step": 4} | sections.pop("distill", {}),
            "output": {"path": "out"},
            **sections,
        }
    )
    assert isinstance(manifest, Distill)
    return manifest


def planned(manifest: Distill, root: Path) -> tuple[Store, int]:
    """A store with the source's index, and the number of samples in it."""
    store, index = Store(root / "out"), root / "samples.parquet"
    scans = [scan(part, manifest.source, manifest.storage) for part in parts(manifest.source, manifest.storage)]
    samples = build_index(index, [scanned.table for scanned in scans]).samples
    store.create(SAMPLES, index)
    return store, samples


@pytest.fixture(params=["folder", "webdataset", "table"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    return source_of(request.param, make_photos(tmp_path / "photos", KEYS))


def source_of(format: str, photos: Path) -> dict[str, Any]:
    if format == "folder":
        return {"format": format, "urls": str(photos)}
    if format == "webdataset":
        for number in range(2):
            with tarfile.open(photos.parent / f"{number}.tar", "w") as tar:
                for file in sorted(photos.iterdir()):
                    if KEYS.index(file.stem) % 2 == number:
                        tar.add(file, file.name)
        return {"format": format, "urls": str(photos.parent / "{0..1}.tar")}
    with (photos.parent / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("url", "text"), *((photos / f"{key}.png", f"caption of {key}") for key in KEYS)])
    return {"format": format, "urls": str(photos.parent / "table.csv"), "columns": {"caption": "text"}}


def batches(
    manifest: Distill, store: Store, samples: int, rank: int = 0, workers: int = 1, first: int = 0
) -> list[Batch]:
    with TrainingLoader(manifest, StoredFile(store, SAMPLES), samples, rank, workers, first) as feed:
        return list(feed)


def contents(found: Sequence[Batch]) -> list[tuple[Any, ...]]:
    """Everything in the batches, as tuples that can be compared."""
    return [(b.step, b.images.tobytes(), b.images.shape, b.captions, b.keys, b.rows, b.seeds, b.failed) for b in found]


def union(shares: Sequence[Sequence[Batch]]) -> list[Batch]:
    """The batches of all workers, joined step by step in order of rank."""
    return [
        Batch(
            step[0].step,
            np.concatenate([batch.images for batch in step]),
            *([value for batch in step for value in getattr(batch, name)] for name in ("captions", "keys", "rows")),
            [seed for batch in step for seed in batch.seeds],
            [failure for batch in step for failure in batch.failed],
        )
        for step in zip(*shares, strict=True)
    ]


# --- the order ---


@pytest.fixture
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of three rows, shuffle blocks of two groups."""
    monkeypatch.setattr(module, "GROUP_ROWS", 3)
    monkeypatch.setattr(module, "SHUFFLE_ROWS", 6)


@settings(max_examples=100, deadline=None)
@given(
    samples=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), start=st.integers(0, 200), length=st.integers(0, 130)
)
@example(samples=1, seed=0, start=3, length=4)
@example(samples=6, seed=0, start=5, length=2)
def test_every_epoch_has_every_row_once_and_any_position_can_be_asked(
    samples: int, seed: int, start: int, length: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP_ROWS", 3)
        patch.setattr(module, "SHUFFLE_ROWS", 6)
        everything = SampleOrder(samples, seed).rows(0, 7 * max(samples, 60))
        for epoch in range(7):
            assert sorted(everything[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
        assert SampleOrder(samples, seed).rows(start, start + length) == everything[start : start + length]


def test_epochs_and_seeds_differ_and_versions_do_not() -> None:
    order = SampleOrder(9, 3)
    first, second = order.rows(0, 9), order.rows(9, 18)
    assert first != second
    assert SampleOrder(9, 4).rows(0, 9) != first
    # Stored constants: a training must resume under another release of numpy and on another machine.
    assert (first, second) == FIRST_EPOCHS
    assert position_seed(3, 17) == SEED


FIRST_EPOCHS = ([0, 2, 7, 3, 4, 5, 8, 6, 1], [3, 0, 1, 6, 7, 8, 2, 5, 4])
SEED = 8691311320777202560


def test_ten_million_samples_are_shuffled_in_little_memory_from_anywhere() -> None:
    samples, position = 10_000_003, 72_345_678
    rows = SampleOrder(samples, 1).rows(position, position + 1000)
    order = SampleOrder(samples, 1)
    shuffle_block = order.shuffle_block(position)
    assert len(shuffle_block.rows) <= module.SHUFFLE_ROWS
    assert set(shuffle_block.rows // module.GROUP_ROWS) == set(shuffle_block.groups)
    assert len(shuffle_block.groups) <= module.SHUFFLE_ROWS // module.GROUP_ROWS
    assert rows == order.rows(position - 100_000, position + 1000)[-1000:]
    # Samples of one tar are spread: for few of the 1000 rows, the next row of the source is among them too.
    assert len(set(rows)) == 1000
    assert sum(row + 1 in rows for row in rows) < 100
    assert min(Counter(row // module.GROUP_ROWS for row in rows).values()) > 50


def test_seeds_are_of_63_bits_and_all_different() -> None:
    seeds = [position_seed(run, position) for run in range(10) for position in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert 0 <= min(seeds) < 2**58
    assert 2**62 < max(seeds) < 2**63


# --- the same for all workers, first steps and stores ---


def test_workers_share_a_step_and_together_have_what_one_alone_would(source: dict[str, Any], tmp_path: Path) -> None:
    manifest = distill(source)
    store, samples = planned(manifest, tmp_path)
    alone = batches(manifest, store, samples)
    assert [batch.step for batch in alone] == list(range(12))
    for workers in (2, 4):
        shares = [batches(manifest, store, samples, rank, workers) for rank in range(workers)]
        assert contents(union(shares)) == contents(alone)
    order = SampleOrder(samples, manifest.seed)
    for batch in alone:
        assert (batch.images.shape, batch.images.dtype) == ((4, 32, 32, 3), np.uint8)
        assert batch.rows == order.rows(4 * batch.step, 4 * batch.step + 4)
        assert batch.seeds == [position_seed(manifest.seed, 4 * batch.step + i) for i in range(4)]
        assert batch.failed == []
    captions = {key: caption for batch in alone for key, caption in zip(batch.keys, batch.captions, strict=True)}
    if source["format"] == "table":
        assert set(captions.values()) == {f"caption of {key}" for key in KEYS}
    else:
        assert captions == {key: "" if number % 2 else f"waves number {number}" for number, key in enumerate(KEYS)}


@pytest.mark.usefixtures("small_pools")
def test_a_training_that_resumes_at_any_step_goes_on_alike(tmp_path: Path) -> None:
    manifest = distill(source_of("folder", make_photos(tmp_path / "photos", KEYS)))
    store, samples = planned(manifest, tmp_path)
    uninterrupted = contents(batches(manifest, store, samples))
    for first in (1, 2, 5, 11, 12):
        assert contents(batches(manifest, store, samples, first=first)) == uninterrupted[first:]
    later = contents(batches(manifest, store, samples, rank=1, workers=2, first=7))
    assert later == contents(batches(manifest, store, samples, rank=1, workers=2))[7:]


def test_a_bucket_gives_what_the_disk_does(tmp_path: Path, s3: Server) -> None:
    photos = make_photos(tmp_path / "photos", KEYS)
    on_disk = distill(source_of("webdataset", photos))
    expected = contents(batches(on_disk, *planned(on_disk, tmp_path)))
    url = f"s3://{s3.bucket()}"
    s3.upload(tmp_path, url)
    manifest = distill(
        {"format": "webdataset", "urls": f"{url}/{{0..1}}.tar"}, storage=s3.storage.model_dump(mode="json")
    )
    store = Store(f"{url}/out", s3.storage)  # the uploaded index names the tars on disk
    store.delete("plan/samples.parquet")
    index = tmp_path / "index"
    samples = build_index(
        index, (scan(p, manifest.source, s3.storage).table for p in parts(manifest.source, s3.storage))
    )
    store.create(SAMPLES, index)
    assert contents(batches(manifest, store, samples.samples)) == expected


def test_each_worker_reads_its_own_samples_and_the_index_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = distill(source_of("folder", make_photos(tmp_path / "photos", KEYS)))
    store, samples = planned(manifest, tmp_path)
    loaded, tables = Counter[str](), []

    def load(entry: Entry, *rest: Any) -> Sample:
        loaded[entry.key] += 1
        return load_sample(entry, *rest)

    def read_index_table(*where: Any) -> Any:
        tables.append(where[1:])
        return original(*where)

    original = module.read_index_table
    monkeypatch.setattr(module, "load_sample", load)
    monkeypatch.setattr(module, "read_index_table", read_index_table)
    own = batches(manifest, store, samples, rank=1, workers=4)
    assert loaded == Counter(key for batch in own for key in batch.keys)
    assert loaded.total() == 12
    assert tables == [(0, module.GROUP_ROWS)]


# --- squares ---


def test_squares_are_drawn_anew_at_every_position(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.arange(96), np.arange(64))
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.stack([x * 2, y * 3, np.zeros_like(x)], -1).astype(np.uint8)).save(tmp_path / "photos" / "a.png")
    source = {"format": "folder", "urls": str(tmp_path / "photos")}

    def squares(**image: Any) -> Any:
        manifest = distill(source, image=image, distill={"steps": 40})
        found = batches(manifest, *planned(manifest, tmp_path))
        return np.concatenate([batch.images for batch in found]).astype(int)

    plain = squares(zoom=1, flip=False)
    assert np.ptp(plain[:, :, :, 1].mean((1, 2))) < 1  # always the full height
    lefts = plain[:, :, 0, 0].mean(1) / 2  # left edges of the squares: 0 to 96 - 64
    assert lefts.min() < 2
    assert lefts.max() > 30
    assert (np.diff(plain[:, 16, :, 0], axis=1) >= 0).all()
    mirrored = np.diff(squares(zoom=1)[:, 16, :, 0], axis=1).mean(1) < 0
    assert 50 < mirrored.sum() < 118  # of 168; random, fixed by the seed
    heights = np.ptp(squares(zoom=2, flip=False)[:, :, 16, 1], axis=1) / 3  # of the source's 64 rows
    assert heights.min() < 36
    assert heights.max() > 58


# --- samples that fail ---


def spoiled(folder: Path, spoil: Sequence[int]) -> Path:
    make_photos(folder, KEYS)
    for number in spoil:
        (folder / f"{KEYS[number]}.png").write_bytes(b"no picture")
    return folder


@pytest.mark.usefixtures("small_pools")
def test_others_stand_for_samples_that_fail_whoever_reads_them(tmp_path: Path) -> None:
    manifest = distill({"format": "folder", "urls": str(spoiled(tmp_path / "photos", [1, 4, 5]))})
    store, samples = planned(manifest, tmp_path)
    alone = batches(manifest, store, samples)
    bad = {KEYS[number] for number in (1, 4, 5)}
    whole = SampleOrder(samples, manifest.seed)
    for batch in alone:
        rows = whole.rows(4 * batch.step, 4 * batch.step + 4)
        for row, asked, key in zip(batch.rows, rows, batch.keys, strict=True):
            assert KEYS[row] == key
            assert key not in bad
            assert (row == asked) == (KEYS[asked] not in bad)
        failed = Counter(key for key, _, _ in batch.failed)
        assert failed >= Counter(KEYS[row] for row in rows if KEYS[row] in bad)
        assert set(failed) <= bad
        assert {failure[1:] for failure in batch.failed} <= {("decode_error", "not a picture in a known format")}
    assert sum(len(batch.failed) for batch in alone) > 8
    shares = [batches(manifest, store, samples, rank, 2) for rank in range(2)]
    assert contents(union(shares)) == contents(alone)
    assert contents(batches(manifest, store, samples, first=6)) == contents(alone)[6:]


def test_a_source_of_nothing_but_failures_ends_the_run(tmp_path: Path) -> None:
    manifest = distill({"format": "folder", "urls": str(spoiled(tmp_path / "photos", range(11)))})
    store, samples = planned(manifest, tmp_path)
    message = r"^16 samples in a row failed, the last was photo-\d\d \(decode_error: not a picture in a known format\)"
    with pytest.raises(RunError, match=message):
        batches(manifest, store, samples)


def test_an_index_that_is_gone_is_an_error_of_storage(tmp_path: Path) -> None:
    manifest = distill({"format": "folder", "urls": "tiny:photos"})
    with pytest.raises(StorageError, match=r"cannot read .*samples\.parquet"):
        batches(manifest, Store(tmp_path / "out"), 13)


def test_a_step_is_divided_evenly_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 images of a step cannot be divided among 3 workers"):
        TrainingLoader(distill({"format": "folder", "urls": "tiny:photos"}), tmp_path / "samples.parquet", 13, 0, 3)


# --- threads ---


def test_reading_is_ahead_by_a_few_pictures_and_ends_when_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = distill(source_of("folder", make_photos(tmp_path / "photos", KEYS)), distill={"steps": 500})
    store, samples = planned(manifest, tmp_path)
    loaded, begun = threading.Semaphore(0), threading.Semaphore(0)
    hang, go_on = threading.Event(), threading.Event()
    count = Counter[str]()

    def load(entry: Entry, *rest: Any) -> Sample:
        count["begun"] += 1
        if hang.is_set():
            begun.release()
            assert go_on.wait(20)
            raise SampleError("timeout", "at last")
        sample = load_sample(entry, *rest)
        loaded.release()
        return sample

    monkeypatch.setattr(module, "load_sample", load)
    with TrainingLoader(manifest, StoredFile(store, SAMPLES), samples) as feed:
        stream: Iterator[Batch] = iter(feed)
        assert len(list(islice(stream, 10))) == 10
        for _ in range(10 * 4 + module.AHEAD):
            assert loaded.acquire(timeout=20)
        assert not loaded.acquire(timeout=0.2), "it reads further ahead than it should"
        hang.set()
        next(stream)  # had already been read
        for _ in range(4):
            assert begun.acquire(timeout=20)
    assert not go_on.is_set()  # the loader was left while a thread hung
    go_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("smsbatch-loader"):
            thread.join(20)
            assert not thread.is_alive()
    assert count["begun"] == 11 * 4 + module.AHEAD  # no substitutes were loaded


def test_no_torch_is_needed() -> None:
    code = "import sys, smsbatch.training.loader, smsbatch.runs.checkpoints, smsbatch.training.log"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr
