"""Choose what is shown: the module that formats a result as lines, and the display of a verb."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from smsbatch.cli import dataset, training
from smsbatch.cli.display import Display, Live, Plain
from smsbatch.commands.status import TrainingStatus
from smsbatch.runs.status import Status

_LINES: dict[str, Any] = {
    **dict.fromkeys(("Plan", "Report", "Status"), dataset),
    **dict.fromkeys(("TrainingPlan", "Distilled", "TrainingStatus"), training),
}


PROGRESS: dict[str, Callable[[str, Any], Status | TrainingStatus]] = {
    "dataset": lambda name, now: now,
    "generator": TrainingStatus.of,
}
"""The status from a run's name and progress, by the result of its task."""


def lines_of(result: Any) -> Any:
    """The module that formats the result of a verb."""
    return _LINES[type(result).__name__]


def status(now: Status | TrainingStatus, ages: bool = False) -> list[str]:
    """A status as a few lines; with `ages` also the time since the last report of each worker."""
    lines: list[str] = lines_of(now).status(now, ages)
    return lines


def status_line(now: Status | TrainingStatus) -> str:
    """A status as one line."""
    line: str = lines_of(now).status_line(now)
    return line


def progress_display(as_json: bool) -> Display:
    """The display of a run: JSON goes to stderr, since stdout gets the result."""
    if sys.stdout.isatty() and not as_json:
        return Live(status)
    return Plain(status_line, sys.stderr if as_json else None)


def watch_display(as_json: bool) -> Display:
    """The display of `status --watch`: live lines that remain at the end, or one line per update."""
    if sys.stdout.isatty() and not as_json:
        return Live(partial(status, ages=True), transient=False)
    return Plain(status_line, sys.stdout if as_json else None, interval_s=0)


def shard_display(as_json: bool) -> Display:
    """The display of `verify`: one line that disappears at the end, or nothing."""
    return Display() if as_json or not sys.stdout.isatty() else Live(status)
