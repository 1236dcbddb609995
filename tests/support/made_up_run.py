"""Runs as a driver leaves them before the report, with made-up rows, so that every number is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from support.ledgers import commit_unit

from smsbatch.data import pixels
from smsbatch.data.indexing import build_index
from smsbatch.data.sample import Outcome
from smsbatch.data.sources import parts, scan
from smsbatch.manifest import Manifest
from smsbatch.report.write import write_report
from smsbatch.runs.layout import COPY, RUN, SUCCESS
from smsbatch.runs.ledger import Ledger
from smsbatch.runs.plan_files import cut, write_plan
from smsbatch.runs.records import dump_record
from smsbatch.runs.run import Run
from smsbatch.storage.store import Store

HOSTILE = "</div><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def picture(seed: int, height: int = 48, width: int = 64) -> bytes:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return pixels.encode(np.repeat(np.repeat(coarse, height // 4, 0), width // 4, 1), "png")


def stylized(number: int, **changes: Any) -> Outcome:
    """The successful outcome of sample `number` of a made-up run."""
    made = Outcome(
        key=f"p{number:03d}",
        url=f"p{number:03d}.png",
        image=picture(1000 + number),
        image_field="png",
        caption=f"caption {number}",
        prompt=f"oil painting style, caption {number}",
        width=64,
        height=48,
        steps=20,
        seconds=0.5,
        metrics={"lpips": number / 100},
    )
    return replace(made, **changes)


def failed(number: int, code: str, message: str) -> Outcome:
    return Outcome(f"p{number:03d}", f"p{number:03d}.png", error_code=code, error_message=message)


def make_run(folder: Path, outcomes: Sequence[Outcome], commit: bool = True, **changes: Any) -> Store:
    """A run at folder/out as a driver leaves it before the report: four samples a unit, eight a shard."""
    for number in range(len(outcomes)):
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / f"p{number:03d}.png").write_bytes(picture(number))
    manifest = Manifest.model_validate(
        {
            "name": "made-up",
            "source": {"format": "folder", "urls": str(folder / "in")},
            "model": {"path": "tiny"},
            "style": {"lora": "tiny:styles/oil.safetensors", "prompt": "oil painting style"},
            "objective": {"steps": 20},
            "image": {"resolution": 48},
            "output": {"path": str(folder / "out"), "format": "png", "samples_per_unit": 4, "samples_per_shard": 8},
        }
        | changes
    )
    store = Store(manifest.output.path)
    listed = parts(manifest.source, manifest.storage)
    tables = [scan(part, manifest.source, manifest.storage).table for part in listed]
    built = build_index(folder / "samples.parquet", tables)
    units, shards = -(-len(outcomes) // 4), -(-len(outcomes) // 8)
    planned = {"samples": len(outcomes), "units": units, "shards": shards, "bytes": built.bytes, "samples_per_unit": 4}
    run = {
        "name": manifest.name,
        "manifest": manifest.dump(),
        "manifest_sha256": manifest.identity,
        "weights": {"tiny/unet/model.safetensors": "a" * 64},
        "versions": {"python": "3.11.2", "smsbatch": "0.1.0"},
        "planned": planned,
        "index_sha256": built.sha256,
        "commits": "workers",
        "notices": ["photos.tar: no end-of-archive blocks, perhaps cut"],
    }
    for name in (RUN, COPY):
        store.put(name, dump_record(run))
    cuts = list(cut(len(outcomes), 4, 8))
    write_plan(store, listed, folder / "samples.parquet", cuts)
    if commit:
        ledger = Ledger(store, metrics=manifest.metrics)
        for unit in cuts:
            commit_unit(ledger, unit, outcomes[unit.start : unit.stop], worker="here-0", seconds=3.0)
        for shard in {unit.shard for unit in cuts}:
            ledger.publish(shard, [unit for unit in cuts if unit.shard == shard])
    return store


MIXED = [
    stylized(0),
    failed(1, "decode_error", "damaged JPEG data: broken"),
    *(stylized(n) for n in range(2, 9)),
    failed(9, "decode_error", "not a picture in a known format"),
    failed(10, "bad_caption", HOSTILE),
    stylized(11, caption=HOSTILE),
]


def finish(folder: Path) -> Path:
    """The output of a finished run of MIXED."""
    store = make_run(folder, MIXED)
    write_report(Run.open(store))
    store.create(SUCCESS, b"")
    return folder / "out"
