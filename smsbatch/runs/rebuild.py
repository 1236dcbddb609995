"""Make lost or damaged commits again from the files of their attempts."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from smsbatch.errors import StorageError
from smsbatch.runs import attempts
from smsbatch.runs.layout import ATTEMPTS
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.records import KINDS, Commit, attempt_file


def rebuild(ledger: Ledger, unit: int, generation: int, named: str | None = None) -> Commit | None:
    """The commit of a unit in a generation, with the same bytes; None if the files are gone or damaged.

    Args:
        named: the attempt that the record of the shard names, None if it does not tell of this generation. Then the
            generation must have only one attempt, because nothing else shows which of several was the winner.
    """
    found = []
    paths = set(ledger.store.list(f"{ATTEMPTS}/{unit:06d}"))
    for attempt in sorted({Path(path).stem for path in paths}):
        names = {kind: attempt_file(unit, attempt, kind) for kind in KINDS}
        if named in (None, attempt) and set(names.values()) <= paths:
            with ledger.workshop() as folder, suppress(StorageError, ValueError):
                built = {kind: folder / kind for kind in KINDS}
                for kind, path in built.items():
                    ledger.store.fetch(names[kind], path)
                found.append(attempts.commit_of(built))
    found = [commit for commit in found if (commit.unit, commit.generation) == (unit, generation)]
    return found[0] if len(found) == 1 else None
