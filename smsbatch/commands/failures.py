"""Why samples failed: the rows of the failed ones, of a run that is finished or not."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from typing import Any

from smsbatch.data.shards import read_rows
from smsbatch.manifest import Manifest
from smsbatch.runs.records import attempt_file
from smsbatch.runs.snapshot import Snapshot


def failures(
    where: str | Manifest | Snapshot, code: str | None = None, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of failed samples, in plan order; those of one shard in memory at a time.

    Args:
        where: a manifest, an output path or URL, or a run that was looked at.
        code: only with this error code.
        limit: at most so many.

    Raises:
        RequestError: no run stands there, or one that makes no dataset.
        StorageError: rows cannot be read.
    """
    look = where if isinstance(where, Snapshot) else Snapshot(where)
    look.run.require_dataset()
    return islice(_failures(look, code), limit)


def _failures(look: Snapshot, code: str | None) -> Iterator[dict[str, Any]]:
    for shard, units in look.shards.items():
        record = look.records.get(shard)
        counted = [record] if record else [look.commits[unit.id] for unit in units if unit.id in look.commits]
        if any(one.failed and code in (None, *one.errors) for one in counted):
            for row in _rows(look, shard):
                if row["status"] == "failed" and code in (None, row["error_code"]):
                    yield row


def _rows(look: Snapshot, shard: int) -> Iterator[dict[str, Any]]:
    """The rows of a shard's Parquet, or those of its units with failures while there is none of the newest commits."""
    record = look.records.get(shard)
    data = look.store.read_all([record.parquet]).get(record.parquet) if record else None
    if record and data is not None and len(data) == record.files["parquet"].bytes:
        yield from read_rows(BytesIO(data))
        return
    for commit in look.commits_of(shard):
        if commit.failed:
            yield from read_rows(BytesIO(look.store.read(attempt_file(commit.unit, commit.attempt, "parquet"))))
