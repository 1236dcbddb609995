"""Planning: the units partition the samples; a plan is written once and then followed."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from safetensors.torch import load_file, save_file
from support.jobs import make_photos, write_manifest

import smsbatch as sb
from smsbatch.commands.plan import establish
from smsbatch.manifest import identity_of
from smsbatch.runs.drift import allowed_drift
from smsbatch.runs.plan import Estimate
from smsbatch.runs.plan_files import cut
from smsbatch.runs.run import Run, store_of
from smsbatch.workers.pool import LocalPool


@given(samples=st.integers(1, 500), per_unit=st.integers(1, 40), per_shard=st.integers(1, 200))
def test_units_are_a_partition(samples: int, per_unit: int, per_shard: int) -> None:
    units = list(cut(samples, per_unit, per_shard))
    assert [row for unit in units for row in range(unit.start, unit.stop)] == list(range(samples))
    assert [unit.id for unit in units] == list(range(len(units)))
    assert all(1 <= len(unit) <= per_unit for unit in units)
    for unit in units:
        assert unit.start // per_shard == (unit.stop - 1) // per_shard == unit.shard


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    return write_manifest(tmp_path, model, lora, make_photos(tmp_path / "photos"))


def _establish(job: Path, *overrides: str) -> Run:
    manifest = sb.load(job, overrides)
    with LocalPool(manifest) as pool:
        return establish(manifest, pool)


def test_planning_writes_nothing(job: Path) -> None:
    plan = sb.plan(sb.load(job))
    assert str(plan) == "2 shards, 3 units, 6 images"
    assert not (job.parent / "out").exists()


def test_the_plan_that_stands_is_obeyed(job: Path) -> None:
    first = _establish(job)
    make_photos(job.parent / "photos", ["another"])  # a source that grew does not change what was planned
    assert _establish(job).units == first.units


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("objective.steps=3", "objective.steps (2 then, 3 now)"),
        ("seed=1", "seed (0 then, 1 now)"),
        ("style.prompt=x", "style.prompt"),
        ("output.samples_per_unit=4", "output.samples_per_unit"),
    ],
)
def test_a_changed_manifest_is_named(job: Path, override: str, named: str) -> None:
    _establish(job)
    with pytest.raises(sb.DriftError) as caught:
        _establish(job, override)
    assert named in str(caught.value)
    assert "nothing is committed there: delete the folder" in str(caught.value)


def test_a_plan_of_an_older_version_stands(job: Path) -> None:
    """The old manifest has one LoRA as a string, an old key name and no newer keys; it left text encoders alone."""
    first = _establish(job, "style.text_encoder=false")
    file = job.parent / "out" / "run.json"
    (job.parent / "out/_smsbatch/run.json").unlink()
    run = json.loads(file.read_text())
    del run["sha256"]
    old = run["manifest"]
    old["style"] = {"lora": old["style"]["lora"][0], "scale": 0.8, "prompt": old["style"]["prompt"]}
    old["objective"] = {"name": "sms", "steps": 2, "spectral_weight": old["objective"]["identity_weight"]}
    file.write_text(json.dumps(run | {"manifest_sha256": identity_of(old)}))
    assert _establish(job, "style.text_encoder=false").units == first.units
    with pytest.raises(sb.DriftError, match=r"changed: style\.text_encoder \(False then, True now\);"):
        _establish(job)
    older = old | {"objective": {"no": "key"}}
    file.write_text(json.dumps(run | {"manifest": older, "manifest_sha256": identity_of(older)}))
    with pytest.raises(sb.RequestError, match=r"its manifest is not understood, it is of smsbatch .*use that version"):
        _establish(job)


def test_what_does_not_change_results_may_change(job: Path) -> None:
    first = _establish(job)
    for override in ("compute.batch_size=4", "compute.pool=ray", "errors.max_failed_fraction=0.5"):
        assert _establish(job, override).units == first.units


def test_changed_weights_are_named(job: Path, lora: Path) -> None:
    copy = job.parent / "style.safetensors"
    copy.write_bytes(lora.read_bytes())
    _establish(job, f"style.lora={copy}")
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    with pytest.raises(sb.DriftError, match=r"the file .*style\.safetensors"):
        _establish(job, f"style.lora={copy}")


def test_another_limit_is_another_plan(job: Path) -> None:
    assert _establish(job, "source.limit=3").about["planned"]["samples"] == 3
    with pytest.raises(sb.DriftError, match=r"source\.limit \(3 then, None now\)"):
        _establish(job)


@pytest.mark.parametrize("lost", ["plan/units.parquet", "plan/samples.parquet"])
def test_a_driver_that_died_while_planning_is_made_up_for(job: Path, lost: str) -> None:
    first = _establish(job)
    out = job.parent / "out"
    (out / "plan/units.parquet").unlink()  # written last
    (out / lost).unlink(missing_ok=True)
    assert _establish(job).units == first.units
    assert (out / lost).exists()


def test_half_a_plan_of_another_source_is_refused(job: Path) -> None:
    _establish(job)
    (job.parent / "out/plan/units.parquet").unlink()
    make_photos(job.parent / "photos", ["another"])
    with pytest.raises(sb.DriftError, match="not the one this run began with"):
        _establish(job)


def test_run_json_says_what_is_run(job: Path) -> None:
    _establish(job)
    run = json.loads((job.parent / "out/run.json").read_text())
    size = sum(file.stat().st_size for file in (job.parent / "photos").iterdir())
    assert run["planned"] == {
        "samples": 6,
        "units": 3,
        "shards": 2,
        "bytes": size,
        "samples_per_unit": 2,
        "seconds_per_image": None,
    }
    assert run["commits"] == "workers"
    assert run["manifest"]["objective"]["guidance"] == 4.5  # resolved: defaults are written out
    assert all(len(digest) == 64 for digest in run["weights"].values())
    read = {name.rpartition("/")[2] for name in run["weights"]}
    assert {"model.safetensors", "scheduler_config.json", "vocab.json", "style.safetensors"} <= read


def test_a_folder_that_is_no_run_is_left_alone(job: Path) -> None:
    out = job.parent / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    with pytest.raises(sb.StorageError, match=r"not a run of smsbatch"):
        _establish(job)


def test_what_late_workers_left_of_a_deleted_run_does_not_count(job: Path) -> None:
    """Their commits must not be taken for those of the next run, whose manifest may differ."""
    out = job.parent / "out"
    for name in ("commits/000000.json", "attempts/000000/a.tar", "published/000000.json", "tmp/x", "heartbeats/y.json"):
        (out / "_smsbatch" / name).parent.mkdir(parents=True, exist_ok=True)
        (out / "_smsbatch" / name).write_bytes(b"{}")
    (out / "shards").mkdir()
    run = _establish(job)
    assert run.about["notices"][-1] == "removed 3 files in _smsbatch, which a deleted run had left"
    assert sorted(path.name for path in (out / "_smsbatch").rglob("*") if path.is_file()) == ["run.json", "x", "y.json"]
    assert run.ledger.done() == set()


@pytest.mark.parametrize("lost", ["_smsbatch/run.json", "run.json"])
def test_a_driver_that_died_after_run_json_is_made_up_for(lost: str, job: Path) -> None:
    """The copy is created after `run.json` and before the plan; without `run.json`, `repair` restores it."""
    first = _establish(job)
    out = job.parent / "out"
    before = (out / "run.json").read_bytes()
    shutil.rmtree(out / "plan")
    (out / lost).unlink()
    if lost == "run.json":
        with pytest.raises(sb.StorageError, match=r"run\.json is gone; run `smsbatch repair "):
            _establish(job)
        assert [str(problem.place) for problem in sb.verify(str(out)).problems] == [lost]
        assert sb.repair(str(out)).ok
    assert sb.verify(str(out), full=True).pending == ("the plan",)
    assert _establish(job).units == first.units
    assert (out / lost).read_bytes() == before


def test_bad_requests_write_nothing(job: Path, model: Path) -> None:
    other, cut = job.parent / "other.safetensors", job.parent / "cut"
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, other)
    shutil.copytree(model, cut)
    shutil.rmtree(cut / "vae")
    empty = job.parent / "empty"
    empty.mkdir()
    for override, error in (
        (f"source.urls={empty}", sb.SourceError),
        ("source.urls=/nowhere", sb.SourceError),
        ("style.lora=/nowhere.safetensors", sb.WeightsError),
        ("model.path=/nowhere", sb.WeightsError),
        (f"style.lora={other}", sb.WeightsError),
        (f"model.path={cut}", sb.WeightsError),
    ):
        with pytest.raises(error):
            _establish(job, override)
    assert not (job.parent / "out").exists()


@pytest.mark.parametrize("name", ["README.md", "report.html", "shards/000000.tar", "metrics/x.parquet"])
def test_what_somebody_else_has_is_not_replaced(job: Path, name: str) -> None:
    out = job.parent / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    with pytest.raises(sb.RequestError, match="choose a new folder"):
        _establish(job)
    assert [file for file in out.rglob("*") if file.is_file()] == [out / name]


def test_an_unknown_protocol_is_one_line(job: Path) -> None:
    for override in ("output.path=foo://bucket/x", "source.urls=foo://bucket/x"):
        with pytest.raises(sb.RequestError, match="foo"):
            _establish(job, override)


def test_text_encoder_parts_that_are_left_out_are_a_notice_of_the_plan(job: Path, lora: Path) -> None:
    layer = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{layer}.lora_down.weight": torch.ones(1, 16), f"{layer}.lora_up.weight": torch.ones(32, 1)}
    save_file(load_file(lora) | text, job.parent / "te.safetensors")
    override = f"style.lora={job.parent / 'te.safetensors'}"
    assert sb.plan(sb.load(job, [override])).notices == ()
    plan = sb.plan(sb.load(job, [override, "style.text_encoder=false"]))
    assert "parts for 1 layers of the text encoder are left out" in plan.notices[0]


def test_an_output_that_cannot_be_written(job: Path) -> None:
    with pytest.raises(sb.StorageError, match="choose another path"):
        _establish(job, f"output.path={job}/below-a-file")


def test_a_sample_that_went_does_not_move_the_others(job: Path) -> None:
    """The samples to skip were chosen at the first plan; choosing again would skip photo-2."""
    assert _establish(job, "source.skip=2", "source.limit=3").about["planned"]["samples"] == 3
    photos = job.parent / "photos"
    (photos / "photo-0.png").unlink()
    (photos / "photo-2.png").write_bytes((photos / "photo-4.png").read_bytes() + b"longer")
    report = sb.run(sb.load(job, ["source.skip=2", "source.limit=3"]), allow_drift=["inputs"])
    assert (report.succeeded, report.failed) == (3, 0)


class TestProbe:
    def test_estimates_time_bytes_and_cost(self, job: Path) -> None:
        manifest = sb.load(job)
        without = sb.plan(manifest)
        assert (without.bytes_out, without.gpu_hours, without.cost) == (None, None, None)
        assert without.bytes_in == sum(file.stat().st_size for file in (job.parent / "photos").iterdir())
        plan = sb.plan(manifest, probe=3, price_per_gpu_hour=2.0)
        assert plan.estimate is not None
        assert (plan.estimate.images, plan.estimate.device) == (3, "cpu")
        assert plan.gpu_hours == pytest.approx(6 * plan.estimate.seconds_per_image / 3600)
        assert plan.cost == pytest.approx(2 * plan.gpu_hours)
        assert not (job.parent / "out").exists()
        told = plan.to_dict()
        assert json.loads(json.dumps(told)) == told
        sb.run(manifest)
        began = sb.plan(manifest, probe=2)
        assert (began.samples_done, began.gpu_hours) == (6, 0.0)

    def test_of_pictures_that_all_fail_says_why(self, job: Path) -> None:
        for file in (job.parent / "photos").glob("*.png"):
            file.write_bytes(b"")
        with pytest.raises(sb.SampleError, match="empty file"):
            sb.plan(sb.load(job), probe=2)

    def test_units_by_time(self, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        estimate = Estimate(images=6, seconds_per_image=2.5, bytes_per_image=1000.0, device="cpu")
        monkeypatch.setattr(LocalPool, "estimate_cost", lambda self, entries: estimate)
        plan = _establish(job, "output.seconds_per_unit=10", "output.samples_per_shard=6")
        assert [len(unit) for unit in plan.units] == [4, 2]
        run = json.loads((job.parent / "out/run.json").read_text())
        assert (run["planned"]["samples_per_unit"], run["planned"]["seconds_per_image"]) == (4, 2.5)
        (job.parent / "out/plan/units.parquet").unlink()  # half a plan keeps its unit size when it is completed
        monkeypatch.setattr(LocalPool, "estimate_cost", lambda self, entries: replace(estimate, seconds_per_image=0.1))
        again = _establish(job, "output.seconds_per_unit=10", "output.samples_per_shard=6")
        assert again.units == plan.units


class TestAllowedDrift:
    def test_is_noted_and_not_asked_again(self, job: Path) -> None:
        first = _establish(job)
        commit = job.parent / "out/_smsbatch/commits/000000.json"
        commit.parent.mkdir(parents=True)
        commit.write_text("{}")
        with pytest.raises(sb.DriftError, match="--allow-drift objective"):
            _establish(job, "objective.steps=3")
        manifest = sb.load(job, ["objective.steps=3"])
        with LocalPool(manifest) as pool:
            store = store_of(manifest)
            assert establish(manifest, pool, ["objective.steps"]).units == first.units
            assert establish(manifest, pool).units == first.units
        (note,) = allowed_drift(store).values()
        assert (note["changed"]["objective.steps"]["then"], note["changed"]["objective.steps"]["now"]) == (2, 3)
        with pytest.raises(sb.DriftError, match=r"objective\.steps \(2 then, 4 now\)"):
            _establish(job, "objective.steps=4")

    def test_of_a_section_or_of_weights(self, job: Path, lora: Path) -> None:
        copy = job.parent / "style.safetensors"
        copy.write_bytes(lora.read_bytes())
        _establish(job, f"style.lora={copy}")
        data = bytearray(copy.read_bytes())
        data[-1] ^= 1
        copy.write_bytes(data)
        manifest = sb.load(job, [f"style.lora={copy}", "objective.steps=3", "objective.guidance=2"])
        with LocalPool(manifest) as pool, pytest.raises(sb.DriftError, match="weights: the file"):
            establish(manifest, pool, ["objective"])
        with LocalPool(manifest) as pool:
            establish(manifest, pool, ["objective", "weights"])

    def test_columns_cannot_change(self, job: Path) -> None:
        _establish(job)
        manifest = sb.load(job, ["metrics=[]"])
        with LocalPool(manifest) as pool, pytest.raises(sb.DriftError, match="metrics"):
            establish(manifest, pool, ["metrics"])

    def test_planning_notes_nothing(self, job: Path) -> None:
        _establish(job)
        sb.plan(sb.load(job, ["objective.steps=3"]), allow_drift=["objective.steps"])
        assert allowed_drift(store_of(sb.load(job))) == {}


class TestMap:
    def test_keeps_the_order_and_runs_in_parallel(self, job: Path) -> None:
        meet = threading.Barrier(4)

        def batch_size(item: int) -> int:
            meet.wait(10)
            return item * item

        with LocalPool(sb.load(job)) as pool:
            assert list(pool.map(batch_size, range(8))) == [item * item for item in range(8)]

    def test_closing_it_early_starts_no_more(self, job: Path) -> None:
        started = []
        with LocalPool(sb.load(job)) as pool:
            results = pool.map(lambda item: started.append(item) or item, range(10_000))
            assert next(results) == 0
            results.close()
        assert len(started) < 1000
