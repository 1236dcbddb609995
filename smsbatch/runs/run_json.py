"""`run.json`: written first, never changed, checked wherever it is read.

It is a record that ends with its own digest, and the ledger keeps a copy. `repair` restores either from the other. Runs
of versions before 0.2 have neither; of them only the manifest's identity can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from smsbatch.errors import StorageError
from smsbatch.manifest import identity_of
from smsbatch.runs.layout import COPY, RUN
from smsbatch.runs.records import DIGEST, PARSE_ERRORS, load_record
from smsbatch.storage.store import Store
from smsbatch.text import one_line

_KINDS = {
    "name": str,
    "manifest": dict,
    "manifest_sha256": str,
    "weights": dict,
    "planned": dict,
    "notices": list,
    "versions": dict,
    "index_sha256": str,
}


class RunJson(NamedTuple):
    """The content of `run.json`, and the faults of it and of its copy by path. With a fault, the other one was read."""

    about: dict[str, Any]
    faults: dict[str, str]


def read(store: Store) -> RunJson | None:
    """`run.json`, or its copy if that alone is undamaged; None if neither exists.

    Raises:
        StorageError: neither is undamaged, or they differ.
    """
    found = store.read_all([RUN, COPY])
    if RUN not in found and COPY in found:  # perhaps a driver has created both just now
        found |= store.read_all([RUN])
    if not found:
        return None
    intact: dict[str, dict[str, Any]] = {}
    faults: dict[str, str] = {}
    for place in (RUN, COPY):
        try:
            if place in found:
                intact[place] = _parse(found[place])
            elif place == RUN or DIGEST in intact.get(RUN, {}):
                faults[place] = "is gone"
        except PARSE_ERRORS as error:
            faults[place] = f"is not what was written ({one_line(error)})"
    if RUN in intact and COPY in intact and intact[RUN] != intact[COPY]:
        if DIGEST in intact[RUN]:
            differ = f"{store.locate(RUN)} and its copy {COPY} are both undamaged, but of different runs"
            raise StorageError(f"{differ}; delete the wrong one, and run `smsbatch repair {store.url}`")
        faults[RUN] = "lacks its digest"
        del intact[RUN]
    if not intact:
        told = f"{store.locate(RUN)} {faults[RUN]}"
        if COPY in found:
            raise StorageError(f"{told}, and its copy {COPY} {faults[COPY]}; restore one of them from a backup")
        raise StorageError(f"{told}: not a run of smsbatch; restore it from a backup, or choose another output.path")
    return RunJson(intact.get(RUN) or intact[COPY], faults)


def require_undamaged(store: Store, faults: Mapping[str, str]) -> None:
    """Raises StorageError if `run.json` has a fault. One of its copy does no harm."""
    if RUN in faults:
        raise StorageError(f"{store.locate(RUN)} {faults[RUN]}; run `smsbatch repair {store.url}`")


def _parse(data: bytes) -> dict[str, Any]:
    about = load_record(data)
    for key, kind in _KINDS.items():
        if not isinstance(about.get(key), kind):
            raise TypeError(f"its key {key} is missing or no {kind.__name__}")
    for key in ("samples", "units", "shards", "bytes"):
        if type(about["planned"].get(key)) is not int:
            raise ValueError(f"its key planned.{key} is missing or no int")
    if type(about["planned"].get("samples_per_unit", 1)) is not int:
        raise ValueError("its key planned.samples_per_unit is no int")
    for key, texts in (("weights", about["weights"].values()), ("versions", about["versions"].values())):
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"its key {key} has a value that is no text")
    if identity_of(about["manifest"]) != about["manifest_sha256"]:
        raise ValueError("its manifest is not that of its manifest_sha256")
    return about
