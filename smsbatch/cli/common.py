"""Helpers of all verbs: resolve arguments, print results, report errors."""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from smsbatch.errors import RequestError, SmsbatchError, StorageError
from smsbatch.text import hidden

if TYPE_CHECKING:
    from smsbatch.manifest import Manifest


def overrides(set_: list[str] | None, limit: int | None) -> list[str]:
    return [*(set_ or ()), *([] if limit is None else [f"source.limit={limit}"])]


def located(argument: str, set_: list[str] | None) -> str | Manifest:
    """A manifest if the argument is a file, else an output, for which only `storage` keys can be overridden."""
    import smsbatch as sb
    from smsbatch.runs.run import of_output

    if Path(argument).is_file() or argument.endswith((".yaml", ".yml")):
        return sb.load(argument, set_ or ())
    options = dict(override.partition("=")[::2] for override in set_ or ())
    if not options:
        return argument
    for key in options:
        if not key.startswith("storage."):
            raise RequestError(
                f"--set {key}: {argument} is an output, whose manifest is fixed; only storage.* can be set"
            )
    return of_output(argument, {key.removeprefix("storage."): value for key, value in options.items()})


def same_again(where: str, set_: list[str] | None) -> str:
    """The arguments of this call, quoted for another verb's command line."""
    return shlex.join([where, *(part for override in set_ or () for part in ("--set", override))])


@contextmanager
def reporting(as_json: bool = False, interrupted: str = "") -> Iterator[None]:
    """Turn every SmsbatchError into lines and an exit code; any other exception is a bug and keeps its traceback.

    Meanwhile the messages of the logger `smsbatch` are lines on stderr.
    """
    logger, handler = logging.getLogger("smsbatch"), _Lines(as_json)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except SmsbatchError as error:
        if as_json:
            with suppress(StorageError):
                echo_json({"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code})
        fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(f"interrupted{'; ' if interrupted else ''}{interrupted}", 130)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    """Prints each message as a line, or as JSON, on what stderr is at the moment: a live display replaces it."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        say(json.dumps({"message": message}) if self._as_json else f"smsbatch: {message}", err=True)


def fail(message: str, code: int) -> NoReturn:
    for line in message.splitlines():
        with suppress(StorageError):  # the exit code is all that is left to tell
            say(f"smsbatch: {line}", err=True)
    raise typer.Exit(code)


def show(as_json: bool, plain: Callable[[], Any], lines: Iterable[str]) -> None:
    if as_json:
        echo_json(plain())
    else:
        echo(lines)


def echo(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def echo_json(value: Any) -> None:
    say(json.dumps(value, indent=2 if is_terminal() else None, ensure_ascii=False))


def is_terminal() -> bool:
    """True if stdout is a terminal; it may be closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def say(line: str, err: bool = False) -> None:
    """Print a line to stdout or stderr, without the values that a manifest has from the environment.

    Raises:
        StorageError: it cannot be written; whatever is printed from then on is lost.
    """
    with printing(err):
        typer.echo(hidden(line), err=err)


@contextmanager
def printing(err: bool = False) -> Iterator[None]:
    """Turn the error of a print to stdout or stderr into a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise  # the reader has left, as `head` does: Click ends the command
        name, stream = ("stderr", sys.stderr) if err else ("stdout", sys.stdout)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # else Python would try again at its end
        os.close(nowhere)
        raise StorageError(f"cannot write to {name}: {error.strerror}; send it elsewhere") from error
