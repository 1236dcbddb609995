"""Plan a run: index the samples of the source, and divide them into units unless the run is a training.

`plan` writes nothing. `establish` writes `run.json` and `plan/`, or, if they exist, checks that manifest and weights
are unchanged. The order makes a half-written plan harmless: `run.json` comes first and has the digest of the index, so
a driver that finds it alone can write its copy and the same plan again, and no other.
"""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from smsbatch.cluster.ray_pool import pool_of
from smsbatch.commands.source_index import indexed
from smsbatch.data.captions import Contents
from smsbatch.data.colours import COLOURS
from smsbatch.data.index import (
    OBJECTS,
    SAMPLES,
    UNITS,
    Part,
    StoredFile,
    encode_objects,
    encode_units,
    numbered,
    read_index,
)
from smsbatch.data.indexing import Built, move_index
from smsbatch.data.sources import require_apart
from smsbatch.engines.base import Weights
from smsbatch.engines.optimize import OptimizeEngine
from smsbatch.engines.table import ENGINES
from smsbatch.errors import DriftError, RequestError
from smsbatch.manifest import Manifest
from smsbatch.runs.checkpoints import latest
from smsbatch.runs.deleted import remove_remains
from smsbatch.runs.drift import check_allowed, check_unchanged, inputs_changed
from smsbatch.runs.layout import COPY, RUN, WRITTEN
from smsbatch.runs.plan import Estimate, Plan, TrainingPlan
from smsbatch.runs.plan_files import DIGESTS, cut, last_number, restore, write_moved, write_plan
from smsbatch.runs.records import dump_record, load_record
from smsbatch.runs.run import Run, find_or_require_empty, store_of
from smsbatch.storage.store import Store
from smsbatch.text import count, hidden
from smsbatch.workers.pool import Pool

# fmt: off
_RECORDED = (
    "smsbatch", "torch", "torchvision", "diffusers", "transformers", "pyarrow", "pillow", "lpips", "fsspec", "s3fs",
    "ray",
)
# fmt: on
_PROBED = 8  # samples that are measured to size units by time


def plan(
    manifest: Manifest,
    *,
    probe: int = 0,
    price_per_gpu_hour: float | None = None,
    allow_drift: Collection[str] = (),
) -> Plan | TrainingPlan:
    """The plan that this manifest would get, or that of the run at `output.path`; nothing is written.

    Args:
        probe: number of samples, spread over the source, that the pool stylizes to estimate time and bytes.
        price_per_gpu_hour: with a probe, for an estimate of the cost.
        allow_drift: as for `run`.

    Raises:
        SourceError: the source is missing, empty or has clashing keys.
        WeightsError: a model or LoRA is missing.
        DriftError: `output.path` has another run.
        SampleError: none of the probe's samples could be stylized.
        RequestError: a probe is requested for a training.
    """
    manifest.hide()
    check_allowed(manifest, allow_drift)
    planner, store = PLANNERS[manifest.makes], store_of(manifest)
    planner.check_probe(probe, price_per_gpu_hour)
    run = _found(manifest, store)
    if run is not None:
        check_unchanged(run, manifest, planner.digests(manifest), allow_drift, note=False)
    planned: Any
    with pool_of(manifest) as pool:
        if run is None or not run.is_planned:
            with _drafted(manifest, pool, probe) as draft:
                planned = draft.plan
        else:
            planned = planner.begun(manifest, run)
            if not planned.done:
                inputs_changed(run, manifest, allow_drift, note=False)
            if probe:
                planned = replace(planned, estimate=_estimate(pool, run.index, planned.samples, probe))
    if price_per_gpu_hour is not None:
        planned = replace(planned, price_per_gpu_hour=price_per_gpu_hour)
    found: Plan | TrainingPlan = planned
    return found


def establish(manifest: Manifest, pool: Pool, allow_drift: Collection[str] = ()) -> Run:
    """The planned run of a manifest: the one at `output.path`, or else a new one, which is written now.

    Raises:
        DriftError: manifest, weights or index differ from those of the run at `output.path`.
        SourceError, StorageError, WeightsError.
    """
    planner, store = PLANNERS[manifest.makes], store_of(manifest)
    weights, run = planner.digests(manifest), _found(manifest, store)
    if run is not None:
        check_unchanged(run, manifest, weights, allow_drift)
        if run.is_planned:
            return run
    per_unit = run.about["planned"].get("samples_per_unit") if run is not None else None
    with _drafted(manifest, pool, samples_per_unit=per_unit) as draft:
        if run is None:
            run = _begin(store, draft, weights)
        if run.about["index_sha256"] != draft.built.sha256:
            raise DriftError(f"{store.url}: the source is not the one this run began with; choose another output.path")
        if run.has_digests:
            run.store.create(COPY, dump_record(run.about))
        units = run.planned_units
        if write_plan(run.store, draft.parts, draft.index, units):
            run.plan_is(units)
        else:
            run.renew()
    return run


def _found(manifest: Manifest, store: Store) -> Run | None:
    """The run at the output, None if one may begin there."""
    run = find_or_require_empty(store)
    if run is None:
        require_apart(manifest.source, manifest.storage, store.url, WRITTEN)
    return run


def _begin(store: Store, draft: _Draft, weights: Mapping[str, str]) -> Run:
    """Create `run.json`; the run returned is that of another driver if it was faster."""
    if not store.supports_create():
        store.check_writable()
        store = store.without_create_only_put()
    about = _run_json(draft, weights, "workers" if store.has_create_only_put else "driver")
    if remains := remove_remains(store):
        about["notices"].append(f"removed {count(remains, 'file')} in _smsbatch, which a deleted run had left")
    data = dump_record(about)
    if store.create(RUN, data):
        return Run(store, load_record(data))
    run = Run.open(store)
    check_unchanged(run, draft.plan.manifest, weights)
    return run


def relocate(manifest: Manifest, run: Run, pool: Pool) -> None:
    """Locate the bytes of the planned samples again in a changed source; no samples are added or removed.

    Raises:
        SourceError: the source is missing, empty or has clashing keys.
    """
    with indexed(manifest, pool, [], chosen=False) as (listed, index, _, _):
        moved = index.with_name("moved.parquet")
        move_index(StoredFile(run.store, SAMPLES), index, moved)
        write_moved(run.store, moved, listed)
        run.renew()


def restore_plan(manifest: Manifest, run: Run, damaged: Collection[str]) -> None:
    """Write the damaged files of the plan again: units and digests from the run itself, the others from the source.

    Raises:
        DriftError: the source has changed, so that it does not give the planned index again.
    """
    for number in {0, last_number(run.plan_files)}:
        samples, objects, digests = (numbered(name, number) for name in (SAMPLES, OBJECTS, DIGESTS))
        names = {samples, objects, digests, *([] if number else [UNITS])} & set(damaged)
        contents: dict[str, bytes | Path] = {UNITS: encode_units(run.planned_units)} if UNITS in names else {}
        if not {samples, objects} & names:
            if names:
                restore(run.store, number, contents, run.planned_units)
            continue
        with pool_of(manifest) as pool, indexed(manifest, pool, [], chosen=not number) as (listed, index, built, _):
            if number:
                moved = index.with_name("moved.parquet")
                move_index(StoredFile(run.store, SAMPLES), index, moved)
                index = moved
            elif run.about["index_sha256"] != built.sha256:
                told = f"{run.store.locate(min({samples, objects} & names))} cannot be written again"
                raise DriftError(
                    f"{told}: the source has changed since the plan; restore it or this file from a backup"
                )
            made: dict[str, bytes | Path] = {objects: encode_objects(listed), samples: index}
            contents |= {name: content for name, content in made.items() if name in names}
            restore(run.store, number, contents, run.planned_units)


# ------------------------------------------------------------------------------------------------------ by the result


class DatasetPlanner:
    """Plans units of samples for the engine of the task."""

    def check_probe(self, probe: int, price_per_gpu_hour: float | None) -> None:
        """Accepts every probe."""

    def check_weights(self, manifest: Any) -> Weights:
        return ENGINES[manifest.task].check_weights(manifest)

    def digests(self, manifest: Any) -> dict[str, str]:
        return ENGINES[manifest.task].digests(manifest)

    def draft(
        self,
        manifest: Any,
        pool: Pool,
        index: Path,
        built: Built,
        contents: Contents,
        notices: Sequence[str],
        probe: int,
        per_unit: int | None,
    ) -> Plan:
        """The plan of a new run, or of one whose `run.json` fixes `per_unit` samples per unit."""
        output = manifest.output
        by_time = output.seconds_per_unit if per_unit is None else None
        estimate = _estimate(pool, index, built.samples, max(probe, _PROBED if by_time else 0))
        if per_unit is None:
            per_unit = output.samples_per_unit
            if by_time and estimate:
                per_unit = max(1, round(by_time / estimate.seconds_per_image))
        units = tuple(cut(built.samples, per_unit, output.samples_per_shard))
        steps = ENGINES[manifest.task].steps_per_image(manifest)
        return Plan(
            manifest,
            built.samples,
            units,
            tuple(notices),
            built.bytes,
            contents,
            samples_per_unit=per_unit,
            steps=steps,
            estimate=estimate,
        )

    def begun(self, manifest: Any, run: Run) -> Plan:
        """The plan of an existing run, with its progress."""
        planned, done = run.about["planned"], run.ledger.done() & run.by_id.keys()
        far = f"{run.store.url} has this run already: {len(done)} of {len(run.units)} units are done"
        return Plan(
            manifest,
            planned["samples"],
            tuple(run.units),
            (*run.about["notices"], far),
            planned["bytes"],
            run.contents,
            samples_done=sum(len(run.by_id[unit]) for unit in done),
            steps=ENGINES[manifest.task].steps_per_image(manifest),
        )

    def planned_section(self, planned: Any) -> dict[str, Any]:
        """The section `planned` of `run.json`."""
        return {
            "samples": planned.samples,
            "units": len(planned.units),
            "shards": planned.shards,
            "bytes": planned.bytes_in,
            "samples_per_unit": planned.samples_per_unit,
            "seconds_per_image": planned.seconds_per_image,
        }

    def generator(self, manifest: Any) -> dict[str, Any] | None:
        return ENGINES[manifest.task].about(manifest)


class TrainingPlanner:
    """Plans the samples of a training, which has no units."""

    def check_probe(self, probe: int, price_per_gpu_hour: float | None) -> None:
        """Raises RequestError if a probe is requested: it would not measure the rate of a training."""
        if probe or price_per_gpu_hour is not None:
            raise RequestError(
                "--probe and --price-per-gpu-hour: they do not apply to a distill run; to measure its rate, start it "
                "with few steps (--set distill.steps=100 and another output.path)"
            )

    def check_weights(self, manifest: Any) -> Weights:
        return OptimizeEngine.check_weights(manifest)

    def digests(self, manifest: Any) -> dict[str, str]:
        return OptimizeEngine.digests(manifest)

    def draft(
        self,
        manifest: Any,
        pool: Pool,
        index: Path,
        built: Built,
        contents: Contents,
        notices: Sequence[str],
        probe: int,
        per_unit: int | None,
    ) -> TrainingPlan:
        return TrainingPlan(manifest, built.samples, tuple(notices), built.bytes, contents)

    def begun(self, manifest: Any, run: Run) -> TrainingPlan:
        """The plan of an existing run, with its progress."""
        planned, checkpoint, steps = run.about["planned"], latest(run.store), manifest.distill.all_steps
        done = checkpoint.step if checkpoint else 0
        far = f"{run.store.url} has this run already: it continues from step {done:,} of {steps:,}"
        notices = (*run.about["notices"], far)
        return TrainingPlan(manifest, planned["samples"], notices, planned["bytes"], run.contents, done)

    def planned_section(self, planned: Any) -> dict[str, Any]:
        return {"samples": planned.samples, "units": 0, "shards": 0, "bytes": planned.bytes_in}

    def generator(self, manifest: Any) -> None:
        return None


PLANNERS: dict[str, DatasetPlanner | TrainingPlanner] = {"dataset": DatasetPlanner(), "generator": TrainingPlanner()}
"""By the result of a task."""


# ------------------------------------------------------------------------------------------------------------ drafts


@dataclass(frozen=True)
class _Draft:
    """A plan that is not stored, and its index in a temporary file."""

    plan: Plan | TrainingPlan
    parts: Sequence[Part]
    index: Path
    built: Built


@contextmanager
def _drafted(manifest: Manifest, pool: Pool, probe: int = 0, samples_per_unit: int | None = None) -> Iterator[_Draft]:
    planner = PLANNERS[manifest.makes]
    notices = planner.check_weights(manifest).notices
    with indexed(manifest, pool, notices, chosen=True) as (listed, index, built, contents):
        planned = planner.draft(manifest, pool, index, built, contents, notices, probe, samples_per_unit)
        yield _Draft(planned, listed, index, built)


def _estimate(pool: Pool, index: StoredFile | Path, samples: int, wanted: int) -> Estimate | None:
    """Measure samples spread evenly over the source, so that one unusual part of it does not dominate."""
    rows = sorted({samples * number // wanted for number in range(wanted)})
    return pool.estimate_cost([entry for row in rows for entry in read_index(index, row, row + 1)]) if rows else None


def _run_json(draft: _Draft, weights: Mapping[str, str], commits: str) -> dict[str, Any]:
    plan, manifest, planner = draft.plan, draft.plan.manifest, PLANNERS[draft.plan.manifest.makes]
    generator = planner.generator(manifest)
    return {
        "smsbatch": version("smsbatch"),
        "name": manifest.name,
        "manifest": manifest.dump(),
        "manifest_sha256": manifest.identity,
        "environment": manifest.environment,
        "weights": {hidden(name): digest for name, digest in weights.items()},
        **({} if generator is None else {"generator": generator}),
        "index_sha256": draft.built.sha256,
        "colours": COLOURS,
        "planned": planner.planned_section(plan),
        "contents": asdict(plan.contents),
        "commits": commits,  # by workers, or only by the driver if the store has no create-only put
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
