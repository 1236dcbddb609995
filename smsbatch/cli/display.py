"""Progress of a run while it works: a live display for terminals, plain lines for logs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any

from smsbatch.cli import dataset, training
from smsbatch.commands.status import TrainingStatus
from smsbatch.runs.status import Status
from smsbatch.text import count

_INTERVAL_S = 10.0  # between two lines of a log


_LINES: dict[str, Any] = {
    **dict.fromkeys(("Plan", "Report", "Status"), dataset),
    **dict.fromkeys(("TrainingPlan", "Distilled", "TrainingStatus"), training),
}


PROGRESS: dict[str, Callable[[str, Any], Status | TrainingStatus]] = {
    "dataset": lambda name, now: now,
    "generator": TrainingStatus.of,
}
"""The status that a run's name and progress make, by what its task makes."""


def lines_of(result: Any) -> Any:
    """The module that has the lines of what a verb gave."""
    return _LINES[type(result).__name__]


def status(now: Status | TrainingStatus, ages: bool = False) -> list[str]:
    """A status as a few lines; with `ages` also when its workers were last heard of."""
    lines: list[str] = lines_of(now).status(now, ages)
    return lines


def status_line(now: Status | TrainingStatus) -> str:
    """A status as one line."""
    line: str = lines_of(now).status_line(now)
    return line


class Display(AbstractContextManager["Display"]):
    """Base of the displays of a run's progress; shows nothing."""

    worked = False

    def update(self, now: Status | TrainingStatus) -> None:
        self.worked |= now.works

    def __exit__(self, *_: object) -> None:
        pass


class Plain(Display):
    """One line per interval and one at the end, for logs: text, or JSON on stderr if stdout is to be JSON."""

    def __init__(self, as_json: bool = False) -> None:
        self._as_json, self._next = as_json, 0.0

    def update(self, now: Status | TrainingStatus) -> None:
        super().update(now)
        if now.finished or monotonic() >= self._next:
            if self._as_json:
                print(json.dumps(now.to_dict()), file=sys.stderr, flush=True)
            else:
                print(status_line(now), flush=True)
            self._next = monotonic() + _INTERVAL_S


class Live(Display):
    """A few lines that are redrawn in place."""

    def __init__(self, transient: bool = True) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text = Text  # plain text: names may contain what looks like markup
        self._live = Live(console=Console(), refresh_per_second=4, transient=transient)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, now: Status | TrainingStatus) -> None:
        super().update(now)
        self.show(status(now))

    def show(self, lines: Iterable[str]) -> None:
        self._live.update(self._text("\n".join(lines)))


class Watch(Display):
    """The display of `status --watch`: live lines that remain at the end, or one line per update."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._live = Live(transient=False) if sys.stdout.isatty() and not as_json else None

    def __enter__(self) -> Watch:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.__exit__(*error)

    def update(self, now: Status | TrainingStatus) -> None:
        if self._live:
            self._live.show(status(now, ages=True))
        else:
            print(json.dumps(now.to_dict()) if self._as_json else status_line(now), flush=True)


class Shards(AbstractContextManager["Shards"]):
    """The number of shards that `verify` has checked, on a line that disappears; none if `hidden`."""

    def __init__(self, hidden: bool) -> None:
        self._live = None if hidden else Live()

    def __enter__(self) -> Shards:
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.__exit__(*error)

    def progress(self, done: int, shards: int) -> None:
        if self._live:
            self._live.show([f"{done:,} of {count(shards, 'shard')} checked"])
