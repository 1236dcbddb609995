"""The sections of a manifest: every field with its default, explanation and validation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from smsbatch.manifest.base import Beta, Section


def _or_one(schema: dict[str, Any]) -> None:
    """State in the schema that a list of strings may be given as one string, for editors that validate by it."""
    schema["anyOf"] = [{"type": "string"}, {"type": schema.pop("type"), "items": schema.pop("items")}]


class Columns(Section):
    """Names of the columns of a table, and the dialect of csv and tsv."""

    image: str = "url"
    """Column of the picture's location: a path (relative to the table's folder), `http(s)://` or `s3://`. In parquet
    also of the picture itself: bytes, or a struct with the field `bytes`, as Hugging Face datasets have."""
    caption: str | None = None
    """Column of the caption, in json and parquet also a path such as `answers.0.text`; default: none, and the prompt is
    the style alone."""
    key: str | None = None
    """Column of the key, unique in the run; default: keys are made of the table's name and the row's number."""
    delimiter: str | None = Field(None, pattern=r"^[^\"\r\n]$")
    """Character between the cells of a row; default: a comma in csv, a tab in tsv."""
    quote: str | None = Field(None, pattern=r"^[^\r\n]?$")
    """Character around cells that contain delimiters or line breaks; '' for none, so that quotes are text. Default: `"`
    in csv, none in tsv."""
    header: bool | tuple[str, ...] = True
    """True: the first line names the columns; false: there is no such line, and they are named 0, 1, 2; or the list of
    their names, for a file without such a line."""


class Source(Section):
    """The dataset that the samples are read from."""

    format: Literal["webdataset", "folder", "table"]
    """`webdataset`: tar files; `folder`: a tree of image files with captions beside them; `table`: csv, tsv, jsonl or
    parquet files whose rows name pictures."""
    urls: tuple[str, ...] = Field(json_schema_extra=_or_one)
    """Tars, folders or tables, one or a list; for tars and tables also globs and braces (`{00000..00499}.tar`)."""
    images: tuple[str, ...] = Field(("jpg", "jpeg", "png", "webp"), json_schema_extra=_or_one)
    """Extensions of picture files. If a sample has several, the first in this order is used."""
    caption: tuple[str, ...] = Field(
        ("txt", "json:caption", "metadata:text", "metadata:caption"), json_schema_extra=_or_one
    )
    """Where captions are: an extension (`fox.txt`, `fox.jpg.txt`), `extension:path` into JSON (`json:a.b.0`), or
    `metadata:column` of a folder's `metadata.jsonl` or `metadata.csv`. The first that finds a text is used; without
    any, the caption is empty. Tables use `columns` instead."""
    caption_choice: Literal["first", "random"] = "first"
    """Which of a list of captions is used; `random` is drawn by the run's seed and the sample's key."""
    key_prefix: Literal["url", "shard"] | None = None
    """Put a name and a slash before every key, for sources that repeat keys: that of the entry of `urls` the sample is
    of, or that of its tar, table or folder. The row keeps the key without it as `original_key`."""
    columns: Columns = Columns()
    """Names of the columns; only for `format: table`."""
    max_bytes: int = Field(100_000_000, ge=1)
    """Largest file in bytes. A picture of more is a failed row (`too_large`) and is never read or downloaded whole."""
    skip: int = Field(0, ge=0)
    """Number of samples to leave out, from the first."""
    limit: int | None = Field(None, ge=1)
    """Number of samples to take after `skip`; default: all. `--limit N` sets it."""

    @field_validator("urls", "images", "caption", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("caption")
    @classmethod
    def _as_rules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        rules = []
        for rule in value:
            extension, colon, path = rule.removeprefix(".").partition(":")
            if not extension or ((colon or extension == "metadata") and not path):
                raise ValueError(f"{rule!r} is no rule; expected an extension, or extension:path, or metadata:column")
            rules.append(f"{extension.lower()}{colon}{path}")
        return tuple(rules)

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
    """Branch, tag or commit on the hub; default: the hub's main branch."""
    config: str | None = None
    """For a single-file checkpoint: folder or hub id, in diffusers' format, of its configuration and tokenizer;
    default: found on the hub by the checkpoint's keys."""


class Style(Section):
    """The style score: a model with LoRAs merged into it."""

    lora: tuple[str, ...] = Field((), json_schema_extra=_or_one)
    """LoRA files, one or a list: kohya, LyCORIS (LoCon, LoHa, LoKr, full) or peft's format;
    `tiny:styles/<name>.safetensors`. Default: none, and `prompt` alone describes the style."""
    scale: float | tuple[float, ...] = 0.8
    """Factor of the LoRAs' weight differences: one number for all, or a list. The default is the released code's."""
    text_encoder: bool = True
    """Apply the LoRAs' parts for the text encoder, if they have any. False, as in the released code, drops them."""
    prompt: str = Field(min_length=1)
    """The words that the LoRA was trained with, including trigger words."""
    model: Model | None = None
    """Another checkpoint for the style score; default: the manifest's `model`. A path is short for `{path: ...}`."""

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
    """Limits on the source's pictures."""

    max_pixels: int = Field(100_000_000, ge=1, le=178_000_000)
    """Largest number of pixels. A source picture of more is a failed row (`too_large`) and is never decoded."""
    min_side: int = Field(32, ge=32)
    """Shortest side in pixels. A smaller source picture is a failed row (`too_small`). LPIPS needs at least 32."""


class Image(Pictures):
    """Scaling of the source's pictures to the size that is stylized, which is the size of the result."""

    resolution: int = Field(512, ge=32)
    """Side in pixels to which `fit` scales."""
    fit: Literal["short_side", "center_crop", "bucket", "none"] = "short_side"
    """`short_side`: scales the short side to `resolution`, keeps the shape; `center_crop`: then cuts out a square;
    `bucket`: scales and slightly crops to the nearest of a few sizes of about resolution x resolution pixels, so that
    pictures of many shapes batch well; `none`: unchanged."""


class Crops(Pictures):
    """Cutting of the source's pictures into the squares on which a generator is trained."""

    resolution: int = Field(512, ge=32)
    """Side of a square in pixels."""
    zoom: float = Field(1.0, ge=1, le=8)
    """Largest random scale: the picture's short side becomes `resolution` times a random number from 1 to this, before
    a square is cut out at random."""
    flip: bool = True
    """Mirror a random half of the squares left to right."""

    @field_validator("resolution")
    @classmethod
    def _whole_strides(cls, value: int) -> int:
        if value % 8:
            raise ValueError(f"{value} is no multiple of 8")
        return value


class Tiles(Section):
    """Tiling of pictures that are far larger than those the generator was trained on."""

    size: int = Field(1024, ge=64, multiple_of=4)
    """Side of a tile in pixels. A picture with a longer side passes through the generator in tiles that use the
    normalization statistics of the whole picture, so that tiles do not differ in colour and contrast."""
    overlap: int = Field(128, ge=0, multiple_of=4)
    """Width in pixels of the strip that neighbouring tiles share and in which one fades into the other."""
    thumbnail: int = Field(768, ge=64, le=4096)
    """Long side in pixels of the scaled-down picture from which the statistics are computed (arXiv 2103.11784)."""

    @model_validator(mode="after")
    def _advancing(self) -> Tiles:
        if 2 * self.overlap > self.size:
            raise ValueError(f"overlap ({self.overlap}) is more than half of size ({self.size})")
        return self


HOUSEKEEPING = ("checkpoint_vae", "checkpoint_every", "keep", "log_every", "grid_every")
"""Fields of `Training` that do not change the generator."""


class Training(Section):
    """Distillation of a style into a generator (paper, section 4)."""

    width: int = Field(64, ge=4, le=512)
    """Channels of the generator's first layer; 64 with 9 blocks gives 11.4 million parameters."""
    blocks: int = Field(9, ge=1, le=64)
    """Number of residual blocks of the generator."""
    restore: bool = False
    """Give the generator's result the mean and standard deviation of its input, per channel. Without it, as in the
    paper, the normalization loses each picture's brightness and colour cast: docs/distill.md."""
    warmup_steps: int = Field(1000, ge=0)
    """Steps in which the generator learns to reproduce its input (L1 loss), before any score is used."""
    steps: int = Field(30_000, ge=1)
    """Steps of the objective after the warm-up; the range of timesteps narrows over all of them (Eq. 7)."""
    images_per_step: int = Field(4, ge=1)
    """Different pictures per step, divided among all workers."""
    repeats: int = Field(4, ge=1)
    """Pairs of timestep and noise per picture and step; the paper's B."""
    learning_rate: float = Field(2e-4, gt=0)
    """Learning rate of Adam on the generator."""
    betas: tuple[Beta, Beta] = (0.5, 0.999)
    """Betas of Adam on the generator."""
    decay: float = Field(0.5, ge=0, le=1)
    """The learning rate falls linearly to zero over this last fraction of `steps`."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay per step of the moving average of the generator's parameters, which is saved; 0: no average."""
    checkpoint_vae: bool = False
    """Recompute the VAE's activations instead of storing them: less memory, more time."""
    checkpoint_every: int = Field(500, ge=1)
    """Steps between two checkpoints."""
    keep: int = Field(3, ge=1)
    """Number of most recent checkpoints to keep."""
    log_every: int = Field(20, ge=1)
    """Steps between two lines of the log."""
    grid_every: int = Field(500, ge=1)
    """Steps between two grids of the generator's results."""

    @property
    def all_steps(self) -> int:
        return self.warmup_steps + self.steps

    def phase(self, step: int) -> Literal["warm-up", "distillation"]:
        """Phase of the last finished step; before the first step, the phase of the first."""
        return "warm-up" if 0 < self.warmup_steps >= step else "distillation"


class Destination(Section):
    """The folder of the results."""

    path: str = Field(min_length=1)
    """A new folder for this run alone, on disk or as a URL."""


class Output(Destination):
    """The folder of the results, and how they are divided into files."""

    samples_per_shard: int = Field(1000, ge=1)
    """Samples per output tar."""
    samples_per_unit: int = Field(64, ge=1)
    """Samples that a worker takes and commits together: the grain of retry and resume."""
    seconds_per_unit: float | None = Field(None, gt=0)
    """Size units by time instead: the samples that one worker does in this many seconds, by a probe before planning."""
    format: Literal["webp", "png", "jpg"] = "webp"
    """Format of the result's pictures."""
    quality: int = Field(95, ge=1, le=100)
    """Quality of webp and jpg; png is lossless."""


class Compute(Section):
    """Where and how the run computes. Nothing here changes a sample, up to the rounding of the kernels."""

    pool: Literal["ray", "local"] = "ray"
    """`ray`: actors on a Ray cluster; `local`: this process."""
    address: str = "auto"
    """Address of the Ray cluster, `host:6379` or `ray://host:10001`; `auto`: that of RAY_ADDRESS, else as `local`: Ray
    is started here for the run, closed to everybody else."""
    workers: int | Literal["auto"] = "auto"
    """Number of Ray actors; `auto`: one per GPU of the cluster, or one per machine if it has none."""
    gpus_per_worker: float | Literal["auto"] = "auto"
    """GPUs per actor; `auto`: 1, or 0 if the cluster has none. Fractions share a GPU."""
    threads: int | Literal["auto"] = "auto"
    """CPU threads of torch per worker; `auto`: the machine's cores divided by its workers."""
    batch_size: int = Field(8, ge=1)
    """Samples computed together, of one unit and one size after `image.fit`; in `stylize` also tiles of one sample, in
    `distill` a worker's pictures of a step."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the frozen models; `auto`: bf16 on CUDA, else fp32. Latents, LoRAs and optimizers are always fp32. A
    generator in training computes in bf16 under `bf16`, with fp32 parameters; in `stylize` `auto` is fp16 on CUDA."""
    channels_last: bool = False
    """Use the channels-last memory layout in UNets and generator. Measure first: docs/benchmarks.md."""
    compile: bool = False
    """Compile the UNets, or the generator of `stylize`, with torch.compile, which takes minutes for each new shape.
    Measure first."""
    retries: int = Field(2, ge=0)
    """How often a unit is repeated after its worker died, before the search for the sample at fault; and how often a
    training resumes from its last checkpoint after a worker died."""

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
    """Access to object stores and web servers. Credentials come from the usual places (AWS_PROFILE, ~/.aws, the
    machine's role, ...), never from here."""

    endpoint: str | None = None
    """URL of an S3-compatible store; default: AWS_ENDPOINT_URL, else AWS."""
    profile: str | None = None
    """Profile in the AWS configuration files; default: AWS_PROFILE."""
    region: str | None = None
    """Region of the bucket; default: from the AWS configuration."""
    anonymous: bool = False
    """Use no credentials, for public buckets."""
    timeout_s: float = Field(30.0, gt=0)
    """Seconds to wait for a connection or for more bytes; the total for a picture at an http(s) URL."""
    retries: int = Field(6, ge=0)
    """Retries after throttling, server and connection errors, with exponential backoff and jitter, and not before the
    time that a server names in `Retry-After`, up to a minute."""
    requester_pays: bool = False
    """Pay for the requests to an S3 bucket that demands it (`x-amz-request-payer: requester`)."""
    user_agent: str | None = Field(
        None, min_length=1, max_length=500, pattern=r"^[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?$"
    )
    """What web servers are told of who asks; default: `smsbatch/<version>`. Some sites demand a way to reach you, such
    as `my-project/1.0 (+https://example.org; me@example.org)`."""
    user_agent_token: str | None = "smsbatch"
    """The name by which a server's `X-Robots-Tag` may address this client alone (`smsbatch: noai`)."""
    disallowed_header_directives: tuple[str, ...] = Field(
        ("noai", "noimageai", "noindex", "noimageindex"), json_schema_extra=_or_one
    )
    """Directives of the header `X-Robots-Tag` with which a server forbids the use of a picture; its row then fails
    (`read_error`). `[]`: none is obeyed. Only for pictures that tables name."""
    private_addresses: bool = False
    """Let tables that lie on the web name pictures at private, loopback and link-local addresses."""

    @field_validator("disallowed_header_directives", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("disallowed_header_directives")
    @classmethod
    def _lower_case(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(directive.strip().lower() for directive in value)

    @field_validator("endpoint")
    @classmethod
    def _a_url(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://", "${")):
            raise ValueError(f"{value} is no URL; put http:// or https:// in front")
        return value


class Errors(Section):
    """Limits on failures. A run that exceeds one stops with exit code 1; all commits are kept."""

    max_failed_fraction: float = Field(0.01, ge=0, le=1)
    """Failed samples divided by all planned samples."""
    max_failed_fraction_per_unit: float = Field(1.0, ge=0, le=1)
    """Failed samples of a unit divided by its samples: stops a run early if something is wrong with all samples."""
