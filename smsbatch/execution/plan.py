"""Manifest and source to units: decided once, written down, then obeyed.

`plan` only looks. `establish` writes `run.json` and `plan/`, or, when they are there, checks that this manifest and
these weights are still what was planned. The order makes a half-written plan harmless: `run.json` comes first and
carries the digest of the index, so whoever finds it alone can write the same plan again, and no other.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import count, islice
from typing import Any

from smsbatch.data.index import UNITS, read_units, write_index, write_units
from smsbatch.data.ledger import COMMITS
from smsbatch.data.sample import Entry, Unit
from smsbatch.data.sources import index
from smsbatch.data.store import Store
from smsbatch.diffusion.weights import check_lora, digests
from smsbatch.errors import DriftError, RequestError, StorageError
from smsbatch.manifest import Manifest

__all__ = ["RUN", "Plan", "cut", "establish", "plan", "read_run"]

RUN = "run.json"
_RECORDED = ("smsbatch", "torch", "torchvision", "diffusers", "transformers", "pyarrow", "pillow", "lpips", "ray")


@dataclass(frozen=True)
class Plan:
    """What will be done. `str(plan)` is the line a user reads."""

    manifest: Manifest
    samples: int
    units: tuple[Unit, ...]
    notices: tuple[str, ...]

    @property
    def shards(self) -> int:
        return self.units[-1].shard + 1

    def __str__(self) -> str:
        counts = ((self.shards, "shard"), (len(self.units), "unit"), (self.samples, "image"))
        return ", ".join(f"{count:,} {word}{'' if count == 1 else 's'}" for count, word in counts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.manifest.name,
            "output": self.manifest.output.path,
            "shards": self.shards,
            "units": len(self.units),
            "samples": self.samples,
            "steps": self.manifest.objective.steps,
            "notices": list(self.notices),
        }


def cut(samples: int, samples_per_unit: int, samples_per_shard: int) -> Iterator[Unit]:
    """Rows [0, samples) into consecutive units, none of which crosses the edge of a shard."""
    number = count()
    for shard, first in enumerate(range(0, samples, samples_per_shard)):
        end = min(first + samples_per_shard, samples)
        for start in range(first, end, samples_per_unit):
            yield Unit(next(number), shard, start, min(start + samples_per_unit, end))


def plan(manifest: Manifest) -> Plan:
    """The plan this manifest would get, nothing written.

    Raises:
        SourceError: the source is missing, empty or has clashing keys.
        WeightsError: a model or LoRA is missing.
        DriftError: another run stands at `output.path`.
    """
    drafted = _draft(manifest)[0]
    store = Store(manifest.output.path)
    run = read_run(store)
    if run is None:
        _refuse_strangers(store)
        return drafted
    _check(store, run, manifest, digests(manifest))
    done = len(store.list(COMMITS))
    begun = f"{store.url} has this run already: {done} of {run['planned']['units']} units are done"
    return replace(drafted, notices=(*drafted.notices, begun))


def establish(manifest: Manifest, store: Store) -> Plan:
    """The plan of the run at `store`: the one that stands there, or else a new one, written now.

    Raises:
        DriftError: manifest, weights or index are not those of the run that stands there.
        SourceError, StorageError, WeightsError.
    """
    run, weights = read_run(store), digests(manifest)
    if run is not None and store.exists(UNITS):
        _check(store, run, manifest, weights)
        return Plan(manifest, run["planned"]["samples"], tuple(read_units(store)), tuple(run["notices"]))

    drafted, entries = _draft(manifest)
    index_sha256 = _digest(entries)
    if run is None:
        _refuse_strangers(store)
        store.check_writable()
        store.create(RUN, json.dumps(_record(drafted, weights, index_sha256), indent=2).encode())
        run = read_run(store)  # ours, or that of a driver who was faster
        assert run is not None
    _check(store, run, manifest, weights)
    if run["index_sha256"] != index_sha256:
        raise DriftError(f"{store.url}: the source is not the one this run began with; choose another output.path")
    write_index(store, entries)
    write_units(store, drafted.units)
    return drafted


def _refuse_strangers(store: Store) -> None:
    """A run writes under plain names, and would replace what somebody else has under the same: sources, perhaps."""
    strangers = [name for name in store.entries() if name != "_smsbatch"]
    if strangers:
        raise RequestError(
            f"output.path: {store.url} is no run and not empty (it has {strangers[0]}); choose a new folder"
        )


def read_run(store: Store) -> dict[str, Any] | None:
    """`run.json`, or None where no run stands.

    Raises:
        StorageError: it is not a run.json of ours.
    """
    if not store.exists(RUN):
        return None
    try:
        run = json.loads(store.read(RUN))
    except ValueError as error:
        raise StorageError(f"{store.locate(RUN)} is not JSON; it is not a run of smsbatch") from error
    if not isinstance(run, dict) or "manifest_sha256" not in run:
        raise StorageError(f"{store.locate(RUN)} is not a run of smsbatch; choose another output.path")
    return run


def _draft(manifest: Manifest) -> tuple[Plan, list[Entry]]:
    source, output = manifest.source, manifest.output
    notices = check_lora(manifest)
    entries = list(islice(index(source.format, source.urls, source.images, notices), source.limit))
    units = tuple(cut(len(entries), output.samples_per_unit, output.samples_per_shard))
    return Plan(manifest, len(entries), units, tuple(notices)), entries


def _digest(entries: Iterable[Entry]) -> str:
    """SHA-256 of an index: every key and where all of its bytes are."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(json.dumps([entry.key, entry.image, sorted(entry.fields.items())]).encode())
    return digest.hexdigest()


def _record(plan: Plan, weights: Mapping[str, str], index_sha256: str) -> dict[str, Any]:
    return {
        "smsbatch": version("smsbatch"),
        "name": plan.manifest.name,
        "manifest": plan.manifest.dump(),
        "manifest_sha256": plan.manifest.identity,
        "weights": dict(weights),
        "index_sha256": index_sha256,
        "planned": {"samples": plan.samples, "units": len(plan.units), "shards": plan.shards},
        "notices": list(plan.notices),
        "versions": {"python": platform.python_version()} | _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED:
        with suppress(PackageNotFoundError):  # ray is optional
            found[name] = version(name)
    return found


def _check(store: Store, run: Mapping[str, Any], manifest: Manifest, weights: Mapping[str, str]) -> None:
    """The run that stands was planned for the same results."""
    changed = []
    if run["manifest_sha256"] != manifest.identity:
        before, now = _flat(run["manifest"]), _flat(manifest.dump())
        changed += [
            f"{key} ({before.get(key)!r} then, {now.get(key)!r} now)"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
            and (key == "compute.precision" or not key.startswith(("compute.", "errors.", "output.path")))
        ]
    changed += [
        f"the file {name}"
        for name in sorted(run["weights"].keys() | weights.keys())
        if run["weights"].get(name) != weights.get(name)
    ]
    if changed:
        begun = "undo the change, or choose another output.path"
        advice = begun if store.list(COMMITS) else "nothing is committed there: delete the folder to begin anew"
        raise DriftError(f"{store.url}: this run was planned differently; changed: {'; '.join(changed)}; {advice}")


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
