"""Train the UNet and the CLIP text encoder together on the photographs' latents; write the whole pipeline folder.

Plain epsilon prediction with Stable Diffusion 1's schedule. Four samples in five draw t from [20, 500), the range of
SMS; the rest draw from the whole range, so that the model also generates from noise. One caption in ten is dropped,
which trains the null prompt. The model never sees a styled picture: the LoRAs add the style.

    torchrun --nproc-per-node 2 tools/tiny/train_unet.py --cache CACHE --extra EXTRA --work WORK --vae VAE \\
        --out smsbatch/tiny/model
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import latents
import numpy as np
import torch
from common import Average, average_gradients, cosine, in_turn, join, load_checkpoint, save_checkpoint
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from filters import PROMPTS
from photos import crop, photos, table
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor, nn
from train_vae import to_tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 48  # longest prompt
WIDTH = 128  # of the text features
UNET = {
    "sample_size": 32,
    "block_out_channels": (48, 80, 128),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
}
START, END = "<|startoftext|>", "<|endoftext|>"
# words that users of this model will write, besides those of the captions and style prompts
WORDS = """
photo photograph picture image portrait landscape closeup macro black white grey red green blue yellow orange
purple brown sky cloud sun sunset sunrise night day sea ocean lake river mountain hill forest tree flower
grass snow beach city street house building bridge road car boat dog cat bird horse animal people man woman
child face food fruit table garden summer winter autumn spring beautiful small big old new dark bright with
and the of in on at under over near into turn it style painting drawing art oil watercolor pencil sketch ink
anime cartoon ukiyo print pixel pastel charcoal comic
"""


def make_tokenizer(folder: Path, vocabulary: int = 1400) -> CLIPTokenizer:
    """A CLIP tokenizer with a byte-level BPE vocabulary trained on captions and prompts; any text tokenizes."""
    bpe = Tokenizer(BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    splits = [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(splits)
    bpe.decoder = decoders.ByteLevel()
    text = [photo.caption for photo in table()] + [*PROMPTS.values(), *WORDS.split()] * 2
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    bpe.train_from_iterator(text, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    symbols = alphabet + [c + "</w>" for c in alphabet] + [a + b for a, b in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {symbol: i for i, symbol in enumerate(dict.fromkeys(symbols))}
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TOKENS, **special)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


def draw_t(n: int, rng: np.random.Generator, full: float = 0.2) -> Tensor:
    t = np.where(rng.random(n) < full, rng.integers(0, 1000, n), rng.integers(20, 500, n))
    return torch.from_numpy(t)


def denoising_loss(unet: nn.Module, text: Tensor, z: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Epsilon-MSE of every sample, [n]."""
    a = abar[t].view(-1, 1, 1, 1)
    guess = unet(a.sqrt() * z + (1 - a).sqrt() * eps, t, text).sample
    return (guess.float() - eps).square().mean((1, 2, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--extra", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint and the latents")
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--share", type=float, default=0.8, help="of the batch sizes in latents.py")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    rank, world = join()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    with in_turn():
        data = latents.build(args.work / "latents.pt", vae, args.cache, args.extra, crops=9)
    tokenizer = make_tokenizer(args.work / "tokenizer")
    text_encoder, unet = make_text_encoder(tokenizer), UNet2DConditionModel(**UNET)
    scheduler = make_scheduler()
    abar = scheduler.alphas_cumprod
    both = nn.ModuleList([unet, text_encoder])
    average = Average(both.parameters(), 0.999)
    optimizer = torch.optim.AdamW(both.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = args.work / "unet.pt"
    start = load_checkpoint(checkpoint, both=both, average=average, optimizer=optimizer)

    rng = np.random.default_rng(0)
    held_out = photos("held-out", args.cache, args.extra)
    held_z = latents.encode(vae, to_tensor([crop(p, 128, 128, rng, whole=1.0) for _, p in held_out] * 4))[:, :4]
    held_ids = tokens(tokenizer, [photo.caption for photo, _ in held_out] * 4)
    held_t = torch.linspace(20, 499, len(held_z)).long()
    held_eps = torch.from_numpy(rng.standard_normal(held_z.shape, dtype=np.float32))

    def save() -> None:
        """The averaged weights as a pipeline folder."""
        with average.applied():
            pipe = StableDiffusionPipeline(
                vae=AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float16),
                text_encoder=make_text_encoder(tokenizer).half(),
                tokenizer=tokenizer,
                unet=UNet2DConditionModel(**UNET).half(),
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            pipe.unet.load_state_dict(unet.state_dict())
            pipe.text_encoder.load_state_dict(text_encoder.state_dict())
            pipe.save_pretrained(args.out)
        for name in ("vocab.json", "merges.txt"):  # transformers before version 5 reads these
            shutil.copy(args.work / "tokenizer" / name, args.out / "tokenizer" / name)
        # transformers loads in the precision its config names; half precision on disk only saves space
        config = args.out / "text_encoder" / "config.json"
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))

    began, seen = time.monotonic(), []
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, args.steps, args.lr)
        rng = np.random.default_rng([1, step, rank])
        z, captions = data.batch(rng, args.share / world)
        captions = ["" if rng.random() < 0.1 else caption for caption in captions]
        t = draw_t(len(z), rng)
        eps = torch.from_numpy(rng.standard_normal(z.shape, dtype=np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            text = text_encoder(tokens(tokenizer, captions))[0]
            loss = denoising_loss(unet, text, z, t, eps, abar).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(both.parameters())
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update()
        seen.append(float(loss.detach()))
        if rank == 0 and ((step + 1) % 200 == 0 or step + 1 == args.steps):
            with average.applied(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                held = denoising_loss(unet, text_encoder(held_ids)[0], held_z, held_t, held_eps, abar).mean()
            pace = (time.monotonic() - began) / (step + 1 - start)
            mse = f"eps-mse {np.mean(seen[-200:]):.4f}, held-out at t in [20, 500) {held:.4f}"
            print(f"{step + 1}: {mse}, {pace:.2f} s/step", flush=True)
            save_checkpoint(checkpoint, step + 1, both=both, average=average, optimizer=optimizer)
            if (step + 1) % 600 == 0 or step + 1 == args.steps:
                save()


if __name__ == "__main__":
    main()
