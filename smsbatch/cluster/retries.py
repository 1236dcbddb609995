"""Retries of a work item whose workers die, and the search for the sample that kills them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from smsbatch.workers.worker import WorkItem


@dataclass(eq=False)
class UnitRetry:
    """A work item and the deaths of the workers that processed it.

    A unit whose workers keep dying is bisected: `suspects` are ranges of its rows that are tried alone and halved when
    they kill again. Single rows that kill are `lost`; then the unit is computed without them.
    """

    item: WorkItem
    deaths: int = 0
    searched: bool = False
    suspects: deque[range] = field(default_factory=deque)
    lost: list[int] = field(default_factory=list)

    def worker_died(self, retries: int) -> bool:
        """Count a death of its worker; False if there is nothing left to try."""
        self.deaths += 1
        if self.suspects:
            rows = self.suspects.popleft()
            middle = len(rows) // 2
            if middle:
                self.suspects.extendleft((rows[middle:], rows[:middle]))
            else:
                self.lost.append(rows[0])
        elif self.searched:
            return False
        elif self.deaths > retries:
            self.searched = True
            self.suspects.append(range(self.item.unit.start, self.item.unit.stop))
        return True
