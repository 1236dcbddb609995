"""Find the backend that serves a path or URL."""

from __future__ import annotations

import functools
import inspect
import os
from pathlib import Path

import fsspec

from smsbatch import tiny
from smsbatch.errors import RequestError
from smsbatch.manifest import Storage
from smsbatch.storage.addresses import WEB, Rules, split_refused
from smsbatch.storage.backend import _LOCK, Backend
from smsbatch.storage.disk import Disk
from smsbatch.storage.retries import redact, shown


def resolve(url: str | Path, storage: Storage, rules: Rules | None = None) -> tuple[Backend, str]:
    """The backend of a path, a URL or a `tiny:` name, and its path there.

    With `rules`, the address is one that a row of a table names.

    Raises:
        RequestError: there is no driver for it, or no row may name it.
    """
    text, reason = split_refused(os.fspath(url))
    if reason := reason or (rules.refusal(text) if rules else ""):
        raise RequestError(f"{shown(text)}: {redact(reason)}")
    text = tiny.resolve(text)
    scheme, found, _ = text.partition("://")
    scheme = scheme.lower() if found and scheme.lower() != "local" else "file"
    # A row of a table may hold any address, and a driver may raise anything for one that it cannot use.
    try:
        with _LOCK:  # else each thread of a starting pool makes its own backend
            backend = _backend(scheme, os.getpid(), storage, rules if scheme in WEB else None)
        return backend, backend.path_of(text)
    except ImportError as error:
        raise RequestError(f"{scheme}://: its driver is not installed ({redact(str(error))})") from error
    except (TypeError, ValueError, OSError, AttributeError, RuntimeError) as error:
        raise RequestError(f"{shown(scheme)}://: its driver cannot be used by an address alone") from error


@functools.lru_cache(maxsize=64)
def _backend(scheme: str, pid: int, storage: Storage, rules: Rules | None) -> Backend:
    """One backend for all threads of a process; `pid` because connections do not survive a fork."""
    try:
        driver, kind = fsspec.get_filesystem_class(scheme), _kind(scheme)
    except ValueError as error:
        raise RequestError(f"{shown(scheme)}://: no driver is known for this scheme") from error
    options = {"use_listings_cache": False, "skip_instance_cache": True, **kind.options(storage)}
    inspect.signature(driver.__init__).bind(None, **options)  # a driver whose constructor fails may complain when freed
    return kind(driver(**options), scheme, storage, rules)


def _kind(scheme: str) -> type[Backend]:
    """The backend class of a scheme; imports the libraries of S3 and http only when they are needed."""
    if scheme in {"s3", "s3a"}:
        from smsbatch.storage.s3 import S3

        return S3
    if scheme in {"http", "https"}:
        from smsbatch.storage.http import Web

        return Web
    return Disk if scheme == "file" else Backend
