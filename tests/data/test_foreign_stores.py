"""What a table's rows name is foreign: its refusals are those of rows, and the run ends only for its own stores."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fsspec.registry import known_implementations
from support.jobs import make_photos, rows, write_manifest
from support.making import loaded, source_of
from support.s3server import Server

import smsbatch as sb
from smsbatch.data.reader import Reader
from smsbatch.data.sample import Entry, Span
from smsbatch.errors import SampleError, StorageError
from smsbatch.manifest import Storage

NOWHERE = Storage(endpoint="http://127.0.0.1:9", region="us-east-1", retries=0, timeout_s=1)
SILENT = NOWHERE.model_copy(update={"timeout_s": 0.9})  # the same with credentials: a client keeps what it found


def refusal(url: str, storage: Storage) -> str:
    """The message of the row that names `url` in a table on disk."""
    with pytest.raises(SampleError) as caught:
        loaded(Entry("a", "jpg", {"jpg": Span(url)}, ""), source_of("table", "/disk/t.csv"), storage)
    assert caught.value.code == "read_error"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/a.jpg", r"^s3://bucket/a.jpg: Unable to locate credentials; set AWS_PROFILE"),
        ("s3a://bucket/a.jpg", "Unable to locate credentials"),
        ("hf://datasets/x/y/a.jpg", "^hf://datasets/x/y/a.jpg: "),
        ("gs://bucket/a.jpg", "gcsfs"),
        ("what://a.jpg", "no driver is known"),
        ("zip://a.jpg", "cannot be used by an address alone"),
        ("simplecache::file:///etc/passwd", "no driver is known"),
        ("tiny:../errors.py", "leaves the embedded folder"),
    ],
)
def test_a_refusal_of_what_a_row_names_is_the_rows(url: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    assert re.search(reason, refusal(url, NOWHERE))


@pytest.mark.parametrize("rest", ["x/y.jpg", "", "@", "x::y", "a b\\c?*[", "[::1", "h:x/a"])
def test_no_address_of_any_driver_ends_a_run(rest: str) -> None:
    for scheme in known_implementations:
        if scheme not in {"http", "https"}:
            refusal(f"{scheme}://{rest}", NOWHERE)


def test_an_endpoint_that_does_not_answer_for_a_row_is_the_rows(s3: Server) -> None:
    assert "Could not connect to the endpoint" in refusal("s3://bucket/a.jpg", SILENT)


@pytest.mark.parametrize(
    ("table", "output"),
    [("s3://bucket/t.csv", ""), ("s3a://bucket/x/{0..9}.csv", ""), ("/disk/t.csv", "s3://bucket/out")],
)
def test_what_lies_beside_a_table_or_the_output_is_the_runs_own(s3: Server, table: str, output: str) -> None:
    """Else an outage of the run's own store would be a failure of every sample that is read meanwhile."""
    reader = Reader.of(source_of("table", table), SILENT, output)
    with pytest.raises(StorageError, match=r"^cannot read s3://bucket/a.jpg: .*; check the network and the endpoint"):
        reader.read(Span("s3://bucket/a.jpg"))
    with pytest.raises(SampleError):
        reader.read(Span("s3://another/a.jpg"))


@pytest.mark.parametrize("format", ["webdataset", "folder"])
def test_objects_that_the_source_lists_are_the_runs_own(s3: Server, format: str) -> None:
    with pytest.raises(StorageError, match=r"^cannot read s3://bucket/a\.tar"):
        Reader.of(source_of(format, "s3://other/x"), SILENT).read(Span("s3://bucket/a.tar", 512, 9))


def test_a_run_goes_on_until_too_many_rows_fail_alike_and_says_why(
    tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    photos = make_photos(tmp_path / "photos")
    names = [f"{photos}/photo-0.png", "s3://bucket/1.png", "s3://bucket/2.png", "nowhere://x/3.png"]
    (tmp_path / "t.csv").write_text("\n".join(["url", *names]))
    file = write_manifest(
        tmp_path,
        model,
        lora,
        tmp_path,
        source={"format": "table", "urls": str(tmp_path / "t.csv")},
        errors={"max_failed_fraction": 0.9},
        storage=NOWHERE.model_dump(mode="json", exclude_defaults=True),
    )
    report = sb.run(sb.load(file))
    assert (report.succeeded, report.errors) == (1, {"read_error": 3})
    failed = [row["error_message"] for row in rows(tmp_path / "out").values() if row["status"] == "failed"]
    assert failed[0] == (
        "s3://bucket/1.png: Unable to locate credentials; set AWS_PROFILE or other AWS_ variables, or storage.profile; "
        "for a public bucket storage.anonymous"
    )
    assert failed[2] == "nowhere://: no driver is known for this scheme"
    with pytest.raises(sb.RunError) as caught:
        sb.run(sb.load(file, ["errors.max_failed_fraction=0.5"]))
    assert "3 of 4 samples failed (3 read_error)" in str(caught.value)
    assert f"; the most common reason (2 of 3): {failed[0]}; everything is written;" in str(caught.value)
