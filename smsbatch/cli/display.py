"""Progress of a run while it works: a live display for terminals, plain lines for logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import IO, Any

from smsbatch.cli import dataset, training
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


class Display(AbstractContextManager["Display"]):
    """Base of the displays of a run's progress; shows nothing."""

    worked = False

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, now: Status | TrainingStatus) -> None:
        self.worked |= now.works

    def show(self, lines: Iterable[str]) -> None:
        """Show these lines, in place of those before."""


class Plain(Display):
    """One line per interval and one at the end, for logs: text, or JSON to `file`."""

    def __init__(self, as_json: bool = False, interval_s: float = 10.0, file: IO[str] | None = None) -> None:
        self._as_json, self._interval_s, self._file, self._next = as_json, interval_s, file, 0.0

    def update(self, now: Status | TrainingStatus) -> None:
        super().update(now)
        if now.finished or monotonic() >= self._next:
            if self._as_json:
                print(json.dumps(now.to_dict()), file=self._file or sys.stdout, flush=True)
            else:
                print(status_line(now), flush=True)
            self._next = monotonic() + self._interval_s


class Live(Display):
    """A few lines that are redrawn in place; `ages` adds the time since the last report of each worker."""

    def __init__(self, transient: bool = True, ages: bool = False) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text, self._ages = Text, ages  # plain text: names may contain what looks like markup
        self._live = Live(console=Console(), refresh_per_second=4, transient=transient)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, now: Status | TrainingStatus) -> None:
        super().update(now)
        self.show(status(now, self._ages))

    def show(self, lines: Iterable[str]) -> None:
        self._live.update(self._text("\n".join(lines)))


def progress_display(as_json: bool) -> Display:
    """The display of a run: JSON goes to stderr, since stdout gets the result."""
    return Live() if sys.stdout.isatty() and not as_json else Plain(as_json, file=sys.stderr)


def watch_display(as_json: bool) -> Display:
    """The display of `status --watch`: live lines that remain at the end, or one line per update."""
    return Live(transient=False, ages=True) if sys.stdout.isatty() and not as_json else Plain(as_json, interval_s=0)


def shard_display(as_json: bool) -> Display:
    """The display of `verify`: one line that disappears at the end, or nothing."""
    return Display() if as_json or not sys.stdout.isatty() else Live()
