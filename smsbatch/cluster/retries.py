"""A task on its way through a cluster, and the search for the sample that kills its workers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from smsbatch.workers.worker import WorkItem


@dataclass(eq=False)
class UnitRetry:
    """A task on its way through the cluster, and what is known of the deaths it was there for.

    A unit whose workers keep dying is searched: `suspects` are ranges of its rows that are tried alone and halved when
    they kill again, until single rows stand alone and are `lost`; then the unit is done without them.
    """

    item: WorkItem
    deaths: int = 0
    searched: bool = False
    suspects: deque[range] = field(default_factory=deque)
    lost: list[int] = field(default_factory=list)

    def worker_died(self, retries: int) -> bool:
        """Note one more death of its worker; False when there is nothing left to try."""
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
