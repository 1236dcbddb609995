"""Captions: where a sample's caption comes from, by the rules of `source.caption`, and how many each rule found.

    txt               the text of a sidecar: `fox.txt`, else `fox.jpg.txt`
    json:caption      a key of a JSON sidecar: of `fox.json`, else of `fox.jpg.json`
    json:a.b.0        a path of keys and places of lists; without a place, one of a list that has a text
    metadata:text     a column of the row for the picture in its folder's `metadata.jsonl` or `metadata.csv`

The first rule that finds a text which is not blank gives the caption. A key that is missing, null or blank is passed
by, as is an empty sidecar; anything else that is no text fails the sample. Of a list of captions
`source.caption_choice` chooses one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from smsbatch.data.keys import is_text
from smsbatch.data.sample import hashed_seed
from smsbatch.errors import SampleError
from smsbatch.manifest import Source

LONGEST_CAPTION = 65536  # bytes
PLACE = re.compile("[0-9]{1,9}")  # of an item in a list, in a path
LONGEST_READ = 1 << 20  # bytes of a sidecar that planning reads, to see whether it has a caption
METADATA = "metadata"


class Caption(NamedTuple):
    """A caption, and the rule that found it; both are '' if none did."""

    text: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Contents:
    """What a source holds.

    Attributes:
        captions: samples with a caption, by the rule that finds it.
        left: files of a folder that are not used, by extension, '' for none.
        passed: fields of tars that are neither pictures nor captions and are passed through, by extension.
    """

    samples: int = 0
    captions: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    passed: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """`3,998 of 4,000 (txt 3,000, json:caption 998); left aside: 4,000 .caption, 12 .xmp`"""
        rules = ", ".join(f"{rule} {number:,}" for rule, number in _by_number(self.captions))
        parts = [f"{sum(self.captions.values()):,} of {self.samples:,}" + (f" ({rules})" if rules else "")]
        for what, counted in (("left aside", self.left), ("passed through", self.passed)):
            if counted:
                kinds = (
                    f"{number:,} .{name}" if name else f"{number:,} others" for name, number in _by_number(counted)
                )
                parts.append(f"{what}: {', '.join(kinds)}")
        return "; ".join(parts)


def sidecars(source: Source) -> tuple[str, ...]:
    """The extensions of the files that belong to a picture beside them in a folder."""
    named = (rule.partition(":")[0] for rule in source.caption)
    return tuple(dict.fromkeys([*(name for name in named if name != METADATA), "txt", "json"]))


def fields_of(rule: str, images: Iterable[str]) -> list[str]:
    """The fields in which a rule looks, of a picture with one of these extensions: 'txt', then 'jpg.txt'."""
    extension = rule.partition(":")[0]
    return [extension, *(f"{image}.{extension}" for image in images)]


def find_caption(
    fields: Mapping[str, bytes],
    source: Source,
    image: str,
    key: str = "",
    seed: int = 0,
    metadata: Caption | None = None,
) -> Caption:
    """The caption of a sample.

    Args:
        fields: its fields without the picture.
        image: the picture's extension.
        key, seed: the sample's key and the run's seed, which draw one of a list of captions.
        metadata: the caption that its folder's metadata has, and the rule that found it there.

    Raises:
        SampleError: bad_caption.
    """
    for rule in source.caption:
        path = rule.partition(":")[2]
        if metadata and rule == metadata.rule:
            return metadata
        for there in fields_of(rule, [image, *source.images]):
            if there in fields:
                text = read_caption(fields[there], path, f"its .{there}", source, f"{seed}:{key}")
                if text:
                    return Caption(text, rule)
    return Caption()


def has_caption(data: bytes, rule: str, what: str, source: Source, broken: list[str]) -> bool | None:
    """True if this rule finds a caption in the sidecar `what`; None if the sample will fail with it, and `broken` gets
    the reason."""
    try:
        return bool(read_caption(data, rule.partition(":")[2], what, source, ""))
    except SampleError as error:
        broken.append(str(error))
        return None


def read_caption(data: bytes, path: str, what: str, source: Source, draw: str) -> str:
    """The caption in a sidecar, '' if there is none: its text, or the value at a `path` of its JSON.

    Raises:
        SampleError: bad_caption; the message calls the sidecar `what`.
    """
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("bad_caption", f"{what} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not path:
        return short_enough(text, what)
    if not text:
        return ""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad_caption", f"{what} is not JSON: {error}") from error
    return text_at(value, path, what, source, draw)


def text_at(value: Any, path: str, what: str, source: Source, draw: str) -> str:
    """The text at a path of keys and places, '' if there is none; `draw` is the seed of the choice from a list.

    A list on the way without a place for it stands for all its items, of which one that has a text is chosen.

    Raises:
        SampleError: bad_caption: there is something else than a text or a list of texts.
    """
    if not isinstance(value, Mapping | list):
        raise SampleError("bad_caption", f"{what} is neither a JSON object nor a list")
    found = [text.strip() for text in _texts_at(value, path, f"{path!r} in {what}") if text.strip()]
    if not found:
        return ""
    chosen = hashed_seed(f"{draw}:caption") % len(found) if source.caption_choice == "random" else 0
    return short_enough(found[chosen], f"{path!r} in {what}")


def _texts_at(value: Any, path: str, what: str) -> Iterator[str]:
    if isinstance(value, list):
        head, _, rest = path.partition(".")
        if not PLACE.fullmatch(head):
            for item in value:
                yield from _texts_at(item, path, what)
        elif int(head) < len(value):
            yield from _texts_at(value[int(head)], rest, what)
    elif path:
        key = key_of(path, value) if isinstance(value, Mapping) else ""
        if key:
            yield from _texts_at(value[key], path[len(key) + 1 :], what)
    elif is_text(value):
        yield value
    elif value is not None:
        raise SampleError("bad_caption", f"{what} is not a text")


def key_of(path: str, keys: Container[str]) -> str:
    """The longest beginning of a dotted path that is one of the keys, which may contain dots; '' if none is."""
    key = path
    while key and key not in keys:
        key = key.rpartition(".")[0]
    return key


def unused_rules(source: Source, captions: Container[str]) -> list[str]:
    """A notice for each rule that the manifest names and that gives no sample its caption."""
    if source.format == "table" or "caption" not in source.model_fields_set:
        return []
    return [f"source.caption: {rule} gives no sample its caption" for rule in source.caption if rule not in captions]


def short_enough(text: str, what: str) -> str:
    size = len(text.encode())
    if size > LONGEST_CAPTION:
        raise too_long(what, size)
    return text


def too_long(what: str, size: int) -> SampleError:
    return SampleError("bad_caption", f"{what} has {size:,} bytes; a caption has at most {LONGEST_CAPTION:,}")


def _by_number(counted: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counted.items(), key=lambda item: (-item[1], item[0]))
