"""Trainings in this process and in killed ones: end to end, interrupted, resumed, refused, and with two workers.

`tests/cluster/test_ray_train.py` tests trainings on a cluster.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.faults import Life, until
from support.s3server import Server
from support.trainings import checkpoints, log, parameters, steps, train_together, write_training
from typer.testing import CliRunner, Result

import smsbatch as sb
from smsbatch.cli.app import app
from smsbatch.cli.training import status, status_line
from smsbatch.cluster.ray_pool import pool_of
from smsbatch.commands.export import Exported
from smsbatch.commands.plan import establish
from smsbatch.commands.status import TrainingStatus
from smsbatch.generator.network import Generator
from smsbatch.manifest import Distill
from smsbatch.storage.store import Store
from smsbatch.training.group import WorkerGroup
from smsbatch.training.log import TrainingProgress
from smsbatch.training.loop import train_loop


@pytest.fixture(autouse=True)
def _no_life_is_left() -> Iterator[None]:
    yield
    Life.end_all()


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    return write_training(tmp_path, model, lora)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> tuple[Path, Any, list[Any]]:
    """The manifest of an uninterrupted training, its result and its progress reports."""
    job, seen = write_training(tmp_path_factory.mktemp("whole"), model, lora), list[Any]()
    return job, sb.run(sb.load(job), seen.append), seen


def plan_only(job: Path, *overrides: str) -> None:
    manifest = sb.load(job, overrides)
    with pool_of(manifest) as pool:
        establish(manifest, pool)


def smsbatch(*arguments: str) -> Result:
    result = CliRunner().invoke(app, arguments)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return result


def test_from_manifest_to_generator(whole: tuple[Path, sb.Distilled, list[sb.TrainingProgress]]) -> None:
    job, done, seen = whole
    out = job.parent / "out"
    assert isinstance(done, sb.Distilled)
    assert (done.name, done.samples, done.steps, done.images, done.failed) == ("test", 10, 12, 48, 0)
    assert (done.resumed_from, done.generator) == (0, str(out))
    assert set(done.losses) == {"objective", "fake"}
    assert [now.step for now in seen] == list(range(13))
    assert [now.phase for now in seen] == ["warm-up"] * 3 + ["distillation"] * 10
    assert steps(out) == list(range(1, 13))
    assert all(0 <= line["idle_fraction"] <= 1 for line in log(out))
    assert checkpoints(out) == [2, 4, 6, 8, 10, 12]
    assert {file.name for file in (out / "grids").iterdir()} == {"00000006.jpg", "00000012.jpg"}
    assert (out / "_SUCCESS").exists()
    assert not list((out / "_smsbatch/heartbeats").iterdir())
    run = json.loads((out / "run.json").read_text())
    assert (run["planned"]["samples"], run["planned"]["units"]) == (10, 0)
    assert any("unet" in name for name in run["weights"])
    assert (out / "plan/samples.parquet").exists()
    assert not (out / "plan/units.parquet").exists()


def test_what_it_makes_explains_itself(whole: tuple[Path, sb.Distilled, Any]) -> None:
    job, done, _ = whole
    generator = Generator.load(job.parent / "out/generator")
    assert generator.parameter_count == done.parameters == sb.plan(sb.load(job)).parameters
    assert generator.about["style"] == "wavy style"
    assert generator.about["lora"] == ["style.safetensors"], "not where it lies on this machine"
    assert generator.about["training"]["losses"] == done.losses
    assert generator(torch.rand(1, 3, 20, 33)).shape == (1, 3, 20, 33)
    card = (job.parent / "out/generator/README.md").read_text()
    assert "wavy style" in card
    assert f"{done.parameters:,} parameters" in card
    assert str(job.parent) not in card


@pytest.mark.parametrize(("width", "blocks"), [(64, 9), (16, 4), (5, 1)])
def test_a_plan_counts_the_parameters(job: Path, width: int, blocks: int) -> None:
    planned = sb.plan(sb.load(job, [f"distill.width={width}", f"distill.blocks={blocks}"]))
    assert isinstance(planned, sb.TrainingPlan)
    assert planned.parameters == Generator(width, blocks).parameter_count


@pytest.mark.slow
def test_killed_interrupted_and_gone_on_with_it_is_the_same_generator(job: Path, whole: tuple[Path, Any, Any]) -> None:
    """Equal parameters show that every picture was used exactly as in the uninterrupted training."""
    out = job.parent / "out"
    killed = Life(job)
    until(lambda: 4 in checkpoints(out) or killed.ended)
    assert killed.kill(), killed.said
    saved = checkpoints(out)[-1]
    assert 4 <= saved < 12
    torn = set((out / "_smsbatch/tmp").iterdir())
    now = sb.status(sb.load(job))
    assert (now.step, now.checkpoint, now.finished) == (saved, saved, False)

    asked = Life(job)
    until(lambda: checkpoints(out)[-1] > saved or asked.ended)
    os.kill(asked.pid, signal.SIGTERM)
    assert asked.wait() == 130, asked.said
    assert "smsbatch: interrupted; what is done is kept, the same command goes on from here" in asked.said
    assert set((out / "_smsbatch/tmp").iterdir()) <= torn, "whoever leaves in order leaves nothing half-written"
    left = checkpoints(out)[-1]
    assert saved < left < 12
    told = json.loads((out / "_smsbatch/training/progress.json").read_text())
    assert told["step"] == left, "it ends with a checkpoint"
    assert f"continues it from step {left}" in smsbatch("status", str(out)).stdout

    done = sb.run(sb.load(job))
    assert done.resumed_from == left
    assert steps(out) == list(range(1, 13))
    undisturbed = whole[0].parent / "out"
    expected = parameters(undisturbed)
    assert all(torch.equal(value, expected[name]) for name, value in parameters(out).items())
    assert [line["objective"] for line in log(out)[2:]] == [line["objective"] for line in log(undisturbed)[2:]]


def test_run_again_does_nothing(whole: tuple[Path, Any, Any]) -> None:
    job, done, _ = whole
    before = {file: file.stat().st_mtime_ns for file in (job.parent / "out").rglob("*") if file.is_file()}
    again = sb.run(sb.load(job))
    assert again.resumed_from is None
    assert again.losses == done.losses
    assert {file: file.stat().st_mtime_ns for file in (job.parent / "out").rglob("*") if file.is_file()} == before


def test_a_damaged_checkpoint_is_passed_over_and_said(whole: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """The damage changes no length; only the digest shows it."""
    job, done, _ = whole
    out = shutil.copytree(job.parent / "out", tmp_path / "out")
    (out / "_SUCCESS").unlink()
    (newest,) = (out / "_smsbatch/checkpoints").glob("00000012-*.safetensors")
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    again = sb.run(sb.load(job, [f"output.path={out}"]))
    assert again.resumed_from == 10
    (notice,) = again.notices[len(done.notices) :]
    assert notice.endswith(f"{newest.name} is not what was written; an older checkpoint is taken")


def test_a_notice_of_preemption_is_worth_one_checkpoint(job: Path) -> None:
    """The notice is acted on once, at the first log after it, although it stays set."""
    overrides = ["warmup_steps=5", "steps=1", "log_every=2", "checkpoint_every=100"]
    manifest, asked = sb.load(job, [f"distill.{override}" for override in overrides]), list[int]()
    assert isinstance(manifest, Distill)
    plan_only(job, *(f"distill.{override}" for override in overrides))
    assert train_loop(manifest, WorkerGroup(), stop=lambda: False, preempted=lambda: not asked.append(1))
    assert checkpoints(job.parent / "out") == [2, 6]
    assert len(asked) == 3, "it is a meeting of all workers, which nobody may leave out"


def test_what_worker_0_meets_before_the_first_step_is_met_by_all(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group gets the error of worker 0; otherwise the other workers would wait for it."""

    def full(*_: Any) -> None:
        raise sb.StorageError("no space")

    manifest, group = sb.load(job), WorkerGroup()
    assert isinstance(manifest, Distill)
    plan_only(job)
    monkeypatch.setattr("smsbatch.training.loop.TrainingLog", full)
    with pytest.raises(sb.StorageError, match="no space") as caught:
        train_loop(manifest, group, stop=lambda: False)
    assert group.error is caught.value


def test_two_workers_do_the_step_of_one_with_as_many_pictures(tmp_path: Path, model: Path, lora: Path) -> None:
    """The averaged gradients and losses are equal within rounding.

    The first step of Adam follows a gradient's sign, which rounding can decide, so the learning rate is about zero.
    """
    averaged = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        steps = {"warmup_steps": 1, "steps": 1, "learning_rate": 1e-12}
        job = write_training(folder, model, lora, distill=steps)
        plan_only(job)
        train_together(job, workers, folder / "averaged")
        # Calls 0 to 2 average gradients of the warm-up, the fake score and the generator.
        averaged[workers] = [load_file(folder / "averaged" / call) for call in "012"]
    for one, two in zip(averaged[1], averaged[2], strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, model: Path, lora: Path) -> None:
    job = write_training(tmp_path, model, lora, distill={"learning_rate": 1e38})
    with pytest.raises(sb.RunError, match=r"^step [12]: the .*; lower distill.learning_rate"):
        sb.run(sb.load(job))
    assert checkpoints(tmp_path / "out") == []


def test_a_run_that_was_planned_otherwise(job: Path) -> None:
    plan_only(job)
    with pytest.raises(sb.DriftError, match=r"distill.learning_rate \(0.0002 then, 0.1 now\)"):
        sb.run(sb.load(job, ["distill.learning_rate=0.1"]))
    (job.parent / "photos/photo-03.png").unlink()
    with pytest.raises(sb.DriftError, match="inputs"):
        sb.run(sb.load(job, ["distill.learning_rate=0.1"]), allow_drift=["distill.learning_rate"])


def test_samples_that_cannot_be_had(job: Path) -> None:
    for number in (1, 2, 3):
        (job.parent / f"photos/photo-{number:02}.png").write_bytes(b"no picture")
    with pytest.raises(sb.RunError, match=r"\d+ of \d+ samples failed \(photo-0[123]: decode_error: .*max_failed"):
        sb.run(sb.load(job))


def test_another_driver_is_at_work(job: Path) -> None:
    beats = job.parent / "out/_smsbatch/heartbeats"
    beats.mkdir(parents=True)
    (beats / "elsewhere-1-abc.json").write_text(json.dumps({"time": time.time()}))
    with pytest.raises(sb.RequestError, match="another driver, elsewhere-1-abc, is at work"):
        sb.run(sb.load(job))
    (beats / "elsewhere-1-abc.json").unlink()


def test_to_a_bucket(tmp_path: Path, model: Path, lora: Path, s3: Server, whole: tuple[Path, Any, Any]) -> None:
    url = f"s3://{s3.bucket()}/runs/trial"
    storage = {"endpoint": s3.endpoint, "region": s3.storage.region}
    shutil.copytree(whole[0].parent / "photos", tmp_path / "photos")
    manifest = sb.load(write_training(tmp_path, model, lora, output={"path": url}, storage=storage))
    done = sb.run(manifest)
    assert done.generator == url
    store = Store(url, manifest.storage)
    files = {name: store.read(f"generator/{name}") for name in ("generator.safetensors", "generator.json")}
    undisturbed = parameters(whole[0].parent / "out")
    assert all(torch.equal(value, undisturbed[name]) for name, value in Generator.of_files(files).state_dict().items())
    assert sb.status(manifest).finished


class TestTheCommandLine:
    def test_plan(self, whole: tuple[Path, Any, Any]) -> None:
        shown = smsbatch("plan", str(whole[0]), "--set", "output.path=new", "--limit", "8").stdout
        assert "2 steps of warm-up and 10 of distillation, 4 of 8 images each, to new" in shown
        assert "parameters: width 8, 1 blocks" in shown
        assert "every image 6 times, with 2 noises each time" in shown
        assert "--limit 8" in shown
        assert "continues from step 12 of 12" in smsbatch("plan", str(whole[0])).stdout
        refused = smsbatch("plan", str(whole[0]), "--probe", "2")
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)

    def test_run_and_status(self, whole: tuple[Path, Any, Any]) -> None:
        job, done, _ = whole
        shown = smsbatch("run", str(job)).stdout
        assert "Nothing to do: the generator is there already." in shown
        assert f"`generator: {done.generator}`" in shown
        assert json.loads(smsbatch("run", str(job), "--json").stdout)["steps"] == 12
        for argument in (str(job), done.generator):
            assert "step 12 of 12" in smsbatch("status", argument).stdout
            found = json.loads(smsbatch("status", argument, "--json").stdout)
            assert (found["step"], found["checkpoint"], found["finished"]) == (12, 12, True)
        assert "finished" in smsbatch("status", done.generator, "--watch").stdout

    @pytest.mark.parametrize("verb", ["errors", "verify", "repair", "gc"])
    def test_verbs_of_datasets(self, whole: tuple[Path, Any, Any], verb: str) -> None:
        refused = smsbatch(verb, whole[1].generator)
        assert refused.exit_code == 2
        assert "distills a generator" in refused.stderr
        assert refused.stderr.count("\n") == 1

    def test_doctor(self, whole: tuple[Path, Any, Any]) -> None:
        shown = smsbatch("doctor", str(whole[0])).stdout
        assert "style.safetensors" in shown
        assert "fail" not in shown

    def test_export(self, whole: tuple[Path, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only the call of `export`; `tests/generator/test_onnx.py` tests the files."""
        asked = []

        def export(*arguments: Any) -> Exported:
            asked.append(arguments)
            return Exported(tmp_path / "style.onnx", 32_451, 130_000, 2e-6)

        monkeypatch.setattr(sb, "export", export)
        shown = smsbatch("export", whole[1].generator, "--to", str(tmp_path / "style.onnx")).stdout
        assert asked == [(whole[1].generator, tmp_path / "style.onnx")]
        assert shown.startswith(f"{tmp_path}/style.onnx is written: 32,451 parameters, 130 kB.")
        assert "within 2e-06" in shown

    def test_what_is_shown_while_it_works(self) -> None:
        now = TrainingProgress(250, 1000, "distillation", 2.0, 8.0, {"objective": 0.25}, failed=3, time=time.time())
        shown = TrainingStatus.of("waves", now)
        first, *rest = status(shown)
        assert first.startswith("waves  ████████░")
        assert first.endswith("step 250 of 1,000")
        assert rest == [
            "  objective 0.25",
            "  3 times a sample failed, and another took its place",
            "  distillation, 2 steps/s, 8 pictures/s, about 6 min 15 s left",
        ]
        assert status_line(shown) == (
            "waves: step 250/1,000, objective 0.25, 3 times a sample failed, distillation, 2 steps/s, 8 pictures/s, "
            "about 6 min 15 s left"
        )
