"""Samples of a source: `parts` lists its objects, `scan` indexes one object, `load_sample` reads one sample.

Every sample becomes an entry, also one without a picture: it fails when it is read and so ends as a row. A fault that
makes the whole request doubtful (a missing file, a broken table, two samples with one key) is a SourceError before
anything starts; one that can be worked around, such as a truncated tar, is a line in `notices`.

    webdataset   key = a member's path up to the first dot of its basename, extension = the rest in lower case
    folder       key = relative path without suffix, '/' -> '__', '.' -> '_'; `a/b.txt`, `a/b.json` belong to `a/b.jpg`
    table        see tables.py

All names pass through the key rule of keys.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice, product
from typing import NamedTuple

import pyarrow as pa

from smsbatch.data.index import INDEX_SCHEMA, Part, to_table
from smsbatch.data.keys import is_extension, is_text, map_key
from smsbatch.data.reader import Listed, Reader, absolute, expand, list_files, open_url, public
from smsbatch.data.sample import Entry, Sample, Span
from smsbatch.data.tables import read_table
from smsbatch.data.tars import Members, split_name
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Source, Storage
from smsbatch.storage.retries import RemoteError

LONGEST_CAPTION = 65536
SIDECARS = ("txt", "json")
ROWS_AT_ONCE = 8192
# Storage has a high latency and a high throughput.
REQUESTS_AT_ONCE = 32


class Scanned(NamedTuple):
    """The index of one part, and notices of what was skipped in it."""

    table: pa.Table
    notices: list[str]


def parts(source: Source, storage: Storage) -> list[Part]:
    """The objects of a source, in its order, with their present size and etag; none is opened.

    Raises:
        SourceError: an object is missing, cannot be listed, or is named twice.
    """
    if source.format == "folder":
        found = [_folder_part(url, storage) for url in source.urls]
    else:
        names = list(chain.from_iterable(map(_braces, source.urls)))
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
            expanded = threads.map(lambda name: _expand(name, source, storage), names)
            found = list(chain.from_iterable(expanded))
    for url, times in Counter(part.url for part in found).items():
        if times > 1:
            raise SourceError(f"{url}: listed twice in source.urls; name it once")
    return found


def scan(part: Part, source: Source, storage: Storage) -> Scanned:
    """The index of one part; may run in any process.

    Raises:
        SourceError: the part cannot be read, has another format than `source.format`, or has clashing names.
    """
    notices: list[str] = []
    entries = SOURCES[part.format](part, source, storage, notices)
    tables = [INDEX_SCHEMA.empty_table()]
    while batch := list(islice(entries, ROWS_AT_ONCE)):  # few Python objects at a time, for ten million rows
        tables.append(to_table(batch))
    return Scanned(pa.concat_tables(tables), notices)


def nothing_found(source: Source, notices: Sequence[str]) -> SourceError:
    """The error to raise if all scans together found no sample."""
    found = f" ({'; '.join(notices)})" if notices else ""
    wanted = f"expected pictures ({', '.join(source.images)}) in a {source.format} source"
    after = f" after the first {source.skip:,} (source.skip)" if source.skip else ""
    return SourceError(f"{', '.join(source.urls)}: no samples found{after}{found}; {wanted}")


def _webdataset(part: Part, source: Source, storage: Storage, notices: list[str]) -> Iterator[Entry]:
    """Fields of one sample need not be adjacent."""
    samples: dict[str, dict[str, Span]] = {}
    odd: list[str] = []
    nameless: list[str] = []
    key = ""
    try:
        with open_url(part.url, storage) as file:
            members = Members(file)
            for name, offset, length in members:
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
    except tarfile.ReadError as error:
        raise SourceError(f"{part.url}: not an uncompressed tar ({error}); unpack or decompress it first") from error
    except OSError as error:
        raise _refused(part.url, error) from error
    if members.damage:
        notices.append(f"{part.url}: {members.damage}; samples found: {len(samples)}")
        others = [set(fields) for name, fields in samples.items() if name != key]
        for lost in set.intersection(*others) - set(samples[key]) if others else ():
            # Cut between picture and caption: without this the last sample would pass as one without caption.
            samples[key][lost] = Span(part.url, part.size, 1, part.etag)
    if members.special:
        notices.append(f"{part.url}: links, devices or sparse files passed over: {members.special}")
    if odd:
        notices.append(f"{part.url}: members with unusable extensions passed over: {len(odd)}, first {odd[0][:99]!r}")
    if nameless:
        notices.append(f"{part.url}: hidden members, or without extension: {len(nameless)}, first {nameless[0][:99]!r}")
    if not samples and not members.damage:
        notices.append(f"{part.url}: no samples in it")
    for name, fields in samples.items():
        key, original = map_key(name, fields)
        image = next((extension for extension in source.images if extension in fields), "")
        yield Entry(key, image, fields, original_key=original)


def _folder(part: Part, source: Source, storage: Storage, notices: list[str]) -> Iterator[Entry]:
    """Every picture below the folder except hidden ones. Two pictures with one stem become two entries, which clash."""
    listed = [file for file in _list(part.url, storage) if not _hidden(file.path)]
    files = {file.path: Span(file.url, 0, file.size, file.etag) for file in listed if is_text(file.url)}
    if len(files) < len(listed):
        notices.append(f"{part.url}: files whose names are not UTF-8 left out: {len(listed) - len(files)}; rename them")
    split = {path: path.rpartition(".") for path in files}
    sidecars = {(stem, suffix.lower()): files[path] for path, (stem, _, suffix) in split.items()}
    for path, (stem, _, suffix) in split.items():
        image = suffix.lower()
        if stem and image in source.images:
            others = {name: sidecars[stem, name] for name in SIDECARS if (stem, name) in sidecars}
            fields = {image: files[path], **others}
            key, original = map_key(stem.replace("/", "__").replace(".", "_"), fields, stem)
            yield Entry(key, image, fields, original_key=original)
    known = {*source.images, *SIDECARS}
    left = Counter(suffix.lower() for _, _, suffix in split.values() if suffix.lower() not in known)
    if left:
        kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(left.items()))
        notices.append(f"{part.url}: files left out: {kinds}; source.images names what is taken")


def _table(part: Part, source: Source, storage: Storage, notices: list[str]) -> Iterator[Entry]:
    rows = 0
    try:
        with open_url(part.url, storage) as file:
            for entry in read_table(file, part.url, source):
                rows += 1
                yield entry
    except OSError as error:
        raise _refused(part.url, error) from error
    if not rows:
        notices.append(f"{part.url}: no rows in it")


SOURCES: dict[str, Callable[[Part, Source, Storage, list[str]], Iterator[Entry]]] = {
    "webdataset": _webdataset,
    "folder": _folder,
    "table": _table,
}


def load_sample(entry: Entry, source: Source, reader: Reader) -> Sample:
    """Read an entry's fields.

    Raises:
        SampleError: read_error (no picture, or raised by `reader`), timeout, too_large, bad_caption.
    """
    if not entry.image and source.format == "table":
        raise SampleError("read_error", f"no image in column {source.columns.image!r} of its row in {entry.url}")
    if not entry.image:
        wanted, got = ", ".join(source.images), ", ".join(entry.fields)
        raise SampleError("read_error", f"no image ({wanted}) among its fields: {got}")
    rule = next((rule for rule in source.caption if rule.partition(":")[0] in entry.fields), "")
    length = entry.fields[rule].length if rule in entry.fields else None
    if length is not None and length > LONGEST_CAPTION:  # without reading it
        raise _too_long(f"its .{rule}", length)
    names = sorted(entry.fields, key=lambda name: name != entry.image)  # the picture's error is raised first
    fields = dict(zip(names, reader.read_all([entry.fields[name] for name in names]), strict=True))
    image, others = fields.pop(entry.image), fields
    if source.format != "table":
        caption = caption_of(others, source.caption)
    elif entry.caption is None:
        raise SampleError("bad_caption", f"column {source.columns.caption!r} of its row is not a text")
    else:
        caption = _short_enough(entry.caption, f"column {source.columns.caption!r} of its row")
    return Sample(entry.key, public(entry.url), image, entry.image, caption, others, entry.original_key)


def caption_of(fields: Mapping[str, bytes], rules: Sequence[str]) -> str:
    """The caption by the first rule that finds one, else ''.

    `txt` is the text of a field, `json:caption` a key of a JSON field. SampleError: bad_caption.
    """
    for rule in rules:
        name, _, key = rule.partition(":")
        if name not in fields:
            continue
        try:
            text = fields[name].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError(
                "bad_caption", f"its .{name} is not UTF-8: {error.reason} at byte {error.start}"
            ) from error
        if not key:
            return _short_enough(text.strip(), f"its .{name}")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SampleError("bad_caption", f"its .{name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise SampleError("bad_caption", f"its .{name} is not a JSON object")
        if value.get(key) is None:
            continue
        if not is_text(value[key]):
            raise SampleError("bad_caption", f"{key!r} in its .{name} is not a text")
        return _short_enough(value[key].strip(), f"{key!r} in its .{name}")
    return ""


def _short_enough(text: str, what: str) -> str:
    size = len(text.encode())
    if size > LONGEST_CAPTION:
        raise _too_long(what, size)
    return text


def _too_long(what: str, size: int) -> SampleError:
    return SampleError("bad_caption", f"{what} has {size:,} bytes; a caption has at most {LONGEST_CAPTION:,}")


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


def _folder_part(url: str, storage: Storage) -> Part:
    digest, size = hashlib.sha256(), 0
    for file in _list(url, storage):
        digest.update(f"{file.path}\0{file.size}\0{file.etag}\0".encode("utf-8", "surrogatepass"))
        size += file.size
    return Part("folder", absolute(url, storage), size, digest.hexdigest())


def _list(url: str, storage: Storage) -> Iterator[Listed]:
    try:
        yield from list_files(url, storage)
    except FileNotFoundError as error:
        raise SourceError(f"{url}: no such folder; check source.urls") from error
    except NotADirectoryError as error:
        raise SourceError(f"{url}: a file, not a folder; for tars set source.format to webdataset") from error
    except OSError as error:
        raise _refused(url, error) from error


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


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))
