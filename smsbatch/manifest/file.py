"""Read a manifest from a YAML file, with environment variables, overrides, and errors that name file, line and key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from smsbatch.errors import ManifestError
from smsbatch.manifest import TASKS, Manifest
from smsbatch.text import hide

_MOST = 100_000  # values of a manifest; what an alias stands for counts as often as it is used
_DEEPEST = 50  # sections and lists inside of each other
_SHOWN = 100  # letters of a wrong value
# What YAML 1.1 reads otherwise than it looks: a leading zero as octal, colons as base 60.
_MISREAD = re.compile(r"[-+]?(?:0[0-7_]+|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?)")
_WRONG = (yaml.YAMLError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError)  # of a tag or date
_NAME = re.compile(r"(\$?)\$\{([^}]*)(\}?)")  # everything that begins like the name of a variable

Key = tuple[str | int, ...]


def load(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Manifest:
    """Read a manifest: apply overrides, fill `${NAME}` and `${NAME:-default}` from the environment, validate.

    As in a shell, the default is taken if the variable is empty, too. Values of the environment are used, but neither
    recorded (`Manifest.dump`) nor shown.

    Args:
        path: a YAML file.
        overrides: `key.path=value`, the value in YAML; they take precedence over the file.

    Raises:
        ManifestError: names file, line and key of every fault.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ManifestError(f"{file}: cannot read the manifest: {reason}; `smsbatch init` writes one") from error
    try:
        data, lines = _parsed(text)
    except _FaultError as fault:
        place = f"{file}:{fault.line}" if fault.line else str(file)
        raise ManifestError(f"{place}: {fault}") from fault
    if not isinstance(data, dict):
        raise ManifestError(f"{file}: a manifest is a mapping of keys; `smsbatch init` writes one to start from")
    set_keys = [_override(data, override) for override in overrides]
    written: dict[Key, str] = {}
    environment: dict[str, str] = {}
    filled = _filled(data, (), file, lines, written, environment)
    task = filled.get("task", "optimize")
    if not isinstance(task, str) or task not in TASKS:
        where = "--set task" if ("task",) in set_keys else _where(file, ("task",), lines)
        raise ManifestError(f"{where}: is one of {', '.join(TASKS)}, not {_cut(task)}")
    try:
        return TASKS[task].filled(_recorded(TASKS[task], filled, written), filled, environment)
    except ValidationError as error:
        hide(environment)
        raise ManifestError("\n".join(_explain(error, task, file, lines, set_keys))) from error


def _recorded(kind: type[Manifest], filled: dict[str, Any], written: Mapping[Key, str]) -> Manifest:
    """The manifest with each text of the environment as it is `written`, and a number or choice as it is filled in."""
    plain, left = deepcopy(filled), dict(written)
    for key, text in written.items():
        _set(plain, key, text)
    while True:
        try:
            return kind.model_validate(plain)
        except ValidationError as error:
            places = [problem["loc"] for problem in error.errors() if problem["type"] != "secret"]
            # Of a list, pydantic names the types instead of the item.
            keys = {key: key[:-1] if isinstance(key[-1], int) else key for key in left}
            settings = [key for key, begin in keys.items() if any(place[: len(begin)] == begin for place in places)]
            if not settings:
                raise
            for key in settings:
                del left[key]
                _set(plain, key, _get(filled, key))


def _get(data: Any, key: Key) -> Any:
    for part in key:
        data = data[part]
    return data


def _set(data: dict[str, Any], key: Key, value: Any) -> None:
    _get(data, key[:-1])[key[-1]] = value


class _FaultError(Exception):
    """A fault of a YAML text, at a line from 1 if that is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def _parsed(text: str) -> tuple[Any, dict[Key, int]]:
    """A YAML text as plain data, and the line, from 1, of every key.

    Raises:
        _FaultError: it is not valid, or YAML would read it otherwise than it looks: a key that is given twice (the last
            one would count), a number of base 8 or 60. Aliases may not contain themselves.
    """
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        lines: dict[Key, int] = {}
        if root is not None:
            _check(loader, root, (), lines, [])
        return (None if root is None else loader.construct_document(root)), lines
    except RecursionError as error:
        raise _FaultError("not valid YAML: its values are nested too deeply") from error
    except _WRONG as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise _FaultError(f"not valid YAML: {problem}", mark.line + 1 if mark else None) from error
    finally:
        loader.dispose()


def _check(loader: yaml.SafeLoader, node: yaml.Node, key: Key, lines: dict[Key, int], above: list[yaml.Node]) -> None:
    """Check a node and all below it, and collect the lines of their keys."""
    line, name_of = node.start_mark.line + 1, "".join(f"{part}." for part in key)[:-1]
    begin = f"{name_of}: " if key else ""
    if any(node is other for other in above):
        raise _FaultError(f"{begin}an alias stands for something that contains it", line)
    if len(above) > _DEEPEST:
        raise _FaultError("not valid YAML: its values are nested too deeply", line)
    if len(lines) > _MOST:
        raise _FaultError(f"more than {_MOST:,} values, counting what aliases stand for", line)
    if isinstance(node, yaml.ScalarNode):
        try:
            value = loader.construct_object(node)
        except _WRONG as error:
            problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
            raise _FaultError(f"not valid YAML: {problem}", line) from error
        if isinstance(value, int | float) and _MISREAD.fullmatch(node.value):
            decimal = node.value.replace("_", "").lstrip("+-0") or "0"
            advice = "" if ":" in node.value else f"write {'-' * node.value.startswith('-')}{decimal}, or "
            raise _FaultError(f"{begin}YAML reads {node.value} as {value}; {advice}put a text in quotes", line)
        return
    pairs: list[tuple[str | int, yaml.Node, yaml.Node]] = [
        (index, item, item) for index, item in enumerate(node.value) if not isinstance(item, tuple)
    ]
    for pair in node.value if isinstance(node, yaml.MappingNode) else ():
        if not isinstance(pair[0], yaml.ScalarNode) or not pair[0].tag.endswith((":str", ":merge")):
            shown = pair[0].value if isinstance(pair[0], yaml.ScalarNode) else "a list or mapping"
            raise _FaultError(f"{begin}{shown} is no name of a key; put it in quotes", pair[0].start_mark.line + 1)
        pairs.append((pair[0].value, *pair))
    for name, place, value in pairs:
        if (*key, name) in lines:
            raise _FaultError(f"{'.'.join(map(str, (*key, name)))}: is given a second time", place.start_mark.line + 1)
        lines[*key, name] = place.start_mark.line + 1
        _check(loader, value, (*key, name), lines, [*above, node])


def _filled(
    value: Any,
    key: Key,
    file: Path,
    lines: Mapping[Key, int],
    written: dict[Key, str],
    environment: dict[str, str],
) -> Any:
    """Fill `${NAME}` and `${NAME:-default}` in every text.

    Args:
        written: gets, by its key, each text that has a value of the environment, with `${NAME}` for that.
        environment: gets these values, by name.
    """
    if isinstance(value, dict):
        return {name: _filled(item, (*key, name), file, lines, written, environment) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, (*key, n), file, lines, written, environment) for n, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def chosen(match: re.Match[str]) -> tuple[str, str]:
        """What stands for the match: as it is recorded, and filled in."""
        escape, inside, end = match.groups()
        name, dash, default = inside.partition(":-")
        if escape or not end or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or "${" in default:
            raise ManifestError(
                f"{_where(file, key, lines)}: {_cut(match[0])} is not understood; a value of the environment is "
                "${NAME} or ${NAME:-default}"
            )
        given = os.environ.get(name)
        if given is None and not dash:
            raise ManifestError(
                f"{_where(file, key, lines)}: the environment has no {name}; set it, or ${{{name}:-default}}"
            )
        if not given:
            return default, default
        environment[name] = given
        return f"${{{name}}}", given

    recorded = _NAME.sub(lambda match: chosen(match)[0], value)
    plain = _NAME.sub(lambda match: chosen(match)[1], value)
    if recorded != plain:
        written[key] = recorded
    return plain


def _override(data: dict[str, Any], override: str) -> Key:
    """Apply one `key.path=value` to `data`; returns the key."""
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names):
        raise ManifestError(f"--set {override}: expected key.path=value, for instance output.path=out/x")
    try:  # YAML would read a prompt that begins with a placeholder as a mapping
        value = text if text.startswith(("{style}", "{caption}")) else _parsed(text)[0]
    except _FaultError as fault:
        told = "the value is not valid YAML" if str(fault).startswith("not valid") else str(fault)
        raise ManifestError(f"--set {override[:_SHOWN]}: {told}; quote text: {dotted}='...'") from fault
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
    ours = message != problem["msg"] or problem["type"] in ("secret", "truth")
    given = problem["input"]
    if problem["type"] == "string_type" and not isinstance(given, list | dict | tuple | None):
        return f"is a text, and YAML reads it as {_cut(given)}; put it in quotes"
    shown = f", not {_cut(given)}" if not ours and isinstance(given, str | int | float) else ""
    return message[0].lower() + message[1:] + shown


def _cut(value: object) -> str:
    """A wrong value as it would be in Python, cut."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."


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
