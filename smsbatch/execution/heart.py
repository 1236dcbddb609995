"""A driver's sign of life, renewed by a thread of its own, so that long work does not look like death."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Self

from smsbatch.data.store import Store
from smsbatch.errors import StorageError
from smsbatch.execution.status import BEAT_S, HEARTBEATS, Status, process_table

__all__ = ["Heart"]


class Heart:
    """Beats at once when entered and then every few seconds, telling of `now`; whoever leaves in order takes it back.

    A training tells of itself in its own files: there `now` is None.

    A beat that cannot be stored is left out: the work meets the same store, and says what is wrong with it.
    """

    def __init__(self, store: Store, now: Status | None = None) -> None:
        self.now = now
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._store, self._path = store, f"{HEARTBEATS}/{self.name}.json"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="smsbatch-heart", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        with suppress(StorageError):  # it grows stale by itself, and must not hide why we leave
            self._store.delete(self._path)

    def _go_on(self) -> None:
        while not self._stopped.wait(BEAT_S):
            with suppress(StorageError):
                self._beat()

    def _beat(self) -> None:
        beat: dict[str, Any] = {"time": time.time(), "processes": process_table()}
        if self.now is not None:
            beat |= {
                "rate": self.now.rate,
                "samples_under_way": self.now.samples_under_way,
                "samples_retried": self.now.samples_retried,
                "workers": [asdict(worker) for worker in self.now.workers],
            }
        self._store.put(self._path, json.dumps(beat).encode())
