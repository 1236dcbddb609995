"""A synthetic dataset from its first step to its card: distill a style, stylize with it, evaluate, write down.

    python pipelines/synthetic_dataset.py manifests/demo-distill.yaml manifests/demo-stylize.yaml out/synthetic \
        [--reference FILE_OR_FOLDER] [--set KEY=VALUE ...]

OUT/generator is the training, OUT/dataset the dataset, whose README.md says how it was made and what was measured of
it. What was interrupted goes on. `--set` is for both manifests.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import smsbatch as sb

HEADING = "\n## Evaluation\n"


def evaluation(trained: sb.Distilled, manifest: sb.Manifest, sources: sb.Measured, results: sb.Measured) -> str:
    """The part of the card that a run cannot write: figures against a style, and where the generator is from."""
    losses = ", ".join(f"{name} {value:.4g}" for name, value in trained.losses.items())
    lines = [
        f"Means over {len(results.pictures):,} pictures; the style's reference has a style distance of 0.\n",
        "| | sources | stylized |\n|---|---:|---:|",
        *(f"| {name} | {sources.values[name]:.3f} | {value:.3f} |" for name, value in results.values.items()),
        f"| seconds per picture | | {results.seconds:.3f} |\n",
        "The generator, of which `../generator` has manifest, log and files:\n",
        "| | |\n|---|---|",
        f"| parameters | {trained.parameters:,} |",
        f"| training | {trained.steps:,} steps on {trained.images:,} crops of {trained.samples:,} pictures |",
        f"| took | {trained.seconds:.0f} s, {trained.images_per_second:.2f} crops a second |",
        f"| losses at the end | {losses} |",
        f"| manifest | `{manifest.identity}` |",
    ]
    return HEADING + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("distill", help="manifest of the training")
    parser.add_argument("stylize", help="manifest of the dataset; its `generator` is the training's, whatever it says")
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", default="tiny:styles/oil.reference.safetensors", help="statistics, or a folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()

    training = sb.load(given.distill, [*given.set, f"output.path={given.out / 'generator'}"])
    trained = sb.run(training)
    paths = [f"generator={given.out / 'generator'}", f"output.path={given.out / 'dataset'}"]
    sb.run(dataset := sb.load(given.stylize, [*given.set, *paths]))
    sources, results = (sb.measure(dataset, given.reference, of_sources=of) for of in (True, False))
    card = given.out / "dataset" / "README.md"
    card.write_text(card.read_text().partition(HEADING)[0] + evaluation(trained, training, sources, results))
    print(card.read_text(), *(f"{name}: {reason}" for name, reason in results.missing.items()), sep="\n")


if __name__ == "__main__":
    main()
