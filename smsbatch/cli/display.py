"""Progress of a run while it works: the progress bar, a live display for terminals, plain lines for logs.

The lines around the bar are made in `cli/dataset.py` for a dataset and in `cli/training.py` for a training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import monotonic

from smsbatch.cli.common import say
from smsbatch.commands.status import TrainingStatus
from smsbatch.runs.status import Status

Now = Status | TrainingStatus


def bar(done: int, total: int) -> str:
    """A progress bar of 30 characters."""
    filled = round(30 * done / total) if total else 0
    return "█" * filled + "░" * (30 - filled)


class Display(AbstractContextManager["Display"]):
    """Base of the displays of a run's progress; shows nothing."""

    worked = False

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, now: Now) -> None:
        self.worked |= now.works

    def show(self, lines: Iterable[str]) -> None:
        """Show these lines, in place of those before."""


class Plain(Display):
    """One line per interval and one at the end, for logs: `line` of each status, or JSON; to stdout, or stderr."""

    def __init__(
        self, line: Callable[[Now], str], as_json: bool = False, err: bool = False, interval_s: float = 10.0
    ) -> None:
        self._line, self._as_json, self._err, self._interval_s, self._next = line, as_json, err, interval_s, 0.0

    def update(self, now: Now) -> None:
        super().update(now)
        if now.finished or monotonic() >= self._next:
            say(json.dumps(now.to_dict()) if self._as_json else self._line(now), err=self._err)
            self._next = monotonic() + self._interval_s


class Live(Display):
    """A few lines that are redrawn in place, `lines` of each status."""

    def __init__(self, lines: Callable[[Now], list[str]], transient: bool = True) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        self._text, self._lines = Text, lines  # plain text: names may contain what looks like markup
        self._live = Live(console=Console(), refresh_per_second=4, transient=transient)

    def __enter__(self) -> Live:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def update(self, now: Now) -> None:
        super().update(now)
        self.show(self._lines(now))

    def show(self, lines: Iterable[str]) -> None:
        self._live.update(self._text("\n".join(lines)))
