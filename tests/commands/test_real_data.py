"""Data as the field has it, through whole runs: what is counted, told and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.jobs import make_photos, rows, write_manifest
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch.cli.app import app
from smsbatch.data.colours import COLOURS


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    """A job on three pictures: one with a `.txt`, one with a `.json`, one with a `.caption`, which no rule finds."""
    photos = make_photos(tmp_path / "photos", ["a", "b", "c"])
    (photos / "c.txt").unlink()
    (photos / "b.png.json").write_text(json.dumps({"caption": "of JSON"}))
    (photos / "c.caption").write_text("of sd-scripts")
    rules = ["txt", "json:caption", "json:alt"]
    source = {"format": "folder", "urls": str(photos), "caption": rules}
    return write_manifest(tmp_path, model, lora, photos, source=source)


TOLD = "2 of 3 (json:caption 1, txt 1); left aside: 1 .caption"


def said(*arguments: str) -> str:
    """What a command prints, on one line."""
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_captions_are_counted_by_plan_doctor_run_and_report(job: Path) -> None:
    planned = said("plan", str(job))
    assert f"captions {TOLD}" in planned
    assert "note: source.caption: json:alt gives no sample its caption" in planned
    assert f"captions {TOLD}, in {job.parent}/photos" in said("doctor", str(job))
    assert f"captions {TOLD}" in said("run", str(job))

    out = job.parent / "out"
    found = {key: (row["caption"], row["caption_from"]) for key, row in rows(out).items()}
    assert found == {"a": ("waves number 0", "txt"), "b": ("of JSON", "json:caption"), "c": (None, None)}
    about = json.loads((out / "run.json").read_text())
    assert about["contents"]["captions"] == {"txt": 1, "json:caption": 1}
    assert about["colours"] == COLOURS
    assert f"Captions: {TOLD}." in (out / "report.html").read_text()
    assert f"| captions | `{TOLD}` |" in (out / "README.md").read_text()
    assert json.loads((out / "index.json").read_text())["report"]["numbers"]["captions"] == {
        "txt": 1,
        "json:caption": 1,
    }


def test_pictures_in_a_table_are_stylized_like_files(job: Path) -> None:
    photos = sorted((job.parent / "photos").glob("*.png"))
    cells = [{"bytes": photo.read_bytes(), "path": photo.name} for photo in photos]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, part in (("train", slice(0, 2)), ("test", slice(2, 3))):
        (job.parent / "hub" / split).mkdir(parents=True)
        table = pa.table({"image": pa.array(cells[part], kind), "name": [photo.stem for photo in photos[part]]})
        pq.write_table(table, job.parent / "hub" / split / "0000.parquet")
    source = [
        "source.format=table",
        f"source.urls=['{job.parent}/hub/train/0000.parquet', '{job.parent}/hub/test/0000.parquet']",
        "source.columns={image: image, key: name}",
        "objective.prompt='{style}'",
    ]
    plain = sb.load(job, ["objective.prompt='{style}'", f"output.path={job.parent}/files"])
    sb.run(plain)
    sb.run(sb.load(job, [*source, f"output.path={job.parent}/cells"]))
    files, of_cells = rows(job.parent / "files"), rows(job.parent / "cells")
    for key in "abc":
        assert of_cells[key]["sha256"] == files[key]["sha256"]
        assert of_cells[key]["source_sha256"] == files[key]["source_sha256"]
    assert of_cells["b"]["url"] == f"{job.parent}/hub/train/0000.parquet#row=1"


def test_what_the_index_does_not_use_is_no_drift_and_an_output_inside_is_refused(job: Path) -> None:
    inside = job.parent / "photos" / "out"
    with pytest.raises(sb.SourceError, match=r"output\.path: .* lies in the folder .* choose a path beside the source"):
        sb.run(sb.load(job, [f"output.path={inside}"]))
    assert not inside.exists()
    sb.run(sb.load(job))
    shutil.rmtree(job.parent / "out" / "_smsbatch")
    for name in ("_SUCCESS", "index.json"):
        (job.parent / "out" / name).unlink()
    shutil.rmtree(job.parent / "out" / "shards")
    (job.parent / "photos" / ".DS_Store").write_bytes(b"x")
    (job.parent / "photos" / "Thumbs.db").write_bytes(b"x")
    report = sb.run(sb.load(job))
    assert isinstance(report, sb.Report)
    assert report.succeeded == 3
    (job.parent / "photos" / "a.txt").write_text("other words")
    shutil.rmtree(job.parent / "out" / "_smsbatch" / "commits")
    with pytest.raises(sb.DriftError, match=r"a\.txt was changed"):
        sb.run(sb.load(job))
