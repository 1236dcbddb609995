"""Failures as rows, and how a run handles them: budgets that stop it early, and retries of failed samples."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import KEYS, commits, make_photos, pictures, rows, tars, write_manifest

import smsbatch as sb
from smsbatch.commands import run as drive
from smsbatch.data import pixels
from smsbatch.data.index import read_units
from smsbatch.diffusion import optimize as optimizing
from smsbatch.errors import ERROR_CODES
from smsbatch.runs.run import store_of
from smsbatch.workers.worker import Worker, WorkItem


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
        # Each of the three units of two samples had one failure, so both shards of up to four have a new generation.
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
            assert abs(difference).mean() < 0.5, key  # other batch sizes, other rounding in the kernels

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
        out = tmp_path / "out"
        overrides = ["errors.max_failed_fraction=0.1", "output.samples_per_unit=1", "compute.batch_size=1"]
        with pytest.raises(
            sb.RunError, match=r"1 of 6 samples failed \(1 decode_error\).*; stopped, \d of 6 "
        ) as stopped:
            sb.run(sb.load(job, overrides))
        assert "`smsbatch errors" in str(stopped.value)
        done = commits(out)
        assert 1 <= len(done) < 6
        assert not (out / "report.html").exists()
        with pytest.raises(sb.RunError, match="stopped"):  # the same error before any work
            sb.run(sb.load(job, overrides))
        assert commits(out) == done
        report = sb.run(sb.load(job, [*overrides, "errors.max_failed_fraction=0.5"]))
        assert (report.planned, report.failed) == (6, 3)
        assert (out / "_SUCCESS").exists()
        with pytest.raises(sb.RunError, match="everything is written"):
            sb.run(sb.load(job, overrides))
        assert not (out / "_SUCCESS").exists(), "of a stricter budget it is no success"

    def test_mended_failures_no_longer_count_and_new_ones_do(self, job: Path, tmp_path: Path) -> None:
        """After a retry, as the error advises, a stopped run stops again when new failures exceed the budget."""
        overrides = ["errors.max_failed_fraction=0.1", "output.samples_per_unit=1", "compute.batch_size=1"]
        with pytest.raises(sb.RunError, match="stopped"):
            sb.run(sb.load(job, overrides))
        mend(tmp_path, "photo-1")
        with pytest.raises(sb.RunError, match=r"1 of 6 samples failed \(1 bad_caption\).*stopped"):
            sb.run(sb.load(job, overrides), retry_failed=True, allow_drift=["inputs"])
        assert len({name.partition(".")[0] for name in commits(tmp_path / "out")}) < 6

    @pytest.mark.parametrize("units_after", [True, False])
    def test_a_unit_that_fails_as_a_whole_is_no_success(self, job: Path, tmp_path: Path, units_after: bool) -> None:
        """This holds whether or not other units follow, and also when the run is started again."""
        (tmp_path / "photos/photo-0.png").write_bytes(b"")
        limit = 6 if units_after else 2
        overrides = ["errors.max_failed_fraction_per_unit=0.5", "errors.max_failed_fraction=1", f"source.limit={limit}"]
        for _ in range(2):
            with pytest.raises(sb.RunError, match="2 of the 2 samples of unit 000000 failed"):
                sb.run(sb.load(job, overrides))
            assert "000000" in commits(tmp_path / "out")
            assert not (tmp_path / "out/_SUCCESS").exists()


class TestEveryCode:
    def test_is_a_row_of_a_run(self, tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Failures of input files, and three others: out of memory, a result that is not finite, a failing encoder."""
        keys = ["empty", "small", "large", "caption", "memory", "finite", "encoder", "fine"]
        photos = make_photos(tmp_path / "photos", keys)
        (photos / "empty.png").write_bytes(b"")
        (photos / "caption.txt").write_bytes(b"\xff\xff")
        make_photos(photos, ["small"], size=(20, 20))
        make_photos(photos, ["large"], size=(200, 200))
        for key in ("memory", "finite", "encoder"):
            (photos / f"{key}.txt").write_text(key)
        optimize, encode = optimizing.optimize, pixels.encode

        def optimize_badly(prior: Any, style: Any, z: Any, prompts: Any, *rest: Any) -> Any:
            if prompts[0].target == "wavy style, memory":
                raise torch.OutOfMemoryError("a batch of one")
            result = optimize(prior, style, z, prompts, *rest)
            return result._replace(z=result.z * torch.nan) if prompts[0].target == "wavy style, finite" else result

        encoded = []

        def encode_badly(picture: Any, *rest: Any) -> bytes:
            encoded.append(picture)
            if len(encoded) == 1:
                raise sb.SampleError("encode_error", "no room for it")
            return encode(picture, *rest)

        monkeypatch.setattr(optimizing, "optimize", optimize_badly)
        monkeypatch.setattr(pixels, "encode", encode_badly)
        manifest = write_manifest(
            tmp_path,
            model,
            lora,
            photos,
            image={"max_pixels": 10_000},
            compute={"batch_size": 1},
            errors={"max_failed_fraction": 1},
            output={"samples_per_unit": 8},
        )
        sb.run(sb.load(manifest))
        assert {key: row["error_code"] for key, row in rows(tmp_path / "out").items()} == {
            "empty": "decode_error",
            "small": "too_small",
            "large": "too_large",
            "caption": "bad_caption",
            "memory": "oom",
            "finite": "diverged",
            "encoder": "encode_error",
            "fine": None,
        }

    def test_has_one_list(self) -> None:
        package = Path(sb.__file__).parent
        raised = {
            code
            for file in package.rglob("*.py")
            for code in re.findall(r'(?:SampleError\(|failed\(entry, )\s*"([a-z_]+)"', file.read_text())
        }
        assert raised <= set(ERROR_CODES)
        assert len(raised) >= len(ERROR_CODES) - 1  # `timeout` is in a conditional expression, which the pattern misses

    def test_a_misspelt_one_is_refused(self, job: Path) -> None:
        with pytest.raises(sb.RequestError, match="decode_eror: no such error code; there are read_error, timeout"):
            sb.run(sb.load(job), retry_failed=True, codes=["decode_eror"])


def test_a_retry_that_dies_does_not_cost_what_had_succeeded(job: Path, tmp_path: Path) -> None:
    """Rows that had succeeded keep their results, even if all rows of the unit are named as lost."""
    sb.run(sb.load(job))
    mend(tmp_path, "photo-1")
    worker = Worker(sb.load(job), "w")
    worker.setup()
    unit = read_units(store_of(sb.load(job)))[0]
    item = WorkItem(unit, 1, ("decode_error",))
    worker.probe(item, range(unit.start, unit.stop))
    commit = worker.process(item, lost=tuple(range(unit.start, unit.stop)), deaths=3)
    assert commit.errors == {"worker_lost": 1}
    first, second = worker._run.ledger.outcomes(commit)
    assert (first.key, first.error_code, first.attempts) == ("photo-0", None, 1)
    assert (second.key, second.error_code, second.attempts) == ("photo-1", "worker_lost", 5)


def test_a_retry_that_is_killed_before_its_report_is_reported_by_the_next_run(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    sb.run(sb.load(job))
    (tmp_path / "photos/photo-2.txt").write_text("waves number 2")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drive, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            sb.run(sb.load(job), retry_failed=True, allow_drift=["inputs"])
    assert not (out / "_SUCCESS").exists()
    assert not sb.status(str(out)).finished
    sb.run(sb.load(job))
    assert json.loads((out / "index.json").read_text())["failed"] == 2
    assert sb.verify(str(out), full=True).ok
