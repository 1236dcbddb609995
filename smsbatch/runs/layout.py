"""The names of a run's files."""

from __future__ import annotations

from smsbatch.storage.store import Store

RUN = "run.json"  # resolved manifest (key "manifest"), its hash, digests of the weights, versions; written first
COPY = "_smsbatch/run.json"  # a copy of it
SUCCESS = "_SUCCESS"  # empty; written last
INDEX = "index.json"  # every published file with size and SHA-256, and the report's numbers
CARD = "README.md"  # of the dataset; asks to be edited
REPORT = (INDEX, CARD, "report.html")

WRITTEN = ("shards/000000.tar", "metrics/000000.parquet", "plan/samples.parquet", INDEX, RUN)  # some of a run's files

# The ledger; `records.py` has the names below these folders.
ATTEMPTS = "_smsbatch/attempts"
COMMITS = "_smsbatch/commits"
PUBLISHED = "_smsbatch/published"
GENERATIONS = "_smsbatch/generations"  # publications that a later generation has replaced

SUPERSEDED = "_smsbatch/superseded"  # records that `repair` has moved aside
FOREIGN = "_smsbatch/foreign"  # files that belong to no shard, moved aside by `repair`
CHECKPOINTS = "_smsbatch/checkpoints"  # of a training
DRIFT = "_smsbatch/drift"  # notes of allowed changes since the plan


def is_reported(store: Store) -> bool:
    """True if all files that `write_report` writes exist."""
    return all(store.exists(name) for name in REPORT)
