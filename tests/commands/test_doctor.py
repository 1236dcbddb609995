"""The findings of `doctor`, each caused on purpose; no check hangs, and no probe leaves a file."""

from __future__ import annotations

import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.jobs import make_photos, write_manifest
from support.s3server import Server

import smsbatch as sb
from smsbatch.commands.doctor import Check, doctor
from smsbatch.storage.store import Store


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    assert all(check.do for check in checks if check.state == "fail"), "who is told of a fault is told what to do"
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    folder = tmp_path_factory.mktemp("doctor")
    return write_manifest(folder, model, lora, make_photos(folder / "photos"))


def test_this_machine() -> None:
    found = by_name(doctor())
    assert list(found) == ["python", "torch", "cores", "scratch", "ray"]
    assert sb.__name__ in found["python"].found
    assert all(check.state != "fail" for name, check in found.items() if name != "scratch")


def test_a_manifest_that_would_run(file: Path) -> None:
    found = by_name(doctor(sb.load(file)))
    assert {name for name, check in found.items() if check.state == "fail"} == set()
    assert found["create-only"].state == found["clock"].state == found["source"].state == found["weights"].state == "ok"
    assert "put, read, list, delete" in found["output"].found
    assert "no run yet" in found["output"].found
    left = [path for path in (file.parent / "out").rglob("*") if path.is_file()]
    assert left == []


@pytest.mark.parametrize(
    ("override", "name", "said"),
    [
        ("source.urls=/nowhere", "source", "/nowhere"),
        ("source.urls={empty}", "source", "no pictures in it"),
        ("style.lora=/nowhere", "weights", "no such file /nowhere"),
        ("model.path=/nowhere", "weights", "neither a folder"),
        ("output.path={file}/out", "output", "cannot"),
        ("output.path=nosuch://x/y", "output", "nosuch"),
    ],
)
def test_what_would_not(override: str, name: str, said: str, file: Path, tmp_path: Path) -> None:
    found = by_name(doctor(sb.load(file, [override.format(empty=tmp_path, file=file)])))
    assert found[name].state == "fail"
    assert said in found[name].found


def test_on_s3(file: Path, s3: Server) -> None:
    url, options = f"s3://{s3.bucket()}/run", [f"storage.endpoint={s3.endpoint}", "storage.region=us-east-1"]
    found = by_name(doctor(sb.load(file, [f"output.path={url}", *options])))
    assert found["output"].state == found["clock"].state == "ok"
    assert found["create-only"].state in ("ok", "warn")
    assert s3.names(url) == set()
    missing = by_name(doctor(sb.load(file, ["output.path=s3://no-such-bucket/run", *options])))
    assert missing["output"].state == "fail"
    assert "no-such-bucket" in missing["output"].found


def test_an_endpoint_that_never_answers_does_not_hang(file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections and never answers
        options = [f"storage.endpoint=http://127.0.0.1:{server.getsockname()[1]}", "storage.timeout_s=0.5"]
        begun = time.monotonic()
        found = by_name(doctor(sb.load(file, ["output.path=s3://bucket/run", *options])))
        assert time.monotonic() - begun < 30
    assert found["output"].state == "fail"


def test_a_cluster(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/cluster/test_connect.py` tests what answers at an address."""
    asked = []
    monkeypatch.setattr("smsbatch.commands.doctor.check_answers", asked.append)
    ray = by_name(doctor(sb.load(file, ["compute.pool=ray", "compute.address=head"])))["ray"]
    assert (ray.state, asked) == ("ok", ["head:6379"])
    monkeypatch.setenv("RAY_ADDRESS", "ray://head")
    assert "a cluster answers at ray://head:10001" in by_name(doctor())["ray"].found
    local = by_name(doctor(sb.load(file, ["compute.pool=ray", "compute.address=local"])))["ray"]
    assert (local.state, asked) == ("ok", ["head:6379", "ray://head:10001"])
    assert "each run starts a cluster here" in local.found


def test_a_store_that_cannot_create_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "supports_create", lambda store: False)
    check = by_name(doctor(sb.load(file)))["create-only"]
    assert check.state == "warn"
    assert "only the driver commits" in check.found


@pytest.mark.parametrize(("seconds", "state"), [(5, "ok"), (200, "warn"), (-200, "warn"), (2000, "fail")])
def test_a_clock_that_is_off(seconds: int, state: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "modified", lambda store, path: datetime.now(UTC) - timedelta(seconds=seconds))
    assert by_name(doctor(sb.load(file)))["clock"].state == state


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 5e8})())
    check = by_name(doctor())["scratch"]
    assert check.state == "fail"
    assert "TMPDIR" in check.do


def test_an_output_path_alone(tmp_path: Path) -> None:
    found = by_name(doctor(str(tmp_path)))
    assert found["output"].state == "ok"
    assert "source" not in found


def test_a_folder_of_somebody_else_is_left_alone(file: Path, tmp_path: Path) -> None:
    """`doctor` reports a folder that `run` would refuse, and leaves nothing in it."""
    (tmp_path / "holiday.jpg").write_bytes(b"mine")
    found = by_name(doctor(sb.load(file, [f"output.path={tmp_path}"])))["output"]
    assert found.state == "fail"
    assert "is no run and not empty" in found.found
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_the_first_picture_of_a_table_is_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("url\nnowhere.png\n")
    overrides = [
        f"source={{format: table, urls: {tmp_path / 'table.csv'}}}",
        f"output.path={tmp_path / 'out'}",
    ]
    found = by_name(doctor(sb.load(file, overrides)))["source"]
    assert found.state == "fail"
    assert "nowhere.png" in found.found
