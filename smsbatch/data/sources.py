"""Samples of a source: `parts` lists its objects, `scan` indexes one object, `load_sample` reads one sample.

Every sample becomes an entry, also one without a picture: it fails when it is read and so ends as a row. A fault that
makes the whole request doubtful (a missing file, a broken table, two samples with one key) is a SourceError before
anything starts; one that can be worked around, such as a truncated tar, is a line in `notices`. What is left out is
counted and told.

    webdataset   key = a member's path up to the first dot of its basename, extension = the rest in lower case
    folder       key = relative path without suffix, '/' -> '__', '.' -> '_'; see folders.py
    table        see tables.py

All names pass through the key rule of keys.py.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice, product
from typing import NamedTuple

import pyarrow as pa

from smsbatch.data.captions import (
    LONGEST_CAPTION,
    LONGEST_READ,
    Caption,
    Contents,
    fields_of,
    find_caption,
    has_caption,
    short_enough,
    too_long,
)
from smsbatch.data.folders import folder_entries, folder_part, is_passed_over, metadata_of
from smsbatch.data.index import INDEX_SCHEMA, Part, to_table
from smsbatch.data.keys import distinct_names, is_extension, is_text, map_key
from smsbatch.data.reader import Reader, expand, holds, list_files, open_url, public
from smsbatch.data.sample import Entry, Sample, Span
from smsbatch.data.tables import read_table
from smsbatch.data.tars import Members, split_name
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Source, Storage
from smsbatch.storage.addresses import is_web
from smsbatch.storage.retries import RemoteError, redact

ROWS_AT_ONCE = 8192
# Storage has a high latency and a high throughput.
REQUESTS_AT_ONCE = 32


class Scanned(NamedTuple):
    """The index of one part, notices of what was skipped in it, and counts of it by extension (`Contents`)."""

    table: pa.Table
    notices: list[str]
    left: Counter[str]
    passed: Counter[str]


class Scan:
    """What a scan has found besides entries."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.left: Counter[str] = Counter()
        self.passed: Counter[str] = Counter()


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Errors inside do not show tokens and signatures in the addresses that they name."""
    try:
        yield
    except SourceError as error:
        raise SourceError(redact(str(error))) from error


@_without_secrets()
def parts(source: Source, storage: Storage) -> list[Part]:
    """The objects of a source, in its order, with their present size and etag; none is opened.

    Raises:
        SourceError: an object is missing, cannot be listed, or is named twice.
    """
    if source.format == "folder":
        found = [[folder_part(url, source, storage)] for url in source.urls]
    else:
        names = [(number, name) for number, url in enumerate(source.urls) for name in _braces(url)]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            expanded = threads.map(lambda name: _expand(name[1], source, storage), names)
            found = [[] for _ in source.urls]
            for (number, _), of_name in zip(names, expanded, strict=True):
                found[number] += of_name
    listed = list(chain.from_iterable(found))
    for url, times in Counter(part.url for part in listed).items():
        if times > 1:
            raise SourceError(f"{url}: listed twice in source.urls; name it once")
    labels = distinct_names([part.url for part in listed])
    prefixes = labels if source.key_prefix == "shard" else [""] * len(listed)
    if source.key_prefix == "url":
        folders = [_without_patterns(url) for url in source.urls]
        places = [
            url if folders.count(folder) > 1 else folder for url, folder in zip(source.urls, folders, strict=True)
        ]
        of_urls = distinct_names([re.sub(r"[*?\[\]{},]+", "_", place) for place in places])
        prefixes = [prefix for prefix, of_url in zip(of_urls, found, strict=True) for _ in of_url]
    return [
        part._replace(label=label, prefix=prefix) for part, label, prefix in zip(listed, labels, prefixes, strict=True)
    ]


def scan(part: Part, source: Source, storage: Storage, seed: int = 0) -> Scanned:
    """The index of one part; may run in any process. `seed` is the run's, for a random choice of captions.

    Raises:
        SourceError: the part cannot be read, has another format than `source.format`, or has clashing names.
    """
    told = Scan()
    entries = scan_entries(part, source, storage, seed, told)
    tables = [INDEX_SCHEMA.empty_table()]
    while batch := list(islice(entries, ROWS_AT_ONCE)):  # few Python objects at a time, for ten million rows
        tables.append(to_table(batch))
    return Scanned(pa.concat_tables(tables), told.notices, told.left, told.passed)


def scan_entries(part: Part, source: Source, storage: Storage, seed: int, told: Scan) -> Iterator[Entry]:
    """The entries of one part; `told` gets what else is found. Raises as `scan`."""
    with _without_secrets():
        try:
            yield from SOURCES[part.format](part, source, storage, seed, told)
        except OSError as error:
            raise _refused(part.url, error) from error


def require_apart(source: Source, storage: Storage, output: str, files: Iterable[str]) -> None:
    """Check that a run would not read what it writes.

    Args:
        output: the URL of its output.
        files: the names of some files that it writes there.

    Raises:
        SourceError: the output lies in a folder of the source, or a pattern of `source.urls` matches its files.
    """
    for url in source.urls:
        for pattern in [url] if source.format == "folder" else _braces(url):
            looked_for = "the folder" if source.format == "folder" else "what the pattern matches:"
            if (source.format == "folder" or set("*?[") & set(pattern)) and any(
                holds(pattern, f"{output}/{file}", storage) for file in files
            ):
                raise SourceError(
                    f"output.path: {output} lies in {looked_for} {url} of source.urls, and the run would read its own "
                    "results; choose a path beside the source"
                )


def gathered(scanned: Iterable[Scanned], told: Scan) -> Iterator[pa.Table]:
    """The tables of all scans; `told` gets what else they found."""
    for part in scanned:
        told.notices += part.notices
        told.left += part.left
        told.passed += part.passed
        yield part.table


def nothing_found(source: Source, notices: Sequence[str], contents: Contents) -> SourceError:
    """The error to raise if all scans together found no sample."""
    told = [*notices, *([f"captions: {contents}"] if contents.left or contents.passed else [])]
    found = f" ({'; '.join(told)})" if told else ""
    wanted = f"expected pictures ({', '.join(source.images)}) in a {source.format} source"
    after = f" after the first {source.skip:,} (source.skip)" if source.skip else ""
    return SourceError(f"{', '.join(source.urls)}: no samples found{after}{found}; {wanted}")


def _webdataset(part: Part, source: Source, storage: Storage, seed: int, told: Scan) -> Iterator[Entry]:
    """Fields of one sample need not be adjacent. Of all fields only those that may have the caption are read."""
    rules: dict[str, list[int]] = defaultdict(list)
    for number, rule in enumerate(source.caption):
        for name in fields_of(rule, source.images):
            rules[name].append(number)
    samples: dict[str, dict[str, Span]] = {}
    captions: dict[str, tuple[int, bool | None]] = {}  # the first rule that finds one, or None: that fails
    odd: list[str] = []
    nameless: list[str] = []
    broken: list[str] = []
    system = 0
    key = ""
    with open_url(part.url, storage) as file:
        members = Members(file)
        try:
            for name, offset, length in members:
                if is_passed_over(name):
                    system += 1
                    continue
                split = split_name(name)
                if split is None:
                    nameless.append(name)
                    continue
                key, extension = split
                if not is_extension(extension):
                    odd.append(name)
                    continue
                fields = samples.setdefault(key, {})
                if extension in fields:
                    raise SourceError(
                        f"{part.url}: two members are {f'{key}.{extension}'!r}; keys must be unique, rename one of them"
                    )
                fields[extension] = Span(part.url, offset, length, part.etag)
                if extension in rules and length:
                    file.seek(offset)
                    data = file.read(length) if length <= LONGEST_READ else None
                    for number in rules[extension]:
                        rule = source.caption[number]
                        # What is too long to be read now is taken for a caption.
                        found = data is None or has_caption(data, rule, name, source, broken)
                        if found is not False and captions.get(key, (number + 1,))[0] > number:
                            captions[key] = number, found
        except tarfile.ReadError as error:
            raise SourceError(
                f"{part.url}: not an uncompressed tar ({error}); unpack or decompress it first"
            ) from error
    if members.damage:
        told.notices.append(f"{part.url}: {members.damage}; samples found: {len(samples)}")
        others = [set(fields) for name, fields in samples.items() if name != key]
        for lost in set.intersection(*others) - set(samples[key]) if others else ():
            # Cut between picture and caption: without this the last sample would pass as one without caption.
            samples[key][lost] = Span(part.url, part.size, 1, part.etag)
    joined = [name for name, fields in samples.items() if _joins_pictures(fields, source)]
    for what, number, first in (
        ("links, devices or sparse files passed over", members.special, ""),
        ("members with unusable extensions passed over", len(odd), odd[:1]),
        ("hidden members, or without extension", len(nameless), nameless[:1]),
        ("members of thumbnail and system folders passed over", system, ""),
        ("sidecars from which no caption can be read", len(broken), broken[:1]),
        ("samples with several pictures of dotted names: keys end at the first dot", len(joined), joined[:1]),
    ):
        if number:
            told.notices.append(f"{part.url}: {what}: {number}" + (f", first {first[0][:99]!r}" if first else ""))
    if not samples and not members.damage:
        told.notices.append(f"{part.url}: no samples in it")
    for name, fields in samples.items():
        wish = f"{part.prefix}/{name}" if part.prefix else name
        key, original = map_key(wish, fields, name)
        image = next((extension for extension in source.images if extension in fields), "")
        told.passed.update(extension for extension in fields if extension != image and extension not in rules)
        number, found = captions.get(name, (0, False))
        yield Entry(key, image, fields, None, original, source.caption[number] if found else None)


def _joins_pictures(fields: dict[str, Span], source: Source) -> bool:
    """True if the sample seems to be several, whose names are alike up to the first dot: `jpg` and `0001.jpg`, or
    `v1.jpg` and `v2.jpg`; but `jpg` and `seg.png` is one with a mask."""
    dotted = [name.rpartition(".")[2] for name in fields if "." in name and name.rpartition(".")[2] in source.images]
    own = [image for image in source.images if image in fields]
    return any(image in dotted for image in own) or (len(dotted) > 1 and not own)


def _table(part: Part, source: Source, storage: Storage, seed: int, told: Scan) -> Iterator[Entry]:
    rows = 0
    with open_url(part.url, storage) as file:
        for entry in read_table(file, part, source, seed, told.notices):
            rows += 1
            yield entry
    if not rows:
        told.notices.append(f"{part.url}: no rows in it")


def _folder(part: Part, source: Source, storage: Storage, seed: int, told: Scan) -> Iterator[Entry]:
    return folder_entries(part, source, storage, seed, told.notices, told.left)


SOURCES: dict[str, Callable[[Part, Source, Storage, int, Scan], Iterator[Entry]]] = {
    "webdataset": _webdataset,
    "folder": _folder,
    "table": _table,
}


def load_sample(entry: Entry, source: Source, reader: Reader, seed: int = 0) -> Sample:
    """Read an entry's fields; `seed` is the run's, for a random choice of captions.

    Raises:
        SampleError: read_error (no picture, or raised by `reader`), timeout, too_large, bad_caption.
    """
    if not entry.image and source.format == "table":
        row = next(iter(entry.fields.values())).offset + 1
        raise SampleError("read_error", f"no image in column {source.columns.image!r} of {entry.url}, row {row:,}")
    if not entry.image:
        wanted, got = ", ".join(source.images), ", ".join(entry.fields)
        raise SampleError("read_error", f"no image ({wanted}) among its fields: {got}")
    images = [entry.image, *source.images]
    names = [name for rule in source.caption if ":" not in rule for name in fields_of(rule, images)]
    first = next((name for name in names if name in entry.fields and entry.fields[name].length != 0), "")
    length = entry.fields[first].length if first else None
    if length is not None and length > LONGEST_CAPTION:  # without reading it
        raise too_long(f"its .{first}", length)
    names = sorted(entry.fields, key=lambda name: name != entry.image)  # the picture's error is raised first
    fields = dict(zip(names, reader.read_all([entry.fields[name] for name in names]), strict=True))
    image, others = fields.pop(entry.image), fields
    if source.format != "table":
        caption = find_caption(others, source, entry.image, entry.key, seed, metadata_of(entry, source))
    elif entry.caption is None:
        raise SampleError("bad_caption", f"column {source.columns.caption!r} of its row is not a text")
    else:
        text = short_enough(entry.caption, f"column {source.columns.caption!r} of its row")
        caption = Caption(text, entry.caption_from or "")
    url, of = public(entry.url), caption.rule or None
    return Sample(entry.key, url, image, entry.image, caption.text, others, entry.original_key, of)


def _expand(name: str, source: Source, storage: Storage) -> list[Part]:
    try:
        found = expand(name, storage)
    except OSError as error:
        raise _refused(name, error) from error
    if not found:
        raise _missing(name, storage)
    expanded = []
    for url, known in found:
        if not is_text(url):
            raise SourceError(f"{url!r}: its name is not UTF-8; rename it")
        expanded.append(Part(source.format, url, known.size, known.etag))
    return expanded


def _missing(name: str, storage: Storage) -> SourceError:
    try:
        next(list_files(name, storage), None)
    except OSError:
        return SourceError(f"{name}: no such file; check source.urls")
    return SourceError(f"{name}: a folder, not a file; name the files in it, such as {name.rstrip('/')}/*.tar")


def _refused(url: str, error: OSError) -> SourceError:
    advice = error.advice if isinstance(error, RemoteError) else "check source.urls"
    return SourceError(f"{url}: {error.strerror or error}; {advice}")


def _braces(pattern: str) -> list[str]:
    """`{0..12}`, `{000..012}` and `{a,b}`, any number of them, like a shell; other braces are kept."""
    pieces = re.split(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    choices = [_choices(piece) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    first, last = inside.split("..")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _without_patterns(url: str) -> str:
    """The folder of a name with globs or braces, without them; any other name unchanged."""
    parts = (url.partition("?")[0] if is_web(url) else url).split("/")
    literal = next((number for number, part in enumerate(parts) if set("*?[{") & set(part)), len(parts))
    return "/".join(parts[:literal]) or url
