"""The files of a shard: a tar of the results and a Parquet of all rows. The same outcomes give the same tar bytes.

Tars are USTAR with mtime 0 and no owners (headers of PAX, Python's default, double small files). Samples are in plan
order, members sorted by name: `<key>.<format>`, `<key>.txt` (the source's own, else the caption), `<key>.json` (the
source's own, unchanged, else our provenance), and the source's other fields unchanged. Failed samples are only rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from smsbatch.data.sample import ROW_SCHEMA, Outcome, row_schema
from smsbatch.data.tars import END_OF_ARCHIVE, Member, Members, split_name
from smsbatch.errors import StorageError
from smsbatch.storage.retries import RemoteError
from smsbatch.text import one_line

CHUNK = 1 << 20
OUTCOME_COLUMNS = [column.name for column in dataclasses.fields(Outcome) if column.name in ROW_SCHEMA.names]


def write_tar(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the successful outcomes to a tar and fsync it."""
    with path.open("xb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as tar:
            for outcome in outcomes:
                for extension, data in sorted(_members(outcome).items()):
                    member = tarfile.TarInfo(f"{outcome.key}.{extension}")  # mtime 0, no owner, mode 0644
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        _sync(file)


def _members(outcome: Outcome) -> Mapping[str, bytes]:
    if outcome.image is None:
        return {}
    made = {"json": outcome.provenance(), "txt": (outcome.caption or "").encode()}
    return made | dict(outcome.fields) | {outcome.image_field: outcome.image}


def concat_tars(paths: Sequence[Path], target: Path) -> None:
    """Join archives with unchanged members: gives the tar that `write_tar` makes of all their outcomes."""
    with target.open("xb") as out:
        for path in paths:
            with path.open("rb") as file:
                _, end = _whole(file, path)
                file.seek(0)
                _copy(file, out, end)
        out.write(bytes(END_OF_ARCHIVE))
        out.write(bytes(-out.tell() % tarfile.RECORDSIZE))
        _sync(out)


def read_tar(file: IO[bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, fields) of each sample of a shard, in order."""
    members, _ = _whole(file, getattr(file, "name", file))
    for key, sample in groupby(members, lambda member: _split(member.name)[0]):
        fields = {}
        for name, offset, length in sample:
            file.seek(offset)
            fields[_split(name)[1]] = file.read(length)
        yield key, fields


def check_tar(path: Path) -> list[str]:
    """Read all of a shard and return its keys in order; StorageError if bytes or the end mark are missing."""
    with path.open("rb") as file:
        members, _ = _whole(file, path)
        for name, offset, length in members:
            file.seek(offset)
            if len(file.read(length)) != length:
                raise StorageError(f"{path}: {name} is cut off")
    return [key for key, _ in groupby(_split(member.name)[0] for member in members)]


def write_rows(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str],
    tar_sha256: str,
    about: Mapping[str, str] | None = None,
) -> None:
    """Write rows of `row_schema(metrics)` and fsync; the file's metadata has the digest of its tar, and `about`."""
    _write_table(path, pa.Table.from_pylist(rows, schema=row_schema(metrics)), tar_sha256, about, checksums=True)


def concat_rows(paths: Sequence[Path], target: Path, tar_sha256: str) -> None:
    """Join Parquet files, rows in order; columns that an older version lacks are null."""
    tables = [pq.read_table(path) for path in paths]
    _write_table(target, pa.concat_tables(tables, promote_options="default"), tar_sha256)


def read_rows(source: Path | IO[bytes], where: str = "") -> list[dict[str, Any]]:
    """All rows of a shard or an attempt.

    Args:
        where: names the file in messages; default: `source`.

    Raises:
        StorageError: the file is damaged or not one of rows.
    """
    with _parquet_errors(where or str(source)):
        file = pq.ParquetFile(source, pre_buffer=False)
        found = file.schema_arrow
        known = [name for name in found.names if name in ROW_SCHEMA.names]
        if "key" not in known or any(found.field(name).type != ROW_SCHEMA.field(name).type for name in known):
            raise ValueError("it has other columns")
        rows: list[dict[str, Any]] = file.read(use_threads=False).to_pylist()
        return rows


def read_metadata(source: Path) -> dict[str, str]:
    """The metadata of an attempt's Parquet, all of whose pages are read and checked; errors as of `read_rows`."""
    with _parquet_errors(str(source)):
        file = pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True)
        file.read(use_threads=False)
        return {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}


def count_rows(file: IO[bytes], where: str = "") -> int:
    """Number of rows of a shard or an attempt, from its footer alone; errors as of `read_rows`."""
    with _parquet_errors(where):
        rows: int = pq.read_metadata(file).num_rows
        return rows


@contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    """Turn every error of Arrow about a damaged file into a StorageError; a store's own errors pass."""
    try:
        yield
    except RemoteError:
        raise
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        raise StorageError(f"{where} cannot be read ({one_line(error)}); run `smsbatch repair --full`") from error


def read_outcomes(tar: Path, parquet: Path) -> list[Outcome]:
    """Restore outcomes from an attempt's files, as far as the files hold them.

    The digest in the row identifies the result. All other members come back as `fields`, also those that we made, so
    that writing the outcomes gives the same tar.
    """
    with tar.open("rb") as file:
        members, _ = _whole(file, tar)
        fields: dict[str, dict[str, bytes]] = {}
        for name, offset, length in members:
            key = _split(name)[0]
            file.seek(offset)
            fields.setdefault(key, {})[name.removeprefix(f"{key}.")] = file.read(length)
    return [_outcome(row, fields.get(row["key"], {})) for row in read_rows(parquet)]


def _outcome(row: Mapping[str, Any], fields: dict[str, bytes]) -> Outcome:
    columns: dict[str, Any] = {name: row.get(name) for name in OUTCOME_COLUMNS}
    measured = {name: value for name, value in row.items() if name not in ROW_SCHEMA.names and value is not None}
    if row["status"] != "success":
        return Outcome(**columns, metrics=measured)
    of_image = [name for name, data in fields.items() if hashlib.sha256(data).hexdigest() == row["sha256"]]
    if not of_image:
        raise StorageError(f"{row['key']}: the tar lacks the picture of its row")
    image = fields.pop(of_image[0])
    return Outcome(**columns, image=image, image_field=of_image[0], metrics=measured, fields=fields)


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_table(
    path: Path, table: pa.Table, tar_sha256: str, about: Mapping[str, str] | None = None, checksums: bool = False
) -> None:
    metadata = {"smsbatch.tar_sha256": tar_sha256, **(about or {})}
    with path.open("xb") as file:
        named = table.replace_schema_metadata(metadata)
        pq.write_table(named, file, compression="zstd", write_page_checksum=checksums)
        _sync(file)


def _split(name: str) -> tuple[str, str]:
    split = split_name(name)
    if split is None:
        raise StorageError(f"{name} is no sample's name; this tar was not written by smsbatch")
    return split


def _whole(file: IO[bytes], where: object) -> tuple[list[Member], int]:
    """The members of an undamaged tar, and the byte after the last one."""
    members = Members(file)
    try:
        found = list(members)
    except tarfile.ReadError as error:
        raise StorageError(f"{where}: not a tar ({error})") from error
    if members.damage:
        raise StorageError(f"{where}: {members.damage}")
    return found, members.end


def _copy(source: IO[bytes], target: IO[bytes], length: int) -> None:
    while length:
        chunk = source.read(min(length, CHUNK))
        target.write(chunk)
        length -= len(chunk)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
