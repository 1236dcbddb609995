"""The names of a run's files."""

from __future__ import annotations

from smsbatch.storage.store import Store

ATTEMPTS = "_smsbatch/attempts"
COMMITS = "_smsbatch/commits"
PUBLISHED = "_smsbatch/published"
GENERATIONS = "_smsbatch/generations"
SUCCESS = "_SUCCESS"
INDEX = "index.json"
REPORT = (INDEX, "README.md", "report.html")
RUN = "run.json"
SUPERSEDED = "_smsbatch/superseded"
FOREIGN = "_smsbatch/foreign"
CHECKPOINTS = "_smsbatch/checkpoints"


def is_reported(store: Store) -> bool:
    """True if all files that `write_report` writes exist."""
    return all(store.exists(name) for name in REPORT)
