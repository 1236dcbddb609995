"""Where samples come from: `index` lists a source's entries without reading them, `load_sample` reads one.

Every sample of the source becomes an entry, also one without a picture, which fails when it is read and so ends as a
row. What makes the whole request doubtful, a missing file, nothing at all, two samples of one key, is a SourceError
before anything starts; what can be worked around, such as a cut tar, is a line in `notices`.

    webdataset   key = a member's path up to the first dot of its basename, extension = the rest in lower case
    folder       key = relative path without suffix, '/' -> '__', '.' -> '_'; `a/b.txt`, `a/b.json` belong to `a/b.jpg`
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from unicodedata import category

from smsbatch.data.sample import Entry, Sample, Span
from smsbatch.data.store import expand, list_files, open_url, read_span
from smsbatch.data.tars import Members, split_name
from smsbatch.errors import SampleError, SourceError

__all__ = ["SOURCES", "caption_of", "index", "load_sample"]

# What a USTAR name holds without its prefix field, which not every reader joins.
LONGEST_NAME = 100
SIDECARS = ("txt", "json")


def index(format: str, urls: str | Sequence[str], images: Sequence[str], notices: list[str]) -> Iterator[Entry]:
    """The entries of a source, in its order; `images` are the extensions of pictures, the preferred first."""
    urls = [urls] if isinstance(urls, str) else urls
    seen: dict[str, str] = {}
    for entry in SOURCES[format](urls, images, notices):
        _check_key(entry)
        if entry.key in seen:
            raise SourceError(
                f"{entry.url}: key {entry.key!r} is also in {seen[entry.key]}; keys must be unique, rename one of them"
            )
        seen[entry.key] = entry.url
        yield entry
    if not seen:
        found = f" ({'; '.join(notices)})" if notices else ""
        raise SourceError(
            f"{', '.join(urls)}: no samples found{found}; expected pictures ({', '.join(images)}) in a {format} source"
        )


def webdataset(urls: Sequence[str], images: Sequence[str], notices: list[str]) -> Iterator[Entry]:
    """Tars by path or URL, with `{000..499}`, `{a,b}` and globs. Fields of one sample need not be adjacent."""
    seen: set[str] = set()
    for url in chain.from_iterable(map(_tars, urls)):
        if url in seen:
            raise SourceError(f"{url}: listed twice in source.urls; name it once")
        seen.add(url)
        yield from _tar_entries(url, images, notices)


def folder(urls: Sequence[str], images: Sequence[str], notices: list[str]) -> Iterator[Entry]:
    """Every picture below the folders but hidden ones. Two pictures of one stem are a clash, not a choice."""
    for url in urls:
        try:
            files = {path: Span(at, 0, size) for path, at, size in list_files(url) if not _hidden(path)}
        except FileNotFoundError as error:
            raise SourceError(f"{url}: no such folder; check source.urls") from error
        except NotADirectoryError as error:
            raise SourceError(f"{url}: a file, not a folder; for tars set source.format to webdataset") from error
        except OSError as error:
            raise SourceError(f"{url}: {error.strerror or error}; check source.urls") from error
        parts = {path: path.rpartition(".") for path in files}
        sidecars = {(stem, suffix.lower()): files[path] for path, (stem, _, suffix) in parts.items()}
        for path, (stem, _, suffix) in parts.items():
            image = suffix.lower()
            if stem and image in images:
                others = {name: sidecars[stem, name] for name in SIDECARS if (stem, name) in sidecars}
                yield Entry(stem.replace("/", "__").replace(".", "_"), image, {image: files[path], **others})
        left = Counter(suffix.lower() for _, _, suffix in parts.values() if suffix.lower() not in {*images, *SIDECARS})
        if left:
            kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(left.items()))
            notices.append(f"{url}: files left out: {kinds}; source.images names what is taken")


SOURCES: dict[str, Callable[[Sequence[str], Sequence[str], list[str]], Iterator[Entry]]] = {
    "webdataset": webdataset,
    "folder": folder,
}


def load_sample(entry: Entry, images: Sequence[str], captions: Sequence[str]) -> Sample:
    """Read an entry's fields. SampleError: read_error (no picture, or bytes missing), bad_caption."""
    if not entry.image:
        wanted, got = ", ".join(images), ", ".join(entry.fields)
        raise SampleError("read_error", f"no image ({wanted}) among its fields: {got}")
    image = read_span(entry.fields[entry.image])
    others = {name: read_span(span) for name, span in entry.fields.items() if name != entry.image}
    return Sample(entry.key, entry.url, image, entry.image, caption_of(others, captions), others)


def caption_of(fields: dict[str, bytes], rules: Sequence[str]) -> str:
    """The caption by the first rule that finds one, else ''.

    `txt` is a field's text, `json:caption` a key of a JSON field. SampleError: bad_caption.
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
            return text.strip()
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise SampleError("bad_caption", f"its .{name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise SampleError("bad_caption", f"its .{name} is not a JSON object")
        if value.get(key) is None:
            continue
        # JSON can spell half a surrogate pair, which is no character and cannot be written anywhere.
        if not isinstance(value[key], str) or any("\ud800" <= letter <= "\udfff" for letter in value[key]):
            raise SampleError("bad_caption", f"{key!r} in its .{name} is not a text")
        return str(value[key]).strip()
    return ""


def _tars(url: str) -> Iterator[str]:
    for name in _braces(url):
        try:
            found = expand(name)
        except OSError as error:
            raise SourceError(f"{name}: {error.strerror or error}; check source.urls") from error
        if not found:
            raise SourceError(f"{name}: no such file; check source.urls")
        yield from found


def _braces(pattern: str) -> list[str]:
    """`{0..12}`, `{000..012}` and `{a,b}`, any number of them, as a shell does; other braces stay as they are."""
    parts = re.split(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    choices = [_choices(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(inside: str) -> list[str]:
    if "," in inside:
        return inside.split(",")
    first, last = inside.split("..")
    width = max(len(first), len(last)) if "0" in (first[0], last[0]) else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _tar_entries(url: str, images: Sequence[str], notices: list[str]) -> Iterator[Entry]:
    samples: dict[str, dict[str, Span]] = {}
    try:
        with open_url(url) as file:
            members = Members(file)
            for name, offset, length in members:
                split = split_name(name)
                if split is None:
                    continue
                key, extension = split
                fields = samples.setdefault(key, {})
                if extension in fields:
                    raise SourceError(
                        f"{url}: two members are {key}.{extension}; keys must be unique, rename one of them"
                    )
                fields[extension] = Span(url, offset, length)
    except tarfile.ReadError as error:
        raise SourceError(f"{url}: not an uncompressed tar ({error}); unpack or decompress it first") from error
    except OSError as error:
        raise SourceError(f"{url}: {error.strerror or error}; check source.urls") from error
    if members.damage:
        notices.append(f"{url}: {members.damage}; samples found: {len(samples)}")
    if members.special:
        notices.append(f"{url}: links or devices passed over: {members.special}")
    if not samples and not members.damage:
        notices.append(f"{url}: no samples in it")
    for key, fields in samples.items():
        yield Entry(key, next((name for name in images if name in fields), ""), fields)


def _hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _check_key(entry: Entry) -> None:
    """A key becomes file names in someone's folder and tar: refuse what could leave that folder or not fit."""
    key, url = entry.key, entry.url
    names = [f"{key}.{extension}" for extension in (*entry.fields, "json", "webp")]
    try:
        length = max(len(name.encode()) for name in names)
    except UnicodeEncodeError as error:
        raise SourceError(f"{url}: key {key!r} is not UTF-8; rename the file") from error
    if key.startswith("/") or ".." in key.split("/"):
        raise SourceError(f"{url}: key {key!r} points outside of its archive; rename the member")
    if any(category(letter) == "Cc" for letter in "".join(names)):
        raise SourceError(f"{url}: key {key!r} has control characters; rename the file")
    if length > LONGEST_NAME:
        raise SourceError(
            f"{url}: key {key!r} with its longest extension has {length} bytes, a tar takes {LONGEST_NAME}; shorten it"
        )
