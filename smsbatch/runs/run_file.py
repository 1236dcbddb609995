"""`run.json`: what a run says of itself, written once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from smsbatch.errors import RequestError, StorageError
from smsbatch.manifest import Dataset, Manifest, Storage
from smsbatch.runs.layout import RUN
from smsbatch.storage.store import Store

__all__ = [
    "check_dataset",
    "dataset_of",
    "is_training",
    "manifest_at",
    "manifest_of",
    "of_output",
    "read_run",
    "require_empty",
    "require_run",
    "store_of",
]

_RENAMED = {"objective": {"spectral_weight": "identity_weight"}}  # keys of older versions
_BEFORE = {"style": {"text_encoder": False}}  # what a version did that had no such key, where the default is another
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


def require_run(store: Store) -> dict[str, Any]:
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


def is_training(run: Mapping[str, Any]) -> bool:
    """Whether a run makes a generator, and no dataset."""
    return bool(run["manifest"].get("task") == "distill")  # manifests of older versions name no task


def check_dataset(store: Store, run: Mapping[str, Any]) -> None:
    """The run is one that makes a dataset: rows, shards, a report.

    Raises:
        RequestError: it makes a generator.
    """
    if is_training(run):
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


def require_empty(store: Store) -> None:
    """A run writes under plain names, and would replace what somebody else has under the same: sources, perhaps.

    Raises:
        RequestError: somebody has.
    """
    strangers = [name for name in store.entries() if name != "_smsbatch"]
    if strangers:
        raise RequestError(
            f"output.path: {store.url} is no run and not empty (it has {strangers[0]}); choose a new folder"
        )


def of_output(output: str, options: Mapping[str, str]) -> Manifest:
    """The manifest of the run at a path or URL that is reached with these options of `storage`.

    Raises:
        RequestError: an option is unknown or wrong, or no run stands there.
    """
    try:
        storage = Storage.model_validate(options)
    except ValueError as error:
        named = "; ".join(f"storage.{name}={value}" for name, value in options.items())
        raise RequestError(f"--set {named}: not understood; `smsbatch schema` has the keys of storage") from error
    store = Store(output, storage)
    return manifest_at(store, require_run(store)).model_copy(update={"storage": storage})


def manifest_at(store: Store, run: Mapping[str, Any]) -> Manifest:
    """The manifest of a run, wherever its output has been moved since."""
    manifest = manifest_of(run)
    return manifest.model_copy(update={"output": manifest.output.model_copy(update={"path": store.url})})
