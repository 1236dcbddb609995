"""`measure` and `style_distance`: compare runs and sets of pictures with a style, as in the paper's tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smsbatch import tiny
from smsbatch.data import pixels
from smsbatch.data.index import read_index
from smsbatch.data.reader import Reader
from smsbatch.data.shards import read_rows, read_tar
from smsbatch.errors import RequestError, SampleError
from smsbatch.manifest import Manifest
from smsbatch.metrics import Lpips, hub, style
from smsbatch.runs.run import Run, store_of
from smsbatch.storage.store import storage_errors

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Measured:
    """The measures of a run's stylized samples.

    Attributes:
        pictures: the result of each key, [H, W, 3] uint8, in the run's order; sources are fitted as the run fits them.
        values: averages over the samples by name: `LPIPS` and `style distance`; `CFSD`, `FID` and `ArtFID` (if the
            reference has pictures), `PickScore` (the mean of exp(s - s of the source), as in the paper) and `HPSv2`, if
            the weights of the measure are on this machine.
        seconds: computing time per sample.
        missing: the reason for each measure that is missing.
    """

    pictures: Mapping[str, Picture]
    values: Mapping[str, float]
    seconds: float
    missing: Mapping[str, str]


def style_distance(pictures: Iterable[Picture | str | Path], reference: str | Path) -> float:
    """The distance of a set of pictures from a style: Frechet distance of AlexNet features, summed over five layers.

    The reference itself has distance 0. Compare only sets of about the same size and number of pixels.

    Args:
        pictures: arrays [H, W, 3] uint8, or files.
        reference: statistics (`tiny:styles/oil.reference.safetensors`), or a folder of pictures in the style.

    Raises:
        RequestError: there are no pictures, a file or the reference is missing, or an array has another shape or type.
        SampleError: a picture cannot be decoded.
    """
    if isinstance(pictures, str | Path):
        pictures = [pictures]
    return style.style_distance(map(_tensor, map(_read, pictures)), _reference(reference))


def measure(where: str | Manifest, reference: str | Path, *, of_sources: bool = False) -> Measured:
    """Compare a finished run with its sources and a style, as the paper's Tables 1 and 4 do.

    Memory holds all sources and results, so this is for thousands of samples, not millions.

    Args:
        where: its output path or URL, or its manifest as returned by `load`.
        reference: as for `style_distance`; FID and ArtFID need a folder.
        of_sources: measure the sources in place of the results, as in the paper's column "Real".

    Raises:
        RequestError: there is no run or no reference, or the run has no stylized samples.
        SampleError: a source can no longer be read.
        StorageError: the run cannot be read.
    """
    rows, sources, results = _pairs(where)
    if not rows:
        raise RequestError(f"{store_of(where).url}: nothing is stylized here that could be measured")
    if of_sources:
        results = sources
    prompts = [row["prompt"] for row in rows]
    # The run's own LPIPS is better: it was measured before the pictures were compressed.
    lpips = float(np.mean([row["lpips"] for row in rows])) if "lpips" in rows[0] and not of_sources else None
    values, missing = _values(sources, results, prompts, reference, lpips)
    seconds = 0.0 if of_sources else float(np.mean([row["seconds"] for row in rows]))
    pictures = {row["key"]: picture for row, picture in zip(rows, results, strict=True)}
    return Measured(pictures, values, seconds, missing)


def _pairs(where: str | Manifest) -> tuple[list[dict[str, Any]], list[Picture], list[Picture]]:
    """The successful rows of a run, their sources and their results."""
    run = Run.open(where)
    store, manifest = run.store, run.fill(run.dataset)
    reader = Reader.of(manifest.source, run.storage)
    entries = {entry.key: entry for entry in read_index(run.index)}
    rows, sources, results = [], [], []
    for _, shard in sorted(run.ledger.publications().items()):
        with storage_errors("read", store.locate(shard.parquet)), store.open_read(shard.parquet) as file:
            done = {
                row["key"]: row for row in read_rows(file, store.locate(shard.parquet)) if row["status"] == "success"
            }
        with storage_errors("read", store.locate(shard.tar)), store.open_read(shard.tar) as file:
            for key, fields in read_tar(file):
                rows.append(done[key] | {"prompt": manifest.fill(done[key]["prompt"])})
                results.append(pixels.decode(fields[manifest.output.format], min_side=1))
                original = reader.read(entries[key].fields[entries[key].image])
                sources.append(pixels.source_picture(original, manifest.image)[0])
    return rows, sources, results


def _values(
    sources: Sequence[Picture],
    results: Sequence[Picture],
    prompts: Sequence[str],
    reference: str | Path,
    lpips: float | None,
) -> tuple[dict[str, float], dict[str, str]]:
    def mean(metric: Any) -> float:
        pairs = zip(sources, results, strict=True)
        return float(np.mean([float(metric(_tensor(before), _tensor(after))) for before, after in pairs]))

    values = {
        "LPIPS": mean(Lpips()) if lpips is None else lpips,
        "style distance": style.style_distance(map(_tensor, results), _reference(reference)),
    }
    missing = {name: reason for name in hub.MEASURES if (reason := hub.missing(name)) is not None}
    if "CFSD" not in missing:
        values["CFSD"] = mean(hub.Cfsd())
    if "ArtFID" not in missing and not _folder(reference).is_dir():
        missing["ArtFID"] = f"{reference} has no pictures; give a folder of them"
    if "ArtFID" not in missing:
        network = hub.ArtInception()
        sets = (map(_tensor, results), _pictures(reference))
        ours, theirs = (torch.cat([network(image) for image in images]) for images in sets)
        values["FID"] = hub.fid(ours, theirs)
        values["ArtFID"] = (1 + values["LPIPS"]) * (1 + values["FID"])
    if "PickScore" not in missing:
        pick = hub.PickScore()
        values["PickScore"] = float((pick(results, prompts) - pick(sources, prompts)).exp().mean())
    if "HPSv2" not in missing:
        values["HPSv2"] = float(hub.HpsV2()(map(_tensor, results), prompts).mean())
    return values, missing


def _reference(reference: str | Path) -> style.StyleReference:
    path = _folder(reference)
    return style.StyleReference.of(_pictures(reference)) if path.is_dir() else style.StyleReference.load(path)


def _folder(reference: str | Path) -> Path:
    return Path(tiny.resolve(str(reference))).expanduser()


def _pictures(reference: str | Path) -> Iterator[Tensor]:
    folder = _folder(reference)
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in {".jpg", ".jpeg", ".png", ".webp"}]
    if not files:
        raise RequestError(f"{reference}: no pictures in this folder; give one with jpg, png or webp files")
    return map(_tensor, map(_read, files))


def _read(picture: Picture | str | Path) -> Picture:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3:
            raise RequestError(f"a picture is [H, W, 3] uint8, not {list(picture.shape)} {picture.dtype}; convert it")
        return picture
    try:
        return pixels.decode(Path(tiny.resolve(str(picture))).expanduser().read_bytes())
    except OSError as error:
        raise RequestError(f"{picture}: cannot be read: {error.strerror or error}") from error
    except SampleError as error:
        raise SampleError(error.code, f"{picture}: {error}") from error


def _tensor(picture: Picture) -> Tensor:
    """[H, W, 3] uint8 to [1, 3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
