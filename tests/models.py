"""A latent diffusion model of random weights in diffusers' pipeline format, and a style LoRA for it: for tests of the
mathematics and of the machinery, which must not depend on what the embedded model has learned."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

PROMPTS = ["a red fox in the snow", "a lake", "", "boats in a harbour at night"]


def save_model(folder: Path) -> Path:
    """A Stable Diffusion 1.x in small: 4 latent channels at a quarter of the side, cross-attention at two levels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
    )
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer_folder = folder / "tokenizer"
    tokenizer_folder.mkdir(parents=True)
    (tokenizer_folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tokenizer_folder / "merges.txt").write_text("#version: 0.2\n")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(
            str(tokenizer_folder / "vocab.json"), str(tokenizer_folder / "merges.txt"), model_max_length=16
        ),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_lora(file: Path, model: Path, rank: int = 2) -> Path:
    """A kohya file: LoRA on every attention linear, LoCon on every first 3x3 convolution of a ResNet block."""
    from smsbatch.diffusion.prior import Prior

    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in Prior.load(str(model)).layers().items():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0", "conv1")):
            out_features, *rest = layer.weight.shape
            key = "lora_unet_" + name.replace(".", "_")
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, *rest, generator=generator) * 0.1
            tensors[f"{key}.lora_up.weight"] = torch.randn(
                out_features, rank, *(1 for _ in rest[1:]), generator=generator
            )
            tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, file)
    return file
