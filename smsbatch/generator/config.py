"""`generator.json`: its format and its validation. Without torch."""

from __future__ import annotations

import json
from typing import Any

from smsbatch.errors import WeightsError

CONFIG, WEIGHTS = "generator.json", "generator.safetensors"
FORMAT, VERSION = "smsbatch-generator", 1


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """The content of a generator's `generator.json`; `where` names it in messages.

    Raises:
        WeightsError: it is damaged, of something else, or of another version.
    """
    try:
        config = json.loads(data)
    except ValueError as error:
        raise WeightsError(f"{where} is damaged, it is not JSON; copy it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{where} is not of a generator of smsbatch; name the output of a `distill` run")
    if config.get("version") != VERSION:
        found = f"is of version {config.get('version')}, this smsbatch reads {VERSION}"
        raise WeightsError(f"{where} {found}; update smsbatch, or distill again")
    for name, kind in (("width", int), ("blocks", int), ("restore", bool), ("sha256", str), ("about", dict)):
        if not isinstance(config.get(name), kind):
            raise WeightsError(f"{where}: {name} is missing or no {kind.__name__}; copy it again")
    for name in ("width", "blocks"):
        if not 1 <= config[name] <= 4096:
            raise WeightsError(f"{where}: {name} is {config[name]}, not 1 to 4096; copy it again")
    return config
