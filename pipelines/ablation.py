"""The paper's Table 4 and Figure 7: SMS without its parts, and with other timesteps.

    python pipelines/ablation.py out/ablation [--manifest FILE] [--reference FILE_OR_FOLDER] [--set KEY=VALUE ...]

Every variant is a run of its own, OUT/<variant>: what was interrupted goes on. OUT/grid.png shows them side by side.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import smsbatch as sb

VARIANTS = {
    "w/o L_f, R": ["objective.identity_weight=0", "objective.relevance=off"],
    "w/o R": ["objective.relevance=off"],
    "w/o L_f": ["objective.identity_weight=0"],
    "full": [],
    "random t": ["objective.timesteps=uniform"],
    "naive t": ["objective.timesteps=linear"],
}


def options(text: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--manifest", default="manifests/ablation.yaml")
    parser.add_argument("--reference", default="tiny:styles/oil.reference.safetensors", help="statistics, or a folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every variant")
    return parser.parse_args()


def show(variants: dict[str, list[str]], given: argparse.Namespace) -> None:
    """Run every variant, print the table, draw the pictures."""
    columns: dict[str, sb.Measured] = {}
    for name, overrides in variants.items():
        folder = given.out / "".join(letter if letter.isalnum() else "-" for letter in name)
        sb.run(manifest := sb.load(given.manifest, [*overrides, *given.set, f"output.path={folder}"]))
        if not columns:
            columns["source"] = sb.measure(manifest, given.reference, of_sources=True)
        columns[name] = sb.measure(manifest, given.reference)
    metrics = list(columns["source"].values)
    print(f"| | {' | '.join(metrics)} | s / image |\n|---{'|---:' * (len(metrics) + 1)}|")
    for name, found in columns.items():
        print(f"| {name} |", *(f"{found.values[metric]:.3f} |" for metric in metrics), f"{found.seconds:.1f} |")
    print("", *(f"{metric}: {reason}" for metric, reason in columns["source"].missing.items()), sep="\n")
    keys = [key for key in columns["source"].pictures if all(key in found.pictures for found in columns.values())]
    heights, widths = zip(*(columns["source"].pictures[key].shape[:2] for key in keys), strict=True)
    width = max(widths) + 4
    grid = Image.new("RGB", (len(columns) * width, 20 + sum(heights) + 4 * len(keys)), "white")
    for x, (name, found) in enumerate(columns.items()):
        ImageDraw.Draw(grid).text((x * width, 2), name, fill="black", font_size=13)
        for y, key in enumerate(keys):
            grid.paste(Image.fromarray(found.pictures[key]), (x * width, 20 + sum(heights[:y]) + 4 * y))
    grid.save(given.out / "grid.png")


if __name__ == "__main__":
    show(VARIANTS, options(__doc__))
