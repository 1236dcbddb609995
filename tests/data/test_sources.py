"""Every source format with valid and unusual input; hostile input is in `test_hostile.py`.

The file exceeds 400 lines because it has the tests of tars, folders, keys and captions, on disk and on S3.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from support.making import STORAGE, indexed, loaded, looked_at, make_files, make_tar, source_of, special
from support.s3server import Server
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from smsbatch import tiny
from smsbatch.data import sources
from smsbatch.data.captions import find_caption
from smsbatch.data.index import from_table
from smsbatch.data.reader import Reader
from smsbatch.data.sample import Entry, Sample, Span
from smsbatch.data.sources import load_sample, parts, scan
from smsbatch.data.tars import split_name
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Storage

FORMATS = ("webdataset", "folder", "table")


def listed(format: str, *urls: object, **options: Any) -> tuple[list[Entry], list[str]]:
    return indexed(source_of(format, *urls, **options))


def keys(format: str, *urls: object) -> list[str]:
    return [entry.key for entry in listed(format, *urls)[0]]


def load(entry: Entry, caption: list[str] | None = None) -> Sample:
    return loaded(entry, source_of("webdataset", "any", caption=caption or []))


def refused(format: str, *urls: object) -> str:
    with pytest.raises(SourceError) as caught:
        listed(format, *urls)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- webdataset: names ---


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{000..002}", ["000", "001", "002"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{b,a}-{0..1}", ["b-0", "b-1", "a-0", "a-1"]),
        ("{a}", ["{a}"]),
        ("?", ["1", "2"]),
        ("*b", ["ab", "bb"]),
        ("[1]", ["[1]"]),  # a file with exactly this name has priority over the glob
    ],
)
def test_brace_ranges_lists_and_globs(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for number, name in enumerate([*names, "other-longer"]):
        make_tar(tmp_path / f"{name}.tar", [(f"{number}.jpg", b"x")])
    entries, notices = listed("webdataset", f"{tmp_path}/{pattern}.tar")
    assert [entry.url for entry in entries] == [f"{tmp_path}/{name}.tar" for name in names]
    assert notices == []


def test_one_missing_file_of_a_range_is_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", [("a.jpg", b"x")])
    assert refused("webdataset", f"{tmp_path}/{{0..1}}.tar") == f"{tmp_path}/1.tar: no such file; check source.urls"
    assert "no such file" in refused("webdataset", tmp_path / "none*.tar")


def test_a_relative_path_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    make_files(tmp_path / "folder", {"b.jpg": b"y"})
    monkeypatch.chdir(tmp_path)
    sources = source_of("webdataset", "a.tar"), source_of("folder", "folder")
    found = [(source, part) for source in sources for part in parts(source, STORAGE)]
    assert [part.url for _, part in found] == [f"{tmp_path}/a.tar", f"{tmp_path}/folder"]
    monkeypatch.chdir("/")  # another process may scan from another folder
    urls = [from_table(scan(part, source, STORAGE).table)[0].url for source, part in found]
    assert urls == [f"{tmp_path}/a.tar", f"{tmp_path}/folder/b.jpg"]


def test_a_tiny_name_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, {"photos/b.jpg": b"y", "photos/b.txt": b"hay"})
    monkeypatch.setattr(tiny, "resolve", lambda url: url.replace("tiny:", f"{tmp_path}/"))
    assert [part.url for part in parts(source_of("folder", "tiny:photos"), STORAGE)] == ["tiny:photos"]
    (entry,), _ = listed("folder", "tiny:photos")
    assert entry.url == "tiny:photos/b.jpg"
    assert load(entry, ["txt"]).caption == "hay"


@given(st.text("abC./-é", min_size=1, max_size=12).filter(lambda name: not name.startswith("./")))
def test_names_split_as_the_library_splits_them(name: str) -> None:
    key, extension = base_plus_ext(name)
    hidden = name.rpartition("/")[2].startswith(".")  # for which the library makes a sample of the folder's name
    assert split_name(name) == (None if key is None or hidden else (key, extension.lower()))


# --- webdataset: contents ---


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_index_has_the_bytes_the_library_reads(tmp_path: Path, format: int) -> None:
    members = [
        ("readme", b"no extension"),
        ("__meta__/x.json", b"library data"),
        (".hidden.jpg", b"hidden"),
        ("dir-v1/0001.jpg", b"one"),
        ("dir-v1/0001.seg.PNG", b"mask"),
        ("dir-v1/0001.txt", "häy".encode()),
        ("0002.JPEG", b"two"),
        ("naïve.jpg", b"three"),
        ("0004.jpg", b""),
    ]
    path = make_tar(tmp_path / "a.tar", members, format)
    entries, notices = listed("webdataset", path)
    ours = {}
    for entry in entries:
        sample = load(entry, ["txt"])
        ours[sample.key] = {sample.image_field: sample.image, **sample.fields}
    with path.open("rb") as file:
        samples = group_by_keys({**item, "__url__": ""} for item in tar_file_iterator(file))
        theirs = {sample.pop("__key__"): sample for sample in samples}
    for sample in theirs.values():
        sample.pop("__url__")
    assert ours == theirs
    assert list(ours) == ["dir-v1/0001", "0002", "naïve", "0004"]
    assert [notice for notice in notices if "hidden members, or without extension" not in notice] == []


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_read_and_mapped_the_same(tmp_path: Path, format: int) -> None:
    name = "é" * 90 + "/" + "k" * 200
    path = make_tar(tmp_path / "a.tar", [(f"{name}.jpg", b"x"), (f"{name}.txt", b"y"), ("b.jpg", b"z")], format)
    (first, second), notices = listed("webdataset", path)
    assert (first.key[:42], first.original_key, sorted(first.fields)) == ("é" * 42, name, ["jpg", "txt"])
    assert (second.key, second.original_key, load(second).image, notices) == ("b", None, b"z", [])
    assert load(first).original_key == name


def test_a_leading_dot_slash_is_dropped(tmp_path: Path) -> None:
    assert keys("webdataset", make_tar(tmp_path / "a.tar", [("./a.jpg", b"x"), (".//b/c.jpg", b"y")])) == ["a", "b/c"]


def test_indexing_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_tar(tmp_path / "a.tar", [(f"{number}.jpg", bytes(1_000_000)) for number in range(5)])
    read = []

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(sources, "open_url", lambda url, storage: Counting(url))
    assert len(listed("webdataset", path)[0]) == 5
    assert sum(read) < 20_000


def test_fields_need_not_be_adjacent(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"A"), ("b.txt", b"B")])
    entries, _ = listed("webdataset", path)
    assert [(entry.key, list(entry.fields)) for entry in entries] == [("a", ["jpg", "txt"]), ("b", ["jpg", "txt"])]


def test_the_preferred_picture_is_taken_and_the_other_passed_through(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.png", b"png"), ("a.jpg", b"jpg"), ("a.seg.png", b"mask")])
    (entry,), _ = listed("webdataset", path)
    sample = load(entry)
    assert (sample.image_field, sample.image, sample.fields) == ("jpg", b"jpg", {"png": b"png", "seg.png": b"mask"})


def test_a_sample_without_picture_is_an_entry_that_fails(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("b.txt", b"text"), ("b.gif", b"gif")])
    entries, _ = listed("webdataset", path)
    assert [entry.key for entry in entries] == ["a", "b"]
    with pytest.raises(SampleError, match=r"^no image \(jpg, jpeg, png, webp\) among its fields: txt, gif$") as caught:
        load(entries[1])
    assert caught.value.code == "read_error"
    assert entries[1].url == str(path)


# --- webdataset: damage ---


def three_samples(tmp_path: Path) -> Path:
    """Members of 512 header + 1024 data bytes: a.jpg at 0, b.jpg at 1536, c.jpg at 3072, end at 4608."""
    return make_tar(tmp_path / "a.tar", [(f"{key}.jpg", key.encode() * 1000) for key in "abc"])


def cut(path: Path, length: int) -> Path:
    os.truncate(path, length)
    return path


def test_cut_in_data_keeps_the_whole_samples_and_fails_the_cut_one(tmp_path: Path) -> None:
    entries, notices = listed("webdataset", cut(three_samples(tmp_path), 3072 + 512 + 400))
    assert [load(entry).image for entry in entries[:2]] == [b"a" * 1000, b"b" * 1000]
    with pytest.raises(SampleError, match=r"a\.tar: cut off, 600 of 1000 bytes at 3584 are missing"):
        load(entries[2])
    assert notices == [f"{tmp_path}/a.tar: unexpected end of data at byte 4608; samples found: 3"]


def test_cut_between_data_and_padding_loses_nothing(tmp_path: Path) -> None:
    entries, notices = listed("webdataset", cut(three_samples(tmp_path), 3072 + 512 + 1000))
    assert load(entries[2]).image == b"c" * 1000
    assert len(notices) == 1


@pytest.mark.parametrize("extra", [0, 100, 512, 800])
def test_cut_at_a_member_boundary_is_noticed(tmp_path: Path, extra: int) -> None:
    path = cut(three_samples(tmp_path), 3072)
    path.write_bytes(path.read_bytes() + bytes(extra))
    entries, notices = listed("webdataset", path)
    assert [entry.key for entry in entries] == ["a", "b"]
    assert notices == [f"{path}: no end-of-archive blocks, perhaps cut; samples found: 2"]


def test_a_damaged_header_is_noticed(tmp_path: Path) -> None:
    path = three_samples(tmp_path)
    data = bytearray(path.read_bytes())
    data[1536:1600] = b"\xff" * 64
    path.write_bytes(data)
    entries, notices = listed("webdataset", path)
    assert [entry.key for entry in entries] == ["a"]
    assert notices == [f"{path}: damaged header at byte 1536, nothing after it can be read; samples found: 1"]


def test_cut_between_image_and_caption_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("a.txt", b"text")])
    (entry,), notices = listed("webdataset", cut(path, 1024))
    assert load(entry, ["txt"]).caption == ""
    assert "perhaps cut" in notices[0]


def test_a_sample_that_lost_its_caption_to_a_cut_is_no_good_sample(tmp_path: Path) -> None:
    """If all others have a caption, the last one would otherwise be stylized without one and count as a success."""
    members = [("a.jpg", b"x"), ("a.txt", b"text"), ("b.jpg", b"x"), ("b.txt", b"text")]
    (first, second), notices = listed("webdataset", cut(make_tar(tmp_path / "a.tar", members), 3 * 1024))
    assert load(first, ["txt"]).caption == "text"
    with pytest.raises(SampleError, match="cut off, 1 of 1 bytes"):
        load(second, ["txt"])
    assert "perhaps cut" in notices[0]


def test_members_that_are_no_samples_are_told(tmp_path: Path) -> None:
    members = [("README", b"x"), (".hidden.jpg", b"x"), ("a.jpg", b"x")]
    (entry,), notices = listed("webdataset", make_tar(tmp_path / "a.tar", members))
    assert entry.key == "a"
    assert "hidden members, or without extension: 2, first 'README'" in notices[0]


def test_empty_shards_are_noticed_and_an_empty_source_refused(tmp_path: Path) -> None:
    (tmp_path / "zero.tar").touch()
    make_tar(tmp_path / "nothing.tar", [])
    good = make_tar(tmp_path / "good.tar", [("a.jpg", b"x")])
    entries, notices = listed("webdataset", tmp_path / "zero.tar", tmp_path / "nothing.tar", good)
    assert len(entries) == 1
    assert notices == [
        f"{tmp_path}/zero.tar: an empty file; samples found: 0",
        f"{tmp_path}/nothing.tar: no samples in it",
    ]
    message = refused("webdataset", tmp_path / "nothing.tar")
    assert "no samples found" in message
    assert "expected pictures (jpg, jpeg, png, webp)" in message


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(three_samples(tmp_path).read_bytes()))
    (tmp_path / "text.tar").write_text("hello " * 1000)
    (tmp_path / "folder.tar").mkdir()
    for name in ("a.tar.gz", "text.tar"):
        assert f"{name}: not an uncompressed tar" in refused("webdataset", tmp_path / name)
    assert "folder.tar: a folder, not a file; name the files in it" in refused("webdataset", tmp_path / "folder.tar")


def test_links_and_devices_are_passed_over_and_said(tmp_path: Path) -> None:
    members = [
        (special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (special("hard.jpg", tarfile.LNKTYPE, "a.jpg"), b""),
        (special("device.jpg", tarfile.CHRTYPE), b""),
        (special("pipe.jpg", tarfile.FIFOTYPE), b""),
        (special("folder.jpg", tarfile.DIRTYPE), b""),
        ("a.jpg", b"x"),
    ]
    path = make_tar(tmp_path / "a.tar", members)
    entries, notices = listed("webdataset", path)
    assert [entry.key for entry in entries] == ["a"]
    assert notices == [f"{path}: links, devices or sparse files passed over: 4"]


# --- keys ---


def test_duplicate_keys_name_both_places(tmp_path: Path) -> None:
    one, two = (make_tar(tmp_path / f"{number}.tar", [("a.jpg", b"x"), ("b.jpg", b"x")]) for number in (1, 2))
    advice = "keys must be unique: rename one of them, or set source.key_prefix to shard; 2 keys are duplicated"
    assert refused("webdataset", one, two) == f"{two}: key 'a' is also in {one}; {advice}"
    assert refused("webdataset", one, one) == f"{one}: listed twice in source.urls; name it once"
    twice = make_tar(tmp_path / "3.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.JPG", b"y")])
    assert refused("webdataset", twice).startswith(f"{twice}: two members are 'a.jpg'")


def test_a_mapped_key_that_stands_twice_is_shown_with_its_original(tmp_path: Path) -> None:
    one, two = (make_tar(tmp_path / f"{number}.tar", [("v.1/a.jpg", b"x")]) for number in (1, 2))
    assert "(made of 'v.1/a') is also in" in refused("webdataset", one, two)


def test_a_limit_takes_the_first_samples(tmp_path: Path) -> None:
    tars = [make_tar(tmp_path / f"{name}.tar", [(f"{name}{n}.jpg", b"x") for n in range(3)]) for name in "ab"]
    entries, _ = listed("webdataset", *tars, limit=4)
    assert [entry.key for entry in entries] == ["a0", "a1", "a2", "b0"]


# --- parts ---


def test_parts_are_the_objects_with_size_and_etag(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    (part,) = parts(source_of("webdataset", path), STORAGE)
    assert part == ("webdataset", str(path), path.stat().st_size, part.etag, "a", "")
    os.utime(path, (1, 1))
    (later,) = parts(source_of("webdataset", path), STORAGE)
    assert part.etag != later.etag
    assert {span.etag for entry in listed("webdataset", path)[0] for span in entry.fields.values()} == {later.etag}


@pytest.mark.parametrize("change", ["touched", "added", "renamed"])
def test_the_part_of_a_folder_changes_with_any_of_its_files(tmp_path: Path, change: str) -> None:
    root = make_files(tmp_path / "photos", {"a.jpg": b"x", "a.txt": b"yy"})
    find = partial(parts, source_of("folder", root), STORAGE)
    before = find()
    assert before == find()
    assert before[0][:3] == ("folder", str(root), 3)
    make_files(root, {".DS_Store": b"x", "c": b"", "c.xmp": b"", "@eaDir/a.jpg": b"x", "d.txt": b"of no picture"})
    assert find() == before, "files that the index does not use come and go"
    if change == "touched":
        os.utime(root / "a.jpg", (1, 1))
    elif change == "added":
        make_files(root, {"c.png": b""})
    else:
        (root / "a.txt").rename(root / "a.jpg.txt")
    assert find()[0].etag != before[0].etag


def test_scans_are_plain_data_for_any_process(tmp_path: Path) -> None:
    source = source_of("webdataset", make_tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("b.txt", b"y")]))
    (part,) = parts(source, STORAGE)
    scanned = pickle.loads(pickle.dumps(scan))(*pickle.loads(pickle.dumps((part, source, STORAGE))))
    assert pickle.loads(pickle.dumps(scanned)) == scan(part, source, STORAGE) == scanned


# --- folder ---


def test_folder_keys_and_sidecars(tmp_path: Path) -> None:
    files = {
        "b/two.JPG": b"2",
        "b/two.TXT": b"text",
        "b/two.json": b"{}",
        "b/two.gif": b"not in images",
        "a.v1/one.x.png": b"1",
        "a.v1/one.txt": b"of another stem",
        ".git/three.jpg": b"hidden",
        ".four.jpg": b"hidden",
        "notes.txt": b"nobody's",
        "jpg": b"no suffix",
    }
    entries, notices = listed("folder", make_files(tmp_path / "photos", files))
    assert [(entry.key, entry.image, sorted(entry.fields)) for entry in entries] == [
        ("a_v1__one_x", "png", ["png"]),
        ("b__two", "jpg", ["jpg", "json", "txt"]),
    ]
    assert entries[1].url == f"{tmp_path}/photos/b/two.JPG"
    sample = load(entries[1], ["txt"])
    assert (sample.image, sample.caption, sample.fields) == (b"2", "text", {"json": b"{}", "txt": b"text"})
    assert [notice.partition(": ")[2] for notice in notices] == ["hidden files passed over: 2"]
    *_, contents = looked_at(source_of("folder", tmp_path / "photos"))
    assert str(contents) == "1 of 2 (txt 1); left aside: 2 .txt, 1 others, 1 .gif"


def test_folder_clashes_are_refused(tmp_path: Path) -> None:
    message = refused("folder", make_files(tmp_path / "one", {"a.jpg": b"1", "a.png": b"2"}))
    assert message.startswith(f"{tmp_path}/one/a.png: key 'a' is also in {tmp_path}/one/a.jpg")
    assert "'a__b' is also" in refused("folder", make_files(tmp_path / "two", {"a/b.jpg": b"1", "a__b.jpg": b"2"}))


def test_what_is_no_folder_of_pictures_is_refused(tmp_path: Path) -> None:
    make_files(tmp_path, {"empty/notes.txt": b"x", "a.tar": b"x"})
    assert refused("folder", tmp_path / "none") == f"{tmp_path}/none: no such folder; check source.urls"
    assert "set source.format to webdataset" in refused("folder", tmp_path / "a.tar")
    assert "no samples found" in refused("folder", tmp_path / "empty")
    make_files(tmp_path, {"three/a.jpg": b"1", "three/b.jpg": b"2", "three/c.jpg": b"3"})
    some = indexed(source_of("folder", tmp_path / "three", skip=1, limit=1))[0]
    assert [entry.key for entry in some] == ["b"]
    with pytest.raises(SourceError, match=r"no samples found after the first 1,000 \(source\.skip\); expected"):
        indexed(source_of("folder", tmp_path / "three", skip=1000))


def test_links_to_files_are_followed_and_pipes_never_opened(tmp_path: Path) -> None:
    make_files(tmp_path, {"elsewhere.jpg": b"picture", "photos/a.jpg": b"x"})
    (tmp_path / "photos" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    (tmp_path / "photos" / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "photos" / "loop.jpg").symlink_to(tmp_path / "photos")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")
    entries, _ = listed("folder", tmp_path / "photos")
    assert [(entry.key, load(entry).image) for entry in entries] == [
        ("a", b"x"),
        ("link", b"picture"),
    ]


def test_two_folders_with_one_name_each_are_two_parts(tmp_path: Path) -> None:
    one, two = (make_files(tmp_path / name, {f"{name}.jpg": b"x"}) for name in ("one", "two"))
    assert keys("folder", one, two) == ["one", "two"]
    assert refused("folder", one, one) == f"{one}: listed twice in source.urls; name it once"


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_goes_away_after_planning_is_a_failed_sample(tmp_path: Path, format: str) -> None:
    picture = make_files(tmp_path / "photos", {"a.jpg": b"x"}) / "a.jpg"
    tar = make_tar(tmp_path / "a.tar", [("a.jpg", b"x")])
    make_files(tmp_path, {"a.csv": b"url\nphotos/a.jpg\n"})
    url, gone = {"webdataset": (tar, tar), "folder": (tmp_path / "photos", picture), "table": ("", picture)}[format]
    (entry,), _ = listed(format, url or tmp_path / "a.csv")
    gone.unlink()
    with pytest.raises(SampleError, match="No such file") as caught:
        load(entry)
    assert caught.value.code == "read_error"


# --- on S3 ---


@pytest.mark.parametrize("format", FORMATS)
def test_a_source_on_s3_is_the_one_on_disk(tmp_path: Path, s3: Server, format: str) -> None:
    root = tmp_path / "source"
    make_files(
        root, {"p/a.jpg": b"1", "p/a.txt": b"one", "p/b/c.jpg": b"2", "p/t-0.csv": b"url,n\na.jpg,\nb/c.jpg,x\n"}
    )
    make_tar(root / "p/0.tar", [("a.jpg", b"1"), ("a.txt", b"one")])
    make_tar(root / "p/1.tar", [("v.2/b.jpg", b"22"), ("c.txt", b"no picture")])
    bucket = f"s3://{s3.bucket()}/deep"
    s3.upload(root, bucket)
    names = {"webdataset": "p/{0..1}.tar", "folder": "p", "table": "p/t-*.csv"}[format]

    def found(root: str, storage: Storage) -> list[object]:
        source = source_of(format, f"{root}/{names}", columns={"caption": "n"})
        rows: list[object] = []
        for entry in indexed(source, storage)[0]:
            places = {
                name: span._replace(url=span.url.removeprefix(root), etag="") for name, span in entry.fields.items()
            }
            rows += [(entry.key, entry.original_key, places)]
            if entry.image:
                sample = loaded(entry, source, storage)
                rows += [(sample.image, sample.caption, sample.fields, sample.url.removeprefix(root))]
        return rows

    on_disk = found(str(root), STORAGE)
    assert len(on_disk) > 3
    assert found(bucket, s3.storage) == on_disk


def test_s3_objects_that_are_replaced_change_their_etag(tmp_path: Path, s3: Server) -> None:
    url = f"s3://{s3.bucket()}"
    source = source_of("webdataset", f"{url}/a.tar")
    make_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    s3.upload(tmp_path, url)
    (before,), ((entry,), _) = parts(source, s3.storage), indexed(source, s3.storage)
    make_tar(tmp_path / "a.tar", [("a.jpg", b"2")])
    s3.upload(tmp_path, url)
    (after,) = parts(source, s3.storage)
    assert (before.size, before.etag != after.etag) == (after.size, True)
    with pytest.raises(SampleError, match="was replaced since it was planned"):
        loaded(entry, source, s3.storage)


def test_what_s3_does_not_have_is_refused(s3: Server) -> None:
    url = f"s3://{s3.bucket()}"
    for format, name in (("webdataset", "a.tar"), ("webdataset", "*.tar"), ("table", "t.csv"), ("folder", "p")):
        with pytest.raises(SourceError, match=r"no such (file|folder)"):
            indexed(source_of(format, f"{url}/{name}"), s3.storage)


# --- captions ---


@pytest.mark.parametrize(
    ("rules", "fields", "bad"),
    [
        (["txt"], {"txt": 65_537}, True),
        (["txt"], {"txt": 65_536}, False),
        (["words", "txt"], {"words": 3, "txt": 70_000}, False),  # the long txt is not used
        (["json:caption"], {"json": 70_000, "txt": 70_000}, False),
        (["txt"], {"txt": 0, "jpg.txt": 65_537}, True),  # the empty one is passed by
        (["txt", "words"], {"jpg.txt": 9, "words": 70_000}, False),
    ],
)
def test_a_caption_that_is_too_long_is_not_even_read(rules: list[str], fields: dict[str, int], bad: bool) -> None:
    class Zeros(Reader):
        def read(self, span: Span) -> bytes:
            read.append(span.url)
            return b"{}" + b" " * 9 if span.url == "json" else b"x" * (span.length or 0)

    read: list[str] = []
    entry = Entry("a", "jpg", {"jpg": Span("jpg", 0, 1)} | {name: Span(name, 0, size) for name, size in fields.items()})
    source = source_of("webdataset", "any", caption=rules)
    if bad:
        with pytest.raises(
            SampleError, match=r"its \.(jpg\.)?txt has 65,537 bytes; a caption has at most 65"
        ) as caught:
            load_sample(entry, source, Zeros(STORAGE, 10**6))
        assert (caught.value.code, read) == ("bad_caption", [])
    else:
        load_sample(entry, source, Zeros(STORAGE, 10**6))
        assert sorted(read) == sorted(["jpg", *fields])


def caption(rules: list[str], **fields: bytes) -> str:
    return find_caption(fields, source_of("webdataset", "any", caption=rules), "jpg").text


def test_the_first_rule_that_finds_one_gives_the_caption() -> None:
    fields = {"txt": b"\xef\xbb\xbf a caption\n", "json": json.dumps({"caption": "söme", "other": None}).encode()}
    assert caption(["txt", "json:caption"], **fields) == "a caption"
    assert caption(["json:caption", "txt"], **fields) == "söme"
    assert caption(["json:missing", "json:other", "cls", "txt"], **fields) == "a caption"
    assert caption(["cls"], **fields) == ""
    assert caption([], **fields) == ""


@pytest.mark.parametrize(
    ("rule", "data", "complaint"),
    [
        ("txt", b"caf\xe9", "not UTF-8"),
        ("txt", b"\xff\xfeh\0i\0", "not UTF-8"),
        ("json:caption", b"\xff{}", "not UTF-8"),
        ("json:caption", b"{'caption': 1}", "not JSON"),
        ("json:caption", b"7", "neither a JSON object nor a list"),
        ("json:caption", b"[" * 200_000, "not JSON"),
        ("json:caption", b'{"caption": {"en": "a"}}', "not a text"),
        ("json:caption", b'{"caption": [7]}', "not a text"),
        ("json:caption", b'{"caption": "half a pair: \\ud83d"}', "not a text"),
    ],
)
def test_a_bad_caption_fails_the_sample(rule: str, data: bytes, complaint: str) -> None:
    with pytest.raises(SampleError, match=complaint) as caught:
        caption([rule], **{rule.partition(":")[0]: data})
    assert caught.value.code == "bad_caption"
