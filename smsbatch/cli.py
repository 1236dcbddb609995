"""The command line: parse, call, print. Everything it can do, `import smsbatch` can do too.

Exit codes: 0 done; 1 finished with too many failures, or a unit lost; 2 the request was wrong; 3 storage;
130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smsbatch.errors import SmsbatchError

if TYPE_CHECKING:
    from smsbatch.execution.drive import Status
    from smsbatch.execution.report import Report

app = typer.Typer(
    help="Stylize image datasets with Style Matching Score.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ManifestFile = Annotated[Path, typer.Argument(help="The manifest, a YAML file.", metavar="MANIFEST")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a key, the value in YAML: output.path=out/x. Again for more; quote braces.",
        metavar="KEY=VALUE",
    ),
]
Limit = Annotated[
    int | None, typer.Option(help="Take only the first N samples: --set source.limit=N.", min=1, metavar="N")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

_INTERVAL_S = 10.0  # between two JSON lines where nobody watches


@app.command()
def run(manifest: ManifestFile, set_: Override = None, limit: Limit = None, as_json: AsJson = False) -> None:
    """Plan if there is no plan, then work. Running it again goes on where it stopped."""
    import smsbatch as sb

    with _failures(as_json):
        loaded = sb.load(manifest, _overrides(set_, limit))
        shown = _JsonLines(err=as_json) if as_json or not sys.stdout.isatty() else _Live()
        with shown:
            report = sb.run(loaded, shown.update)
        if as_json:
            _print_json(report.to_dict())
        else:
            _summary(report, shown.worked)


@app.command()
def plan(manifest: ManifestFile, set_: Override = None, limit: Limit = None, as_json: AsJson = False) -> None:
    """Say what `run` would do. Writes nothing."""
    import smsbatch as sb

    with _failures(as_json):
        planned = sb.plan(sb.load(manifest, _overrides(set_, limit)))
        if as_json:
            _print_json(planned.to_dict())
            return
        typer.echo(f"{planned} of {planned.manifest.objective.steps} steps each, to {planned.manifest.output.path}")
        for notice in planned.notices:
            typer.echo(f"note: {notice}")
        options = [part for override in set_ or () for part in ("--set", override)]
        options += [] if limit is None else ["--limit", str(limit)]
        typer.echo(f"Start it with: smsbatch run {shlex.join([str(manifest), *options])}")


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="A manifest, or the output path of a run.", metavar="MANIFEST|OUTPUT")],
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Say how far a run is, from its storage alone."""
    import smsbatch as sb

    with _failures(as_json):
        is_manifest = output.endswith((".yaml", ".yml"))
        found = sb.status(sb.load(output, set_ or ()).output.path if is_manifest else output)
        if as_json:
            _print_json(found.to_dict())
        else:
            typer.echo("\n".join(_lines(found)))
            if not found.finished and not found.workers:
                typer.echo("  nobody is at work on it; `smsbatch run` goes on")


@app.command()
def schema(as_json: AsJson = True) -> None:
    """Print the manifest's JSON Schema, with every key, default and explanation."""
    from smsbatch.manifest import Manifest

    del as_json  # it is JSON either way; the option is there because every verb has it
    _print_json(Manifest.model_json_schema())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.", metavar="MANIFEST")] = Path("manifest.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented manifest to start from. It runs as it is, on the embedded model."""
    from importlib.resources import files

    with _failures():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(files("smsbatch").joinpath("template.yaml").read_text(encoding="utf-8"))
        except FileExistsError:
            _fail(f"{path} exists; choose another name", 2)
        except OSError as error:
            _fail(f"{path}: cannot write it: {error.strerror}", 3)
    if as_json:
        _print_json({"written": str(path)})
    else:
        typer.echo(f"{path} is written. Edit it, then: smsbatch run {path}")


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"smsbatch {installed('smsbatch')}")
        raise typer.Exit


def _overrides(set_: list[str] | None, limit: int | None) -> list[str]:
    return [*(set_ or ()), *([] if limit is None else [f"source.limit={limit}"])]


@contextmanager
def _failures(as_json: bool = False) -> Iterator[None]:
    """Errors on purpose become one line and an exit code; any other is a bug and keeps its traceback."""
    try:
        yield
    except SmsbatchError as error:
        if as_json:
            _print_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; all commits are kept, the same command goes on from here", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"smsbatch: {message}", err=True)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


class _Display:
    """What `run` shows while it works."""

    worked = False

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, status: Status) -> None:
        self.worked |= not status.finished and status.units_done < status.units


class _JsonLines(_Display):
    """One JSON line an interval, and one at the end; beside the output (`err`) when that is to be one JSON value."""

    def __init__(self, err: bool) -> None:
        self._err, self._next = err, 0.0

    def update(self, status: Status) -> None:
        super().update(status)
        if status.finished or monotonic() >= self._next:
            typer.echo(json.dumps(status.to_dict()), err=self._err)
            self._next = monotonic() + _INTERVAL_S


class _Live(_Display):
    """A few lines that renew themselves."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text  # plain: what looks like markup in a name is none
        self._live = Live(console=Console(), refresh_per_second=4, transient=True)

    def __enter__(self) -> _Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, status: Status) -> None:
        super().update(status)
        self._live.update(self._text("\n".join(_lines(status))))


def _lines(status: Status) -> list[str]:
    """A status as text."""
    share = status.samples_done / status.samples if status.samples else 0.0
    bar = "█" * round(30 * share) + "░" * (30 - round(30 * share))
    lines = [
        f"{status.name}  {bar}  {status.samples_done:,}/{status.samples:,} images  "
        f"{status.units_done:,}/{status.units:,} units"
    ]
    for worker in status.workers:
        if worker.unit is None:
            lines.append(f"  {worker.worker}  waiting" if status.units_done else f"  {worker.worker}  starting")
        else:
            step = f"step {worker.step} of {worker.steps}" if worker.step else "between two batches"
            lines.append(f"  {worker.worker}  unit {worker.unit}  {worker.done}/{worker.samples} images  {step}")
    if status.errors:
        codes = ", ".join(f"{count} {code}" for code, count in sorted(status.errors.items()))
        lines.append(f"  {status.failed} failed: {codes}")
    if status.finished:
        lines.append("  finished")
    elif status.rate and status.remaining_s is not None:
        lines.append(f"  {3600 * status.rate:,.0f} images/h, about {_duration(status.remaining_s)} left")
    return lines


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _summary(report: Report, worked: bool) -> None:
    """What there is now, and where. Whole lines: a path that is cut is of no use."""
    images = f"{report.succeeded:,} stylized, {report.failed:,} failed, {report.planned:,} planned"
    rows = [("run", report.name), ("images", images)]
    rows += [("", f"{count:,} {code}") for code, count in sorted(report.errors.items())]
    rows += [
        (name, f"{values.mean:.3f} on average, {values.low:.3f} to {values.high:.3f}")
        for name, values in report.metrics.items()
    ]
    each = report.seconds / max(report.planned, 1)
    rows += [("computing", f"{_duration(report.seconds)} on {_count(report.workers, 'worker')}, {each:.1f} s an image")]
    rows += [("note", notice) for notice in report.notices]
    rows += list(report.paths.items())
    if not worked:
        typer.echo("Nothing to do: every unit is committed already.")
    typer.echo("\n".join(f"{name:10} {value}" for name, value in rows))
