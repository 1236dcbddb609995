"""A finished run in which any single file is changed: `verify --full` finds it, and `repair --full` undoes it.

Every file is drawn, also the ledger's own. No change ends in a traceback. Two tables name the files whose changes are
not found because they cannot matter, and the files that are not brought back, with the reasons.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support.damage import Change, change, files_of
from support.jobs import make_photos, rows, write_manifest

import smsbatch as sb
from smsbatch.data.index import OBJECTS, SAMPLES
from smsbatch.runs.heartbeat import HEARTBEATS
from smsbatch.runs.layout import (
    ATTEMPTS,
    CARD,
    COMMITS,
    DRIFT,
    FOREIGN,
    GENERATIONS,
    PUBLISHED,
    REPORT,
    SUCCESS,
    SUPERSEDED,
)
from smsbatch.storage.store import TEMPORARY

CANNOT_MATTER = {
    HEARTBEATS: "tells that a driver lives, by the clock of the store; a finished run has none that lives",
    TEMPORARY: "left by a killed process, never read",
    SUPERSEDED: "put aside by an earlier repair, never read",
    FOREIGN: "put aside by an earlier repair, never read",
    GENERATIONS: "an older publication that a later one has replaced, never read",
    f"{ATTEMPTS}/000000/lost": "an attempt that lost, never read",
    f"{ATTEMPTS}/000002/first": "an attempt of an older generation, of use only if its commit is damaged, too",
}
"""The files whose changes are not found, with the reason."""
NOT_RESTORED = {
    ATTEMPTS: "a reserve: counted if it is gone, moved aside if it is damaged; its shard has all of it",
    DRIFT: "nothing else holds it: the change must be allowed again, and the report is written without it",
    CARD: "asks to be edited, so it is written again only if it is gone",
    SUCCESS: "only `run` judges whether a run succeeded",
}
"""The files that `repair` does not bring back, with the reason."""
NEEDS_THE_SOURCE = {OBJECTS, SAMPLES}  # of which this run's has changed since the plan
OF_ONE_COMPUTATION = {"seconds", "attempts", "attempt", "worker", "generation", "batch_size"}  # columns


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    """The manifest of a finished run in which a picture failed at first, an allowed change moved the source's bytes,
    and files that cannot matter lie about."""
    folder, numbers = tmp_path_factory.mktemp("finished"), count()
    photos = make_photos(folder / "photos")
    (photos / "photo-5.png").write_bytes(b"no picture")
    job = write_manifest(folder, model, lora, photos, objective={"steps": 1}, errors={"max_failed_fraction": 0.5})
    with pytest.MonkeyPatch.context() as patch:  # else their names are random
        patch.setattr("smsbatch.runs.ledger.new_attempt", lambda: f"first{next(numbers)}")
        sb.run(sb.load(job))
        make_photos(photos, ["photo-5"])
        patch.setattr("smsbatch.runs.ledger.new_attempt", lambda: f"again{next(numbers)}")
        sb.run(sb.load(job), retry_failed=True, allow_drift=["inputs"])
    out = folder / "out"
    for name, content in (
        (f"{HEARTBEATS}/gone-1-a.json", json.dumps({"time": time.time() - 1000, "workers": []})),
        (f"{TEMPORARY}/left", "x"),
        (f"{SUPERSEDED}/before/commits/000000.json", '{"unit": 0}'),
        (f"{FOREIGN}/before/notes.txt", "mine"),
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    for path in (out / "_smsbatch/attempts/000000").iterdir():
        shutil.copy(path, path.with_name(f"lost{path.suffix}"))
    assert (out / "plan/digests.1.json").exists()
    assert list((out / "_smsbatch/drift").iterdir())
    assert list((out / "_smsbatch/commits").glob("*.g1.json"))
    return job


def run_of(finished: Path, folder: Path) -> sb.Manifest:
    """The manifest of a copy of the run in `folder`."""
    shutil.copytree(finished.parent / "out", folder / "out")
    return sb.load(finished, [f"output.path={folder / 'out'}"])


def among(places: Iterable[str], table: Iterable[str]) -> bool:
    return all(place.startswith(tuple(table)) for place in places)


@pytest.mark.parametrize(
    "seeds", [range(20), *(pytest.param(range(n, n + 20), marks=pytest.mark.slow) for n in range(20, 300, 20))]
)
def test_any_change_is_found_and_undone(seeds: range, finished: Path, tmp_path: Path) -> None:
    for seed in seeds:
        manifest = run_of(finished, tmp_path / str(seed))
        out = tmp_path / str(seed) / "out"
        before, table = files_of(out), rows(out)
        assert sb.verify(manifest, full=True).ok
        made = change(out, random.Random(seed))
        for path in (out / HEARTBEATS).iterdir():  # a fresh one would keep `repair` away for a minute
            os.utime(path, (time.time() - 1000,) * 2)
        check_found(manifest, made)
        check_undone(manifest, made, out, before, table)
        shutil.rmtree(out)


def check_found(manifest: sb.Manifest, made: Change) -> None:
    found = sb.verify(manifest, full=True)
    seen = bool(found.problems or found.pending or found.without_attempts or found.edited)
    assert seen != among(made.places, CANNOT_MATTER), f"{made}: {found}"


def check_undone(
    manifest: sb.Manifest, made: Change, out: Path, before: dict[str, bytes], table: dict[str, dict[str, Any]]
) -> None:
    if NEEDS_THE_SOURCE & set(made.places):
        with pytest.raises(sb.DriftError, match="cannot be written again: the source has changed since the plan"):
            sb.repair(manifest, full=True)
        return
    mended = sb.repair(manifest, full=True)
    assert mended.ok, f"{made}: {mended}"
    sb.run(manifest)
    assert sb.verify(manifest, full=True).ok, made
    after = files_of(out)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    left = {name for name in changed if not among([name], CANNOT_MATTER)}
    left -= {name for name in made.places if among([name], NOT_RESTORED)}
    if any(place.startswith(DRIFT) for place in made.places):
        left -= {"index.json", "report.html"}  # they no longer tell of the change
    if any("compute unit" in line for line in mended.done):
        left = {name for name in left if not among([name], (ATTEMPTS, COMMITS, PUBLISHED, "metrics/", *REPORT))}
    assert left == set(), f"{made}: {mended.done}"
    assert comparable(rows(out)) == comparable(table), made


def comparable(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows without what another computation may change: retried samples were computed in a smaller batch."""
    return {
        key: {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in row.items()
            if name not in OF_ONE_COMPUTATION
        }
        for key, row in table.items()
    }
