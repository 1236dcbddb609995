"""`README.md` of a run: the card of the dataset it made, so that a folder handed on explains itself.

Contract: a pure function of the report. Text from outside stands in code spans and fences only, where Markdown reads no
markup; what smsbatch cannot know, the licence, is left to the user by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from smsbatch.manifest import Style
from smsbatch.report.model import duration, generator_name, moment, rate
from smsbatch.text import count

if TYPE_CHECKING:
    from smsbatch.report.model import Report

__all__ = ["card"]

_OBJECTIVES = {  # name, and its paper on arXiv
    "sms": ("Style Matching Score", "2503.07601"),
    "vsd": ("Variational Score Distillation", "2305.16213"),
    "sds": ("Score Distillation Sampling", "2209.14988"),
    "dds": ("Delta Denoising Score", "2304.07090"),
    "pds": ("Posterior Distillation Sampling", "2311.13831"),
    "cds": ("Contrastive Denoising Score", "2311.18608"),
}


def card(report: Report) -> str:
    settings = report.settings
    output = settings["output"]["format"]
    shards = "shards/000000.tar" if report.shards == 1 else f"shards/{{000000..{report.shards - 1:06d}}}.tar"
    how, by = _distilled(report) if report.generator is not None else _optimized(settings)
    made = [
        *by,
        ("source", ", ".join(map(_code, settings["source"]["urls"]))),
        ("seed", str(settings["seed"])),
        ("images", f"{report.succeeded:,} stylized, {report.failed:,} failed, of {report.planned:,} planned"),
        ("files", f"{count(report.shards, 'shard')} of {_code(output)} in tar, with one Parquet each"),
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
        f"Images stylized {how} by smsbatch.",
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
        *_table(("file", "SHA-256"), [(_code(path), _code(digest)) for path, digest in report.weights.items()]),
        "",
        "## Licence",
        "",
        "**Not stated: state it here, and in the first lines of this file.** The images derive from the source images, "
        "the models and the LoRAs named above, and the licences of all of them apply.",
        "",
    ]
    return "\n".join(parts)


def _optimized(settings: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    """With what, and its lines of the table, of a run that has asked the scores for every image."""
    model, objective = settings["model"], settings["objective"]
    name, paper = _OBJECTIVES[objective["name"]]
    told = f"{_code(objective['name'])}, preset {_code(objective['preset'])}, {count(objective['steps'], 'step')}"
    return f"with [{name}](https://arxiv.org/abs/{paper})", [
        ("style", _style(Style.model_validate(settings["style"]))),
        ("model", _code(model["path"]) + (f" at {_code(model['revision'])}" if model["revision"] else "")),
        ("objective", told),
    ]


def _distilled(report: Report) -> tuple[str, list[tuple[str, str]]]:
    """The same of a run by a generator."""
    told = report.generator or {}
    lines = [("generator", f"{_code(report.settings['generator'])}, {told['parameters']:,} parameters")]
    loras = told.get("lora") or ()
    parts = [_code(told["style"])] if told.get("style") else []
    parts += [f"LoRA {_code(path)}" for path in ([loras] if isinstance(loras, str) else loras)]
    if parts:
        lines.append(("style", ", ".join(parts)))
    if told.get("model"):
        lines.append(("distilled from", _code(str(told["model"]))))
    return f"in one pass of the generator {_code(generator_name(report))}", lines


def _style(style: Style) -> str:
    parts = [_code(style.prompt), *(f"LoRA {_code(path)} at scale {scale:g}" for path, scale in style.loras)]
    if style.model is not None:
        parts.append(f"model {_code(style.model.path)}")
    return ", ".join(parts)


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
    rows = [(_code(one.code), f"{one.count:,}", _code(f"{one.key}: {one.message}")) for one in report.failures]
    return ["## Failures", "", *_table(("code", "images", "for example"), rows), ""]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _code(text: str) -> str:
    """A code span of one line, for a table: longer backticks than any inside, and no bar that would end the cell."""
    line = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{line}{space}{fence}"
