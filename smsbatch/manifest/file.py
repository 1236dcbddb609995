"""Read a manifest from a YAML file, with environment variables, overrides, and errors that name file, line and key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from smsbatch.errors import ManifestError
from smsbatch.manifest import TASKS, Manifest


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Manifest:
    """Read a manifest: fill `${NAME}` and `${NAME:-default}` from the environment, apply overrides, validate.

    Args:
        path: a YAML file.
        overrides: `key.path=value`, the value in YAML; they take precedence over the file.

    Raises:
        ManifestError: names file, line and key of every fault.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ManifestError(f"{file}: cannot read the manifest: {reason}; `smsbatch init` writes one") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        mark = getattr(error, "problem_mark", None)
        where = f"{file}:{mark.line + 1}" if mark else str(file)
        raise ManifestError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{file}: a manifest is a mapping of keys; `smsbatch init` writes one to start from")
    lines = _lines(root, file)
    set_keys = [_override(data, override) for override in overrides]
    data = _from_environment(data, (), file, lines)
    task = data.get("task", "optimize")
    if task not in list(TASKS):
        where = "--set task" if ("task",) in set_keys else _where(file, ("task",), lines)
        raise ManifestError(f"{where}: is one of {', '.join(TASKS)}, not {task!r}")
    try:
        return TASKS[task].model_validate(data)
    except ValidationError as error:
        raise ManifestError("\n".join(_explain(error, task, file, lines, set_keys))) from error


Key = tuple[str | int, ...]


def _lines(node: yaml.Node | None, file: Path, key: Key = ()) -> dict[Key, int]:
    """The line, from 1, of every key of a YAML document. Refuses duplicates: YAML would silently take the last one."""
    items: list[tuple[str | int, int, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        items = [(name.value, name.start_mark.line + 1, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        items = [(index, value.start_mark.line + 1, value) for index, value in enumerate(node.value)]
    found: dict[Key, int] = {}
    for name, line, value in items:
        if (*key, name) in found:
            raise ManifestError(f"{file}:{line}: {'.'.join(map(str, (*key, name)))}: is given a second time")
        found[(*key, name)] = line
        found |= _lines(value, file, (*key, name))
    return found


def _from_environment(value: Any, key: Key, file: Path, lines: Mapping[Key, int]) -> Any:
    """Fill `${NAME}` and `${NAME:-default}` in every string value."""
    if isinstance(value, dict):
        return {name: _from_environment(item, (*key, name), file, lines) for name, item in value.items()}
    if isinstance(value, list):
        return [_from_environment(item, (*key, index), file, lines) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if name not in os.environ and default is None:
            raise ManifestError(
                f"{_where(file, key, lines)}: the environment has no {name}; set it, or ${{{name}:-default}}"
            )
        return os.environ.get(name, default or "")

    return re.sub(r"\$\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\}", replace, value)


def _override(data: dict[str, Any], override: str) -> Key:
    """Apply one `key.path=value` to `data`; returns the key."""
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ManifestError(f"--set {override}: expected key.path=value, for instance output.path=out/x")
    try:  # YAML would read a prompt that begins with a placeholder as a mapping
        value = text if text.startswith(("{style}", "{caption}")) else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"--set {override}: the value is not valid YAML; quote text: {dotted}='...'") from error
    section = data
    for name in names[:-1]:
        inner = section.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ManifestError(f"--set {override}: {name} is a value, not a section")
        section = inner
    section[names[-1]] = value
    return tuple(names)


def _where(file: Path, key: Key, lines: Mapping[Key, int]) -> str:
    """`file:line: key.path`; the line of the nearest section if the key itself is not in the file."""
    dotted = ".".join(str(part) for part in key)
    line = next((lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines), None)
    place = f"{file}:{line}" if line else str(file)
    return f"{place}: {dotted}" if dotted else place


def _explain(
    error: ValidationError, task: str, file: Path, lines: Mapping[Key, int], set_keys: Sequence[Key]
) -> list[str]:
    """One line for each faulty key."""
    explained: dict[str, list[str]] = {}
    problems = error.errors()
    extra = [problem["loc"] for problem in problems if problem["type"] == "extra_forbidden"]
    for problem in problems:
        if problem["type"] == "missing" and any(
            key[:-1] == problem["loc"][:-1] and difflib.get_close_matches(str(key[-1]), [str(problem["loc"][-1])])
            for key in extra
        ):
            continue  # misspelt, not missing, and explained as such
        key: Key = problem["loc"]
        if problem["type"] not in ("missing", "extra_forbidden"):  # pydantic appends the names of a union's members
            key = next((key[:n] for n in range(len(key), 0, -1) if key[:n] in lines or key[:n] in set_keys), key)
        where = f"--set {'.'.join(map(str, key))}" if key in set_keys else _where(file, key, lines)
        explained.setdefault(where, []).append(_message(key, problem, task))
    return [f"{where}: {', or '.join(dict.fromkeys(messages))}" for where, messages in explained.items()]


def _message(key: Key, problem: Mapping[str, Any], task: str) -> str:
    if problem["type"] == "missing":
        return "is missing; `smsbatch schema` lists every key"
    if problem["type"] == "extra_forbidden":
        if any(key[-1] in _known_keys(key[:-1], other) for other in TASKS.values()):
            return f"is no key of task {task}"
        known = _known_keys(key[:-1], TASKS[task])
        close = difflib.get_close_matches(str(key[-1]), known, n=1)
        return "no such key; " + (f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}")
    message: str = problem["msg"].removeprefix("Value error, ")
    ours = message != problem["msg"]
    given = problem["input"]
    shown = f", not {given!r}" if not ours and isinstance(given, str | int | float) else ""
    return message[0].lower() + message[1:] + shown


def _known_keys(section: Key, kind: type[Manifest]) -> list[str]:
    """The keys of a section in manifests of one task; none if they have no such section."""
    model: type[BaseModel] = kind
    for name in section:
        field = model.model_fields.get(str(name))
        if field is None:
            return []
        sections = [field.annotation, *get_args(field.annotation)]  # the annotation may be `Section | None`
        model = next(kind for kind in sections if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)
