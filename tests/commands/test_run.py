"""Whole runs with both pools: every sample is accounted for, results are invariant, and runs can be resumed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.jobs import KEYS, commits, make_photos, pictures, rows, tars, write_manifest

import smsbatch as sb
from smsbatch.cluster.ray_pool import RayPool
from smsbatch.commands.plan import establish
from smsbatch.workers.pool import LocalPool
from smsbatch.workers.worker import Worker, WorkItem


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


Job = Callable[..., sb.Manifest]
ONE = "compute.workers=1"  # an actor takes ten seconds to start


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("source") / "photos")


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path, photos: Path) -> Job:
    """A factory of manifests that write to a new folder below tmp_path; arguments are overrides and sections."""
    number = iter(range(100))

    def make(*overrides: str, **sections: dict[str, Any]) -> sb.Manifest:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        return sb.load(write_manifest(folder, model, lora, photos, **sections), overrides)

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path, photos: Path) -> Path:
    """The output of the standard job, computed by the local pool without interruption."""
    manifest = sb.load(write_manifest(tmp_path_factory.mktemp("undisturbed"), model, lora, photos))
    sb.run(manifest)
    return Path(manifest.output.path)


@pytest.mark.parametrize("pool", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_broken_picture_is_a_row(pool: str, job: Job, tmp_path: Path, undisturbed: Path) -> None:
    folder = make_photos(tmp_path / "some-broken")
    for key, content in (
        ("empty", b""),
        ("no-picture", b"hello"),
        ("cut", (folder / "photo-0.png").read_bytes()[:300]),
    ):
        (folder / f"{key}.jpg").write_bytes(content)
    (folder / "photo-1.txt").write_bytes(b"\xff\xfe\xfa")
    manifest = job(f"compute.pool={pool}", ONE, f"source.urls={folder}", "errors.max_failed_fraction=0.5")
    report = sb.run(manifest)
    found = rows(Path(manifest.output.path))
    assert report.planned == report.succeeded + report.failed == len(found) == 9
    failed = {key: row["error_code"] for key, row in found.items() if row["status"] == "failed"}
    assert failed == {
        "empty": "decode_error",
        "no-picture": "decode_error",
        "cut": "decode_error",
        "photo-1": "bad_caption",
    }
    assert all(found[key]["error_message"] for key in failed)
    assert set(pictures(Path(manifest.output.path))) == set(found) - set(failed)


@pytest.mark.parametrize("pool", ["local", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("cluster")
class TestEveryPool:
    def test_gives_the_same_bytes(self, pool: str, job: Job, undisturbed: Path) -> None:
        manifest = job(f"compute.pool={pool}", "compute.workers=2")
        seen: list[sb.Status] = []
        report = sb.run(manifest, progress=seen.append)
        out = Path(manifest.output.path)
        assert (report.planned, report.succeeded, report.failed) == (6, 6, 0)
        assert tars(out) == tars(undisturbed)
        assert set(rows(out)) == set(KEYS)
        assert (out / "_SUCCESS").exists()
        assert (out / "report.html").exists()
        assert seen[-1].finished
        assert seen[-1].samples_done == 6
        assert max(len(status.workers) for status in seen) == (2 if pool == "ray" else 1)

    def test_too_many_failures_end_the_run_with_an_error_but_keep_it(self, pool: str, job: Job, tmp_path: Path) -> None:
        folder = make_photos(tmp_path / "bad")
        (folder / "zzz.jpg").write_bytes(b"")
        whole = ("output.samples_per_unit=8", "output.samples_per_shard=8")  # two units could stop after the first
        manifest = job(f"compute.pool={pool}", ONE, f"source.urls={folder}", *whole)
        with pytest.raises(sb.RunError, match="1 of 7 samples failed"):
            sb.run(manifest)
        assert len(rows(Path(manifest.output.path))) == 7
        assert not Path(manifest.output.path, "_SUCCESS").exists()
        with pytest.raises(sb.RunError, match="1 of 7 samples failed"):  # the error is raised again without new work
            sb.run(manifest)

    def test_goes_on_where_the_commits_end(self, pool: str, job: Job, undisturbed: Path) -> None:
        manifest = job(ONE)
        out = Path(manifest.output.path)
        sb.run(manifest)
        before = commits(out)
        for file in ("_smsbatch/commits/000001.json", "_SUCCESS", "shards/000000.tar", "metrics/000001.parquet"):
            (out / file).unlink()
        again = manifest.model_copy(update={"compute": manifest.compute.model_copy(update={"pool": pool})})
        sb.run(again)
        after = commits(out)
        assert before["000000"] == after["000000"]
        assert before["000002"] == after["000002"]
        assert before["000001"]["attempt"] != after["000001"]["attempt"]
        assert tars(out) == tars(undisturbed)
        assert set(rows(out)) == set(KEYS)

    def test_an_error_that_is_no_samples_fault_ends_the_run(self, pool: str, job: Job) -> None:
        manifest = job(f"compute.pool={pool}", ONE)
        out = Path(manifest.output.path)
        (out / "_smsbatch").mkdir(parents=True)
        (out / "_smsbatch" / "attempts").write_text("a file where the ledger wants a folder")
        with pytest.raises(sb.StorageError, match="attempts"):
            sb.run(manifest)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_an_actor_that_finds_no_place_holds_nothing_up(job: Job) -> None:
    """Of two actors with two cores each on a cluster of two cores, only one starts; it does the whole run."""
    report = sb.run(job("compute.pool=ray", "compute.workers=2", "compute.threads=2"))
    assert report.succeeded == 6


@pytest.mark.usefixtures("cluster")
class TestMapOnACluster:
    def test_of_many_items_keeps_their_order(self, job: Job) -> None:
        with RayPool(job("compute.pool=ray")) as pool:
            assert list(pool.map(abs, range(-200, 0))) == list(range(200, 0, -1))

    def test_indexes_a_source_of_many_tars(self, job: Job, tmp_path: Path) -> None:
        """A cut tar gives a notice, and the error for a file that is no tar reaches the caller unchanged."""
        for number in range(70):
            make_tar(tmp_path / f"tars/{number:03}.tar", [(f"key-{number}.jpg", b"x"), (f"key-{number}.txt", b"y")])
        manifest = job("compute.pool=ray", "source.format=webdataset", f"source.urls={tmp_path}/tars/*.tar")
        plan = sb.plan(manifest)
        assert plan.samples == 70
        cut = tmp_path / "tars/033.tar"
        cut.write_bytes(cut.read_bytes()[:1200])  # within its second header
        assert "033.tar" in sb.plan(manifest).notices[0]
        (tmp_path / "tars/044.tar").write_bytes(b"no tar at all" * 100)
        with pytest.raises(sb.SourceError, match=r"044\.tar: not an uncompressed tar"):
            sb.plan(manifest)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_relative_paths_are_those_of_the_driver(
    job: Job, lora: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Path
) -> None:
    """Actors have another working folder than the driver."""
    monkeypatch.chdir(photos.parent)
    Path("style.safetensors").write_bytes(lora.read_bytes())
    overrides = ("output.path=relative", "style.lora=style.safetensors", "source.urls=photos")
    sb.run(job("compute.pool=ray", ONE, *overrides))
    assert tars(photos.parent / "relative") == tars(undisturbed)


@pytest.mark.usefixtures("cluster")
def test_more_gpus_than_there_are_is_a_request_that_is_refused(job: Job) -> None:
    with pytest.raises(sb.RequestError, match="there is room for 0"):
        sb.run(job("compute.pool=ray", "compute.gpus_per_worker=1"))


def test_ray_that_is_not_installed_is_said_before_anything_is_written(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = job("compute.pool=ray")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(sb.RequestError, match="Ray is not installed"):
        sb.run(manifest)
    assert not Path(manifest.output.path).exists()


class TestChangedInputs:
    @pytest.fixture
    def changed(self, job: Job, tmp_path: Path) -> sb.Manifest:
        """A planned run, in whose source one picture was then replaced, one deleted and one added."""
        folder = make_photos(tmp_path / "changing")
        manifest = job(f"source.urls={folder}", "errors.max_failed_fraction=1")
        with LocalPool(manifest) as pool:
            establish(manifest, pool)
        (folder / "photo-3.png").write_bytes((folder / "photo-2.png").read_bytes() + b"longer")
        (folder / "photo-4.png").unlink()
        (folder / "photo-9.png").write_bytes((folder / "photo-2.png").read_bytes())
        return manifest

    def test_are_refused(self, changed: sb.Manifest) -> None:
        with pytest.raises(
            sb.DriftError, match=r"changed: inputs: .*photo-3\.png was changed; .*photo-4\.png is gone;"
        ):
            sb.run(changed)
        assert not (Path(changed.output.path) / "_smsbatch/commits").exists()

    def test_are_read_as_they_are_now_if_the_user_says_so(self, changed: sb.Manifest) -> None:
        report = sb.run(changed, allow_drift=["inputs"])
        found = rows(Path(changed.output.path))
        assert set(found) == set(KEYS), "the plan stands: what is new is not taken"
        assert {key: row["error_code"] for key, row in found.items() if row["error_code"]} == {"photo-4": "read_error"}
        assert "No such file" in found["photo-4"]["error_message"]
        assert any("changed since the plan, as allowed: inputs" in notice for notice in report.notices)
        sb.run(changed)  # the run has recorded it, so it need not be allowed again


def test_a_picture_that_is_replaced_under_a_worker_is_a_row(job: Job, tmp_path: Path) -> None:
    """The source changes after the driver has checked it; workers compare the files that they read with the plan."""
    folder = make_photos(tmp_path / "changing")
    manifest = job(f"source.urls={folder}")
    with LocalPool(manifest) as pool:
        plan = establish(manifest, pool)
    (folder / "photo-2.png").write_bytes((folder / "photo-4.png").read_bytes())
    (folder / "photo-3.png").unlink()
    worker = Worker(manifest, "w")
    worker.setup()
    assert worker.process(WorkItem(plan.units[0])).errors == {}
    assert worker.process(WorkItem(plan.units[1])).errors == {"read_error": 2}
    (first, second) = worker._run.ledger.outcomes(worker._run.ledger.commits()[1])
    assert "photo-2.png" in str(first.error_message)
    assert "replaced" in str(first.error_message)
    assert "No such file" in str(second.error_message)


def test_rows_say_what_was_done(undisturbed: Path) -> None:
    found = rows(undisturbed)
    row = found["photo-2"]
    assert row["status"] == "success"
    assert row["caption"] == "waves number 2"
    assert row["prompt"] == "wavy style, waves number 2"
    assert found["photo-1"]["prompt"] == "wavy style"
    assert (row["width"], row["height"]) == (row["original_width"], row["original_height"]) == (48, 32)
    assert row["steps"] == 2
    assert row["batch_size"] == 2
    assert row["seconds"] > 0
    assert 0 < row["lpips"] < 1
    assert (row["unit"], row["shard"]) == (1, 0)
    assert row["url"].endswith("photo-2.png")
    assert len({row["seed"] for row in found.values()}) == 6


def test_the_result_is_not_the_source(undisturbed: Path, photos: Path) -> None:
    from smsbatch.data.pixels import decode

    for key, picture in pictures(undisturbed).items():
        source = decode((photos / f"{key}.png").read_bytes())
        assert picture.shape == source.shape
        assert np.abs(picture.astype(int) - source.astype(int)).mean() > 1


def _differences(a: Path, b: Path) -> list[float]:
    first, second = pictures(a), pictures(b)
    assert set(first) == set(second) == set(KEYS)
    return [float(np.abs(first[key].astype(int) - second[key].astype(int)).mean()) for key in first]


def test_units_and_shards_do_not_change_a_picture(job: Job, undisturbed: Path) -> None:
    """The same batches in other units and shards give the same pixels."""
    manifest = job("output.samples_per_unit=6", "output.samples_per_shard=6")
    sb.run(manifest)
    assert _differences(Path(manifest.output.path), undisturbed) == [0.0] * 6


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_does_not_change_a_picture(job: Job, undisturbed: Path, batch_size: int) -> None:
    """Other batches change the rounding of the kernels: on average by less than half of one of 255 brightness steps."""
    manifest = job(f"compute.batch_size={batch_size}", "output.samples_per_unit=6", "output.samples_per_shard=6")
    sb.run(manifest)
    assert max(_differences(Path(manifest.output.path), undisturbed)) < 0.5


def test_neighbours_do_not_change_a_picture(job: Job, undisturbed: Path, tmp_path: Path) -> None:
    """Another order, other samples in the batches and a broken sample change only the rounding."""
    folder = make_photos(tmp_path / "company")
    make_photos(folder, ["aaa", "photo-2b"])
    (folder / "photo-0b.jpg").write_bytes(b"broken")
    manifest = job(f"source.urls={folder}", "errors.max_failed_fraction=0.5")
    sb.run(manifest)
    found, before = pictures(Path(manifest.output.path)), pictures(undisturbed)
    # a picture's colours depend on its index in the list: only photo-0 to photo-5 are the same files
    assert max(float(np.abs(found[key].astype(int) - before[key].astype(int)).mean()) for key in KEYS) < 0.5


def test_the_seed_changes_every_picture(job: Job, undisturbed: Path) -> None:
    manifest = job("seed=1")
    sb.run(manifest)
    assert min(_differences(Path(manifest.output.path), undisturbed)) > 0


def test_other_sizes_in_one_run(job: Job, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "sizes", ["wide"], size=(101, 40))
    make_photos(folder, ["tall"], size=(40, 73))
    make_photos(folder, ["square"], size=(50, 50))
    make_photos(folder, ["small"], size=(33, 33))
    manifest = job(f"source.urls={folder}", "objective.steps=1")
    sb.run(manifest)
    shapes = {key: picture.shape[:2] for key, picture in pictures(Path(manifest.output.path)).items()}
    assert shapes == {"wide": (32, 81), "tall": (58, 32), "square": (32, 32), "small": (32, 32)}


def test_nothing_to_do_is_said_and_done_fast(job: Job) -> None:
    manifest = job()
    sb.run(manifest)
    out = Path(manifest.output.path)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and "_smsbatch" in file.parts}
    seen: list[sb.Status] = []
    sb.run(manifest, progress=seen.append)
    assert all(status.units_done == status.units for status in seen)
    assert before == {file: file.stat().st_mtime_ns for file in before}


def test_diverged(job: Job) -> None:
    """A learning rate that makes values overflow gives failed rows, not a crash and not a grey picture."""
    manifest = job("objective.learning_rate=1e37", "objective.steps=4", "errors.max_failed_fraction=1")
    report = sb.run(manifest)
    assert report.failed == 6
    assert {row["error_code"] for row in rows(Path(manifest.output.path)).values()} == {"diverged"}


def test_status_from_storage_alone(job: Job) -> None:
    manifest = job()
    out = Path(manifest.output.path)
    with pytest.raises(sb.RequestError, match="no run here"):
        sb.status(str(out))
    sb.run(manifest)
    finished = sb.status(str(out))
    assert (finished.units_done, finished.samples_done, finished.finished) == (3, 6, True)
    for file in ("_SUCCESS", "_smsbatch/commits/000002.json"):
        (out / file).unlink()
    under_way = sb.status(str(out))
    assert (under_way.units_done, under_way.samples_done, under_way.finished) == (2, 4, False)
    assert (under_way.workers, under_way.heartbeat_age_s) == ((), None), (
        "whoever leaves in order takes his heartbeat along"
    )


def test_stylizer_gives_what_a_run_gives(job: Job, undisturbed: Path, photos: Path) -> None:
    stylizer = sb.Stylizer(job("compute.batch_size=1"))
    picture, row = stylizer(photos / "photo-2.png", caption="waves number 2", key="photo-2")
    assert np.abs(picture.astype(int) - pictures(undisturbed)["photo-2"].astype(int)).mean() < 0.5
    expected = rows(undisturbed)["photo-2"]
    assert {name: row[name] for name in ("seed", "prompt", "width")} == {
        name: expected[name] for name in ("seed", "prompt", "width")
    }
    with pytest.raises(sb.SampleError, match="fox: "):
        stylizer(b"no picture", key="fox")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray cluster for all tests of this file, which the pools join."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()
