"""The check of one shard: its record, its files, and the attempts of its units.

The fast check compares sizes and Parquet footers with the records. The full one reads every file: digests, ends of
archives, equal keys in plan, rows and tar, and the digest and decoding of every picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smsbatch.data import pixels, shards
from smsbatch.data.index import SAMPLES, StoredFile, read_index
from smsbatch.errors import SampleError, StorageError
from smsbatch.runs.records import KINDS, Commit, FileDigest, Published, attempt_file, commit_file, published_file
from smsbatch.runs.snapshot import Problem, StrictSnapshot
from smsbatch.storage.scratch import scratch_folder
from smsbatch.storage.store import storage_errors
from smsbatch.text import one_line

_TOLD = 3  # faults of one file that are named


@dataclass
class Findings:
    """The findings in one shard."""

    problems: list[Problem] = field(default_factory=list)
    published: bool = False
    stale: bool = False
    rows: int = 0
    files: int = 0
    bytes: int = 0
    without_attempts: int = 0

    @property
    def whole(self) -> bool:
        """True if the shard is published and the check found no problem."""
        return self.published and not self.problems


class ShardChecker(StrictSnapshot):
    """Checks the shards of a run against its snapshot.

    Attributes:
        is_index_whole: False if the planned index is damaged, so that no rows are compared with it.
    """

    is_index_whole = True

    def check_shard(self, shard: int, full: bool) -> Findings:
        """Check the record of a shard against its commits and files, and the attempts of its units."""
        units, record, found = self.shards[shard], self.records.get(shard), Findings()
        place = published_file(shard)
        commits = [self.commits[unit.id] for unit in units if unit.id in self.commits]
        known = {problem.unit for problem in self.damaged.values()}
        if record is not None or self.reported:
            found.problems += [
                Problem(commit_file(unit.id, 0), "is gone", "commit", unit.id, shard)
                for unit in units
                if unit.id not in self.commits and unit.id not in known
            ]
            named = zip(units, record.attempts if record is not None else (), strict=False)
            found.problems += [
                Problem(commit_file(unit.id, self.commits[unit.id].generation + 1), "is gone", "commit", unit.id, shard)
                for unit, attempt in named
                if unit.id in self.commits and attempt not in self.attempts[unit.id] and unit.id not in known
            ]
        if record is not None:
            complete = len(commits) == len(units)
            found.published = True
            found.stale = complete and not record.made_of(commits)
            found.problems += self._published(record, commits if complete and not found.stale else None, found)
            if full and not found.problems:
                found.problems += self._contents(record)
        elif self.reported and len(commits) == len(units) and place not in self.damaged:
            found.problems.append(Problem(place, "is gone", "publish", shard=shard))
        needed = not found.whole or found.stale or place in self.damaged or any(unit.id in known for unit in units)
        for commit in commits:
            found.problems += self._attempt(commit, shard, needed, full, found)
        return found

    def _published(self, record: Published, commits: Sequence[Commit] | None, found: Findings) -> Iterator[Problem]:
        """Check sizes and counts of a published shard; `commits` is None if it was not made of the newest ones."""
        planned = sum(map(len, self.shards[record.shard]))
        counts = (record.samples, record.succeeded, record.failed)
        made_of = counts
        if commits is not None:
            succeeded, failed = sum(commit.succeeded for commit in commits), sum(commit.failed for commit in commits)
            made_of = (succeeded + failed, succeeded, failed)
        if record.samples != planned or counts[0] != counts[1] + counts[2] or made_of != counts:
            what = f"counts {counts[0]} samples ({counts[1]} stylized, {counts[2]} failed), but {planned} are planned"
            yield Problem(published_file(record.shard), what, "publish", shard=record.shard)
        for path, expected in ((record.tar, record.files["tar"]), (record.parquet, record.files["parquet"])):
            size = self.sizes.get(path)
            if size is None:
                yield Problem(path, "is gone", "publish", shard=record.shard)
                continue
            found.files += 1
            found.bytes += size
            if size != expected.bytes:
                what = f"has {size:,} bytes, published with {expected.bytes:,}"
                yield Problem(path, what, "publish", shard=record.shard)
            elif path == record.parquet:
                try:
                    with storage_errors("read", self.store.locate(path)), self.store.open_read(path) as file:
                        found.rows = shards.count_rows(file, path)
                except StorageError as error:
                    yield Problem(path, f"cannot be read ({one_line(error)})", "publish", shard=record.shard)
                    continue
                if found.rows != planned:
                    what = f"has {found.rows} rows, but {planned} are planned"
                    yield Problem(path, what, "publish", shard=record.shard)

    def _attempt(self, commit: Commit, shard: int, needed: bool, full: bool, found: Findings) -> Iterator[Problem]:
        """Check the two files of a committed attempt. If the shard is intact they are a reserve, and may be gone."""
        paths = {kind: attempt_file(commit.unit, commit.attempt, kind) for kind in KINDS}
        sizes = {kind: self.sizes.get(path) for kind, path in paths.items()}
        if not needed and None in sizes.values():
            found.without_attempts += 1
        for kind, path in paths.items():
            what, expected = "", commit.files[kind]
            if sizes[kind] is None:
                what = "is gone, and its shard is not published whole" if needed else ""
            elif sizes[kind] != expected.bytes:
                what = f"has {sizes[kind]:,} bytes, committed with {expected.bytes:,}"
            elif full and FileDigest.stored(self.store, path) != expected:
                what = "is not what was committed: its SHA-256 differs"
            if what:
                yield Problem(path, what, "recompute" if needed else "aside", commit.unit, shard)

    def _contents(self, record: Published) -> Iterator[Problem]:
        """Check every byte of a published shard; at most one problem for each of its two files."""
        with scratch_folder("verify") as folder:
            tar, parquet = Path(folder, "tar"), Path(folder, "parquet")
            self.store.fetch(record.tar, tar)
            self.store.fetch(record.parquet, parquet)
            proven = {
                "tar": FileDigest.of(tar) == record.files["tar"],
                "parquet": FileDigest.of(parquet) == record.files["parquet"],
            }
            wrong = self._compare(record.shard, tar, parquet)
            for kind, place in (("tar", record.tar), ("parquet", record.parquet)):
                said = ([] if proven[kind] else ["is not what was published: its SHA-256 differs"]) + wrong[kind]
                if said:
                    # If both digests match, the shard was published with the fault, and publishing again would keep it.
                    told = "; ".join(said[:_TOLD]) + (f"; and {len(said) - _TOLD} more" if len(said) > _TOLD else "")
                    yield Problem(place, told, "recompute" if all(proven.values()) else "publish", shard=record.shard)

    def _compare(self, shard: int, tar: Path, parquet: Path) -> dict[str, list[str]]:
        """The faults in a shard's tar and Parquet, which are compared with the plan and with each other."""
        wrong: dict[str, list[str]] = {"tar": [], "parquet": []}
        units = self.shards[shard]
        try:
            rows = shards.read_rows(parquet)
        except StorageError as error:
            wrong["parquet"].append(f"cannot be read: {one_line(error)}")
            rows = None
        if rows is not None and self.is_index_whole:
            entries = read_index(StoredFile(self.store, SAMPLES), units[0].start, units[-1].stop)
            planned = [entry.key for entry in entries]
            wrong["parquet"] += _first_difference([row["key"] for row in rows], planned, "planned")
        try:
            keys = shards.check_tar(tar)
        except StorageError as error:
            damage = str(error).removeprefix(f"{tar}: ").partition(";")[0]
            wrong["tar"].append(damage)
            return wrong
        if rows is None:
            return wrong
        stylized = {row["key"]: row["sha256"] for row in rows if row["status"] == "success"}
        wrong["tar"] += _first_difference(keys, list(stylized), "among the rows")
        extension = self.run.about["manifest"]["output"]["format"]
        with tar.open("rb") as file:
            for key, fields in shards.read_tar(file):
                image = fields.get(extension)
                if image is None:
                    wrong["tar"].append(f"{key} has no .{extension}")
                elif key in stylized and hashlib.sha256(image).hexdigest() != stylized[key]:
                    wrong["tar"].append(f"{key}.{extension} is not the picture of its row: its SHA-256 differs")
                else:
                    try:
                        pixels.decode(image, min_side=1)
                    except SampleError as error:
                        wrong["tar"].append(f"{key}.{extension} does not decode: {error}")
        return wrong


def _first_difference(found: Sequence[str], wanted: Sequence[str], where: str) -> list[str]:
    """At most one line, which names a difference of two sequences of keys."""
    if list(found) == list(wanted):
        return []
    missing, more = set(wanted) - set(found), set(found) - set(wanted)
    if missing:
        return [f"{min(missing)} is {where}, but missing" + _more(len(missing) - 1)]
    if more:
        return [f"{min(more)} is not {where}" + _more(len(more) - 1)]
    return ["its samples are in another order" if len(found) == len(wanted) else "a sample occurs twice"]


def _more(number: int) -> str:
    return f", and {number} more" if number else ""
