"""The number of requests of a run: calls of `Store` on disk, HTTP requests on S3.

It is a constant plus a constant per unit. A change that adds requests to a unit, or lets their number per unit grow
with the run, has to change a number here.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from support.jobs import make_photos, write_manifest
from support.s3server import Faults, Server

import smsbatch as sb
from smsbatch.engines.optimize import OptimizeEngine
from smsbatch.storage.store import Store

SLOW_CALLS = ("open_read", "read", "fetch", "put", "create", "copy", "list", "sizes", "size", "exists", "modified")
KINDS = (  # of paths, by their prefix; the first match counts
    ("_smsbatch/attempts/", "attempt"),
    ("_smsbatch/commits", "commit"),
    ("_smsbatch/published", "publication"),
    ("_smsbatch/heartbeats", "heartbeat"),
    ("_smsbatch/drift", "drift"),
    ("_smsbatch/tmp", "probe"),
    ("plan", "plan"),
    ("shards", "shard"),
    ("metrics", "shard"),
)


def kind_of(path: str) -> str:
    return next((kind for start, kind in KINDS if path.startswith(start)), path or "root")


@contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls of a store's methods from outside by (method, kind of path); `read_all` counts once per path."""
    calls: Counter[tuple[str, str]] = Counter()
    inside, lock = threading.local(), threading.Lock()

    def counting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Store, *args: Any, **options: Any) -> Any:
            if getattr(inside, "depth", 0):
                return method(self, *args, **options)
            if name == "read_all":
                args = (list(args[0]),)
            asked = args[0] if name == "read_all" else [args[0] if args and isinstance(args[0], str) else ""]
            with lock:
                calls.update((name, kind_of(path)) for path in asked)
            inside.depth = 1
            try:
                return method(self, *args, **options)
            finally:
                inside.depth = 0

        return call

    with monkeypatch.context() as patch:
        public = [name for name, value in vars(Store).items() if callable(value) and not name.startswith("_")]
        assert set(SLOW_CALLS) < set(public), "every method that asks the storage is counted"
        for name in public:
            if name not in ("locate", "without_create_only_put", "existing"):  # these make no requests
                patch.setattr(Store, name, counting(name, getattr(Store, name)))
        yield calls


@pytest.fixture
def one_unit_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avoid two units in flight, where timing decides which of them finds its shard complete."""
    monkeypatch.setattr(OptimizeEngine, "units_in_flight", 1)


def run(folder: Path, model: Path, lora: Path, pictures: int, output: str, *overrides: str) -> None:
    photos = make_photos(folder / f"photos-{pictures}", [f"photo-{number}" for number in range(pictures)])
    file = write_manifest(folder, model, lora, photos, objective={"steps": 1})
    report = sb.run(sb.load(file, [f"output.path={output}", "output.samples_per_shard=1000", *overrides]))
    assert isinstance(report, sb.Report)
    assert (report.succeeded, report.units) == (pictures, pictures // 2)


def test_calls_on_disk(
    tmp_path: Path, model: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, one_unit_at_a_time: None
) -> None:
    found = []
    for pictures in (4, 8):
        with counted_calls(monkeypatch) as calls:
            run(tmp_path, model, lora, pictures, str(tmp_path / f"out-{pictures}"))
        found.append(calls)
    first, second = found
    assert first.total() <= 50, sorted(first.items())
    unit = {
        ("exists", "commit"): 2,  # whether the unit is done; whether the shard is complete
        ("open_read", "plan"): 1,  # the unit's rows of the index
        ("create", "attempt"): 2,
        ("size", "attempt"): 2,
        ("create", "commit"): 1,
        ("fetch", "attempt"): 2,  # to assemble the shard
        ("read_all", "commit"): 1,  # to look for a newer generation
    }
    assert second - first == Counter({call: 2 * times for call, times in unit.items()})
    assert first - second == Counter()


def test_requests_on_s3(tmp_path: Path, model: Path, lora: Path, s3: Server, one_unit_at_a_time: None) -> None:
    found = []
    for pictures in (4, 8):
        url = f"s3://{s3.bucket()}/out"
        with Faults(s3.endpoint) as proxy:
            overrides = [f"storage.endpoint={proxy.endpoint}", f"storage.region={s3.storage.region}"]
            run(tmp_path, model, lora, pictures, url, *overrides)
        requests = Counter(request.method for request in proxy.requests)
        found.append(requests)
    first, second = found
    assert first.total() <= 63, first
    # HEAD: the four calls of `exists` and `size` on disk, and one for each object that is read in ranges.
    # GET: footer and rows of the index, the attempt's two files, and the look for a newer generation.
    unit = {"HEAD": 7, "GET": 5, "PUT": 3}
    assert second - first == Counter({method: 2 * times for method, times in unit.items()})
    assert first - second == Counter()
