"""`generator.json` comes from anywhere: what is wrong in it is found before any work, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import make_generator

from smsbatch.errors import WeightsError
from smsbatch.generator.config import CONFIG, WEIGHTS, parameter_count, parse_config
from smsbatch.generator.files import generator_about, read_generator
from smsbatch.generator.network import Generator
from smsbatch.manifest import Storage, Stylize


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_generator(tmp_path_factory.mktemp("generator"))


def with_values(**values: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda config: json.dumps(config | values).encode()


def about(**values: Any) -> Callable[[dict[str, Any]], bytes]:
    return lambda config: json.dumps(config | {"about": config["about"] | values}).encode()


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], bytes], str]] = {
    "deep": (lambda config: b"[" * 100_000, "is damaged, it is not JSON"),
    "deep inside": (lambda config: b'{"format": ' + b"[" * 100_000, "is damaged, it is not JSON"),
    "a number of many digits": (lambda config: b'{"width": ' + b"9" * 10_000 + b"}", "is damaged, it is not JSON"),
    "not UTF-8": (lambda config: b"\xff\xfe{", "is damaged, it is not JSON"),
    "null": (lambda config: b"null", "is not of a generator"),
    "a list": (lambda config: b"[]", "is not of a generator"),
    "version of many digits": (with_values(version=10**1000), r"is of version 1000+, this smsbatch reads 1; update"),
    "version as a list": (with_values(version=[1]), r"is of version \[1\], this"),
    "width of many digits": (with_values(width=10**1000), r"width is 1000+, not 1 to 4096"),
    "width as a float": (with_values(width=8.0), "width is missing or no int"),
    "width as a truth value": (with_values(width=True), "width is missing or no int"),
    "no blocks": (with_values(blocks=0), "blocks is 0, not 1 to 4096"),
    "blocks of another generator": (with_values(blocks=2), "parameters are not those of its width and blocks"),
    "a huge generator": (with_values(width=4096, blocks=4096), "parameters are not those of its width and blocks"),
    "parameters as a text": (with_values(parameters="many"), "parameters is missing or no int"),
    "no parameters": (with_values(parameters=None), "parameters is missing or no int"),
    "restore as a number": (with_values(restore=1), "restore is missing or no bool"),
    "digest of another file": (with_values(sha256="0" * 64), "is not what generator.json says"),
    "about as a list": (with_values(about=[]), "about is missing or no dict"),
    "style as a number": (about(style=7), "about.style is no text"),
    "lora as a mapping": (about(lora={"a": 1}), "about.lora is no text"),
    "lora of numbers": (about(lora=["a", 1]), "about.lora is no text"),
    "model as a list": (about(model=["tiny"]), "about.model is no text"),
    "a huge generator by its own count": (
        with_values(width=4096, blocks=4096, parameters=parameter_count(4096, 4096)),
        "has fewer parameters than generator.json says",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    change, said = HOSTILE[name]
    config = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_bytes(change(config))
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    with pytest.raises(WeightsError, match=rf"^generator: .*{said}") as caught:
        read_generator(str(tmp_path), Storage())
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_about_cannot_speak_for_the_file(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (tmp_path / CONFIG).write_bytes(about(parameters="many", width=-1, style="oil")(config))
    manifest = Stylize.model_validate(
        {
            "task": "stylize",
            "name": "x",
            "generator": str(tmp_path),
            "source": {"format": "folder", "urls": "in"},
            "output": {"path": "out"},
        }
    )
    found = generator_about(manifest)
    assert (found["parameters"], found["width"], found["style"]) == (config["parameters"], config["width"], "oil")


@pytest.mark.parametrize(("width", "blocks"), [(8, 1), (16, 3)])
def test_the_count_of_parameters_is_the_network_s(width: int, blocks: int) -> None:
    assert Generator(width, blocks).parameter_count == parameter_count(width, blocks)
    parse_config(Generator(width, blocks).files()[CONFIG], "generator.json")
