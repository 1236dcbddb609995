"""`replay` gives the same bytes or the same error as the run, and overwrites no file."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.jobs import KEYS, make_photos, pictures, write_manifest

import smsbatch as sb
from smsbatch.commands import replay as replay_module
from smsbatch.commands.replay import replay
from smsbatch.data.pixels import decode, encode
from smsbatch.data.sample import Entry, Span
from smsbatch.manifest import Storage
from smsbatch.runs.run import Run


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    """A finished run with batches of one, so that kernels round the same in a replay; its last sample is broken."""
    folder = tmp_path_factory.mktemp("replay")
    photos = make_photos(folder / "photos")
    (photos / "zero.jpg").write_bytes(b"")
    file = write_manifest(folder, model, lora, photos, compute={"batch_size": 1}, errors={"max_failed_fraction": 0.5})
    sb.run(sb.load(file))
    return file


@pytest.fixture
def out(job: Path) -> str:
    return str(job.parent / "out")


@pytest.mark.parametrize("key", [KEYS[0], KEYS[5]])
def test_the_same_bytes(key: str, out: str, tmp_path: Path) -> None:
    again = replay(out, key, tmp_path)
    assert again.path == tmp_path / f"{key}.png"
    assert (again.same, again.largest, again.mean, again.changed) == (True, 0, 0.0, ())
    assert again.before is not None
    for name in ("seed", "prompt", "sha256", "source_sha256", "lpips", "width", "original_width"):
        assert again.row[name] == again.before[name]
    assert replay(out, key, tmp_path / f"{key}.png").same, "the file that is there is the same"
    assert json.dumps(again.to_dict())


def test_a_failed_sample_tells_its_error(out: str, tmp_path: Path) -> None:
    again = replay(out, "zero", tmp_path)
    assert not again.succeeded
    assert again.before is not None
    assert again.row["error_code"] == again.before["error_code"] == "decode_error"
    assert list(tmp_path.iterdir()) == []


def test_a_signed_url_is_told_without_its_signature(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signed = "http://127.0.0.1:1/zero.png?X-Amz-Signature=5ec2e7"
    monkeypatch.setattr(replay_module, "read_index", lambda *_: [Entry("zero", "png", {"png": Span(signed, 0, None)})])
    run = Run.open(out)
    manifest = run.dataset.model_copy(update={"storage": Storage(retries=0)})
    outcome = replay_module._again(run, manifest, 0)
    assert outcome.error_code == "read_error"
    assert outcome.url.startswith("http://127.0.0.1:1/zero.png?X-Amz-Signature=")
    assert "5ec2e7" not in f"{outcome.url} {outcome.error_message}"


def test_what_a_manifest_may_change_and_what_not(job: Path, tmp_path: Path) -> None:
    """The given manifest's seed is ignored; its batch size makes no difference for one sample."""
    manifest = sb.load(job, ["seed=99", "compute.batch_size=4"])
    assert replay(manifest, KEYS[1], tmp_path).same


def test_a_result_that_is_another_is_measured(out: str, tmp_path: Path) -> None:
    """The run's tar gets a black picture of the same number of bytes; a PNG may have padding after its end."""
    copy = Path(shutil.copytree(out, tmp_path / "out"))
    path = copy / "shards" / "000000.tar"
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{KEYS[0]}.png")
    black = encode(np.zeros((32, 48, 3), np.uint8), "png")
    data = bytearray(path.read_bytes())
    data[member.offset_data : member.offset_data + member.size] = black.ljust(member.size, b"\0")
    path.write_bytes(data)
    again = replay(str(copy), KEYS[0], tmp_path)
    assert again.same is False
    assert again.largest == pictures(Path(out))[KEYS[0]].max()
    assert again.changed == ()


def test_of_a_unit_that_is_not_done(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job.parent / "out", tmp_path / "out"))
    (copy / "_smsbatch" / "commits" / "000000.json").unlink()
    again = replay(str(copy), KEYS[0], tmp_path)
    assert again.succeeded
    assert (again.before, again.same) == (None, None)


def test_from_attempts_while_the_shard_is_not_published(job: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(job.parent / "out", tmp_path / "out"))
    for path in [*copy.glob("_smsbatch/published/*"), *copy.glob("shards/*")]:
        path.unlink()
    assert replay(str(copy), KEYS[0], tmp_path).same


def test_refusals(out: str, tmp_path: Path) -> None:
    with pytest.raises(sb.RequestError, match=r"'photo_3' is not in the plan; did you mean .*photo-3"):
        replay(out, "photo_3")
    mine = tmp_path / f"{KEYS[0]}.png"
    mine.write_bytes(b"the source, perhaps")
    with pytest.raises(sb.RequestError, match="--to FILE"):
        replay(out, KEYS[0], tmp_path)
    assert mine.read_bytes() == b"the source, perhaps"
    for target, said in (
        ("nowhere/x.png", "no folder"),
        ("s3://bucket/x.png", "of its disk"),
        (str(tmp_path / "x.jpg"), "are png; use that extension"),
    ):
        with pytest.raises(sb.RequestError, match=said):
            replay(out, KEYS[0], target)
    with pytest.raises(sb.RequestError, match="no run here"):
        replay(str(tmp_path), KEYS[0])


def test_the_picture_is_the_run_s(out: str, tmp_path: Path) -> None:
    again = replay(out, KEYS[2], tmp_path)
    assert again.path is not None
    assert (decode(again.path.read_bytes()) == pictures(Path(out))[KEYS[2]]).all()
