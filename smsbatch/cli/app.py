"""The verbs of the command line: each parses its options, calls a function of `smsbatch` and prints the result.

Exit codes: 0 done; 1 too many failures, a lost unit, a training that diverged, or a problem found; 2 the request was
wrong; 3 storage; 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from traceback import extract_tb
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from smsbatch.cli.common import echo, echo_json, fail, located, overrides, printing, reporting, same_again, say, show
from smsbatch.errors import RequestError
from smsbatch.text import count


class _Group(TyperGroup):
    """The commands; a help text that cannot be printed ends with a line, too."""

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if not any(frame.name == "echo" for frame in extract_tb(error.__traceback__)):
                raise
            try:
                with reporting(), printing():
                    raise
            except typer.Exit as ended:
                sys.exit(ended.exit_code)


app = typer.Typer(
    cls=_Group,
    help="Stylize image datasets with Style Matching Score.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ManifestFile = Annotated[Path, typer.Argument(help="The manifest, a YAML file.", metavar="MANIFEST")]
Where = Annotated[
    str, typer.Argument(help="A manifest, or the output path or URL of a run.", metavar="MANIFEST|OUTPUT")
]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a key; the value is YAML: output.path=out/x. Repeatable; quote braces.",
        metavar="KEY=VALUE",
    ),
]
Limit = Annotated[
    int | None, typer.Option(help="Take only the first N samples; short for --set source.limit=N.", min=1, metavar="N")
]
AllowDrift = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-drift",
        help="Accept a changed key of the manifest, `environment`, `weights` or `inputs`; the change is recorded. "
        "Repeatable.",
        metavar="KEY",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")]
Full = Annotated[bool, typer.Option("--full", help="Read every byte: digests, archives, rows, pictures.")]


@app.command()
def run(
    manifest: ManifestFile,
    set_: Override = None,
    limit: Limit = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also retry failed samples, and publish a new generation.")
    ] = False,
    code: Annotated[
        list[str] | None,
        typer.Option("--code", help="With --retry-failed: only this error code. Repeatable.", metavar="CODE"),
    ] = None,
    allow_drift: AllowDrift = None,
    as_json: AsJson = False,
) -> None:
    """Run a manifest: plan it if there is no plan yet, then compute. The same command resumes an interrupted run."""
    import smsbatch as sb
    from smsbatch.cli.lines import PROGRESS, lines_of, progress_display

    # Preempted machines and cancelled jobs get SIGTERM: stop cleanly, as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with reporting(as_json, "what is done is kept, the same command goes on from here"):
        if code and not retry_failed:
            raise RequestError("--code selects what to retry, so it needs --retry-failed")
        loaded = sb.load(manifest, overrides(set_, limit))
        with progress_display(as_json) as shown:

            def update(now: sb.Status | sb.TrainingProgress) -> None:
                shown.update(PROGRESS[loaded.makes](loaded.name, now))

            done = sb.run(loaded, update, retry_failed=retry_failed, codes=code or (), allow_drift=allow_drift or ())
        show(as_json, done.to_dict, lines_of(done).summary(done, shown.worked))


@app.command()
def plan(
    manifest: ManifestFile,
    set_: Override = None,
    limit: Limit = None,
    probe: Annotated[
        int, typer.Option(help="Stylize N samples to estimate time and bytes; keeps nothing.", min=0, metavar="N")
    ] = 0,
    price_per_gpu_hour: Annotated[
        float | None, typer.Option(help="With --probe: estimate the cost at this price.", min=0, metavar="PRICE")
    ] = None,
    allow_drift: AllowDrift = None,
    as_json: AsJson = False,
) -> None:
    """Print what `run` would do, and what it would cost. Writes nothing."""
    import smsbatch as sb
    from smsbatch.cli.lines import lines_of

    with reporting(as_json):
        planned = sb.plan(
            sb.load(manifest, overrides(set_, limit)),
            probe=probe,
            price_per_gpu_hour=price_per_gpu_hour,
            allow_drift=allow_drift or (),
        )
        options = [part for override in set_ or () for part in ("--set", override)]
        options += [] if limit is None else ["--limit", str(limit)]
        options += [part for key in allow_drift or () for part in ("--allow-drift", key)]
        start = f"Start it with: smsbatch run {shlex.join([str(manifest), *options])}"
        show(as_json, planned.to_dict, [*lines_of(planned).plan(planned), start])


@app.command()
def status(
    where: Where,
    set_: Override = None,
    watch: Annotated[bool, typer.Option("--watch", help="Update the display until the run is finished.")] = False,
    interval: Annotated[float, typer.Option(help="With --watch: time per update.", min=0.1, metavar="SECONDS")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Print the progress of a run, read from its storage alone."""
    import smsbatch as sb
    from smsbatch.cli import lines
    from smsbatch.runs.snapshot import Snapshot

    with reporting(as_json):
        snapshot = Snapshot(located(where, set_))
        now = sb.status(snapshot)
        if watch:
            try:
                with lines.watch_display(as_json) as shown:
                    shown.update(now)
                    while not now.finished:
                        time.sleep(interval)
                        snapshot.renew()
                        now = sb.status(snapshot)
                        shown.update(now)
            except KeyboardInterrupt:
                raise typer.Exit from None  # Ctrl-C is the normal end of --watch
            return
        show(as_json, now.to_dict, lines.status(now, ages=True))


@app.command()
def errors(
    where: Where,
    set_: Override = None,
    code: Annotated[str | None, typer.Option(help="Print only samples with this error code.", metavar="CODE")] = None,
    limit: Annotated[int | None, typer.Option(help="Print at most N samples.", min=1, metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """List the failed samples, and count them by error code. With --json, one line per sample."""
    import smsbatch as sb
    from smsbatch.cli import dataset
    from smsbatch.runs.snapshot import Snapshot

    with reporting(as_json):
        snapshot = Snapshot(located(where, set_))
        shown = 0
        for row in sb.failures(snapshot, code, limit):
            if as_json:
                say(json.dumps(row, ensure_ascii=False))
            else:
                if not shown:
                    say(dataset.FAILURE_HEAD)
                say(dataset.failure(row))
            shown += 1
        if not as_json:
            now = sb.status(snapshot)
            assert isinstance(now, sb.Status), "failures() refuses a training"
            echo(dataset.failed(now, shown))


@app.command()
def verify(where: Where, set_: Override = None, full: Full = False, as_json: AsJson = False) -> None:
    """Check that the files of a run are complete and unchanged.

    Compares names, sizes and counts; with --full every byte. Changes nothing.
    """
    import smsbatch as sb
    from smsbatch.cli import dataset, lines

    with reporting(as_json):
        with lines.shard_display(as_json) as shown:

            def progress(done: int, shards: int) -> None:
                shown.show([f"{done:,} of {count(shards, 'shard')} checked"])

            found = sb.verify(located(where, set_), full, progress)
        show(as_json, found.to_dict, dataset.verification(found, same_again(where, set_)))
        raise typer.Exit(0 if found.ok else 1)


@app.command()
def repair(
    where: Where,
    set_: Override = None,
    full: Full = False,
    dry_run: DryRun = False,
    allow_drift: AllowDrift = None,
    as_json: AsJson = False,
) -> None:
    """Repair the problems that `verify` finds.

    Publishes a shard again from the attempts of its units; units whose attempts are gone are computed again.
    """
    import smsbatch as sb
    from smsbatch.cli import dataset, lines

    with reporting(as_json, "the same command goes on from here"):
        with lines.progress_display(as_json) as shown:
            result = sb.repair(
                located(where, set_), shown.update, full=full, dry_run=dry_run, allow_drift=allow_drift or ()
            )
        show(as_json, result.to_dict, dataset.repaired(result, same_again(where, set_)))
        raise typer.Exit(0 if result.ok or dry_run else 1)


@app.command()
def replay(
    where: Where,
    key: Annotated[str, typer.Argument(help="The sample's key.", metavar="KEY")],
    set_: Override = None,
    to: Annotated[
        Path | None, typer.Option(help="Where to write it. Default: ./KEY.FORMAT.", metavar="FILE|FOLDER")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stylize one image of a run again, to a file. Compares it with the result in the run."""
    import smsbatch as sb
    from smsbatch.cli import dataset

    with reporting(as_json):
        result = sb.replay(located(where, set_), key, to)
        show(as_json, result.to_dict, dataset.replayed(result))
        if not result.succeeded:
            fail(f"{key}: {result.row['error_code']}: {result.row['error_message']}", 1)


@app.command()
def gc(
    where: Where,
    set_: Override = None,
    dry_run: DryRun = False,
    attempts: Annotated[
        bool,
        typer.Option("--attempts", help="Also attempts of published shards: half of the storage; repair needs them."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove even if a driver seems to be at work.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove objects that are no longer needed. Lost attempts, old generations, leftovers of killed processes."""
    import smsbatch as sb
    from smsbatch.cli import dataset

    with reporting(as_json):
        found = sb.gc(located(where, set_), dry_run=dry_run, attempts=attempts, force=force)
        show(as_json, found.to_dict, dataset.collected(found, attempts))


@app.command()
def export(
    generator: Annotated[
        str, typer.Argument(help="The output of a distill run, or a generator's folder or URL.", metavar="GENERATOR")
    ],
    to: Annotated[Path, typer.Option(help="Where to write it.", metavar="FILE|FOLDER")] = Path("generator.onnx"),
    as_json: AsJson = False,
) -> None:
    """Write a generator as an ONNX file. It runs without this package."""
    import smsbatch as sb
    from smsbatch.cli import training

    with reporting(as_json):
        written = sb.export(generator, to)
        show(as_json, written.to_dict, training.exported(written))


@app.command()
def doctor(
    where: Annotated[
        str | None, typer.Argument(help="A manifest, or the output path or URL of a run.", metavar="[MANIFEST|OUTPUT]")
    ] = None,
    set_: Override = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, the storage, the source and the weights."""
    import smsbatch as sb
    from smsbatch.cli import dataset

    with reporting(as_json):
        found = sb.doctor(None if where is None else located(where, set_))
        show(as_json, lambda: [check.to_dict() for check in found], dataset.checks(found))
        raise typer.Exit(1 if any(check.state == "fail" for check in found) else 0)


@app.command()
def schema(as_json: AsJson = True) -> None:
    """Print the JSON Schema of manifests. It has every key, default and explanation."""
    from smsbatch.manifest import schema as of_manifests

    del as_json  # the output is always JSON; the option exists because every verb has it
    with reporting():
        echo_json(of_manifests())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.", metavar="MANIFEST")] = Path("manifest.yaml"),
    as_json: AsJson = False,
) -> None:
    """Write a commented manifest to start from. It runs unchanged, on the embedded model."""
    from importlib.resources import files

    with reporting():
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(files("smsbatch").joinpath("template.yaml").read_text(encoding="utf-8"))
        except FileExistsError:
            fail(f"{path} exists; choose another name", 2)
        except OSError as error:
            fail(f"{path}: cannot write it: {error.strerror}", 3)
        show(as_json, lambda: {"written": str(path)}, [f"{path} is written. Edit it, then: smsbatch run {path}"])


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        with reporting():
            say(f"smsbatch {installed('smsbatch')}")
        raise typer.Exit
