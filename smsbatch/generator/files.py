"""Find a generator and read its two files. Without torch.

A generator is a folder with `generator.json` and `generator.safetensors`, on disk or in an object store: the output of
a `distill` run, which has it in `generator/`, or a copy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from smsbatch.errors import WeightsError
from smsbatch.generator.config import CONFIG, WEIGHTS, parse_config
from smsbatch.manifest import Storage, Stylize
from smsbatch.storage.store import Store


def read_generator(where: str, storage: Storage) -> dict[str, bytes]:
    """The two files by name, their format, version and checksum verified; only torch can check the parameters.

    Args:
        where: the manifest's `generator`.

    Raises:
        WeightsError: the generator is absent, unfinished, damaged, or of another version.
        StorageError: it cannot be read.
    """
    store, folder = _found(where, storage)
    files = {name: store.read_all([folder + name]).get(folder + name) for name in (CONFIG, WEIGHTS)}
    config, parameters = (files[name] or b"" for name in (CONFIG, WEIGHTS))
    told, file = parse_config(config, f"generator: {store.locate(folder + CONFIG)}"), store.locate(folder + WEIGHTS)
    if not parameters:
        raise WeightsError(f"generator: {file} is missing; copy both files, {CONFIG} and {WEIGHTS}")
    if hashlib.sha256(parameters).hexdigest() != told["sha256"]:
        raise WeightsError(f"generator: {file} is not what {CONFIG} says, so it is damaged; copy both files again")
    if len(parameters) < 4 * told["parameters"]:
        raise WeightsError(f"generator: {file} has fewer parameters than {CONFIG} says; copy both files again")
    return {CONFIG: config, WEIGHTS: parameters}


def generator_about(manifest: Stylize) -> dict[str, Any]:
    """The generator's description: `width`, `blocks`, and of its training `style`, `model`, figures ...

    Raises:
        WeightsError, StorageError: as `read_generator`.
    """
    store, folder = _found(manifest.generator, manifest.storage)
    told = parse_config(store.read(folder + CONFIG), f"generator: {store.locate(folder + CONFIG)}")
    return {**told["about"], **{name: told[name] for name in ("width", "blocks", "parameters")}}


def _found(where: str, storage: Storage) -> tuple[Store, str]:
    """The store, and the generator's folder in it: 'generator/' or ''."""
    store = Store(where, storage)
    for folder in ("generator/", ""):
        if store.exists(folder + CONFIG):
            return store, folder
    raise WeightsError(f"generator: {where} {_instead(store)}")


def _instead(store: Store) -> str:
    """For a message: what is there instead of a generator, and what to do."""
    run = store.read_all(["run.json"]).get("run.json")
    if not store.entries():
        return "does not exist, or is empty; if a `distill` run is to make it, `smsbatch run` its manifest first"
    if run is None:
        return (
            f"has no {CONFIG}, there or in generator/; name the output of a `distill` run, or a folder with {CONFIG} "
            f"and {WEIGHTS}"
        )
    try:
        task = json.loads(run)["manifest"].get("task")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        task = "unknown"
    if task != "distill":
        return f"is the output of a run of task {task}, which makes no generator; name the output of a `distill` run"
    return "is a distill run that is not finished; `smsbatch run` its manifest to the end first"
