"""The embedded model `tiny`, its styles and photographs: package data, and the function that finds it.

`tiny` names the model; `tiny:styles/oil.safetensors` or `tiny:photos` name anything inside. A manifest takes them
wherever it takes a path.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent


def resolve(url: str) -> str:
    """The path on disk of a `tiny` name; any other path or URL unchanged."""
    if url == "tiny":
        return str(_HERE / "model")
    if url.startswith("tiny:"):
        return str(_HERE / url.removeprefix("tiny:"))
    return url
