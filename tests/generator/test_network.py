"""Tests of the feed-forward network: the papers' architecture, images of any size, and the two files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import torch
from torch import Tensor

import smsbatch as sb
from smsbatch.errors import WeightsError
from smsbatch.generator.config import parameter_count
from smsbatch.generator.network import CONFIG, WEIGHTS, Generator

ABOUT = {"name": "oil", "style": "oil painting", "training": {"steps": 7, "reconstruction": 0.25}}


def lively(
    width: int = 8, blocks: int = 2, *, restore: bool = False, about: dict[str, object] | None = None
) -> Generator:
    """A generator in which every convolution affects the result: PyTorch's initial weights and nonzero biases."""
    torch.manual_seed(3)
    return Generator(width, blocks, restore=restore, about=about).requires_grad_(False)


def images(height: int, width: int, count: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def layers(generator: Generator, dtype: torch.dtype = torch.float64) -> list[oracles.Layer]:
    """Weights and biases in the order of the network, which is the order of its state dict."""
    values = [value.to(dtype) for value in generator.state_dict().values()]
    return list(zip(values[::2], values[1::2], strict=True))


def oracle(generator: Generator, picture: Tensor) -> Tensor:
    return oracles.generator(layers(generator), picture.double(), generator.restore).float()


# ------------------------------------------------------------------------------------------------------ architecture


@pytest.mark.parametrize(("width", "blocks", "count"), [(64, 9, 11_378_179), (64, 6, 7_837_699), (8, 2, None)])
def test_parameters(width: int, blocks: int, count: int | None) -> None:
    with torch.device("meta"):
        generator = Generator(width, blocks)
    assert generator.parameter_count == sum(parameter.numel() for parameter in generator.parameters())
    assert generator.parameter_count == oracles.generator_parameters(width, blocks)
    assert count in (None, generator.parameter_count)


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (32, 48), (17, 18), (31, 67), (64, 37)])
def test_it_is_the_network_of_the_papers(size: tuple[int, int], restore: bool) -> None:
    generator, pictures = lively(restore=restore), images(*size, count=2)
    made = generator(pictures)
    assert made.shape == pictures.shape
    for picture, one in zip(pictures, made, strict=True):
        torch.testing.assert_close(one, oracle(generator, picture), atol=1e-5, rtol=0)
    assert made.std() > 0.02, "or nothing was compared"


def test_restored_it_knows_how_bright_a_picture_was() -> None:
    """Without `restore` the first normalization removes mean and contrast (except for its epsilon)."""
    picture = images(32, 32)
    other = 0.5 * picture + 0.2
    plain, restoring = lively(), lively(restore=True)
    assert plain.parameter_count == restoring.parameter_count
    torch.testing.assert_close(plain(other), plain(picture), atol=0.01, rtol=0)
    assert (restoring(other) - restoring(picture)).abs().mean() > 0.05
    narrow = 0.25 + picture / 2  # so that nothing is clamped
    for statistic in (torch.mean, torch.std):
        torch.testing.assert_close(
            statistic(restoring(narrow), (-2, -1)), statistic(narrow, (-2, -1)), atol=0.005, rtol=0.01
        )


@pytest.mark.parametrize("height", range(16, 68))
def test_every_size_and_range(height: int) -> None:
    """Noise, black and white images are tested at every height and every width from 16 to 67."""
    width = 16 + (7 * height) % 52
    generator = lively(4, 1, restore=bool(height % 2))
    generator.tail.weight.mul_(50)  # so that the tanh saturates
    pictures = torch.cat([images(height, width), torch.zeros(1, 3, height, width), torch.ones(1, 3, height, width)])
    made = generator(pictures)
    assert made.shape == (3, 3, height, width)
    assert 0 <= made.min() <= made.max() <= 1
    assert made.dtype == torch.float32
    assert made[0].std() > 0.1


def test_padding_is_of_the_end_alone_and_cut_off_again() -> None:
    generator, picture = lively(), images(24, 28)
    odd = picture[..., :21, :26]
    padded = torch.nn.functional.pad(odd, (0, 2, 0, 3), mode="reflect")
    torch.testing.assert_close(generator(odd), generator(padded)[..., :21, :26])
    assert (generator(odd) - generator(picture)[..., :21, :26]).abs().max() > 1e-4


def test_pictures_of_a_batch_do_not_touch_each_other() -> None:
    generator, pictures = lively(), images(20, 24, count=3)
    alone = torch.cat([generator(picture[None]) for picture in pictures])
    torch.testing.assert_close(generator(pictures), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_answers_in_full(dtype: torch.dtype) -> None:
    generator, pictures = lively(), images(24, 20)
    exact = generator(pictures)
    made = generator.to(dtype)(pictures)
    assert made.dtype == torch.float32
    assert (made - exact).abs().mean() < 0.01


def test_channels_last_changes_nothing() -> None:
    generator, pictures = lively(), images(24, 20)
    exact = generator(pictures)
    last = generator.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(pictures.to(memory_format=torch.channels_last)), exact, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize("size", [(32, 48), (21, 27)])
def test_under_its_own_moments_a_picture_is_what_it_was(size: tuple[int, int]) -> None:
    generator, picture = lively(), images(*size)
    moments = generator.moments(picture)
    assert len(moments) == 1 + 2 + 2 * 2 + 2, "one of every normalization"
    torch.testing.assert_close(generator(picture, moments), generator(picture), atol=1e-5, rtol=0)


def test_moments_of_another_picture_change_the_result() -> None:
    generator, picture = lively(), images(32, 32)
    other = generator.moments(0.2 * images(32, 32, seed=1))
    assert (generator(picture, other) - generator(picture)).abs().max() > 0.01
    first, _ = other[0]
    x = oracles._convolved(2 * (0.2 * images(32, 32, seed=1)[0].double()) - 1, layers(generator)[0])
    torch.testing.assert_close(first.flatten(), x.mean((1, 2)).float())
    torch.testing.assert_close(other[0].variance.flatten(), x.var((1, 2), correction=0).float())


@pytest.mark.parametrize("blocks", [1, 2])
def test_reach(blocks: int) -> None:
    """A changed pixel affects nothing beyond the reach, and something within 2 pixels of it on at least one side."""
    generator = lively(4, blocks)
    side = 4 * ((2 * generator.reach + 40) // 4)
    picture, changed, ends = images(side, side).double(), [], []
    generator = generator.double()
    moments = generator.moments(picture)

    def run(picture: Tensor) -> Tensor:
        return generator(picture, moments)

    before = run(picture)
    for offset in range(4):  # the four positions within a stride
        row, column = side // 2 + offset, side // 2 + (offset * 3) % 4
        other = picture.clone()
        other[0, :, row, column] = 1 - other[0, :, row, column].round()
        difference = (run(other) - before).abs().amax((0, 1))
        rows, columns = (difference > 0).nonzero(as_tuple=True)
        changed.append(len(rows))
        ends += [rows.max() - row, row - rows.min(), columns.max() - column, column - columns.min()]
    assert max(ends) <= generator.reach
    assert max(ends) >= generator.reach - 2
    assert min(changed) > generator.reach**2


def test_without_given_moments_everything_reaches_everything() -> None:
    generator = lively(4, 1)
    picture = images(96, 96)
    other = picture.clone()
    other[..., :8, :8] = 0
    assert (generator(other) - generator(picture))[..., -8:, -8:].abs().max() > 1e-5


# -------------------------------------------------------------------------------------------------------------- files


def test_files_round_trip(tmp_path: Path) -> None:
    generator, pictures = lively(restore=True, about=ABOUT), images(20, 23)
    generator.save(tmp_path / "new" / "folder")
    before = torch.random.get_rng_state()
    read = Generator.load(tmp_path / "new" / "folder")
    assert torch.equal(torch.random.get_rng_state(), before), "reading draws nothing"
    assert torch.equal(read(pictures), generator(pictures))
    assert read.about == ABOUT
    assert not any(parameter.requires_grad for parameter in read.parameters())
    assert read.files() == generator.files()
    assert torch.equal(Generator.of_files(generator.files())(pictures), generator(pictures))


def test_its_figures_lie_in_the_json(tmp_path: Path) -> None:
    lively(about=ABOUT).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["format"], config["width"], config["blocks"]) == ("smsbatch-generator", 8, 2)
    assert config["parameters"] == oracles.generator_parameters(8, 2)
    assert config["about"] == ABOUT


def test_files_are_float32_whatever_it_computes_in() -> None:
    pictures = images(20, 20)
    generator = lively()
    half = Generator.of_files(generator.to(torch.bfloat16).files())
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    assert half(pictures).shape == pictures.shape


def _without(key: str) -> object:
    return lambda config: {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("change", "named", "said"),
    [
        (lambda config: [], CONFIG, "not of a generator"),
        (lambda config: config | {"format": "onnx"}, CONFIG, "not of a generator"),
        (lambda config: config | {"version": 2}, CONFIG, "version 2"),
        (lambda config: config | {"width": "8"}, CONFIG, "width"),
        (lambda config: config | {"blocks": None}, CONFIG, "blocks"),
        (lambda config: config | {"width": 0}, CONFIG, "width"),
        (lambda config: config | {"width": 1_000_000_000}, CONFIG, "width"),
        (lambda config: config | {"blocks": -1}, CONFIG, "blocks"),
        (_without("about"), CONFIG, "about"),
        (_without("restore"), CONFIG, "restore"),
        (_without("sha256"), CONFIG, "sha256"),
        (lambda config: config | {"blocks": 3}, CONFIG, "not those of its width and blocks"),
        (lambda config: config | {"blocks": 3, "parameters": parameter_count(8, 3)}, WEIGHTS, "blocks"),
        (lambda config: config | {"width": 4, "parameters": parameter_count(4, 2)}, WEIGHTS, "head"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(change, named: str, said: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    lively().save(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(change(json.loads((tmp_path / CONFIG).read_text()))))
    with pytest.raises(WeightsError) as raised:
        Generator.load(tmp_path)
    message = str(raised.value)
    assert str(tmp_path / named) in message
    assert said in message
    assert "\n" not in message


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    generator = lively()
    generator.save(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    for spoiled in (weights[:-1], weights[:100], b"", bytes([*weights[:-1], weights[-1] ^ 1])):
        (tmp_path / WEIGHTS).write_bytes(spoiled)
        with pytest.raises(WeightsError, match=WEIGHTS):
            Generator.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=WEIGHTS):
        Generator.load(tmp_path)
    generator.save(tmp_path)
    for spoiled in (b"{", b"\xff\xfe", b""):
        (tmp_path / CONFIG).write_bytes(spoiled)
        with pytest.raises(WeightsError, match=CONFIG):
            Generator.load(tmp_path)
    with pytest.raises(WeightsError, match="nowhere"):
        Generator.load(tmp_path / "nowhere")


def test_loading_one_needs_no_diffusion_model(tmp_path: Path) -> None:
    lively().save(tmp_path)
    heavy = "{'diffusers', 'transformers', 'ray', 'torchvision', 'pyarrow', 'pydantic', 'fsspec', 'PIL'}"
    code = (
        "import sys, torch; import smsbatch as sb;"
        f"made = sb.Generator.load({str(tmp_path)!r})(torch.zeros(1, 3, 16, 16));"
        f"print(sorted({heavy} & set(sys.modules)), tuple(made.shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] (1, 3, 16, 16)"


def test_the_import_path_that_older_cards_name_still_works() -> None:
    from smsbatch.diffusion.generator import Generator as Named

    assert Named is sb.Generator is Generator


# ----------------------------------------------------------------------------------------------------- initialization


def test_a_new_one_is_decided_by_its_seed() -> None:
    torch.manual_seed(1)
    first = Generator.initialized(8, 1, seed=5).state_dict()
    torch.manual_seed(2)
    same, other = Generator.initialized(8, 1, seed=5).state_dict(), Generator.initialized(8, 1, seed=6).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.convolution.weight"], other["head.convolution.weight"])
    for name, value in first.items():
        if name.endswith("bias"):
            assert not value.any()
        else:
            variance = 2 / value[0].numel() * (0.1 if name.startswith("tail") else 1)
            assert value.std() == pytest.approx(variance**0.5, rel=0.2)
