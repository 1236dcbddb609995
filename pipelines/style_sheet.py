"""Pictures in several styles, side by side: sources in the first row, a row for every style below.

    python pipelines/style_sheet.py manifests/demo.yaml sheet.png PICTURE... \
        --style tiny:styles/oil.safetensors="oil painting style" --style ...

The caption of `fox.jpg` is in `fox.txt`, if there is one. Without `--style` the manifest's is shown.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageOps

import smsbatch as sb

GAP = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("sheet")
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--style", action="append", default=[], metavar="LORA=PROMPT")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()

    rows: list[list[Image.Image]] = []
    for style in arguments.style or [None]:
        lora, _, prompt = (style or "").partition("=")
        overrides = [f"style.lora={lora}", f"style.prompt={prompt}"] if style else []
        stylizer = sb.Stylizer(sb.load(arguments.manifest, [*arguments.set, *overrides]))
        rows.append([])
        for picture in arguments.pictures:
            text = picture.with_suffix(".txt")
            caption = text.read_text().strip() if text.exists() else ""
            image, row = stylizer(picture, caption=caption, key=picture.stem)
            rows[-1].append(Image.fromarray(image))
            print(
                f"{picture.name}: {row['prompt']}, LPIPS {row.get('lpips', float('nan')):.3f}, {row['seconds']:.1f} s"
            )
    sources = [ImageOps.exif_transpose(Image.open(picture)).convert("RGB") for picture in arguments.pictures]
    rows.insert(0, [source.resize(result.size) for source, result in zip(sources, rows[0], strict=True)])

    width, height = (max(side) for side in zip(*(image.size for image in rows[0]), strict=True))
    size = (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    sheet = Image.new("RGB", size, "white")
    for y, images in enumerate(rows):
        for x, image in enumerate(images):
            sheet.paste(image, (x * (width + GAP), y * (height + GAP)))
    sheet.save(arguments.sheet)


if __name__ == "__main__":
    main()
