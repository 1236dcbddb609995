"""Folders as sources: which files are pictures, which belong to them, and which are left aside.

pictures    every file below the folder with an extension of `source.images`, but hidden ones, and those in folders
            in which systems keep thumbnails and bins; two pictures with one stem become two entries, which clash
sidecars    `a/b.txt`, else `a/b.jpg.txt`, of `a/b.jpg`: for txt, json and every extension of `source.caption`
metadata    `metadata.jsonl` and `metadata.csv`, as Hugging Face's folders have them: the column `file_name` is the
            picture's path from there, another the caption (`metadata:text`)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from smsbatch.data.captions import LONGEST_READ, METADATA, Caption, fields_of, has_caption, sidecars, text_at
from smsbatch.data.index import Part
from smsbatch.data.keys import is_text, map_key
from smsbatch.data.reader import Listed, absolute, is_local, list_files, not_followed, open_url
from smsbatch.data.sample import Entry, Span
from smsbatch.errors import SampleError, SourceError
from smsbatch.manifest import Source, Storage

# Of Synology, QNAP, Windows, macOS and Linux.
_SYSTEM = {"@eaDir", "#snapshot", ".@__thumb", "@Recycle", "#recycle", "$RECYCLE.BIN", "__MACOSX", "lost+found"}
_METADATA_FILES = ("metadata.jsonl", "metadata.csv")


class _Picture(NamedTuple):
    path: str
    image: str
    fields: Mapping[str, Listed]  # with the picture itself


class _Folder(NamedTuple):
    """The pictures of a folder, in the order of their paths, and what else is in it."""

    pictures: list[_Picture]
    metadata: list[Listed]
    left: Counter[str]
    hidden: int
    system: int
    unreadable: int  # names that are not UTF-8


def is_passed_over(path: str) -> bool:
    """True for a file in a folder of thumbnails or of the system."""
    return not _SYSTEM.isdisjoint(path.split("/")[:-1])


def folder_part(url: str, source: Source, storage: Storage) -> Part:
    """The folder with the size and a digest of all files that the index uses; others may come and go."""
    found = _look(url, source, storage)
    used = {file.path: file for picture in found.pictures for file in picture.fields.values()}
    used |= {file.path: file for file in found.metadata}
    digest = hashlib.sha256()
    for file in (used[path] for path in sorted(used)):
        digest.update(f"{file.path}\0{file.size}\0{file.etag}\0".encode("utf-8", "surrogatepass"))
    return Part("folder", absolute(url, storage), sum(file.size for file in used.values()), digest.hexdigest())


def folder_entries(
    part: Part, source: Source, storage: Storage, seed: int, notices: list[str], left: Counter[str]
) -> Iterator[Entry]:
    """The entries of a folder. Sidecars on this machine are read to count captions, others count unless empty."""
    found = _look(part.url, source, storage)
    captions = _metadata(found, source, storage, seed, notices)
    local, broken = is_local(part.url, storage), list[str]()
    for path, image, files in found.pictures:
        fields = {name: Span(file.url, 0, file.size, file.etag) for name, file in files.items()}
        stem = path.rpartition(".")[0]
        wish = _wish(path)
        key, original = map_key(f"{part.prefix}/{wish}" if part.prefix else wish, fields, stem)
        caption = captions.pop(path, Caption())
        rule = _rule(files, image, source, storage, local, caption, broken)
        yield Entry(key, image, fields, caption.text or None, original, rule)
    left.update(found.left)
    links, closed = not_followed(part.url, storage)
    for what, number, first in (
        ("files whose names are not UTF-8 left out", found.unreadable, "rename them"),
        ("hidden files passed over", found.hidden, ""),
        ("files in folders of thumbnails or of the system passed over", found.system, ""),
        ("links to folders or to nothing passed over", len(links), ", ".join(links[:1])),
        ("folders that cannot be read passed over", len(closed), ", ".join(closed[:1])),
        ("sidecars from which no caption can be read", len(broken), ", ".join(broken[:1])),
        ("rows of metadata that name no picture here", len(captions), ", ".join(list(captions)[:1])),
    ):
        if number:
            notices.append(f"{part.url}: {what}: {number:,}" + (f"; {first}" if first else ""))


def _look(url: str, source: Source, storage: Storage) -> _Folder:
    wanted, kinds = sidecars(source), set(source.images)
    images: list[tuple[str, str, Listed]] = []
    others: dict[tuple[str, str], Listed] = {}  # by stem and extension: `a/b.jpg.txt` is a/b jpg.txt, and a/b.jpg txt
    metadata: list[Listed] = []
    rest: dict[str, Listed] = {}
    hidden = system = unreadable = 0
    for file in _list(url, storage):
        folder, _, name = file.path.rpartition("/")
        if is_passed_over(file.path):
            system += 1
        elif any(part.startswith(".") for part in file.path.split("/")):
            hidden += 1
        elif not is_text(file.url):
            unreadable += 1
        elif name in _METADATA_FILES and any(rule.startswith(f"{METADATA}:") for rule in source.caption):
            metadata.append(file)
        else:
            stem, _, suffix = file.path.rpartition(".")
            if stem and stem != f"{folder}/" and suffix.lower() in kinds:
                images.append((file.path, suffix.lower(), file))
                continue
            rest[file.path] = file
            dots = [at for at, letter in enumerate(name) if letter == "." and at]
            for at in dots:
                extension = name[at + 1 :].lower()
                if extension in wanted:
                    others[(file.path[: len(file.path) - len(name) + at], extension)] = file
    pictures = []
    for path, image, file in images:
        stem, fields = path.rpartition(".")[0], {image: file}
        for name in wanted:
            for of, field in ((stem, name), (path, f"{image}.{name}")):
                if (of, name) in others:
                    fields[field] = others[(of, name)]
                    rest.pop(fields[field].path, None)
        pictures.append(_Picture(path, image, fields))
    names = (path.rpartition("/")[2] for path in rest)
    left = Counter(name.rpartition(".")[2].lower() if "." in name else "" for name in names)
    return _Folder(pictures, metadata, left, hidden, system, unreadable)


def _wish(path: str) -> str:
    """The preferred key of a picture."""
    return path.rpartition(".")[0].replace("/", "__").replace(".", "_")


def metadata_of(entry: Entry, source: Source) -> Caption | None:
    """The caption of an entry that metadata gave, with its rule."""
    rules = [rule for rule in source.caption if rule.startswith(f"{METADATA}:")]
    if not entry.caption or not rules:
        return None
    # Where planning found another rule before, the one of metadata comes later.
    return Caption(entry.caption, entry.caption_from if entry.caption_from in rules else rules[-1])


def _rule(
    files: Mapping[str, Listed],
    image: str,
    source: Source,
    storage: Storage,
    local: bool,
    metadata: Caption,
    broken: list[str],
) -> str | None:
    """The first rule that finds a caption; a sidecar that is not on this machine has one if it is not empty."""
    for rule in source.caption:
        if rule == metadata.rule:
            return rule
        for file in (files[name] for name in fields_of(rule, [image, *source.images]) if name in files):
            if not file.size:
                continue
            if not local or file.size > LONGEST_READ:
                return rule
            with open_url(file.url, storage) as opened:
                found = has_caption(opened.read(), rule, file.path, source, broken)
            if found is not False:
                return rule if found else None
    return None


def _metadata(found: _Folder, source: Source, storage: Storage, seed: int, notices: list[str]) -> dict[str, Caption]:
    """Captions by the path of their picture; of two rows for one the deeper file's counts, else the later."""
    rules = [rule for rule in source.caption if rule.startswith(f"{METADATA}:")]
    captions: dict[str, Caption] = {}
    for file in sorted(found.metadata, key=lambda file: (file.path.count("/"), file.path)):
        folder = file.path.rpartition("/")[0]
        counts: Counter[str] = Counter()
        for where, row in _rows(file, storage, notices):
            name = row.get("file_name")
            if not is_text(name) or not name:
                counts["rows without file_name, which names the picture"] += 1
                continue
            path, caption = posixpath.normpath(posixpath.join(folder, name)), Caption()
            for rule in rules:
                try:
                    text = text_at(row, rule.partition(":")[2], where, source, f"{seed}:{_wish(path)}")
                except SampleError:
                    counts["captions that are no texts, or too long"] += 1
                    continue
                caption = caption if caption.text else Caption(text, rule)
            if not caption.text:
                counts[f"rows without a caption in {' or '.join(rule.partition(':')[2] for rule in rules)}"] += 1
                continue
            counts["rows for a picture that has one already"] += path in captions
            captions[path] = caption
        notices += [f"{file.url}: {what}: {number:,}" for what, number in counts.items() if number]
    return captions


def _rows(file: Listed, storage: Storage, notices: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open_url(file.url, storage) as opened:
        try:
            text = opened.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SourceError(f"{file.url}: not UTF-8 ({error.reason} at byte {error.start}); save it so") from error
    if file.path.endswith(".csv"):
        yield from _csv_rows(file.url, text, notices)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(f"{file.url}: line {number}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise SourceError(f"{file.url}: line {number}: not a JSON object")
            yield f"line {number}", row


def _csv_rows(url: str, text: str, notices: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    rows, told, blank = csv.reader(io.StringIO(text, newline=""), strict=True), 0, 0
    try:
        header = next(rows, [])
        if "file_name" not in header:
            notices.append(f"{url}: no column file_name, so it is no metadata of pictures: {', '.join(header)[:99]}")
            return
        for row in rows:
            if row and len(row) != len(header):
                raise SourceError(f"{url}: line {rows.line_num}: {len(row)} cells, the header has {len(header)}")
            told, blank = told + bool(row), blank + (not row)
            if row:
                yield f"line {rows.line_num}", dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise SourceError(f"{url}: line {rows.line_num}: {error}") from error
    physical = rows.line_num - 1 - blank
    if physical != told:
        notices.append(f"{url}: {told:,} rows from {physical:,} lines: cells in quotes go over several lines")


def _list(url: str, storage: Storage) -> Iterator[Listed]:
    try:
        yield from list_files(url, storage)
    except FileNotFoundError as error:
        raise SourceError(f"{url}: no such folder; check source.urls") from error
    except NotADirectoryError as error:
        raise SourceError(f"{url}: a file, not a folder; for tars set source.format to webdataset") from error
    except OSError as error:
        raise SourceError(f"{url}: {error.strerror or error}; check source.urls") from error
