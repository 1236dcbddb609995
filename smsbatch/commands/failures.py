"""The rows of failed samples, of a finished or unfinished run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from typing import Any

from smsbatch.data.shards import read_rows
from smsbatch.manifest import Manifest
from smsbatch.runs.records import attempt_file
from smsbatch.runs.snapshot import Snapshot

LOOKED_AT = 1000  # rows

_VARYING = re.compile(r"\S*/\S*|\d+")


def failures(
    where: str | Manifest | Snapshot, code: str | None = None, limit: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of failed samples, in plan order, with the rows of one shard in memory at a time.

    Args:
        where: a manifest, an output path or URL, or a snapshot of a run.
        code: only samples with this error code.
        limit: the largest number of rows.

    Raises:
        RequestError: there is no run, or it makes no dataset.
        StorageError: rows cannot be read.
    """
    snapshot = where if isinstance(where, Snapshot) else Snapshot(where)
    snapshot.run.require_dataset()
    return islice(_failures(snapshot, code), limit)


def common_reason(where: str | Manifest) -> str:
    """The message that most of the first LOOKED_AT failures share, as the first of them has it, with their number.

    Messages are alike if they differ only in numbers and in words with a slash, such as URLs. '' if nothing failed.
    """
    alike: dict[str, list[str]] = {}
    for row in failures(where, limit=LOOKED_AT):
        message = row["error_message"] or ""
        alike.setdefault(f"{row['error_code']} {_VARYING.sub('*', message)}", []).append(message)
    most = max(alike.values(), key=len, default=[])
    return f"the most common reason ({len(most)} of {sum(map(len, alike.values()))}): {most[0]}" if most else ""


def _failures(snapshot: Snapshot, code: str | None) -> Iterator[dict[str, Any]]:
    for shard, units in snapshot.shards.items():
        record = snapshot.records.get(shard)
        counted = [record] if record else [snapshot.commits[unit.id] for unit in units if unit.id in snapshot.commits]
        if any(one.failed and code in (None, *one.errors) for one in counted):
            for row in _rows(snapshot, shard):
                if row["status"] == "failed" and code in (None, row["error_code"]):
                    yield row


def _rows(snapshot: Snapshot, shard: int) -> Iterator[dict[str, Any]]:
    """The rows of a shard's Parquet; if none is published from the newest commits, those of its units with failures."""
    record = snapshot.records.get(shard)
    data = snapshot.store.read_all([record.parquet]).get(record.parquet) if record else None
    if record and data is not None and len(data) == record.files["parquet"].bytes:
        yield from read_rows(BytesIO(data), snapshot.store.locate(record.parquet))
        return
    for commit in snapshot.commits_of(shard):
        if commit.failed:
            path = attempt_file(commit.unit, commit.attempt, "parquet")
            yield from read_rows(BytesIO(snapshot.store.read(path)), snapshot.store.locate(path))
