"""Format a run that makes a dataset as lines: its status, and the result of every verb."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import time
from typing import TYPE_CHECKING, Any

from smsbatch.cli.display import bar
from smsbatch.text import count, duration, printable, size, table

if TYPE_CHECKING:
    from smsbatch.commands.doctor import Check
    from smsbatch.commands.gc import Collected
    from smsbatch.commands.repair import Repaired
    from smsbatch.commands.replay import Replayed
    from smsbatch.commands.verify import Verification
    from smsbatch.report.model import Report
    from smsbatch.runs.plan import Plan
    from smsbatch.runs.status import Status

_SHOWN = 20  # problems printed; there may be thousands


def status(now: Status, ages: bool = False) -> list[str]:
    """A status as a few lines; with `ages`, also the time since each worker's last heartbeat."""
    done = bar(now.samples_done, now.samples)
    lines = [f"{now.name}  {done}  {now.samples_done:,}/{now.samples:,} images  {now.units_done:,}/{now.units:,} units"]
    for worker in now.workers:
        age = f"  {duration(time() - worker.seen)} ago" if ages and worker.seen is not None else ""
        if worker.unit is None:
            lines.append(f"  {worker.worker}  {'waiting' if now.units_done else 'starting'}{age}")
        else:
            step = f"step {worker.step} of {worker.steps}" if worker.step else "between two batches"
            idle_fraction = (
                "" if worker.idle_fraction is None else f"  device waited {100 * worker.idle_fraction:.0f} %"
            )
            told = f"unit {worker.unit}  {worker.done}/{worker.samples} images  {step}{idle_fraction}{age}"
            lines.append(f"  {worker.worker}  {told}")
    lines += [
        f"  driver {driver.name} last reported {duration(driver.age_s)} ago: it no longer runs"
        for driver in now.drivers
        if not driver.alive
    ]
    if now.errors:
        lines.append(f"  {now.failed:,} failed: {_codes(now.errors)}")
    if now.samples_retried:
        lines.append(f"  {now.samples_retried:,} of them are being retried")
    ending = ", ".join(_ending(now))
    return [*lines, f"  {ending}"] if ending else lines


def status_line(now: Status) -> str:
    """A status as one line."""
    parts = [f"{now.samples_done:,}/{now.samples:,} images", f"{now.units_done:,}/{now.units:,} units"]
    if now.errors:
        parts.append(f"{now.failed:,} failed ({_codes(now.errors)})")
    if now.samples_retried:
        parts.append(f"{now.samples_retried:,} tried again")
    return f"{now.name}: {', '.join([*parts, *_ending(now)])}"


def _ending(now: Status) -> list[str]:
    if now.note or now.finished:
        return [now.note or "finished"]
    if now.rate and now.remaining_s is not None:
        return [f"{3600 * now.rate:,.0f} images/h", f"about {duration(now.remaining_s)} left"]
    return []


def _codes(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {code}" for code, number in sorted(errors.items()))


def summary(report: Report, worked: bool) -> Iterator[str]:
    """The results of a finished run, and their locations."""
    if not worked:
        yield "Nothing to do: every unit is committed already."
    images = f"{report.succeeded:,} stylized, {report.failed:,} failed, {report.planned:,} planned"
    rows = [("run", report.name), ("images", images)]
    rows += [("", f"{number:,} {code}") for code, number in sorted(report.errors.items())]
    rows += [
        (name, f"{values.mean:.3f} on average, {values.low:.3f} to {values.high:.3f}")
        for name, values in report.metrics.items()
    ]
    rows.append(("captions", str(report.contents)))
    each = report.seconds / max(report.planned, 1)
    rows += [("computing", f"{duration(report.seconds)} on {count(report.workers, 'worker')}, {each:.1f} s an image")]
    rows += [("note", notice) for notice in report.notices]
    rows += list(report.paths.items())
    yield from table(rows)


def plan(planned: Plan) -> Iterator[str]:
    """The work that a run would do, and its cost."""
    manifest = planned.manifest
    each = "in one pass each" if planned.steps is None else f"of {planned.steps} steps each"
    yield f"{planned} {each}, to {manifest.output.path}"
    rows = [("captions", str(planned.contents))]
    rows += [("reads", size(planned.bytes_in))] if planned.bytes_in else []
    if planned.bytes_out is not None:
        rows.append(("writes", f"about {size(planned.bytes_out)} of pictures"))
    if planned.seconds_per_image is not None and planned.gpu_hours is not None:
        rows.append(("takes", f"{planned.seconds_per_image:.3g} s an image, {_hours(planned)} in all"))
    if planned.cost is not None:
        rows.append(("costs", f"about {planned.cost:,.2f} at {planned.price_per_gpu_hour:,.2f} per GPU-hour"))
    elif planned.price_per_gpu_hour is not None:
        rows.append(("costs", "not known before a few images are tried: add --probe 8"))
    yield from table(rows)
    for notice in planned.notices:
        yield f"note: {notice}"


def _hours(planned: Plan) -> str:
    """The remaining computing time; less than an hour in minutes and seconds."""
    hours, on_gpu = planned.gpu_hours or 0.0, planned.estimate is not None and planned.estimate.device != "cpu"
    if hours >= 1:
        return f"about {hours:,.1f} {'GPU-hours' if on_gpu else 'hours of a worker without a GPU'}"
    return f"about {duration(3600 * hours)} on one {'GPU' if on_gpu else 'worker without a GPU'}"


def verification(found: Verification, where: str) -> Iterator[str]:
    """The number of checked files, the work not done yet, and the problems."""
    yield f"{found.name}: {found.units_done:,} of {count(found.units, 'unit')} done, " + (
        f"{found.shards_published:,} of {count(found.shards, 'shard')} published"
    )
    yield f"  {found.samples_done:,} of {count(found.samples, 'image')} have a row in a published shard; " + (
        f"{count(found.files, 'file')} with {size(found.bytes)}"
    )
    for line in found.pending:
        yield f"  not done yet: {line}"
    for name in found.edited:
        yield f"  {name} is not as it was written: edited, or damaged; to have it written again, delete it and repair"
    if found.without_attempts:
        yield f"  {count(found.without_attempts, 'unit')} without attempts: repair would have to compute them again"
    yield from _problems(found)
    full = " --full" if found.full else ""
    if found.problems:
        yield f"{count(len(found.problems), 'problem')}; repair with: smsbatch repair{full} {where}"
    elif found.full:
        yield "No problem: every stored byte is unchanged."
    else:
        yield "No problem by names, sizes and counts; --full reads every byte."


def _problems(found: Verification) -> Iterator[str]:
    yield from (f"  {problem}" for problem in found.problems[:_SHOWN])
    if len(found.problems) > _SHOWN:
        yield f"  and {len(found.problems) - _SHOWN:,} more; --json has all"


def repaired(result: Repaired, where: str) -> Iterator[str]:
    yield from _problems(result.before)
    if result.before.ok:
        yield "Nothing to repair" + ("." if result.before.full else " by names, sizes and counts; --full reads all.")
        return
    yield "Would do:" if result.after is None else "Done:"
    yield from (f"  {line}" for line in result.done)
    if result.after is not None:
        yield from (f"  still wrong: {problem}" for problem in result.after.problems[:_SHOWN])
        yield (
            "Repaired; every byte of the repaired files is verified."
            if result.ok
            else f"{count(len(result.after.problems), 'problem')} left; look at: smsbatch verify --full {where}"
        )


def collected(found: Collected, attempts: bool) -> Iterator[str]:
    verb = "would be removed" if found.dry_run else "removed"
    rows = [(heap.kind, f"{heap.objects:,}", size(heap.bytes)) for heap in found.heaps]
    yield from table([*rows, ("in all", f"{found.objects:,}", size(found.bytes))] if rows else [])
    yield f"{count(found.objects, 'object')} {verb}." if rows else "Nothing to remove."
    if attempts and any(heap.kind == "attempts of published shards" for heap in found.heaps):
        yield "Without its attempts a shard that gets damaged must be computed again, and --retry-failed refuses it."


def checks(found: Sequence[Check]) -> Iterator[str]:
    width = max(len(check.name) for check in found)
    for check in found:
        yield f"{check.state:4}  {check.name:{width}}  {check.found}"
        if check.do:
            yield f"{'':4}  {'':{width}}  -> {check.do}"


def failure(row: dict[str, Any]) -> str:
    """A failed sample as a line in the table of `errors`."""
    message = printable(row["error_message"] or "")
    return f"{printable(row['key']):24}  {row['error_code']:13}  {row['attempts']:>8}  {message}"


FAILURE_HEAD = f"{'key':24}  {'code':13}  {'attempts':>8}  message"


def failed(now: Status, shown: int) -> Iterator[str]:
    """The last line of `errors`: the number of failed samples in all."""
    done = "" if now.samples_done == now.samples else f" so far, of {now.samples_done:,} done"
    if not now.errors:
        yield f"No image of {now.samples:,} failed{done}."
    else:
        some = f"; {shown:,} shown" if shown != now.failed else ""
        yield f"{now.failed:,} of {count(now.samples, 'image')} failed{done}: {_codes(now.errors)}{some}"


def replayed(result: Replayed) -> Iterator[str]:
    yield from table(
        (name, f"{value:.4g}" if isinstance(value, float) else printable(str(value)))
        for name, value in result.row.items()
        if value is not None
    )
    if result.path is None:
        return
    yield f"{result.path} is written."
    if result.before is None:
        yield "Its unit is not done in the run yet: there is nothing to compare with."
    elif result.same is None:
        code = result.before["error_code"]
        yield f"In the run it failed: {code}" if code else "The run's own picture is gone; `smsbatch verify` says more."
    elif result.same:
        yield "The same bytes as in the run."
    elif result.largest is None or result.mean is None:
        yield "Another picture than in the run: one of the two has another size, or does not decode."
    else:
        yield f"Not the same bytes: pixels differ by {result.largest} of 255 at most, {result.mean:.3g} on average."
        yield from (f"  changed since: {change}" for change in result.changed)
        if not result.changed:
            yield "  Weights and versions are those of the run; another batch size or device rounds differently."
