"""Choose what is shown: the module that formats a result as lines, and the display of a verb."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from smsbatch.cli import dataset, training
from smsbatch.cli.common import is_terminal
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
    if is_terminal() and not as_json:
        return Live(status)
    return Plain(status_line, as_json, err=as_json)


def watch_display(as_json: bool) -> Display:
    """The display of `status --watch`: live lines that remain at the end, or one line per update."""
    if is_terminal() and not as_json:
        return Live(partial(status, ages=True), transient=False)
    return Plain(status_line, as_json, interval_s=0)


def shard_display(as_json: bool) -> Display:
    """The display of `verify`: one line that disappears at the end, or nothing."""
    return Display() if as_json or not is_terminal() else Live(status)
