"""The manifest: what to run. Every field, its default, its explanation and its validation.

A manifest is frozen and resolved: two equal manifests ask for the same run. `manifest_file.py` reads one from YAML.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "SECRET",
    "Compute",
    "Errors",
    "Fake",
    "Image",
    "Manifest",
    "Model",
    "Objective",
    "Output",
    "Source",
    "Storage",
    "Style",
]

SECRET = re.compile(
    # Before a web server's host anything, elsewhere a password: `abfs://container@account` is no secret.
    r"(?:(?<=http://)|(?<=https://))[^/\s]+(?=@)|(?<=://)[^/\s:]*:[^/\s]*(?=@)"
    # The first look keeps the time linear in the length of what may be anybody's text.
    r"|(?P<shown>[?&#](?=[^?#=&\s]*=)(?:(?:[^?#=&\s]*[-_.])?(?:sig|auth|pwd|authorization)|key|[^?#=&\s]*"
    r"(?:signature|token|secret|credential|passw|passphrase|jwt|(?:api|access|private)[-_]?key)[^?#=&\s]*)=)[^&\s'\"]*"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    re.IGNORECASE,
)
"""What opens a door by itself, anywhere in a text: userinfo of a URL, a signature or token in its query (the group
`shown` is all but the value), an AWS access key. A manifest may not hold it, a message does not show it."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_secret(cls, value: Any) -> Any:
        """A manifest is stored with the run, for everybody to read."""
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, str) and SECRET.search(item):
                raise ValueError(
                    "holds a secret, which a manifest must not: credentials come from the environment "
                    "(AWS_PROFILE, ~/.aws, the machine's role); signed URLs belong in a table"
                )
        return value


def _or_one(schema: dict[str, Any]) -> None:
    """A list of strings may be given as one string; editors that check by the schema are told so."""
    schema["anyOf"] = [{"type": "string"}, {"type": schema.pop("type"), "items": schema.pop("items")}]


class Columns(_Section):
    """Which columns of a table mean what."""

    image: str = "url"
    """Where the picture is: a path (relative ones start at the table's folder), `http(s)://` or `s3://`."""
    caption: str | None = None
    """Its caption; without one the prompt is the style alone."""
    key: str | None = None
    """Its key, unique in the run; without one keys are made of the table's name and the row's number."""


class Source(_Section):
    """Where the samples come from."""

    format: Literal["webdataset", "folder", "table"]
    """`webdataset`: tar files; `folder`: a tree of image files with captions beside them; `table`: csv, tsv, jsonl or
    parquet files whose rows name pictures."""
    urls: tuple[str, ...] = Field(json_schema_extra=_or_one)
    """Tars, folders or tables: one or a list; tars and tables take globs and brace ranges (`{00000..00499}.tar`)."""
    images: tuple[str, ...] = Field(("jpg", "jpeg", "png", "webp"), json_schema_extra=_or_one)
    """Extensions that are the picture, in order of preference."""
    caption: tuple[str, ...] = Field(("txt", "json:caption"), json_schema_extra=_or_one)
    """Where the caption is: an extension, or `extension:key` of a JSON object. The first that exists, else none.
    Of tables see `columns`."""
    columns: Columns = Columns()
    """Of tables."""
    max_bytes: int = Field(100_000_000, ge=1)
    """A picture's file with more bytes is a failed row (`too_large`), and is never read or downloaded whole."""
    limit: int | None = Field(None, ge=1)
    """Take only so many samples, the first. `--limit N` sets it."""

    @field_validator("urls", "images", "caption", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("images")
    @classmethod
    def _as_extensions(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(extension.lower().removeprefix(".") for extension in value)

    @field_validator("urls")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or not all(value):
            raise ValueError("names no file or folder")
        return value


class Model(_Section):
    """The prior: a latent diffusion model in diffusers' pipeline format."""

    path: str
    """Folder, hub id, or `tiny` for the embedded model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""


class Style(_Section):
    """The style score: the prior with this LoRA merged into its UNet."""

    lora: str
    """A kohya LoRA or LoCon file, or `tiny:styles/<name>.safetensors`."""
    scale: float = Field(0.8, gt=0, le=4)
    """Multiplies the LoRA's weight difference. 0.8: the released code's."""
    prompt: str = Field(min_length=1)
    """The words the LoRA was trained with, trigger words included."""


class Fake(_Section):
    """The fake score: the prior with one LoRA per sample, trained on its current result (paper, Eq. 19)."""

    rank: int = Field(8, ge=1)
    """Rank r of the LoRA."""
    alpha: float = Field(32.0, gt=0)
    """The LoRA is scaled by alpha / rank."""
    learning_rate: float = Field(1e-3, gt=0)
    """Of AdamW, constant."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Of AdamW."""
    weight: Literal["alpha_bar", "one"] = "alpha_bar"
    """What the noise error is multiplied by before squaring: `alpha_bar` (released code) or nothing (Eq. 19)."""
    trains_on: Literal["result", "before"] = "result"
    """The latent after this iteration's update (released code) or before it (Algorithm 1)."""


PRESETS: dict[str, dict[str, Any]] = {
    "released": {},  # the defaults below
    "paper": {
        "guidance": 1.0,
        "fake_guidance": 1.0,
        "prompt": "{caption}",
        "edit_prompt": "Turn it into {style}",
        "relevance": "abs_mean",
        "spectral_norm": "l2",
        "grid": 1,
        "fake": {"weight": "one", "trains_on": "before"},
    },
}
"""What a preset sets; a field given in the manifest wins over it."""


class Objective(_Section):
    """What optimizes a latent, with every constant. Defaults are those of the authors' released code."""

    name: Literal["sms"] = "sms"
    """`sms`: Style Matching Score (paper, Eq. 6)."""
    preset: Literal["released", "paper"] = "released"
    """`released`: the authors' published constants, without their bugs; `paper`: the paper's formulas.

    Where the paper is silent (w_t, learning rates, lambda), `paper` takes the released constants."""
    steps: int = Field(500, ge=1)
    """Iterations per image."""
    guidance: float = Field(4.5, ge=1)
    """Classifier-free guidance g of the style score; 1 is none."""
    fake_guidance: float = Field(4.5, ge=1)
    """Classifier-free guidance of the fake score."""
    prompt: str = "{style}, {caption}"
    """Target prompt; `{style}` is `style.prompt`, `{caption}` the sample's, which may be empty."""
    edit_prompt: str = "Turn into {style}"
    """Instruction of the relevance map (Eq. 4)."""
    relevance: Literal["mean_abs", "abs_mean", "off"] = "mean_abs"
    """Relevance map: mean over channels and absolute value, in this order, or no map."""
    spectral_weight: float = Field(5e-4, ge=0)
    """lambda of Eq. 6, on the per-entry mean of the penalty."""
    spectral_norm: Literal["l1", "l2"] = "l1"
    """Norm of Eq. 3: absolute values (released code) or squares (paper)."""
    t_min: int = Field(20, ge=1, le=998)
    """Smallest timestep of 1000."""
    t_max: int = Field(500, ge=2, le=999)
    """Upper bound of the timesteps at the first iteration; it falls linearly (Eq. 7)."""
    grid: Literal[1, 2] = 2
    """1: every timestep; 2: the released code's 500-step grid, odd timesteps only."""
    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate of AdamW on the latent."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW on the latent."""
    weight_decay: float = Field(0.01, ge=0)
    """Of AdamW on the latent. The released code's, by torch's default: it pulls the image toward grey."""
    warmup: float = Field(0.2, ge=0, lt=1)
    """Linear warm-up, as a fraction of the steps."""
    horizon: float = Field(1.5, ge=1)
    """Where the cosine after the warm-up would reach zero, in runs."""
    fake: Fake = Fake()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("preset") not in PRESETS:
            return data
        merged = PRESETS[data["preset"]] | dict(data)
        given = data.get("fake", {})
        if isinstance(given, Mapping):
            merged["fake"] = PRESETS[data["preset"]].get("fake", {}) | dict(given)
        return merged

    @model_validator(mode="after")
    def _ordered(self) -> Objective:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        return self

    @field_validator("prompt", "edit_prompt")
    @classmethod
    def _known_words(cls, value: str) -> str:
        unknown = sorted(set(re.findall(r"\{(\w*)\}", value)) - {"style", "caption"})
        if unknown:
            raise ValueError(f"unknown {{{unknown[0]}}}; {{style}} and {{caption}} are known")
        return value

    def prompts(self, style: str, caption: str) -> tuple[str, str]:
        """Target prompt and edit instruction of one sample."""
        words = {"style": style, "caption": caption}
        target, edit = (
            re.sub(r"\{(style|caption)\}", lambda match: words[match[1]], template).strip(" ,")
            for template in (self.prompt, self.edit_prompt)
        )
        return target, edit


class Image(_Section):
    """From the source's pictures to the size that is stylized, which is the size of the result."""

    resolution: int = Field(512, ge=32)
    """Pixels of the side that `fit` speaks of."""
    fit: Literal["short_side", "center_crop", "none"] = "short_side"
    """`short_side`: scaled, any aspect ratio; `center_crop`: a square; `none`: left as it is."""
    max_pixels: int = Field(100_000_000, ge=1, le=178_000_000)
    """A source picture with more pixels is a failed row (`too_large`), and is never decoded."""
    min_side: int = Field(32, ge=32)
    """A source picture with a shorter side, in pixels, is a failed row (`too_small`). Below 32 LPIPS sees nothing."""


class Output(_Section):
    """Where results go, and in which pieces."""

    path: str = Field(min_length=1)
    """A new folder, of this run alone."""
    samples_per_shard: int = Field(1000, ge=1)
    """Samples of one output tar."""
    samples_per_unit: int = Field(64, ge=1)
    """Samples a worker takes, finishes and commits at once: the grain of retry and resume."""
    seconds_per_unit: float | None = Field(None, gt=0)
    """Size units by time instead: as many samples as one worker does in so many seconds, by a probe before planning."""
    format: Literal["webp", "png", "jpg"] = "webp"
    """Of the result's pictures."""
    quality: int = Field(95, ge=1, le=100)
    """Of webp and jpg."""


class Compute(_Section):
    """Where and how it runs. Nothing here changes what a sample looks like, up to the rounding of the kernels."""

    pool: Literal["ray", "local"] = "ray"
    """`ray`: actors on a cluster; `local`: this process."""
    address: str = "auto"
    """Ray: `auto` joins the cluster of RAY_ADDRESS or starts one here for the run; else the cluster's address."""
    workers: int | Literal["auto"] = "auto"
    """Ray actors; `auto`: one per GPU of the cluster, or one where it has none."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs an actor holds; `auto`: 1, or 0 where the cluster has none. Fractions share a GPU."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of torch in a worker; `auto`: the machine's cores, divided among the workers."""
    batch_size: int = Field(8, ge=1)
    """Samples optimized together: those of a unit that have one size after `image.fit`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the frozen models; `auto`: bf16 on CUDA, else fp32. Latents, LoRAs and optimizers are always fp32."""
    retries: int = Field(2, ge=0)
    """How often a unit is tried again after its worker died, before the guilty sample is searched for."""

    @field_validator("workers", "threads")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1")
        return value

    @field_validator("gpus_per_worker")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and value < 0:
            raise ValueError("must not be negative")
        return value


class Storage(_Section):
    """How object stores and web servers are reached. Credentials come from where every tool finds them (AWS_PROFILE,
    ~/.aws, the machine's role, ...) and never from here."""

    endpoint: str | None = None
    """Of an S3-compatible store; default: AWS, or AWS_ENDPOINT_URL."""
    profile: str | None = None
    """Of the AWS configuration files."""
    region: str | None = None
    """Of the bucket."""
    anonymous: bool = False
    """Use no credentials, for public buckets."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds to wait for a connection or for more bytes; a picture at an http(s) URL may take so long in all."""
    retries: int = Field(6, ge=0)
    """Further tries after throttling, server and connection errors, with exponential backoff and jitter."""

    @field_validator("endpoint")
    @classmethod
    def _a_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value} is no URL; put http:// or https:// in front")
        return value


class Errors(_Section):
    """How many failures a run may have. Beyond that it stops, with all commits kept, and the exit code is 1."""

    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """Failed samples over all planned samples."""
    max_failed_fraction_per_unit: float = Field(1.0, ge=0, le=1)
    """Failed samples of one unit over its samples: what is wrong with all at once should not go on for long."""


class Manifest(_Section):
    """One job."""

    task: Literal["optimize"] = "optimize"
    """`optimize`: every image on its own."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the run, in its report and dataset card."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Of the run; a sample's own seed is made of this and its key."""
    source: Source
    model: Model
    style: Style
    objective: Objective = Objective()
    image: Image = Image()
    output: Output
    metrics: tuple[Literal["lpips"], ...] = ("lpips",)
    """Computed for every sample at the result's size, one column each."""
    compute: Compute = Compute()
    storage: Storage = Storage()
    errors: Errors = Errors()

    def dump(self) -> dict[str, Any]:
        """The resolved manifest as plain data, every default written out."""
        return self.model_dump(mode="json")

    def absolute(self) -> Manifest:
        """The same job for a process with another working folder: relative local paths made absolute."""
        model = {"path": _absolute(self.model.path)} if Path(self.model.path).exists() else {}
        return self.model_copy(
            update={
                "model": self.model.model_copy(update=model),
                "style": self.style.model_copy(update={"lora": _absolute(self.style.lora)}),
                "output": self.output.model_copy(update={"path": _absolute(self.output.path)}),
            }
        )

    @property
    def identity(self) -> str:
        """SHA-256 of all that results depend on: not where they lie, who computes them and how many may fail."""
        plain = self.dump()
        plain["compute"] = plain["compute"]["precision"]
        del plain["errors"], plain["storage"], plain["output"]["path"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _absolute(path: str) -> str:
    is_local = "://" not in path and not path.startswith("tiny:")
    return str(Path(path).expanduser().absolute()) if is_local else path
