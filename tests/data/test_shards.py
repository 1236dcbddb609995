"""A shard's files: our reader and the webdataset library return what was written; equal input gives equal bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings, strategies as st
from support.making import make_tar, outcome, outcomes_of
from webdataset.tariterators import group_by_keys, tar_file_iterator

from smsbatch.data.sample import ROW_SCHEMA, Outcome, Unit, row_schema
from smsbatch.data.shards import (
    check_tar,
    concat_rows,
    concat_tars,
    count_rows,
    digest,
    read_outcomes,
    read_rows,
    read_tar,
    write_rows,
    write_tar,
)
from smsbatch.errors import StorageError

key = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="./_"), min_size=1, max_size=12)
extension = st.from_regex(r"[a-z0-9]{1,5}(\.[a-z0-9]{1,5})?", fullmatch=True)
content = st.dictionaries(extension, st.binary(max_size=1200), max_size=4)


@st.composite
def some_outcomes(draw: st.DrawFn) -> list[Outcome]:
    return [
        Outcome(name, "a.tar", draw(st.binary(max_size=2000)), "webp", caption="c", fields=draw(content))
        if draw(st.booleans())
        else Outcome(name, "a.tar", error_code="oom", fields=draw(content))
        for name in draw(st.lists(key, unique=True, max_size=6))
    ]


@settings(max_examples=60, deadline=None)
@given(some_outcomes(), st.integers(0, 6))
def test_any_fields_come_back(tmp_path_factory: pytest.TempPathFactory, outcomes: list[Outcome], split: int) -> None:
    folder = tmp_path_factory.mktemp("shard")
    path = folder / "all.tar"
    write_tar(path, outcomes)
    expected = {}
    for item in outcomes:
        if item.image is not None:
            made = {"txt": b"c", "json": item.provenance()}
            expected[item.key] = made | dict(item.fields) | {"webp": item.image}

    assert check_tar(path) == list(expected)
    with path.open("rb") as file:
        assert list(read_tar(file)) == list(expected.items())
    with path.open("rb") as file:
        library = {}
        for sample in group_by_keys({**item, "__url__": ""} for item in tar_file_iterator(file)):
            library[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    assert library == expected

    parts = [folder / "first.tar", folder / "second.tar"]
    write_tar(parts[0], outcomes[:split])
    write_tar(parts[1], outcomes[split:])
    concat_tars(parts, folder / "joined.tar")
    assert (folder / "joined.tar").read_bytes() == path.read_bytes()


def test_headers_are_plain_and_sorted(tmp_path: Path) -> None:
    item = Outcome("a", "u", b"image", "png", caption="hä", fields={"cls": b"3", "Seg.png": b"mask", "png": b"source"})
    write_tar(tmp_path / "a.tar", [item, outcome(1, failed=True)])
    with tarfile.open(tmp_path / "a.tar") as tar:
        members = tar.getmembers()
        picture = tar.extractfile("a.png")
        text = tar.extractfile("a.txt")
        assert picture is not None
        assert text is not None
        assert (picture.read(), text.read()) == (b"image", "hä".encode())  # the result, not the source's png
    assert [member.name for member in members] == ["a.Seg.png", "a.cls", "a.json", "a.png", "a.txt"]
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert (member.mode, member.pax_headers) == (0o644, {})
    data = (tmp_path / "a.tar").read_bytes()
    assert data[257:265] == b"ustar\x0000"
    assert len(data) % 10_240 == 0


def test_the_sources_own_text_and_json_stay_as_they_are(tmp_path: Path) -> None:
    fields = {"txt": b" raw \xff bytes ", "json": b'{"b": 1,  "a": 2}'}
    write_tar(tmp_path / "a.tar", [Outcome("a", "u", b"x", "webp", caption="clean", fields=fields)])
    with (tmp_path / "a.tar").open("rb") as file:
        assert list(read_tar(file)) == [("a", {**fields, "webp": b"x"})]


def test_provenance_has_only_what_a_rerun_reproduces(tmp_path: Path) -> None:
    item = Outcome(
        "ä", "s3://b/a.tar", b"x", "webp", caption="c", prompt="p", width=8, seed=2**64 - 1, seconds=1.5, batch_size=4
    )
    values = json.loads(item.provenance())
    assert values["key"] == "ä"
    assert values["seed"] == 2**64 - 1
    assert not {"seconds", "batch_size", "unit", "shard", "attempt", "worker", "status", "error_code", "url"} & set(
        values
    )


def test_samples_with_and_without_a_caption_have_the_same_fields_of_the_same_types(tmp_path: Path) -> None:
    """Readers infer a dataset's columns from its first samples."""
    first = Outcome("a", "u", b"x", "webp")
    second = Outcome("b_~0123456789", "u", b"x", "webp", caption="c", original_key="b.")
    write_tar(tmp_path / "a.tar", [first, second])
    with (tmp_path / "a.tar").open("rb") as file:
        fields = [fields for _, fields in read_tar(file)]
    assert [sorted(its) for its in fields] == [["json", "txt", "webp"]] * 2
    assert [its["txt"] for its in fields] == [b"", b"c"]
    one, other = (json.loads(its["json"]) for its in fields)
    assert (one["caption"], one["original_key"]) == ("", "a")
    assert (other["caption"], other["original_key"]) == ("c", "b.")


def test_every_cut_of_a_tar_is_found(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [outcome(number) for number in range(3)])
    data = (tmp_path / "a.tar").read_bytes()
    end = 9 * 1024  # three samples of three members, each a header block and a data block
    assert check_tar(tmp_path / "a.tar") == ["key-0000", "key-0001", "key-0002"]
    for length in [*range(0, end + 1024, 256), end + 1023]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(StorageError, match=r"cut\.tar: [^;]+$"):  # the caller adds the advice
            check_tar(tmp_path / "cut.tar")
        (tmp_path / "joined.tar").unlink(missing_ok=True)
        with pytest.raises(StorageError):
            concat_tars([tmp_path / "a.tar", tmp_path / "cut.tar"], tmp_path / "joined.tar")


def test_a_tar_of_others_is_not_read_as_a_shard(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("no-extension", b"x")])
    with path.open("rb") as file, pytest.raises(StorageError, match="not written by smsbatch"):
        list(read_tar(file))


# --- rows ---


def rows_file(path: Path, unit: Unit, metrics: tuple[str, ...] = ("lpips",), attempt: str = "a1") -> Path:
    rows = [item.row(unit, attempt, "w", metrics) for item in outcomes_of(unit)]
    write_rows(path, rows, metrics, tar_sha256=f"of {attempt}")
    return path


def test_rows_have_the_stable_columns(tmp_path: Path) -> None:
    rows = read_rows(rows_file(tmp_path / "a.parquet", Unit(7, 2, 10, 16)))
    assert list(rows[0]) == [*ROW_SCHEMA.names, "lpips"]
    assert [row["key"] for row in rows] == [f"key-{number:04d}" for number in range(10, 16)]
    good, bad = rows[0], rows[3]
    assert (good["status"], good["error_code"], good["lpips"], good["unit"], good["shard"]) == (
        "success",
        None,
        0.5,
        7,
        2,
    )
    assert good["sha256"] == hashlib.sha256(b"image key-0010 ").hexdigest()
    assert (bad["status"], bad["error_code"], bad["error_message"]) == ("failed", "decode_error", "damaged")
    assert (bad["sha256"], bad["lpips"], bad["attempt"], bad["worker"]) == (None, None, "a1", "w")


def test_joined_rows_keep_order_and_schema(tmp_path: Path) -> None:
    parts = [rows_file(tmp_path / f"{n}.parquet", Unit(n, 0, 5 * n, 5 * n + 5), attempt=f"a{n}") for n in range(3)]
    concat_rows(parts, tmp_path / "all.parquet", "the digest")
    assert read_rows(tmp_path / "all.parquet") == [row for part in parts for row in read_rows(part)]
    schema = pq.read_schema(tmp_path / "all.parquet")
    assert schema.equals(row_schema(["lpips"]))
    assert schema.metadata[b"smsbatch.tar_sha256"] == b"the digest"


def test_rows_of_an_older_version_have_null_where_it_had_no_column(tmp_path: Path) -> None:
    old, new = (rows_file(tmp_path / f"{n}.parquet", Unit(n, 0, 5 * n, 5 * n + 5)) for n in range(2))
    table = pq.read_table(old).drop_columns("batch_size")
    old.unlink()
    pq.write_table(table, old)
    for first, second, name in ((old, new, "old first"), (new, old, "new first")):
        concat_rows([first, second], tmp_path / name, "digest")
        assert [row["batch_size"] for row in read_rows(tmp_path / name)] == [None] * 10


def test_all_failed_rows_still_have_the_metric_columns(tmp_path: Path) -> None:
    rows_file(tmp_path / "a.parquet", Unit(0, 0, 3, 4), metrics=("lpips", "clip"))
    assert pq.read_schema(tmp_path / "a.parquet").names[-2:] == ["lpips", "clip"]


def test_rows_are_counted_by_the_footer_alone(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.parquet", Unit(0, 0, 3, 9))
    with path.open("rb") as file:
        assert count_rows(file) == 6
    for damaged in (b"", path.read_bytes()[:-9]):
        with pytest.raises(StorageError, match="a cannot be read"):
            count_rows(io.BytesIO(damaged), "a")


def test_outcomes_of_a_tar_without_their_picture_are_refused(tmp_path: Path) -> None:
    rows = rows_file(tmp_path / "a.parquet", Unit(0, 0, 0, 1))
    write_tar(tmp_path / "a.tar", [outcome(0, "another")])
    with pytest.raises(StorageError, match="key-0000: the tar lacks the picture of its row"):
        read_outcomes(tmp_path / "a.tar", rows)


def test_an_existing_file_is_never_written_into(tmp_path: Path) -> None:
    path = rows_file(tmp_path / "a.parquet", Unit(0, 0, 0, 1))
    before = digest(path)
    with pytest.raises(FileExistsError):
        rows_file(path, Unit(0, 0, 0, 2))
    assert digest(path) == before == hashlib.sha256(path.read_bytes()).hexdigest()


def test_outcomes_and_metrics_make_sense() -> None:
    with pytest.raises(ValueError, match="either an image or an error code"):
        Outcome("a", "u")
    with pytest.raises(ValueError, match="either an image or an error code"):
        Outcome("a", "u", image=b"x", image_field="webp", error_code="oom")
    with pytest.raises(ValueError, match="needs its extension"):
        Outcome("a", "u", image=b"x")
    with pytest.raises(ValueError, match="named like the column seed"):
        row_schema(["seed"])
