"""The key rule: a valid key is kept, any other name is mapped to one, and no two names get the same key."""

from __future__ import annotations

import io
import re
import tarfile
from pathlib import PurePosixPath
from unicodedata import category

import pytest
from hypothesis import example, given, settings, strategies as st
from webdataset.tariterators import base_plus_ext

from smsbatch.data.keys import LONGEST_NAME, is_extension, map_key
from smsbatch.data.tars import split_name

# Any name that a tar header, a JSON string or a disk can hold, with offending characters more often than by chance.
names = st.text(st.characters() | st.sampled_from("./\\~_\x00\n\x7f\ud83d\udce9 aé"), max_size=130)
extensions = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("./aé"), min_size=1, max_size=34)


@pytest.mark.parametrize("key", ["a", "0001", "train/cat/0001", "naïve key", "a__b", "-", "~", "a~012345678", "k" * 95])
def test_a_good_key_stays(key: str) -> None:
    assert map_key(key, ["jpg"]) == (key, None)


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.b/c", "a_b/c"),
        ("../../etc/passwd", "__/__/etc/passwd"),
        ("/etc/passwd", "etc/passwd"),
        ("a//b/", "a/b"),
        ("a\\..\\b", "a____b"),
        ("a\nb\x00\x1b\x7f", "a_b___"),
        ("caf\udce9", "caf_"),
        ("", ""),
        (".", "_"),
        ("__meta__/a", "meta__/a"),  # tar readers skip names that begin like this
        ("k" * 96, "k" * 84),
        ("é" * 60, "é" * 42),
        ("k" * 83 + "/kk" + "k" * 20, "k" * 83),
        ("a~0123456789", "a~0123456789"),
    ],
)
def test_any_other_is_mapped_and_kept(name: str, stem: str) -> None:
    key, original = map_key(name, ["jpg"])
    assert re.fullmatch(re.escape(stem) + "~[0-9a-f]{10}", key)
    assert original == name.encode("utf-8", "backslashreplace").decode()


def test_the_mapping_is_written_down() -> None:
    assert map_key("a.b", ["jpg"]) == ("a_b~2e7336dc8e", "a.b")
    assert map_key("a__b", ["jpg"], "a/b") == ("a__b", "a/b")  # a source's own mapping is kept
    assert map_key("a__b\n", ["jpg"], "a/b\n")[0] == "a__b_~241714c62f"


def test_a_longer_extension_leaves_less_room() -> None:
    assert map_key("k" * 95, ["jpg"])[0] == "k" * 95
    assert len(map_key("k" * 95, ["jpg", "segmentation.png"])[0]) == 100 - 17


@settings(deadline=None)
@given(names, st.lists(extensions.filter(is_extension), max_size=3))
@example("__", ["__"])
def test_any_name_becomes_a_safe_key(name: str, fields: list[str]) -> None:
    key, original = map_key(name, fields)
    assert (key, original) == map_key(name, fields)
    assert original is None if key == name else original is not None
    original and original.encode()
    for extension in [*fields, "json", "webp"]:
        member = f"{key}.{extension}"
        assert len(member.encode()) <= LONGEST_NAME
        assert split_name(member) == (key, extension.lower())
        assert base_plus_ext(member) == (key, extension)
        path = PurePosixPath(member)
        assert not path.is_absolute()
        assert str(path) == member  # no empty and no '.' parts
        assert ".." not in path.parts
    assert not any(category(letter) in ("Cc", "Cs") for letter in key)
    assert "\\" not in key


@settings(deadline=None)
@given(st.lists(names, max_size=30, unique=True))
def test_no_two_names_get_one_key(wishes: list[str]) -> None:
    keys = {map_key(name, ["jpg"])[0] for name in wishes}
    assert len(keys) == len(wishes)
    # A name that equals another name's mapped key gets a different key.
    assert not keys & {map_key(key, ["jpg"])[0] for key in keys if re.search("~[0-9a-f]{10}$", key)}


@settings(deadline=None)
@given(names, extensions.filter(is_extension))
def test_a_key_survives_a_tar(name: str, extension: str) -> None:
    key, _ = map_key(name, [extension])
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar:
        tar.addfile(tarfile.TarInfo(f"{key}.{extension}"))
    with tarfile.open(fileobj=io.BytesIO(sink.getvalue()), encoding="utf-8") as tar:
        assert tar.getnames() == [f"{key}.{extension}"]


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("jpg", True),
        ("seg.png", True),
        ("", False),
        ("a/b", False),
        ("j\x1bpg", False),
        ("é" * 16, True),
        ("é" * 17, False),
        ("a\\b", False),
        ("\udce9", False),
    ],
)
def test_extensions(name: str, good: bool) -> None:
    assert is_extension(name) == good
