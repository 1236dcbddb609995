"""Values of the environment are not shown, in whatever form other texts have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from smsbatch import text


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_values", {})


@pytest.mark.parametrize(
    ("value", "shown", "hidden"),
    [
        ("/data/zanzibar/*.tar", "/data/zanzibar/a.tar: cut", "${X}/../a.tar: cut"),
        ("/data/zanzibar/{a,b}.tar", "/data/zanzibar/b.tar", "${X}/../b.tar"),
        ("/data/zanzibar/t.csv", "/data/zanzibar/q.jpg", "${X}/../q.jpg"),
        ("http://h/hunter2-hunter2/t.csv", "http://h/hunter2-hunter2/q.jpg", "${X}/../q.jpg"),
        ("s3://bucket/hunter2/{0..9}.tar", "s3://bucket/hunter2/7.tar", "${X}/../7.tar"),
        ("data/./zanzibar/more", f"{Path.cwd()}/data/zanzibar/more/a.jpg", "${X}/a.jpg"),
        ("hunter2 hunter2", "a hunter2 hunter2", "a ${X}"),
        ("oil/ink on paper", "oil, and oil/ink on paper", "oil, and ${X}"),
        ("http://h/t.csv", "http://h2/x", "http://h2/x"),
        ("/data/zanzibar", "/data/out/run and /data/zanzibar/a.jpg", "/data/out/run and ${X}/a.jpg"),
        ("/data/z/t.csv", "/data/z/one/a.jpg, /data/one/a.jpg", "${X}/../one/a.jpg, /data/one/a.jpg"),
        ("short", "short", "short"),
        ("/a/b", "/a/bc", "/a/bc"),
    ],
)
def test_forms_of_a_value(value: str, shown: str, hidden: str) -> None:
    text.hide({"X": value})
    assert text.hidden(shown) == hidden


def test_the_values_of_one_manifest_alone() -> None:
    text.hide({"PROMPT": "painting"})
    text.hide({"DATA": "/somewhere"}, alone=True)
    assert text.hidden("a painting of /somewhere") == "a painting of ${DATA}"
