"""Tests of the metrics without bundled weights, on random weights against numpy, and of the search for weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smsbatch.errors import RequestError, WeightsError
from smsbatch.metrics import hub

CONVOLUTIONS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256)}


@pytest.fixture(autouse=True)
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of weights; the caches are empty too."""
    monkeypatch.setenv("SMSBATCH_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def images(seed: int, count: int = 2, height: int = 24, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def vgg(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {"classifier.0.weight": torch.zeros(2, 2)}
    for index, (inputs, outputs) in CONVOLUTIONS.items():
        kernel = torch.randn(outputs, inputs, 3, 3, generator=generator) * (0.6 / inputs) ** 0.5
        state |= {f"features.{index}.weight": kernel, f"features.{index}.bias": torch.zeros(outputs)}
    return state


# -------------------------------------------------------------------------------------------------------------- CFSD


def cfsd_by_hand(source: Tensor, result: Tensor, state: dict[str, Tensor]) -> float:
    def similarity(image: Tensor) -> np.ndarray:
        mean, deviation = (
            torch.tensor(values, dtype=torch.float64)[:, None, None]
            for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        )
        x = ((image.double() - mean) / deviation)[None]
        for index in CONVOLUTIONS:
            x = F.max_pool2d(x, 2) if index in (5, 10) else x
            weight, bias = (state[f"features.{index}.{name}"].double() for name in ("weight", "bias"))
            x = F.relu(F.conv2d(x, weight, bias, padding=1))
        rows = x[0].reshape(256, -1).T.numpy() / 256
        power = np.exp(rows @ rows.T)
        return power / power.sum(1, keepdims=True)

    p, q = similarity(source), similarity(result)
    return float((p * np.log(p / q)).sum())


def test_cfsd_is_its_formula(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.Cfsd, "ROWS", 20)  # fewer than the 48 positions
    torch.save(vgg(), weights / "vgg19-dcbb9e9d.pth")
    source, result = images(0), images(1)
    cfsd = hub.Cfsd()
    found = cfsd(source, result)
    expected = [cfsd_by_hand(a, b, vgg()) for a, b in zip(source, result, strict=True)]
    assert min(expected) > 1e-3
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert cfsd(source, source).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------ ArtFID


def test_fid_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 7)) @ rng.standard_normal((7, 7)), rng.standard_normal((5, 7)) + 1
    cov_a, cov_b = (np.cov(x, rowvar=False) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    assert hub.fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-6)
    assert hub.fid(torch.from_numpy(a), torch.from_numpy(a[::-1].copy())) == pytest.approx(0, abs=1e-9)
    with pytest.raises(RequestError, match="two images"):
        hub.fid(torch.rand(1, 4), torch.rand(3, 4))


def test_art_inception_gives_what_comes_before_the_heads(weights: Path) -> None:
    from torchvision.models import Inception3

    torch.manual_seed(0)
    network = Inception3(aux_logits=False, init_weights=False).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    state = network.state_dict()
    state["fc1.weight"] = state.pop("fc.weight")
    torch.save(state, weights / "art_inception.pth")
    pooled: list[Tensor] = []
    network.avgpool.register_forward_hook(lambda _module, _inputs, output: pooled.append(output.flatten(1)))
    image = images(0, 2, 80, 96)
    with torch.no_grad():
        network(image)
    found = hub.ArtInception()(image)
    assert found.shape == (2, 2048)
    torch.testing.assert_close(found, pooled[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="75 pixels, got 64x80"):
        hub.ArtInception()(images(0, 1, 80, 64))


# ---------------------------------------------------------------------------------------------- PickScore and HPSv2


def test_pick_score_is_its_formula(weights: Path, model: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    square = {"height": 32, "width": 32}
    preparation = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square)
    CLIPProcessor(preparation, tokenizer).save_pretrained(weights / "CLIP-ViT-H-14-laion2B-s32B-b79K")
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = common | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = common | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    clip.save_pretrained(weights / "PickScore_v1")

    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((40, 48, 3), (64, 40, 3))]
    prompts = ["a red fox", "a lake at night, oil painting style"]
    found = hub.PickScore()(pictures, prompts)
    expected = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        with torch.no_grad():
            pixels = torch.as_tensor(np.stack(preparation(picture)["pixel_values"]))
            image = clip.visual_projection(clip.vision_model(pixels).pooler_output)[0].numpy()
            tokens = torch.tensor([tokenizer(prompt)["input_ids"]])
            words = clip.text_projection(clip.text_model(tokens).pooler_output)[0].numpy()
        cosine = image @ words / np.linalg.norm(image) / np.linalg.norm(words)
        expected.append(float(np.exp(clip.logit_scale.item()) * cosine))
    assert found.tolist() == pytest.approx(expected, rel=1e-4)
    assert hub.missing("PickScore") is None


class Clip(nn.Module):
    """A stand-in for open_clip's model with the methods that HPSv2 calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.words = nn.Embedding(300, 3)

    def encode_image(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return image.mean((2, 3))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.words(tokens).sum(1)


def test_hps_is_a_cosine_of_the_padded_picture(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    clip, package = Clip(), ModuleType("open_clip")
    package.create_model = lambda _name: clip
    package.get_tokenizer = lambda _name: lambda texts: torch.tensor([[len(text), 7] for text in texts])
    torch.save({"state_dict": clip.state_dict()}, weights / "HPS_v2_compressed.pt")
    monkeypatch.setitem(sys.modules, "open_clip", package)
    image = torch.ones(1, 3, 448, 224) * torch.tensor([1.0, 0.5, 0.25])[:, None, None]
    (found,) = hub.HpsV2()([image], ["a fox"]).tolist()

    mean, deviation = np.array(hub.HpsV2.MEAN), np.array(hub.HpsV2.DEVIATION)
    padded = (np.array([1.0, 0.5, 0.25]) * 0.5 - mean) / deviation  # half of the square is black
    words = (clip.words.weight[5] + clip.words.weight[7]).detach().numpy()
    assert clip.seen[0].shape == (1, 3, 224, 224)
    assert found == pytest.approx(padded @ words / np.linalg.norm(padded) / np.linalg.norm(words), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------- weights


def test_weights_are_found_in_the_folder_and_in_both_caches(weights: Path, tmp_path: Path) -> None:
    file, repository = "vgg19-dcbb9e9d.pth", "owner/name"
    places = {
        file: [weights / file, tmp_path / "torch" / "checkpoints" / file],
        repository: [weights / "name", tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"],
        f"{repository}/{file}": [tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc" / file],
    }
    for name, paths in places.items():
        for path in reversed(paths):
            assert hub.locate_weights(name) != path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            assert hub.locate_weights(name) == path
            if name == repository:
                path.unlink()
                path.mkdir()
        weights.joinpath(file).unlink(missing_ok=True)


@pytest.mark.parametrize("name", sorted(hub.MEASURES))
def test_what_is_missing_is_said(name: str) -> None:
    reason = hub.missing(name)
    assert reason is not None
    assert "open_clip is not installed" in reason or "SMSBATCH_WEIGHTS" in reason


def test_weights_of_something_else_are_refused(weights: Path) -> None:
    with pytest.raises(WeightsError, match="SMSBATCH_WEIGHTS"):
        hub.Cfsd()
    file = weights / "vgg19-dcbb9e9d.pth"
    file.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="not a file of weights"):
        hub.Cfsd()
    torch.save({name: value for name, value in vgg().items() if "features.7" not in name}, file)
    with pytest.raises(WeightsError, match=r"has no features\.7\.weight"):
        hub.Cfsd()
