"""Load a latent diffusion model, Stable Diffusion 1.x or 2.x, and call it.

Only this module imports diffusers. `Prior` is the frozen model: text encoder, VAE, UNet, schedule. Whatever the UNet
predicts, `Prior.noise` returns the noise prediction. Only safetensors are read, never pickles.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from smsbatch.diffusion.priors.adapter import Adapter, _Adapted
from smsbatch.diffusion.priors.files import locate_config, locate_model, variant
from smsbatch.diffusion.schedule import Schedule
from smsbatch.errors import WeightsError
from smsbatch.manifest import Model
from smsbatch.text import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Prediction = Literal["epsilon", "v_prediction"]
Part = TypeVar("Part", bound=nn.Module)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WITH_WEIGHTS = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
# Dynamo stops compiling a function after 8 graphs, silently. A run has up to three per shape, and shapes differ by the
# size of the pictures, in a smaller last batch, and in the number of rows with and without gradients.
GRAPHS = 256


class Prior:
    """A frozen latent diffusion model.

    Images are [B, 3, H, W] in [0, 1], latents [B, C, h, w] float32 in units of the scaled latent space, noise
    predictions float32 at any precision of the weights. Attention is torch's fused kernel.

    Attributes:
        schedule: the noise schedule, on the prior's device.
        prediction: the kind of the UNet's own output; `noise` converts it.
        dtype: of the UNet's and the text encoder's parameters.
        channels: C.
        factor: pixels per latent entry along a side.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        schedule: Schedule,
        prediction: Prediction,
        *,
        compile: bool,
    ) -> None:
        self._unet, self._vae, self._text_encoder, self._tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule, self.prediction = schedule, prediction
        self.dtype: torch.dtype = unet.dtype
        self._scaling = float(vae.config.scaling_factor)
        self._shift = float(vae.config.shift_factor or 0)
        self.channels = int(vae.config.latent_channels)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._adapted = _Adapted(unet)
        self._compile = compile
        self._call = torch.compile(self._adapted, dynamic=False) if compile else self._adapted
        if compile:
            torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, GRAPHS)

    @classmethod
    def load(
        cls,
        model: Model | str,
        *,
        key: str = "model",
        device: str = "cpu",
        precision: Precision = "auto",
        channels_last: bool = False,
        compile: bool = False,
    ) -> Prior:
        """Read a model; `precision` "auto" is bf16 on CUDA and fp32 elsewhere. The VAE computes in fp32.

        Args:
            model: the manifest's section, or its path alone.
            key: the section's name, for messages.
            channels_last: store the UNet's convolutions with channels last.
            compile: compile the UNet with torch.compile at its first call with each shape.

        Raises:
            WeightsError: a part is missing or unreadable, or the model is not Stable Diffusion 1.x or 2.x.
        """
        from diffusers import DDIMScheduler
        from transformers import CLIPTokenizer

        model = Model(path=model) if isinstance(model, str) else model
        path, config = locate_model(model, key), locate_config(model, key)
        if precision == "auto":
            precision = "bf16" if device.startswith("cuda") else "fp32"
        dtype = DTYPES[precision]
        try:
            with _quiet():
                tokenizer = CLIPTokenizer.from_pretrained(config, subfolder="tokenizer")
                scheduler = DDIMScheduler.from_pretrained(config, subfolder="scheduler")
                if path.is_dir():
                    unet, vae, text_encoder = _read_folder(path, dtype)
                else:
                    unet, vae, text_encoder = _read_file(path, config, tokenizer, scheduler, dtype)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = first_line(error)
            raise WeightsError(
                f"{key}.path: cannot load {model.path}: {reason}; fetch or save the model again"
            ) from error
        for part in (unet, vae, text_encoder):
            part.requires_grad_(False).eval().to(device)
        if channels_last:
            unet.to(memory_format=torch.channels_last)
        schedule = Schedule(scheduler.alphas_cumprod.to(device))
        return cls(unet, vae, text_encoder, tokenizer, schedule, scheduler.config.prediction_type, compile=compile)

    @property
    def device(self) -> torch.device:
        return torch.device(self._unet.device)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [len(prompts), L, D]; each is encoded alone, so that none depends on its neighbours."""
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self._tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids.to(self.device)
        with torch.no_grad():
            return torch.cat([self._text_encoder(row[None])[0] for row in tokens])

    def encode(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W]: the posterior's mean, h = ceil(H / factor).

        Sides that are no multiple of the factor are padded by repeating the last row or column; `decode` crops them.
        Gradients reach images that require them.
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        with torch.set_grad_enabled(images.requires_grad and torch.is_grad_enabled()):
            z: Tensor = self._vae.encode(padded * 2 - 1).latent_dist.mean
        return (z.float() - self._shift) * self._scaling

    def checkpoint_encoder(self) -> None:
        """Make `encode` recompute its activations for the gradient instead of keeping them."""
        self._vae.enable_gradient_checkpointing()

    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, h, w], cropped to `size` (H, W)."""
        with torch.no_grad():
            images: Tensor = self._vae.decode(z / self._scaling + self._shift, return_dict=False)[0]
        return (images[..., : size[0], : size[1]] / 2 + 0.5).clamp(0, 1)

    def noise(self, z_t: Tensor, t: Tensor, text: Tensor, adapter: Adapter | None = None) -> Tensor:
        """The noise prediction eps [N, C, h, w] at `z_t` [N, C, h, w], `t` [N], `text` [N, L, D].

        For a model that predicts v = a_t eps - b_t z_0 (arXiv 2202.00512), eps = a_t v + b_t z_t.

        Stable Diffusion XL would need two more inputs, both through `text`: the pooled embedding of its
        second text encoder, and the picture's sizes as `time_ids`. Nothing else here would change.
        """
        if adapter is not None:
            self._adapted.prepare(adapter)
        try:  # outside the compiled function
            prediction = self._call(z_t.to(self.dtype), t, text.to(self.dtype), adapter).float()
        finally:
            self._adapted.release()
        if self.prediction == "epsilon":
            return prediction
        return self.schedule.a(t) * prediction + self.schedule.b(t) * z_t

    def features(self, z_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """Outputs [N, tokens, channels], float32, of the self-attentions (`attn1`) in the UNet's upper half.

        They are in the order of the UNet's layers, with gradients to `z_t`. Never compiled.
        """
        found: list[Tensor] = []
        hooks = [
            module.register_forward_hook(lambda _, __, y: found.append(y.float()))
            for name, module in self._unet.named_modules()
            if name.startswith("up_blocks.") and name.endswith(".attn1")
        ]
        try:
            self._adapted(z_t.to(self.dtype), t, text.to(self.dtype), None)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def layers(self) -> dict[str, nn.Module]:
        """The UNet's linear, convolution and normalization layers by their dotted path: those a style can change."""
        return _with_weights(self._unet)

    def text_layers(self) -> dict[str, nn.Module]:
        """The same for the text encoder; a path begins with `encoder.` or is `final_layer_norm`."""
        return _with_weights(self._text_encoder)

    def with_deltas(self, unet: Mapping[str, Tensor], text: Mapping[str, Tensor] = {}) -> Prior:
        """A second prior with `parameter + delta`, added in float32; all other parameters are shared with this one.

        Args:
            unet: by `<layer>.weight` or `<layer>.bias`, the layers as `layers` names them.
            text: the same for the text encoder.
        """
        self._adapted.remove()  # the copy must have no hooks; the next adapter adds ours again
        return Prior(
            _changed(self._unet, unet),
            self._vae,
            _changed(self._text_encoder, text),
            self._tokenizer,
            self.schedule,
            self.prediction,
            compile=self._compile,
        )


def _with_weights(part: nn.Module) -> dict[str, nn.Module]:
    """Layers by names common to all versions of transformers: before 5 the text encoder's began with `text_model.`."""
    return {
        name.removeprefix("text_model."): module
        for name, module in part.named_modules()
        if isinstance(module, _WITH_WEIGHTS)
    }


def _changed(part: Part, deltas: Mapping[str, Tensor]) -> Part:
    """A copy of a part that shares all parameters without a delta; the part itself if there is no delta."""
    if not deltas:
        return part
    shared = {
        id(parameter): parameter
        for name, parameter in part.named_parameters()
        if name.removeprefix("text_model.") not in deltas
    }
    changed = copy.deepcopy(part, shared)
    layers = _with_weights(changed)
    for key, delta in deltas.items():
        layer, _, kind = key.rpartition(".")
        parameter: nn.Parameter = getattr(layers[layer], kind)
        parameter.data = (parameter.data.float() + delta.to(parameter.device)).to(parameter.dtype)
    return changed


def _read_folder(folder: Path, dtype: torch.dtype) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    parts = []
    for kind, name, its_dtype in (
        (UNet2DConditionModel, "unet", {"torch_dtype": dtype}),
        (AutoencoderKL, "vae", {"torch_dtype": torch.float32}),
        (CLIPTextModel, "text_encoder", {"dtype": dtype}),
    ):
        part, found = kind.from_pretrained(
            folder,
            subfolder=name,
            variant=variant(folder, name),
            use_safetensors=True,
            output_loading_info=True,
            **its_dtype,
        )
        if found["missing_keys"]:
            raise ValueError(f"{name} lacks {min(found['missing_keys'])}")
        parts.append(part)
    return tuple(parts)


def _read_file(
    file: Path, config: Path, tokenizer: CLIPTokenizer, scheduler: DDIMScheduler, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, CLIPTextModel]:
    from diffusers import StableDiffusionPipeline

    try:
        pipeline = StableDiffusionPipeline.from_single_file(
            str(file),
            config=str(config),
            tokenizer=tokenizer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except NotImplementedError as error:  # diffusers cannot move a parameter that the file lacks
        raise ValueError("it lacks parameters of the unet or the vae") from error
    for key, parameter in pipeline.text_encoder.named_parameters():
        if parameter.is_meta:  # diffusers does not move this part
            raise ValueError(f"text_encoder lacks {key}")
    return pipeline.unet.to(dtype), pipeline.vae.float(), pipeline.text_encoder.to(dtype)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and the advice that loading prints."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])
