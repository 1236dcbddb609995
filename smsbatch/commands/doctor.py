"""`doctor`: check this machine and the storage before a run needs them.

Every check ends: requests to storage have short timeouts and few retries, and a cluster is only asked for its name. The
only file written to the output is a probe of a few bytes, which is deleted again.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from time import perf_counter
from typing import Any, Literal

from smsbatch.cluster.connect import check_answers, cluster_address
from smsbatch.commands.plan import PLANNERS
from smsbatch.data.captions import Contents, unused_rules
from smsbatch.data.reader import Reader, public
from smsbatch.data.sources import Scan, parts, scan_entries
from smsbatch.errors import RequestError, SmsbatchError
from smsbatch.manifest import Compute, Manifest, Storage
from smsbatch.runs.run import find_or_require_empty
from smsbatch.storage.retries import redact
from smsbatch.storage.store import TEMPORARY, Store

_SCRATCH_FAILS, _SCRATCH_WARNS = 1e9, 10e9  # free bytes; the former hold one or two shards
_CLOCK_WARNS_S, _CLOCK_FAILS_S = 60, 600  # S3 refuses a clock that is 15 minutes off
_TIMEOUT_S, _RETRIES = 5.0, 1
_LOOKED_AT = 10_000  # samples of the source's first object


@dataclass(frozen=True)
class Check:
    """The result of one check; `do` is the advice if the state is not ok."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    do: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def doctor(where: str | Manifest | None = None) -> list[Check]:
    """Check this machine; also the storage of an output path, and storage, source and weights of a manifest.

    A check that fails returns state "fail"; it raises nothing.
    """
    checks = [_python(), _torch(), _cores(), _scratch(), _ray(where if isinstance(where, Manifest) else None)]
    if where is not None:
        checks += _output(where)
    if isinstance(where, Manifest):
        checks += [*_source(where), _weights(where)]
    return checks


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()}, smsbatch {version('smsbatch')}")


def _torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries is missing
        return Check("torch", "fail", f"cannot be loaded: {error}", "install it as pytorch.org says for this machine")
    if not torch.cuda.is_available():
        why = f"built for CUDA {torch.version.cuda}, which finds no GPU" if torch.version.cuda else "built without CUDA"
        advice = "fine for the embedded model; Stable Diffusion needs a GPU, its driver, and torch built for CUDA"
        return Check("torch", "warn", f"{torch.__version__}, {why}", advice)
    gpus = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        gpus.append(f"{torch.cuda.get_device_name(number)} ({free / 2**30:.0f} of {total / 2**30:.0f} GiB free)")
    return Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda}, {'; '.join(gpus)}")


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Check("cores", "ok", f"{cores} for this process")


def _scratch() -> Check:
    folder = tempfile.gettempdir()
    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(prefix="smsbatch-", dir=folder) as file:
            file.write(b"probe")
    except OSError as error:
        return Check(
            "scratch", "fail", f"{folder}: {error.strerror or error}", "set TMPDIR to a folder with free space"
        )
    state: Literal["ok", "warn", "fail"] = (
        "fail" if free < _SCRATCH_FAILS else "warn" if free < _SCRATCH_WARNS else "ok"
    )
    advice = "" if state == "ok" else "shards are built there; set TMPDIR to a disk with more free space"
    return Check("scratch", state, f"{folder}: {free / 1e9:.1f} GB free", advice)


def _ray(manifest: Manifest | None) -> Check:
    needed = manifest is not None and manifest.compute.pool == "ray"
    try:
        installed = f"ray {version('ray')}"
    except PackageNotFoundError:
        advice = "pip install 'smsbatch[ray]', or set compute.pool to local"
        return Check("ray", "fail" if needed else "ok", "not installed", advice if needed else "")
    try:
        address = cluster_address(manifest.compute if manifest is not None and needed else Compute())
        if address is None:
            return Check("ray", "ok", f"{installed}, no cluster address: each run starts a cluster here")
        check_answers(address)
    except RequestError as error:
        return _failed("ray", error)
    return Check("ray", "ok", f"{installed}, a cluster answers at {address}")


def _output(where: str | Manifest) -> Iterator[Check]:
    """Put, read, list and delete a probe; check the clock and create-only put, which the ledger needs."""
    try:
        path, storage = (where, Storage()) if isinstance(where, str) else (where.output.path, where.storage)
        store = Store(path, _impatient(storage))
        run = find_or_require_empty(store)
    except SmsbatchError as error:
        yield _failed("output", error)
        return
    probe = f"{TEMPORARY}/doctor-{uuid.uuid4().hex}"
    steps: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(probe, b"smsbatch doctor looks whether it can write here"),
        "read": lambda: store.read(probe),
        "list": lambda: store.sizes(TEMPORARY)[probe],
        "clock": lambda: store.modified(probe),
        "delete": lambda: store.delete(probe),
    }
    answers: dict[str, Any] = {}
    started = perf_counter()
    for name, step in steps.items():
        try:
            answers[name] = step()
        except (SmsbatchError, KeyError) as error:
            problem = error if isinstance(error, SmsbatchError) else RequestError(f"{probe} is written and not listed")
            refused = _failed("output", problem)
            went_well = f" ({', '.join(answers)} went well)" if answers else ""
            yield Check("output", "fail", f"cannot {name}{went_well}: {refused.found}", refused.do)
            return
        if name == "clock":
            off_s = (datetime.now(UTC) - answers[name]).total_seconds()
    found = "no run yet" if run is None else f"the run {run.name}"
    done = ", ".join(name for name in answers if name != "clock")
    took_ms = 1000 * (perf_counter() - started)
    yield Check("output", "ok", f"{store.url}: {done} in {took_ms:.0f} ms; {found}")
    yield _clock(off_s)
    yield _create_only(store)


def _clock(off: float) -> Check:
    state: Literal["ok", "warn", "fail"] = (
        "fail" if abs(off) > _CLOCK_FAILS_S else "warn" if abs(off) > _CLOCK_WARNS_S else "ok"
    )
    advice = "" if state == "ok" else "set this machine's clock (NTP); stores refuse requests that are minutes off"
    return Check("clock", state, f"{abs(off):.0f} s {'ahead of' if off >= 0 else 'behind'} the store's", advice)


def _create_only(store: Store) -> Check:
    try:
        supported = store.supports_create()
    except SmsbatchError as error:
        return _failed("create-only", error)
    if supported:
        return Check("create-only", "ok", "the store lets one of several writers win: workers commit, drivers may join")
    advice = "it works; run one driver at a time, or choose a store with conditional writes"
    return Check("create-only", "warn", "the store has no create-only put: only the driver commits", advice)


def _source(manifest: Manifest) -> Iterator[Check]:
    """Read the first picture, and look at the first object for captions and for what would be left out."""
    source, storage, told = manifest.source, _impatient(manifest.storage), Scan()
    try:
        part = parts(source.model_copy(update={"urls": source.urls[:1]}), storage)[0]
        entries = list(islice(scan_entries(part, source, storage, manifest.seed, told), _LOOKED_AT))
        entry = next((entry for entry in entries if entry.image), None)
        if entry is None:
            told_of = redact("; ".join([f"{part.url}: no pictures in it", *told.notices]))
            yield Check("source", "fail", told_of, f"check source.urls and source.images ({', '.join(source.images)})")
            return
        Reader.of(source, storage).read(entry.fields[entry.image])
    except SmsbatchError as error:
        yield _failed("source", error)
        return
    yield Check("source", "ok", f"{public(entry.url)} can be read")
    captions = Counter(entry.caption_from for entry in entries if entry.caption_from)
    found = f"{Contents(len(entries), captions, told.left, told.passed)}, in {public(part.url)}"
    if len(entries) == _LOOKED_AT:
        found += f", of which the first {_LOOKED_AT:,} were looked at"
    notices = [*map(redact, told.notices), *unused_rules(source, captions)]
    if not captions and (told.left or told.passed):
        notices.append("if one of these has the captions, source.caption names it")
    yield Check("captions", "warn" if notices else "ok", found, "; ".join(notices))


def _weights(manifest: Manifest) -> Check:
    try:
        found, notices = PLANNERS[manifest.makes].check_weights(manifest)
    except SmsbatchError as error:
        return _failed("weights", error)
    return Check("weights", "warn" if notices else "ok", found, "; ".join(notices))


def _failed(name: str, error: SmsbatchError) -> Check:
    """Split the message of an error at the first semicolon: before it the finding, after it the advice."""
    found, _, advice = str(error).partition("; ")
    return Check(name, "fail", found, advice or "fix that, then run doctor again")


def _impatient(storage: Storage) -> Storage:
    return storage.model_copy(update={"timeout_s": min(_TIMEOUT_S, storage.timeout_s), "retries": _RETRIES})
