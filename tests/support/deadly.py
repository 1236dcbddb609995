"""Workers for tests of the pool that kill their own process, as the kernel's out-of-memory killer would."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from smsbatch.data.reader import Reader
from smsbatch.data.sample import Entry, Outcome, Sample
from smsbatch.workers.worker import Worker


class DeadlyWorker(Worker):
    """Kills itself at every sample named `killer...`, and at the sample `flaky` once in a test."""

    def _read(self, reader: Reader, entry: Entry) -> Sample | Outcome:
        died_before = Path(self.manifest.output.path).with_name("died-before")
        if entry.key.startswith("killer") or (entry.key == "flaky" and not died_before.exists()):
            died_before.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(reader, entry)


class StillbornWorker(Worker):
    """Kills itself while it loads its models."""

    def setup(self, driver_version: str = "") -> None:
        os.kill(os.getpid(), signal.SIGKILL)
