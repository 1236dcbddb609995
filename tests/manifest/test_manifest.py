"""The manifest: accepted values, error messages and presets.

Over 400 lines: most of them are tables of error messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

import smsbatch as sb
from smsbatch.diffusion.objectives import OBJECTIVES
from smsbatch.manifest import (
    PAPERS,
    PRESETS,
    Distill,
    Fake,
    Model,
    Objective,
    Optimize,
    ScoreObjective,
    Stylize,
    schema as of_manifests,
)
from smsbatch.storage.retries import redact

GOOD = """\
task: optimize
name: test
source:
  format: folder
  urls: photos
model: {path: tiny}
style:
  lora: tiny:styles/oil.safetensors
  prompt: oil painting style
output:
  path: out/test
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "manifest.yaml"
    path.write_text(GOOD)
    return path


def fails(file: Path, *overrides: str) -> str:
    with pytest.raises(sb.ManifestError) as caught:
        sb.load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message, "one line"
    return message.replace(str(file), "manifest.yaml")


def test_defaults_are_the_released_constants(file: Path) -> None:
    objective = sb.load(file).objective
    assert (objective.steps, objective.guidance, objective.fake_guidance) == (500, 4.5, 4.5)
    assert (objective.learning_rate, objective.weight_decay, objective.identity_weight) == (0.1, 0.01, 5e-4)
    assert (objective.t_min, objective.t_max, objective.grid) == (20, 500, 2)
    assert (objective.fake.rank, objective.fake.alpha, objective.fake.learning_rate) == (8, 32, 1e-3)


def test_presets_are_what_they_were(golden: Callable[[str, str], str]) -> None:
    """Every constant of every objective and preset equals the stored one."""
    found = {
        name: {preset: Objective.model_validate({"name": name, "preset": preset}).model_dump() for preset in presets}
        for name, presets in PRESETS.items()
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    assert json.loads(text) == json.loads(golden("presets.json", text)), "if it should be: pytest --regenerate-golden"


def test_every_objective_has_presets_a_paper_and_a_class() -> None:
    names = set(get_args(ScoreObjective.model_fields["name"].annotation))
    assert names == PRESETS.keys() == PAPERS.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("sms", {"steps": 500, "guidance": 4.5, "weight": "posterior_variance", "timesteps": "adaptive"}),
        ("vsd", {"guidance": 7.5, "fake_guidance": 1, "weight": "one_minus_abar", "t_min": 20, "t_max": 980}),
        ("sds", {"guidance": 100, "weight": "one_minus_abar", "t_min": 20, "t_max": 980}),
        ("dds", {"guidance": 7.5, "weight": "one", "t_min": 50, "t_max": 948, "steps": 200, "optimizer": "sgd"}),
        ("pds", {"guidance": 100, "grid": 2, "t_min": 20, "t_max": 980}),
        ("cds", {"guidance": 7.5, "weight": "one", "t_min": 50, "t_max": 948, "contrastive_weight": 3}),
    ],
)
def test_each_objective_has_the_constants_of_its_source(name: str, constants: dict[str, Any]) -> None:
    objective = Objective.model_validate({"name": name})
    assert {key: getattr(objective, key) for key in constants} == constants
    if name != "sms":
        assert (objective.relevance, objective.identity_weight, objective.timesteps) == ("off", 0, "uniform")
        assert objective.weight_decay == 0
    if objective.optimizer == "sgd":
        assert objective.learning_rate == pytest.approx(0.0488, abs=5e-5)
        assert (objective.warmup, objective.horizon) == (0, None)


def test_the_fake_score_of_vsd_is_trained_as_its_source_does() -> None:
    fake = Objective(name="vsd").fake
    assert (fake.rank, fake.alpha, fake.learning_rate, fake.weight, fake.trains_on) == (4, 4, 1e-4, "one", "before")
    assert fake.layers == ("to_q", "to_k", "to_v", "to_out.0")
    assert Objective(name="vsd").fake_range == (0, 999)
    assert Objective().fake_range == (20, 500)
    assert Objective(t_min=30, fake=Fake(t_max=900)).fake_range == (30, 900)


def test_what_only_sms_has_can_be_switched_on_elsewhere() -> None:
    """An ablation needs no code, only a manifest."""
    dds = Objective.model_validate({"name": "dds", "relevance": "abs_mean", "identity_weight": 1e-3, "horizon": 1.5})
    assert (dds.relevance, dds.identity_weight, dds.horizon, dds.guidance) == ("abs_mean", 1e-3, 1.5, 7.5)


def test_the_preset_paper() -> None:
    paper = Objective(preset="paper")
    assert (paper.guidance, paper.fake_guidance, paper.relevance, paper.spectral_norm) == (1, 1, "abs_mean", "l2")
    assert (paper.prompt, paper.edit_prompt) == ("{caption}", "Turn it into {style}")
    assert (paper.fake.weight, paper.fake.trains_on) == ("one", "before")
    assert paper.fake.rank == 8


def test_a_given_field_wins_over_the_preset() -> None:
    mixed = Objective.model_validate({"preset": "paper", "guidance": 3, "fake": {"weight": "alpha_bar"}})
    assert (mixed.guidance, mixed.fake_guidance) == (3, 1)
    assert (mixed.fake.weight, mixed.fake.trains_on) == ("alpha_bar", "before")


def test_prompts() -> None:
    released, paper = Objective(), Objective(preset="paper")
    assert released.prompts("oil style", "a fox") == ("oil style, a fox", "a fox", "Turn into oil style")
    assert released.prompts("oil style", "") == ("oil style", "", "Turn into oil style")
    assert paper.prompts("oil style", "") == ("", "", "Turn it into oil style")
    assert paper.prompts("oil style", "a {style} fox") == ("a {style} fox", "a {style} fox", "Turn it into oil style")
    other = Objective(source_prompt="a photo of {caption}")
    assert other.prompts("oil style", "a fox").source == "a photo of a fox"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("name: test", "nam: test", "manifest.yaml:2: nam: no such key; did you mean name?"),
        ("model: {", "modell: {", "manifest.yaml:6: modell: no such key; did you mean model?"),
        ("name: test", "name: 2020-13-45", "not valid YAML: month must be in 1..12"),
        ("  prompt: oil", "  promt: oil", "manifest.yaml:9: style.promt: no such key; did you mean prompt?"),
        ("format: folder", "format: zip", "manifest.yaml:4: source.format: input should be 'webdataset', 'folder' or"),
        ("  urls: photos\n", "", "manifest.yaml:3: source.urls: is missing"),
        ("urls: photos", "urls: []", "manifest.yaml:5: source.urls: names no file or folder"),
        ("path: tiny", "path: [", "not valid YAML"),
        ("path: tiny", "path: '${NOT_SET}'", "manifest.yaml:6: model.path: the environment has no NOT_SET"),
        ("name: test", "name: test\nname: again", "manifest.yaml:3: name: is given a second time"),
        ("task: optimize", "task: dance", "manifest.yaml:1: task: is one of optimize, distill, stylize, not 'dance'"),
    ],
)
def test_errors_name_file_line_and_key(file: Path, before: str, after: str, message: str) -> None:
    assert before in GOOD
    file.write_text(GOOD.replace(before, after))
    assert message in fails(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("style.lorra=x", "--set style.lorra: no such key; did you mean lora?"),
        ("objective.steps=-1", "--set objective.steps: input should be greater than or equal to 1, not -1"),
        ("compute.workers=many", "--set compute.workers: input should be a valid integer"),
        ("compute.workers=0", "--set compute.workers: must be at least 1"),
        ("output.samples_per_unit=0", "greater than or equal to 1, not 0"),
        ("objective.t_min=600", "t_min (600) must be below t_max (500)"),
        ("objective.prompt='{foo} {style}'", "unknown {foo}"),
        ("objective.source_prompt='{foo}'", "unknown {foo}"),
        ("objective.name=ism", "input should be 'sms', 'vsd', 'sds', 'dds', 'pds' or 'cds', not 'ism'"),
        ("objective={name: dds, preset: paper}", "preset paper exists only for sms, not for dds; leave it out"),
        ("objective={name: vsd, preset: fast}", "preset fast exists only for sms, not for vsd; leave it out"),
        ("objective={name: dds, fake: {trains_on: forward}}", "dds asks no fake score; leave fake.trains_on out"),
        ("objective.fake={t_min: 600}", "fake.t_min (600) must be below fake.t_max (500)"),
        ("objective.spectral_cutoff=1.5", "--set objective.spectral_cutoff: is a fraction of the frequencies, 0 to 1"),
        ("objective.spectral_cutoff=-0.1", "is a fraction of the frequencies, 0 to 1, or progressive"),
        ("objective.relevance_clip=-1", "greater than or equal to 0, not -1"),
        ("objective.relevance_grid=0", "greater than or equal to 1, not 0"),
        ("objective.stall=0", "greater than 0, not 0"),
        ("objective.horizon=0.5", "greater than or equal to 1, not 0.5"),
        ("objective.contrastive_weight=-1", "greater than or equal to 0, not -1"),
        ("style.scale=[1.0, 0.5]", "scale lists 2 numbers, style.lora 1 files"),
        ("style.scale=0", "--set style.scale: 0.0 is not between -4 and 4, or is 0"),
        ("style.scale=[5.0]", "5.0 is not between -4 and 4"),
        ("style.model={revision: main}", "style.model.path: is missing"),
        ("objective.fake.layers=[]", "--set objective.fake.layers: tuple should have at least 1 item"),
        ("objective.betas=[0.9, 1.0]", "--set objective.betas: input should be less than 1"),
        ("objective.learning_rate=.inf", "--set objective.learning_rate: input should be a finite number"),
        ("style.lora=['']", "--set style.lora: names no file"),
        ("objective.spectral_cutoff=true", "--set objective.spectral_cutoff: input should be"),
        ("style.model={path: tiny, conf: x}", "style.model.conf: no such key; did you mean config?"),
        ("objective.steps={", "the value is not valid YAML; quote text: objective.steps='...'"),
        ("objective.name=[sms]", "--set objective.name: input should be 'sms'"),
        ("steps", "expected key.path=value"),
        ("name.x=1", "name is a value, not a section"),
        ("name=]", "not valid YAML"),
    ],
)
def test_overrides_are_checked_too(file: Path, override: str, message: str) -> None:
    assert message in fails(file, override)


@pytest.mark.parametrize("prompt", ["{caption}", "{style}, {caption}", "{caption} in {style}"])
def test_a_prompt_may_begin_with_a_word_to_fill_in(file: Path, prompt: str) -> None:
    assert sb.load(file, [f"objective.prompt={prompt}"]).objective.prompt == prompt


def test_something_has_to_say_what_the_style_is(file: Path) -> None:
    assert sb.load(file, ["style.lora=[]"]).style.loras == []
    assert (
        sb.load(file, ["style.lora=[]", "style.model=tiny", "objective.preset=paper"]).objective.prompt == "{caption}"
    )
    assert "nothing says what the style is" in fails(file, "style.lora=[]", "objective.preset=paper")


def test_a_model_may_be_its_path_alone(file: Path) -> None:
    assert sb.load(file, ["model=tiny", "style.model=tiny"]).model.path == "tiny"


def test_yaml_s_off_is_off(file: Path) -> None:
    assert sb.load(file, ["objective.relevance=off"]).objective.relevance == "off"


def test_overrides_win_and_are_resolved(file: Path) -> None:
    manifest = sb.load(file, ["output.path=elsewhere", "objective.fake.rank=4", "compute.workers=3"])
    assert manifest.output.path == "elsewhere"
    assert manifest.dump()["objective"]["fake"]["rank"] == 4
    assert manifest.compute.workers == 3


@pytest.mark.parametrize(
    ("override", "loras"),
    [
        ("style.lora=a.safetensors", [("a.safetensors", 0.8)]),
        ("style.lora=[a.safetensors, b.safetensors]", [("a.safetensors", 0.8), ("b.safetensors", 0.8)]),
        ("style={lora: [a, b], scale: [1.0, -0.5], prompt: oil}", [("a", 1.0), ("b", -0.5)]),
        ("style.lora=null", []),
        ("style.lora=[]", []),
    ],
)
def test_styles_of_no_one_and_many_loras(file: Path, override: str, loras: list[tuple[str, float]]) -> None:
    assert sb.load(file, [override]).style.loras == loras


def test_a_style_of_another_checkpoint(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sb.load(file).style.model is None
    assert sb.load(file, ["style.model=some/model"]).style.model == Model(path="some/model")
    there = sb.load(file, ["style.model={path: some/model, revision: v1}"])
    assert there.style.model == Model(path="some/model", revision="v1")
    assert there.identity != sb.load(file).identity
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    absolute = there.absolute()
    assert absolute.style.model == Model(path=str(tmp_path / "some" / "model"), revision="v1")
    assert absolute.model.path == "tiny"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("objective.spectral_cutoff=0.3", 0.3),
        ("objective.spectral_cutoff=1", 1.0),
        ("objective.spectral_cutoff=progressive", "progressive"),
        ("objective.horizon=null", None),
        ("objective.relevance_clip=1.5", 1.5),
        ("objective.timesteps=linear", "linear"),
        ("objective.weight=dmd", "dmd"),
        ("objective.identity=latent_lpips", "latent_lpips"),
    ],
)
def test_ablations_are_one_override_each(file: Path, override: str, value: object) -> None:
    manifest = sb.load(file, [override])
    assert getattr(manifest.objective, override.split("=")[0].removeprefix("objective.")) == value
    default = getattr(Objective(), override.split("=")[0].removeprefix("objective."))
    assert (manifest.identity == sb.load(file).identity) == (value == default)


def test_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD.replace("out/test", "${ROOT:-/tmp}/x/${WHO}"))
    monkeypatch.setenv("WHO", "me")
    monkeypatch.delenv("ROOT", raising=False)
    assert sb.load(file).output.path == "/tmp/x/me"
    monkeypatch.delenv("WHO")
    assert sb.load(file, ["output.path=x/${ROOT:-y}"]).output.path == "x/y", "an override replaces, and is read alike"
    monkeypatch.setenv("WHO", "me")
    monkeypatch.setenv("ROOT", "/data")
    assert sb.load(file).output.path == "/data/x/me"


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    assert "cannot read the manifest" in fails(tmp_path / "none.yaml")
    for content, message in ((b"", "a mapping of keys"), (b"- a", "a mapping of keys"), (b"\xff\xfe\xfa", "not UTF-8")):
        (tmp_path / "odd.yaml").write_bytes(content)
        assert message in fails(tmp_path / "odd.yaml")


def test_identity_is_all_that_results_depend_on(file: Path) -> None:
    same = ("compute.batch_size=2", "errors.max_failed_fraction=1", "output.path=x")
    other = (
        "compute.precision=bf16",
        "seed=1",
        "objective.steps=3",
        "output.quality=90",
        "style.scale=1",
        "image.resolution=64",
    )
    identity = sb.load(file).identity
    assert {sb.load(file, [override]).identity for override in same} == {identity}
    assert identity not in {sb.load(file, [override]).identity for override in other}


def test_the_schema_explains_every_key() -> None:
    """`smsbatch schema` could not explain a field without a docstring."""
    schema = of_manifests()

    def unexplained(section: dict[str, Any], name: str) -> list[str]:
        return [
            f"{name}.{key}"
            for key, value in section["properties"].items()
            if not value.get("description") and "$ref" not in value
        ]

    assert {"Optimize", "Distill", "Stylize"} <= schema["$defs"].keys()
    assert [field for name, section in schema["$defs"].items() for field in unexplained(section, name)] == []
    assert all(section.get("description") for section in schema["$defs"].values())


def test_manifests_of_the_repository_are_valid() -> None:
    root = Path(__file__).parents[2]
    files = [*sorted((root / "manifests").glob("*.yaml")), root / "smsbatch" / "template.yaml"]
    assert len(files) >= 2
    for path in files:
        assert sb.load(path).name
        plain = yaml.safe_load(path.read_text())
        assert plain["source"]["urls"].startswith("tiny:")
        jsonschema.validate(plain, of_manifests())


SECRETS = [
    ("source.urls", "https://user:hunter2@example.org/a.tar"),
    ("source.urls", "[data/a.tar, 's3://AKIA0123456789ABCDEF:hunter2@bucket/a.tar']"),
    ("storage.endpoint", "http://minio:hunter2@localhost:9000"),
    ("style.lora", "https://example.org/x.safetensors?X-Amz-Signature=hunter2"),
    ("output.path", "s3://bucket/AKIA0123456789ABCDEF"),
    ("source.urls", "https://hunter2@example.org/a.tar"),
    *[
        ("source.urls", f"https://example.org/a.tar?v=1&{name}=hunter2")
        for name in (
            "access_token",
            "apiKey",
            "api-key",
            "auth",
            "client_secret",
            "jwt",
            "key",
            "password",
            "pwd",
            "sig",
        )
    ],
    *[
        ("source.urls", f"https://example.org/a.tar?{name}=hunter2&v=1")
        for name in ("Signature", "token", "X-Amz-Credential", "X-Amz-Security-Token", "X-Goog-Signature")
    ],
    ("source.urls", "https://example.org/a.tar#access_token=hunter2"),
]


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_a_secret_is_refused_and_not_repeated(key: str, value: str, file: Path) -> None:
    """The resolved manifest is stored with the run, where every user of the run can read it."""
    message = fails(file, f"{key}={value}")
    assert "holds a secret" in message
    assert "hunter2" not in message
    assert "AKIA" not in message


def test_a_secret_in_the_file_is_named_by_its_line(file: Path) -> None:
    file.write_text(GOOD + "storage: {endpoint: 'http://minio:hunter2@localhost:9000'}\n")
    assert "manifest.yaml:12: storage.endpoint: holds a secret" in fails(file)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org:8080/a.tar?version=3&page=a@b",
        "https://example.org/@me/a.tar?author=me&design=1&monkey=2&sort_key=date&keyword=x&expires=1",
        "s3://bucket/sig=1/{0..3}.tar",
        "s3://bucket/token=1/me@x/a?key.tar",
        "abfs://container@account.dfs.core.windows.net/a.tar",
        "sftp://me@host/a.tar",
        "data/me@home:1/a.tar",
    ],
)
def test_an_ordinary_url_is_no_secret(url: str, file: Path) -> None:
    assert sb.load(file, [f"source.urls='{url}'"]).source.urls == (url,)


@pytest.mark.parametrize(("key", "value"), SECRETS)
def test_what_a_manifest_may_not_hold_no_message_shows(key: str, value: str) -> None:
    shown = redact(f"cannot read {value}: no")
    assert "hunter2" not in shown
    assert "AKIA" not in shown
    assert "***" in shown


def test_how_storage_is_reached_changes_no_result(file: Path) -> None:
    moved = sb.load(file, ["storage.endpoint=http://localhost:9000", "storage.retries=1"])
    assert moved.identity == sb.load(file).identity


def test_an_endpoint_without_its_scheme_is_explained(file: Path) -> None:
    assert "put http:// or https:// in front" in fails(file, "storage.endpoint=127.0.0.1:9000")


DISTILL = """\
task: distill
name: oil
source: {format: folder, urls: "tiny:photos"}
model: {path: tiny}
style: {lora: "tiny:styles/oil.safetensors", prompt: oil painting style}
output: {path: out/oil}
compute: {workers: 2}
"""
STYLIZE = """\
task: stylize
name: oil-pictures
source: {format: folder, urls: "tiny:photos"}
generator: out/oil
output: {path: out/oil-pictures}
"""


@pytest.fixture
def distill(tmp_path: Path) -> Path:
    file = tmp_path / "distill.yaml"
    file.write_text(DISTILL)
    return file


@pytest.fixture
def stylize(tmp_path: Path) -> Path:
    file = tmp_path / "stylize.yaml"
    file.write_text(STYLIZE)
    return file


def test_every_task_has_its_own_manifest(file: Path, distill: Path, stylize: Path) -> None:
    assert [type(sb.load(path)) for path in (file, distill, stylize)] == [Optimize, Distill, Stylize]
    for path in (file, distill, stylize):
        manifest = sb.load(path)
        assert sb.Manifest.model_validate(manifest.dump()) == manifest
        assert sb.Manifest.model_validate(manifest.absolute().dump()).identity
        jsonschema.validate(yaml.safe_load(path.read_text()), of_manifests())


def test_the_defaults_of_a_training_are_the_paper_s(distill: Path) -> None:
    training = sb.load(distill).distill
    assert (training.width, training.blocks, training.repeats, training.restore) == (64, 9, 4, False)
    assert training.all_steps == training.warmup_steps + training.steps


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("objective.learning_rate=0.1", "objective.learning_rate: is no key of task distill"),
        ("objective.steps=10", "objective.steps: is no key of task distill"),
        ("objective.preset=fast", "objective: preset: fast exists only for optimize; a training is made cheaper by"),
        ("metrics=[lpips]", "metrics: is no key of task distill"),
        ("output.format=png", "output.format: is no key of task distill"),
        ("image.fit=bucket", "image.fit: is no key of task distill"),
        ("image.resolution=100", "image.resolution: 100 is no multiple of 8"),
        ("compute.precision=fp16", "compute: precision: fp16 has too small a range to train in; take bf16"),
        ("distill.images_per_step=5", "distill.images_per_step (5) cannot be divided among 2 workers"),
        ("compute.gpus_per_worker=2", "compute: gpus_per_worker: a worker trains on one GPU"),
        ("errors.max_failed_fraction_per_unit=0.5", "errors: max_failed_fraction_per_unit: a training has no units"),
        ("objective.fake={trains_on: forward, updates: 2}", "fake.updates is 1 where"),
        ("objective.fake={trains_on: forward, t_max: 300}", "fake.t_min and t_max are the objective's where"),
        ("distill.betas=[0.5, 1]", "distill.betas: input should be less than 1, not 1"),
    ],
)
def test_what_a_training_does_not_take_is_explained(distill: Path, override: str, told: str) -> None:
    with pytest.raises(sb.ManifestError) as caught:
        sb.load(distill, [override])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("objective.name=dds", "objective: is no key of task stylize"),
        ("model.path=tiny", "model: is no key of task stylize"),
        ("tiles.size=130", "tiles.size: input should be a multiple of 4, not 130"),
        ("tiles={size: 256, overlap: 160}", "tiles: overlap (160) is more than half of size (256)"),
        ("generator=''", "generator: string should have at least 1 character"),
    ],
)
def test_what_stylize_does_not_take_is_explained(stylize: Path, override: str, told: str) -> None:
    with pytest.raises(sb.ManifestError) as caught:
        sb.load(stylize, [override])
    assert told in str(caught.value)


def test_where_a_generator_lies_is_found_from_any_folder(
    stylize: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sb.load(stylize).absolute().generator == str(tmp_path / "out" / "oil")
    assert sb.load(stylize, ["generator=s3://bucket/oil"]).absolute().generator == "s3://bucket/oil"


def test_how_often_something_is_written_changes_no_result(distill: Path) -> None:
    identity = sb.load(distill).identity
    same = ("distill.checkpoint_every=7", "distill.keep=9", "distill.log_every=1", "distill.checkpoint_vae=true")
    assert {sb.load(distill, [override]).identity for override in same} == {identity}
    assert sb.load(distill, ["distill.steps=7"]).identity != identity
