"""Temporary folders on the local disk, and those that killed processes have left.

A folder's name tells the process that made it, `smsbatch-<purpose>-<process table>-<process>-<random>`, so that no
folder of a living process is taken for one of a dead process.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from smsbatch.storage.store import storage_errors

OLD_S = 7 * 86400.0  # of processes that cannot be looked up from here: of another container, or before a reboot
_NAME = re.compile(r"smsbatch-[a-z]+-(?P<table>[0-9a-f]{8})-(?P<process>\d+)-\w+|smsbatch-(?:[a-z]+-)?\w{8}")


def scratch_folder(purpose: str, within: Path | None = None) -> tempfile.TemporaryDirectory[str]:
    """A new folder in `within`, default the system's temporary folder; a context manager that removes it.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors("make a folder in", within or tempfile.gettempdir()):
        if within is not None:
            within.mkdir(parents=True, exist_ok=True)
        prefix = f"smsbatch-{purpose}-{_table()}-{os.getpid()}-"
        return tempfile.TemporaryDirectory(prefix=prefix, dir=within)


def abandoned() -> dict[Path, int]:
    """Folders in the system's temporary folder whose process is gone, with the bytes of their files.

    If the process cannot be looked up, a folder counts only if nothing in it was changed for OLD_S seconds.
    """
    return {folder: size for folder, size in _folders() if size is not None}


def remove(folder: Path) -> None:
    """Remove an abandoned folder, as far as it can be removed."""
    shutil.rmtree(folder, ignore_errors=True)


def process_table() -> str:
    """An id of the process table that this process id belongs to, distinct for each machine, container and boot.

    '' where the system does not provide it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return ""


def is_running(process: int) -> bool:
    """True if a process of this process table exists."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it belongs to another user
    return True


def _table() -> str:
    return hashlib.sha256(process_table().encode()).hexdigest()[:8]


def _folders() -> Iterator[tuple[Path, int | None]]:
    """Our folders, each with its bytes if it is abandoned."""
    for folder in Path(tempfile.gettempdir()).glob("smsbatch-*"):
        named = _NAME.fullmatch(folder.name)
        with suppress(OSError):  # it has just been removed
            if named is None or folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            stats = [path.lstat() for path in (folder, *folder.rglob("*"))]
            if process_table() and named["table"] == _table():
                left = not is_running(int(named["process"]))
            else:
                left = time.time() - max(stat.st_mtime for stat in stats) > OLD_S
            yield folder, sum(stat.st_size for stat in stats[1:]) if left else None
