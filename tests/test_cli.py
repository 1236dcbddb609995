"""The command line as a user has it: real processes, their output, their exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from execution.jobs import make_photos, write_manifest


def smsbatch(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "smsbatch", *arguments], capture_output=True, text=True, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    return write_manifest(folder, model, lora, make_photos(folder / "photos"))


@pytest.fixture(scope="module")
def done(job: Path) -> subprocess.CompletedProcess[str]:
    return smsbatch("run", str(job))


def test_run_ends_with_a_summary_that_says_where_everything_is(
    job: Path, done: subprocess.CompletedProcess[str]
) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    out = job.parent / "out"
    for path in (out / "shards", out / "metrics", out / "report.html"):
        assert path.exists()
        assert str(path) in done.stdout
    assert "6 stylized, 0 failed, 6 planned" in done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines[0]["samples_done"] == 0
    assert lines[-1]["finished"]


@pytest.mark.usefixtures("done")
def test_run_again_does_nothing_and_says_so(job: Path) -> None:
    again = smsbatch("run", str(job))
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout


@pytest.mark.usefixtures("done")
def test_json(job: Path) -> None:
    run = json.loads(smsbatch("run", str(job), "--json").stdout)
    assert (run["planned"], run["succeeded"], run["failed"]) == (6, 6, 0)
    plan = json.loads(smsbatch("plan", str(job), "--json").stdout)
    assert (plan["samples"], plan["units"], plan["shards"]) == (6, 3, 2)
    for argument in (str(job), str(job.parent / "out")):
        status = json.loads(smsbatch("status", argument, "--json").stdout)
        assert (status["units_done"], status["finished"]) == (3, True)
    failed = smsbatch("status", str(job.parent), "--json")
    assert failed.returncode == 2
    assert json.loads(failed.stdout)["error"] == "RequestError"


@pytest.mark.usefixtures("done")
def test_status_for_people(job: Path) -> None:
    shown = smsbatch("status", str(job)).stdout
    assert "6/6 images" in shown
    assert "finished" in shown


def test_plan_says_what_run_would_do(job: Path, tmp_path: Path) -> None:
    options = ["--set", f"output.path={tmp_path / 'new'}", "--limit", "3"]
    shown = smsbatch("plan", str(job), *options).stdout
    assert "1 shard, 2 units, 3 images of 2 steps each" in shown
    assert f"smsbatch run {job} {' '.join(options)}" in shown
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("done")
def test_plan_sees_the_run_that_stands(job: Path) -> None:
    assert "3 of 3 units are done" in smsbatch("plan", str(job)).stdout
    changed = smsbatch("plan", str(job), "--set", "seed=7")
    assert changed.returncode == 2
    assert "seed (0 then, 7 now)" in changed.stderr


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("style.lora=/nowhere.safetensors", 2, "style.lora: no such file /nowhere.safetensors"),
        ("style.lorra=x", 2, "--set style.lorra: no such key; did you mean lora?"),
        ("source.urls=/nowhere", 2, "/nowhere: no such folder"),
        ("source.urls={empty}", 2, "no samples found"),
        ("output.path={file}/out", 3, "cannot write"),
        ("model.path=/nowhere", 2, "model.path: /nowhere is neither a folder"),
        ("seed=7", 2, "seed (0 then, 7 now)"),
    ],
)
@pytest.mark.usefixtures("done")
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    job: Path, tmp_path: Path, override: str, code: int, message: str
) -> None:
    arguments = [] if override.startswith(("seed", "output")) else ["--set", f"output.path={tmp_path / 'new'}"]
    override = override.format(empty=tmp_path, file=job)
    wrong = smsbatch("run", str(job), "--set", override, *arguments)
    assert wrong.returncode == code, wrong.stderr
    assert wrong.stderr.startswith("smsbatch: ")
    assert len(wrong.stderr.splitlines()) == 1
    assert message in wrong.stderr
    assert not (tmp_path / "new").exists()


def test_a_run_over_its_budget_of_failures(tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"")
    over = smsbatch("run", str(write_manifest(tmp_path, model, lora, photos)))
    assert over.returncode == 1
    assert "1 of 7 samples failed" in over.stderr
    assert "report.html" in over.stderr
    assert len(over.stderr.splitlines()) == 1


def test_init_writes_a_manifest_that_plans(tmp_path: Path) -> None:
    assert smsbatch("init", "mine.yaml", cwd=tmp_path).returncode == 0
    assert "# " in (tmp_path / "mine.yaml").read_text()
    assert smsbatch("plan", "mine.yaml", cwd=tmp_path).returncode == 0
    again = smsbatch("init", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "exists" in again.stderr


def test_schema_is_json_schema() -> None:
    schema = json.loads(smsbatch("schema").stdout)
    assert schema["$defs"]["Objective"]["properties"]["steps"]["default"] == 500


def test_help_is_fast() -> None:
    """Half a second is promised; what would break it is an import, so count those rather than the clock."""
    code = "import sys; sys.argv = ['smsbatch', '--help']\ntry:\n    from smsbatch.cli import app; app()\n"
    code += "except SystemExit: print(len(sys.modules), 'torch' in sys.modules, 'rich' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, torch, rich = shown.splitlines()[-1].split()
    assert (torch, rich) == ("False", "False")
    assert int(count) < 400
    for verb in ("run", "plan", "status", "schema", "init"):
        assert f"  {verb}" in shown


def test_the_live_display_on_a_terminal(tmp_path: Path, model: Path, lora: Path) -> None:
    """A real pseudo-terminal: units, images and the step inside the unit are seen, and the summary stays."""
    photos = make_photos(tmp_path / "photos")
    job = write_manifest(tmp_path, model, lora, photos, objective={"steps": 40})
    driver, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        [sys.executable, "-m", "smsbatch", "run", str(job)], stdout=terminal, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        shown, deadline = "", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                shown += os.read(driver, 4096).decode(errors="replace")
            except OSError:  # the terminal is closed: the process has ended
                break
        process.wait(10)
    os.close(driver)
    assert process.returncode == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"\d/6 images +\d/3 units", plain)
    assert re.search(r"unit 00000\d +\d/2 images +step \d+ of 40", plain)
    assert re.search(r"images/h, about .* left", plain)
    assert "6 stylized, 0 failed, 6 planned" in plain
    assert "Traceback" not in plain
