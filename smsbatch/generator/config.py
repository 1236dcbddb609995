"""`generator.json`: its format and its validation. Without torch."""

from __future__ import annotations

import json
from typing import Any

from smsbatch.errors import WeightsError
from smsbatch.text import one_line

CONFIG, WEIGHTS = "generator.json", "generator.safetensors"
FORMAT, VERSION = "smsbatch-generator", 1
_KINDS = {"width": int, "blocks": int, "restore": bool, "parameters": int, "sha256": str, "about": dict}


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """The content of a generator's `generator.json`; `where` names it in messages.

    Raises:
        WeightsError: it is damaged, of something else, or of another version.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{where} is damaged, it is not JSON; copy it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise WeightsError(f"{where} is not of a generator of smsbatch; name the output of a `distill` run")
    if config.get("version") != VERSION:
        found = f"is of version {one_line(config.get('version'))}, this smsbatch reads {VERSION}"
        raise WeightsError(f"{where} {found}; update smsbatch, or distill again")
    for name, kind in _KINDS.items():
        if type(config.get(name)) is not kind:
            raise WeightsError(f"{where}: {name} is missing or no {kind.__name__}; copy it again")
    for name in ("width", "blocks"):
        if not 1 <= config[name] <= 4096:
            raise WeightsError(f"{where}: {name} is {one_line(config[name])}, not 1 to 4096; copy it again")
    if config["parameters"] != parameter_count(config["width"], config["blocks"]):
        raise WeightsError(f"{where}: parameters are not those of its width and blocks; copy it again")
    for name in ("name", "style", "model", "lora"):
        value = config["about"].get(name)
        texts = value if name == "lora" and isinstance(value, list) else [value]
        if not all(isinstance(text, str | None) for text in texts):
            raise WeightsError(f"{where}: about.{name} is no text; copy it again")
    return config


def parameter_count(width: int, blocks: int) -> int:
    """Number of parameters of a generator; a k x k convolution from m to n channels has k k m n + n."""
    ends = 2 * 49 * 3 * width + width + 3
    between = 2 * 9 * (width * 2 * width + 2 * width * 4 * width) + (2 + 4 + 2 + 1) * width
    return ends + between + blocks * 2 * (9 * (4 * width) ** 2 + 4 * width)
