"""A plan is a partition, written once, then obeyed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import make_photos, write_manifest
from safetensors.torch import load_file, save_file

import smsbatch as sb
from smsbatch.data.store import Store
from smsbatch.execution.plan import cut, establish


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


def _establish(job: Path, *overrides: str) -> sb.Plan:
    manifest = sb.load(job, overrides)
    return establish(manifest, Store(manifest.output.path))


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
    assert _establish(job, "source.limit=3").samples == 3
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
    assert run["planned"] == {"samples": 6, "units": 3, "shards": 2}
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


def test_text_encoder_parts_are_a_notice_of_the_plan(job: Path, lora: Path) -> None:
    tensors = load_file(lora)
    key = next(iter(tensors))
    save_file(tensors | {"lora_te_x.alpha": tensors[key].clone()}, job.parent / "te.safetensors")
    plan = sb.plan(sb.load(job, [f"style.lora={job.parent / 'te.safetensors'}"]))
    assert "1 layers of the text encoder are left out" in plan.notices[0]


def test_an_output_that_cannot_be_written(job: Path) -> None:
    with pytest.raises(sb.StorageError, match="choose another path"):
        _establish(job, f"output.path={job}/below-a-file")
