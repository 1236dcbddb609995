"""The results of a run, read with the tools that users have: webdataset, Hugging Face datasets, DuckDB, pyarrow.

The run has failed samples and fields that were passed through.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.dataset
import pytest
import webdataset
from PIL import Image
from support.jobs import make_photos, rows, write_manifest

import smsbatch as sb

KEYS = [f"photo-{number}" for number in range(7)]
FAILED = {"photo-1": "decode_error", "photo-4": "bad_caption"}
GOOD = [key for key in KEYS if key not in FAILED]


@dataclass(frozen=True)
class Finished:
    """A run's output, with the captions and labels that its source had."""

    out: Path
    captions: dict[str, str]
    labels: dict[str, bytes]

    @property
    def shards(self) -> list[str]:
        return [str(file) for file in sorted((self.out / "shards").glob("*.tar"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Finished:
    """Seven samples with a caption, a class and metadata; one picture is broken, one caption is no text."""
    folder = tmp_path_factory.mktemp("finished")
    photos = make_photos(folder / "photos", KEYS)
    captions = {key: f"waves – number {number}" for number, key in enumerate(KEYS)}
    labels = {key: str(number % 3).encode() for number, key in enumerate(KEYS)}
    with tarfile.open(folder / "source.tar", "w") as tar:
        for key in KEYS:
            fields = {
                "cls": labels[key],
                "json": json.dumps({"id": key, "tags": ["a", "b"]}).encode(),
                "png": (photos / f"{key}.png").read_bytes(),
                "txt": captions[key].encode(),
            }
            fields["png"] = b"broken" if key == "photo-1" else fields["png"]
            fields["txt"] = b"\xff\xfe" if key == "photo-4" else fields["txt"]
            for extension, content in fields.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    manifest = write_manifest(
        folder,
        model,
        lora,
        folder / "source.tar",
        source={"format": "webdataset"},
        output={"samples_per_unit": 2, "samples_per_shard": 4, "format": "webp"},
        errors={"max_failed_fraction": 0.5},
    )
    report = sb.run(sb.load(manifest))
    assert (report.planned, report.failed) == (7, 2)
    return Finished(folder / "out", captions, labels)


LEAVES_FILES_OPEN = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def _collected() -> Iterator[None]:
    """Collect the tars that both libraries leave open while their warnings are still ignored."""
    yield
    gc.collect()


def _is_picture(picture: Any) -> bool:
    pixels = np.asarray(picture)
    return pixels.shape == (32, 48, 3) and pixels.dtype == np.uint8 and pixels.std() > 1


@LEAVES_FILES_OPEN
@pytest.mark.usefixtures("_collected")
def test_webdataset(finished: Finished) -> None:
    dataset = webdataset.WebDataset(finished.shards, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == GOOD
    for sample in samples:
        key = sample["__key__"]
        assert sample["txt"] == finished.captions[key]
        assert sample["cls"] == int(finished.labels[key])
        assert sample["json"] == {"id": key, "tags": ["a", "b"]}
        assert _is_picture(sample["webp"])


@LEAVES_FILES_OPEN
@pytest.mark.usefixtures("_collected")
def test_webdataset_by_brace_expansion(finished: Finished) -> None:
    urls = f"{finished.out}/shards/{{000000..000001}}.tar"
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil").to_tuple("webp", "txt")
    found = list(dataset)
    assert [caption for _, caption in found] == [finished.captions[key] for key in GOOD]
    assert all(_is_picture(picture) for picture, _ in found)


@LEAVES_FILES_OPEN
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("streaming", [True, False])
def test_hugging_face_datasets(finished: Finished, streaming: bool, tmp_path: Path) -> None:
    import datasets  # after conftest has set Hugging Face offline

    loaded: Iterable[dict[str, Any]] = datasets.load_dataset(
        "webdataset",
        data_files={"train": finished.shards},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path),
    )
    samples = list(loaded)
    assert [sample["__key__"] for sample in samples] == GOOD
    for sample in samples:
        key = sample["__key__"]
        assert sample["txt"] == finished.captions[key]
        assert sample["json"]["id"] == key
        assert _is_picture(sample["webp"])


def test_duckdb(finished: Finished) -> None:
    with duckdb.connect() as database:
        database.execute(f"create view rows as select * from read_parquet('{finished.out}/metrics/*.parquet')")
        database.execute(f"create view planned as select * from read_parquet('{finished.out}/plan/samples.parquet')")
        counts = dict(database.execute("select status, count(*) from rows group by status").fetchall())
        assert counts == {"success": 5, "failed": 2}
        failed = database.execute("select key, error_code from rows where status = 'failed'").fetchall()
        assert dict(failed) == FAILED
        joined = database.execute(
            "select planned.key, rows.caption, rows.lpips from planned left join rows using (key) order by planned.key"
        ).fetchall()
        assert [key for key, _, _ in joined] == KEYS
        assert {key: caption for key, caption, _ in joined if key in GOOD} == {
            key: finished.captions[key] for key in GOOD
        }
        assert all((lpips is None) == (key in FAILED) for key, _, lpips in joined)


def test_pyarrow_dataset(finished: Finished) -> None:
    dataset = pyarrow.dataset.dataset(finished.out / "metrics")
    table = dataset.to_table(columns=["key", "caption"], filter=pyarrow.dataset.field("status") == "success")
    assert dict(zip(*(table[name].to_pylist() for name in ("key", "caption")), strict=True)) == {
        key: finished.captions[key] for key in GOOD
    }
    assert dataset.count_rows() == len(KEYS)
    assert dataset.schema.field("lpips").type == "float"
    assert dataset.schema.field("seed").type == "uint64"


def test_failed_samples_are_only_rows(finished: Finished) -> None:
    members = set()
    for shard in finished.shards:
        with tarfile.open(shard) as tar:
            members |= {member.name for member in tar}
    assert members == {f"{key}.{extension}" for key in GOOD for extension in ("cls", "json", "txt", "webp")}
    assert set(rows(finished.out)) == set(KEYS)


def test_pictures_are_what_the_rows_say(finished: Finished) -> None:
    found = rows(finished.out)
    for shard in finished.shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "webp":
                    content = tar.extractfile(member)
                    assert content is not None
                    encoded = content.read()
                    assert hashlib.sha256(encoded).hexdigest() == found[key]["sha256"]
                    assert Image.open(io.BytesIO(encoded)).size == (found[key]["width"], found[key]["height"])


@LEAVES_FILES_OPEN
@pytest.mark.usefixtures("_collected")
@pytest.mark.parametrize("first", ["a plain.name", "dotted.name"])
def test_datasets_reads_a_folder_in_which_only_some_have_captions(
    first: str, tmp_path: Path, model: Path, lora: Path
) -> None:
    """Only every second picture has a caption, and the keys with dots are mapped."""
    import datasets

    photos = make_photos(tmp_path / "photos", [first, "second", "third", "z dotted.name"])
    manifest = write_manifest(tmp_path, model, lora, photos)
    sb.run(sb.load(manifest))
    files = [str(file) for file in sorted((tmp_path / "out/shards").glob("*.tar"))]
    read = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(read) == 4
    assert sorted(read["txt"]) == ["", "", "waves number 0", "waves number 2"]
