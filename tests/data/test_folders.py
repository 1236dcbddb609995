"""Folders: metadata of Hugging Face's folders, and everything that is passed over is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.making import STORAGE, loaded, looked_at, make_files, make_tar, source_of
from support.s3server import Server

from smsbatch.data.sources import require_apart
from smsbatch.errors import SourceError


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_metadata_gives_captions(tmp_path: Path) -> None:
    files = {f"{split}/{number}.jpg": b"x" for split in ("train", "test") for number in (1, 2)}
    for split in ("train", "test"):
        rows = [{"file_name": f"{number}.jpg", "text": f"{split} {number}"} for number in (1, 2)]
        files[f"{split}/metadata.jsonl"] = lines(*rows)
    source = source_of("folder", make_files(tmp_path / "p", files))
    entries, notices, contents = looked_at(source)
    samples = [loaded(entry, source) for entry in entries]
    assert [sample.caption for sample in samples] == ["test 1", "test 2", "train 1", "train 2"]
    assert {sample.caption_from for sample in samples} == {"metadata:text"}
    assert (notices, str(contents)) == ([], "4 of 4 (metadata:text 4)")


@pytest.mark.parametrize(
    ("name", "data", "caption"),
    [
        ("metadata.csv", b"file_name,text\na.jpg,a fox\n", "a fox"),
        ("metadata.csv", b'\xef\xbb\xbffile_name,caption\r\nsub/../a.jpg,"a ""red""\nfox"\r\n', 'a "red"\nfox'),
        ("metadata.jsonl", lines({"file_name": "a.jpg", "text": None, "caption": "x"}), "x"),
        ("metadata.jsonl", lines({"file_name": "./a.jpg", "text": ["x", "y"]}), "x"),
    ],
)
def test_metadata_in_its_forms(tmp_path: Path, name: str, data: bytes, caption: str) -> None:
    source = source_of("folder", make_files(tmp_path / "p", {"a.jpg": b"x", name: data}))
    (entry,), _, _ = looked_at(source)
    assert loaded(entry, source).caption == caption


def test_metadata_by_a_column_and_a_path_and_after_sidecars(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.jpg", "says": {"en": name}} for name in ("a", "b")]
    files = {"a.jpg": b"x", "a.txt": b"mine", "b.jpg": b"x", "b.txt": b" ", "metadata.jsonl": lines(*rows)}
    root = make_files(tmp_path / "p", files)
    for rules, captions in (
        (["txt", "metadata:says.en"], ["mine", "b"]),
        (["metadata:says.en", "txt"], ["a", "b"]),
        (["txt"], ["mine", ""]),
    ):
        source = source_of("folder", root, caption=rules)
        entries, _, contents = looked_at(source)
        assert [loaded(entry, source).caption for entry in entries] == captions
        assert contents.left == ({"jsonl": 1} if rules == ["txt"] else {})


def test_rows_of_metadata_that_help_nobody_are_told(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": 7}, {"file_name": "gone.jpg", "text": "x"}, {"text": "of nobody"}]
    rows += [{"file_name": "b.jpg", "text": text} for text in ("one", "two")]
    root = make_files(tmp_path / "p", {"a.jpg": b"x", "b.jpg": b"x", "metadata.jsonl": lines(*rows)})
    entries, notices, _ = looked_at(source_of("folder", root))
    assert [entry.caption for entry in entries] == [None, "two"]
    assert sorted(notices) == [
        f"{root}/metadata.jsonl: captions that are no texts, or too long: 1",
        f"{root}/metadata.jsonl: rows for a picture that has one already: 1",
        f"{root}/metadata.jsonl: rows without a caption in text or caption: 1",
        f"{root}/metadata.jsonl: rows without file_name, which names the picture: 1",
        f"{root}: rows of metadata that name no picture here: 1; gone.jpg",
    ]


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"{", "line 1: not JSON"),
        (b"\n[1]", "line 2: not a JSON object"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_broken_metadata_is_refused_with_its_line(tmp_path: Path, data: bytes, complaint: str) -> None:
    root = make_files(tmp_path / "p", {"a.jpg": b"x", "metadata.jsonl": data})
    with pytest.raises(SourceError) as caught:
        looked_at(source_of("folder", root))
    assert str(caught.value).startswith(f"{root}/metadata.jsonl: {complaint}")


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    files = {
        "a.jpg": b"x",
        ".hidden.jpg": b"x",
        ".git/b.jpg": b"x",
        "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg": b"x",
        "sub/@eaDir/c.jpg": b"x",
        "__MACOSX/._a.jpg": b"x",
        "#recycle/d.jpg": b"x",
    }
    root = make_files(tmp_path / "p", files)
    make_files(tmp_path / "elsewhere", {"e.jpg": b"x"})
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (root / "myself").symlink_to(root / "myself")
    (root / "b.jpg").symlink_to(tmp_path / "elsewhere/e.jpg")
    entries, notices, _ = looked_at(source_of("folder", root))
    assert [entry.key for entry in entries] == ["a", "b"]
    assert notices == [
        f"{root}: hidden files passed over: 2",
        f"{root}: files in folders of thumbnails or of the system passed over: 4",
        f"{root}: links to folders or to nothing passed over: 3; {root}/gone.jpg",
    ]


def test_what_tars_of_other_systems_hold_is_told(tmp_path: Path) -> None:
    members = ["d/a.jpg", "d/._a.jpg", "._b.jpg", "d/@eaDir/a.jpg", "v.1.jpg", "v.2.jpg", "w.jpg", "w.seg.png"]
    members += ["x.jpg", "x.0001.jpg"]
    path = make_tar(tmp_path / "a.tar", [(name, b"x") for name in members])
    entries, notices, _ = looked_at(source_of("webdataset", path))
    assert [(entry.key, entry.image) for entry in entries] == [("d/a", "jpg"), ("v", ""), ("w", "jpg"), ("x", "jpg")]
    joined = "samples with several pictures of dotted names: keys end at the first dot"
    assert notices == [
        f"{path}: hidden members, or without extension: 2, first 'd/._a.jpg'",
        f"{path}: members of thumbnail and system folders passed over: 1",
        f"{path}: {joined}: 2, first 'v'",
    ]


def test_sidecars_on_s3_count_by_their_size(tmp_path: Path, s3: Server) -> None:
    """Planning does not read one file per picture from an object store."""
    url = f"s3://{s3.bucket()}/p"
    files = {"a.jpg": b"x", "a.txt": b"words", "b.jpg": b"x", "b.txt": b"", "c.jpg": b"x", "c.jpg.json": b"{}"}
    s3.upload(make_files(tmp_path / "p", files), url)
    *_, contents = looked_at(source_of("folder", url), s3.storage)
    assert str(contents) == "2 of 3 (json:caption 1, txt 1)"


def test_the_output_must_not_lie_in_the_source(tmp_path: Path) -> None:
    root = make_files(tmp_path / "p", {"a.jpg": b"x", "t/a.csv": b"url\n"})
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    files = ("shards/000000.tar", "metrics/000000.parquet")
    inside = [
        ("folder", root, f"{root}/out"),
        ("folder", root, f"{root}/deep/er/out"),
        ("folder", tmp_path / "link", f"{root}/out"),
        ("folder", root, f"{tmp_path}/link/out"),
        ("folder", "s3://b/p/", "s3://b/p/out"),
        ("webdataset", f"{root}/*/*/*.tar", f"{root}/out"),
        ("webdataset", f"{root}/**/*.tar", f"{root}/out"),
        ("webdataset", f"{root}/{{out,in}}/shards/*.tar", f"{root}/out"),
        ("table", f"{root}/**/*.parquet", f"{root}/out"),
        ("webdataset", "s3://b/**/*.tar", "s3://b/out"),
    ]
    for format, url, output in inside:
        with pytest.raises(SourceError, match=r"^output\.path: .* of source\.urls, and the run would read its own"):
            require_apart(source_of(format, url), STORAGE, output, files)
    beside = [
        ("folder", root, f"{root}-out"),
        ("folder", root, str(tmp_path / "out")),
        ("folder", "s3://b/p", "s3://b/p2"),
        ("folder", "s3://b/p", f"{tmp_path}/b/p"),
        ("webdataset", f"{root}/*.tar", f"{root}/out"),
        ("webdataset", f"{root}/a.tar", f"{root}/out"),
        ("table", f"{root}/**/*.csv", f"{root}/out"),
    ]
    for format, url, output in beside:
        require_apart(source_of(format, url), STORAGE, output, files)


@pytest.mark.parametrize(
    ("data", "caption", "notice"),
    [
        (b"id,label\n1,x\n", None, "no column file_name, so it is no metadata of pictures: id, label"),
        (b'{"file_name": "a.jpg", "text": "x"}\n', None, "no column file_name, so it is no metadata"),
        (b"", None, "no column file_name"),
        ("file_name,text\na.jpg,a\u2028fox\x0b!\n".encode(), "a\u2028fox\x0b!", ""),
        (b'file_name,text\na.jpg,"a fox\nb.jpg,b"\n', "a fox\nb.jpg,b", "1 rows from 2 lines: cells in quotes"),
        (b"file_name, text\na.jpg,x\n", None, "rows without a caption in text or caption: 1"),
    ],
)
def test_metadata_of_odd_forms_is_told(tmp_path: Path, data: bytes, caption: str | None, notice: str) -> None:
    root = make_files(tmp_path / "p", {"a.jpg": b"x", "b.jpg": b"x", "metadata.csv": data})
    entries, notices, _ = looked_at(source_of("folder", root))
    assert entries[0].caption == caption
    assert notice in " | ".join(notices)
    assert bool(notices) == bool(notice)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"file_name,text\na.jpg,a fox, red\n", "line 2: 3 cells, the header has 2"),
        (b'file_name,text\na.jpg,"a fox\n', "line 2: unexpected end of data"),
        (b'file_name,text\na.jpg,"' + b"x" * 200_000 + b'"\n', "line 2: field larger than field limit"),
    ],
)
def test_broken_metadata_tables_are_refused(tmp_path: Path, data: bytes, complaint: str) -> None:
    root = make_files(tmp_path / "p", {"a.jpg": b"x", "metadata.csv": data})
    with pytest.raises(SourceError) as caught:
        looked_at(source_of("folder", root))
    assert str(caught.value).startswith(f"{root}/metadata.csv: {complaint}")


def test_the_nearest_metadata_counts(tmp_path: Path) -> None:
    far, near = ({"file_name": name, "text": text} for name, text in (("d/a.jpg", "far"), ("a.jpg", "near")))
    files = {"d/a.jpg": b"x", "metadata.jsonl": lines(far), "d/metadata.jsonl": lines(near)}
    entries, notices, _ = looked_at(source_of("folder", make_files(tmp_path / "p", files)))
    assert [entry.caption for entry in entries] == ["near"]
    assert [notice.partition(": ")[2] for notice in notices] == ["rows for a picture that has one already: 1"]


def test_rules_of_metadata_keep_their_order(tmp_path: Path) -> None:
    rows = [{"file_name": f"{name}.jpg", "late": f"late {name}"} for name in "ab"]
    files = {"a.jpg": b"x", "a.txt": b"mine", "b.jpg": b"x", "metadata.jsonl": lines(*rows)}
    source = source_of("folder", make_files(tmp_path / "p", files), caption=["metadata:none", "txt", "metadata:late"])
    entries, _, contents = looked_at(source)
    samples = [loaded(entry, source) for entry in entries]
    assert [(one.caption, one.caption_from) for one in samples] == [("mine", "txt"), ("late b", "metadata:late")]
    assert contents.captions == {"txt": 1, "metadata:late": 1}


def test_a_random_caption_of_metadata_is_drawn_for_each_picture(tmp_path: Path) -> None:
    files = {f"{number}/1.jpg": b"x" for number in range(30)}
    files |= {
        f"{number}/metadata.jsonl": lines({"file_name": "1.jpg", "text": ["a", "b", "c"]}) for number in range(30)
    }
    source = source_of("folder", make_files(tmp_path / "p", files), caption_choice="random")
    assert {entry.caption for entry in looked_at(source)[0]} == {"a", "b", "c"}
