"""One training step of the generator against a naive implementation, and the reproducibility of a training.

Over 400 lines: every mode of training goes through the same tests.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import oracles
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load
from torch import Tensor, nn

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.objectives import OBJECTIVES
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Distill, Manifest, Model, Prompts, Style
from smsbatch.training.distiller import Distiller

Array = NDArray[np.float64]

SIDE, FACTOR = 32, 4
WORDS = [Prompts(f"paint, {prompt}", prompt, "Turn into paint") for prompt in ("a red fox", "a lake", "")]
SEEDS = [5, 6, 7]


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


@pytest.fixture(scope="module")
def style(prior: Prior, lora: Path) -> Prior:
    return styled(prior, lora)


def styled(prior: Prior, lora: Path) -> Prior:
    deltas = read_style(Style(lora=str(lora), scale=1.0, prompt="paint"), prior)
    return prior.with_deltas(deltas.unet, deltas.text)


def manifest(
    objective: dict[str, Any] | None = None, compute: dict[str, Any] | None = None, **training: Any
) -> Distill:
    """A manifest of a small generator, with two repeats and no warm-up."""
    found = Manifest.model_validate(
        {
            "task": "distill",
            "name": "test",
            "source": {"format": "folder", "urls": "photos"},
            "model": "model",
            "style": {"prompt": "paint", "lora": "style.safetensors"},
            "image": {"resolution": SIDE},
            "objective": objective or {},
            "distill": {"width": 4, "blocks": 1, "repeats": 2, "warmup_steps": 0, "steps": 10} | training,
            "output": {"path": "out"},
            "compute": compute or {},
        }
    )
    assert isinstance(found, Distill)
    return found


def images(count: int = 2, seed: int = 0) -> Tensor:
    """Smooth random pictures, [count, 3, 32, 32] in [0, 1]."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)


class Averages:
    """Records all averaged tensors: the fake score's gradients of each update, then the generator's and the losses."""

    def __init__(self) -> None:
        self.calls: list[list[Tensor]] = []

    def __call__(self, tensors: list[Tensor]) -> None:
        self.calls.append([tensor.clone() for tensor in tensors])

    def of_generator(self, distiller: Distiller) -> Tensor:
        """The last step's gradient as one vector."""
        count = sum(parameter.requires_grad for parameter in distiller.generator.parameters())
        return torch.cat([tensor.flatten() for tensor in self.calls[-1][:count]]).double()


class Recorded:
    """Records the arguments of every call of the objective, and the noise of its relevance maps."""

    def __init__(self) -> None:
        self.z: list[Tensor] = []
        self.t: list[Tensor] = []
        self.eps: list[Tensor] = []
        self.maps: list[Tensor] = []


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    record = Recorded()

    def recording(kind: type) -> type:
        class Recording(kind):  # type: ignore[misc]
            def gradient(self, z: Tensor, t: Tensor, eps: Tensor, scores: Any) -> tuple[Tensor, Tensor]:
                record.z.append(z)
                record.t.append(t)
                record.eps.append(eps)
                return super().gradient(z, t, eps, scores)  # type: ignore[no-any-return]

            def cache_maps(self, scores: Any, noise: Callable[[], Tensor], repeats: int = 1) -> None:
                def kept() -> Tensor:
                    record.maps.append(noise())
                    return record.maps[-1]

                super().cache_maps(scores, kept, repeats)

        return Recording

    with patch.dict(OBJECTIVES, {name: recording(kind) for name, kind in OBJECTIVES.items()}):
        yield record


def lively(distiller: Distiller) -> Distiller:
    """Randomize the generator, so that every layer matters, and the fake score, so that it differs from the prior."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in distiller.generator.parameters():
            if parameter.requires_grad:
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=rng))
        for name, factor in distiller._fake.factors.items() if distiller._fake is not None else ():
            if name.startswith("up"):
                factor.copy_(0.05 * torch.randn(factor.shape, generator=rng))
    return distiller


def black_box(prior: Prior, prompts: Prompts) -> oracles.Score:
    """The score of a prior for a single row, as a function of z_t, t and the name of a prompt."""
    words = {"target": prompts.target, "source": prompts.source, "edit": prompts.edit, "null": ""}
    texts = {name: prior.embed([text]) for name, text in words.items()}

    def score(z_t: Array, t: int, words: str) -> Array:
        with torch.no_grad():
            row = torch.from_numpy(z_t).float()[None]
            return prior.noise(row, torch.tensor([t]), texts[words])[0].double().numpy()

    return score


def faked(prior: Prior, distiller: Distiller) -> Prior:
    """The prior with the fake score's LoRA, if there is one, merged into its weights."""
    if distiller._fake is None:
        return prior
    factors, config = distiller._fake.factors, distiller.config.fake
    names = [name.removeprefix("up.") for name in factors if name.startswith("up.")]
    merged = {
        f"{name}.weight": config.alpha / config.rank * (factors[f"up.{name}"][0] @ factors[f"down.{name}"][0]).detach()
        for name in names
    }
    return prior.with_deltas(merged)


def naive_gradient(
    distiller: Distiller,
    prior: Prior,
    style: Prior,
    pictures: Tensor,
    recorded: Recorded,
    gradient: Callable[..., Array],
) -> Tensor:
    """The oracle's gradient as one vector: generator and VAE run in float64, once for every repeat."""
    vae, network = copy.deepcopy(prior._vae).double(), copy.deepcopy(distiller.generator).double()
    values = list(network.parameters())
    layers = list(zip(values[::2], values[1::2], strict=True))

    def encoded(x: Tensor) -> Tensor:
        return vae.encode(x[None] * 2 - 1).latent_dist.mean[0] * vae.config.scaling_factor

    fake = faked(prior, distiller)
    repeats, t, eps = distiller.training.repeats, torch.cat(recorded.t).tolist(), torch.cat(recorded.eps).double()
    sources = [encoded(x.double()).detach().numpy() for x in pictures]
    models = [tuple(black_box(model, words) for model in (style, fake, prior)) for words in WORDS]

    def of_image(number: int, z: Array, t: int, eps: Array) -> Array:
        return gradient(z, sources[number], t, eps, *models[number])

    parameters = [value for value in values if value.requires_grad]
    found = oracles.generator_gradient(
        parameters,
        [lambda x=x: encoded(oracles.generator(layers, x.double(), distiller.training.restore)) for x in pictures],  # type: ignore[misc]
        [
            [(t[row], eps[row].numpy()) for row in range(number * repeats, (number + 1) * repeats)]
            for number in range(len(pictures))
        ],
        of_image,
    )
    return torch.cat([part.flatten() for part in found])


def apart(one: Tensor, other: Tensor) -> float:
    assert other.norm() > 0
    return float((one - other).norm() / other.norm())


# ------------------------------------------------------------------------------------------- gradient of the generator


def sms_released(z: Array, z_src: Array, t: int, eps: Array, *models: oracles.Score) -> Array:
    return z.size * oracles.sms_iteration("released", z, z_src, t, eps, *models, lam=5e-4, guidance=4.5).gradient


def sms_paper(z: Array, z_src: Array, t: int, eps: Array, *models: oracles.Score) -> Array:
    w = oracles.weight_released(t)  # the paper defines no weight
    return oracles.sms_iteration("paper", z, z_src, t, eps, *models, lam=5e-4, weight=w).gradient


def vsd(z: Array, z_src: Array, t: int, eps: Array, style: oracles.Score, fake: oracles.Score, _: Any) -> Array:
    return oracles.vsd_direction(z, t, eps, style, fake, 7.5, 1.0, "one_minus_abar")


def dds(z: Array, z_src: Array, t: int, eps: Array, style: oracles.Score, *_: Any) -> Array:
    return oracles.dds_direction(z, z_src, t, eps, style, 7.5, "one")


def pds(z: Array, z_src: Array, t: int, eps: Array, style: oracles.Score, *_: Any) -> Array:
    return oracles.pds_direction(z, z_src, t, eps, style, 100.0)


@pytest.mark.parametrize(
    ("objective", "gradient", "at_once"),
    [
        ({}, sms_released, 8),
        ({}, sms_released, 1),
        ({"preset": "paper"}, sms_paper, 8),
        ({"fake": {"trains_on": "forward"}}, sms_released, 1),
        ({"name": "vsd"}, vsd, 8),
        ({"name": "dds"}, dds, 8),
        ({"name": "pds"}, pds, 1),
    ],
    ids=["sms", "one at a time", "paper", "forward", "vsd", "dds", "pds"],
)
def test_gradient_that_reaches_the_generator(
    prior: Prior,
    style: Prior,
    recorded: Recorded,
    objective: dict[str, Any],
    gradient: Callable[..., Array],
    at_once: int,
) -> None:
    """With two images and three repeats, generator and VAE run once per image, and in the oracle once per repeat."""
    averages, pictures, restore = Averages(), images(seed=1), at_once == 1
    distiller = lively(
        Distiller(prior, style, manifest(objective, {"batch_size": at_once}, repeats=3, restore=restore), averages)
    )
    before = copy.deepcopy(distiller)
    distiller.train_step(pictures, WORDS[:2], SEEDS[:2])
    expected = naive_gradient(before, prior, style, pictures, recorded, gradient)
    assert len(torch.cat(recorded.t)) == 6
    assert len(set(torch.cat(recorded.t).tolist())) > 3
    assert apart(averages.of_generator(distiller), expected) < 1e-4


def test_maps_of_a_grid_are_the_picture_s_own(prior: Prior, style: Prior, recorded: Recorded) -> None:
    """A row uses the nearest of three maps, each with its own noise; all repeats of a picture share the maps."""
    averages, pictures, grid = Averages(), images(), [140, 260, 380]
    distiller = lively(Distiller(prior, style, manifest({"relevance_grid": 3}, repeats=3), averages))
    before = copy.deepcopy(distiller)
    distiller.train_step(pictures, WORDS[:2], SEEDS[:2])
    assert len(recorded.maps) == 3
    eps_of_maps = torch.stack(recorded.maps, 1).double()  # [picture, grid, C, h, w]
    assert len(eps_of_maps.unique()) == eps_of_maps.numel()
    pictures_by_source: dict[float, int] = {}

    def gradient(z: Array, z_src: Array, t: int, eps: Array, *models: oracles.Score) -> Array:
        number = pictures_by_source.setdefault(float(z_src.sum()), len(pictures_by_source))
        nearest = min(range(3), key=lambda index: abs(grid[index] - t))
        real, noise = models[2], eps_of_maps[number, nearest].numpy()
        z_t_src = oracles.add_noise(z_src, noise, grid[nearest])
        answers = {words: real(z_t_src, grid[nearest], words) for words in ("edit", "null")}
        return sms_released(z, z_src, t, eps, *models[:2], lambda _, __, words: answers[words])

    expected = naive_gradient(before, prior, style, pictures, recorded, gradient)
    assert len(pictures_by_source) == 2
    assert apart(averages.of_generator(distiller), expected) < 1e-4


def test_contrastive_objective_trains_too(prior: Prior, style: Prior) -> None:
    averages = Averages()
    distiller = lively(Distiller(prior, style, manifest({"name": "cds"}), averages))
    losses = distiller.train_step(images(), WORDS[:2], SEEDS[:2])
    assert set(losses) == {"objective"}
    gradient = averages.of_generator(distiller)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0


def test_reported_losses(prior: Prior, style: Prior, recorded: Recorded) -> None:
    """The objective's loss is half the squared gradient, averaged over the entries of all rows."""
    distiller = lively(Distiller(prior, style, manifest({"relevance": "off", "identity_weight": 0}, {"batch_size": 1})))
    before = copy.deepcopy(distiller)
    losses = distiller.train_step(images(), WORDS[:2], SEEDS[:2])
    fake, expected = faked(prior, before), []
    for row, (z, t, eps) in enumerate(
        zip(torch.cat(recorded.z), torch.cat(recorded.t), torch.cat(recorded.eps), strict=True)
    ):
        models = [black_box(model, WORDS[row // 2]) for model in (style, fake)]
        z64, eps64 = z.double().numpy(), eps.double().numpy()
        g = oracles.vsd_direction(z64, int(t), eps64, *models, 4.5, 4.5, "posterior_variance")
        expected.append((g**2).mean() / 2)
    assert set(losses) == {"objective", "fake"}
    assert float(losses["objective"]) == pytest.approx(np.mean(expected), rel=1e-3)
    assert all(loss.ndim == 0 for loss in losses.values())


# ---------------------------------------------------------------------------------------------------------- fake score


class Followed:
    """The batches of the fake score's updates: rows of (z, t, eps, text)."""

    def __init__(self) -> None:
        self.updates: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = [[]]

    @property
    def complete(self) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
        return self.updates[:-1]


@pytest.fixture
def followed() -> Iterator[Followed]:
    record, predict, update = Followed(), FakeScore.predict, FakeScore.update

    def recording(self: FakeScore, z: Tensor, t: Tensor, eps: Tensor, text: Tensor) -> Tensor:
        record.updates[-1] += [(z[i], t[i], eps[i], text[i]) for i in range(len(z))]
        return predict(self, z, t, eps, text)

    def closing(self: FakeScore, *arguments: Any) -> None:
        record.updates.append([])
        update(self, *arguments)

    with patch.object(FakeScore, "predict", recording), patch.object(FakeScore, "update", closing):
        yield record


def of_lora(factors: dict[str, Tensor], kind: str) -> dict[str, Array]:
    return {
        name.removeprefix(f"{kind}."): factor[0].detach().double().numpy().copy()
        for name, factor in factors.items()
        if name.startswith(f"{kind}.")
    }


def test_one_lora_learns_from_all_rows(prior: Prior, style: Prior, followed: Followed) -> None:
    """Every gradient and AdamW step of the LoRA equals the oracle's, in three training steps of two updates each."""
    config = {"fake": {"updates": 2, "learning_rate": 0.01, "weight_decay": 0.1}}
    averages = Averages()
    distiller = Distiller(prior, style, manifest(config, {"batch_size": 1}), averages)
    assert distiller._fake is not None
    down, up = of_lora(distiller._fake.factors, "down"), of_lora(distiller._fake.factors, "up")
    states = {
        kind: {name: oracles.adam_start(x) for name, x in part.items()} for kind, part in (("d", down), ("u", up))
    }
    losses = [float(distiller.train_step(images(), WORDS[:2], SEEDS[:2])["fake"]) for _ in range(3)]
    of_fake = [call for call in averages.calls if len(call) == 2 * len(down)]
    assert [len(rows) for rows in followed.complete] == [4] * 6
    unet, scale, abar = prior._unet, distiller.config.fake.alpha / distiller.config.fake.rank, oracles.alphas_cumprod()
    values: list[float] = []
    for rows, gradients in zip(followed.complete, of_fake, strict=True):

        def predict(number: int, deltas: dict[str, Tensor], rows: Any = rows) -> Tensor:
            z, t, eps, text = rows[number]
            z_t = abar[int(t)] ** 0.5 * z + (1 - abar[int(t)]) ** 0.5 * eps
            merged = {f"{name}.weight": unet.get_submodule(name).weight + delta for name, delta in deltas.items()}
            called = ((z_t[None], t[None]), {"encoder_hidden_states": text[None]})
            return torch.func.functional_call(unet, merged, *called).sample[0]  # type: ignore[no-any-return]

        targets = [(eps, float(abar[int(t)])) for _, t, eps, _ in rows]
        value, of_down, of_up = oracles.shared_lora_gradient(predict, targets, down, up, scale)
        values.append(value)
        expected = torch.from_numpy(np.concatenate([g.ravel() for g in (*of_down.values(), *of_up.values())]))
        assert apart(torch.cat([g.flatten() for g in gradients]).double(), expected) < 1e-4
        # Go on with the found gradients: where one is nearly zero, Adam turns its rounding error into a whole step.
        for kind, part, found in (("d", down, gradients[: len(down)]), ("u", up, gradients[len(down) :])):
            for name, gradient in zip(part, found, strict=True):
                part[name], states[kind][name] = oracles.adamw_step(
                    part[name], gradient[0].double().numpy(), states[kind][name], 0.01, weight_decay=0.1
                )
    assert losses == pytest.approx(values[1::2], rel=1e-3), "that of the last update"
    for kind, part in (("down", down), ("up", up)):
        for name, found in of_lora(distiller._fake.factors, kind).items():
            np.testing.assert_allclose(found, part[name], atol=2e-6)
    assert max(np.abs(x).max() for x in up.values()) > 0.01


def test_fake_score_follows_the_generator_at_times_and_noises_of_its_own(
    prior: Prior, style: Prior, recorded: Recorded, followed: Followed
) -> None:
    distiller = lively(Distiller(prior, style, manifest({"fake": {"updates": 2}}, {"batch_size": 1})))
    for _ in range(2):
        distiller.train_step(images(), WORDS[:2], SEEDS[:2])
    asked = torch.cat(recorded.z).unflatten(0, (2, 4))  # [step, row]
    text = prior.embed([WORDS[row // 2].target for row in range(4)])
    for number, rows in enumerate(followed.complete):
        assert torch.equal(torch.stack([z for z, *_ in rows]), asked[number // 2]), "what the generator made"
        torch.testing.assert_close(torch.stack([words for *_, words in rows]), text)
    noises = [*torch.cat(recorded.eps), *(eps for rows in followed.complete for _, _, eps, _ in rows)]
    of_first_step = [*noises[:4], *noises[8:16]]
    assert len(torch.stack(of_first_step).unique(dim=0)) == 12, "four rows' own, and of each of two updates"


def test_forward_mode_learns_from_the_very_prediction(
    prior: Prior, style: Prior, recorded: Recorded, followed: Followed
) -> None:
    averages = Averages()
    config = {"fake": {"trains_on": "forward"}}
    distiller = lively(Distiller(prior, style, manifest(config, {"batch_size": 1}), averages))
    assert distiller._fake is not None
    down, up = of_lora(distiller._fake.factors, "down"), of_lora(distiller._fake.factors, "up")
    loss = distiller.train_step(images(), WORDS[:2], SEEDS[:2])["fake"]
    assert followed.complete == [[]], "no prediction of its own, one update"
    z, t, eps = (torch.cat(part) for part in (recorded.z, recorded.t, recorded.eps))
    abar, unet = oracles.alphas_cumprod(), prior._unet
    text = prior.embed([WORDS[row // 2].target for row in range(4)])

    def predict(number: int, deltas: dict[str, Tensor]) -> Tensor:
        row, now = slice(number, number + 1), abar[int(t[number])]
        z_t = now**0.5 * z[row] + (1 - now) ** 0.5 * eps[row]
        merged = {f"{name}.weight": unet.get_submodule(name).weight + delta for name, delta in deltas.items()}
        called = ((z_t, t[row]), {"encoder_hidden_states": text[row]})
        return torch.func.functional_call(unet, merged, *called).sample[0]  # type: ignore[no-any-return]

    targets = [(eps[row], float(abar[int(t[row])])) for row in range(4)]
    value, of_down, of_up = oracles.shared_lora_gradient(predict, targets, down, up, 4.0)
    expected = torch.from_numpy(np.concatenate([g.ravel() for g in (*of_down.values(), *of_up.values())]))
    found = torch.cat([tensor.flatten() for tensor in averages.calls[0]]).double()
    assert apart(found, expected) < 1e-4
    assert float(loss) == pytest.approx(value, rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- costs


class Calls:
    """Counts the rows of every call of the generator, the VAE encoder and the UNets."""

    def __init__(self, distiller: Distiller, prior: Prior, style: Prior) -> None:
        self.rows: dict[str, list[int]] = {name: [] for name in ("generator", "vae", "style", "prior")}
        parts = (distiller.generator, prior._vae.encoder, style._unet, prior._unet)
        self.hooks = [
            part.register_forward_pre_hook(lambda _, inputs, name=name: self.rows[name].append(len(inputs[0])))
            for name, part in zip(self.rows, parts, strict=True)
        ]

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("objective", "style_rows", "prior_rows"),
    [
        ({}, [24], [48, 12]),  # guidance on style and fake; edit and null; training
        ({"fake": {"updates": 3}}, [24], [48, 12, 12, 12]),
        ({"fake": {"trains_on": "forward"}}, [24], [12, 36]),
        ({"preset": "paper"}, [12], [36, 12]),
        ({"relevance_grid": 2}, [24], [6, 6, 24, 12]),
        ({"name": "dds"}, [48], []),
        ({"name": "pds"}, [48], []),
    ],
    ids=["sms", "updates", "forward", "paper", "grid", "dds", "pds"],
)
def test_generator_and_vae_run_once_per_image(
    prior: Prior, style: Prior, objective: dict[str, Any], style_rows: list[int], prior_rows: list[int]
) -> None:
    """Three images, four repeats: scores get twelve rows, the generator three, the encoder three and the sources."""
    distiller = Distiller(prior, style, manifest(objective, repeats=4))
    with Calls(distiller, prior, style) as calls:
        distiller.train_step(images(3), WORDS, SEEDS)
    assert calls.rows == {"generator": [3], "vae": [3, 3], "style": style_rows, "prior": prior_rows}


def test_warm_up_asks_no_score(prior: Prior, style: Prior) -> None:
    averages, pictures = Averages(), images(3)
    distiller = lively(Distiller(prior, style, manifest(None, {"batch_size": 2}, warmup_steps=2), averages))
    reference = copy.deepcopy(distiller.generator)
    loss = (reference(pictures) - pictures).abs().mean()
    loss.backward()
    with Calls(distiller, prior, style) as calls:
        assert distiller.warming_up
        losses = distiller.train_step(pictures, WORDS, SEEDS)
        distiller.train_step(pictures, WORDS, SEEDS)
        assert not distiller.warming_up
    assert calls.rows == {"generator": [2, 1, 2, 1], "vae": [], "style": [], "prior": []}
    assert set(losses) == {"reconstruction"}
    assert float(losses["reconstruction"]) == pytest.approx(loss.item(), rel=1e-5)
    expected = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]).double()
    averages.calls.pop()
    assert apart(averages.of_generator(distiller), expected) < 1e-4
    assert set(distiller.train_step(pictures, WORDS, SEEDS)) == {"objective", "fake"}


def test_warm_up_learns_to_reproduce(prior: Prior, style: Prior) -> None:
    distiller = Distiller(prior, style, manifest(warmup_steps=60, width=8, learning_rate=2e-3))
    losses = [float(distiller.train_step(images(3), WORDS, SEEDS)["reconstruction"]) for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    x = images(3)
    with torch.no_grad():
        assert (distiller.ema(x) - x).abs().mean() < 0.6 * losses[0], "the running average learns with it"


# ----------------------------------------------------------------------------------------------------------- whole run


def test_timesteps_narrow_over_the_steps_after_the_warm_up(
    prior: Prior, style: Prior, recorded: Recorded, followed: Followed
) -> None:
    """In a run of 24 steps, the range of the gradient's timesteps narrows, and the fake score's does not."""
    steps, expected = 24, []
    distiller = Distiller(prior, style, manifest(warmup_steps=2, steps=steps, repeats=3))
    for position in range(2 + steps):
        distiller.train_step(images(1), WORDS[:1], [position])
        if position >= 2:
            choices, draws = oracles.released_range(position - 2, steps), torch.Generator().manual_seed(position)
            expected.append([choices[int(torch.randint(len(choices), (), generator=draws))] for _ in range(3)])
    assert distiller.step == 2 + steps
    assert [t.tolist() for t in recorded.t] == expected, "the first that a picture's seed draws"
    assert len({t for of_step in expected for t in of_step}) > steps
    whole = oracles.released_range(0, 1)
    of_fake = [int(t) for rows in followed.complete for _, t, *_ in rows]
    assert set(of_fake) <= set(whole)
    assert max(of_fake[-24:]) > 250, "where the gradient's have long narrowed"


def test_optimizer_learning_rate_and_average_by_hand(prior: Prior, style: Prior) -> None:
    """Adam is reset after the warm-up, the rate falls over the last half, the average follows the parameters."""
    averages = Averages()
    warmup, steps = 2, 6
    given = manifest(
        warmup_steps=warmup, steps=steps, learning_rate=1e-2, decay=0.5, ema=0.25, betas=(0.5, 0.99), objective=None
    )
    distiller = lively(Distiller(prior, style, given, averages))
    trained = [parameter for parameter in distiller.generator.parameters() if parameter.requires_grad]
    averaged = [
        average
        for average, parameter in zip(distiller.ema.parameters(), distiller.generator.parameters(), strict=True)
        if parameter.requires_grad
    ]
    running = [average.double().numpy().copy() for average in averaged]
    x = [parameter.detach().double().numpy().copy() for parameter in trained]
    states = [oracles.adam_start(value) for value in x]
    for step in range(warmup + steps):
        distiller.train_step(images(), WORDS[:2], SEEDS[:2])
        if step == warmup:
            states = [oracles.adam_start(value) for value in x]
        rate = oracles.decaying_rate(max(step - warmup, 0), steps, 1e-2, 0.5)
        for index, gradient in enumerate(averages.calls[-1][: len(trained)]):
            x[index], states[index] = oracles.adamw_step(
                x[index], gradient.double().numpy(), states[index], rate, 0.5, 0.99, weight_decay=0.0
            )
            decay = min(0.25, (step + 1) / (step + 10))
            running[index] = oracles.running_average(running[index], x[index], decay)
            np.testing.assert_allclose(trained[index].detach().numpy(), x[index], atol=1e-5)
    for found, expected in zip(averaged, running, strict=True):
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in distiller.ema.parameters())


def trained(distiller: Distiller, first: int, last: int) -> Distiller:
    """Run the steps [first, last), each with its own pictures and seeds."""
    for step in range(first, last):
        distiller.train_step(images(2, seed=step), WORDS[:2], [2 * step, 2 * step + 1])
    return distiller


@pytest.mark.parametrize(
    ("objective", "stopped"), [({}, 1), ({}, 2), ({}, 4), ({"fake": {"trains_on": "forward"}}, 3), ({"name": "dds"}, 3)]
)
def test_restored_training_goes_on_to_the_bit(
    prior: Prior, style: Prior, objective: dict[str, Any], stopped: int
) -> None:
    given = manifest(objective, warmup_steps=2, steps=3)
    whole = trained(Distiller(prior, style, given), 0, 5)
    data = trained(Distiller(prior, style, given), 0, stopped).dump()
    torch.manual_seed(99)
    again = Distiller(prior, style, given)
    again.restore(data)
    assert again.step == stopped
    assert again.dump() == data
    assert trained(again, stopped, 5).dump() == whole.dump()
    tensors = load(data)
    assert {name.partition(".")[0] for name in tensors} >= {"step", "generator", "ema", "adam"}
    assert any(name.startswith("fake.") for name in tensors) == (objective.get("name") != "dds")


def test_seeds_decide_everything(prior: Prior, style: Prior) -> None:
    given = manifest(warmup_steps=1)
    one = trained(Distiller(prior, style, given), 0, 3).dump()
    torch.manual_seed(7)
    assert trained(Distiller(prior, style, given), 0, 3).dump() == one
    other = Distiller(prior, style, given)
    trained(other, 0, 2)
    other.train_step(images(2, seed=2), WORDS[:2], [1004, 1005])
    assert other.dump() != one
    assert Distiller(prior, style, given.model_copy(update={"seed": 1})).dump() != Distiller(prior, style, given).dump()


def gradients_of_a_step(distiller: Distiller, averages: Averages, order: list[int]) -> list[Tensor]:
    lively(distiller).train_step(images(3)[order], [WORDS[i] for i in order], [SEEDS[i] for i in order])
    return [torch.cat([tensor.flatten() for tensor in call]).double() for call in averages.calls]


@pytest.mark.parametrize("objective", [{}, {"fake": {"trains_on": "forward"}}, {"relevance_grid": 2}])
def test_neither_chunks_nor_order_of_a_step_matter(prior: Prior, style: Prior, objective: dict[str, Any]) -> None:
    found = []
    for at_once, order in ((8, [0, 1, 2]), (1, [0, 1, 2]), (2, [2, 0, 1])):
        averages = Averages()
        distiller = Distiller(prior, style, manifest(objective, {"batch_size": at_once}, repeats=3), averages)
        found.append(gradients_of_a_step(distiller, averages, order))
    for other in found[1:]:
        assert [apart(mine, theirs) < 1e-4 for mine, theirs in zip(other, found[0], strict=True)] == [True, True]


def test_two_workers_make_the_step_of_one(model: Path, lora: Path) -> None:
    """Two threads train on half of the pictures each, and average at a barrier."""
    barrier, shared = threading.Barrier(2, timeout=60), [[], []]  # type: ignore[var-annotated]

    def averaging(rank: int) -> Callable[[list[Tensor]], None]:
        def average(tensors: list[Tensor]) -> None:
            shared[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            means = [(one + other) / 2 for one, other in zip(*shared, strict=True)]
            barrier.wait()
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean)

        return average

    priors = {rank: Prior.load(Model(path=str(model))) for rank in (0, 1, None)}  # threads cannot share a prior

    def run(rank: int | None, results: dict[int | None, tuple[dict[str, float], bytes]]) -> None:
        own = priors[rank]
        average = (lambda tensors: None) if rank is None else averaging(rank)
        distiller = Distiller(own, styled(own, lora), manifest(warmup_steps=1, learning_rate=1e-3), average)
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        prompts = [*WORDS, WORDS[0]]
        for step in range(3):
            losses = distiller.train_step(
                images(4, seed=step)[part], prompts[part], [4 * step + i for i in range(4)][part]
            )
        results[rank] = {name: float(loss) for name, loss in losses.items()}, distiller.dump()

    results: dict[int | None, tuple[dict[str, float], bytes]] = {}
    threads = [threading.Thread(target=run, args=(rank, results)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(None, results)
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(results[None][0], rel=1e-3)
    start = load(Distiller(priors[None], priors[None], manifest()).dump())
    moved = []
    for rank in (0, None):
        state = load(results[rank][1])
        names = sorted(name for name in state if name.startswith(("generator.", "fake.")))
        moved.append(torch.cat([(state[name] - start[name]).flatten() for name in names]))
    assert apart(*moved) < 0.02, "where a gradient is nearly zero, Adam takes its rounding for a step"


# ------------------------------------------------------------------------------------------------ precision and memory


def test_half_precision_stays_close(model: Path, lora: Path) -> None:
    """Generator and VAE compute in the prior's precision; the generator's parameters are float32."""
    found, computed = {}, {}
    for precision in ("fp32", "bf16"):
        own, averages = Prior.load(Model(path=str(model)), precision=precision), Averages()  # type: ignore[arg-type]
        distiller = lively(Distiller(own, styled(own, lora), manifest(), averages))
        dtypes: set[torch.dtype] = set()
        for layer in (distiller.generator.tail, own._vae.encoder.conv_in):
            layer.register_forward_hook(lambda _, __, y, dtypes=dtypes: dtypes.add(y.dtype))
        distiller.train_step(images(), WORDS[:2], SEEDS[:2])
        found[precision], computed[precision] = averages.of_generator(distiller), dtypes
        assert {p.dtype for p in distiller.generator.parameters()} == {torch.float32}
    assert computed == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    cosine = float(found["fp32"] @ found["bf16"] / found["fp32"].norm() / found["bf16"].norm())
    assert 0.9 < cosine < 1 - 1e-7


def test_recomputed_activations_give_the_same_gradient(model: Path, lora: Path) -> None:
    """With `checkpoint_vae`, the encoder's blocks run twice for the results and once for the sources."""
    found, calls = {}, {}
    for checkpoint in (False, True):
        own, averages = Prior.load(Model(path=str(model))), Averages()
        distiller = lively(Distiller(own, styled(own, lora), manifest(checkpoint_vae=checkpoint), averages))
        rows: list[int] = []
        own._vae.encoder.down_blocks[0].register_forward_pre_hook(lambda _, x, rows=rows: rows.append(len(x[0])))
        distiller.train_step(images(), WORDS[:2], SEEDS[:2])
        found[checkpoint], calls[checkpoint] = averages.of_generator(distiller), rows
    assert torch.equal(found[True], found[False])
    assert calls == {False: [2, 2], True: [2, 2, 2]}
