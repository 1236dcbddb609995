"""The report of a finished run: its numbers, the requests for them, its files, and runs that get no report."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.ledgers import commit_unit
from support.made_up_run import HOSTILE, MIXED, failed, make_run, stylized
from support.s3server import Faults, Server

from smsbatch.data.index import read_units
from smsbatch.data.sample import Outcome
from smsbatch.errors import RequestError, RunError, StorageError
from smsbatch.report import write as report_module
from smsbatch.report.model import Distribution
from smsbatch.report.write import summarize, write_report
from smsbatch.runs.layout import COPY, RUN, is_reported
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.records import dump_record
from smsbatch.runs.run import Run
from smsbatch.storage.store import Store

# ----------------------------------------------------------------------------------------------------------- numbers


def test_every_planned_image_is_counted_once(tmp_path: Path) -> None:
    report = summarize(Run.open(make_run(tmp_path, MIXED)))
    assert (report.planned, report.succeeded, report.failed) == (12, 9, 3)
    assert (report.units, report.shards, report.workers) == (3, 2, 1)
    assert report.seconds == pytest.approx(9 * 0.5)
    assert report.images_per_second == pytest.approx(12 / report.wall_seconds)
    assert (report.name, report.settings["objective"]["steps"]) == ("made-up", 20)


def test_failures_come_by_code_with_the_first_as_an_example(tmp_path: Path) -> None:
    report = summarize(Run.open(make_run(tmp_path, MIXED)))
    assert report.errors == {"decode_error": 2, "bad_caption": 1}
    assert [(one.code, one.key, one.message) for one in report.failures] == [
        ("decode_error", "p001", "damaged JPEG data: broken"),
        ("bad_caption", "p010", HOSTILE),
    ]


def test_a_metric_is_described_over_the_stylized_images_that_have_it(tmp_path: Path) -> None:
    outcomes = [*MIXED[:11], stylized(11, metrics={}), stylized(12, metrics={"lpips": float("nan")})]
    one = summarize(Run.open(make_run(tmp_path, outcomes))).metrics["lpips"]
    values = [n / 100 for n in (0, 2, 3, 4, 5, 6, 7, 8)]
    assert one.count == len(values)
    assert (one.low, one.high) == (pytest.approx(0.0), pytest.approx(0.08))
    assert one.mean == pytest.approx(np.mean(values))
    assert one.quantiles["p25"] == pytest.approx(np.percentile(values, 25))


@settings(deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, allow_subnormal=False), min_size=1, max_size=60))
def test_a_histogram_holds_every_value_in_round_bins(values: list[float]) -> None:
    one = Distribution.of(values)
    assert sum(one.counts) == one.count == len(values)
    assert len(one.edges) == len(one.counts) + 1 <= 30
    assert list(one.edges) == sorted(set(one.edges))
    slack = 1e-9 * max(map(abs, one.edges))
    assert one.edges[0] - slack <= min(values)
    assert max(values) <= one.edges[-1] + slack


def test_time_is_that_of_the_work_and_not_of_the_pause_between_two_drivers(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    for unit, (finished, seconds) in enumerate([("10:00:10", 10.0), ("10:00:15", 10.0), ("12:00:05", 5.0)]):
        name = f"_smsbatch/commits/{unit:06d}.json"
        record = json.loads(store.read(name)) | {"finished": f"2026-01-01T{finished}+00:00", "seconds": seconds}
        store.put(name, dump_record(record))
    report = summarize(Run.open(store))
    assert (report.started, report.finished) == ("2026-01-01T10:00:00+00:00", "2026-01-01T12:00:05+00:00")
    assert report.wall_seconds == pytest.approx(15 + 5)


def test_numbers_are_plain_data(tmp_path: Path) -> None:
    report = summarize(Run.open(make_run(tmp_path, MIXED)))
    assert json.loads(json.dumps(report.to_dict()))["metrics"]["lpips"]["count"] == 9


# ----------------------------------------------------------------------------------------------------------- requests


def requests(faults: Faults) -> Counter[str]:
    """The number of requests since the previous call, by folder."""
    asked = Counter(urlsplit(request.path).path.split("/", 3)[-1].rpartition("/")[0] for request in faults.requests)
    faults.requests.clear()
    return asked


@pytest.fixture
def remote(tmp_path: Path, s3: Server) -> Iterator[Callable[[int], tuple[Store, Faults]]]:
    """A factory of runs with a given number of shards on S3, and the proxy that records their requests."""
    with ExitStack() as stack:

        def made(shards: int) -> tuple[Store, Faults]:
            folder = tmp_path / str(shards)
            folder.mkdir()
            local = make_run(folder, [stylized(n) for n in range(8 * shards)])
            url = f"s3://{s3.bucket()}/run"
            s3.upload(Path(local.url), url)
            faults = stack.enter_context(Faults(s3.endpoint))
            return Store(url, s3.storage.model_copy(update={"endpoint": faults.endpoint})), faults

        yield made


def test_a_shard_more_costs_two_requests_and_nothing_when_nothing_is_to_do(
    remote: Callable[[int], tuple[Store, Faults]],
) -> None:
    cost: dict[str, list[int]] = {}
    for shards in (2, 6):
        store, faults = remote(shards)
        ledger = Ledger(store)
        commits = ledger.commits()
        requests(faults)
        summarize(Run.open(store), commits)
        cost.setdefault("counting", []).append(requests(faults).total())
        written = write_report(Run.open(store), commits)
        published = ledger.publications()
        requests(faults)
        assert summarize(Run.open(store), commits, published) == written
        cost.setdefault("nothing to do", []).append(requests(faults).total())
        summarize(Run.open(store))
        cost.setdefault("nothing to do, asked by itself", []).append(requests(faults).total())
    assert {name: (many - few) / 4 for name, (few, many) in cost.items()} == {
        "counting": 2,  # the shard's record and its rows
        "nothing to do": 0,
        "nothing to do, asked by itself": 1,  # the shard's record, several at a time
    }
    assert cost["nothing to do"][0] < 10


# ----------------------------------------------------------------------------------------------------- stored numbers


def test_the_numbers_are_kept_in_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_run(tmp_path, MIXED)
    counted = summarize(Run.open(store))
    assert write_report(Run.open(store)) == counted
    monkeypatch.setattr(report_module, "_count", None)  # counting again would fail
    assert summarize(Run.open(store)) == counted


def forge(store: Store) -> None:
    index = json.loads(store.read("index.json"))
    index["report"]["numbers"]["seconds"] = 1e9
    store.put("index.json", json.dumps(index).encode())


def tear(store: Store) -> None:
    store.put("index.json", b"{}")


def drop(store: Store) -> None:
    store.delete("index.json")


@pytest.mark.parametrize("hurt", [forge, tear, drop])
def test_numbers_that_are_not_as_they_were_written_are_counted_anew(
    hurt: Callable[[Store], None], tmp_path: Path
) -> None:
    store = make_run(tmp_path, MIXED)
    written = write_report(Run.open(store))
    hurt(store)
    assert summarize(Run.open(store)) == written


def test_numbers_of_an_older_generation_are_counted_anew(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    assert write_report(Run.open(store)).failed == 3
    ledger, units = Ledger(store, metrics=("lpips",)), read_units(store)
    commit_unit(ledger, units[0], [stylized(n) for n in range(4)], worker="w", seconds=1.0, generation=1)
    ledger.publish(0, units[:2])
    assert summarize(Run.open(store)).failed == 2


# ----------------------------------------------------------------------------------------------- runs without report


def test_no_run_no_report(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no run here"):
        write_report(Run.open(Store(tmp_path)))


def test_a_run_that_is_not_finished_has_no_report(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED, commit=False)
    with pytest.raises(RunError, match="shard 000000 is not published yet; run the manifest again"):
        write_report(Run.open(store))
    planned = ["plan/digests.json", "plan/objects.parquet", "plan/samples.parquet", "plan/units.parquet"]
    assert store.list() == ["_smsbatch/run.json", *planned, "run.json"]


def test_a_shard_that_was_deleted_is_missed(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    store.delete("shards/000001.tar")
    with pytest.raises(RunError, match="shard 000001"):
        write_report(Run.open(store))


def test_rows_of_other_samples_than_planned_are_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path, [*MIXED[:11], stylized(11, key="another")])
    with pytest.raises(
        RunError, match=r"000001.parquet does not have the rows of its 4 planned images; run `smsbatch repair"
    ):
        write_report(Run.open(store))


def test_rows_that_cannot_be_read_are_to_be_repaired(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    store.put("metrics/000001.parquet", b"x" * (store.size("metrics/000001.parquet") or 0))
    with pytest.raises(RunError, match=r"000001.parquet cannot be read; run `smsbatch repair --full "):
        write_report(Run.open(store))


def test_a_gap_between_plan_and_rows_is_refused(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    run = json.loads(store.read("run.json"))
    run["planned"]["samples"] = 13
    for name in (RUN, COPY):
        store.put(name, dump_record(run))
    with pytest.raises(RunError, match=r"13 images are planned, but 9 \+ 3 have a row"):
        write_report(Run.open(store))
    assert not is_reported(store)


# ------------------------------------------------------------------------------------------------------------- files


def test_a_second_report_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, written = make_run(tmp_path, MIXED), []
    before = set(store.list())
    for name in ("put", "create"):
        method = getattr(Store, name)
        monkeypatch.setattr(Store, name, lambda *args, method=method: (written.append(args[1]), method(*args))[1])
    write_report(Run.open(store))
    assert written == ["README.md", "report.html", "index.json"]
    assert set(store.list()) - before == set(written)
    first = {name: store.read(name) for name in written}
    write_report(Run.open(store))
    assert {name: store.read(name) for name in written} == first


def test_half_a_report_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, put = make_run(tmp_path, MIXED), Store.put

    def full(self: Store, path: str, source: bytes | Path) -> None:
        if path == "report.html":
            raise StorageError("no space left")
        put(self, path, source)

    monkeypatch.setattr(Store, "put", full)
    with pytest.raises(StorageError):
        write_report(Run.open(store))
    assert not is_reported(store)


def test_the_index_names_every_file_with_its_digest(tmp_path: Path) -> None:
    store = make_run(tmp_path, MIXED)
    write_report(Run.open(store))
    index = json.loads(store.read("index.json"))
    assert [index[name] for name in ("planned", "succeeded", "failed")] == [12, 9, 3]
    assert [shard["samples"] for shard in index["shards"]] == [8, 4]
    listed = [shard[kind] for shard in index["shards"] for kind in ("tar", "parquet")]
    assert sorted(file["path"] for file in listed) == [*store.list("metrics"), *store.list("shards")]
    for file in listed:
        data = store.read(file["path"])
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"])


@pytest.mark.parametrize("outcomes", [MIXED, MIXED[:8]], ids=["two shards", "one shard"])
def test_the_cards_programs_load_the_run(tmp_path: Path, outcomes: list[Outcome]) -> None:
    store = make_run(tmp_path, outcomes)
    write_report(Run.open(store))
    programs = re.findall(r"```python\n(.*?)```", store.read("README.md").decode(), re.DOTALL)
    by_webdataset, by_datasets, by_pyarrow = programs
    compile(by_datasets, "README.md", "exec")  # not run: a large package for one line
    loop = by_webdataset + "    print(sample['__key__'], picture.size, caption)\n"
    found = subprocess.run(
        [sys.executable, "-c", f"{loop}\n{by_pyarrow}\nprint(rows.num_rows)"],
        cwd=store.url,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    made = [outcome for outcome in outcomes if outcome.succeeded]
    assert found == [*(f"{outcome.key} (64, 48) {outcome.caption}" for outcome in made), str(len(made))]


def test_the_card_keeps_foreign_text_in_code_spans_of_one_cell(tmp_path: Path) -> None:
    foreign = "a | b\n# `` <img src=x>"
    store = make_run(tmp_path, [stylized(0), failed(1, "decode_error", foreign)])
    write_report(Run.open(store))
    lines = store.read("README.md").decode().splitlines()
    assert r"| `decode_error` | 1 | ``` p001: a \| b # `` <img src=x> ``` |" in lines


@pytest.mark.parametrize(
    ("style", "told"),
    [
        ({"lora": "oil.safetensors"}, "`oil`, LoRA `oil.safetensors` at scale 0.8"),
        (
            {"lora": ["a.safetensors", "b.safetensors"], "scale": [1, -0.5], "model": "other/base"},
            "`oil`, LoRA `a.safetensors` at scale 1, LoRA `b.safetensors` at scale -0.5, model `other/base`",
        ),
        ({}, "`oil`"),
    ],
    ids=["one", "several", "none"],
)
def test_the_card_names_every_part_of_the_style_and_the_objective(
    tmp_path: Path, style: dict[str, object], told: str
) -> None:
    store = make_run(tmp_path, [stylized(0)], style={"prompt": "oil"} | style, objective={"name": "dds"})
    write_report(Run.open(store))
    card = store.read("README.md").decode()
    assert f"| style | {told} |" in card
    assert "[Delta Denoising Score](https://arxiv.org/abs/2304.07090)" in card
    assert "200 steps of DDS each" in store.read("report.html").decode()
