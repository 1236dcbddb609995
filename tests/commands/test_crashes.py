"""Runs whose processes are killed at random moments until they finish have the bytes of an undisturbed run.

Also two drivers at once on one output. Processes and signals are real; seeds choose the moments, as far as the
scheduling of processes allows.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.faults import Bucket, Disk, Life, Output, check_end, check_whole, descendants, disturb, until
from support.jobs import commits, make_photos, write_manifest
from support.s3server import Server

import smsbatch as sb

PHOTOS = [f"photo-{number:02}" for number in range(8)]
IN_PLACE = {"url"}  # columns that depend on where the source is stored


@pytest.fixture(autouse=True)
def _no_life_is_left() -> Iterator[None]:
    yield
    Life.end_all()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of eight pictures, one of them broken."""
    folder = make_photos(tmp_path_factory.mktemp("source") / "photos", PHOTOS)
    (folder / "photo-05.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path, photos: Path) -> Callable[..., Path]:
    """A factory of manifests with eight units of eight steps, long enough to be killed in; half the rows may fail."""

    def make(output: str | None = None, **sections: dict[str, Any]) -> Path:
        where = {"path": output} if output else {}
        return write_manifest(
            tmp_path,
            model,
            lora,
            photos,
            objective={"steps": 8},
            output={"samples_per_unit": 1, **where},
            errors={"max_failed_fraction": 0.5},
            **sections,
        )

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path, photos: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    manifest = write_manifest(
        folder,
        model,
        lora,
        photos,
        objective={"steps": 8},
        output={"samples_per_unit": 1},
        errors={"max_failed_fraction": 0.5},
    )
    sb.run(sb.load(manifest))
    return folder / "out"


def _places(place: str, tmp_path: Path, s3: Server) -> tuple[Output, dict[str, Any]]:
    """The output on disk or in a bucket, and the sections of the manifest that select it."""
    if place == "disk":
        return Disk(tmp_path / "out"), {}
    url = f"s3://{s3.bucket()}/runs/trial"
    return Bucket(s3, url), {"output": url, "storage": {"endpoint": s3.endpoint, "region": s3.storage.region}}


@pytest.mark.parametrize(
    ("place", "seed", "deaths", "stride"),
    [
        ("disk", 0, 1, 20),
        ("s3", 7, 1, 20),
        pytest.param("disk", 1, 4, 9, marks=pytest.mark.slow),
        pytest.param("s3", 3, 4, 9, marks=pytest.mark.slow),
    ],
)
def test_a_driver_that_is_killed_again_and_again(
    place: str,
    seed: int,
    deaths: int,
    stride: int,
    job: Callable[..., Path],
    undisturbed: Path,
    tmp_path: Path,
    s3: Server,
) -> None:
    output, sections = _places(place, tmp_path, s3)
    manifest = job(**sections)
    seen: dict[str, str] = {}

    def check() -> None:
        """After every kill, committed files are whole and earlier commits keep their attempts."""
        out = output.local(tmp_path)
        check_whole(out)
        now = {name: commit["attempt"] for name, commit in commits(out).items()}
        assert seen.items() <= now.items()
        seen.update(now)

    killed = disturb(lambda: Life(manifest), output, deaths, stride, seed, check)
    assert killed >= min(deaths, 2)
    assert seen, "it was killed only before it had done anything"
    check()
    check_end(output.local(tmp_path), undisturbed)


def test_a_driver_that_is_interrupted_leaves_in_order(job: Callable[..., Path], tmp_path: Path) -> None:
    """SIGINT with the local pool; `tests/cluster/test_deaths.py` tests fresh processes, both pools and both signals."""
    out, driver = tmp_path / "out", Life(job())
    until(lambda: driver.ended or bool(commits(out)))
    os.killpg(driver.pid, signal.SIGINT)  # like Ctrl-C in a terminal
    assert driver.wait() == 130, driver.said
    last = driver.said.splitlines()[-1]
    assert last == "smsbatch: interrupted; what is done is kept, the same command goes on from here"
    assert "Traceback" not in driver.said
    assert 1 <= len(commits(out)) < len(PHOTOS)
    assert not list((out / "_smsbatch/heartbeats").iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's processes in Linux' /proc")
def test_actors_and_then_the_driver_of_a_cluster_are_killed(
    job: Callable[..., Path], undisturbed: Path, tmp_path: Path
) -> None:
    """No sample fails because an actor died, and a driver with the local pool resumes the run at once."""
    manifest = job(compute={"retries": 50})
    output = Disk(tmp_path / "out")
    driver = Life(manifest, "--set", "compute.pool=ray", "--set", "compute.workers=2")
    started: set[int] = set()
    try:
        _grow(driver, output, 6)  # the plan and a few more objects
        assert _kill_actors(driver, output, started, deaths=1, stride=4, seed=5)
        started |= dict(descendants(driver.pid)).keys()
        actors = _actors(driver)
        assert driver.kill(children=False)  # its actors may outlive it for a moment and go on working
        check_whole(output.path)
        before = commits(output.path)
        assert 0 < len(before) < len(PHOTOS)
        heir = Life(manifest)
        assert heir.wait() == 0, heir.said
        after = commits(output.path)
        assert {name: after[name]["attempt"] for name in before} == {
            name: commit["attempt"] for name, commit in before.items()
        }
        check_end(output.path, undisturbed)
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in actors))
        check_end(output.path, undisturbed)  # also after the last writes of the orphaned actors
    finally:
        _kill_all(started)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's processes in Linux' /proc")
def test_a_cluster_that_is_gone_ends_the_run(job: Callable[..., Path], tmp_path: Path) -> None:
    """Slow, because Ray takes long to declare a node dead."""
    output = Disk(tmp_path / "out")
    driver = Life(job(), "--set", "compute.pool=ray", "--set", "objective.steps=500")
    started: set[int] = set()
    try:
        _grow(driver, output, 5)
        processes = dict(descendants(driver.pid))
        started |= processes.keys()
        (raylet,) = [pid for pid, command in processes.items() if "raylet/raylet" in command.split(" ")[0]]
        os.kill(raylet, signal.SIGKILL)
        assert driver.wait() == 1
        assert "the Ray cluster is gone" in driver.said
    finally:
        _kill_all(started)


def _kill_actors(driver: Life, output: Output, started: set[int], deaths: int, stride: int, seed: int) -> int:
    """Kill up to `deaths` random actors, each after 1 to `stride` more objects; returns the number killed.

    The pids of all descendants of the driver are added to `started`.
    """
    chance, killed = random.Random(seed), 0
    for _ in range(deaths):
        _grow(driver, output, chance.randint(1, stride))
        started |= dict(descendants(driver.pid)).keys()
        actors = _actors(driver)
        if actors:  # there are none during planning and after the last unit
            os.kill(chance.choice(actors), signal.SIGKILL)
            killed += 1
    _grow(driver, output, 1)
    return killed


def _grow(driver: Life, output: Output, more: int) -> None:
    goal = len(output.names()) + more
    until(lambda: driver.ended or len(output.names()) >= goal)


def _actors(driver: Life) -> list[int]:
    return sorted(pid for pid, command in descendants(driver.pid) if command.startswith("ray::Worker"))


def _kill_all(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("place", "head_start"), [("disk", 0), pytest.param("s3", 8, marks=pytest.mark.slow)])
def test_two_drivers_on_one_output(
    place: str, head_start: int, job: Callable[..., Path], undisturbed: Path, tmp_path: Path, s3: Server
) -> None:
    """Each driver finishes or is refused in one line; at least one finishes, and the output is undamaged."""
    output, sections = _places(place, tmp_path, s3)
    manifest = job(**sections)
    first = Life(manifest)
    until(lambda: first.ended or len(output.names()) >= head_start)
    second = Life(manifest)
    ends = [first.wait(), second.wait()]
    said = f"first:\n{first.said}\nsecond:\n{second.said}"
    assert 0 in ends, said
    for life, end in zip((first, second), ends, strict=True):
        if end:
            assert end in (2, 3), said
            assert life.said.splitlines()[-1].startswith("smsbatch: "), said
            assert "Traceback" not in life.said, said
    check_end(output.local(tmp_path), undisturbed)
    if ends == [0, 0]:
        again = Life(manifest)
        assert again.wait() == 0, again.said
        assert "Nothing to do" in again.said
        check_end(output.local(tmp_path), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("pool", ["local", "ray"])
def test_the_embedded_model(pool: str, place: str, tmp_path: Path, s3: Server) -> None:
    """Runs of the embedded model in fresh processes, of which many are killed: drivers, and with Ray also actors."""
    if pool == "ray" and not Path("/proc/self/stat").exists():
        pytest.skip("finds Ray's processes in Linux' /proc")
    output, sections = _places(place, tmp_path, s3)
    manifest = _embedded(tmp_path, output.url, storage=sections.get("storage", {}))
    options = ("--set", f"compute.pool={pool}")
    started: set[int] = set()
    chance, actors = random.Random(7), []

    def kill(life: Life) -> bool:
        if pool == "ray" and chance.random() < 0.7:
            actors.append(_kill_actors(life, output, started, deaths=1, stride=4, seed=chance.randrange(1000)))
        started.update(pid for pid, _ in descendants(life.pid))
        return life.kill(children=chance.random() < 0.5)

    try:
        killed = disturb(
            lambda: Life(manifest, *options, fresh=True),
            output,
            deaths=8,
            stride=7,
            seed=11,
            check=lambda: check_whole(output.local(tmp_path)),
            kill=kill,
        )
    finally:
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))
    assert killed >= 3
    assert pool == "local" or sum(actors) >= 2
    reference = tmp_path / "reference"
    reference.mkdir()
    sb.run(sb.load(_embedded(reference, str(reference / "out"))))
    check_end(output.local(tmp_path), reference / "out")
    shutil.rmtree(reference)


def _embedded(folder: Path, output: str, storage: dict[str, Any] | None = None) -> Path:
    """A manifest of ten photographs in oil style, with barely enough steps for a visible effect."""
    return write_manifest(
        folder,
        Path("tiny"),
        Path("tiny:styles/oil.safetensors"),
        Path("tiny:photos"),
        source={"limit": 10},
        style={"prompt": "oil painting style"},
        objective={"steps": 10},
        image={"resolution": 96},
        output={"path": output, "samples_per_unit": 1},
        compute={"retries": 50, "workers": 2},
        storage=storage or {},
    )


def _delete(out: Path) -> None:
    """Delete a folder, also while others write there."""
    while out.exists():
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.slow  # tests/runs/test_deleted.py has what this needs no process for
@pytest.mark.parametrize("whole", [True, False], ids=["folder", "all but the ledger"])
def test_an_output_that_is_deleted_under_a_run(whole: bool, job: Callable[..., Path], tmp_path: Path) -> None:
    """The run ends with an error that says so, and the next one begins anew in whatever is left."""
    manifest, out = job(), tmp_path / "out"
    driver = Life(manifest)
    until(lambda: driver.ended or len(commits(out)) >= 1)
    if whole:
        _delete(out)
    else:  # as `rm -r` that is overtaken by a writer
        for name in ("run.json", "_smsbatch/run.json"):
            (out / name).unlink()
        _delete(out / "plan")
    assert driver.wait() == 3, driver.said
    assert "the output was deleted while the run was at work; run again to start anew" in driver.said
    assert "Traceback" not in driver.said
    assert not out.exists() or not [path for path in out.rglob("*") if path.is_file() and "/tmp/" not in str(path)]
    sb.run(sb.load(manifest, ["source.limit=1", "objective.steps=1"]))
    assert sb.verify(str(out), full=True).ok
