"""Tests of the README: its commands exist, its Python runs, and its file tree is the output of a run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from smsbatch.cli.app import app
from smsbatch.generator.network import Generator

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_make_knows_every_command() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    used = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"demo", "test"} <= used
    assert used <= set(re.findall(r"make ([a-z-]+)", shown))


def test_every_smsbatch_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands run in order, with fewer steps and a shorter manifest from `init`; a generator exists."""
    commands = re.findall(r"^smsbatch .*?(?=  +#|$)", "\n".join(blocks("bash")), re.MULTILINE)
    verbs = "init plan run status errors verify repair replay gc doctor schema export"
    assert {command.split()[1] for command in commands} == set(verbs.split())
    Generator(4, 1).save(tmp_path / "out" / "demo-distill")
    monkeypatch.chdir(tmp_path)
    for command in commands:
        done = CliRunner().invoke(app, command.replace("steps=50", "steps=1").split()[1:])
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception!r}"
        if command.startswith("smsbatch init"):
            manifest = yaml.safe_load((tmp_path / "my.yaml").read_text())
            manifest["objective"]["steps"] = 1
            manifest["image"]["resolution"] = 32
            (tmp_path / "my.yaml").write_text(yaml.safe_dump(manifest))
    assert (tmp_path / "out" / "my-first-run" / "_SUCCESS").exists()
    assert (tmp_path / "out" / "short" / "_SUCCESS").exists()


def test_the_python_runs_and_the_tree_is_what_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest is changed to one step and two pictures, so that the run takes seconds."""
    (code,) = blocks("python")
    assert len(code.strip().splitlines()) <= 10
    manifest = yaml.safe_load((ROOT / "manifests" / "demo.yaml").read_text())
    manifest["objective"]["steps"] = 1
    manifest["source"]["limit"] = 2
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "demo.yaml").write_text(yaml.safe_dump(manifest))
    (tmp_path / "smsbatch").symlink_to(ROOT / "smsbatch")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    plan, numbers, picture = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d+ shards?, \d+ units?, (\d+) images", plan)
    assert 0 < float(numbers.split()[1]) < 1
    assert re.match(r"\(\d+, \d+, 3\) 0\.\d+", picture)

    tree = re.search(r"```\n(out/demo/\n.*?)```", README, re.DOTALL)
    assert tree is not None
    for name in re.findall(r"── (\S+)", tree.group(1)):
        assert (tmp_path / "out" / "demo" / name).exists(), name
    left = {path.name for path in (tmp_path / "out" / "demo").iterdir()}
    assert left == {name.split("/")[0] for name in re.findall(r"── (\S+)", tree.group(1))}


def test_links_and_pictures_exist() -> None:
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_every_verb_is_in_the_readme_and_in_the_docs() -> None:
    shown = subprocess.run([sys.executable, "-m", "smsbatch", "--help"], capture_output=True, text=True, check=True)
    verbs = re.findall(r"^  (\w+) ", shown.stdout.partition("Commands:")[2], re.MULTILINE)
    assert len(verbs) >= 11
    assert [verb for verb in verbs if f"smsbatch {verb}" not in README] == []


@pytest.mark.parametrize("example", blocks("yaml"))
def test_manifests_in_the_readme_are_valid(example: str, tmp_path: Path) -> None:
    import smsbatch as sb

    (tmp_path / "m.yaml").write_text(example)
    assert sb.load(tmp_path / "m.yaml").task == "optimize"
