"""`replay`: stylize one sample of a run again in this process, to study a failure or to check reproducibility.

Manifest, plan and sample are those of the run; the caller may only change where and how to compute. The run itself is
not changed.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from smsbatch.data import colours, pixels
from smsbatch.data.index import find_key, index_size, read_index
from smsbatch.data.reader import Reader
from smsbatch.data.sample import Outcome, Unit
from smsbatch.data.shards import read_rows
from smsbatch.data.sources import load_sample
from smsbatch.data.tars import find_members
from smsbatch.engines.table import ENGINES
from smsbatch.errors import RequestError, SampleError
from smsbatch.manifest import Dataset, Manifest
from smsbatch.runs.drift import check_environment
from smsbatch.runs.records import attempt_file
from smsbatch.runs.run import Run
from smsbatch.storage.store import storage_errors
from smsbatch.text import hidden
from smsbatch.workers.worker import failed

_COMPARED = 100_000  # the largest plan that is searched for similar keys


@dataclass(frozen=True)
class Replayed:
    """The new result of a sample, compared with its result in the run.

    Attributes:
        row: its new row, without the columns that the ledger adds.
        path: where the picture is written; None if the sample failed.
        before: its row in the run; None if its unit is not committed.
        same: True if the pictures are equal byte for byte; None if there are no two pictures to compare.
        largest, mean: largest and mean difference of the pixels, of 255.
        changed: changes since the run that may explain a difference.
    """

    key: str
    row: Mapping[str, Any]
    path: Path | None
    before: Mapping[str, Any] | None
    same: bool | None = None
    largest: int | None = None
    mean: float | None = None
    changed: tuple[str, ...] = ()

    @property
    def succeeded(self) -> bool:
        return self.path is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": None if self.path is None else str(self.path)}


def replay(where: str | Manifest, key: str, target: str | Path | None = None) -> Replayed:
    """Stylize one sample of a run again and write it to a file.

    Args:
        where: the run; of a manifest, only `compute` and `storage` are used.
        target: a file, or an existing folder. Default: `<key>.<format>` in the working directory.

    Raises:
        RequestError: there is no run, it makes no dataset, the key is not in its plan, or another file exists; or the
            environment has other values than the run had, or none.
        StorageError: the run cannot be read, or the file cannot be written.
    """
    run = Run.open(where)
    store, manifest = run.store, run.fill(run.dataset)
    check_environment(run, manifest)
    if not run.is_planned:
        raise RequestError(f"{store.url}: the run here has no plan yet; `smsbatch run` continues it")
    compute = where.compute if isinstance(where, Manifest) else manifest.compute
    manifest = manifest.model_copy(update={"compute": compute, "storage": run.storage})
    row = find_key(run.index, key)
    if row is None:
        raise RequestError(f"{store.url}: {key!r} is not in the plan{_meant(run, key)}")
    path = _target(target, f"{key.replace('/', '__')}.{manifest.output.format}")

    outcome = _again(run, manifest, row)
    unit = next(unit for unit in run.units if unit.start <= row < unit.stop)
    before, picture = _result_of_run(run, unit, key, manifest.output.format)
    stamped = {"unit", "shard", "generation", "attempt", "worker"}
    shown = {name: value for name, value in outcome.row(unit, "", "", manifest.metrics).items() if name not in stamped}
    if outcome.image is None:
        return Replayed(key, shown, None, before)
    _write(path, outcome.image)
    if picture is None:
        return Replayed(key, shown, path, before)
    if picture == outcome.image:
        return Replayed(key, shown, path, before, same=True, largest=0, mean=0.0)
    largest, mean = _difference(picture, outcome.image)
    changed = tuple(_changed(run, manifest, before or {}, shown))
    return Replayed(key, shown, path, before, same=False, largest=largest, mean=mean, changed=changed)


def _again(run: Run, manifest: Dataset, row: int) -> Outcome:
    from smsbatch.workers.stylizer import Stylizer  # loads torch

    (entry,) = read_index(run.index, row, row + 1)
    reader = Reader.of(manifest.source, manifest.storage)
    try:
        sample = load_sample(entry, manifest.source, reader, manifest.seed)
    except SampleError as error:
        return failed(entry, error.code, str(error))
    (outcome,) = Stylizer(manifest).stylize([sample])
    return outcome


def _result_of_run(run: Run, unit: Unit, key: str, extension: str) -> tuple[dict[str, Any] | None, bytes | None]:
    """Row and picture of a sample in the run, from the published shard or else from its unit's attempt."""
    store, ledger = run.store, run.ledger
    commit = ledger.committed(unit.id)
    if commit is None:
        return None, None
    record = ledger.published(unit.shard)
    if record is not None and commit.attempt in record.attempts:
        tar, parquet = record.tar, record.parquet
    else:
        tar, parquet = (attempt_file(unit.id, commit.attempt, kind) for kind in ("tar", "parquet"))
    with storage_errors("read", store.locate(parquet)), store.open_read(parquet) as file:
        row = next((row for row in read_rows(file, store.locate(parquet)) if row["key"] == key), None)
    if row is None or row["status"] != "success":
        return row, None
    name = f"{key}.{extension}"
    with storage_errors("read", store.locate(tar)), store.open_read(tar) as file:
        return row, find_members(file, [name]).get(name)


def _difference(before: bytes, now: bytes) -> tuple[int | None, float | None]:
    """The largest and the mean difference of two pictures' pixels; None if they cannot be compared."""
    try:
        first, second = (pixels.decode(data, min_side=1).astype(np.int16) for data in (before, now))
    except SampleError:
        return None, None
    if first.shape != second.shape:
        return None, None
    difference = np.abs(first - second)
    return int(difference.max()), float(difference.mean())


def _changed(run: Run, manifest: Dataset, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    if before.get("source_sha256") != now["source_sha256"]:
        found.append("the source picture has changed")
    if run.colours != colours.COLOURS:
        found.append(f"colours were read {run.colours} then, {colours.COLOURS} now")
    weights = ENGINES[manifest.task].digests(manifest)
    then_weights = run.about["weights"]
    found += [
        f"the file {name} has changed" for name, digest in weights.items() if then_weights.get(hidden(name)) != digest
    ]
    for name, then in run.about["versions"].items():
        with suppress(PackageNotFoundError):
            now_installed = platform.python_version() if name == "python" else version(name)
            if now_installed != then:
                found.append(f"{name} {then} then, {now_installed} now")
    return found


def _meant(run: Run, key: str) -> str:
    """A hint with keys similar to `key`; searches only a plan of at most _COMPARED keys."""
    if index_size(run.index) > _COMPARED:
        return "; `plan/samples.parquet` has every key"
    keys = [entry.key for entry in read_index(run.index)]
    inside = [known for known in keys if key in known][:3]
    close = inside or difflib.get_close_matches(key, keys, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; its first key is {keys[0]}"


def _target(target: str | Path | None, name: str) -> Path:
    """The path to write; called first, so that an invalid one is refused before anything is computed."""
    path = Path(target) if target is not None else Path()
    path = path / name if path.is_dir() else path
    if "://" in str(target):
        raise RequestError(f"--to {target}: a picture is replayed to this machine; name a file or folder of its disk")
    if not path.parent.is_dir():
        raise RequestError(f"--to {target}: there is no folder {path.parent}; make it first")
    if path.suffix != Path(name).suffix:
        raise RequestError(f"--to {target}: the pictures of this run are {Path(name).suffix[1:]}; use that extension")
    return path


def _write(path: Path, data: bytes) -> None:
    """Write the file, but never over another one: the working directory may hold the source."""
    if path.is_file() and path.read_bytes() == data:
        return
    with storage_errors("write", path):
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError as error:
            raise RequestError(f"{path} exists and is another picture; say where to write by --to FILE") from error
