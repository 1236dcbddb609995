"""YAML files that are damaged, hostile, or read otherwise than they look: one line each, and never a traceback."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

import smsbatch as sb

GOOD = """task: optimize
name: test
source: {format: folder, urls: photos}
model: tiny
style: {prompt: oil}
output: {path: out}
"""


def load(folder: Path, text: str | bytes) -> sb.Manifest:
    file = folder / "m.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return sb.load(file)


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &a [*a]\n", "m.yaml:1: a.0: an alias stands for something that contains it"),
        ("a: &a {b: *a}\n", "a.b: an alias stands for something that contains it"),
        ("a: &a {b: {c: [1, *a]}}\n", "a.b.c.1: an alias stands for something that contains it"),
        ("&a [*a]\n", "0: an alias stands for something that contains it"),
        ("a: &a {<<: *a}\n", "a.<<: an alias stands for something that contains it"),
        ("a: *b\n", "m.yaml:1: not valid YAML: found undefined alias 'b'"),
        (f"a0: &a0 [x, x]\n{LAUGHS}", "more than 100,000 values, counting what aliases stand for"),
        (f"a0: &a0 {{x: 1}}\n{MERGES}", "more than 100,000 values, counting what aliases stand for"),
        ("a: " + "[" * 60 + "]" * 60, "m.yaml:1: not valid YAML: its values are nested too deeply"),
        ("a: " + "[" * 5000, "not valid YAML: its values are nested too deeply"),
        ("a: " + "{a: " * 5000, "not valid YAML: its values are nested too deeply"),
        (GOOD + "seed: 0123\n", "m.yaml:7: seed: YAML reads 0123 as 83; write 123, or put a text in quotes"),
        (GOOD + "seed: 0_17\n", "m.yaml:7: seed: YAML reads 0_17 as 15; write 17"),
        (GOOD + "seed: -010\n", "m.yaml:7: seed: YAML reads -010 as -8; write -10"),
        (GOOD + "seed: 00\n", "seed: YAML reads 00 as 0; write 0"),
        (GOOD + "seed: 1:30\n", "m.yaml:7: seed: YAML reads 1:30 as 90; put a text in quotes"),
        (GOOD + "storage: {timeout_s: 1:30.5}\n", "storage.timeout_s: YAML reads 1:30.5 as 90.5; put a text in quotes"),
        (
            GOOD.replace("name: test", "name: 007"),
            "m.yaml:2: name: YAML reads 007 as 7; write 7, or put",
        ),
        (GOOD.replace("name: test", "name: 123"), "name: is a text, and YAML reads it as 123; put it in quotes"),
        (GOOD.replace("name: test", "name: yes"), "m.yaml:2: name: is a text, and YAML reads it as True; put it"),
        (GOOD.replace("prompt: oil", "prompt: off"), "style.prompt: is a text, and YAML reads it as False; put it"),
        (GOOD.replace("prompt: oil", "prompt: 1.5"), "style.prompt: is a text, and YAML reads it as 1.5; put it"),
        (GOOD.replace("prompt: oil", "prompt: 2026-01-02"), f"is a text, and YAML reads it as {date(2026, 1, 2)!r}"),
        (GOOD.replace("prompt: oil", "prompt: 2026-13-45"), "m.yaml:5: not valid YAML: month must be in 1..12"),
        (GOOD.replace("prompt: oil", "prompt: !!int abc"), "m.yaml:5: not valid YAML: invalid literal for int()"),
        (GOOD.replace("prompt: oil", "prompt: !!bool abc"), "m.yaml:5: not valid YAML"),
        (GOOD.replace("prompt: oil", "prompt: !!timestamp abc"), "m.yaml:5: not valid YAML"),
        (GOOD.replace("prompt: oil", "prompt: !!binary a"), "m.yaml:5: not valid YAML: failed to decode base64"),
        (GOOD.replace("prompt: oil", "prompt: !!python/object:os.system x"), "m.yaml:5: not valid YAML: could not"),
        (GOOD + "objective: {guidance: .inf}\n", "objective.guidance: input should be a finite number"),
        (GOOD + "objective: {guidance: .nan}\n", "objective.guidance: input should be a finite number"),
        (GOOD + "seed: yes\n", "m.yaml:7: seed: is a number; YAML reads yes, no, on and off as true and false"),
        (GOOD + "objective: {steps: on}\n", "objective.steps: is a number; YAML reads yes, no, on and off as true"),
        (GOOD + "objective: {guidance: no}\n", "objective.guidance: is a number; YAML reads yes, no, on and off"),
        (GOOD + f"seed: {'9' * 5000}\n", "m.yaml:7: not valid YAML: Exceeds the limit"),
        (GOOD + f"seed: 0x{'f' * 5000}\n", "not a huge number"),
        (GOOD + f"seed: {'x' * 5000}\n", "xxx..."),
        (GOOD + "1: x\n", "m.yaml:7: 1 is no name of a key; put it in quotes"),
        (GOOD + "on: x\n", "m.yaml:7: on is no name of a key; put it in quotes"),
        (GOOD + "null: x\n", "m.yaml:7: null is no name of a key"),
        (GOOD + "2026-01-02: x\n", "m.yaml:7: 2026-01-02 is no name of a key"),
        (GOOD + "[a]: x\n", "m.yaml:7: a list or mapping is no name of a key"),
        (GOOD + "? {a: b}\n: x\n", "m.yaml:7: a list or mapping is no name of a key"),
        (GOOD.replace("prompt: oil", "prompt: oil, no: x"), "m.yaml:5: style: no is no name of a key"),
        (GOOD + "seed: 1\nseed: 2\n", "m.yaml:8: seed: is given a second time"),
        (GOOD + "---\n" + GOOD, "m.yaml:7: not valid YAML: but found another document"),
        (GOOD + "seed:\t1\n\tx: 2\n", "m.yaml:7: not valid YAML: found character '\\t' that cannot start any token"),
        ("", "m.yaml: a manifest is a mapping of keys; `smsbatch init` writes one"),
        ("\ufeff", "a manifest is a mapping of keys"),
        ("# nothing\n", "a manifest is a mapping of keys"),
        ("---\n...\n", "a manifest is a mapping of keys"),
        ("- a\n", "a manifest is a mapping of keys"),
        ("oil", "a manifest is a mapping of keys"),
        ("null", "a manifest is a mapping of keys"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "cannot read the manifest: it is not UTF-8"),
        ("name: a".encode("utf-16"), "cannot read the manifest: it is not UTF-8"),
        (b"name: a\x00b\n", "not valid YAML: unacceptable character #x0000"),
        (b"name: a\x1bb\n", "not valid YAML: unacceptable character #x001b"),
        (
            GOOD.replace("task: optimize", "task: [optimize]"),
            "m.yaml:1: task: is one of optimize, distill, stylize, not",
        ),
        (GOOD.replace("task: optimize", "task: {a: b}"), "m.yaml:1: task: is one of optimize, distill, stylize, not {"),
    ],
)
def test_told_in_one_line(text: str | bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(sb.ManifestError) as refused:
        load(tmp_path, text)
    message = str(refused.value)
    assert told in message
    assert len(message) < 400
    assert "\n" not in message


@pytest.mark.parametrize("text", ["\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), f"---\n{GOOD}...\n", GOOD + "\n\n# end"])
def test_read_as_they_are_meant(text: str, tmp_path: Path) -> None:
    assert load(tmp_path, text) == load(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("line", "seed"),
    [("1_000", 1000), ("0x1F", 31), ("0b101", 5), ("+7", 7), ("0", 0), ("10", 10), ("'0123'", 123), ("7.0", 7)],
)
def test_numbers_that_mean_one_thing(line: str, seed: int, tmp_path: Path) -> None:
    assert load(tmp_path, f"{GOOD}seed: {line}\n").seed == seed


def test_texts_of_digits_in_quotes(tmp_path: Path) -> None:
    text = GOOD.replace("name: test", "name: '007'").replace("prompt: oil", "prompt: '1:30'")
    assert (load(tmp_path, text).name, load(tmp_path, text).style.prompt) == ("007", "1:30")  # type: ignore[attr-defined]


def test_aliases_and_merge_keys(tmp_path: Path) -> None:
    """They save typing, and each use is its own: here the key of the file wins over the merged one."""
    text = GOOD.replace("{path: out}", "&o {path: out, format: png}").replace("{prompt: oil}", "{prompt: &p oil}")
    text += "objective: {prompt: '{style}', source_prompt: *p}\n"
    assert load(tmp_path, text).objective.source_prompt == "oil"  # type: ignore[attr-defined]
    merged = GOOD.replace("output: {path: out}", "output:\n  <<: {path: elsewhere, format: png}\n  path: out")
    assert load(tmp_path, merged).output.model_dump()["path"] == "out"
    assert load(tmp_path, merged).output.model_dump()["format"] == "png"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed=0123", "--set seed=0123: YAML reads 0123 as 83; write 123, or put a text in quotes"),
        ("seed=1:30", "--set seed=1:30: YAML reads 1:30 as 90"),
        ("seed=yes", "--set seed: is a number"),
        ("name=no", "--set name: is a text, and YAML reads it as False; put it in quotes"),
        ("name=&a [*a]", "--set name=&a [*a]: 0: an alias stands for something that contains it"),
        ("style={1: x}", "--set style={1: x}: 1 is no name of a key"),
    ],
)
def test_overrides_alike(override: str, told: str, tmp_path: Path) -> None:
    load(tmp_path, GOOD)
    with pytest.raises(sb.ManifestError) as refused:
        sb.load(tmp_path / "m.yaml", [override])
    assert told in str(refused.value)


def test_a_folder_is_no_manifest(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.yaml", Path("/dev/null")):
        with pytest.raises(sb.ManifestError, match="m") as refused:
            sb.load(path)
        assert "`smsbatch init` writes one" in str(refused.value)
