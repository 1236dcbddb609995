"""An attempt and its commit in one call, as a worker makes them."""

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
    """Attempt and decide, unless the unit has a commit of that generation already; returns the one that stands."""
    standing = ledger.committed(unit.id)
    if standing is not None and standing.generation >= generation:
        return standing
    made = ledger.attempt(unit, outcomes, worker=worker, seconds=seconds, generation=generation, attempt=attempt)
    return ledger.decide(made)
