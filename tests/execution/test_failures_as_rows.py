"""Failures as rows, and what a run does about them: budgets that stop it early, and trying failed samples again."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import KEYS, commits, make_photos, pictures, rows, tars, write_manifest

import smsbatch as sb


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six photographs, of which photo-1 is empty, photo-2's caption is not UTF-8 and photo-5 is cut."""
    photos = make_photos(tmp_path / "photos")
    for key in ("photo-1", "photo-5"):
        whole = (photos / f"{key}.png").read_bytes()
        (tmp_path / f"{key}.png").write_bytes(whole)
        (photos / f"{key}.png").write_bytes(whole[: 0 if key == "photo-1" else 300])
    (photos / "photo-2.txt").write_bytes(b"\xff\xfe\xfa")
    return photos


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path, folder: Path) -> Path:
    return write_manifest(tmp_path, model, lora, folder, errors={"max_failed_fraction": 0.9})


FAILED = {"photo-1": "decode_error", "photo-2": "bad_caption", "photo-5": "decode_error"}


def failed(out: Path) -> dict[str, str]:
    return {key: row["error_code"] for key, row in rows(out).items() if row["status"] == "failed"}


def mend(tmp_path: Path, *keys: str) -> None:
    for key in keys:
        (tmp_path / "photos" / f"{key}.png").write_bytes((tmp_path / f"{key}.png").read_bytes())


class TestRetry:
    def test_only_what_failed_is_done_again_and_the_rest_stays(self, job: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        sb.run(sb.load(job))
        assert failed(out) == FAILED
        before, kept, old = rows(out), pictures(out), tars(out)
        mend(tmp_path, "photo-1", "photo-5")
        (tmp_path / "photos" / "photo-2.txt").write_text("waves number 2")
        report = sb.run(sb.load(job), retry_failed=True, allow_drift=["inputs"])
        assert (report.planned, report.succeeded, report.failed) == (6, 6, 0)
        after = rows(out)
        assert set(after) == set(KEYS)
        for key in KEYS:
            tried_again = key in FAILED
            assert after[key]["attempts"] == 1 + tried_again
            assert (after[key]["seconds"] == before[key]["seconds"]) is not tried_again
        assert all((pictures(out)[key] == picture).all() for key, picture in kept.items())
        # Units of two: 0 and 1 and 2 have a failed one each; shards of four units' samples: both have a new generation
        assert {row["generation"] for row in after.values()} == {1}
        generations = tmp_path / "out/_smsbatch/generations"
        assert {path.name: path.read_bytes() for path in sorted(generations.rglob("*.tar"))} == old
        assert (out / "_SUCCESS").exists()

    def test_one_code_alone(self, job: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        sb.run(sb.load(job))
        mend(tmp_path, "photo-1")
        before = commits(out)
        sb.run(sb.load(job), retry_failed=True, codes=["decode_error"], allow_drift=["inputs"])
        assert failed(out) == {"photo-2": "bad_caption", "photo-5": "decode_error"}
        found = rows(out)
        assert {key: found[key]["attempts"] for key in FAILED} == {"photo-1": 2, "photo-2": 1, "photo-5": 2}
        after = commits(out)
        assert {name: after[name] for name in before} == before, "a commit once made stands"
        assert set(after) - set(before) == {"000000.g1", "000002.g1"}

    def test_ends_as_the_run_of_the_mended_source_would(self, job: Path, tmp_path: Path) -> None:
        sb.run(sb.load(job))
        mend(tmp_path, "photo-1", "photo-5")
        (tmp_path / "photos" / "photo-2.txt").write_text("waves number 2")
        sb.run(sb.load(job, ["compute.batch_size=1"]), retry_failed=True, allow_drift=["inputs"])
        sb.run(sb.load(job, [f"output.path={tmp_path / 'fresh'}"]))
        for key, picture in pictures(tmp_path / "fresh").items():
            difference = picture.astype(int) - pictures(tmp_path / "out")[key].astype(int)
            assert abs(difference).mean() < 0.5, key  # other batches: the rounding of the kernels

    def test_nothing_failed_is_nothing_to_do(self, tmp_path: Path, model: Path, lora: Path) -> None:
        manifest = sb.load(write_manifest(tmp_path, model, lora, make_photos(tmp_path / "fine")))
        sb.run(manifest)
        before = tars(tmp_path / "out"), commits(tmp_path / "out")
        sb.run(manifest, retry_failed=True)
        assert (tars(tmp_path / "out"), commits(tmp_path / "out")) == before

    def test_what_fails_again_is_a_row_again(self, job: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        for attempts in (1, 2, 3):
            sb.run(sb.load(job), retry_failed=attempts > 1)
            assert failed(out) == FAILED
            assert {rows(out)[key]["attempts"] for key in FAILED} == {attempts}

    def test_codes_without_retry_are_refused(self, job: Path) -> None:
        with pytest.raises(sb.RequestError, match="--retry-failed"):
            sb.run(sb.load(job), codes=["oom"])


class TestBudgets:
    def test_a_run_that_cannot_end_well_stops_early(self, job: Path, tmp_path: Path) -> None:
        overrides = ["errors.max_failed_fraction=0.1", "output.samples_per_unit=1", "compute.batch_size=1"]
        with pytest.raises(sb.RunError, match=r"stopped: 1 of 6 samples have failed \(1 decode_error\)") as stopped:
            sb.run(sb.load(job, overrides))
        assert "`smsbatch errors" in str(stopped.value)
        done = commits(tmp_path / "out")
        assert 1 <= len(done) < 6
        assert not (tmp_path / "out/report.html").exists()
        with pytest.raises(sb.RunError, match="stopped: "):  # said again, before any work
            sb.run(sb.load(job, overrides))
        assert commits(tmp_path / "out") == done
        report = sb.run(sb.load(job, [*overrides, "errors.max_failed_fraction=0.5"]))
        assert (report.planned, report.failed) == (6, 3)

    def test_a_unit_that_fails_as_a_whole_stops_the_run(self, job: Path, tmp_path: Path) -> None:
        (tmp_path / "photos/photo-0.png").write_bytes(b"")
        with pytest.raises(sb.RunError, match="2 of the 2 samples of unit 000000 have failed"):
            sb.run(sb.load(job, ["errors.max_failed_fraction_per_unit=0.5"]))
        assert "000000" in commits(tmp_path / "out")
