"""The embedded model `tiny`, its styles and photographs: package data, and the function that finds it.

`tiny` names the model; `tiny:styles/oil.safetensors` or `tiny:photos` name anything inside. A manifest takes them
wherever it takes a path.
"""

from __future__ import annotations

import os
from pathlib import Path

from smsbatch.errors import RequestError

_HERE = Path(__file__).parent


def resolve(url: str) -> str:
    """The path on disk of a `tiny` name; any other path or URL unchanged. RequestError: it leaves the folder."""
    if url == "tiny":
        return str(_HERE / "model")
    if url[:5].lower() != "tiny:":
        return url
    path = os.path.normpath(_HERE / url[5:])
    if not Path(path).is_relative_to(_HERE):
        raise RequestError(f"{url}: leaves the embedded folder; `tiny:` names only what is inside")
    return path
