"""A driver's sign of life, and the drivers that are at work.

A driver that is at work says so every few seconds, under `_smsbatch/heartbeats/`, and takes it back when it leaves in
order. A thread of its own does that, so that long work does not look like death. Those who find one obey: `repair` and
`gc` do not start beside it, a second driver works in another order, and on a store without create-only put it is
refused.
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
from pathlib import Path
from typing import Any, Self

from smsbatch.errors import RequestError, StorageError
from smsbatch.storage.store import Store

HEARTBEATS = "_smsbatch/heartbeats"
BEAT_S = 10.0
DEAD_AFTER_S = 6 * BEAT_S


class Heartbeat:
    """Beats at once when entered and then every few seconds, telling of `now`; whoever leaves in order takes it back.

    A training tells of itself in its own files: there `now` is None.

    A beat that cannot be stored is left out: the work meets the same store, and says what is wrong with it.
    """

    def __init__(self, store: Store, now: Mapping[str, Any] | None = None) -> None:
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
        beat = {"time": time.time(), "processes": process_table()} | dict(self.now or {})
        self._store.put(self._path, json.dumps(beat).encode())


def other_drivers(store: Store, own: Heartbeat) -> list[Driver]:
    """The other drivers at work; the heartbeats of dead ones are removed."""
    return [driver for driver in drivers(store, remove_stale=True, without=own.name) if driver.alive]


@dataclass(frozen=True)
class Driver:
    """A driver by its last sign of life, `age_s` seconds ago.

    Attributes:
        processes: whose table of processes it is in, as `process_table` says it of ours.
    """

    name: str
    age_s: float
    processes: str = ""

    @property
    def alive(self) -> bool:
        return self.age_s < DEAD_AFTER_S and not self._gone

    @property
    def _gone(self) -> bool:
        """Whether it was a process beside ours that is no more, so that one need not wait for it to look dead."""
        process = self.name.split("-")[-2] if self.name.count("-") >= 2 else ""
        if not self.processes or self.processes != process_table() or not process.isdigit():
            return False
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it is somebody else's
        return False


def process_table() -> str:
    """A name of the table that this process is numbered in: another on each machine, in each container and after each
    boot. '' where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def drivers(store: Store, remove_stale: bool = False, without: str = "") -> list[Driver]:
    """The drivers whose heartbeats are there, except for one; heartbeats of dead drivers are removed if asked."""
    found = []
    for path, beat in read_beats(store, without).items():
        driver = Driver(driver_name(path), time.time() - beat["time"], beat.get("processes", ""))
        if remove_stale and not driver.alive:
            store.delete(path)
        else:
            found.append(driver)
    return found


def read_beats(store: Store, without: str = "") -> dict[str, dict[str, Any]]:
    beats = {}
    paths = [path for path in store.list(HEARTBEATS) if driver_name(path) != without]
    for path, beat in store.read_all(paths).items():
        with suppress(ValueError):  # a torn one is as good as none
            beats[path] = json.loads(beat)
    return beats


def driver_name(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".json")


def require_idle(store: Store, advice: str) -> None:
    alive = [driver for driver in drivers(store) if driver.alive]
    if alive:
        raise RequestError(
            f"{store.url}: a driver, {alive[0].name}, is at work (seen {alive[0].age_s:.0f} s ago); let it finish or "
            f"stop it, and {advice}; one that was killed counts as dead after {DEAD_AFTER_S:.0f} s"
        )
