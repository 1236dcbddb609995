"""The files of a plan, written once: `objects`, `samples`, their digests, and last `units`, all in `plan/`.

Samples that are located again in a changed source are `samples.1.parquet`, `digests.1.json` and last
`objects.1.parquet`, then `.2` and so on. All files are create-only: if two drivers plan at once, the files of the first
stay and both use them. A number at which a driver died is never used again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path

from smsbatch.data.index import (
    OBJECTS,
    SAMPLES,
    UNITS,
    Part,
    StoredFile,
    encode_objects,
    encode_units,
    index_size,
    newest_number,
    numbered,
    read_objects,
)
from smsbatch.data.sample import Unit
from smsbatch.errors import StorageError
from smsbatch.runs.records import DIGEST, PARSE_ERRORS, FileDigest, dump_record, load_record
from smsbatch.storage.store import Store
from smsbatch.text import one_line

DIGESTS = "plan/digests.json"


def cut(samples: int, samples_per_unit: int, samples_per_shard: int) -> Iterator[Unit]:
    """Divide rows [0, samples) into consecutive units, none of which crosses the boundary of a shard."""
    number = count()
    for shard, first in enumerate(range(0, samples, samples_per_shard)):
        end = min(first + samples_per_shard, samples)
        for start in range(first, end, samples_per_unit):
            yield Unit(next(number), shard, start, min(start + samples_per_unit, end))


def write_plan(store: Store, parts: Sequence[Part], samples: Path, units: Sequence[Unit]) -> bool:
    """Store a plan; False if another driver was first with a file, which then stands.

    Args:
        parts: the objects that were indexed.
        samples: the file of `build_index`.
        units: none for a training.
    """
    files: dict[str, bytes | Path] = {OBJECTS: encode_objects(parts), SAMPLES: samples}
    created = {name: store.create(name, content) for name, content in files.items()}
    digests = {
        name: FileDigest.of(content) if created[name] else FileDigest.stored(store, name)
        for name, content in files.items()
    }
    last = {UNITS: encode_units(units)} if units else {}
    digests |= {name: FileDigest.of(content) for name, content in last.items()}
    created[DIGESTS] = store.create(DIGESTS, _encode(digests))
    created |= {name: store.create(name, content) for name, content in last.items()}
    return all(created.values())


def write_moved(store: Store, samples: Path, parts: Sequence[Part]) -> None:
    """Store the file of `move_index` and the objects it was made from, under the next free number."""
    number = 1 + last_number(store.list("plan"))
    while not store.create(numbered(SAMPLES, number), samples):  # another driver has just taken it
        number += 1
    objects = encode_objects(parts)
    digests = {numbered(SAMPLES, number): FileDigest.of(samples), numbered(OBJECTS, number): FileDigest.of(objects)}
    store.create(numbered(DIGESTS, number), _encode(digests))
    store.create(numbered(OBJECTS, number), objects)


def restore(store: Store, number: int, damaged: Mapping[str, bytes | Path], units: Sequence[Unit]) -> None:
    """Write the damaged files of a plan with this number again, and its digests.

    Args:
        damaged: their content by name; all others are undamaged.
        units: of number 0.
    """
    for name, content in damaged.items():
        store.put(name, content)
    names = [numbered(OBJECTS, number), numbered(SAMPLES, number), *([UNITS] if units and not number else [])]
    store.put(numbered(DIGESTS, number), _encode({name: FileDigest.stored(store, name) for name in names}))


def last_number(plan_files: Sequence[str]) -> int:
    """The highest number of any file, also of one that a driver left when it died."""
    return max(newest_number(name, plan_files) for name in (SAMPLES, DIGESTS, OBJECTS))


def check_digests(store: Store, number: int, required: bool) -> Iterator[tuple[str, str]]:
    """Read all files of a plan with this number; yields path and fault of those that are not what was written.

    Args:
        required: the digests may not be missing; plans of versions before 0.2 have none.
    """
    place, names = numbered(DIGESTS, number), {numbered(name, number) for name in (OBJECTS, SAMPLES)}
    found = store.read_all([place])
    try:
        record = load_record(found[place])
        digests = {name: FileDigest(**digest) for name, digest in record["files"].items()}
        if DIGEST not in record or digests.keys() - {UNITS} != names:
            raise ValueError("it is another record")
    except PARSE_ERRORS as error:
        if found or required:
            yield place, f"is not what was written ({one_line(error)})" if found else "is gone"
        digests = {}
    for name in sorted(names - digests.keys()):
        if fault := _fault(StoredFile(store, name)):
            yield name, fault
    for name, expected in digests.items():
        if not store.exists(name):
            yield name, "is gone"
        elif FileDigest.stored(store, name) != expected:
            yield name, "is not what was planned: its SHA-256 differs"


def _fault(file: StoredFile) -> str:
    """What can be seen without a digest."""
    try:
        read_objects(file) if file.path.startswith(OBJECTS.removesuffix("parquet")) else index_size(file)
    except StorageError as error:
        return f"cannot be read ({one_line(error)})"
    return ""


def _encode(digests: Mapping[str, FileDigest]) -> bytes:
    return dump_record({"files": {name: asdict(digest) for name, digest in sorted(digests.items())}})
