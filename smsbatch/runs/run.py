"""A stored run: `run.json`, plan and index, each read once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

from smsbatch.data.captions import Contents
from smsbatch.data.index import OBJECTS, SAMPLES, UNITS, StoredFile, newest_number, numbered, read_units
from smsbatch.data.sample import Unit
from smsbatch.errors import RequestError
from smsbatch.manifest import TASKS, Dataset, Errors, Manifest, Storage, fill
from smsbatch.runs import run_json
from smsbatch.runs.layout import RUN
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.plan_files import DIGESTS, cut
from smsbatch.runs.records import DIGEST
from smsbatch.storage.store import Store

M = TypeVar("M", bound=Manifest)

_RENAMED = {"objective": {"spectral_weight": "identity_weight"}}  # keys of older versions
_BEFORE = {"style": {"text_encoder": False}}  # behaviour of versions without the key, where today's default differs


def store_of(where: str | Manifest) -> Store:
    """The store of a manifest's output, or of an output path or URL, which has no settings but the environment's."""
    return Store(where) if isinstance(where, str) else Store(where.output.path, where.storage)


class Run:
    """The run at an output path.

    Each property is read from the store on first use, and kept, because none of these files ever changes. New files of
    the plan may appear after a run was opened, for a first plan or for changed inputs; `renew` has them read again.
    A worker keeps the index that it has opened: samples that were located again since may fail, and can be retried.

    Attributes:
        about: the content of `run.json`.
        faults: what is wrong with `run.json` and its copy, by path.
        store: the output's store; without create-only put if `run.json` records that.
        is_new: this process has just written the plan, so nothing can have changed or been done since.
    """

    def __init__(self, store: Store, about: Mapping[str, Any], faults: Mapping[str, str] | None = None) -> None:
        self.about, self.faults = about, dict(faults or {})
        self.store = (store.without_create_only_put() if about.get("commits") == "driver" else store).existing()
        self.is_new = False

    @classmethod
    def find(cls, store: Store, damaged: bool = False) -> Run | None:
        """The run at the root of a store; None if there is none.

        Args:
            damaged: also if `run.json` is damaged or gone, and its copy is not.

        Raises:
            StorageError: `run.json` is not what was written, or not one of smsbatch.
        """
        found = run_json.read(store)
        if found is None:
            return None
        if not damaged:
            run_json.require_undamaged(store, found.faults)
        return cls(store, found.about, found.faults)

    @classmethod
    def open(cls, where: str | Manifest | Store, damaged: bool = False) -> Run:
        """The run of a manifest, or at an output path or URL; `damaged` and errors as in `find`.

        Raises:
            RequestError: there is none.
        """
        store = where if isinstance(where, Store) else store_of(where)
        run = cls.find(store, damaged)
        if run is None:
            store.entries()  # raises a clearer error if the bucket does not exist
            raise RequestError(f"{store.url}: no run here (no {RUN}); `smsbatch run` starts one")
        return run

    # ----------------------------------------------------------------------------------------------------- run.json

    @property
    def name(self) -> str:
        return str(self.about["name"])

    @property
    def has_digests(self) -> bool:
        """True if `run.json` and all records end with their digests; False for runs of versions before 0.2."""
        return DIGEST in self.about

    @property
    def storage(self) -> Storage:
        """How the source is reached: by the settings that reach the output now, or else by those recorded."""
        given = self.store.storage
        plain = self.about["manifest"].get("storage", {})
        if given != Storage():
            return given
        return self.fill(self.manifest).storage if "${" in str(plain) else Storage.model_validate(plain)

    @property
    def colours(self) -> str:
        """How the run's pictures were decoded (`colours.COLOURS`); older versions did not convert."""
        return str(self.about.get("colours", "as stored"))

    @property
    def contents(self) -> Contents:
        """What the source held when it was planned; empty in runs of older versions."""
        return Contents(**self.about.get("contents", {}))

    @property
    def task(self) -> str:
        return str(self.about["manifest"].get("task", "optimize"))  # manifests of older versions name no task

    @property
    def makes(self) -> str:
        """The result of the run: "dataset" or "generator".

        Raises:
            RequestError: this version does not know the run's task.
        """
        if self.task not in TASKS:
            raise RequestError(f"{self.store.url}: this version has no task {self.task!r}; use {self._version}")
        return TASKS[self.task].makes

    @property
    def _version(self) -> str:
        return f"smsbatch {self.about.get('smsbatch', '?')}"

    @property
    def errors(self) -> Errors:
        """The failure budget that the run was planned with.

        Raises:
            RequestError: this version does not understand it.
        """
        try:
            return Errors.model_validate(self.about["manifest"].get("errors", {}))
        except ValueError as error:
            raise RequestError(f"{self.store.url}: its errors are not understood; use {self._version}") from error

    def require_dataset(self) -> None:
        """Raises RequestError if the run makes a generator."""
        if self.makes != "dataset":
            raise RequestError(
                f"{self.store.url}: this run distills a generator and makes no dataset; `smsbatch status` says how far "
                "it is, and a manifest of task stylize makes a dataset with its generator"
            )

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest that the run was planned with, translated to the keys of this version.

        A text of the environment is `${NAME}`, as it is recorded; `fill` has its value.

        Raises:
            RequestError: this version does not know one of its keys.
        """
        plain = dict(self.about["manifest"])
        for section in (_RENAMED.keys() | _BEFORE.keys()) & plain.keys():
            names = _RENAMED.get(section, {})
            known = {names.get(key, key): value for key, value in plain.get(section, {}).items()}
            plain[section] = _BEFORE.get(section, {}) | known
        try:
            return Manifest.model_validate(plain)
        except ValueError as error:
            raise RequestError(
                f"{RUN}: its manifest is not understood, it is of {self._version}; use that version"
            ) from error

    @property
    def dataset(self) -> Dataset:
        """`manifest` of a run that makes a dataset. Raises as `require_dataset` and `manifest`."""
        self.require_dataset()
        manifest = self.manifest
        assert isinstance(manifest, Dataset)
        return manifest

    def fill(self, manifest: M) -> M:
        """`manifest`, as it is recorded or likewise, with the values of the environment; one that has them is returned.

        Raises:
            RequestError: the environment has no value for a name, or an invalid one.
        """
        names = self.about.get("environment", {})
        if not names or manifest.environment:
            return manifest
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise RequestError(
                f"{self.store.url}: its manifest takes {', '.join(missing)} from the environment, which has none now; "
                f"set {'it' if len(missing) == 1 else 'them'} as for the run"
            )
        environment = {name: os.environ[name] for name in names}
        try:
            return type(manifest).filled(manifest, fill(manifest.model_dump(mode="json"), environment), environment)
        except ValueError as error:
            raise RequestError(
                f"{self.store.url}: its manifest is invalid with {', '.join(names)} as set now"
            ) from error

    @property
    def manifest_here(self) -> Manifest:
        """`manifest` with the present path of the output, which may have been moved."""
        output = self.manifest.output.model_copy(update={"path": self.store.url})
        return self.manifest.model_copy(update={"output": output})

    # --------------------------------------------------------------------------------------------------------- plan

    def renew(self) -> None:
        """Forget the plan and its list of files: another process may have written some since."""
        for name in ("plan_files", "units", "by_id", "shards"):
            self.__dict__.pop(name, None)

    @cached_property
    def plan_files(self) -> list[str]:
        """The files in `plan/`, from one listing."""
        return self.store.list("plan")

    @property
    def is_planned(self) -> bool:
        """True if the file of the plan that is written last exists."""
        return (UNITS if self.makes == "dataset" else SAMPLES) in self.plan_files

    @property
    def index_number(self) -> int:
        """How often the planned samples were located again in a changed source."""
        return newest_number(OBJECTS, self.plan_files)

    @property
    def index(self) -> StoredFile:
        """The newest index, which locates the bytes of each planned sample."""
        return StoredFile(self.store, numbered(SAMPLES, self.index_number))

    @property
    def objects(self) -> StoredFile:
        """The list of the source's objects from which the newest index was made."""
        return StoredFile(self.store, numbered(OBJECTS, self.index_number))

    @cached_property
    def units(self) -> list[Unit]:
        return read_units(self.store)

    @property
    def planned_units(self) -> list[Unit]:
        """The units by `run.json` alone, whatever size another driver has measured; none of a training."""
        if self.makes != "dataset":
            return []
        planned, output = self.about["planned"], self.about["manifest"]["output"]
        return list(cut(planned["samples"], planned["samples_per_unit"], output["samples_per_shard"]))

    @cached_property
    def by_id(self) -> dict[int, Unit]:
        """The units by id, in order."""
        return {unit.id: unit for unit in self.units}

    @cached_property
    def shards(self) -> dict[int, list[Unit]]:
        """The units of each shard, in order."""
        return {shard: list(units) for shard, units in groupby(self.units, lambda unit: unit.shard)}

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.store, metrics=self.about["manifest"].get("metrics", ()))

    def plan_is(self, units: Sequence[Unit]) -> None:
        """Take over the plan that this process has just written, so that it need not be read."""
        files = [OBJECTS, SAMPLES, DIGESTS] + ([UNITS] if self.makes == "dataset" else [])
        self.__dict__ |= {"plan_files": files, "units": list(units)}
        self.is_new = True


def find_or_require_empty(store: Store) -> Run | None:
    """The run at the root of a store; None if the store is empty, so that a run may begin.

    A run writes plain names, and would overwrite other files with these names, perhaps those of a source.

    Raises:
        RequestError: the store has files, but no run.
        StorageError: as `Run.find`.
    """
    names = store.entries()
    run = Run.find(store) if {RUN, "_smsbatch"} & set(names) else None  # the latter has a copy of run.json
    foreign = [] if run is not None else [name for name in names if name != "_smsbatch" and not _is_empty(store, name)]
    if foreign:
        raise RequestError(
            f"output.path: {store.url} is no run and not empty (it has {foreign[0]}); choose a new folder"
        )
    return run


def _is_empty(store: Store, name: str) -> bool:
    """True for a folder without any file, as may be left of a deleted run."""
    return not store.exists(name) and not store.list(name)


def of_output(output: str, options: Mapping[str, str]) -> Manifest:
    """The manifest of the run at a path or URL, with `options` as its section `storage`.

    Raises:
        RequestError: an option is unknown or invalid, or there is no run.
    """
    try:
        storage = Storage.model_validate(options)
    except ValueError as error:
        named = "; ".join(f"storage.{name}={value}" for name, value in options.items())
        raise RequestError(f"--set {named}: not understood; `smsbatch schema` has the keys of storage") from error
    return Run.open(Store(output, storage), damaged=True).manifest_here.model_copy(update={"storage": storage})
