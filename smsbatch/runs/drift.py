"""Drift: changes of the manifest, its values of the environment, weights or inputs since the plan, or of how colours
are read by this version.

The manifest is compared by its hash (`Manifest.identity`), its values of the environment by their digests, weights by
the SHA-256 of their files, inputs by the name, size and etag of each object. The etag of a folder is the
SHA-256 of its listing, path, size and etag of every file. Drift is refused unless the user allows it. An allowed change
is noted under `_smsbatch/drift/`, so that later resumes need not allow it again.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import count, islice
from reprlib import repr
from typing import Any

from smsbatch.data import colours
from smsbatch.data.index import Part, read_index, read_objects
from smsbatch.data.reader import list_files
from smsbatch.data.sources import parts
from smsbatch.errors import DriftError, RequestError, StorageError
from smsbatch.manifest import HOUSEKEEPING, Manifest, Storage
from smsbatch.runs.layout import CHECKPOINTS, COMMITS, DRIFT
from smsbatch.runs.records import PARSE_ERRORS, dump_record, load_record
from smsbatch.runs.run import Run
from smsbatch.storage.retries import redact
from smsbatch.storage.store import Store
from smsbatch.text import flat, hidden

INPUTS = "inputs"
ENVIRONMENT = "environment"
COLOURS = "colours"
# These keys change where and how the run works, but not its results.
_ELSEWHERE = ("compute.", "errors.", "storage.", "output.path", *(f"distill.{key}" for key in HOUSEKEEPING))
_NEVER = {"metrics": "rows of one run have the same columns"}
_NEVER_IN_TRAINING = dict.fromkeys(
    [
        *(f"distill.{key}" for key in ("width", "blocks", "restore", "warmup_steps", "steps", "images_per_step")),
        *("seed", "objective.name", "objective.fake.rank", "objective.fake.layers"),
    ],
    "a checkpoint is of one training",
)
_NAMED = 3
_ROWS = 65536  # rows of the index in memory at once


@dataclass(frozen=True)
class Change:
    """The planned and the present value of a key, `weights.<file>`, `inputs`, `colours` or `environment.<NAME>`
    (digests)."""

    key: str
    then: Any
    now: Any
    text: str

    @classmethod
    def of(cls, key: str, then: Any, now: Any) -> Change:
        return cls(key, then, now, f"{key} ({repr(then)} then, {repr(now)} now)")


def check_unchanged(
    run: Run, manifest: Manifest, weights: Mapping[str, str], allow: Collection[str] = (), note: bool = True
) -> None:
    """Check that the run was planned with this manifest and these weights.

    Args:
        weights: digests by file name.
        allow: keys that may have changed.
        note: store the allowed changes with the run.

    Raises:
        DriftError: another key has changed; the message names it.
    """
    if run.task != manifest.task:
        here = f"here is a run of task {run.task}, not {manifest.task}"
        raise DriftError(f"{run.store.url}: {here}; choose another output.path")
    changes, digests = [], run.about["weights"]
    if run.about["manifest_sha256"] != manifest.identity:
        # Before there was `environment`, manifests were recorded with its values.
        plain = manifest.dump() if "environment" in run.about else manifest.model_dump(mode="json")
        then, now = flat(run.manifest.dump()), flat(plain)
        changes += [
            Change.of(key, then.get(key), now.get(key))
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key) and (key == "compute.precision" or not key.startswith(_ELSEWHERE))
        ]
    changes += _environment_changes(run, manifest)
    weights = {hidden(name): digest for name, digest in weights.items()}
    changes += [
        Change(f"weights.{name}", digests.get(name), weights.get(name), f"weights: the file {name}")
        for name in sorted(digests.keys() | weights.keys())
        if digests.get(name) != weights.get(name)
    ]
    _resolve_drift(run, changes, allow, note)


def check_environment(run: Run, manifest: Manifest) -> None:
    """Check that the environment has the values with which the run was planned, or others that were allowed.

    Raises:
        DriftError: it has not; the message has their names.
    """
    _resolve_drift(run, list(_environment_changes(run, manifest)), (), note=False)


def _environment_changes(run: Run, manifest: Manifest) -> Iterator[Change]:
    """The names in keys that matter whose values have changed; only digests of values are noted."""
    then, now = run.about.get("environment", {}), manifest.environment
    texts = [str(text) for key, text in flat(manifest.dump()).items() if not key.startswith(_ELSEWHERE)]
    for name in sorted(then.keys() & now.keys()):
        if then[name] != now[name] and any(f"${{{name}}}" in text for text in texts):
            key = f"{ENVIRONMENT}.{name}"
            yield Change(key, then[name], now[name], f"{key} (the value of {name} in the environment)")


def inputs_changed(run: Run, manifest: Manifest, allow: Collection[str] = (), note: bool = True) -> bool:
    """True if the source's objects differ from the planned ones in name, size, or etag where the store has etags.

    Called when pictures are about to be read: also checks that this version reads their colours as the run did before.

    Raises:
        DriftError: they differ, and `allow` has no `inputs`; the message names the first few. Or the colours do.
    """
    if run.colours != colours.COLOURS:
        _resolve_drift(run, [Change.of(COLOURS, run.colours, colours.COLOURS)], allow, note)
    if run.is_new:
        return False
    planned, present = read_objects(run.objects), parts(manifest.source, manifest.storage)
    then, now = ({part.url: part for part in listed} for listed in (planned, present))
    told = [f"{url} is gone" for url in then.keys() - now.keys()]
    told += [f"{url} is new" for url in now.keys() - then.keys()]
    for part in (now[url] for url in then.keys() & now.keys() if then[url].version != now[url].version):
        files = list(islice(_changed_files(run, part, manifest.storage), _NAMED + 1)) if part.format == "folder" else []
        told += files or [f"{part.url} was changed"]
    if told:
        some = "; ".join(sorted(told)[:_NAMED]) + ("; and more" if len(told) > _NAMED else "")
        _resolve_drift(
            run, [Change(INPUTS, _digest(planned), _digest(present), redact(f"{INPUTS}: {some}"))], allow, note
        )
    return bool(told)


def _changed_files(run: Run, folder: Part, storage: Storage) -> Iterator[str]:
    """A line for each planned file of a folder that is gone or changed; new files are not looked for."""
    present = {file.url: (file.size, file.etag) for file in list_files(folder.url, storage)}
    for start in count(0, _ROWS):
        entries = read_index(run.index, start, start + _ROWS)
        if not entries:
            return
        for url, _, length, etag in (span for entry in entries for span in entry.fields.values()):
            if url not in present:
                yield f"{url} is gone"
            elif present[url] != (length, etag):
                yield f"{url} was changed"


def allowed_drift(store: Store) -> dict[str, dict[str, Any]]:
    """The notes of allowed changes by path, oldest first: `time`, and `changed` by key."""
    notes = {}
    for path, data in store.read_all(store.list(DRIFT)).items():
        try:
            notes[path] = parse_note(data)
        except PARSE_ERRORS as error:
            told = f"{store.locate(path)} is not what was written"
            raise StorageError(f"{told}; delete it and allow the change again") from error
    return dict(sorted(notes.items(), key=lambda note: str(note[1]["time"])))


def parse_note(data: bytes) -> dict[str, Any]:
    """A note of allowed changes; raises one of PARSE_ERRORS."""
    note = load_record(data)
    if not note["time"] or not all(isinstance(Change(**one).text, str) for one in note["changed"].values()):
        raise ValueError("it is no note of changes")
    return note


def _resolve_drift(run: Run, changes: Sequence[Change], allow: Collection[str], note: bool) -> None:
    if not changes:
        return
    store, never = run.store, _NEVER if run.makes == "dataset" else _NEVER_IN_TRAINING
    known = {key: change["now"] for note in allowed_drift(store).values() for key, change in note["changed"].items()}
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
            else "nothing is committed there: delete the folder to start over"
        )
        told = "; ".join(change.text for change in refused)
        raise DriftError(f"{store.url}: this run was planned differently; changed: {told}; {advice}")
    if fresh and note:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        allowed = {"time": now, "changed": {change.key: asdict(change) for change in fresh}}
        store.create(f"{DRIFT}/{uuid.uuid4().hex}.json", dump_record(allowed))


def check_allowed(manifest: Manifest, allow: Collection[str]) -> None:
    """Check that every key of `allow` exists.

    Raises:
        RequestError: the message names the unknown key.
    """
    names = [f"{ENVIRONMENT}.{name}" for name in manifest.environment]
    known = [*flat(manifest.dump()), *names, "weights", INPUTS, COLOURS]
    for key in allow:
        if not any(_covered(name, [key]) for name in known) and not key.startswith("weights."):
            raise RequestError(
                f"--allow-drift {key}: no such key; it takes a key or section of the manifest, {ENVIRONMENT}.NAME, "
                f"weights, {INPUTS} or {COLOURS}"
            )


def _covered(key: str, allow: Collection[str]) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow)


def _digest(listed: Sequence[Part]) -> str:
    return hashlib.sha256(json.dumps(sorted(part.version for part in listed)).encode()).hexdigest()
