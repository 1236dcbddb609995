"""The sections of a manifest: every field, its default, its explanation and its validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from smsbatch.manifest.base import Beta, Section

__all__ = [
    "HOUSEKEEPING",
    "Compute",
    "Crops",
    "Destination",
    "Errors",
    "Image",
    "Model",
    "Output",
    "Pictures",
    "Source",
    "Storage",
    "Style",
    "Tiles",
    "Training",
]


def _or_one(schema: dict[str, Any]) -> None:
    """A list of strings may be given as one string; editors that check by the schema are told so."""
    schema["anyOf"] = [{"type": "string"}, {"type": schema.pop("type"), "items": schema.pop("items")}]


class Columns(Section):
    """Which columns of a table mean what."""

    image: str = "url"
    """Where the picture is: a path (relative ones start at the table's folder), `http(s)://` or `s3://`."""
    caption: str | None = None
    """Its caption; without one the prompt is the style alone."""
    key: str | None = None
    """Its key, unique in the run; without one keys are made of the table's name and the row's number."""


class Source(Section):
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
    skip: int = Field(0, ge=0)
    """Leave out so many samples, the first."""
    limit: int | None = Field(None, ge=1)
    """Take only so many samples, the first after `skip`. `--limit N` sets it."""

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


class Model(Section):
    """A latent diffusion model: Stable Diffusion 1.x or 2.x."""

    path: str = Field(min_length=1)
    """Folder in diffusers' pipeline format, hub id, single-file `.safetensors` checkpoint, or `tiny`: the embedded
    model."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    config: str | None = None
    """Of a single-file checkpoint: the folder or hub id in diffusers' format that has its configuration and tokenizer;
    default: found by the checkpoint's own keys, on the hub."""


class Style(Section):
    """The style score: a model with LoRAs merged into it."""

    lora: tuple[str, ...] = Field((), json_schema_extra=_or_one)
    """LoRA files, one or a list: kohya, LyCORIS (LoCon, LoHa, LoKr, full) or peft's format;
    `tiny:styles/<name>.safetensors`. Without one the style is in the words of `prompt` alone."""
    scale: float | tuple[float, ...] = 0.8
    """Multiplies the LoRAs' weight differences: one number for all, or a list. 0.8: the released code's."""
    text_encoder: bool = True
    """Apply the LoRAs' parts for the text encoder, if they have any. The released code drops them: false."""
    prompt: str = Field(min_length=1)
    """The words the LoRA was trained with, trigger words included."""
    model: Model | None = None
    """Another checkpoint for the style score; default: the same as `model`. A path stands for `{path: ...}`."""

    @field_validator("lora", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("lora")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("names no file; leave it out for a style in words alone")
        return value

    @field_validator("scale")
    @classmethod
    def _in_range(cls, value: float | tuple[float, ...]) -> float | tuple[float, ...]:
        for scale in value if isinstance(value, tuple) else (value,):
            if not -4 <= scale <= 4 or scale == 0:
                raise ValueError(f"{scale} is not between -4 and 4, or is 0")
        return value

    @model_validator(mode="after")
    def _as_many(self) -> Style:
        if isinstance(self.scale, tuple) and len(self.scale) != len(self.lora):
            raise ValueError(f"scale lists {len(self.scale)} numbers, style.lora {len(self.lora)} files")
        return self

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Every LoRA file with its scale."""
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,) * len(self.lora)
        return list(zip(self.lora, scales, strict=True))


class Pictures(Section):
    """Which of the source's pictures are taken."""

    max_pixels: int = Field(100_000_000, ge=1, le=178_000_000)
    """A source picture with more pixels is a failed row (`too_large`), and is never decoded."""
    min_side: int = Field(32, ge=32)
    """A source picture with a shorter side, in pixels, is a failed row (`too_small`). Below 32 LPIPS sees nothing."""


class Image(Pictures):
    """From the source's pictures to the size that is stylized, which is the size of the result."""

    resolution: int = Field(512, ge=32)
    """Pixels of the side that `fit` speaks of."""
    fit: Literal["short_side", "center_crop", "bucket", "none"] = "short_side"
    """`short_side`: scaled, any aspect ratio; `center_crop`: a square; `bucket`: scaled and cropped by a little to the
    nearest of a few sizes of about resolution x resolution pixels, so that pictures of many shapes batch well; `none`:
    left as it is."""


class Crops(Pictures):
    """From the source's pictures to the squares that a generator is trained on."""

    resolution: int = Field(512, ge=32)
    """Pixels of a square's side."""
    zoom: float = Field(1.0, ge=1, le=8)
    """The picture's short side is scaled to `resolution` times a number from 1 to this, at random, before a square is
    cut out at random."""
    flip: bool = True
    """Mirror every second square, at random."""

    @field_validator("resolution")
    @classmethod
    def _whole_strides(cls, value: int) -> int:
        if value % 8:
            raise ValueError(f"{value} is no multiple of 8")
        return value


class Tiles(Section):
    """How a picture is stylized that is far larger than what the generator was trained on."""

    size: int = Field(1024, ge=64, multiple_of=4)
    """Pixels of a tile's side. A picture with a longer side goes through the generator tile by tile, with the
    normalization's statistics of the whole, so that no tile looks different from its neighbours."""
    overlap: int = Field(128, ge=0, multiple_of=4)
    """Pixels that neighbouring tiles share, and over which one fades into the other."""
    thumbnail: int = Field(768, ge=64, le=4096)
    """The whole picture, scaled to so many pixels of its long side, is where the statistics are taken from
    (arXiv 2103.11784)."""

    @model_validator(mode="after")
    def _advancing(self) -> Tiles:
        if 2 * self.overlap > self.size:
            raise ValueError(f"overlap ({self.overlap}) is more than half of size ({self.size})")
        return self


HOUSEKEEPING = ("checkpoint_vae", "checkpoint_every", "keep", "log_every", "grid_every")
"""Fields of `Training` that change nothing about the generator."""


class Training(Section):
    """How a style is distilled into a generator (paper, section 4)."""

    width: int = Field(64, ge=4, le=512)
    """Channels of the generator's first layer; 64 and 9 blocks make 11.4 million parameters."""
    blocks: int = Field(9, ge=1, le=64)
    """Residual blocks of the generator."""
    restore: bool = False
    """Give the generator's result the input's mean and deviation, channel by channel. Without it, as in the paper, its
    normalization loses every picture's brightness and colour of light: docs/distill.md."""
    warmup_steps: int = Field(1000, ge=0)
    """Steps in which the generator learns to reproduce its input (L1), before any score is asked."""
    steps: int = Field(30_000, ge=1)
    """Steps of the objective, after the warm-up; the timesteps narrow over all of them (Eq. 7)."""
    images_per_step: int = Field(4, ge=1)
    """Different pictures in a step, over all workers together, among whom they are divided."""
    repeats: int = Field(4, ge=1)
    """Pairs of timestep and noise for each picture in a step; the paper's B."""
    learning_rate: float = Field(2e-4, gt=0)
    """Of Adam on the generator."""
    betas: tuple[Beta, Beta] = (0.5, 0.999)
    """Of Adam on the generator."""
    decay: float = Field(0.5, ge=0, le=1)
    """The learning rate falls linearly to zero over this last fraction of `steps`."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the running average of the generator's parameters, which is what is saved; 0 is none."""
    checkpoint_vae: bool = False
    """Compute the VAE's activations a second time instead of keeping them: less memory, more time."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    keep: int = Field(3, ge=1)
    """Checkpoints that are kept, the last."""
    log_every: int = Field(20, ge=1)
    """Steps between two lines of the log."""
    grid_every: int = Field(500, ge=1)
    """Steps between two pictures of what the generator does."""

    @property
    def all_steps(self) -> int:
        return self.warmup_steps + self.steps

    def phase(self, step: int) -> Literal["warm-up", "distillation"]:
        """Of the last step done; before the first one, of that."""
        return "warm-up" if 0 < self.warmup_steps >= step else "distillation"


class Destination(Section):
    """Where results go."""

    path: str = Field(min_length=1)
    """A new folder, of this run alone."""


class Output(Destination):
    """Where results go, and in which pieces."""

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


class Compute(Section):
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
    """Samples computed together: those of a unit that have one size after `image.fit`; or tiles of one; or a
    worker's pictures of a `distill` step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the frozen models; `auto`: bf16 on CUDA, else fp32. Latents, LoRAs and optimizers are always fp32. A generator
    in training computes in bf16 under `bf16` and has its parameters in fp32; a finished one takes fp16 for `auto` on
    CUDA."""
    channels_last: bool = False
    """Lay the convolutions of UNets or generator out with channels last. Measure first: docs/benchmarks.md."""
    compile: bool = False
    """Compile the UNets, or the generator that `stylize` uses, with torch.compile: minutes at the start, once per
    shape. Measure first."""
    retries: int = Field(2, ge=0)
    """How often a unit is tried again after its worker died, before the guilty sample is searched for; and how often a
    training goes on from its last checkpoint after a worker died."""

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


class Storage(Section):
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


class Errors(Section):
    """How many failures a run may have. Beyond that it stops, with all commits kept, and the exit code is 1."""

    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """Failed samples over all planned samples."""
    max_failed_fraction_per_unit: float = Field(1.0, ge=0, le=1)
    """Failed samples of one unit over its samples: what is wrong with all at once should not go on for long."""
