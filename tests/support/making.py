"""Inputs of the data tests: tars with any headers, pictures, indexed sources and outcomes."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from smsbatch.data import pixels, reader as objects
from smsbatch.data.captions import Contents
from smsbatch.data.index import read_index
from smsbatch.data.indexing import build_index
from smsbatch.data.reader import Reader, Stat
from smsbatch.data.sample import Entry, Outcome, Sample, Unit
from smsbatch.data.sources import Scan, gathered, load_sample, nothing_found, parts, scan
from smsbatch.manifest import Source, Storage
from smsbatch.storage.resolve import resolve
from smsbatch.storage.store import Store

STORAGE = Storage(timeout_s=1, retries=0)


def source_of(format: str, *urls: object, **options: Any) -> Source:
    return Source.model_validate({"format": format, "urls": [str(url) for url in urls], **options})


def looked_at(source: Source, storage: Storage = STORAGE, seed: int = 0) -> tuple[list[Entry], list[str], Contents]:
    """The entries that a run would plan for a source, read back from an index file, the notices, and what it holds."""
    listed, told = parts(source, storage), Scan()
    scanned = (scan(part, source, storage, seed) for part in listed)
    names = [part.url for part in listed] if source.format == "table" else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "samples.parquet")
        built = build_index(path, gathered(scanned, told), source.limit, source.skip, names)
        contents = Contents(built.samples, built.captions, dict(told.left), dict(told.passed))
        if not built.samples:
            raise nothing_found(source, told.notices, contents)
        return read_index(path), told.notices, contents


def indexed(source: Source, storage: Storage = STORAGE) -> tuple[list[Entry], list[str]]:
    """The entries that a run would plan for a source, and the notices."""
    entries, notices, _ = looked_at(source, storage)
    return entries, notices


def loaded(entry: Entry, source: Source, storage: Storage = STORAGE) -> Sample:
    return load_sample(entry, source, Reader.of(source, storage))


def expand(pattern: str, storage: Storage) -> list[str]:
    """The URLs that match a pattern, without their `Stat`."""
    return [url for url, _ in objects.expand(pattern, storage)]


def stat(url: str, storage: Storage) -> Stat | None:
    """The `Stat` of the object with exactly that URL; None if there is none."""
    return dict(objects.expand(url, storage)).get(url)


def make_tar(
    path: Path, members: Iterable[tuple[str | tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def make_files(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def pattern(height: int = 40, width: int = 60) -> pixels.Pixels:
    """A picture with quadrants in four colours: red, green / blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 255, 0, 0
    picture[: height // 2, width // 2 :] = 0, 255, 0
    picture[height // 2 :, : width // 2] = 0, 0, 255
    picture[height // 2 :, width // 2 :] = 255, 255, 255
    return picture


def outcome(number: int, salt: str = "", failed: bool = False) -> Outcome:
    key = f"key-{number:04d}"
    if failed:
        return Outcome(key, "src.tar", error_code="decode_error", error_message="damaged", seed=number)
    return Outcome(
        key, "src.tar", f"image {key} {salt}".encode(), "webp", caption=f"caption {number}", metrics={"lpips": 0.5}
    )


def outcomes_of(unit: Unit, salt: str = "") -> list[Outcome]:
    """Outcomes of a unit's rows; every fifth fails."""
    return [outcome(number, salt, failed=number % 5 == 3) for number in range(unit.start, unit.stop)]


def leftovers(store: Store) -> list[str]:
    """Temporary files that a finished operation should not have left."""
    return [path for path in store.list() if "/tmp/" in path]


def read_range(store: Store, path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of an object, read through its backend."""
    backend, full = resolve(store.locate(path), store.storage)
    return backend.get(full, start, stop).data
