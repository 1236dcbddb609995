"""The ledger's guarantees when processes die, race or meet a full disk.

1. every planned sample is a row of its published shard, exactly once, in plan order
2. a shard's tar and Parquet come from the same attempts: the digest in each row is that of the bytes in the tar
3. a commit never changes; the loser of a race gets the winner's commit
4. a half-written file never counts as finished, and an error leaves no temporary files
5. the published tar depends on the outcomes alone, not on attempts, workers or the size of units
6. a retry replaces earlier results by one commit per unit, and the replaced files are kept

`test_ledger_model.py` tests the first four under random schedules.

The file exceeds 400 lines because all guarantees are tested on one set of actions.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from support.ledgers import commit_unit
from support.making import leftovers, outcome, outcomes_of

from smsbatch.data import shards
from smsbatch.data.sample import Outcome, Unit
from smsbatch.data.shards import read_rows, read_tar, write_tar
from smsbatch.errors import StorageError
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.records import Commit, FileDigest, Published, new_attempt
from smsbatch.storage.store import Store


def cut(samples: int, per_unit: int, per_shard: int) -> list[Unit]:
    starts = range(0, samples, per_unit)
    return [Unit(n, start // per_shard, start, min(start + per_unit, samples)) for n, start in enumerate(starts)]


def by_shard(units: list[Unit]) -> dict[int, list[Unit]]:
    return {shard: [unit for unit in units if unit.shard == shard] for shard in {unit.shard for unit in units}}


def finish(ledger: Ledger, units: list[Unit], salt: str = "") -> None:
    done = ledger.commits()
    for unit in units:
        if unit.id not in done:
            commit_unit(ledger, unit, outcomes_of(unit, salt), worker="w", seconds=1.0)
    for shard, its in by_shard(units).items():
        assert ledger.publish(shard, its) is not None


def check_published(store: Store, units: list[Unit]) -> None:
    """Check guarantees 1 and 2 from the published files and the commits alone."""
    ledger = Ledger(store)
    commits = ledger.commits()
    for shard, its in by_shard(units).items():
        record = ledger.published(shard)
        assert record is not None
        with store.open_read(record.parquet) as file:
            rows = read_rows(file)
        assert [row["key"] for row in rows] == [f"key-{n:04d}" for unit in its for n in range(unit.start, unit.stop)]
        with store.open_read(record.tar) as file:
            found = {key: hashlib.sha256(fields["webp"]).hexdigest() for key, fields in read_tar(file)}
        assert found == {row["key"]: row["sha256"] for row in rows if row["status"] == "success"}
        assert {(row["unit"], row["attempt"]) for row in rows} == {(unit.id, commits[unit.id].attempt) for unit in its}
        assert (record.samples, record.succeeded, record.failed) == (len(rows), len(found), len(rows) - len(found))
        assert sum(commits[unit.id].failed for unit in its) == record.failed
        for path, proof in ((record.tar, record.files["tar"]), (record.parquet, record.files["parquet"])):
            data = store.read(path)
            assert FileDigest(hashlib.sha256(data).hexdigest(), len(data)) == proof


# --- without faults ---


def test_commit_and_publish(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    ledger = Ledger(store, tmp_path / "scratch", ["lpips"])
    units = cut(23, 4, 12)
    first = commit_unit(ledger, units[0], outcomes_of(units[0]), worker="gpu-1", seconds=2.5)
    assert (first.unit, first.samples, first.succeeded, first.failed) == (0, 4, 3, 1)
    assert (first.errors, first.worker, first.seconds) == ({"decode_error": 1}, "gpu-1", 2.5)
    assert first.finished.endswith("+00:00")
    assert ledger.committed(0) == first
    assert ledger.committed(1) is None
    assert ledger.publish(0, units[:3]) is None
    assert ledger.published(0) is None
    finish(ledger, units)
    check_published(store, units)
    assert list(ledger.commits()) == [0, 1, 2, 3, 4, 5]
    assert ledger.commits()[0] == first
    assert store.list("shards") == ["shards/000000.tar", "shards/000001.tar"]
    assert store.list("metrics") == ["metrics/000000.parquet", "metrics/000001.parquet"]
    assert leftovers(store) == []
    assert list((tmp_path / "scratch").iterdir()) == []


def test_records_survive_json() -> None:
    files = {"tar": FileDigest("ab", 1), "parquet": FileDigest("cd", 2)}
    commit = Commit(1, 2, "a", "wörker", 3, 1, 2, {"oom": 2}, 1.5, "2026-01-01T00:00:00+00:00", files)
    assert Commit.from_json(commit.to_json()) == commit
    published = Published(1, 2, ["a", "b"], 3, 1, 2, {"oom": 2}, 1.5, files)
    assert Published.from_json(published.to_json()) == published


def test_publishing_again_does_nothing_and_repairs_what_was_cut(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    units = cut(6, 3, 6)
    finish(ledger, units)
    tar = tmp_path / "shards" / "000000.tar"
    before = tar.read_bytes(), tar.stat().st_mtime_ns
    finish(ledger, units)
    assert (tar.read_bytes(), tar.stat().st_mtime_ns) == before
    os.truncate(tar, 512)
    assert ledger.published(0) is None
    finish(ledger, units)
    assert tar.read_bytes() == before[0]
    (tmp_path / "metrics" / "000000.parquet").unlink()
    finish(ledger, units)
    check_published(store, units)


def test_the_tar_depends_on_the_outcomes_alone(tmp_path: Path) -> None:
    tars = set()
    for per_unit in (1, 2, 3, 12):
        store = Store(tmp_path / f"{per_unit}")
        finish(Ledger(store), cut(12, per_unit, 12))
        tars.add(store.read("shards/000000.tar"))
    assert len(tars) == 1


def test_a_unit_of_failures_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    units = [Unit(0, 0, 3, 4)]
    finish(Ledger(store, metrics=["lpips"]), units)
    check_published(store, units)
    assert len(store.read("shards/000000.tar")) == 10_240


def test_one_outcome_per_sample(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    unit = Unit(0, 0, 0, 3)
    with pytest.raises(ValueError, match="has 3 samples, not 2"):
        commit_unit(ledger, unit, outcomes_of(unit)[:2], worker="w", seconds=1.0)
    with pytest.raises(ValueError, match="3 samples are planned, there are rows of 1, 3 in all"):
        commit_unit(ledger, unit, [outcome(0)] * 3, worker="w", seconds=1.0)
    assert Store(tmp_path).list() == []


# --- races ---


def test_the_loser_gets_the_winners_commit(tmp_path: Path) -> None:
    class Late(Store):
        """A store in which another process commits the unit just before this one."""

        def create(self, path: str, source: bytes | Path) -> bool:
            if path.startswith("_smsbatch/commits"):
                commit_unit(Ledger(Store(tmp_path)), unit, outcomes_of(unit, "other"), worker="other", seconds=9.0)
            return super().create(path, source)

    unit = Unit(0, 0, 0, 4)
    commit = commit_unit(Ledger(Late(tmp_path)), unit, outcomes_of(unit, "ours"), worker="ours", seconds=1.0)
    assert commit.worker == "other"
    assert commit == commit_unit(Ledger(Store(tmp_path)), unit, outcomes_of(unit, "third"), worker="third", seconds=1.0)
    finish(Ledger(Store(tmp_path)), [unit])
    check_published(Store(tmp_path), [unit])


def test_a_used_attempt_name_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger, unit = Ledger(store), Unit(0, 0, 0, 2)
    commit_unit(ledger, unit, outcomes_of(unit), worker="w", seconds=1.0, attempt="1")
    store.delete("_smsbatch/commits/000000.json")
    with pytest.raises(StorageError, match="an attempt's name must be new"):
        commit_unit(ledger, unit, outcomes_of(unit, "other"), worker="w", seconds=1.0, attempt="1")
    assert len({new_attempt() for _ in range(1000)}) == 1000


RACED = cut(12, 2, 6)


def race(root: Path, name: str, barrier: object) -> None:
    ledger = Ledger(Store(root))
    barrier.wait()  # type: ignore[attr-defined]
    for unit in RACED:
        commit_unit(ledger, unit, outcomes_of(unit, name), worker=name, seconds=1.0)
        ledger.publish(unit.shard, by_shard(RACED)[unit.shard])


def test_processes_that_race_for_the_same_units(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("spawn")
    barrier = processes.Barrier(3)
    racers = [processes.Process(target=race, args=(tmp_path, f"w{n}", barrier)) for n in range(3)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    check_published(Store(tmp_path), RACED)
    assert leftovers(Store(tmp_path)) == []


# --- deaths and full disks, at every point where something becomes durable ---


@contextmanager
def at_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Count the calls of fsync, link and rename, which make writes durable; call `act` before number `step`."""
    counted = itertools.count()

    def counting(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if next(counted) == step:
                act()
            return original(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "fsync"), (os, "link"), (Path, "replace")):
            patch.setattr(owner, name, counting(getattr(owner, name)))
        yield


UNIT = Unit(0, 0, 0, 4)


def die_at_every_step(root: Path) -> None:
    """Fork a child that is killed at its first step, one at its second, and so on until a child finishes."""
    for step in itertools.count():
        child = os.fork()
        if child == 0:
            try:
                with at_step(step, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                    finish(Ledger(Store(root / f"{step}")), [UNIT], "killed")
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            return


def test_a_process_killed_at_any_step_costs_nothing_but_its_attempt(tmp_path: Path) -> None:
    parent = multiprocessing.get_context("spawn").Process(target=die_at_every_step, args=(tmp_path,))  # has no threads
    parent.start()
    parent.join(300)
    assert parent.exitcode == 0
    roots = sorted(tmp_path.iterdir(), key=lambda root: int(root.name))
    committed, published = 0, 0
    for root in roots:
        store = Store(root)
        ledger = Ledger(store)
        commits = ledger.commits()  # readable at any moment
        committed += len(commits)
        published += ledger.published(0) is not None
        finish(ledger, [UNIT], "again")
        check_published(store, [UNIT])
        assert ledger.commits().items() >= commits.items()
        with store.open_read("shards/000000.tar") as file:
            assert all(fields["webp"].endswith(b"killed" if commits else b"again") for _, fields in read_tar(file))
    assert 0 < published < committed < len(roots)  # children died before the commit, and between commit and publication


def test_a_full_disk_at_any_step_is_one_clear_error_and_no_rubbish(tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for step in itertools.count():
        root = tmp_path / f"{step}"
        store = Store(root / "run")
        ledger = Ledger(store, root / "scratch")
        with at_step(step, full), suppress(StorageError):
            finish(ledger, [UNIT])
            break
        assert leftovers(store) == []
        assert not list((root / "scratch").iterdir())
        with at_step(step, full), pytest.raises(StorageError, match="No space left on device; free some space"):
            finish(Ledger(Store(root / "again")), [UNIT])
        finish(ledger, [UNIT])
        check_published(store, [UNIT])
    assert step > 10


# --- damaged files ---


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_an_attempt_that_is_not_what_was_committed_is_not_published(tmp_path: Path, kind: str, damage: str) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    commit = commit_unit(ledger, UNIT, outcomes_of(UNIT), worker="w", seconds=1.0)
    path = tmp_path / "_smsbatch" / "attempts" / "000000" / f"{commit.attempt}.{kind}"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[:-512] if damage == "cut" else data[:600] + bytes([data[600] ^ 1]) + data[601:])
    with pytest.raises(
        StorageError,
        match=rf"(is not what was committed|is gone, .*`gc --attempts`); run `smsbatch repair {tmp_path}`$",
    ):
        ledger.publish(0, [UNIT])
    assert store.list("shards") == store.list("metrics") == []
    store.delete("_smsbatch/commits/000000.json")  # as `repair` does, which keeps a copy
    finish(ledger, [UNIT])
    check_published(store, [UNIT])


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"files": {}, "unit": 0, "new": 1}', b'{"files": 3}'])
def test_a_commit_of_another_making_is_named(tmp_path: Path, data: bytes) -> None:
    store = Store(tmp_path)
    store.put("_smsbatch/commits/000000.json", data)
    with pytest.raises(
        StorageError, match=r"commits/000000\.json is empty, cut or of another version .*; run `smsbatch repair"
    ):
        Ledger(store).commits()


def test_a_damaged_commit_is_never_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    units = cut(6, 3, 6)
    for unit in units:
        commit_unit(ledger, unit, outcomes_of(unit), worker="w", seconds=1.0)
    os.truncate(tmp_path / "_smsbatch" / "commits" / "000001.json", 0)
    ledger = Ledger(store)  # a process has its own commits in memory and does not read them
    assert ledger.done() == {0, 1}  # from the names alone
    for act in (ledger.commits, lambda: ledger.committed(1), lambda: ledger.publish(0, units)):
        with pytest.raises(StorageError, match=r"commits/000001\.json is empty, cut or of another version"):
            act()
    assert store.list("shards") == []
    store.delete("_smsbatch/commits/000001.json")  # as `repair` does, which keeps a copy
    finish(ledger, units)
    check_published(store, units)


def test_a_damaged_record_of_a_shard_is_written_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    finish(ledger, [UNIT])
    record = ledger.published(0)
    os.truncate(tmp_path / "_smsbatch" / "published" / "000000.json", 40)
    assert ledger.published(0) is None
    assert ledger.publications() == {}
    assert ledger.publish(0, [UNIT]) == record
    assert ledger.publications() == {0: record}


def test_published_bytes_that_were_changed_are_replaced_when_asked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    finish(ledger, [UNIT])
    tar = tmp_path / "shards" / "000000.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])
    ledger.publish(0, [UNIT])
    assert tar.read_bytes() != data  # the length is right, so the change is not noticed
    ledger.publish(0, [UNIT], again=True)
    assert tar.read_bytes() == data
    check_published(store, [UNIT])


def test_publications_need_no_look_at_each_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    units = cut(24, 2, 4)
    finish(ledger, units)
    (tmp_path / "shards" / "000001.tar").unlink()
    os.truncate(tmp_path / "metrics" / "000002.parquet", 10)
    one_by_one = {shard: record for shard in range(6) if (record := ledger.published(shard)) is not None}
    monkeypatch.setattr(Store, "size", None)
    assert ledger.publications() == one_by_one
    assert list(one_by_one) == [0, 3, 4, 5]
    assert one_by_one[0].errors == {"decode_error": 1}
    assert one_by_one[0].seconds == 2.0


# --- generations ---


def retried(ledger: Ledger, unit: Unit, salt: str) -> list[Outcome]:
    """The committed outcomes of a unit, with a success in place of each failure."""
    standing = ledger.committed(unit.id)
    assert standing is not None
    return [
        item if item.succeeded else replace(outcome(int(item.key[4:]), salt), attempts=item.attempts + 1)
        for item in ledger.outcomes(standing)
    ]


def retry(ledger: Ledger, unit: Unit, salt: str = "retried") -> Commit:
    standing = ledger.committed(unit.id)
    assert standing is not None
    return commit_unit(
        ledger, unit, retried(ledger, unit, salt), worker="later", seconds=2.0, generation=standing.generation + 1
    )


@pytest.mark.parametrize("fields", [{}, {"Seg.png": b"mask", "json": b"{ }", "txt": b"\xff", "webp": b"the source"}])
def test_outcomes_come_back_as_they_were_committed(tmp_path: Path, fields: dict[str, bytes]) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store, metrics=["lpips", "clip"])
    good = Outcome(
        "ä", "s3://b/a.tar", b"x", "webp", caption="c", prompt="p", width=8, height=9, seed=2**64 - 1, seconds=1.5,
        source_sha256="ab", steps=3, original_key="Ä", attempts=2, metrics={"lpips": 0.1}, fields=fields,
    )  # fmt: skip
    same = replace(good, key="b", fields={"png": b"x"})  # a field with the same bytes as the result
    unit = Unit(3, 0, 0, 3)
    first = commit_unit(ledger, unit, [good, same, outcome(1, failed=True)], worker="w", seconds=1.0)
    found = ledger.outcomes(first)
    assert [item.key for item in found] == ["ä", "b", "key-0001"]
    assert found[0].metrics == pytest.approx({"lpips": 0.1})
    again = ledger.attempt(unit, found, worker="v", seconds=1.0, generation=1)
    assert again.files["tar"] == first.files["tar"]
    tables = []
    for commit in (first, again):
        with store.open_read(f"_smsbatch/attempts/000003/{commit.attempt}.parquet") as file:
            tables.append(read_rows(file))
    for old, new in zip(*tables, strict=True):
        assert new == old | {"attempt": again.attempt, "worker": "v", "generation": 1}


def test_a_retry_is_published_under_the_same_names_and_the_old_files_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    units = cut(12, 3, 6)
    finish(ledger, units)
    old = {name: store.read(name) for name in ("shards/000000.tar", "metrics/000000.parquet")}
    records = ledger.publications()
    commit = retry(ledger, units[1])
    assert (commit.generation, commit.failed, commit.worker) == (1, 0, "later")
    assert ledger.committed(1) == ledger.commits()[1] == commit
    assert ledger.done() == {0, 1, 2, 3}
    assert ledger.published(0) == records[0]  # valid until it is replaced
    assert not records[0].made_of([ledger.commits()[unit.id] for unit in units[:2]])
    finish(ledger, units)
    check_published(store, units)
    assert (ledger.publications()[0].generation, ledger.publications()[1]) == (1, records[1])
    assert {name: store.read(f"_smsbatch/generations/0/{name}") for name in old} == old
    assert Published.from_json(store.read("_smsbatch/generations/0/published/000000.json")) == records[0]
    with store.open_read("metrics/000000.parquet") as file:
        rows = read_rows(file)
    assert [row["generation"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert [row["attempts"] for row in rows] == [1, 1, 1, 2, 1, 1]  # only key 3 had failed
    assert leftovers(store) == []
    assert len(store.list("_smsbatch/generations")) == 3


def test_of_racing_retries_one_wins_and_an_older_one_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    finish(ledger, [UNIT])
    first = ledger.attempt(UNIT, retried(ledger, UNIT, "one"), worker="one", seconds=1.0, generation=1)
    second = ledger.attempt(UNIT, retried(ledger, UNIT, "two"), worker="two", seconds=1.0, generation=1)
    late = ledger.attempt(UNIT, outcomes_of(UNIT), worker="late", seconds=1.0)
    assert ledger.decide(second) == second == ledger.decide(first) == ledger.decide(late)
    with pytest.raises(StorageError, match=r"commits/000000\.g2\.json is gone"):
        ledger.decide(replace(first, generation=3))
    finish(ledger, [UNIT])
    check_published(ledger.store, [UNIT])


def test_an_attempt_that_was_collected_is_not_decided(tmp_path: Path) -> None:
    store = Store(tmp_path)
    ledger = Ledger(store)
    late = ledger.attempt(UNIT, outcomes_of(UNIT), worker="late", seconds=1.0)
    store.delete(f"_smsbatch/attempts/000000/{late.attempt}.tar")
    with pytest.raises(StorageError, match=r"\.tar is gone or cut; run again"):
        ledger.decide(late)
    assert ledger.done() == set()
    finish(ledger, [UNIT])
    assert ledger.decide(late) == ledger.committed(0)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_attempt_that_arrived_short_is_not_decided(tmp_path: Path, kind: str) -> None:
    """A store that keeps only a part of an upload is noticed at the decision; the upload does not read the size."""

    class Short(Store):
        def create(self, path: str, source: bytes | Path) -> bool:
            if path.endswith(kind) and isinstance(source, Path):
                source = source.read_bytes()[:-1]
            return super().create(path, source)

    with pytest.raises(StorageError, match=rf"\.{kind} is gone or cut; run again"):
        commit_unit(Ledger(Short(tmp_path)), UNIT, outcomes_of(UNIT), worker="w", seconds=1.0)
    assert Ledger(Store(tmp_path)).done() == set()


def test_a_disk_that_gives_back_other_bytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(path: Path, outcomes: Sequence[Outcome]) -> None:
        write_tar(path, outcomes)
        os.truncate(path, 600)

    monkeypatch.setattr(shards, "write_tar", cut_short)
    with pytest.raises(StorageError, match=r"unit\.tar: .*; check the disk and run again$"):
        commit_unit(Ledger(Store(tmp_path)), UNIT, outcomes_of(UNIT), worker="w", seconds=1.0)


class Counting(Store):
    """A store that counts the names requested from it."""

    asked = 0

    def size(self, path: str) -> int | None:
        self.asked += 1
        return super().size(path)

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        paths = list(paths)
        self.asked += len(paths)
        return super().read_all(paths)


@pytest.mark.parametrize(("at_once", "most"), [(1, 100), (16, 250)])
def test_whether_a_shard_is_complete_is_seldom_more_than_one_request(tmp_path: Path, at_once: int, most: int) -> None:
    """Workers begin units in order, and finish those in progress, at most `at_once`, in any order."""
    units, chance = cut(100, 1, 100), random.Random(0)
    order, waiting = [], list(units)
    while waiting:
        order.append(waiting.pop(chance.randrange(min(at_once, len(waiting)))))
    ledger = Ledger(Counting(tmp_path))
    assert isinstance(ledger.store, Counting)
    asked = 0
    for unit in order:
        before = ledger.store.asked
        assert ledger.publish(0, units) is None
        asked += ledger.store.asked - before
        commit_unit(ledger, unit, outcomes_of(unit), worker="w", seconds=1.0)
    assert asked <= most
    before = ledger.store.asked
    assert [commit.unit for commit in ledger._current(units) or ()] == [unit.id for unit in units]
    assert ledger.store.asked - before == 1 + 2 * len(units)


def test_commits_that_a_process_has_forgotten_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process keeps the last of its own commits in memory, so that publishing need not read them."""
    monkeypatch.setattr("smsbatch.runs.ledger._OWN", 2)
    store, units = Store(tmp_path / "run"), cut(6, 1, 6)
    ledger = Ledger(store)
    for unit in units:
        commit_unit(ledger, unit, outcomes_of(unit), worker="w", seconds=1.0)
    assert list(ledger._own) == [4, 5]
    ledger.publish(0, units)
    check_published(store, units)


def test_outcomes_that_were_collected_are_named(tmp_path: Path) -> None:
    ledger = Ledger(Store(tmp_path))
    commit = commit_unit(ledger, UNIT, outcomes_of(UNIT), worker="w", seconds=1.0)
    ledger.store.delete(f"_smsbatch/attempts/000000/{commit.attempt}.tar")
    with pytest.raises(
        StorageError, match=r"\.tar is gone, .*`gc --attempts`; samples of unit 000000 cannot be tried again"
    ):
        ledger.outcomes(commit)


class Zombie(Store):
    """A store that pauses before a create or delete of a name until others have published, and may die after it."""

    def __init__(self, root: Path, name: str, meanwhile: Callable[[], object], dies: bool) -> None:
        super().__init__(root)
        self.name, self.meanwhile, self.dies = name, meanwhile, dies

    def _sleep(self, path: str) -> bool:
        if path != self.name:
            return False
        self.name = ""
        self.meanwhile()
        return self.dies

    def create(self, path: str, source: bytes | Path) -> bool:
        dies = self._sleep(path)
        created = super().create(path, source)
        if dies:
            raise InterruptedError
        return created

    def delete(self, path: str) -> None:
        dies = self._sleep(path)
        super().delete(path)
        if dies:
            raise InterruptedError


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("name", ["shards/000000.tar", "metrics/000000.parquet", "_smsbatch/published/000000.json"])
@pytest.mark.parametrize("begun", [False, True])
def test_a_publisher_that_wakes_after_a_newer_one_leaves_no_lie(
    begun: bool, name: str, dies: bool, tmp_path: Path
) -> None:
    """If `begun`, the paused publisher replaces a publication, and so may delete the files that it finds."""
    ledger = Ledger(Store(tmp_path))
    commit_unit(ledger, UNIT, outcomes_of(UNIT, "first"), worker="w", seconds=1.0)
    if begun:
        ledger.publish(0, [UNIT])
        unsettled = retried(ledger, UNIT, "again")[:-1]
        unsettled.append(Outcome("key-0003", "src.tar", error_code="oom"))
        commit_unit(ledger, UNIT, unsettled, worker="w", seconds=1.0, generation=1)

    def meanwhile() -> None:
        retry(ledger, UNIT)
        assert ledger.publish(0, [UNIT]) is not None

    zombie = Ledger(Zombie(tmp_path, name, meanwhile, dies))
    with suppress(StorageError, InterruptedError):
        zombie.publish(0, [UNIT])
    if ledger.published(0) is not None:
        check_published(ledger.store, [UNIT])
    else:
        assert dies
        assert begun
    finish(ledger, [UNIT])
    check_published(ledger.store, [UNIT])
