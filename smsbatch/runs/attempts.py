"""The two files of an attempt: built from outcomes, and turned back into the commit that describes them.

The Parquet's metadata has the commit, as a record without the Parquet's own digest. So a lost commit can be made again
with the same bytes; attempts of versions before 0.2 lack it, and their units are computed again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from smsbatch.data import shards
from smsbatch.data.sample import Outcome, Unit
from smsbatch.errors import StorageError
from smsbatch.runs.records import DIGEST, KINDS, PARSE_ERRORS, Commit, FileDigest, dump_record, load_record
from smsbatch.text import one_line

_COMMIT = "smsbatch.commit"  # key of the Parquet's metadata


def build(
    folder: Path,
    unit: Unit,
    outcomes: Sequence[Outcome],
    metrics: Sequence[str],
    *,
    attempt: str,
    worker: str,
    seconds: float,
    generation: int,
) -> tuple[Commit, dict[str, Path]]:
    """Write a unit's tar and Parquet to `folder`, and count them; returns the commit that would decide for them."""
    built = {kind: folder / f"unit.{kind}" for kind in KINDS}
    shards.write_tar(built["tar"], outcomes)
    errors = Counter(outcome.error_code for outcome in outcomes if outcome.error_code is not None)
    commit = Commit(
        unit=unit.id,
        generation=generation,
        attempt=attempt,
        worker=worker,
        samples=len(outcomes),
        succeeded=len(outcomes) - errors.total(),
        failed=errors.total(),
        errors=dict(sorted(errors.items())),
        seconds=seconds,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        files={"tar": FileDigest.of(built["tar"])},
    )
    rows = [outcome.row(unit, attempt, worker, metrics, generation) for outcome in outcomes]
    about = {_COMMIT: dump_record(asdict(commit)).decode()}
    shards.write_rows(built["parquet"], rows, metrics, commit.files["tar"].sha256, about)
    recount(built, len(unit))
    return _with_parquet(commit, built["parquet"]), built


def commit_of(built: Mapping[str, Path]) -> Commit:
    """The commit of an attempt's two files.

    Raises:
        StorageError: the files are damaged, do not belong together, or do not hold their commit.
    """
    try:
        values = load_record(shards.read_metadata(built["parquet"])[_COMMIT].encode())
        values.pop(DIGEST)
        tar = FileDigest(**values["files"]["tar"])
        commit = _with_parquet(Commit(**values | {"files": {"tar": tar}}), built["parquet"])
    except PARSE_ERRORS as error:
        raise StorageError(f"{built['parquet']} does not hold its commit ({one_line(error)})") from error
    if FileDigest.of(built["tar"]) != tar:
        raise StorageError(f"{built['tar']} is not the tar of its Parquet")
    recount(built, commit.samples)
    return commit


def recount(built: Mapping[str, Path], samples: int) -> None:
    """Re-read both files; check that every sample has a row, and that the tar has the successes in the same order."""
    rows = shards.read_rows(built["parquet"])
    keys = [row["key"] for row in rows]
    if len(keys) != samples or len(set(keys)) != samples:
        raise ValueError(f"{samples} samples are planned, there are rows of {len(set(keys))}, {len(keys)} in all")
    try:
        in_tar = shards.check_tar(built["tar"])
    except StorageError as error:
        raise StorageError(f"{error}; check the disk and run again") from error
    if in_tar != [row["key"] for row in rows if row["status"] == "success"]:
        raise StorageError(f"{built['tar']} and its Parquet do not hold the same samples; check the disk and run again")


def _with_parquet(commit: Commit, parquet: Path) -> Commit:
    return replace(commit, files={**commit.files, "parquet": FileDigest.of(parquet)})
