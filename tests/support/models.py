"""Latent diffusion models of random weights, as diffusers folders and as single files, and a style LoRA for them.

Tests of the mathematics and of the machinery use them, because they must not depend on the embedded model's training.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PROMPTS = ["a red fox in the snow", "a lake", "", "boats in a harbour at night"]


def save_model(folder: Path, *, second: bool = False) -> Path:
    """Save a small Stable Diffusion 1.x: 4 latent channels at a quarter of the side, cross-attention at two levels.

    Args:
        second: save a 2.x like those for 768 pixels: v-prediction, linear projections around the attention, heads
            that depend on the level, OpenCLIP's activation and padding.
    """
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
        attention_head_dim=(2, 4) if second else 2,
        use_linear_projection=second,
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
            hidden_act="gelu" if second else "quick_gelu",
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer(
            str(tokenizer_folder / "vocab.json"),
            str(tokenizer_folder / "merges.txt"),
            model_max_length=16,
            pad_token="!" if second else "<|endoftext|>",
        ),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
            prediction_type="v_prediction" if second else "epsilon",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_lora(file: Path, model: Path, rank: int = 2) -> Path:
    """Save a kohya file: LoRA on every attention linear, LoCon on every first 3x3 convolution of a ResNet block."""
    from smsbatch.diffusion.priors.stable_diffusion import Prior

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


def save_single_file(file: Path, folder: Path) -> Path:
    """Save a folder of `save_model` as one checkpoint with the parameter names of Stable Diffusion's original code."""
    unet, vae, text = (
        load_file(folder / part / name)
        for part, name in (
            ("unet", "diffusion_pytorch_model.safetensors"),
            ("vae", "diffusion_pytorch_model.safetensors"),
            ("text_encoder", "model.safetensors"),
        )
    )
    text = {key.removeprefix("text_model."): value for key, value in text.items()}
    second = json.loads((folder / "unet" / "config.json").read_text())["use_linear_projection"]
    tensors = {
        **{"model.diffusion_model." + _ldm_unet(key): value for key, value in unet.items()},
        **{"first_stage_model." + _ldm_vae(key): _as_convolution(key, value) for key, value in vae.items()},
        **(
            {"cond_stage_model.model." + key: value for key, value in _open_clip(text).items()}
            if second
            else {"cond_stage_model.transformer.text_model." + key: value for key, value in text.items()}
        ),
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)
    return file


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}


def _ldm_unet(key: str) -> str:
    """A parameter's name in the original, whose blocks are three lists (down, middle, up); for one layer a level."""
    path, _, kind = key.rpartition(".")
    if path in _OUTSIDE:
        return f"{_OUTSIDE[path]}.{kind}"
    match = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", path
    )
    assert match, key
    way, level, what, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if what == "resnets":
        rest = _RESNET[rest]
    if way == "mid":
        return f"middle_block.{1 if what == 'attentions' else 2 * number}.{rest}.{kind}"
    if what == "downsamplers":
        return f"input_blocks.{2 * level + 2}.0.op.{kind}"
    if what == "upsamplers":
        return f"output_blocks.{2 * level + 1}.2.{rest}.{kind}"
    block = f"input_blocks.{2 * level + 1 + number}" if way == "down" else f"output_blocks.{2 * level + number}"
    return f"{block}.{1 if what == 'attentions' else 0}.{rest}.{kind}"


def _ldm_vae(key: str) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda match: f"up.{2 - int(match[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda match: f"up.{2 - int(match[1])}.upsample.", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{1 + int(match[1])}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_shortcut", "nin_shortcut")
    for ours, theirs in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return key.replace("conv_norm_out", "norm_out")


def _as_convolution(key: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter of the VAE in the original, where its attention layers are 1x1 convolutions."""
    return value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value


def _open_clip(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """CLIP's text tower with OpenCLIP's names; query, key and value are one matrix."""
    width = len(text["final_layer_norm.weight"])
    tensors = {
        "positional_embedding": text["embeddings.position_embedding.weight"],
        "token_embedding.weight": text["embeddings.token_embedding.weight"],
        "ln_final.weight": text["final_layer_norm.weight"],
        "ln_final.bias": text["final_layer_norm.bias"],
        "text_projection": torch.eye(width),
    }
    for kind in ("weight", "bias"):
        ours, theirs = "encoder.layers.0.", "transformer.resblocks.0."
        projections = [text[f"{ours}self_attn.{name}_proj.{kind}"] for name in "qkv"]
        tensors[f"{theirs}attn.in_proj_{kind}"] = torch.cat(projections)
        for old, new in (
            ("self_attn.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            tensors[f"{theirs}{new}.{kind}"] = text[f"{ours}{old}.{kind}"]
    return tensors
