"""`verify`: check the stored files of a run against its records. It changes nothing.

Every file of a run has a digest in one that ends with its own: `run.json` and its copy, the records of the ledger, the
digests of the plan, and `index.json`. The fast check compares those, sizes and Parquet footers; the full check reads
every file. Work that is not done yet is no problem and is listed separately. Each thread fetches one shard at a time,
which bounds memory and scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smsbatch.commands.shard_check import Findings, ShardChecker
from smsbatch.data.index import SAMPLES
from smsbatch.data.indexing import digest_index
from smsbatch.errors import StorageError
from smsbatch.manifest import Manifest
from smsbatch.parallel import map_ahead
from smsbatch.runs.drift import parse_note
from smsbatch.runs.layout import CARD, DRIFT, INDEX, REPORT, RUN, SUCCESS
from smsbatch.runs.plan_files import check_digests, last_number
from smsbatch.runs.records import DIGEST, KINDS, PARSE_ERRORS, FileDigest, dump_record, load_record, result_file
from smsbatch.runs.run import Run
from smsbatch.runs.snapshot import Problem
from smsbatch.runs.status import over_budget
from smsbatch.storage.scratch import scratch_folder
from smsbatch.text import one_line

THREADS = 4  # shards that are checked at once; each has two files in scratch


@dataclass(frozen=True)
class Verification:
    """The result of a check: the amount of data checked, and the problems.

    Attributes:
        samples_done: planned samples that have a row in a published shard.
        files, bytes: number and total size of the files of published shards.
        without_attempts: units whose attempts `gc --attempts` removed; `repair` would have to compute them again.
        pending: lines about work that is not done yet, which is no problem.
        edited: files for people that are not as they were written, which is no problem: the card asks for edits. Only
            with `full`.
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
    edited: tuple[str, ...] = ()

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
        StorageError: the run cannot be read, or both `run.json` and its copy are damaged.
    """
    return Verifier(Run.open(where, damaged=True)).verify(full, progress=progress)


class Verifier(ShardChecker):
    """Checks the files of a run against its snapshot."""

    def verify(
        self,
        full: bool = False,
        only: Iterable[int] | None = None,
        progress: Callable[[int, int], None] = lambda done, shards: None,
    ) -> Verification:
        """Like the function `verify`; checks `only` some shards, if given."""
        planned, numbers = self.run.about["planned"], list(self.shards if only is None else only)
        problems = [
            Problem(place, what, "restore")
            for place, what in self.run.faults.items()
            if place == RUN or self.run.is_planned  # else a driver has died before it wrote the copy
        ]
        problems += [*self.damaged.values(), *self._foreign()]
        if full and self.units:
            problems += self._plan_files()
            self.is_index_whole = all(problem.place != SAMPLES for problem in problems)
        all_found: dict[int, Findings] = {}
        checked = map_ahead(lambda shard: self.check_shard(shard, full), numbers, THREADS)
        for shard, found in zip(numbers, checked, strict=True):
            all_found[shard] = found
            progress(len(all_found), len(numbers))
        for found in all_found.values():
            problems += found.problems
        edited: list[str] = []
        problems += [*self._report(full, edited), *self._drift()]
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
            edited=tuple(edited),
        )

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

    def _report(self, full: bool, edited: list[str]) -> Iterator[Problem]:
        """Check that the report is complete, and that index.json has the digests of the records and of the report.

        `edited` gets the card if it is not as it was written.
        """
        sizes = {name: self.store.size(name) for name in (SUCCESS, *REPORT)}
        if sizes[SUCCESS]:
            yield Problem(SUCCESS, "is not empty", "report")
        if None in [sizes[name] for name in REPORT]:
            if sizes[SUCCESS] is not None:
                yield from (Problem(name, "is gone", "report") for name in REPORT if sizes[name] is None)
            return
        try:
            index = load_record(self.store.read(INDEX))
            lines = [line[kind] for line in index["shards"] for kind in KINDS]
            listed = {line["path"]: FileDigest(line["sha256"], line["bytes"]) for line in lines}
            files = {name: FileDigest(**digest) for name, digest in index.get("files", {}).items()}
            notes = [str(note) for note in index.get("drift", [])]
        except PARSE_ERRORS as error:
            yield Problem(INDEX, f"is not what was written ({one_line(error)})", "report")
            return
        if self.run.has_digests and DIGEST not in index:
            yield Problem(INDEX, "lacks its digest", "report")
        known = {path: record.files[kind] for record in self.records.values() for kind, path in record.paths.items()}
        different = sorted(path for path in listed.keys() & known.keys() if listed[path] != known[path])
        different += sorted(known.keys() - listed.keys())
        if different:
            yield Problem(INDEX, f"has another digest of {different[0]}", "report")
        for name, expected in files.items():
            if name == CARD and not full:
                continue
            if sizes.get(name) != expected.bytes or (full and FileDigest.stored(self.store, name) != expected):
                if name == CARD:
                    edited.append(name)
                else:
                    yield Problem(name, "is not what was written", "report")
        there = self.store.list(DRIFT)
        for name in notes:
            if name not in there:
                yield Problem(name, "is gone, and the change that it allowed must be allowed again", "report")

    def _drift(self) -> Iterator[Problem]:
        """Check the notes of allowed changes."""
        for name, data in self.store.read_all(self.store.list(DRIFT)).items():
            try:
                whole = data == dump_record(parse_note(data)) or not self.run.has_digests
            except PARSE_ERRORS:
                whole = False
            if not whole:
                told = "is not what was written, and the change that it allowed must be allowed again"
                yield Problem(name, told, "aside")

    def _plan_files(self) -> Iterator[Problem]:
        """Check every byte of the plan, and that its first index is the planned one."""
        wrong = dict(check_digests(self.store, 0, self.run.has_digests))
        if SAMPLES not in wrong and not self._is_planned_index():
            wrong[SAMPLES] = "is not the index that was planned"
        last = last_number(self.run.plan_files)
        if last and (last == self.run.index_number or self.reported):  # else a driver died before the last of its files
            wrong |= check_digests(self.store, last, self.run.has_digests)
        known = self.damaged.keys()
        yield from (Problem(place, what, "plan") for place, what in wrong.items() if place not in known)

    def _is_planned_index(self) -> bool:
        with scratch_folder("verify") as folder, suppress(StorageError):
            path = Path(folder, "samples.parquet")
            self.store.fetch(SAMPLES, path)
            return bool(digest_index(path) == self.run.about["index_sha256"])
        return False

    def _pending(self, found: dict[int, Findings]) -> Iterator[str]:
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
        if self.reported and not self.store.exists(SUCCESS) and not self._is_over_budget():
            yield "the mark of success: `smsbatch run` judges the failures and writes _SUCCESS"

    def _is_over_budget(self) -> bool:
        """True if the failures exceed the planned budget, so that the run does not succeed."""
        failed = sum(commit.failed for commit in self.commits.values())
        worst = max(self.commits.values(), key=lambda commit: commit.failed / commit.samples, default=None)
        return bool(over_budget(self.run.errors, failed, self.run.about["planned"]["samples"], {}, worst))
