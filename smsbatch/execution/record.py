"""What a run says of itself, `run.json`, and whether what is asked now is still that.

`run.json` is written once. What was found changed later and allowed by the user is noted beside the ledger, under
`_smsbatch/drift/`, and is no longer asked about: the same change may be resumed as often as one likes.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count, islice
from reprlib import repr
from typing import Any

from smsbatch.data.index import Part, read_index, read_objects
from smsbatch.data.objects import list_files
from smsbatch.data.records import COMMITS
from smsbatch.data.sources import parts
from smsbatch.data.store import Store
from smsbatch.errors import DriftError, RequestError, StorageError
from smsbatch.execution.checkpoints import CHECKPOINTS
from smsbatch.manifest import HOUSEKEEPING, Dataset, Manifest, Storage

__all__ = [
    "RUN",
    "Change",
    "allowed_drift",
    "check_allowed",
    "check_dataset",
    "check_request",
    "dataset_of",
    "inputs_changed",
    "manifest_of",
    "read_run",
    "refuse_strangers",
    "store_of",
    "the_run",
    "trains",
]

RUN = "run.json"
DRIFT = "_smsbatch/drift"
INPUTS = "inputs"

# Where and how, which changes no result.
_ELSEWHERE = ("compute.", "errors.", "storage.", "output.path", *(f"distill.{key}" for key in HOUSEKEEPING))
_NEVER = {"metrics": "rows of one run have the same columns"}
_NEVER_IN_TRAINING = dict.fromkeys(
    [
        *(f"distill.{key}" for key in ("width", "blocks", "restore", "warmup_steps", "steps", "images_per_step")),
        *("seed", "objective.name", "objective.fake.rank", "objective.fake.layers"),
    ],
    "a checkpoint is of one training",
)
_RENAMED = {"objective": {"spectral_weight": "identity_weight"}}  # keys of older versions
_BEFORE = {"style": {"text_encoder": False}}  # what a version did that had no such key, where the default is another
_NAMED = 3
_ROWS = 65536  # of the index in memory at once
_KEYS = {"name", "manifest", "manifest_sha256", "weights", "planned", "notices", "versions", "index_sha256"}


def store_of(where: str | Manifest) -> Store:
    """The store of a run: of a manifest, or of an output path or URL with nothing but the environment's settings.

    Where the run that stands there says that its store has no create-only put, the store is used accordingly.
    """
    path, storage = (where, Storage()) if isinstance(where, str) else (where.output.path, where.storage)
    store = Store(path, storage)
    run = read_run(store)
    store.conditional = run is None or run.get("commits") != "driver"
    return store


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
    if not isinstance(run, dict) or not run.keys() >= _KEYS:
        raise StorageError(f"{store.locate(RUN)} is not a run of smsbatch; choose another output.path")
    return run


def the_run(store: Store) -> dict[str, Any]:
    """`run.json` of the run that stands there.

    Raises:
        RequestError: none does.
        StorageError: it is not a run.json of ours.
    """
    run = read_run(store)
    if run is None:
        store.entries()  # which says so where there is not even a bucket
        raise RequestError(f"{store.url}: no run here (no {RUN}); `smsbatch run` starts one")
    return run


def trains(run: Mapping[str, Any]) -> bool:
    """Whether a run makes a generator, and no dataset."""
    return bool(run["manifest"].get("task") == "distill")  # manifests of older versions name no task


def check_dataset(store: Store, run: Mapping[str, Any]) -> None:
    """The run is one that makes a dataset: rows, shards, a report.

    Raises:
        RequestError: it makes a generator.
    """
    if trains(run):
        raise RequestError(
            f"{store.url}: this run distills a generator and makes no dataset; `smsbatch status` says how far it is, "
            "and a manifest of task stylize makes a dataset with its generator"
        )


def dataset_of(store: Store, run: Mapping[str, Any]) -> Dataset:
    """The manifest of a run that makes a dataset. Raises as `check_dataset` and `manifest_of`."""
    check_dataset(store, run)
    manifest = manifest_of(run)
    assert isinstance(manifest, Dataset)
    return manifest


def manifest_of(run: Mapping[str, Any]) -> Manifest:
    """The manifest a run was planned with, in the words of this version.

    Raises:
        RequestError: it is of a version that has other ones.
    """
    plain = dict(run["manifest"])
    for section in (_RENAMED.keys() | _BEFORE.keys()) & plain.keys():
        names = _RENAMED.get(section, {})
        plain[section] = _BEFORE.get(section, {}) | {
            names.get(key, key): v for key, v in plain.get(section, {}).items()
        }
    try:
        return Manifest.model_validate(plain)
    except ValueError as error:
        raise RequestError(
            f"{RUN}: its manifest is not understood, it is of smsbatch {run.get('smsbatch', '?')}; use that version"
        ) from error


def refuse_strangers(store: Store) -> None:
    """A run writes under plain names, and would replace what somebody else has under the same: sources, perhaps.

    Raises:
        RequestError: somebody has.
    """
    strangers = [name for name in store.entries() if name != "_smsbatch"]
    if strangers:
        raise RequestError(
            f"output.path: {store.url} is no run and not empty (it has {strangers[0]}); choose a new folder"
        )


@dataclass(frozen=True)
class Change:
    """A key of the manifest, `weights.<file>` or `inputs`, as it was planned and as it is."""

    key: str
    then: Any
    now: Any
    text: str

    @classmethod
    def of(cls, key: str, then: Any, now: Any) -> Change:
        return cls(key, then, now, f"{key} ({repr(then)} then, {repr(now)} now)")


def check_request(
    store: Store,
    run: Mapping[str, Any],
    manifest: Manifest,
    weights: Mapping[str, str],
    allow: Collection[str] = (),
    note: bool = True,
) -> None:
    """The run that stands was planned for the same results: the same manifest and the same weights.

    Args:
        allow: keys that may have changed.
        note: write down with the run what was allowed.

    Raises:
        DriftError: naming what changed.
    """
    task = run["manifest"].get("task", "optimize")
    if task != manifest.task:
        raise DriftError(f"{store.url}: here is a run of task {task}, not {manifest.task}; choose another output.path")
    changes = []
    if run["manifest_sha256"] != manifest.identity:
        then, now = _flat(manifest_of(run).dump()), _flat(manifest.dump())
        changes += [
            Change.of(key, then.get(key), now.get(key))
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and (key == "compute.precision" or not key.startswith(_ELSEWHERE))
        ]
    changes += [
        Change(f"weights.{name}", run["weights"].get(name), weights.get(name), f"weights: the file {name}")
        for name in sorted(run["weights"].keys() | weights.keys())
        if run["weights"].get(name) != weights.get(name)
    ]
    _settle(store, changes, allow, note, _NEVER_IN_TRAINING if trains(run) else _NEVER)


def inputs_changed(store: Store, manifest: Manifest, allow: Collection[str] = (), note: bool = True) -> bool:
    """Whether the source's objects are not those that were planned: names, sizes, and etags where the store has them.

    Raises:
        DriftError: they are not, and `allow` has no `inputs`; naming the first few.
    """
    planned, present = read_objects(store), parts(manifest.source, manifest.storage)
    then, now = ({part.url: part for part in listed} for listed in (planned, present))
    told = [f"{url} is gone" for url in then.keys() - now.keys()]
    told += [f"{url} is new" for url in now.keys() - then.keys()]
    for part in (now[url] for url in then.keys() & now.keys() if then[url] != now[url]):
        files = (
            list(islice(_changed_files(store, part, manifest.storage), _NAMED + 1)) if part.format == "folder" else []
        )
        told += files or [f"{part.url} was changed"]
    if told:
        some = "; ".join(sorted(told)[:_NAMED]) + ("; and more" if len(told) > _NAMED else "")
        _settle(store, [Change(INPUTS, _digest(planned), _digest(present), f"{INPUTS}: {some}")], allow, note)
    return bool(told)


def _changed_files(store: Store, folder: Part, storage: Storage) -> Iterator[str]:
    """What became of a folder's planned files; files that are new are not looked for."""
    present = {file.url: (file.size, file.etag) for file in list_files(folder.url, storage)}
    for start in count(0, _ROWS):
        entries = read_index(store, start, start + _ROWS)
        if not entries:
            return
        for url, _, length, etag in (span for entry in entries for span in entry.fields.values()):
            if url not in present:
                yield f"{url} is gone"
            elif present[url] != (length, etag):
                yield f"{url} was changed"


def allowed_drift(store: Store) -> list[dict[str, Any]]:
    """What has changed since the plan and was allowed, in the order of the notes: `time`, `changed` by key."""
    notes = []
    for path, data in store.read_all(store.list(DRIFT)).items():
        try:
            notes.append(json.loads(data))
        except ValueError as error:
            raise StorageError(f"{store.locate(path)} is cut or empty; delete it and allow the change again") from error
    return sorted(notes, key=lambda note: str(note["time"]))


def _settle(
    store: Store,
    changes: Iterable[Change],
    allow: Collection[str],
    note: bool = True,
    never: Mapping[str, str] = _NEVER,
) -> None:
    known = {key: change["now"] for note in allowed_drift(store) for key, change in note["changed"].items()}
    fresh = [change for change in changes if change.key not in known or known[change.key] != change.now]
    refused = [change for change in fresh if change.key in never or not _covered(change.key, allow)]
    if refused:
        keys = list(dict.fromkeys(change.key for change in refused))
        if len(keys) > _NAMED:
            keys = list(dict.fromkeys(key.partition(".")[0] for key in keys))
        flags = " ".join(f"--allow-drift {key}" for key in keys)
        begun = f"undo the change, choose another output.path, or allow it by {flags}"
        for change in refused:
            if change.key in never:
                begun = f"undo the change, or choose another output.path ({never[change.key]})"
        advice = (
            begun
            if store.list(COMMITS) or store.list(CHECKPOINTS)
            else "nothing is committed there: delete the folder to begin anew"
        )
        told = "; ".join(change.text for change in refused)
        raise DriftError(f"{store.url}: this run was planned differently; changed: {told}; {advice}")
    if fresh and note:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        allowed = {"time": now, "changed": {change.key: asdict(change) for change in fresh}}
        store.create(f"{DRIFT}/{uuid.uuid4().hex}.json", json.dumps(allowed, indent=1).encode())


def check_allowed(manifest: Manifest, allow: Collection[str]) -> None:
    """Every key that may have changed is one that can.

    Raises:
        RequestError: naming the one that is none.
    """
    known = [*_flat(manifest.dump()), "weights", INPUTS]
    for key in allow:
        if not any(_covered(name, [key]) for name in known) and not key.startswith("weights."):
            raise RequestError(
                f"--allow-drift {key}: no such key; it takes a key or section of the manifest, weights or {INPUTS}"
            )


def _covered(key: str, allow: Collection[str]) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow)


def _digest(listed: Sequence[Part]) -> str:
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
