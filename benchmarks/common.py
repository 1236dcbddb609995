"""Common parts of the benchmarks: the two models, side-by-side timing, FLOP counts, the measured peak, tables.

The models are `tiny`, the embedded one, and `sd15`: random weights in exactly Stable Diffusion 1.5's architecture,
made on the device without any file. Times do not depend on the values of the weights.
"""

from __future__ import annotations

import argparse
import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from smsbatch import tiny
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.schedule import Schedule
from smsbatch.manifest import Objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPTS = Objective().prompts("oil painting style", "boats in a harbour")
SIDES = {"tiny": 128, "sd15": 512}
NOMINAL = {"H100": 989e12, "H200": 989e12}  # FLOP/s in bf16 and fp16 of the SXM boards, dense

SD15_UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_PARAMETERS = 859_520_964
SD15_VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
SD15_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}


class Parts(NamedTuple):
    """A model, frozen, fp32."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def parts(model: str, device: str) -> Parts:
    """`tiny` or `sd15` on a device."""
    diffusers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    folder = Path(tiny.resolve("tiny"))
    if model == "tiny":
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True)
        vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
        text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True)
    else:
        torch.manual_seed(0)
        with torch.device(device):
            unet = UNet2DConditionModel(**SD15_UNET)
            vae = AutoencoderKL(**SD15_VAE)
            text_encoder = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
        assert unet.num_parameters() == SD15_PARAMETERS
    for part in (unet, vae, text_encoder):
        part.requires_grad_(False).eval().float().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")  # for sd15 too: times do not depend on the words
    tokenizer.model_max_length = text_encoder.config.max_position_embeddings
    return Parts(unet, vae, text_encoder, tokenizer, DDIMScheduler.from_pretrained(folder / "scheduler"))


def style_deltas(model: str, unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A style's differences of the UNet's parameters: the oil LoRA, or for `sd15` noise on all attention."""
    if model == "tiny":
        return _kohya(load_file(tiny.resolve("tiny:styles/oil.safetensors")), dict(unet.named_parameters()))
    torch.manual_seed(1)
    return {
        name: torch.randn_like(p) * 0.1 * p.std()
        for name, p in unet.named_parameters()
        if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
    }


def _kohya(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """(alpha / rank) up @ down of the embedded styles' files, whose ups are all 1x1."""
    deltas = {}
    for name, parameter in parameters.items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        if f"{key}.lora_down.weight" in tensors:
            down, up = (tensors[f"{key}.lora_{part}.weight"].float() for part in ("down", "up"))
            scale = float(tensors[f"{key}.alpha"]) / len(down)
            deltas[name] = scale * (up.flatten(1) @ down.flatten(1)).view(parameter.shape)
    return deltas


def converted(model: Parts, options: argparse.Namespace) -> Parts:
    """A copy of the UNet and the text encoder in the precision and the memory format that the command line asks for."""
    unet, text_encoder = (
        copy.deepcopy(part).to(DTYPES[options.precision]) for part in (model.unet, model.text_encoder)
    )
    if options.channels_last:
        unet.to(memory_format=torch.channels_last)
    return model._replace(unet=unet, text_encoder=text_encoder)


def prior_of(model: Parts, *, compile: bool = False) -> Prior:
    """The model as the package knows it; nothing is copied."""
    schedule = Schedule(model.scheduler.alphas_cumprod.to(model.unet.device))
    return Prior(model.unet, model.vae, model.text_encoder, model.tokenizer, schedule, "epsilon", compile=compile)


def engine(options: argparse.Namespace, model: Parts | None = None) -> tuple[Prior, Prior]:
    """The bare prior and the one with the style, as the command line asks for."""
    model = model or parts(options.model, options.device)
    deltas = style_deltas(options.model, model.unet)
    prior = prior_of(converted(model, options), compile=options.compile)
    return prior, prior.with_deltas(deltas)


def pictures(batch: int, side: int, device: str) -> Tensor:
    """Images [batch, 3, side, side] of noise: times do not depend on the content."""
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)


def stylize(prior: Prior, style: Prior, images: Tensor, config: Objective) -> Tensor:
    """Encode, optimize, decode; encoded and decoded one at a time, as the package does."""
    z_src = torch.cat([prior.encode(image[None]) for image in images])
    z = optimize(prior, style, z_src, [PROMPTS] * len(images), range(len(images)), config).z
    return torch.cat([prior.decode(row[None], images.shape[-2:]) for row in z])


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the options common to all benchmarks, and set the number of threads."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("tiny", "sd15"), default="tiny")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of our frozen models; bf16 on cuda, else fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--side", type=int, help="pixels of the square images; 128, and 512 with sd15")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument(
        "--rounds", type=int, default=3, help="measurements of every case, the cases in turn; the best counts"
    )
    options = parser.parse_args()
    options.precision = options.precision or ("bf16" if options.device == "cuda" else "fp32")
    options.side = options.side or SIDES[options.model]
    torch.set_num_threads(options.threads)
    return options


def header(options: argparse.Namespace) -> str:
    """One line: device, versions, threads, model."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))
    extras = [name.replace("_", "-") for name in ("channels_last", "compile") if getattr(options, name)]
    ours = ", ".join([options.precision, *extras])
    return (
        f"{device_name(options.device)}, {options.threads} threads, Python {platform.python_version()}, {packages}; "
        f"{options.model}, {options.side} px, {ours}; best of {options.rounds} interleaved rounds"
    )


def device_name(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.machine()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(work: Callable[[], Any], device: str) -> float:
    """The time that `work` takes, including the device's queue."""
    finish(device)
    began = perf_counter()
    work()
    finish(device)
    return perf_counter() - began


def finish(device: str) -> None:
    """Wait until the device's queue is empty."""
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(cases: Mapping[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """The best of `rounds` measurements of every case, the cases in turn: other work on the machine only adds time."""
    best = dict.fromkeys(cases, float("inf"))
    for _ in range(rounds):
        for case, measure in cases.items():
            best[case] = min(best[case], measure())
    return best


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products and convolutions in `work`, which must run eagerly.

    Attention is decomposed while counting: the fused kernels' counts differ between devices, and some have none.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter.get_total_flops()


def measured_peak(device: str, precision: str) -> float:
    """FLOP/s of a large square matrix product, the best of ten: the most that this machine reaches now."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(DTYPES[precision]) for _ in range(2))
    work = lambda: a @ b  # noqa: E731
    seconds(work, device)
    return 2 * n**3 / min(seconds(work, device) for _ in range(10))


def nominal_peak(device: str, precision: str) -> float | None:
    """The maker's dense FLOP/s in half precision, where it is known."""
    if device != "cuda" or precision == "fp32":
        return None
    return next((peak for board, peak in NOMINAL.items() if board in device_name(device)), None)
