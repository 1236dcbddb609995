"""A run that version 0.1.0 began, before the package `runs` existed, can be resumed.

`tests/golden/interrupted-0.1.0` is the output of a run of four pictures, one a unit and two a shard, that the code of
commit 38844b4 began and that was killed (SIGKILL) in its last unit. Its weights are those of the
embedded model: if they change, make such a run again.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from support.jobs import commits, rows, tars

import smsbatch as sb

OLD = Path(__file__).parents[1] / "golden" / "interrupted-0.1.0"


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        found = {member.name: file.extractfile(member) for member in file}
        return {name: content.read() for name, content in found.items() if content is not None}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD / "output", tmp_path / "output"))


def test_it_is_looked_at_verified_resumed_and_reported(out: Path, tmp_path: Path) -> None:
    before = commits(out)
    status = sb.status(str(out))
    assert isinstance(status, sb.Status)
    assert (status.units_done, status.units, status.finished) == (3, 4, False)
    found = sb.verify(str(out), full=True)
    assert found.ok
    assert "units without a commit: 1 of 4" in found.pending

    manifest = sb.load(OLD / "manifest.yaml", [f"output.path={out}"])
    refusals = {"source.caption": r"source\.caption \(", "colours": r"colours \('as stored' then"}
    for number, (key, change) in enumerate(refusals.items()):
        with pytest.raises(sb.DriftError, match=rf"changed: {change}.*--allow-drift {key}"):
            sb.run(manifest, allow_drift=list(refusals)[:number])
    assert commits(out) == before
    report = sb.run(manifest, allow_drift=list(refusals))
    assert isinstance(report, sb.Report)
    assert (report.planned, report.succeeded, report.units, report.shards) == (4, 4, 4, 2)
    assert json.loads((out / "run.json").read_text())["smsbatch"] == "0.1.0"
    assert sb.verify(str(out), full=True).ok
    assert "4 of 4 images stylized" in (out / "report.html").read_text()

    after = commits(out)
    assert len(after) == 4
    assert {unit: after[unit] for unit in before} == before, "what was committed stays"
    assert tars(out)["000000.tar"] == (OLD / "output/shards/000000.tar").read_bytes()
    (old_third,) = (OLD / "output/_smsbatch/attempts/000002").glob("*.tar")
    second_shard = members(out / "shards/000001.tar")
    assert members(old_third).items() <= second_shard.items()

    fresh = tmp_path / "fresh"  # a new run on this machine gives the same last unit
    sb.run(sb.load(OLD / "manifest.yaml", [f"output.path={fresh}"]))
    (last,) = (row["key"] for row in rows(out).values() if row["unit"] == 3)
    ours, theirs = (
        {name: data for name, data in shard.items() if name.startswith(f"{last}.")}
        for shard in (second_shard, members(fresh / "shards/000001.tar"))
    )
    assert ours == theirs
    assert f"{last}.webp" in ours


def test_another_setting_is_refused_as_it_was(out: Path) -> None:
    with pytest.raises(sb.DriftError, match=r"objective\.steps \(2 then, 3 now\)"):
        sb.run(sb.load(OLD / "manifest.yaml", [f"output.path={out}", "objective.steps=3"]))
