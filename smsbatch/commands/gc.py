"""`gc`: remove objects that no result, retry or check needs any more. It does not start while a driver is at work.

It deletes attempts that lost, older generations, superseded records, temporary files and stale heartbeats; the
attempts of published shards only if asked. On the machine where it runs, it also removes the temporary folders that
killed processes of smsbatch have left, of whatever run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from smsbatch.commands.verify import Verifier
from smsbatch.errors import RequestError
from smsbatch.manifest import Manifest
from smsbatch.parallel import map_ahead
from smsbatch.runs.heartbeat import HEARTBEATS, drivers, require_idle
from smsbatch.runs.layout import ATTEMPTS, GENERATIONS, SUPERSEDED
from smsbatch.runs.run import Run
from smsbatch.storage.scratch import abandoned, remove
from smsbatch.storage.store import TEMPORARY, Store

_YOUNG_S = 3600.0  # younger objects may belong to work in progress
_THREADS = 16
_WHEN_IDLE = "then run gc, or use --force if it is dead"


@dataclass(frozen=True)
class Heap:
    """The number and total size of the unneeded objects of one kind."""

    kind: str
    objects: int
    bytes: int


@dataclass(frozen=True)
class Collected:
    """The objects that `gc` removed, or would remove in a dry run."""

    heaps: tuple[Heap, ...]
    dry_run: bool

    @property
    def objects(self) -> int:
        return sum(heap.objects for heap in self.heaps)

    @property
    def bytes(self) -> int:
        return sum(heap.bytes for heap in self.heaps)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"objects": self.objects, "bytes": self.bytes}


def gc(where: str | Manifest, *, dry_run: bool = False, attempts: bool = False, force: bool = False) -> Collected:
    """Remove objects that no result, retry or check needs any more.

    Args:
        dry_run: only list them.
        attempts: also the attempts of published shards. `repair` must then compute such units again, and
            `run --retry-failed` refuses them.
        force: even while a driver seems to be at work.

    Raises:
        RequestError: there is no run, a driver is at work, or a record is damaged.
        StorageError: an object cannot be listed or deleted.
    """
    run = Run.open(where)
    store = run.store
    # Checked before and after the snapshot: a commit made while it is being read would make its attempt look lost.
    if not force:
        require_idle(store, _WHEN_IDLE)
    verifier = Verifier(run)
    if verifier.damaged:
        first = next(iter(verifier.damaged.values()))
        raise RequestError(f"{store.locate(first.place)}: {first.what}; run `smsbatch repair` first, then gc")
    if not force:
        require_idle(store, _WHEN_IDLE)
    heaps = {kind: files for kind, files in _rubbish(verifier, attempts) if files}
    folders = abandoned()
    if not dry_run:
        for files in heaps.values():
            deque(map_ahead(store.delete, files, _THREADS), maxlen=0)
        for folder in folders:
            remove(folder)
    found = [Heap(kind, len(files), sum(files.values())) for kind, files in heaps.items()]
    if folders:
        found.append(Heap("folders of killed processes on this machine", len(folders), sum(folders.values())))
    return Collected(tuple(found), dry_run)


def _rubbish(verifier: Verifier, attempts: bool) -> Iterator[tuple[str, dict[str, int]]]:
    store = verifier.store
    generations = store.sizes(GENERATIONS)
    numbers = (
        list(verifier.shards)
        if attempts
        else sorted({_shard_of(path) for path in generations} & verifier.shards.keys())
    )
    found = map_ahead(lambda shard: verifier.check_shard(shard, full=False), numbers, _THREADS)
    whole = {shard for shard, seen in zip(numbers, found, strict=True) if seen.whole and not seen.stale}
    lost: dict[str, int] = {}
    spare: dict[str, int] = {}
    for path, size in verifier.sizes.items():
        number, _, name = path.removeprefix(f"{ATTEMPTS}/").partition("/")
        if not path.startswith(f"{ATTEMPTS}/") or not number.isdigit() or int(number) not in verifier.by_id:
            continue
        commit = verifier.commits.get(int(number))
        if commit is None or name.partition(".")[0] != commit.attempt:
            lost[path] = size  # `_old` spares young ones, for example an undecided attempt of the next generation
        elif attempts and verifier.by_id[commit.unit].shard in whole:
            spare[path] = size
    yield "attempts that lost", _old(store, lost)
    yield "attempts of published shards", spare
    yield "older generations", {path: size for path, size in generations.items() if _shard_of(path) in whole}
    yield "superseded records", store.sizes(SUPERSEDED)
    yield "temporary files", _old(store, store.sizes(TEMPORARY))
    dead = {f"{HEARTBEATS}/{driver.name}.json" for driver in drivers(store) if not driver.alive}
    yield "stale heartbeats", {path: size for path, size in store.sizes(HEARTBEATS).items() if path in dead}


def _shard_of(path: str) -> int:
    number = path.rpartition("/")[2].partition(".")[0]
    return int(number) if number.isdigit() else -1


def _old(store: Store, files: dict[str, int]) -> dict[str, int]:
    """The files that are too old to belong to work in progress."""

    def age_s(path: str) -> float:
        return (datetime.now(UTC) - store.modified(path)).total_seconds()

    ages = zip(files.items(), map_ahead(age_s, files, _THREADS), strict=True)
    return {path: size for (path, size), age in ages if age > _YOUNG_S}
