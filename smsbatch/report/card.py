"""`README.md` of a run: the card of the dataset it made, so that a folder handed on explains itself.

Contract: a pure function of the report. Text from outside stands in code spans and fences only, where Markdown reads no
markup; what smsbatch cannot know, the licence, is left to the user by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from smsbatch.report.model import duration, moment, rate
from smsbatch.text import code_span, count

if TYPE_CHECKING:
    from smsbatch.report.model import Report


def card(report: Report) -> str:
    settings = report.settings
    output = settings["output"]["format"]
    shards = "shards/000000.tar" if report.shards == 1 else f"shards/{{000000..{report.shards - 1:06d}}}.tar"
    work = report.description
    made = [
        *work.facts,
        ("source", ", ".join(map(code_span, settings["source"]["urls"]))),
        ("seed", str(settings["seed"])),
        ("images", f"{report.succeeded:,} stylized, {report.failed:,} failed, of {report.planned:,} planned"),
        ("files", f"{count(report.shards, 'shard')} of {code_span(output)} in tar, with one Parquet each"),
        ("time", f"{duration(report.wall_seconds)} on {count(report.workers, 'worker')}, images at {rate(report)}"),
        ("made", f"{moment(report.finished)}, smsbatch {report.versions['smsbatch']}"),
    ]
    parts = [
        "---",
        "license: other  # yours to state, see below",
        f"pretty_name: {json.dumps(report.name)}",
        "task_categories: [image-to-image]",
        "tags: [smsbatch, webdataset, style-transfer]",
        "---",
        "",
        f"# {report.name}",
        "",
        f"Images stylized {work.method} by smsbatch.",
        "",
        *_table(("", ""), made),
        "",
        *_metrics(report),
        *_failures(report),
        "## Load it",
        "",
        "Each sample is `<key>."
        + output
        + "` with `<key>.json` (the source's own, else where it comes from) and, where there is a caption, "
        "`<key>.txt`. `metrics/` has a row for every planned image, failed ones too.",
        "",
        "```python",
        "import webdataset as wds",
        "",
        f'for sample in wds.WebDataset("{shards}", shardshuffle=False).decode("pil"):',
        f'    picture, caption = sample["{output}"], sample.get("txt")',
        "```",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("webdataset", data_files="shards/*.tar", split="train", streaming=True)',
        "```",
        "",
        "```python",
        "import pyarrow.parquet as pq",
        "",
        'rows = pq.read_table("metrics", filters=[("status", "=", "success")])',
        "```",
        "",
        "`index.json` lists every file with its size and SHA-256; `report.html` shows pictures; `run.json` holds every "
        "setting.",
        "",
        "## Weights",
        "",
        *_table(("file", "SHA-256"), [(code_span(path), code_span(digest)) for path, digest in report.weights.items()]),
        "",
        "## Licence",
        "",
        "**Not stated: state it here, and in the first lines of this file.** The images derive from the source images, "
        "the models and the LoRAs named above, and the licences of all of them apply.",
        "",
    ]
    return "\n".join(parts)


def _metrics(report: Report) -> Iterable[str]:
    if not report.metrics:
        return []
    rows = [
        (name, f"{one.mean:.3f}", *(f"{value:.3f}" for value in one.quantiles.values()))
        for name, one in report.metrics.items()
    ]
    head = ("metric", "mean", *next(iter(report.metrics.values())).quantiles)
    return ["## Metrics", "", "Of the stylized images, against their sources.", "", *_table(head, rows), ""]


def _failures(report: Report) -> Iterable[str]:
    if not report.failures:
        return []
    rows = [(code_span(one.code), f"{one.count:,}", code_span(f"{one.key}: {one.message}")) for one in report.failures]
    return ["## Failures", "", *_table(("code", "images", "for example"), rows), ""]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
