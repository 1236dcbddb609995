"""Load a latent diffusion model in diffusers' pipeline folder format, and call it.

The only room that knows diffusers and transformers. `Prior` is the frozen model: text encoder, VAE, UNet, schedule.
Only safetensors are read, never pickles.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from smsbatch.diffusion.timesteps import Schedule
from smsbatch.diffusion.weights import locate
from smsbatch.errors import WeightsError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

__all__ = ["Prior"]

Precision = Literal["auto", "fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints progress bars and advice that is not the user's business."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.ERROR)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(before[0])
        transformers_logging.set_verbosity(before[1])


class Prior:
    """A frozen latent diffusion model with epsilon prediction.

    Images are [B, 3, H, W] in [0, 1], latents [B, C, h, w] float32 in units of the scaled latent space, noise
    predictions float32 whatever the weights' precision.

    Attributes:
        schedule: the noise schedule, on the prior's device.
        factor: pixels per latent entry along a side.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        schedule: Schedule,
    ) -> None:
        self._unet, self._vae, self._text_encoder, self._tokenizer = unet, vae, text_encoder, tokenizer
        self.schedule = schedule
        self._scaling = float(vae.config.scaling_factor)
        self._shift = float(vae.config.shift_factor or 0)
        self.factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def load(
        cls, path: str, *, revision: str | None = None, device: str = "cpu", precision: Precision = "auto"
    ) -> Prior:
        """Read a model; `precision` "auto" is bf16 on CUDA and fp32 elsewhere. The VAE decodes in fp32.

        Raises:
            WeightsError: a part is missing, unreadable or not an epsilon-predicting Stable Diffusion 1.x.
        """
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTokenizer

        folder = locate(path, revision)
        if precision == "auto":
            precision = "bf16" if device.startswith("cuda") else "fp32"
        dtype = _DTYPES[precision]
        try:
            with _quiet():
                unet = UNet2DConditionModel.from_pretrained(
                    folder, subfolder="unet", torch_dtype=dtype, use_safetensors=True
                )
                vae = AutoencoderKL.from_pretrained(
                    folder, subfolder="vae", torch_dtype=torch.float32, use_safetensors=True
                )
                text_encoder = CLIPTextModel.from_pretrained(
                    folder, subfolder="text_encoder", dtype=dtype, use_safetensors=True
                )
                tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
                scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise WeightsError(f"model.path: cannot load {path}: {reason}; fetch or save the model again") from error
        if scheduler.config.prediction_type != "epsilon":
            raise WeightsError(
                f"model.path: {path} predicts {scheduler.config.prediction_type}, only epsilon is known; "
                "choose a model of Stable Diffusion 1.x"
            )
        if (
            scheduler.config.num_train_timesteps != 1000
            or unet.config.addition_embed_type is not None
            or unet.config.cross_attention_dim != text_encoder.config.hidden_size
        ):
            raise WeightsError(
                f"model.path: {path} is not of the kind known here; choose a model of Stable Diffusion 1.x"
            )
        for part in (unet, vae, text_encoder):
            part.requires_grad_(False).eval().to(device)
        return cls(unet, vae, text_encoder, tokenizer, Schedule(scheduler.alphas_cumprod.to(device)))

    @property
    def device(self) -> torch.device:
        return torch.device(self._unet.device)

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [len(prompts), L, D]; each prompt alone, so that none depends on its neighbours."""
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
        """
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        with torch.no_grad():
            z: Tensor = self._vae.encode(padded * 2 - 1).latent_dist.mean
        return (z - self._shift) * self._scaling

    def decode(self, z: Tensor, size: tuple[int, int]) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] of latents [B, C, h, w], cropped to `size` (H, W)."""
        with torch.no_grad():
            images: Tensor = self._vae.decode(z / self._scaling + self._shift, return_dict=False)[0]
        return (images[..., : size[0], : size[1]] / 2 + 0.5).clamp(0, 1)

    def noise(self, z_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise prediction eps [N, C, h, w] at `z_t` [N, C, h, w], `t` [N], `text` [N, L, D]."""
        dtype = self._unet.dtype
        prediction: Tensor = self._unet(z_t.to(dtype), t, encoder_hidden_states=text.to(dtype), return_dict=False)[0]
        return prediction.float()

    def layers(self) -> dict[str, nn.Module]:
        """The UNet's linear and convolution layers by their dotted path: what a LoRA can change."""
        return {
            name: module for name, module in self._unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
        }

    def with_deltas(self, deltas: Mapping[str, Tensor]) -> Prior:
        """A second prior whose UNet weights are `W + delta`, added in float32; all other parts are shared."""
        styled = Prior(
            copy.deepcopy(self._unet), self._vae, self._text_encoder, self._tokenizer, schedule=self.schedule
        )
        layers = styled.layers()
        for name, delta in deltas.items():
            weight = cast(nn.Parameter, layers[name].weight)
            weight.data = (weight.data.float() + delta.to(weight.device)).to(weight.dtype)
        return styled
