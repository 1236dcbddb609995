"""A run, to be looked at: sources above, results below, in one picture.

    python pipelines/contact_sheet.py manifests/demo.yaml sheet.png [--set output.path=out/x ...]

Runs the manifest (or goes on with it, or finds it done) and lays its pictures side by side, in the order of the shards.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

import smsbatch as sb
from smsbatch.tiny import resolve

GAP = 6


def results(shard: Path, extension: str) -> list[tuple[str, Image.Image]]:
    with tarfile.open(shard) as tar:
        return [
            (member.name.removesuffix(f".{extension}"), Image.open(io.BytesIO(tar.extractfile(member).read())))
            for member in tar
            if member.name.endswith(f".{extension}")
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("sheet")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()

    manifest = sb.load(arguments.manifest, arguments.set)
    sb.run(manifest)
    out = Path(manifest.output.path)
    urls = {row["key"]: row["url"] for file in out.glob("metrics/*.parquet") for row in pq.read_table(file).to_pylist()}
    pairs = [
        (Image.open(resolve(urls[key])).convert("RGB").resize(result.size), result)
        for shard in sorted(out.glob("shards/*.tar"))
        for key, result in results(shard, manifest.output.format)
    ]
    height = max(result.height for _, result in pairs)
    sheet = Image.new("RGB", (sum(r.width + GAP for _, r in pairs) - GAP, 2 * height + GAP), "white")
    x = 0
    for source, result in pairs:
        sheet.paste(source, (x, 0))
        sheet.paste(result, (x, height + GAP))
        x += result.width + GAP
    sheet.save(arguments.sheet)


if __name__ == "__main__":
    main()
