"""Format a run that trains a generator as lines: its status, plan and result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from smsbatch.cli.display import bar
from smsbatch.text import count, duration, size, table

if TYPE_CHECKING:
    from smsbatch.commands.export import Exported
    from smsbatch.commands.status import TrainingStatus
    from smsbatch.runs.plan import TrainingPlan
    from smsbatch.training.result import Distilled


def status(now: TrainingStatus, ages: bool = False) -> list[str]:
    """A status as a few lines; with `ages`, also the time since its last step."""
    lines = [f"{now.name}  {bar(now.step, now.steps)}  step {now.step:,} of {now.steps:,}"]
    if now.losses:
        lines.append(f"  {_losses(now.losses)}")
    if now.failed:
        lines.append(f"  {now.failed:,} times a sample failed, and another took its place")
    if ages and now.checkpoint is not None and now.checkpoint_age_s is not None:
        lines.append(f"  checkpoint of step {now.checkpoint:,}, {duration(now.checkpoint_age_s)} ago")
    if now.note or now.finished:
        lines.append(f"  {now.note or 'finished'}")
    else:
        heard = f"; last step {duration(now.age_s)} ago" if ages and now.age_s is not None else ""
        lines.append(f"  {', '.join([now.phase, *_rates(now)])}{heard}")
    return lines


def status_line(now: TrainingStatus) -> str:
    """A status as one line."""
    parts = [f"step {now.step:,}/{now.steps:,}"]
    if now.losses:
        parts.append(_losses(now.losses))
    if now.failed:
        parts.append(f"{now.failed:,} times a sample failed")
    parts += [now.note or "finished"] if now.note or now.finished else [now.phase, *_rates(now)]
    return f"{now.name}: {', '.join(parts)}"


def summary(done: Distilled, worked: bool) -> Iterator[str]:
    """The generator, its location, and the next step."""
    if done.resumed_from is None:  # else it trained, possibly for no step
        yield "Nothing to do: the generator is there already."
    rows = [
        ("run", done.name),
        ("generator", f"{done.parameters:,} parameters"),
        ("training", f"{count(done.steps, 'step')}, {done.images:,} pictures of {count(done.samples, 'image')}"),
        ("computing", f"{duration(done.seconds)}, {done.images_per_second:.3g} pictures a second"),
    ]
    if done.losses:
        rows.append(("losses", _losses(done.losses)))
    if done.failed:
        rows.append(("failed", f"{done.failed:,} times a sample, and another took its place"))
    rows += [("note", notice) for notice in done.notices]
    rows += [("files", f"{done.generator}/generator"), ("pictures", f"{done.generator}/grids")]
    yield from table(rows)
    yield f"Next: put `generator: {done.generator}` into a manifest of `task: stylize`, and run that."


def plan(planned: TrainingPlan) -> Iterator[str]:
    """The work that a training would do."""
    training, workers = planned.manifest.distill, planned.workers
    yield f"{planned}, to {planned.manifest.output.path}"
    rows = [("generator", f"{planned.parameters:,} parameters: width {training.width}, {training.blocks} blocks")]
    rows.append(("sees", f"every image {planned.epochs:,.3g} times, with {count(training.repeats, 'noise')} each time"))
    rows.append(("workers", "as many as the cluster has GPUs" if workers == "auto" else str(workers)))
    rows.append(("captions", str(planned.contents)))
    if planned.bytes_in:
        rows.append(("reads", f"{size(planned.bytes_in)} for each pass"))
    yield from table(rows)
    for notice in planned.notices:
        yield f"note: {notice}"


def exported(written: Exported) -> Iterator[str]:
    yield f"{written.path} is written: {written.parameters:,} parameters, {size(written.bytes)}."
    if written.largest is None:
        yield "It was not tested: onnxruntime is not installed (pip install onnxruntime)."
    else:
        yield f"onnxruntime and torch agree within {written.largest:.2g}."


def _rates(now: TrainingStatus) -> list[str]:
    if not now.steps_per_second or now.images_per_second is None or now.remaining_s is None:
        return []
    return [
        f"{now.steps_per_second:.3g} steps/s",
        f"{now.images_per_second:.3g} pictures/s",
        f"about {duration(now.remaining_s)} left",
    ]


def _losses(losses: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{name} {'not finite' if value is None else format(value, '.4g')}" for name, value in losses.items()
    )
