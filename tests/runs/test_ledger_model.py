"""A model test of the ledger: every store operation is a step, and a seeded schedule chooses the actor of each step.

Actors work on the same units with different bytes, retry failed samples and publish. At any step an actor may die
(before, during or after the operation, which may leave a cut file or lose its answer), or sleep, possibly until
all others have finished. Checked on disk and on S3, with workers that commit and with a driver that commits alone:

1. a commit never changes after it was seen
2. at any moment, if the attempts of a record are those of the newest commits, its files are its own, missing or cut
3. at the end every planned key is once in the rows, and each success once in the tar, from the attempts of the newest
   generation, with the digests in rows, commits and records
4. the files kept of older generations are whole

The last test shows that these checks find faults in a ledger that lacks a part of the protocol.

The file exceeds 400 lines because actors, schedule and invariants are one model.
"""

from __future__ import annotations

import hashlib
import random
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.ledgers import commit_unit

from smsbatch.data.sample import Outcome, Unit
from smsbatch.data.shards import read_rows, read_tar
from smsbatch.errors import StorageError
from smsbatch.runs.layout import COMMITS, GENERATIONS
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.records import Commit, FileDigest, Published, commit_file, published_file
from smsbatch.storage.store import Store

if TYPE_CHECKING:
    from support.s3server import Server

FAST, SLOW = range(20), range(20, 240)
SEEDS = [*FAST, *(pytest.param(seed, marks=pytest.mark.slow) for seed in SLOW)]


class Crash(BaseException):
    """The death of a process; a BaseException, so that the tested code does not catch it."""


class LostAnswer(StorageError):
    """The write succeeded, but the writer gets an error."""


class Actor:
    """A thread that runs only during its turns."""

    def __init__(self, name: str, work: Callable[[Actor], None]) -> None:
        self.name = name
        self.asleep = self.ended = self.wrote = False
        self.fault: str | None = None
        self.problem = ""
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[Actor], None]) -> None:
        self._mine.acquire()
        try:
            work(self)
        except (Crash, LostAnswer):
            pass
        except BaseException:
            self.problem = traceback.format_exc()
        self.ended = True
        self._theirs.release()

    def go(self) -> None:
        """Start a turn of the thread and wait for its end."""
        self._mine.release()
        assert self._theirs.acquire(timeout=60), f"{self.name} does not come back"

    def step(self) -> None:
        """In the thread: end the turn and wait for the next one."""
        self._theirs.release()
        self._mine.acquire()
        if self.fault == "crash":
            raise Crash


class Stepped(Store):
    """A store that ends the turn before every operation, and after every create, put and delete."""

    def __init__(self, actor: Actor, store: Store) -> None:
        super().__init__(store.url, store.storage, has_create_only_put=store.has_create_only_put)
        self.actor, self.plain = actor, store

    def create(self, path: str, source: bytes | Path) -> bool:
        self.actor.step()
        self._torn(path, source)
        created = self.plain.create(path, source)
        self._answer()
        return created

    def put(self, path: str, source: bytes | Path) -> None:
        self.actor.step()
        self._torn(path, source)
        self.plain.put(path, source)
        self._answer()

    def delete(self, path: str) -> None:
        self.actor.step()
        self.plain.delete(path)
        self._answer()

    def fetch(self, path: str, target: Path) -> None:
        self.actor.step()
        self.plain.fetch(path, target)

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        self.actor.step()
        return self.plain.read_all(paths)

    def size(self, path: str) -> int | None:
        self.actor.step()
        return self.plain.size(path)

    def _torn(self, path: str, source: bytes | Path) -> None:
        """Die while a file is written: a part of it stays under a temporary name or, on a bad disk, its own."""
        if self.actor.fault in {"beside", "cut"} and isinstance(source, Path):
            part = source.read_bytes()[: len(self.actor.name) * 100]
            if self.actor.fault == "beside":
                self.plain.put(f"_smsbatch/tmp/{self.actor.name}", part)
            else:
                self.plain.create(path, part)
            self.actor.wrote = True
            raise Crash

    def _answer(self) -> None:
        self.actor.wrote = True
        if self.actor.fault == "lost":
            raise LostAnswer("connection reset")
        self.actor.step()


class Play:
    """The schedule of the processes that work on one output."""

    def __init__(
        self, seed: int, store: Store, units: Sequence[Unit], scratch: Path, kind: type[Ledger] = Ledger
    ) -> None:
        self.chance = random.Random(seed)
        self.store, self.units, self.scratch, self.kind = store, units, scratch, kind
        self.shards = {shard: list(its) for shard, its in groupby(units, lambda unit: unit.shard)}
        self.actors: list[Actor] = []
        self.inbox: list[Commit] = []
        self.seen: dict[tuple[int, int], bytes] = {}

    def run(self, roles: Sequence[Callable[[Actor], None]], driver: Callable[[Actor], None] | None = None) -> None:
        """Run until all actors have ended; a sleeping one wakes at any time, at the latest when no other is awake."""
        pending = list(roles)
        driving: Actor | None = None
        while True:
            if pending and (not self.actors or self.chance.random() < 0.2):
                self._enter(pending.pop(0))
            if driver is not None and (driving is None or (driving.ended and (self.inbox or self._awake()))):
                driving = self._enter(driver)
            awake = self._awake()
            if not awake:
                sleeping = [actor for actor in self.actors if actor.asleep and not actor.ended]
                if sleeping:
                    self.chance.choice(sleeping).asleep = False
                elif not pending:
                    break
                else:
                    self._enter(pending.pop(0))
                continue
            actor = self.chance.choice(awake)
            for _ in range(self.chance.choice([1, 3, 10, 40])):  # long enough to overtake a waiting actor
                if not actor.ended:
                    self._step(actor)
            actor.asleep = self.chance.random() < 0.2
            if self.chance.random() < 0.05:
                for zombie in self.actors:
                    zombie.asleep = False

    def _step(self, actor: Actor) -> None:
        if actor.fault is None and self.chance.random() < 0.02:
            actor.fault = self.chance.choice(["crash", "crash", "beside", "cut", "lost"])
        actor.go()
        assert not actor.problem, f"{actor.name}: {actor.problem}"
        if actor.wrote if self.store.is_local else actor.ended:  # on S3 a check costs more than a step
            actor.wrote = False
            self.check_now()

    def _awake(self) -> list[Actor]:
        return [actor for actor in self.actors if not actor.asleep and not actor.ended]

    def _enter(self, role: Callable[[Actor], None]) -> Actor:
        actor = Actor(f"{len(self.actors):02d}", role)
        self.actors.append(actor)
        return actor

    def ledger(self, actor: Actor) -> Ledger:
        return self.kind(Stepped(actor, self.store), self.scratch, ["lpips"])

    # --- the roles ---

    def worker(self, actor: Actor) -> None:
        """Commit all units in random order; publish each shard once it is complete."""
        ledger = self.ledger(actor)
        for unit in self.chance.sample(self.units, len(self.units)):
            commit = commit_unit(ledger, unit, made(unit, actor.name), **self._names(actor.name))
            assert commit.unit == unit.id
            ledger.publish(unit.shard, self.shards[unit.shard])

    def retrier(self, actor: Actor) -> None:
        """`run --retry-failed`: try the failed samples of every unit again."""
        ledger = self.ledger(actor)
        for unit in self.chance.sample(self.units, len(self.units)):
            standing = ledger.committed(unit.id)
            if standing is not None and standing.failed:
                outcomes = [self._again(outcome, actor.name) for outcome in ledger.outcomes(standing)]
                its = standing.generation + 1
                commit_unit(ledger, unit, outcomes, generation=its, **self._names(actor.name))
            ledger.publish(unit.shard, self.shards[unit.shard])

    def attempter(self, actor: Actor) -> None:
        """A worker of a run in which only the driver commits."""
        ledger = self.ledger(actor)
        for unit in self.chance.sample(self.units, len(self.units)):
            standing = ledger.committed(unit.id)
            if standing is None:
                outcomes = made(unit, actor.name)
            elif standing.failed:
                outcomes = [self._again(outcome, actor.name) for outcome in ledger.outcomes(standing)]
            else:
                continue
            its = 0 if standing is None else standing.generation + 1
            self.inbox.append(ledger.attempt(unit, outcomes, generation=its, **self._names(actor.name)))

    def driver(self, actor: Actor) -> None:
        ledger = self.ledger(actor)
        while self.inbox or any(other is not actor and not other.ended for other in self.actors):
            if self.inbox:
                unit = self.units[ledger.decide(self.inbox.pop(0)).unit]
                ledger.publish(unit.shard, self.shards[unit.shard])
            actor.step()

    def _names(self, worker: str) -> dict[str, Any]:
        """Arguments of an attempt; they depend on the seed alone, so that a schedule that failed fails again."""
        return {"worker": worker, "seconds": 1.0, "attempt": f"{self.chance.getrandbits(48):012x}"}

    def _again(self, outcome: Outcome, salt: str) -> Outcome:
        if outcome.succeeded:
            return outcome
        tries = outcome.attempts + 1
        if self.chance.random() < 0.5:
            return replace(outcome, attempts=tries)
        return replace(one(outcome.key, salt), attempts=tries)

    # --- the invariants ---

    def check_now(self) -> None:
        commits = self.store.read_all(self.store.list(COMMITS))
        newest: dict[int, Commit] = {}
        for data in commits.values():
            commit = Commit.from_json(data)
            assert self.seen.setdefault((commit.unit, commit.generation), data) == data, "a commit changed"
            if commit.unit not in newest or newest[commit.unit].generation < commit.generation:
                newest[commit.unit] = commit
        assert len(commits) == len(self.seen), "a commit is gone"
        for shard, units in self.shards.items():
            its = [newest[unit.id] for unit in units if unit.id in newest]
            data = self.store.read_all([published_file(shard)]).get(published_file(shard))
            record = None if data is None else Published.from_json(data)
            if record is not None and record.made_of(its):
                for path, file in self.store.read_all(record.paths.values()).items():
                    kind = "tar" if path == record.tar else "parquet"
                    proof = FileDigest.of(file)
                    if proof.bytes == record.files[kind].bytes:
                        assert proof == record.files[kind], f"{path} is not what its record says"

    def check_end(self) -> None:
        """Finish the run without faults, then check all invariants."""
        ledger = self.kind(self.store, self.scratch, ["lpips"])
        for unit in self.units:
            commit_unit(ledger, unit, made(unit, "end"), **self._names("end"))
        for shard, units in self.shards.items():
            assert ledger.publish(shard, units) is not None
        self.check_now()
        commits = ledger.commits()
        assert sorted(commits) == [unit.id for unit in self.units]
        assert {unit: commit.generation for unit, commit in commits.items()} == {
            unit: max(nth for other, nth in self.seen if other == unit) for unit in commits
        }
        publications = ledger.publications()
        assert list(publications) == list(self.shards)
        for shard, record in publications.items():
            its = [commits[unit.id] for unit in self.shards[shard]]
            assert record.made_of(its)
            assert record.generation == max(commit.generation for commit in its)
            keys = [key for unit in self.shards[shard] for key in keys_of(unit)]
            stamps = {(commit.unit, commit.generation, commit.attempt, commit.worker) for commit in its}
            check_files(self.store, record, keys, stamps)
        for name in self.store.list(GENERATIONS):
            if name.endswith(".json"):
                kept = Published.from_json(self.store.read(name))
                root = name.partition("/published/")[0]
                check_files(
                    self.store, kept, [key for unit in self.shards[kept.shard] for key in keys_of(unit)], root=root
                )
        assert list(self.scratch.iterdir()) == []


def check_files(
    store: Store, record: Published, keys: Sequence[str], stamps: set[tuple[object, ...]] | None = None, root: str = ""
) -> None:
    """Check that every key is there once, in order, that tar and Parquet agree, and that both match the record."""
    paths = {kind: f"{root}/{path}".lstrip("/") for kind, path in record.paths.items()}
    for kind, path in paths.items():
        assert FileDigest.of(store.read(path)) == record.files[kind], path
    with store.open_read(paths["parquet"]) as file:
        rows = read_rows(file)
    with store.open_read(paths["tar"]) as file:
        found = [(key, hashlib.sha256(fields["webp"]).hexdigest()) for key, fields in read_tar(file)]
    assert [row["key"] for row in rows] == list(keys)
    assert found == [(row["key"], row["sha256"]) for row in rows if row["status"] == "success"]
    assert (record.samples, record.succeeded, record.failed) == (len(rows), len(found), len(rows) - len(found))
    assert sum(record.errors.values()) == record.failed
    if stamps is not None:
        assert {(row["unit"], row["generation"], row["attempt"], row["worker"]) for row in rows} == stamps


def keys_of(unit: Unit) -> list[str]:
    return [f"key-{number:04d}" for number in range(unit.start, unit.stop)]


def one(key: str, salt: str) -> Outcome:
    """A successful outcome, of equal length for every salt, so that sizes reveal nothing."""
    return Outcome(key, "a.tar", f"{key} {salt:>4}".encode(), "webp", metrics={"lpips": 0.25})


def made(unit: Unit, salt: str) -> list[Outcome]:
    return [
        one(key, salt) if number % 3 else Outcome(key, "a.tar", error_code="oom", error_message="too big")
        for number, key in enumerate(keys_of(unit), unit.start)
    ]


def plan(units: int, per_shard: int) -> list[Unit]:
    return [Unit(n, n // per_shard, 2 * n, 2 * n + 2) for n in range(units)]


def play(seed: int, store: Store, units: Sequence[Unit], scratch: Path, kind: type[Ledger] = Ledger) -> None:
    game = Play(seed, store, units, scratch, kind)
    pairs = len(units) // 2
    if store.has_create_only_put:
        game.run([game.worker, *[game.worker, game.retrier] * pairs, *[game.retrier] * (pairs - 1)])
    else:
        game.run([game.attempter] * (pairs + 1), game.driver)
    game.check_end()


@pytest.mark.parametrize("seed", SEEDS)
def test_any_schedule_on_disk(seed: int, tmp_path: Path) -> None:
    store = Store(tmp_path / "run", has_create_only_put=seed % 3 != 2)
    (tmp_path / "scratch").mkdir()
    play(seed, store, plan(4, 2), tmp_path / "scratch")


@pytest.mark.parametrize("seed", SEEDS)
def test_any_schedule_on_s3(seed: int, s3: Server, tmp_path: Path) -> None:
    store = Store(f"s3://{s3.bucket()}/run", s3.storage, has_create_only_put=seed % 3 != 2)
    play(seed, store, plan(2, 2), tmp_path)


class Overwriting(Ledger):
    """A ledger in which a later commit overwrites an earlier one."""

    def decide(self, commit: Commit) -> Commit:
        self.store.put(commit_file(commit.unit, commit.generation), commit.to_json())
        return commit


class FinalNamesFirst(Ledger):
    """A ledger that overwrites the final files, then the record, without checks for newer commits in between."""

    def _replace(self, old: object, new: Published, built: dict[str, Path], *_: object) -> bool:  # type: ignore[override]
        for kind, path in new.paths.items():
            self.store.put(path, built[kind])
        self.store.put(published_file(new.shard), new.to_json())
        return True


@pytest.mark.parametrize(
    ("kind", "seeds", "found"),
    [(Overwriting, (2, 3, 10), "a commit changed"), (FinalNamesFirst, (114, 161), "is not what its record says")],
)
def test_the_checker_finds_what_a_naive_ledger_does(
    kind: type[Ledger], seeds: Iterable[int], found: str, tmp_path: Path
) -> None:
    for seed in seeds:  # chosen because an actor wakes at a critical moment
        (tmp_path / f"{seed}").mkdir()
        with pytest.raises(AssertionError, match=found):
            play(seed, Store(tmp_path / f"run-{seed}"), plan(4, 2), tmp_path / f"{seed}", kind)
