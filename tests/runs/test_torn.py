"""Files of a run that are emptied as by a power loss, swapped or forged: no command ends in a traceback.

`repair` mends what was emptied; `tests/commands/test_every_byte.py` has all other changes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.jobs import make_photos, tars, write_manifest
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch.cli.app import app
from smsbatch.runs.records import dump_record

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


DEEP = "[" * 100_000
BEAT = "_smsbatch/heartbeats/somebody.json"
COMMIT, RECORD = "_smsbatch/commits/000001.json", "_smsbatch/published/000000.json"
FORGED: dict[str, tuple[str, str | dict[str, Any] | Path]] = {
    "rows for samples": ("plan/samples.parquet", Path("metrics/000000.parquet")),
    "objects for samples": ("plan/samples.parquet", Path("plan/objects.parquet")),
    "samples for objects": ("plan/objects.parquet", Path("plan/samples.parquet")),
    "objects for units": ("plan/units.parquet", Path("plan/objects.parquet")),
    "units for rows": ("metrics/000001.parquet", Path("plan/units.parquet")),
    "a tar for rows": ("metrics/000001.parquet", Path("shards/000001.tar")),
    "a record for digests": ("plan/digests.json", Path(RECORD)),
    "run.json is a list": ("run.json", "[]"),
    "run.json is deep": ("run.json", DEEP),
    "run.json without a manifest": ("run.json", {"manifest": None}),
    "run.json without a plan": ("run.json", {"planned": {}}),
    "index.json is a list": ("index.json", "[3]"),
    "index.json with other shards": ("index.json", {"shards": 3}),
    "index.json with other files": ("index.json", {"files": {"README.md": 1}, "report": []}),
    "a commit that is a list": (COMMIT, "[]"),
    "a commit that is deep": (COMMIT, DEEP),
    "a commit without files": (COMMIT, {"files": None}),
    "a commit whose counts are texts": (COMMIT, {"samples": "2", "errors": [1]}),
    "a record without files": (RECORD, {"files": {"tar": {}}}),
    "a note of nothing": ("_smsbatch/drift/note.json", '{"time": 3, "changed": [1]}'),
    "a beat that is a list": (BEAT, "[1]"),
    "a beat that is null": (BEAT, "null"),
    "a beat that is deep": (BEAT, DEEP),
    "a beat at a text": (BEAT, '{"time": "yesterday", "workers": []}'),
    "a beat at no time": (BEAT, '{"time": null, "rate": "fast", "workers": 7, "processes": [1]}'),
    "a beat at infinity": (BEAT, '{"time": 1e999, "rate": NaN, "workers": [{"worker": 1}, 3]}'),
    "a beat of many digits": (BEAT, f'{{"time": 1{"0" * 400}, "rate": 1{"0" * 400}, "workers": []}}'),
    "a beat of strange workers": (BEAT, '{"time": 1, "workers": [{"worker": "w", "unit": 5, "done": "x"}]}'),
}


def forge(out: Path, place: str, content: str | dict[str, Any] | Path) -> None:
    """Write a text, the bytes of another file, or the record that is there with other values and a right digest."""
    path = out / place
    path.parent.mkdir(parents=True, exist_ok=True)
    match content:
        case Path():
            path.write_bytes((out / content).read_bytes())
        case dict():
            path.write_bytes(dump_record(json.loads(path.read_text()) | content))
        case _:
            path.write_text(content)


def check_all_verbs(job: Path, *verbs: str) -> None:
    here = ["--set", f"output.path={job.parent / 'out'}"]
    for verb in verbs:
        command, *options = verb.split()
        arguments = [command, str(job), *(["photo-0"] if verb == "replay" else []), *options, *here]
        arguments += ["--to", str(job.parent / "again.png")] if verb == "replay" else []
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, SystemExit | None), f"{verb}: {done.exception!r}"
        assert done.exit_code in (0, 1, 2, 3), verb


@pytest.mark.parametrize("name", FILES)
def test_no_verb_ends_in_a_traceback(name: str, job: Path) -> None:
    torn = job.parent / "out" / name
    torn.parent.mkdir(parents=True, exist_ok=True)
    torn.write_bytes(b"")
    check_all_verbs(job, *VERBS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if number % 4 else name for number, name in enumerate(FORGED)]
)
def test_no_verb_ends_in_a_traceback_by_what_is_forged(name: str, job: Path) -> None:
    place, content = FORGED[name]
    forge(job.parent / "out", place, content)
    check_all_verbs(job, "status", "errors", "verify --full", "gc", "plan", "repair --full --dry-run")
    if place != BEAT:
        found = CliRunner().invoke(app, ["verify", str(job), "--full", "--set", f"output.path={job.parent / 'out'}"])
        assert place.rpartition("/")[2] in found.output, "it is named"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORGED)
def test_no_costly_verb_either(name: str, job: Path) -> None:
    forge(job.parent / "out", *FORGED[name])
    check_all_verbs(job, "replay", "run", "doctor", "repair --full", "repair")


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
