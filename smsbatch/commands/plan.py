"""Plan a run: index the samples of the source, and divide them into units unless the run is a training.

`plan` writes nothing. `establish` writes `run.json` and `plan/`, or, if they exist, checks that manifest and weights
are unchanged. The order makes a half-written plan harmless: `run.json` comes first and has the digest of the index, so
a driver that finds it alone can write the same plan again, and no other.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any

from smsbatch.cluster.ray_pool import pool_of
from smsbatch.data.captions import Contents
from smsbatch.data.colours import COLOURS
from smsbatch.data.index import (
    SAMPLES,
    Part,
    StoredFile,
    read_index,
    write_index,
    write_moved,
    write_objects,
    write_units,
)
from smsbatch.data.indexing import Built, build_index, move_index
from smsbatch.data.sample import Unit
from smsbatch.data.sources import Scan, gathered, nothing_found, parts, require_apart, scan
from smsbatch.engines.base import Weights
from smsbatch.engines.optimize import OptimizeEngine
from smsbatch.engines.table import ENGINES
from smsbatch.errors import DriftError, RequestError
from smsbatch.manifest import Manifest
from smsbatch.runs.checkpoints import latest
from smsbatch.runs.drift import check_allowed, check_unchanged, inputs_changed
from smsbatch.runs.layout import RUN, WRITTEN
from smsbatch.runs.plan import Estimate, Plan, TrainingPlan
from smsbatch.runs.run import Run, find_or_require_empty, store_of
from smsbatch.storage.store import Store
from smsbatch.text import hidden
from smsbatch.workers.pool import Pool

# fmt: off
_RECORDED = (
    "smsbatch", "torch", "torchvision", "diffusers", "transformers", "pyarrow", "pillow", "lpips", "fsspec", "s3fs",
    "ray",
)
# fmt: on
_PROBED = 8  # samples that are measured to size units by time


def cut(samples: int, samples_per_unit: int, samples_per_shard: int) -> Iterator[Unit]:
    """Divide rows [0, samples) into consecutive units, none of which crosses the boundary of a shard."""
    number = count()
    for shard, first in enumerate(range(0, samples, samples_per_shard)):
        end = min(first + samples_per_shard, samples)
        for start in range(first, end, samples_per_unit):
            yield Unit(next(number), shard, start, min(start + samples_per_unit, end))


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
        written = [write_objects(run.store, draft.parts), write_index(run.store, draft.index)]
        units = planner.units(manifest, run)
        if units:
            written.append(write_units(run.store, units))
        if all(written):
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
    if store.create(RUN, json.dumps(about, indent=2).encode()):
        return Run(store, about)
    run = Run.open(store)
    check_unchanged(run, draft.plan.manifest, weights)
    return run


def relocate(manifest: Manifest, run: Run, pool: Pool) -> None:
    """Locate the bytes of the planned samples again in a changed source; no samples are added or removed.

    Raises:
        SourceError: the source is missing, empty or has clashing keys.
    """
    with _indexed(manifest, pool, [], chosen=False) as (listed, index, _, _):
        moved = index.with_name("moved.parquet")
        move_index(StoredFile(run.store, SAMPLES), index, moved)
        run.renew()  # the scan takes long, and another driver may have located the samples, too
        write_moved(run.store, run.index_number + 1, moved, listed)
        run.renew()


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

    def units(self, manifest: Any, run: Run) -> list[Unit]:
        """The units by `run.json`: a faster driver may have measured another unit size."""
        planned = run.about["planned"]
        return list(cut(planned["samples"], planned["samples_per_unit"], manifest.output.samples_per_shard))

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

    def units(self, manifest: Any, run: Run) -> list[Unit]:
        return []

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
    with _indexed(manifest, pool, notices, chosen=True) as (listed, index, built, contents):
        planned = planner.draft(manifest, pool, index, built, contents, notices, probe, samples_per_unit)
        yield _Draft(planned, listed, index, built)


@contextmanager
def _indexed(
    manifest: Manifest, pool: Pool, notices: list[str], chosen: bool
) -> Iterator[tuple[Sequence[Part], Path, Built, Contents]]:
    """The source's objects, their index in a temporary file, and what they hold; `notices` gets what is odd or skipped.

    Args:
        chosen: index only the samples that `skip` and `limit` choose. Otherwise all, for a changed source, where one
            sample fewer would shift the choice.
    """
    source, storage = manifest.source, manifest.storage
    limit, skip = (source.limit, source.skip) if chosen else (None, 0)
    listed = parts(source, storage)
    with tempfile.TemporaryDirectory(prefix="smsbatch-plan-") as folder:
        index = Path(folder, "samples.parquet")
        told = Scan()
        names = [part.url for part in listed] if source.format == "table" else []
        task = partial(scan, source=source, storage=storage, seed=manifest.seed)
        with closing(pool.map(task, listed)) as scanned:
            built = build_index(index, gathered(scanned, told), limit, skip, names)
        notices += told.notices
        contents = Contents(built.samples, built.captions, dict(told.left), dict(told.passed))
        if built.samples == 0:
            raise nothing_found(source, notices, contents)
        if "caption" in source.model_fields_set and source.format != "table":
            unused = (rule for rule in source.caption if rule not in built.captions)
            notices += [f"source.caption: {rule} gives no sample its caption" for rule in unused]
        yield listed, index, built, contents


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
        "notices": list(map(hidden, plan.notices)),
        "versions": {"python": platform.python_version()} | _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _RECORDED:
        with suppress(PackageNotFoundError):  # ray is optional
            found[name] = version(name)
    return found
