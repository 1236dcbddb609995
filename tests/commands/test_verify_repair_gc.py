"""A finished run with every kind of damage to its files: verify finds it, and repair restores the same bytes.

The file exceeds 400 lines because verify, repair and gc meet the same table of damage.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.damage import cut_in_half, files_of, flip, torn
from support.jobs import make_photos, tars, write_manifest
from support.ledgers import commit_unit
from support.made_up_run import MIXED, finish, make_run, picture, stylized
from support.s3server import Server

import smsbatch as sb
from smsbatch.commands.gc import Heap, gc
from smsbatch.commands.repair import repair
from smsbatch.commands.verify import verify
from smsbatch.data.index import read_units
from smsbatch.report.write import write_report
from smsbatch.runs.heartbeat import HEARTBEATS
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.rebuild import rebuild
from smsbatch.runs.records import FileDigest, dump_record
from smsbatch.runs.run import Run, of_output, store_of
from smsbatch.storage.scratch import scratch_folder
from smsbatch.storage.store import Store

TAR, PARQUET = "shards/000000.tar", "metrics/000000.parquet"
RECORD = "_smsbatch/published/000000.json"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, where `gc` looks, without what other processes have left there."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run of 12 made-up samples in 3 units and 2 shards, 3 failed; its units cannot be recomputed."""
    return finish(tmp_path)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    """A finished run of 6 samples in 3 units and 2 shards that can be recomputed."""
    folder = tmp_path_factory.mktemp("real")
    manifest = sb.load(write_manifest(folder, model, lora, make_photos(folder / "photos")))
    sb.run(manifest)
    return Path(manifest.output.path)


@pytest.fixture
def real_copy(real: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(real, tmp_path / "copy"))


def files(out: Path) -> dict[str, bytes]:
    """The bytes of the published files, of their records and of index.json, by path."""
    names = [*out.glob("shards/*"), *out.glob("metrics/*"), out / "index.json", *out.glob("_smsbatch/published/*")]
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(names)}


# ---------------------------------------------------------------------------------------------------- kinds of damage


def cut_at_a_member(path: Path) -> None:
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-3]
    path.write_bytes(path.read_bytes()[: last.offset])


def replace_an_image(path: Path) -> None:
    """Replace the first image by another valid picture of the same number of bytes, which only digests reveal."""
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    (first, _), *_ = [item for item in members if item[0].name.endswith(".png")]
    size = first.size
    other = picture(4242)
    while len(other) < size:
        other += b"\0"  # a PNG may have padding after its end
    data = bytearray(path.read_bytes())
    data[first.offset_data : first.offset_data + size] = other[:size]
    path.write_bytes(data)


def drop_a_row(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


def forge_the_record(path: Path) -> None:
    record = json.loads(path.read_text())
    path.write_bytes(dump_record(record | {"samples": 7, "failed": record["failed"] - 1}))


HURTS: dict[str, tuple[str, Callable[[Path], None], str, bool]] = {
    "tar gone": (TAR, Path.unlink, "is gone", False),
    "tar cut": (TAR, cut_in_half, "bytes, published with", False),
    "tar cut at a member": (TAR, cut_at_a_member, "bytes, published with", False),
    "tar flipped": (TAR, flip, "its SHA-256 differs", True),
    "image replaced": (TAR, replace_an_image, "is not the picture of its row", True),
    "end of tar overwritten": (TAR, lambda path: flip(path, 0.99999), "its SHA-256 differs", True),
    "parquet gone": (PARQUET, Path.unlink, "is gone", False),
    "parquet cut": (PARQUET, cut_in_half, "bytes, published with", False),
    "parquet flipped": (PARQUET, lambda path: flip(path, 0.1), "its SHA-256 differs", True),
    "parquet without footer": (PARQUET, lambda path: flip(path, 0.9999), "cannot be read", False),
    "row gone": (PARQUET, drop_a_row, "bytes, published with", False),
    "record gone": (RECORD, Path.unlink, "is gone", False),
    "record torn": (RECORD, torn, "is no record of this version", False),
    "record forged": (RECORD, forge_the_record, "counts 7 samples", False),
    "index.json forged": ("index.json", torn, "is not what was written", False),
    "stranger among the shards": (
        "shards/other.tar",
        lambda path: path.write_bytes(b"x") and None,
        "is no file of this run",
        False,
    ),
}


@pytest.mark.parametrize("name", HURTS)
def test_what_is_hurt_is_seen_and_mended_to_the_same_bytes(name: str, out: Path) -> None:
    place, hurt, said, full = HURTS[name]
    before = files(out)
    hurt(out / place)
    assert files(out) != before
    found = verify(str(out), full=full)
    assert not found.ok
    assert [problem.place for problem in found.problems] == [place], found.problems
    assert said in found.problems[0].what
    if full:
        assert verify(str(out)).ok, "seen by sizes and counts, so it need not be full"

    told = repair(str(out), full=full, dry_run=True)
    assert told.after is None
    assert len(told.done) == 1
    assert not verify(str(out), full=full).ok

    mended = repair(str(out), full=full)
    assert mended.ok
    assert mended.done == told.done
    assert files(out) == before
    assert verify(str(out), full=True).ok


def test_a_whole_run_is_well_by_both_looks(out: Path) -> None:
    for full in (False, True):
        found = verify(str(out), full)
        assert found.ok, found.problems
        assert found.pending == ()
        assert (found.units, found.units_done, found.shards, found.shards_published) == (3, 3, 2, 2)
        assert (found.samples, found.samples_done, found.files, found.without_attempts) == (12, 12, 4, 0)
        assert found.bytes == sum(
            path.stat().st_size for folder in ("shards", "metrics") for path in out.glob(f"{folder}/*")
        )
    assert repair(str(out)).done == ()
    assert json.loads(json.dumps(found.to_dict()))["ok"]


def test_a_footer_of_too_few_rows(out: Path) -> None:
    drop_a_row(out / PARQUET)
    record = json.loads((out / RECORD).read_text())
    record["files"]["parquet"]["bytes"] = (out / PARQUET).stat().st_size
    (out / RECORD).write_bytes(dump_record(record))
    assert "metrics/000000.parquet: has 7 rows, but 8 are planned; repair publishes its shard again" in map(
        str, verify(str(out)).problems
    )
    assert repair(str(out)).ok


def test_rows_of_other_samples_are_named(out: Path) -> None:
    """Files match their recorded digests but not the plan; only a mistake in publishing could cause that."""
    table = pq.read_table(out / PARQUET)
    keys = pa.array(["stranger", *table["key"].to_pylist()[1:]])
    forged = table.set_column(0, table.schema.field("key"), keys)
    pq.write_table(forged, out / PARQUET)
    record = json.loads((out / RECORD).read_text())
    proof = FileDigest.of(out / PARQUET)
    record["files"]["parquet"] = {"sha256": proof.sha256, "bytes": proof.bytes}
    (out / RECORD).write_bytes(dump_record(record))
    (out / "index.json").unlink()
    found = {problem.place: problem for problem in verify(str(out), full=True).problems}
    assert "p000 is planned, but missing" in found[PARQUET].what
    assert "stranger is among the rows, but missing" in found[TAR].what
    assert found.pop("index.json").remedy == "report"
    assert {problem.remedy for problem in found.values()} == {"recompute"}


def test_strangers_are_kept(out: Path) -> None:
    (out / "metrics" / "notes.txt").write_text("mine")
    assert repair(str(out)).ok
    (kept,) = (out / "_smsbatch" / "foreign").rglob("notes.txt")
    assert kept.read_text() == "mine"
    assert gc(str(out)).objects == 0


def test_an_unfinished_run_is_no_problem(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False)
    empty = verify(store.url)
    assert empty.ok
    assert empty.pending == ("units without a commit: 3 of 3",)
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    for unit in units[:2]:
        commit_unit(ledger, unit, MIXED[unit.start : unit.stop], worker="w", seconds=1.0)
    assert verify(store.url).pending == ("units without a commit: 1 of 3", "complete shards that are not published: 1")
    ledger.publish(0, units[:2])
    found = verify(store.url, full=True)
    assert found.ok, found.problems
    assert found.pending == ("units without a commit: 1 of 3",)
    assert (found.units_done, found.shards_published, found.samples_done) == (2, 1, 8)


def test_an_attempt_that_is_still_needed(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False)
    unit = read_units(store)[0]
    commit = commit_unit(Ledger(store, metrics=("lpips",)), unit, MIXED[:4], worker="w", seconds=1.0)
    store.delete(f"_smsbatch/attempts/000000/{commit.attempt}.tar")
    (problem,) = verify(store.url).problems
    assert (problem.unit, problem.remedy) == (0, "recompute")
    assert "is gone" in problem.what


def test_an_attempt_in_reserve_may_be_gone_and_is_put_aside_when_damaged(out: Path) -> None:
    first, second = sorted((out / "_smsbatch" / "attempts" / "000000").iterdir())
    before = files(out)
    flip(second)
    assert verify(str(out)).ok
    (problem,) = verify(str(out), full=True).problems
    assert problem.remedy == "aside"
    assert repair(str(out), full=True).ok
    first.unlink()
    found = verify(str(out), full=True)
    assert found.ok
    assert found.without_attempts == 1
    assert files(out) == before


def test_a_mark_of_success_that_is_missing_is_work_to_do_unless_failures_withhold_it(tmp_path: Path) -> None:
    for name, errors, told in (
        ("strict", {"max_failed_fraction": 0.1}, ()),
        ("lenient", {"max_failed_fraction": 0.5}, ("the mark of success: `smsbatch run` judges the failures",)),
    ):
        (tmp_path / name).mkdir()
        store = make_run(tmp_path / name, MIXED, errors=errors)
        write_report(Run.open(store))
        found = verify(store.url, full=True)
        assert found.ok
        assert tuple(line.partition(" and ")[0] for line in found.pending) == told


def test_no_run_here(tmp_path: Path) -> None:
    for verb in (verify, repair, gc):
        with pytest.raises(sb.RequestError, match="no run here"):
            verb(str(tmp_path))


# -------------------------------------------------------------------------------------------------------- recomputing


def attempt_of(out: Path, unit: int) -> list[Path]:
    return sorted((out / "_smsbatch" / "attempts" / f"{unit:06d}").iterdir())


def lose_attempt_and_shard(out: Path) -> None:
    attempt_of(out, 1)[0].unlink()
    (out / TAR).unlink()


def damage_attempt_and_shard(out: Path) -> None:
    flip(attempt_of(out, 1)[1])
    flip(out / TAR)


def lose_attempt_and_commit(out: Path) -> None:
    attempt_of(out, 1)[0].unlink()
    (out / "_smsbatch/commits/000001.json").unlink()


def damage_attempt_and_commit(out: Path) -> None:
    flip(attempt_of(out, 1)[1])
    torn(out / "_smsbatch/commits/000001.json")


@pytest.mark.parametrize(
    "hurt", [lose_attempt_and_shard, damage_attempt_and_shard, lose_attempt_and_commit, damage_attempt_and_commit]
)
def test_what_cannot_be_published_again_is_computed_again(hurt: Callable[[Path], None], real_copy: Path) -> None:
    before = tars(real_copy)
    hurt(real_copy)
    assert not verify(str(real_copy), full=True).ok
    mended = repair(str(real_copy), full=True)
    assert mended.ok, mended.after
    assert "compute unit 000001 again" in mended.done
    assert tars(real_copy) == before
    assert verify(str(real_copy), full=True).ok
    if hurt is not lose_attempt_and_commit:
        assert list((real_copy / "_smsbatch" / "superseded").rglob("000001.json")), "the old proof is kept"


def forge_the_time(path: Path) -> None:
    commit = json.loads(path.read_text())
    path.write_text(json.dumps(commit | {"seconds": 0.1}, indent=1))


@pytest.mark.parametrize("hurt", [Path.unlink, torn, flip, forge_the_time])
@pytest.mark.parametrize("published", [True, False])
def test_a_commit_is_made_again_from_its_attempt(hurt: Callable[[Path], None], published: bool, out: Path) -> None:
    """With the same bytes. The units of this run cannot be computed again."""
    place = "_smsbatch/commits/000001.json"
    if not published:
        (out / RECORD).unlink()
    before = {name: data for name, data in files_of(out).items() if name != RECORD}
    record = files(out).get(RECORD)
    hurt(out / place)
    found = [problem for problem in verify(str(out)).problems if problem.place == place]
    assert [problem.remedy for problem in found] == ["commit"]
    if place in files_of(out):
        with pytest.raises(sb.StorageError, match=f"{place} is empty, cut or of another version"):
            Run.open(str(out)).ledger.commits()
    mended = repair(str(out))
    assert mended.ok, mended
    assert "make the commit of unit 000001 again from its attempt" in mended.done
    after = {name: data for name, data in files_of(out).items() if "superseded" not in name and name != RECORD}
    assert after == before
    assert record in (None, files(out)[RECORD])


def test_nothing_tells_which_of_two_attempts_won(tmp_path: Path) -> None:
    """Without a record of the shard the commit is not made of either, and the unit is computed again."""
    store = make_run(tmp_path, MIXED, commit=False)
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    commit = commit_unit(ledger, units[0], MIXED[:4], worker="w", seconds=1.0)
    assert rebuild(ledger, 0, 0) == commit
    assert rebuild(ledger, 0, 0, "another") is None
    other = ledger.attempt(units[0], MIXED[:4], worker="slow", seconds=1.0)
    assert rebuild(ledger, 0, 0) is None
    assert rebuild(ledger, 0, 0, other.attempt) == other
    store.put(f"_smsbatch/attempts/000000/{commit.attempt}.tar", b"x")
    assert rebuild(ledger, 0, 0) == other


def test_a_commit_that_would_publish_other_bytes_is_not_made(out: Path) -> None:
    """The attempt is whole, but not the one that was published under this name."""
    place = attempt_of(out, 1)
    store, attempt = Store(str(out)), place[0].stem
    (out / "_smsbatch/commits/000001.json").unlink()
    for path in place:
        path.unlink()
    others = [stylized(number, seconds=9.0) for number in range(4, 8)]
    Ledger(store, metrics=("lpips",)).attempt(read_units(store)[1], others, worker="w", seconds=1.0, attempt=attempt)
    told = repair(str(out), dry_run=True)
    assert told.done == ("compute unit 000001 again",)


@pytest.mark.parametrize("name", ["units.parquet", "samples.parquet", "objects.parquet", "digests.json"])
def test_a_plan_that_is_damaged_is_made_again(name: str, real_copy: Path) -> None:
    before = files_of(real_copy)
    torn(real_copy / "plan" / name)
    (problem,) = verify(str(real_copy), full=True).problems
    assert (problem.place, problem.remedy) == (f"plan/{name}", "plan")
    assert repair(str(real_copy), full=True).ok
    assert files_of(real_copy) == before


# ----------------------------------------------------------------------------------------------------------------- gc


def age(path: Path) -> None:
    os.utime(path, (time.time() - 7200,) * 2)


def test_gc_removes_what_nothing_needs_and_keeps_what_may_be_work_in_hand(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False)
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    lost = ledger.attempt(units[0], MIXED[:4], worker="slow", seconds=1.0)
    commit_unit(ledger, units[0], MIXED[:4], worker="w", seconds=1.0)
    old = ledger.attempt(units[1], MIXED[4:8], worker="dead", seconds=1.0)
    young = ledger.attempt(units[1], MIXED[4:8], worker="busy", seconds=1.0)
    again = ledger.attempt(units[0], MIXED[:4], worker="busy", seconds=1.0, generation=1)
    for path in store.list("_smsbatch/attempts"):
        if lost.attempt in path or old.attempt in path:
            age(Path(store.locate(path)))
    for name in ("old", "young"):
        store.put(f"_smsbatch/tmp/{name}", b"123")
    age(Path(store.locate("_smsbatch/tmp/old")))
    store.put("_smsbatch/superseded/x/commits/000000.json", b"{}")
    store.put(f"{HEARTBEATS}/dead.json", json.dumps({"time": time.time() - 1000}).encode())

    before = set(store.list())
    told = gc(store.url, dry_run=True)
    assert set(store.list()) == before
    found = gc(store.url)
    assert found.heaps == told.heaps
    gone = before - set(store.list())
    assert gone == {
        *(f"_smsbatch/attempts/000000/{lost.attempt}.{kind}" for kind in ("tar", "parquet")),
        *(f"_smsbatch/attempts/000001/{old.attempt}.{kind}" for kind in ("tar", "parquet")),
        "_smsbatch/tmp/old",
        "_smsbatch/superseded/x/commits/000000.json",
        f"{HEARTBEATS}/dead.json",
    }
    assert ledger.decide(again) == again, "a retry that is about to be decided"
    assert young.attempt
    assert found.objects == len(gone)
    assert verify(store.url, full=True).ok


def test_gc_removes_the_folders_of_killed_processes(out: Path, temporary: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    living = scratch_folder("unit")
    dead = temporary / Path(living.name).name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
    dead.mkdir()
    (dead / "unit.tar").write_bytes(b"123")
    told = gc(str(out), dry_run=True)
    assert told.heaps == (Heap("folders of killed processes on this machine", 1, 3),)
    assert dead.exists()
    assert gc(str(out)).heaps == told.heaps
    assert list(temporary.iterdir()) == [Path(living.name)]
    living.cleanup()


def test_gc_of_attempts_leaves_the_published_files(out: Path) -> None:
    before = files(out)
    cut_in_half(out / "shards/000001.tar")  # a shard that is not whole keeps its attempts
    found = gc(str(out), attempts=True)
    assert {heap.kind: heap.objects for heap in found.heaps} == {"attempts of published shards": 4}
    assert repair(str(out)).ok
    assert gc(str(out), attempts=True).objects == 2
    assert files(out) == before
    found_then = verify(str(out), full=True)
    assert found_then.ok
    assert found_then.without_attempts == 3


def test_gc_of_an_older_generation(out: Path) -> None:
    store = Store(str(out))
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    again = [stylized(n) for n in range(4)]
    commit_unit(ledger, units[0], again, worker="w", seconds=1.0, generation=1)
    assert verify(str(out)).pending == ("published shards with newer commits: 1",)
    assert gc(str(out), dry_run=True).objects == 0, "the older attempt lost, but is young"
    for path in out.glob("_smsbatch/attempts/*/*"):
        age(path)
    assert gc(str(out), dry_run=True).objects == 2
    ledger.publish(0, units[:2])
    write_report(Run.open(store))
    kinds = {heap.kind: heap.objects for heap in gc(str(out)).heaps}
    assert kinds == {"attempts that lost": 2, "older generations": 3}
    found = verify(str(out), full=True)
    assert found.ok, found.problems
    assert found.without_attempts == 0


def test_neither_starts_while_a_driver_is_at_work(out: Path) -> None:
    store = Store(str(out))
    store.put(f"{HEARTBEATS}/busy-1.json", json.dumps({"time": time.time()}).encode())
    (out / TAR).unlink()
    assert repair(str(out), dry_run=True).done == ("publish shard 000000 again",)
    with pytest.raises(sb.RequestError, match="busy-1, is at work"):
        repair(str(out))
    with pytest.raises(sb.RequestError, match="--force"):
        gc(str(out))
    assert gc(str(out), force=True).objects == 0
    assert store.exists(f"{HEARTBEATS}/busy-1.json")


def test_gc_wants_records_it_can_read(out: Path) -> None:
    torn(out / RECORD)
    with pytest.raises(sb.RequestError, match="smsbatch repair"):
        gc(str(out))


# ----------------------------------------------------------------------------------------------------------------- S3


def test_the_same_on_s3(out: Path, s3: Server) -> None:
    """A run is moved by copying it: verify, repair and gc use the present location of the copy."""
    url = f"s3://{s3.bucket()}/run"
    s3.upload(out, f"{url}/")
    manifest = of_output(url, {"endpoint": s3.endpoint, "region": "us-east-1"})
    before = s3.objects(f"{url}/")
    assert verify(manifest, full=True).ok
    store = store_of(manifest)
    store.delete(TAR)
    store.put(PARQUET, b"x" * len(before[PARQUET]))
    assert {problem.place for problem in verify(manifest).problems} == {TAR, PARQUET}
    assert repair(manifest).ok
    after = s3.objects(f"{url}/")
    for name in (TAR, PARQUET, RECORD):
        assert after[name] == before[name]
    assert gc(manifest, attempts=True).objects == 6
    assert verify(manifest, full=True).ok
