"""What is printed and cannot be: a full disk, a closed stdout, a reader that has left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import smsbatch as sb
from smsbatch.cli import common
from smsbatch.cli.display import Plain
from smsbatch.text import hide

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="has no /dev/full")


def smsbatch(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a shell, in which `smsbatch` is the command."""
    command = f'smsbatch() {{ {sys.executable} -m smsbatch "$@"; }}; set -o pipefail; {line}'
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("smsbatch schema > /dev/full", 3, "smsbatch: cannot write to stdout: No space left on device; send it"),
        ("smsbatch --version > /dev/full", 3, "smsbatch: cannot write to stdout: No space left on device"),
        ("smsbatch --help > /dev/full", 3, "smsbatch: cannot write to stdout: No space left on device"),
        ("smsbatch run --help > /dev/full", 3, "smsbatch: cannot write to stdout: No space left on device"),
        ("smsbatch init --json > /dev/full", 3, "smsbatch: cannot write to stdout: No space left on device"),
        ("smsbatch status none.yaml --json > /dev/full", 2, "smsbatch: none.yaml: cannot read the manifest"),
        ("smsbatch status none.yaml 2> /dev/full", 2, ""),
        ("smsbatch status none.yaml > /dev/full 2>&1", 2, ""),
        ("smsbatch schema >&-", 0, ""),
        ("smsbatch status none.yaml >&- 2>&-", 2, ""),
        ("smsbatch schema | head -c 10 > /dev/null; true", 0, ""),
    ],
)
def test_a_command_ends_with_a_line(line: str, code: int, told: str, tmp_path: Path) -> None:
    done = smsbatch(line, tmp_path)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.stderr.startswith(told) if told else done.stderr == ""
    assert len(done.stderr.splitlines()) <= 1
    assert done.returncode == code


def test_progress_that_cannot_be_printed_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = sb.Status("x", 1, 0, 1, 0, 0.0, {}, True)
    for as_json, err, name in ((False, False, "stdout"), (True, True, "stderr")):
        with FULL.open("w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, name, full)
            with pytest.raises(sb.StorageError, match=f"cannot write to {name}: No space left on device"):
                Plain(lambda now: "x" * 100_000, as_json, err).update(now)


def test_a_reader_that_has_left_is_no_fault_of_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Click ends the command for it, without a word."""

    def left(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(common.typer, "echo", left)
    with pytest.raises(BrokenPipeError):
        common.say("a line")


def test_a_value_of_the_environment_is_not_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smsbatch.text._values", {})
    hide({"PLACE": "/data/hunter2"})
    common.echo(["results are in /data/hunter2/out"])
    common.echo_json({"output": "/data/hunter2/out"})
    said = capsys.readouterr().out
    assert said == 'results are in ${PLACE}/out\n{"output": "${PLACE}/out"}\n'
