"""Index the source of a manifest with the workers of a pool, for a plan or for a source that has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from smsbatch.data.captions import Contents, unused_rules
from smsbatch.data.index import Part
from smsbatch.data.indexing import Built, build_index
from smsbatch.data.sources import Scan, gathered, nothing_found, parts, scan
from smsbatch.manifest import Manifest
from smsbatch.storage.retries import redact
from smsbatch.storage.scratch import scratch_folder
from smsbatch.workers.pool import Pool


@contextmanager
def indexed(
    manifest: Manifest, pool: Pool, notices: list[str], chosen: bool
) -> Iterator[tuple[Sequence[Part], Path, Built, Contents]]:
    """The source's objects, their index in a temporary file, and what they hold; `notices` gets what is odd or skipped.

    Args:
        chosen: index only the samples that `skip` and `limit` choose. Otherwise all, for a changed source, where one
            sample fewer would shift the choice.
    """
    source, storage = manifest.source, manifest.storage
    limit, skip = (source.limit, source.skip) if chosen else (None, 0)
    listed = parts(source, storage)
    with scratch_folder("plan") as folder:
        index = Path(folder, "samples.parquet")
        told = Scan()
        names = [part.url for part in listed] if source.format == "table" else []
        task = partial(scan, source=source, storage=storage, seed=manifest.seed)
        with closing(pool.map(task, listed)) as scanned:
            built = build_index(index, gathered(scanned, told), limit, skip, names)
        notices += map(redact, told.notices)
        contents = Contents(built.samples, built.captions, dict(told.left), dict(told.passed))
        if built.samples == 0:
            raise nothing_found(source, notices, contents)
        notices += unused_rules(source, built.captions)
        yield listed, index, built, contents
