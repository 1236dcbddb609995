"""An output that is deleted while a run is at work on it.

The run ends with an error that says so. It removes what it has written after the deletion, which the next run would
otherwise take for its own or refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from smsbatch.errors import SmsbatchError, StorageError
from smsbatch.runs.heartbeat import HEARTBEATS
from smsbatch.runs.layout import COPY, PUBLISHED, RUN
from smsbatch.runs.records import Published
from smsbatch.runs.run import Run
from smsbatch.storage.store import TEMPORARY, Store


@contextmanager
def ends_if_deleted(run: Run) -> Iterator[Run]:
    """Replace an error by a StorageError that names its cause, if neither `run.json`, its copy nor a plan is left."""
    try:
        yield run
    except SmsbatchError as error:
        store, is_gone = run.store, False
        with suppress(StorageError):
            is_gone = not store.read_all([RUN, COPY]) and not store.list("plan")
        if not is_gone:
            raise
        with suppress(StorageError):
            for data in store.read_all(store.list(PUBLISHED)).values():
                record = Published.parse(data)
                for path in record.paths.values() if record is not None else ():
                    store.delete(path)
            remove_remains(store)
        raise StorageError(
            f"{store.url}: the output was deleted while the run was at work; run again to start anew"
        ) from error


def remove_remains(store: Store) -> int:
    """Delete what lies in the folders of the ledger without a run; returns the number of objects.

    A commit that a worker has written after its run was deleted must not count in the next run.
    """
    others = (TEMPORARY, HEARTBEATS)
    remains = [path for path in store.list("_smsbatch") if path.count("/") > 1 and not path.startswith(others)]
    if remains and store.exists(RUN):  # in this order: another driver has begun a run here, and they may be its files
        return 0
    for path in remains:
        store.delete(path)
    return len(remains)
