"""A helper that stores an attempt and commits it, as a worker does."""

from __future__ import annotations

from collections.abc import Sequence

from smsbatch.data.sample import Outcome, Unit
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.records import Commit


def commit_unit(
    ledger: Ledger,
    unit: Unit,
    outcomes: Sequence[Outcome],
    *,
    worker: str,
    seconds: float,
    generation: int = 0,
    attempt: str | None = None,
) -> Commit:
    """Commit an attempt unless the unit already has a commit of that generation; returns the commit that counts."""
    standing = ledger.committed(unit.id)
    if standing is not None and standing.generation >= generation:
        return standing
    made = ledger.attempt(unit, outcomes, worker=worker, seconds=seconds, generation=generation, attempt=attempt)
    return ledger.decide(made)
