"""The heartbeats of drivers, and the drivers at work.

A driver at work writes its heartbeat under `_smsbatch/heartbeats/` every few seconds, and deletes it when it exits in
an orderly way. A separate thread writes it, so that a long step does not make the driver look dead. While a driver is
alive, `repair` and `gc` do not start; a second driver takes the shards in another order, and is refused in a store
without create-only put.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Self

from smsbatch.errors import RequestError, StorageError
from smsbatch.storage.scratch import is_running, process_table
from smsbatch.storage.store import Store

HEARTBEATS = "_smsbatch/heartbeats"
BEAT_S = 10.0
DEAD_AFTER_S = 6 * BEAT_S
AHEAD_S = 3600.0  # how far clocks may be apart
_LAST = 1e12  # seconds since 1970; no number beyond is a time


class Heartbeat:
    """Writes a heartbeat with the content of `now` on entry and then every BEAT_S seconds; deletes it on exit.

    A training reports its progress in its own files, so its `now` is None. A heartbeat that cannot be stored is
    skipped: the work uses the same store and will report the error.
    """

    def __init__(self, store: Store, now: Mapping[str, Any] | None = None) -> None:
        self.now = now
        self.name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._store, self._path = store, f"{HEARTBEATS}/{self.name}.json"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="smsbatch-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        with suppress(StorageError):  # it goes stale by itself, and an error here would hide why the driver exits
            self._store.delete(self._path)

    def _go_on(self) -> None:
        while not self._stopped.wait(BEAT_S):
            with suppress(StorageError):
                self._beat()

    def _beat(self) -> None:
        beat = {"time": time.time(), "processes": process_table()} | dict(self.now or {})
        self._store.put(self._path, json.dumps(beat).encode())


def other_drivers(store: Store, own: Heartbeat) -> list[Driver]:
    """The other drivers at work; heartbeats of dead drivers are removed."""
    return [driver for driver in drivers(store, remove_stale=True, without=own.name) if driver.alive]


@dataclass(frozen=True)
class Driver:
    """A driver whose last heartbeat is `age_s` seconds old.

    Attributes:
        processes: the value of `process_table()` in the driver; '' if unknown.
    """

    name: str
    age_s: float
    processes: str = ""

    @property
    def alive(self) -> bool:
        return self.age_s < DEAD_AFTER_S and not self._gone

    @property
    def _gone(self) -> bool:
        """True if it was a process on this machine that has ended: it is dead although its heartbeat is fresh."""
        process = self.name.split("-")[-2] if self.name.count("-") >= 2 else ""
        if not self.processes or self.processes != process_table() or not process.isdigit():
            return False
        return not is_running(int(process))


def drivers(store: Store, remove_stale: bool = False, without: str = "") -> list[Driver]:
    """The drivers that have a heartbeat, except the driver named `without`."""
    found = []
    for path, beat in read_beats(store, without).items():
        driver = Driver(driver_name(path), beat["age_s"], str(beat.get("processes", "")))
        if remove_stale and not driver.alive:
            store.delete(path)
        else:
            found.append(driver)
    return found


def read_beats(store: Store, without: str = "") -> dict[str, dict[str, Any]]:
    """The contents of the heartbeats by path, each with its `age_s`; that of a damaged one has nothing else."""
    beats = {}
    paths = [path for path in store.list(HEARTBEATS) if driver_name(path) != without]
    for path, data in store.read_all(paths).items():
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        beat: dict[str, Any] = found if isinstance(found, dict) else {}
        with suppress(StorageError):  # its driver has just left
            beats[path] = beat | {"age_s": _age_s(beat.get("time"), store.modified(path))}
    return beats


def _age_s(told: Any, written: datetime) -> float:
    """The age of a beat, by its driver's clock or by the store's, whichever is older.

    A beat that is ahead of our clock by more than clocks are apart does not live until then: it counts as old.
    """
    now = time.time()
    ages = [now - written.timestamp()]
    if type(told) in (int, float) and abs(told) < _LAST:
        ages.append(now - told)
    return max(0.0, max(ages)) if max(ages) > -AHEAD_S else -max(ages)


def driver_name(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")


def require_idle(store: Store, advice: str) -> None:
    """Raises RequestError if a driver is at work."""
    for driver in drivers(store):
        if driver.alive:
            refuse(store, driver, f"let it finish or stop it, and {advice}")


def refuse(store: Store, driver: Driver, advice: str) -> NoReturn:
    raise RequestError(
        f"{store.url}: another driver, {driver.name}, is at work (seen {driver.age_s:.0f} s ago); {advice}; one that "
        f"was killed counts as dead after {DEAD_AFTER_S:.0f} s"
    )
