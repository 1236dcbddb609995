"""The command line: its output and its exit codes, with real processes where they matter."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import pytest
from support.jobs import make_photos, write_manifest
from typer.testing import CliRunner

from smsbatch.cli.app import app

VERBS = ("run", "plan", "status", "errors", "verify", "repair", "replay", "gc", "export", "doctor", "schema", "init")


def smsbatch(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, as a new one takes ten seconds to start; tests that need one start it."""
    with chdir(cwd or Path.cwd()):
        result = CliRunner().invoke(app, arguments)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    return subprocess.CompletedProcess(arguments, result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path, lora: Path) -> Path:
    folder = tmp_path_factory.mktemp("job")
    return write_manifest(folder, model, lora, make_photos(folder / "photos"))


@pytest.fixture(scope="module")
def done(job: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "smsbatch", "run", str(job)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


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
    assert done.stdout.startswith("test: 0/6 images, 0/3 units\n"), "plain lines where nobody watches"
    assert "test: 6/6 images, 3/3 units, finished\n" in done.stdout
    assert "{" not in done.stdout


@pytest.mark.usefixtures("done")
def test_run_again_does_nothing_and_says_so(job: Path) -> None:
    again = smsbatch("run", str(job))
    assert again.returncode == 0
    assert "Nothing to do" in again.stdout


@pytest.mark.usefixtures("done")
def test_json(job: Path) -> None:
    shown = smsbatch("run", str(job), "--json")
    run = json.loads(shown.stdout)
    assert json.loads(shown.stderr.splitlines()[-1])["finished"]
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


@pytest.mark.usefixtures("done")
def test_plan_in_figures(job: Path, tmp_path: Path) -> None:
    options = ["--set", f"output.path={tmp_path / 'new'}"]
    shown = smsbatch("plan", str(job), *options, "--probe", "2", "--price-per-gpu-hour", "3600").stdout
    for said in (
        r"reads +\d",
        r"writes +about \d",
        r"takes +[\d.]+ s an image, about [\d.]+ s on one worker without a GPU",
    ):
        assert re.search(said, shown), shown
    assert re.search(r"costs +about [\d.,]+ at 3,600\.00 per GPU-hour", shown), shown
    assert "add --probe" in smsbatch("plan", str(job), *options, "--price-per-gpu-hour", "2").stdout


@pytest.mark.usefixtures("done")
def test_status_watched_until_it_is_finished(job: Path) -> None:
    assert smsbatch("status", str(job), "--watch").stdout == "test: 6/6 images, 3/3 units, finished\n"
    (line,) = smsbatch("status", str(job.parent / "out"), "--watch", "--json").stdout.splitlines()
    assert json.loads(line)["finished"]


@pytest.mark.usefixtures("done")
def test_status_watched_is_left_quietly(job: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(job.parent / "out", tmp_path / "out"))
    (out / "_smsbatch/commits/000002.json").unlink()
    with subprocess.Popen(
        [sys.executable, "-m", "smsbatch", "status", str(out), "--watch", "--interval", "0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert (
            watching.stdout.readline()
            == "test: 4/6 images, 2/3 units, no driver is at work on it; `smsbatch run` continues it\n"
        )
        assert watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=30)
    assert (watching.returncode, stderr) == (0, "")


@pytest.mark.usefixtures("done")
def test_an_output_is_as_good_as_its_manifest(job: Path) -> None:
    """Verbs that read a run accept its output path; then only the keys of `storage` can be set."""
    out = str(job.parent / "out")
    for verb in ("status", "errors", "verify", "gc"):
        first, second = smsbatch(verb, str(job)), smsbatch(verb, out, "--set", "storage.retries=2")
        assert first.returncode == second.returncode == 0, second.stderr
        assert first.stdout == second.stdout
    wrong = smsbatch("verify", out, "--set", "seed=3")
    assert wrong.returncode == 2
    assert "only storage.* can be set" in wrong.stderr
    wrong = smsbatch("verify", out, "--set", "storage.timeout_s=long")
    assert wrong.returncode == 2
    assert "storage.timeout_s=long" in wrong.stderr


def test_errors_verify_repair_and_gc(job: Path, tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"")
    (photos / "other.png").write_bytes(b"\x1b[31m no picture")
    file = str(write_manifest(tmp_path, model, lora, photos, errors={"max_failed_fraction": 0.5}))
    assert smsbatch("run", file).returncode == 0

    listed = smsbatch("errors", file).stdout.splitlines()
    assert listed[0].split() == ["key", "code", "attempts", "message"]
    assert listed[1].split()[:3] == ["broken", "decode_error", "1"]
    assert listed[3] == "2 of 8 images failed: 2 decode_error"
    assert "1 shown" in smsbatch("errors", file, "--limit", "1").stdout
    rows = [
        json.loads(line) for line in smsbatch("errors", file, "--json", "--code", "decode_error").stdout.splitlines()
    ]
    assert [row["key"] for row in rows] == ["broken", "other"]
    assert smsbatch("errors", file, "--json", "--code", "oom").stdout == ""

    tar = tmp_path / "out" / "shards" / "000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1000])
    seen = smsbatch("verify", file)
    assert seen.returncode == 1
    assert "shards/000000.tar: has 1,000 bytes" in seen.stdout
    assert f"smsbatch repair {file}" in seen.stdout
    assert not json.loads(smsbatch("verify", file, "--json").stdout)["ok"]
    told = smsbatch("repair", file, "--dry-run")
    assert (told.returncode, tar.stat().st_size) == (0, 1000)
    assert "Would do:\n  publish shard 000000 again" in told.stdout
    assert "Repaired" in smsbatch("repair", file).stdout
    assert tar.read_bytes() == whole
    assert smsbatch("verify", file, "--full").returncode == 0

    assert "Nothing to remove" in smsbatch("gc", file).stdout
    removed = smsbatch("gc", file, "--attempts")
    assert "8 objects removed" in removed.stdout
    assert "must be computed again" in removed.stdout


@pytest.mark.usefixtures("done")
def test_replay_writes_a_picture_or_says_why_not(job: Path, tmp_path: Path) -> None:
    shown = smsbatch("replay", str(job), "photo-3", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "photo-3.png is written" in shown.stdout
    assert (tmp_path / "photo-3.png").read_bytes()[:4] == b"\x89PNG"
    wrong = smsbatch("replay", str(job), "photo3", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean photo-3" in wrong.stderr


def test_replay_and_retry_of_a_broken_picture(tmp_path: Path, model: Path, lora: Path) -> None:
    photos = make_photos(tmp_path / "photos")
    (photos / "broken.jpg").write_bytes(b"")
    file = str(write_manifest(tmp_path, model, lora, photos, errors={"max_failed_fraction": 0.5}))
    assert smsbatch("run", file).returncode == 0
    shown = smsbatch("replay", file, "broken", cwd=tmp_path)
    assert shown.returncode == 1
    assert shown.stderr == "smsbatch: broken: decode_error: an empty file (0 bytes)\n"
    again = smsbatch("run", file, "--retry-failed", "--code", "decode_error")
    assert again.returncode == 0, again.stderr
    assert "Nothing to do" not in again.stdout
    assert smsbatch("errors", file).stdout.splitlines()[1].split()[:3] == ["broken", "decode_error", "2"]


def test_doctor(job: Path, tmp_path: Path) -> None:
    well = smsbatch("doctor", str(job), "--set", f"output.path={tmp_path}")
    assert well.returncode == 0, well.stdout
    ill = smsbatch("doctor", str(job), "--set", "style.lora=/nowhere", "--json")
    assert ill.returncode == 1
    assert [check["name"] for check in json.loads(ill.stdout) if check["state"] == "fail"] == ["weights"]


def test_code_needs_retry_failed(job: Path) -> None:
    wrong = smsbatch("run", str(job), "--code", "oom")
    assert wrong.returncode == 2
    assert "--retry-failed" in wrong.stderr


def test_every_error_of_a_manifest_has_its_line(job: Path) -> None:
    wrong = smsbatch("run", str(job), "--set", "seed=x", "--set", "style.lorra=3")
    assert wrong.returncode == 2
    first, second = wrong.stderr.splitlines()
    assert first.startswith("smsbatch: --set ")
    assert second.startswith("smsbatch: --set ")


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
    empty = tmp_path / "empty"
    empty.mkdir()
    override = override.format(empty=empty, file=job)
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
    assert "1 of 7 samples failed (1 decode_error)" in over.stderr
    assert "`smsbatch errors " in over.stderr
    listed = smsbatch("errors", str(tmp_path / "out")).stdout.splitlines()
    assert listed[1].split()[0] == "broken"
    assert listed[-1].startswith("1 of 7 images failed")
    shown = smsbatch("status", str(tmp_path / "out")).stdout
    assert "but 1 of 7 samples failed (1 decode_error), more than errors.max_failed_fraction (0.01) allows" in shown
    assert "run with --retry-failed" in shown
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
    """Help is promised in half a second; only imports could break that, so the test counts modules instead of time."""
    code = "import sys; sys.argv = ['smsbatch', '--help']\ntry:\n    from smsbatch.cli.app import app; app()\n"
    code += "except SystemExit: print(len(sys.modules), 'torch' in sys.modules, 'rich' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    count, torch, rich = shown.splitlines()[-1].split()
    assert (torch, rich) == ("False", "False")
    assert int(count) < 400
    for verb in VERBS:
        assert f"  {verb}" in shown


def test_the_live_display_on_a_terminal(tmp_path: Path, model: Path, lora: Path) -> None:
    """On a pseudo-terminal the display shows units, images and the step within the unit; the summary remains."""
    photos = make_photos(tmp_path / "photos")
    job = write_manifest(tmp_path, model, lora, photos, objective={"steps": 20})
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
            except OSError:  # the process has ended and closed the terminal
                break
        process.wait(10)
    os.close(driver)
    assert process.returncode == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"\d/6 images +\d/3 units", plain)
    assert re.search(r"unit 00000\d +\d/2 images +step \d+ of 20", plain)
    assert re.search(r"images/h, about .* left", plain)
    assert "6 stylized, 0 failed, 6 planned" in plain
    assert "Traceback" not in plain
