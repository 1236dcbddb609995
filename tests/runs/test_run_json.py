"""`run.json` is checked wherever it is read, and restored from its copy, or the copy from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.damage import cut_in_half, files_of, flip, leaves, torn
from support.made_up_run import finish

import smsbatch as sb
from smsbatch.commands.gc import gc
from smsbatch.commands.repair import repair
from smsbatch.commands.verify import verify
from smsbatch.runs.records import dump_record
from smsbatch.runs.run import Run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A finished run of 12 made-up samples."""
    return finish(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "_smsbatch/run.json"])
@pytest.mark.parametrize("hurt", [Path.unlink, torn, flip, cut_in_half])
def test_run_json_and_its_copy_restore_each_other(name: str, hurt: Callable[[Path], None], out: Path) -> None:
    before = files_of(out)
    hurt(out / name)
    for full in (False, True):
        assert [(problem.place, problem.remedy) for problem in verify(str(out), full).problems] == [(name, "restore")]
    if name == "run.json":
        for verb in (sb.status, gc):
            with pytest.raises(sb.StorageError, match=rf"run\.json is .*; run `smsbatch repair {out}`"):
                verb(str(out))
    else:
        assert sb.status(str(out)).finished
    other = "_smsbatch/run.json" if name == "run.json" else "run.json"
    assert repair(str(out), dry_run=True).done == (f"restore {name} from {other}",)
    assert repair(str(out)).ok
    assert files_of(out) == before


def test_both_damaged_or_of_two_runs_is_said(out: Path, tmp_path: Path) -> None:
    kept = (out / "run.json").read_bytes()
    for name in ("run.json", "_smsbatch/run.json"):
        torn(out / name)
    for verb in (verify, repair):
        with pytest.raises(
            sb.StorageError, match=r"run\.json is not .*, and its copy _smsbatch/run\.json is not .*backup"
        ):
            verb(str(out))
    (out / "run.json").write_bytes(kept)
    (out / "_smsbatch/run.json").write_bytes(dump_record(json.loads(kept) | {"name": "other"}))
    for verb in (verify, repair, sb.status):
        with pytest.raises(sb.StorageError, match="are both undamaged, but of different runs; delete the wrong one"):
            verb(str(out))


def test_every_value_of_run_json_is_proven_wherever_it_is_read(out: Path) -> None:
    whole = json.loads((out / "run.json").read_text())
    places = list(leaves(whole))
    assert len(places) > 100
    for holder, key in places:
        before, holder[key] = holder[key], "other"
        (out / "run.json").write_text(json.dumps(whole, indent=1))
        holder[key] = before
        with pytest.raises(sb.StorageError, match=r"run\.json is not what was written"):
            Run.open(str(out))


def test_an_older_run_is_proven_by_its_identity(out: Path) -> None:
    """It has no digest and no copy, so that only a change of what results depend on is seen."""
    (out / "_smsbatch/run.json").unlink()
    about = json.loads((out / "run.json").read_text())
    del about["sha256"]
    (out / "run.json").write_text(json.dumps(about, indent=2))
    assert not Run.open(str(out)).has_digests
    assert verify(str(out), full=True).ok
    assert repair(str(out), full=True).done == ()
    about["manifest"]["compute"]["batch_size"] = 3
    (out / "run.json").write_text(json.dumps(about))
    assert Run.open(str(out)).manifest.compute.batch_size == 3
    about["manifest"]["seed"] += 1
    (out / "run.json").write_text(json.dumps(about))
    with pytest.raises(sb.StorageError, match="its manifest is not that of its manifest_sha256"):
        Run.open(str(out))
