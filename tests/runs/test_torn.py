"""Small files of a run, emptied as by a power loss: no command ends in a traceback, and `repair` mends the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.jobs import make_photos, tars, write_manifest
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch.cli.app import app

FILES = [
    "run.json",
    "plan/units.parquet",
    "plan/samples.parquet",
    "plan/objects.parquet",
    "_smsbatch/commits/000001.json",
    "_smsbatch/published/000000.json",
    "_smsbatch/drift/note.json",
    "_smsbatch/heartbeats/somebody.json",
    "metrics/000000.parquet",
    "index.json",
]
VERBS = ["plan", "run", "status", "errors", "verify", "gc", "replay"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    """The manifest of a finished run in which one picture failed."""
    folder = tmp_path_factory.mktemp("finished")
    photos = make_photos(folder / "photos")
    (photos / "photo-5.png").write_bytes(b"")
    job = write_manifest(folder, model, lora, photos, errors={"max_failed_fraction": 0.5})
    sb.run(sb.load(job))
    return job


@pytest.fixture
def job(finished: Path, tmp_path: Path) -> Path:
    """A copy of that manifest, and of its run in `out` in the same folder."""
    shutil.copytree(finished.parent / "out", tmp_path / "out")
    return Path(shutil.copy(finished, tmp_path / "manifest.yaml"))


@pytest.mark.parametrize("name", FILES)
def test_no_verb_ends_in_a_traceback(name: str, job: Path) -> None:
    torn, here = job.parent / "out" / name, ["--set", f"output.path={job.parent / 'out'}"]
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"")
    for verb in VERBS:
        arguments = [verb, str(job), *(["photo-0"] if verb == "replay" else []), *here]
        arguments += ["--to", str(job.parent / "again.png")] if verb == "replay" else []
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, SystemExit | None), f"{verb}: {done.exception!r}"
        assert done.exit_code in (0, 1, 2, 3), verb


@pytest.mark.parametrize("name", [name for name in FILES if name != "run.json" and "/drift/" not in name])
def test_repair_mends_it(name: str, job: Path) -> None:
    manifest = sb.load(job, [f"output.path={job.parent / 'out'}"])
    before = tars(job.parent / "out")
    torn = job.parent / "out" / name
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"")
    assert sb.repair(manifest).ok
    assert sb.verify(manifest, full=True).ok
    assert tars(job.parent / "out") == before
    assert (job.parent / "out/_SUCCESS").exists()


def test_an_index_that_was_forged_is_seen_and_planned_again(job: Path) -> None:
    manifest = sb.load(job, [f"output.path={job.parent / 'out'}"])
    path = job.parent / "out/plan/samples.parquet"
    table = pq.read_table(path)
    keys = table["key"].to_pylist()
    pq.write_table(table.set_column(0, table.schema.field("key"), [[keys[1], keys[0], *keys[2:]]]), path)
    assert [str(problem) for problem in sb.verify(manifest, full=True).problems] == [
        "plan/samples.parquet: is not what was planned: its SHA-256 differs; repair writes it again, samples and "
        "objects from the source"
    ]
    (job.parent / "out/plan/digests.json").unlink()
    found = {problem.place: problem.what for problem in sb.verify(manifest, full=True).problems}
    assert found == {"plan/digests.json": "is gone", "plan/samples.parquet": "is not the index that was planned"}
    assert sb.repair(manifest, full=True).ok


def test_a_report_that_is_gone_is_written_again(job: Path) -> None:
    manifest = sb.load(job, [f"output.path={job.parent / 'out'}"])
    (job.parent / "out/report.html").unlink()
    assert [problem.place for problem in sb.verify(manifest).problems] == ["report.html"]
    assert sb.repair(manifest).ok
    assert (job.parent / "out/report.html").exists()


class TestWhatMustBeComputedAgain:
    def test_is_not_judged_a_second_time(self, job: Path) -> None:
        """The run was accepted with one failure; `repair` ignores that the present manifest allows none."""
        here = f"output.path={job.parent / 'out'}"
        strict = sb.load(job, [here, "errors.max_failed_fraction=0"])
        before = tars(job.parent / "out")
        sb.gc(strict, attempts=True)
        (job.parent / "out/shards/000001.tar").unlink()
        assert sb.repair(strict).ok
        assert tars(job.parent / "out") == before
        assert (job.parent / "out/_SUCCESS").exists()

    def test_and_has_changed_stays_where_it_is(self, job: Path) -> None:
        manifest = sb.load(job, [f"output.path={job.parent / 'out'}", f"source.urls={job.parent / 'photos'}"])
        sb.gc(manifest, attempts=True)
        (job.parent / "out/shards/000001.tar").unlink()
        commits = sorted((job.parent / "out/_smsbatch/commits").iterdir())
        with pytest.raises(sb.DriftError, match=r"source\.urls"):
            sb.repair(manifest)
        assert sorted((job.parent / "out/_smsbatch/commits").iterdir()) == commits
