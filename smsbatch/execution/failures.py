"""Why samples failed: the rows of the failed ones, of a run that is finished or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from smsbatch.data.index import UNITS, read_units
from smsbatch.data.ledger import Ledger
from smsbatch.data.records import Commit, Published, attempt_file
from smsbatch.data.sample import Unit
from smsbatch.data.shards import read_rows
from smsbatch.data.store import Store
from smsbatch.errors import RequestError
from smsbatch.execution.record import read_run, store_of
from smsbatch.manifest import Manifest

__all__ = ["failures", "rows_of"]


def failures(where: str | Manifest, code: str | None = None, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of failed samples, in plan order; those of one shard in memory at a time.

    Args:
        code: only with this error code.
        limit: at most so many.

    Raises:
        RequestError: no run stands there.
        StorageError: rows cannot be read.
    """
    store = store_of(where)
    if read_run(store) is None:
        raise RequestError(f"{store.url}: no run here (no run.json); `smsbatch run` starts one")
    return islice(_failures(store, code), limit)


def _failures(store: Store, code: str | None) -> Iterator[dict[str, Any]]:
    if not store.exists(UNITS):
        return
    ledger = Ledger(store)
    commits, published = ledger.commits(), ledger.publications()
    for shard, grouped in groupby(read_units(store), lambda unit: unit.shard):
        units = list(grouped)
        if any(
            commits[unit.id].failed and code in (None, *commits[unit.id].errors) for unit in units if unit.id in commits
        ):
            for row in rows_of(store, units, commits, published.get(shard)):
                if row["status"] == "failed" and code in (None, row["error_code"]):
                    yield row


def rows_of(
    store: Store, units: Sequence[Unit], commits: dict[int, Commit], published: Published | None
) -> Iterable[dict[str, Any]]:
    """The rows of a shard's committed units: from its Parquet, or, while that is not of these commits, from theirs."""
    done = [commits[unit.id] for unit in units if unit.id in commits]
    if published is not None and published.made_of(done):
        yield from _rows(store, published.parquet)
    else:
        for commit in done:
            if commit.failed:
                yield from _rows(store, attempt_file(commit.unit, commit.attempt, "parquet"))


def _rows(store: Store, path: str) -> list[dict[str, Any]]:
    with store.open_read(path) as file:
        return read_rows(file)
