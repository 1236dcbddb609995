"""Captions: every place in which datasets have them is found by a rule, and what no rule finds is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.making import loaded, looked_at, make_files, make_tar, source_of

from smsbatch.data.captions import Contents, find_caption
from smsbatch.errors import SampleError


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


CASES: dict[str, tuple[list[str] | None, dict[str, bytes], tuple[str, str]]] = {
    # rules (None: the default), sidecars, (caption, rule)
    "stem.txt": (None, {"txt": b"a fox"}, ("a fox", "txt")),
    "name.txt": (None, {"jpg.txt": b"a fox"}, ("a fox", "txt")),
    "stem before name": (None, {"txt": b"stem", "jpg.txt": b"name"}, ("stem", "txt")),
    "an empty stem.txt falls through to name.txt": (None, {"txt": b"", "jpg.txt": b"name"}, ("name", "txt")),
    "name.json": (None, {"jpg.json": dumped({"caption": "a fox"})}, ("a fox", "json:caption")),
    "sd-scripts": (["caption"], {"caption": b"a fox\n"}, ("a fox", "caption")),
    "upper case in the rule": ([".TXT"], {"txt": b"a fox"}, ("a fox", "txt")),
    "an empty txt beside a full json": (None, {"txt": b"", "json": dumped({"caption": "x"})}, ("x", "json:caption")),
    "a blank txt beside a full json": (None, {"txt": b" \n", "json": dumped({"caption": "x"})}, ("x", "json:caption")),
    "a byte order mark alone": (None, {"txt": b"\xef\xbb\xbf", "jpg.txt": b"x"}, ("x", "txt")),
    "an empty json": (["json:caption", "txt"], {"json": b"", "txt": b"x"}, ("x", "txt")),
    "a null": (["json:caption", "json:alt"], {"json": dumped({"caption": None, "alt": "x"})}, ("x", "json:alt")),
    "a blank value": (["json:a", "json:b"], {"json": dumped({"a": " ", "b": "x"})}, ("x", "json:b")),
    "nested": (["json:a.b"], {"json": dumped({"a": {"b": "x"}})}, ("x", "json:a.b")),
    "nested in a list": (["json:a.b.0"], {"json": dumped({"a": {"b": ["x", "y"]}})}, ("x", "json:a.b.0")),
    "the second of a list": (["json:a.1"], {"json": dumped({"a": ["x", "y"]})}, ("y", "json:a.1")),
    "beyond a list": (["json:a.7", "txt"], {"json": dumped({"a": ["x"]}), "txt": b"y"}, ("y", "txt")),
    "a list on top": (["json:0"], {"json": dumped(["x", "y"])}, ("x", "json:0")),
    "a list, of which the first": (["json:a"], {"json": dumped({"a": ["x", "y"]})}, ("x", "json:a")),
    "a list whose first are blank": (["json:a"], {"json": dumped({"a": [None, "", "y"]})}, ("y", "json:a")),
    "an empty list": (["json:a", "txt"], {"json": dumped({"a": []}), "txt": b"x"}, ("x", "txt")),
    "a list of objects": (["json:a.c"], {"json": dumped({"a": [{"c": "x"}, {"c": "y"}]})}, ("x", "json:a.c")),
    "the first object that has one": (
        ["json:a.c"],
        {"json": dumped({"a": [{"id": 1}, {"c": "x"}]})},
        ("x", "json:a.c"),
    ),
    "lists of lists": (["json:a"], {"json": dumped({"a": [[], ["x"]]})}, ("x", "json:a")),
    "a key with a dot on the way": (["json:a.b.c"], {"json": dumped({"a.b": {"c": "x"}})}, ("x", "json:a.b.c")),
    "a place that is no number": (["json:a.\u00b2", "txt"], {"json": dumped({"a": ["x"]}), "txt": b"y"}, ("y", "txt")),
    "a place of many digits": ([f"json:{9:05000}"], {"json": dumped(["x"])}, ("", "")),
    "a list on top, of objects": (["json:c"], {"json": dumped([{"c": "x"}])}, ("x", "json:c")),
    "a key with a dot": (["json:a.b"], {"json": dumped({"a.b": "x"})}, ("x", "json:a.b")),
    "a dotted extension": (["meta.json:c"], {"meta.json": dumped({"c": "x"})}, ("x", "meta.json:c")),
    "beside NaN": (["json:c"], {"json": b'{"c": "x", "similarity": NaN}'}, ("x", "json:c")),
    "none": (None, {"cls": b"3"}, ("", "")),
    "a path into a text": (["json:a.b", "json:a"], {"json": dumped({"a": "x"})}, ("x", "json:a")),
    "a key of a list of texts": (["json:a", "json:0"], {"json": dumped(["x", "y"])}, ("x", "json:0")),
    "a wrong path": (["json:a.b"], {"json": dumped({"a": {}})}, ("", "")),
}


@pytest.mark.parametrize("format", ["webdataset", "folder"])
@pytest.mark.parametrize("name", CASES)
def test_captions_are_found(tmp_path: Path, name: str, format: str) -> None:
    rules, sidecars, (caption, rule) = CASES[name]
    options: dict[str, Any] = {} if rules is None else {"caption": rules}
    files = {"fox.jpg": b"picture", **{f"fox.{extension}": data for extension, data in sidecars.items()}}
    url = make_files(tmp_path / "p", files) if format == "folder" else make_tar(tmp_path / "p.tar", files.items())
    source = source_of(format, url, **options)
    (entry,), _, contents = looked_at(source)
    sample = loaded(entry, source)
    assert (sample.caption, sample.caption_from) == (caption, rule or None)
    assert entry.caption_from == (rule or None), "planning knows"
    assert contents.captions == ({rule: 1} if rule else {})


def test_a_random_choice_is_of_the_seed_and_the_key() -> None:
    source = source_of("webdataset", "x", caption=["json:a"], caption_choice="random")
    fields = {"json": dumped({"a": [" ", *map(str, range(9))]})}

    def drawn(key: str, seed: int) -> str:
        return find_caption(fields, source, "jpg", key, seed).text

    keys = [f"{number}" for number in range(50)]
    first = [drawn(key, 0) for key in keys]
    assert first == [drawn(key, 0) for key in keys]
    assert len(set(first)) > 6
    assert first != [drawn(key, 1) for key in keys]
    assert "" not in first


def test_contents_are_told_in_a_line() -> None:
    contents = Contents(4000, {"json:caption": 998, "txt": 3000}, {"xmp": 12, "caption": 4000}, {})
    told = "3,998 of 4,000 (txt 3,000, json:caption 998); left aside: 4,000 .caption, 12 .xmp"
    assert str(contents) == told
    assert str(Contents(2, {}, {"": 1}, {"cls": 2})) == "0 of 2; left aside: 1 others; passed through: 2 .cls"


def test_what_no_rule_finds_is_counted_in_a_folder(tmp_path: Path) -> None:
    files = {f"{name}.{extension}": b"x" for name in "abc" for extension in ("jpg", "caption")}
    files |= {"a.txt": b"words", "b.json": dumped({"text": "not this key"}), "c.xmp": b"x", "Thumbs.db": b"x"}
    *_, contents = looked_at(source_of("folder", make_files(tmp_path / "p", files)))
    assert str(contents) == "1 of 3 (txt 1); left aside: 3 .caption, 1 .db, 1 .xmp"


def test_what_no_rule_finds_is_counted_in_tars(tmp_path: Path) -> None:
    tars = []
    for number in (1, 2):
        members = [(f"{number}{key}.{kind}", b"x") for key in "ab" for kind in ("jpg", "caption", "cls")]
        tars.append(make_tar(tmp_path / f"{number}.tar", [*members, (f"{number}a.txt", b"words")]))
    *_, contents = looked_at(source_of("webdataset", *tars))
    assert str(contents) == "2 of 4 (txt 2); passed through: 4 .caption, 4 .cls"
    *_, contents = looked_at(source_of("webdataset", *tars, limit=1))
    assert contents.captions == {"txt": 1}, "only of the samples that are taken"


def test_captions_of_tables_are_counted(tmp_path: Path) -> None:
    make_files(tmp_path, {"t.csv": b"url,text\na.jpg,x\nb.jpg,\nc.jpg,y\n"})
    *_, contents = looked_at(source_of("table", tmp_path / "t.csv", columns={"caption": "text"}))
    assert str(contents) == "2 of 3 (column text 2)"


@pytest.mark.parametrize("rule", ["", "json:", "metadata", "metadata:", ":a", "."])
def test_a_rule_that_is_none_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="is no rule; expected an extension, or extension:path, or metadata:column"):
        source_of("folder", "x", caption=[rule])


def test_a_caption_in_another_encoding_fails_and_counts_as_none(tmp_path: Path) -> None:
    root = make_files(tmp_path / "p", {"fox.jpg": b"x", "fox.txt": "a fox".encode("utf-16")})
    source = source_of("folder", root)
    tar = source_of("webdataset", make_tar(tmp_path / "p.tar", [("fox.jpg", b"x"), ("fox.json", b"{'caption'")]))
    for one, name, complaint in ((source, "fox.txt", "not UTF-8"), (tar, "fox.json", "not JSON")):
        (entry,), (notice,), contents = looked_at(one)
        assert contents.captions == {}
        assert ": sidecars from which no caption can be read: 1" in notice
        assert f"{name} is {complaint}" in notice
        with pytest.raises(SampleError, match=rf"its \.{name[-4:].strip('.')} is {complaint}"):
            loaded(entry, one)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"fox.jpg": b"1", "fox.png": b"2", "fox.png.txt": b"words"}, "txt"),
        ({"fox.jpg": b"1", "fox.txt": b"\xff", "fox.json": b'{"caption": "x"}'}, None),
        ({"fox.jpg": b"1", "fox.txt": b"x" * 70_000, "fox.json": b'{"caption": "x"}'}, None),
        ({"fox.jpg": b"1", "fox.json": b'{"caption": "x", "more": "' + b"x" * 1_100_000 + b'"}'}, "json:caption"),
    ],
)
def test_planning_counts_what_a_run_will_find(tmp_path: Path, files: dict[str, bytes], found: str | None) -> None:
    source = source_of("webdataset", make_tar(tmp_path / "p.tar", files.items()))
    (entry,), _, contents = looked_at(source)
    assert contents.captions == ({found: 1} if found else {})
    if found:
        assert loaded(entry, source).caption_from == found
    else:
        with pytest.raises(SampleError):
            loaded(entry, source)
