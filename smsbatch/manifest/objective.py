"""The manifest's `objective`: every constant of the six objectives, and the presets that set them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from smsbatch.manifest.base import Beta, Section

_BARE = {  # the parts that only SMS has, switched off
    "relevance": "off",
    "identity_weight": 0.0,
    "timesteps": "uniform",
    "weight_decay": 0.0,
}
_DDS = _BARE | {
    "steps": 200,
    "guidance": 7.5,
    "weight": "one",
    "t_min": 50,
    "t_max": 948,
    "grid": 1,
    "optimizer": "sgd",
    "learning_rate": 0.1 * 2000 / 64**2,
    "warmup": 0.0,
    "horizon": None,
}
PAPERS = {  # full name, and paper on arXiv
    "sms": ("Style Matching Score", "2503.07601"),
    "vsd": ("Variational Score Distillation", "2305.16213"),
    "sds": ("Score Distillation Sampling", "2209.14988"),
    "dds": ("Delta Denoising Score", "2304.07090"),
    "pds": ("Posterior Distillation Sampling", "2311.13831"),
    "cds": ("Contrastive Denoising Score", "2311.18608"),
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "sms": {
        "released": {},  # the defaults of the fields below
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
        "fast": {
            "steps": 375,
            "learning_rate": 0.1 * 4 / 3,
            "relevance_grid": 16,
            "fake": {"trains_on": "forward"},
        },
    },
    "vsd": {
        "released": _BARE
        | {
            "guidance": 7.5,
            "fake_guidance": 1.0,
            "weight": "one_minus_abar",
            "t_min": 20,
            "t_max": 980,
            "grid": 1,
            "fake": {
                "rank": 4,
                "alpha": 4.0,
                "learning_rate": 1e-4,
                "betas": (0.9, 0.99),
                "weight_decay": 0.01,
                "weight": "one",
                "trains_on": "before",
                "layers": ("to_q", "to_k", "to_v", "to_out.0"),
                "t_min": 0,
                "t_max": 999,
            },
        },
    },
    "sds": {
        "released": _BARE | {"guidance": 100.0, "weight": "one_minus_abar", "t_min": 20, "t_max": 980, "grid": 2},
    },
    "dds": {"released": _DDS},
    "pds": {"released": _BARE | {"guidance": 100.0, "t_min": 20, "t_max": 980, "grid": 2}},
    "cds": {"released": _DDS},
}
"""The fields that a preset of an objective sets; a field given in the manifest takes precedence.

The sources: sms, arXiv 2503.07601 and its authors' code; vsd, threestudio (arXiv 2305.16213); dds, the notebook of
arXiv 2304.07090; pds, and sds (arXiv 2209.14988) beside it, the defaults of the code of arXiv 2311.13831; cds, the code
of arXiv 2311.18608. The learning rate of dds and cds is theirs at 64 x 64, for every size. If a source optimizes
something else than the latent of one image, the optimizer is that of SMS, without weight decay."""


class Prompts(NamedTuple):
    """The prompts of one sample."""

    target: str
    """Description of the result: y."""
    source: str
    """Description of the source: y_src."""
    edit: str
    """Instruction that turns the source into the result: y_edit."""


class Fake(Section):
    """The fake score: the prior with one LoRA per sample, trained on its current result (paper, Eq. 19)."""

    rank: int = Field(8, ge=1)
    """Rank r of the LoRA."""
    alpha: float = Field(32.0, gt=0)
    """The LoRA is scaled by alpha / rank."""
    layers: tuple[Literal["to_q", "to_k", "to_v", "to_out.0"], ...] = Field(("to_q", "to_v"), min_length=1)
    """Linear layers of every attention that have a LoRA."""
    learning_rate: float = Field(1e-3, gt=0)
    """Learning rate of AdamW, constant."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Betas of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of AdamW."""
    weight: Literal["alpha_bar", "one"] = "alpha_bar"
    """Factor of the noise error before squaring: `alpha_bar` (released code) or `one` (Eq. 19)."""
    trains_on: Literal["result", "before", "forward"] = "result"
    """`result`: trains on the latent after this iteration's update (released code); `before`: before it (Algorithm 1);
    both at a timestep and noise of their own. `forward`: on the prediction that the gradient used, which saves a
    forward pass. `distill` always takes the generator's pictures from before its update."""
    updates: int = Field(1, ge=1)
    """Training steps per iteration, each with its own timesteps and noise."""
    t_min: int | None = Field(None, ge=0, le=998)
    """Smallest timestep of its training; default: the objective's `t_min`."""
    t_max: int | None = Field(None, ge=1, le=999)
    """Largest timestep of its training; default: the objective's `t_max`."""


class ScoreObjective(Section):
    """Turns scores into a gradient on a latent. Every constant is here; defaults are those of the authors' released
    code."""

    name: Literal["sms", "vsd", "sds", "dds", "pds", "cds"] = "sms"
    """`sms`: Style Matching Score (paper, Eq. 6). `vsd`, `sds`, `dds`, `pds`, `cds`: variational score distillation,
    score distillation sampling, delta denoising score, posterior distillation sampling, contrastive denoising score."""
    preset: Literal["released", "paper", "fast"] = "released"
    """`released`: the published constants, without the code's bugs; `paper`: the paper's formulas; `fast`: cheaper.

    Only `sms` has `paper` and `fast`. For values that the paper does not give (w_t, learning rates, lambda), `paper`
    takes the released constants."""
    guidance: float = Field(4.5, ge=1)
    """Classifier-free guidance scale g of the style score; 1: no guidance."""
    fake_guidance: float = Field(4.5, ge=1)
    """Classifier-free guidance scale of the fake score; 1: no guidance."""
    prompt: str = "{style}, {caption}"
    """Target prompt; `{style}` is `style.prompt`, `{caption}` the sample's caption, which may be empty."""
    source_prompt: str = "{caption}"
    """Prompt of the source, for DDS, PDS and CDS."""
    edit_prompt: str = "Turn into {style}"
    """Edit instruction, from which the relevance map is computed (Eq. 4)."""
    weight: Literal["posterior_variance", "one_minus_abar", "dmd", "one"] = "posterior_variance"
    """Weight w_t of SMS, VSD, SDS, DDS and CDS: the posterior's variance (released code), 1 - abar_t (SDS, VSD), the
    scale-free weight of DMD (arXiv 2311.18828, Eq. 8), or 1."""
    relevance: Literal["mean_abs", "abs_mean", "off"] = "mean_abs"
    """Relevance map R: mean over channels and absolute value, in the order of the name; `off`: no map."""
    relevance_clip: float | None = Field(None, ge=0)
    """Clip outliers of the map, before it is normalized, at the third quartile plus this number of interquartile
    ranges (1.5 in arXiv 2308.08947); default: no clipping."""
    relevance_grid: int | None = Field(None, ge=1)
    """Compute the map only at this number of timesteps, before the first iteration, and use the nearest one; default:
    compute it in every iteration, with the noise of the iteration."""
    identity: Literal["spectral", "mse", "latent_lpips"] = "spectral"
    """Identity term, which keeps the result near its source: low frequencies (Eq. 3), mean squared difference of the
    latents, or E-LatentLPIPS (needs the extra `latent-lpips`)."""
    identity_weight: float = Field(5e-4, ge=0)
    """lambda of Eq. 6, on the per-entry mean of the identity term. The same value is of different strength with another
    `identity`, `spectral_norm` or `weight`."""
    spectral_norm: Literal["l1", "l2"] = "l1"
    """Norm of Eq. 3: absolute values (released code) or squares (paper)."""
    spectral_cutoff: Literal["progressive"] | Annotated[float, Field(strict=True)] = "progressive"
    """Kept fraction of the frequencies: `progressive`: t / t_max (Eq. 3), or a constant (paper's appendix: 0.3)."""
    timesteps: Literal["adaptive", "uniform", "linear"] = "adaptive"
    """Drawn uniformly from a range that narrows (Eq. 7), drawn uniformly from the whole range, or descending linearly
    from `t_max` to `t_min`."""
    t_min: int = Field(20, ge=1, le=998)
    """Smallest timestep, of 1000."""
    t_max: int = Field(500, ge=2, le=999)
    """Largest timestep; under `adaptive` only in the first iteration."""
    grid: Literal[1, 2] = 2
    """1: every timestep; 2: the released code's 500-step grid, odd timesteps only."""
    contrastive_weight: float = Field(3.0, ge=0)
    """Weight of the contrastive term of CDS."""
    fake: Fake = Fake()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        name, preset = data.get("name", "sms"), data.get("preset", "released")
        if not isinstance(name, str) or not isinstance(preset, str) or name not in PRESETS:
            return data  # validation of the fields gives a better message
        if preset not in {key for presets in PRESETS.values() for key in presets}:
            return data
        if preset not in PRESETS[name]:
            raise ValueError(f"preset {preset} exists only for sms, not for {name}; leave it out")
        constants = {key: value for key, value in PRESETS[name][preset].items() if key in cls.model_fields}
        merged = constants | dict(data)
        given = data.get("fake", {})
        if isinstance(given, Mapping):
            merged["fake"] = constants.get("fake", {}) | dict(given)
        return merged

    @field_validator("relevance", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads `off` as false

    @field_validator("spectral_cutoff")
    @classmethod
    def _a_fraction(cls, value: str | float) -> str | float:
        if not isinstance(value, str) and not 0 <= value <= 1:
            raise ValueError("is a fraction of the frequencies, 0 to 1, or progressive")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.t_min >= self.t_max:
            raise ValueError(f"t_min ({self.t_min}) must be below t_max ({self.t_max})")
        fake_min, fake_max = self.fake_range
        if fake_min >= fake_max:
            raise ValueError(f"fake.t_min ({fake_min}) must be below fake.t_max ({fake_max})")
        if self.fake.trains_on == "forward" and self.name not in ("sms", "vsd"):
            raise ValueError(f"{self.name} asks no fake score; leave fake.trains_on out")
        if self.fake.trains_on == "forward" and self.fake.updates > 1:
            raise ValueError("fake.updates is 1 where the fake score trains on the gradient's own prediction")
        if self.fake.trains_on == "forward" and (self.fake.t_min, self.fake.t_max) != (None, None):
            raise ValueError("fake.t_min and t_max are the objective's where the fake score trains on its prediction")
        return self

    @field_validator("prompt", "source_prompt", "edit_prompt")
    @classmethod
    def _known_words(cls, value: str) -> str:
        unknown = sorted(set(re.findall(r"(?<!\$)\{(\w*)\}", value)) - {"style", "caption"})
        if unknown:
            raise ValueError(f"unknown {{{unknown[0]}}}; {{style}} and {{caption}} are known")
        return value

    @property
    def fake_range(self) -> tuple[int, int]:
        """Smallest and largest timestep of the fake score's training."""
        fake = self.fake
        return (
            self.t_min if fake.t_min is None else fake.t_min,
            self.t_max if fake.t_max is None else fake.t_max,
        )

    def prompts(self, style: str, caption: str) -> Prompts:
        """Fill the prompt templates for one sample."""
        words = {"style": style, "caption": caption}
        return Prompts(
            *(
                re.sub(r"\{(style|caption)\}", lambda match: words[match[1]], template).strip(" ,")
                for template in (self.prompt, self.source_prompt, self.edit_prompt)
            )
        )


class Objective(ScoreObjective):
    """Optimizes a latent: the gradient of the scores, and the optimizer that applies it."""

    steps: int = Field(500, ge=1)
    """Iterations per image."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the latent. Under `sgd` the learning rate multiplies the gradient of Eq. 2 itself, whatever the
    latent's size."""
    learning_rate: float = Field(0.1, gt=0)
    """Peak learning rate on the latent."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Betas of AdamW on the latent."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of AdamW on the latent. The released code has torch's default; it pulls the image toward grey."""
    warmup: float = Field(0.2, ge=0, lt=1)
    """Length of the linear warm-up of the learning rate, as a fraction of `steps`."""
    horizon: float | None = Field(1.5, ge=1)
    """Step at which the cosine after the warm-up would reach zero, as a multiple of `steps`; null: constant rate."""
    stall: float | None = Field(None, gt=0)
    """Stop a sample when ten iterations have moved its latent by less than this fraction of its norm; default: never.
    A batch ends when its last sample stops."""
