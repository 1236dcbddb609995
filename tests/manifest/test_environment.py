"""Values of `${NAME}` in a manifest: used everywhere, recorded nowhere; a changed one is drift."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.jobs import make_photos, rows, write_manifest
from support.making import make_tar
from typer.testing import CliRunner

import smsbatch as sb
from smsbatch import text
from smsbatch.cli.app import app
from smsbatch.data.reader import Reader
from smsbatch.manifest import identity_of
from smsbatch.report import gallery
from smsbatch.storage.retries import redact

SECRET = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_values", {})


@pytest.fixture
def job(tmp_path: Path, model: Path, lora: Path) -> Path:
    return write_manifest(tmp_path, model, lora, tmp_path / "photos")


def written(job: Path, *overrides: str) -> dict[str, Any]:
    return sb.load(job, overrides).dump()


class TestRecorded:
    @pytest.mark.parametrize(
        ("override", "value", "recorded"),
        [
            ("source.urls=${X}", "a/b", ["${X}"]),
            ("source.urls=[a, '${X}/c']", "b", ["a", "${X}/c"]),
            ("source.urls='https://h/a.tar?token=${X}'", SECRET, ["https://h/a.tar?token=${X}"]),
            ("source.urls='https://${X}@h/a.tar'", SECRET, ["https://${X}@h/a.tar"]),
            ("storage.endpoint=${X}", f"https://minio:{SECRET}@h", "${X}"),
            ("storage.endpoint='http://minio:${X}@h'", SECRET, "http://minio:${X}@h"),
            ("storage.profile=${X}", "me", "${X}"),
            ("style.prompt=${X}", "oil", "${X}"),
            ("style.prompt='a ${X} of ${X:-y}'", "oil", "a ${X} of ${X}"),
            ("style.lora=${X}", "x.safetensors", ["${X}"]),
            ("style.model=${X}", "tiny", "${X}"),
            ("objective.prompt=${X}", "{style}, {caption}", "${X}"),
            ("objective.prompt='${X} {style}'", "photo of", "${X} {style}"),
            ("output.path=${X}", "o", "${X}"),
            ("compute.address=${X}", "head", "${X}"),
        ],
    )
    def test_a_text_as_it_is_written(
        self, override: str, value: str, recorded: object, job: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("X", value)
        manifest = sb.load(job, [override])
        section, key = override.partition("=")[0].split(".")
        plain, filled = manifest.dump()[section][key], getattr(getattr(manifest, section), key)
        if key == "model":
            plain, filled = plain["path"], filled.path
        assert plain == recorded
        assert value in str(filled)
        assert set(manifest.environment) == {"X"}
        again = sb.Manifest.model_validate(manifest.dump())
        assert again.dump() == manifest.dump(), "what is recorded is a manifest, too"
        assert again.identity == manifest.identity

    @pytest.mark.parametrize(
        ("override", "value", "recorded"),
        [
            ("objective.steps=${X}", "7", 7),
            ("objective.learning_rate=${X}", "0.5", 0.5),
            ("image.fit=${X}", "bucket", "bucket"),
            ("compute.workers=${X}", "3", 3),
            ("storage.anonymous=${X}", "true", True),
            ("style.scale=['${X}']", "0.5", [0.5]),
        ],
    )
    def test_a_setting_as_it_is(
        self, override: str, value: str, recorded: object, job: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("X", value)
        manifest = sb.load(job, [override])
        section, key = override.partition("=")[0].split(".")
        assert manifest.dump()[section][key] == recorded
        assert manifest.environment == {}

    @pytest.mark.parametrize(
        ("environment", "urls"),
        [({}, ["a/d"]), ({"X": ""}, ["a/d"]), ({"X": "b"}, ["a/${X}"])],
    )
    def test_a_default_is_plain_text(
        self, environment: dict[str, str], urls: list[str], job: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        manifest = sb.load(job, ["source.urls='a/${X:-d}'"])
        assert manifest.source.urls == ("a/b",) if environment.get("X") else ("a/d",)
        assert manifest.dump()["source"]["urls"] == urls

    def test_an_empty_value_is_empty(self, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("X", "")
        manifest = sb.load(job, ["source.urls='a/${X}b'"])
        assert manifest.source.urls == ("a/b",)
        assert manifest.dump()["source"]["urls"] == ["a/b"]

    @pytest.mark.parametrize("value", ["${X-d}", "${X:?no}", "${X:=d}", "${}", "${1X}", "${X", "$${X}", "${A:-${X}}"])
    def test_other_forms_are_told(self, value: str, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("X", "b")
        with pytest.raises(sb.ManifestError, match=r"style.prompt: .* is not understood; .* or \$\{NAME:-default\}"):
            sb.load(job, [f"style.prompt='{value}'"])

    @pytest.mark.parametrize("key", ["objective.steps", "compute.pool", "image.fit", "storage.endpoint"])
    def test_no_message_shows_a_value(self, key: str, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("X", SECRET)
        with pytest.raises(sb.ManifestError) as told:
            sb.load(job, [f"{key}=${{X}}"])
        assert SECRET not in str(told.value)
        assert key in str(told.value)

    def test_a_secret_beside_it_is_refused(self, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("X", "b")
        for url in ("https://me:pw@h/${X}", "https://h/${X}?token=abc", "https://h/?token=abc${X}"):
            with pytest.raises(sb.ManifestError, match="holds a secret"):
                sb.load(job, [f"source.urls='{url}'"])

    def test_a_copy_has_what_was_changed(self, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("X", "oil")
        manifest = sb.load(job, ["style.prompt=${X}", "output.path=${X}"])
        moved = manifest.model_copy(update={"output": manifest.output.model_copy(update={"path": "elsewhere"})})
        assert moved.dump()["output"]["path"] == "elsewhere"
        assert moved.dump()["style"]["prompt"] == "${X}"
        assert moved.absolute().dump()["style"]["prompt"] == "${X}"

    def test_another_process_hides_it_too(self, job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a worker does, which gets the manifest alone."""
        monkeypatch.setenv("X", SECRET)
        monkeypatch.setenv("LONGER", f"{SECRET}/more words")
        monkeypatch.setenv("SHORT", "ab")
        overrides = ["style.prompt='${X} ${SHORT}'", "source.urls=${LONGER}"]
        data = pickle.dumps(sb.load(job, overrides))
        monkeypatch.setattr(text, "_values", {})
        assert pickle.loads(data).style.prompt == f"{SECRET} ab"
        assert redact(f"about {SECRET}/more%20words, {SECRET}/more words and {SECRET}") == (
            "about ${LONGER}, ${LONGER} and ${X}"
        )
        assert str(sb.StorageError(f"no {SECRET}")) == "no ${X}"
        assert str(sb.SampleError("read_error", f"no {SECRET}")) == "no ${X}"


def everything(folder: Path) -> Iterator[str]:
    """All that a run leaves but its plan, which says where each sample lies; and its rows, which are compressed."""
    for file in folder.rglob("*"):
        if file.is_file() and file.parent.name != "plan":
            yield file.read_text("latin-1")
    yield str(rows(folder))


class TestARun:
    @pytest.fixture
    def begun(self, job: Path, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run whose source, words and LoRA are of the environment, with a sample that fails; its manifest."""
        place = tmp_path / SECRET
        make_photos(place / "photos", ["a", "b"])
        (place / "photos/broken.png").write_bytes(b"no picture")
        shutil.copy(lora, place / "style.safetensors")
        monkeypatch.setenv("PLACE", str(place))
        monkeypatch.setenv("WORDS", f"{SECRET} style")
        made = job.read_text().replace(str(tmp_path / "photos"), "${PLACE}/photos").replace("wavy style", "${WORDS}")
        job.write_text(made.replace(str(lora), "${PLACE}/style.safetensors"))
        done = CliRunner().invoke(app, ["run", str(job), "--set", "errors.max_failed_fraction=1"])
        assert done.exit_code == 0, done.output
        assert SECRET not in done.output
        return job

    def test_nothing_that_it_leaves_shows_them(self, begun: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert not any(SECRET in text for text in everything(out))
        assert rows(out)["a"]["prompt"].startswith("${WORDS}")
        assert rows(out)["a"]["url"] == "${PLACE}/photos/a.png"
        assert "${PLACE}/photos/broken.png" in rows(out)["broken"]["url"]
        assert "${WORDS}" in (out / "README.md").read_text()
        for verb in ("status", "verify", "errors", "plan"):
            shown = CliRunner().invoke(app, [verb, str(begun), "--json"]).output
            assert SECRET not in shown

    def test_who_looks_needs_none_of_them(self, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("PLACE")
        monkeypatch.delenv("WORDS")
        for verb in (["status"], ["verify", "--full"], ["errors"], ["gc"], ["repair"]):
            done = CliRunner().invoke(app, [verb[0], str(tmp_path / "out"), *verb[1:]])
            assert done.exit_code == 0, done.output

    def test_a_changed_value_is_drift(self, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = sb.load(begun)
        monkeypatch.setenv("WORDS", "other words")
        with pytest.raises(sb.DriftError, match=r"environment.WORDS .*--allow-drift environment.WORDS") as told:
            sb.run(sb.load(begun))
        assert SECRET not in str(told.value)
        assert "other words" not in str(told.value)
        with pytest.raises(sb.RequestError, match=r"--allow-drift environment\.OTHER: no such key"):
            sb.run(sb.load(begun), allow_drift=["environment.OTHER"])
        for allowed in ("environment", "environment.WORDS"):
            sb.plan(sb.load(begun), allow_drift=[allowed])
        loose = ["errors.max_failed_fraction=1"]
        sb.run(sb.load(begun, loose), allow_drift=["environment"])
        sb.run(sb.load(begun, loose))
        assert not any("other words" in text for text in everything(tmp_path / "out"))
        sb.run(manifest.model_copy(update={"errors": sb.load(begun, loose).errors}))

    def test_a_run_that_recorded_values_goes_on(self, begun: Path, tmp_path: Path) -> None:
        """As version 0.1 did."""
        file = tmp_path / "out/run.json"
        (tmp_path / "out/_smsbatch/run.json").unlink()
        about = json.loads(file.read_text())
        del about["environment"], about["sha256"]
        about["manifest"] = sb.load(begun).model_dump(mode="json")
        file.write_text(json.dumps(about | {"manifest_sha256": identity_of(about["manifest"])}))
        assert sb.run(sb.load(begun, ["errors.max_failed_fraction=1"])).succeeded == 2

    def test_who_computes_needs_them(self, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, words = str(tmp_path / "out"), f"{SECRET} style"
        for attempt in (tmp_path / "out/_smsbatch/attempts").rglob("*.tar"):
            attempt.unlink()
        for tar in (tmp_path / "out/shards").iterdir():
            tar.unlink()
        monkeypatch.delenv("WORDS")
        for verb in (lambda: sb.replay(out, "a", tmp_path / "a.png"), lambda: sb.repair(out, full=True)):
            with pytest.raises(sb.RequestError, match="takes WORDS from the environment, which has none now; set it"):
                verb()
        monkeypatch.setenv("WORDS", "other words")
        for verb in (lambda: sb.replay(out, "a", tmp_path / "a.png"), lambda: sb.repair(out, full=True)):
            with pytest.raises(sb.DriftError, match=r"environment\.WORDS"):
                verb()
        monkeypatch.setenv("WORDS", words)
        assert sb.repair(out, full=True).ok
        assert sb.replay(out, "a", tmp_path / "a.png").succeeded

    def test_where_it_lies_may_change(self, begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The place of the output and its store change no result."""
        monkeypatch.setenv("OUT", str(tmp_path / "one"))
        options = ["output.path=${OUT}", "errors.max_failed_fraction=1"]
        sb.run(sb.load(begun, options))
        (tmp_path / "one").rename(tmp_path / "two")
        monkeypatch.setenv("OUT", str(tmp_path / "two"))
        assert sb.run(sb.load(begun, options)).succeeded == 2
        assert json.loads((tmp_path / "two/run.json").read_text())["manifest"]["output"]["path"] == "${OUT}"

    @pytest.mark.slow
    def test_workers_of_a_cluster_hide_them_too(self, begun: Path, tmp_path: Path) -> None:
        options = ["errors.max_failed_fraction=1", f"output.path={tmp_path / 'ray'}", "compute.pool=ray"]
        assert sb.run(sb.load(begun, options)).succeeded == 2
        assert not any(SECRET in text for text in everything(tmp_path / "ray"))
        assert rows(tmp_path / "ray")["a"]["url"] == "${PLACE}/photos/a.png"
        assert "${PLACE}/photos/broken.png" in rows(tmp_path / "ray")["broken"]["url"]


def test_addresses_with_tokens_are_not_shown_although_only_a_part_is_the_value(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Braces and globs make other addresses of a value; what is known as a token is hidden in all of them."""
    token = "token=BRACESECRET12345"
    for name in "bc":
        make_tar(tmp_path / "photos" / f"{name}.tar?{token}", [(f"{name}.jpg", b"x"), (f"{name}.txt", b"y")])
    (tmp_path / "photos" / f"c.tar?{token}").write_bytes(b"")
    monkeypatch.setenv("X", f"{tmp_path}/photos/{{b,c}}.tar?{token}")
    found = sb.plan(sb.load(job, ["source.format=webdataset", "source.urls=${X}"]))
    assert len(found.notices) == 1
    assert "BRACESECRET" not in str(found.notices)
    monkeypatch.setenv("X", f"{tmp_path}/photos/{{b,gone}}.tar?{token}")
    with pytest.raises(sb.SourceError, match=r"gone\.tar\?token=\*\*\* no such file"):
        sb.plan(sb.load(job, ["source.format=webdataset", "source.urls=${X}"]))


def test_the_report_reads_a_table_by_the_rules_of_where_it_lies(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_photos(tmp_path / "photos", ["a"])
    (tmp_path / "photos" / "t.csv").write_text("url\na.png\n")
    monkeypatch.setenv("X", f"{tmp_path}/photos/t.csv")
    asked: list[Any] = []
    original = Reader.of

    def noted(source: Any, *rest: Any) -> Reader:
        asked.append(source.urls)
        return original(source, *rest)

    monkeypatch.setattr(gallery, "Reader", SimpleNamespace(of=noted))
    sb.run(sb.load(job, ["source.format=table", "source.urls=${X}", "objective.prompt='{style}'"]))
    assert asked == [(f"{tmp_path}/photos/t.csv",)]
