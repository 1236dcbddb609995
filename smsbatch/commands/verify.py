"""`verify`: check the stored files of a run against its records. It changes nothing.

The fast check compares plan, commits, records, file sizes and Parquet footers. The full check reads every file: it
checks digests, ends of archives, equal keys in plan, rows and tar, and the digest and decoding of every picture. Work
that is not done yet is no problem and is listed separately. Each thread fetches one shard at a time, which bounds
memory and scratch.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from smsbatch.data import pixels, shards
from smsbatch.data.index import SAMPLES, UNITS, read_index
from smsbatch.data.indexing import digest_index
from smsbatch.errors import SampleError, StorageError
from smsbatch.manifest import Manifest
from smsbatch.parallel import map_ahead
from smsbatch.runs.layout import INDEX, REPORT, SUCCESS
from smsbatch.runs.records import (
    KINDS,
    PARSE_ERRORS,
    Commit,
    FileDigest,
    Published,
    attempt_file,
    commit_file,
    published_file,
    result_file,
)
from smsbatch.runs.run import Run
from smsbatch.runs.snapshot import Problem, StrictSnapshot
from smsbatch.storage.store import storage_errors
from smsbatch.text import one_line

THREADS = 4  # shards that are checked at once; each has two files in scratch
_TOLD = 3  # faults of one file that are named


@dataclass(frozen=True)
class Verification:
    """The result of a check: the amount of data checked, and the problems.

    Attributes:
        samples_done: planned samples that have a row in a published shard.
        files, bytes: number and total size of the files of published shards.
        without_attempts: units whose attempts `gc --attempts` removed; `repair` would have to compute them again.
        pending: lines about work that is not done yet, which is no problem.
    """

    name: str
    full: bool
    units: int = 0
    units_done: int = 0
    shards: int = 0
    shards_published: int = 0
    samples: int = 0
    samples_done: int = 0
    files: int = 0
    bytes: int = 0
    without_attempts: int = 0
    problems: tuple[Problem, ...] = ()
    pending: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        problems = [asdict(problem) | {"do": problem.do} for problem in self.problems]
        return asdict(self) | {"problems": problems, "ok": self.ok}


def verify(
    where: str | Manifest, full: bool = False, progress: Callable[[int, int], None] = lambda done, shards: None
) -> Verification:
    """Check that the run at a path, URL or manifest is complete and undamaged.

    Args:
        full: check every byte and not only names, sizes and counts.
        progress: called with the number of checked shards and of all shards.

    Raises:
        RequestError: there is no run, or it makes no dataset.
        StorageError: the run cannot be read.
    """
    return Verifier(Run.open(where)).verify(full, progress=progress)


@dataclass
class _Findings:
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


class Verifier(StrictSnapshot):
    """Checks the files of a run against its snapshot."""

    def verify(
        self,
        full: bool = False,
        only: Iterable[int] | None = None,
        progress: Callable[[int, int], None] = lambda done, shards: None,
    ) -> Verification:
        """Like the function `verify`; checks `only` some shards, if given."""
        planned, numbers = self.run.about["planned"], list(self.shards if only is None else only)
        problems = list(self.damaged.values()) + self._foreign()
        all_found: dict[int, _Findings] = {}
        checked = map_ahead(lambda shard: self.check_shard(shard, full), numbers, THREADS)
        for shard, found in zip(numbers, checked, strict=True):
            all_found[shard] = found
            progress(len(all_found), len(numbers))
        for found in all_found.values():
            problems += found.problems
        problems += self._index()
        if full and only is None:
            problems += self._samples()
        return Verification(
            name=self.run.name,
            full=full,
            units=planned["units"],
            units_done=len(self.commits),
            shards=planned["shards"],
            shards_published=sum(found.published for found in all_found.values()),
            samples=planned["samples"],
            samples_done=sum(found.rows for found in all_found.values()),
            files=sum(found.files for found in all_found.values()),
            bytes=sum(found.bytes for found in all_found.values()),
            without_attempts=sum(found.without_attempts for found in all_found.values()),
            problems=tuple(problems),
            pending=tuple(self._pending(all_found)),
        )

    def check_shard(self, shard: int, full: bool) -> _Findings:
        """Check the record of a shard against its commits and files, and the attempts of its units."""
        units, record, found = self.shards[shard], self.records.get(shard), _Findings()
        place = published_file(shard)
        commits = [self.commits[unit.id] for unit in units if unit.id in self.commits]
        if record is not None or self.reported:
            known = {problem.unit for problem in self.damaged.values()}
            found.problems += [
                Problem(commit_file(unit.id, 0), "is gone", "recompute", unit.id, shard)
                for unit in units
                if unit.id not in self.commits and unit.id not in known
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
        needed = not found.whole or found.stale or place in self.damaged
        for commit in commits:
            found.problems += self._attempt(commit, shard, needed, full, found)
        return found

    def _published(self, record: Published, commits: Sequence[Commit] | None, found: _Findings) -> Iterator[Problem]:
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
                    with self.store.open_read(path) as file:
                        found.rows = shards.count_rows(file)
                except (OSError, ValueError) as error:  # Arrow raises them if the footer is damaged
                    yield Problem(path, f"cannot be read ({one_line(error)})", "publish", shard=record.shard)
                    continue
                if found.rows != planned:
                    what = f"has {found.rows} rows, but {planned} are planned"
                    yield Problem(path, what, "publish", shard=record.shard)

    def _attempt(self, commit: Commit, shard: int, needed: bool, full: bool, found: _Findings) -> Iterator[Problem]:
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
            elif full and self._digest(path) != expected.sha256:
                what = "is not what was committed: its SHA-256 differs"
            if what:
                yield Problem(path, what, "recompute" if needed else "aside", commit.unit, shard)

    def _digest(self, path: str) -> str:
        with _scratch() as folder:
            self.store.fetch(path, Path(folder, "file"))
            return shards.digest(Path(folder, "file"))

    def _contents(self, record: Published) -> Iterator[Problem]:
        """Check every byte of a published shard; at most one problem for each of its two files."""
        with _scratch() as folder:
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
        planned = [entry.key for entry in read_index(self.run.index, units[0].start, units[-1].stop)]
        try:
            rows = shards.read_rows(parquet)
        except (OSError, ValueError) as error:
            wrong["parquet"].append(f"cannot be read: {one_line(error)}")
            rows = None
        if rows is not None:
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

    def _foreign(self) -> list[Problem]:
        """Files in `shards/` and `metrics/` that belong to no shard of the plan."""
        if not self.units:
            return []
        ours = {result_file(shard, kind) for shard in self.shards for kind in KINDS}
        return [
            Problem(path, "is no file of this run", "aside")
            for path in self.sizes
            if not path.startswith("_smsbatch/") and path not in ours
        ]

    def _index(self) -> list[Problem]:
        """Check that the report is complete, and that index.json has the digests of the records."""
        if not self.reported:
            gone = [name for name in REPORT if not self.store.exists(name)] if self.store.exists(SUCCESS) else []
            return [Problem(name, "is gone", "report") for name in gone]
        try:
            listed = {
                line[kind]["path"]: FileDigest(line[kind]["sha256"], line[kind]["bytes"])
                for line in json.loads(self.store.read(INDEX))["shards"]
                for kind in KINDS
            }
        except PARSE_ERRORS:
            return [Problem(INDEX, "is damaged", "report")]
        known = {
            path: record.files[kind]
            for record in self.records.values()
            for path, kind in ((record.tar, "tar"), (record.parquet, "parquet"))
        }
        different = sorted(path for path in listed.keys() & known.keys() if listed[path] != known[path])
        different += sorted(known.keys() - listed.keys())
        return [Problem(INDEX, f"has another digest of {different[0]}", "report")] if different else []

    def _samples(self) -> list[Problem]:
        """Check that the first index is the planned one, including the location of every byte."""
        if SAMPLES in self.damaged or UNITS in self.damaged or not self.units:
            return []
        with _scratch() as folder:
            path = Path(folder, "samples.parquet")
            self.store.fetch(SAMPLES, path)
            same = digest_index(path) == self.run.about["index_sha256"]
        return [] if same else [Problem(SAMPLES, "is not the index that was planned", "plan")]

    def _pending(self, found: dict[int, _Findings]) -> Iterator[str]:
        if not self.units:
            if not self.damaged:
                yield "the plan"
            return
        undone = len(self.units) - len(self.commits)
        if undone:
            yield f"units without a commit: {undone} of {len(self.units)}"
        complete = {shard for shard, units in self.shards.items() if all(unit.id in self.commits for unit in units)}
        unpublished = len(complete - self.records.keys())
        if unpublished and not self.reported:
            yield f"complete shards that are not published: {unpublished}"
        stale = sum(seen.stale for seen in found.values())
        if stale:
            yield f"published shards with newer commits: {stale}"
        if not undone and not unpublished and not self.reported:
            yield "the report"


def _scratch() -> tempfile.TemporaryDirectory[str]:
    with storage_errors("make a folder in", tempfile.gettempdir()):
        return tempfile.TemporaryDirectory(prefix="smsbatch-verify-")


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
