"""Tests of every objective's gradient against the formulas, with arbitrary functions in place of networks.

The file exceeds 400 lines because every objective passes the same battery of cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from torch import Tensor

from smsbatch.diffusion import objectives
from smsbatch.diffusion.objectives import OBJECTIVES, _patches, positions
from smsbatch.diffusion.relevance import relevance_map
from smsbatch.diffusion.schedule import Schedule
from smsbatch.diffusion.scores import Ask
from smsbatch.manifest import Objective

Array = NDArray[np.float64]

SCHEDULE = Schedule(torch.tensor(oracles.alphas_cumprod(), dtype=torch.float32))
TIMESTEPS = [21, 133, 480]
SHAPES = [(4, 4, 4), (2, 4, 7), (2, 5, 3)]
WORDS = {"null": 0.0, "target": 1.0, "edit": 2.0, "source": -1.5}


def pretend(phase: float) -> oracles.Score:
    """A smooth function of everything a score may depend on, in float64."""

    def score(z_t: Array, t: int, words: str) -> Array:
        mixed = np.roll(z_t, 1, axis=-1) + 0.3 * z_t[::-1]
        return np.asarray(np.sin(mixed + phase + 0.01 * t) + WORDS[words] * np.cos(2 * z_t + phase))

    return score


STYLE, FAKE, REAL = pretend(0.1), pretend(0.7), pretend(1.9)


def layers(z_t: Tensor, t: int, words: str) -> list[Tensor]:
    """Artificial features [tokens, channels] of one sample: at half size, rounded up as in a UNet, and at full size."""
    mixing = torch.tensor(np.random.default_rng(7).normal(size=(5, len(z_t))), dtype=z_t.dtype)

    def layer(image: Tensor) -> Tensor:
        return ((mixing @ image.flatten(1)) + 0.2 * WORDS[words] + 0.001 * t).sin().T

    return [layer(z_t[:, ::2, ::2]), layer(z_t)]


class Pretended:
    """An implementation of `Scores` by such functions, with a record of the requests."""

    def __init__(self, style: oracles.Score = STYLE, fake: oracles.Score = FAKE, real: oracles.Score = REAL) -> None:
        self.models = {"style": style, "fake": fake, "real": real}
        self.asked: list[Ask] = []

    def __call__(self, t: Tensor, *asked: Ask) -> list[Tensor]:
        self.asked += asked
        return [self._answer(t, ask) for ask in asked]

    def features(self, model: str, z_t: Tensor, t: Tensor, words: str) -> list[Tensor]:
        self.asked.append(Ask(model, z_t, words))  # type: ignore[arg-type]
        rows = [layers(row, int(time), words) for row, time in zip(z_t, t, strict=True)]
        return [torch.stack(layer) for layer in zip(*rows, strict=True)]

    def _answer(self, t: Tensor, ask: Ask) -> Tensor:
        model = self.models[ask.model]
        rows = []
        for row, time in zip(ask.z_t.double().numpy(), t.tolist(), strict=True):
            rows.append(oracles.guided(model(row, time, "null"), model(row, time, ask.words), ask.guidance))
        return torch.tensor(np.stack(rows), dtype=torch.float32)


def arrays(shape: tuple[int, int, int], seed: int = 3) -> tuple[Array, Array, Array]:
    """Result, source and noise of three samples."""
    z, z_src, eps = np.random.default_rng(seed).normal(size=(3, 3, *shape)).astype(np.float32).astype(np.float64)
    return z, z_src, eps


def engine(config: Objective, z: Array, z_src: Array, eps: Array, scores: Any = None) -> tuple[Array, Array]:
    """Gradient times the number of entries, and loss, of the samples at `TIMESTEPS`."""
    z32, source, noise = (torch.tensor(x, dtype=torch.float32) for x in (z, z_src, eps))
    with torch.no_grad():
        gradient, loss = OBJECTIVES[config.name](config, SCHEDULE, source).gradient(
            z32, torch.tensor(TIMESTEPS), noise, scores or Pretended()
        )
    assert gradient.shape == z.shape
    assert loss.shape == (3,)
    return gradient.double().numpy() * z[0].size, loss.double().numpy()


def off(name: str, **fields: Any) -> Objective:
    """An objective without relevance map and identity term, unless `fields` sets them."""
    return Objective.model_validate({"name": name, "relevance": "off", "identity_weight": 0.0, "t_max": 500} | fields)


# -------------------------------------------------------------------------------------- the battery against the oracles


class Expected:
    """The oracle's values for one sample; each part is computed once."""

    def __init__(self, name: str, z: Array, z_src: Array, t: int, eps: Array) -> None:
        self.name, self.z, self.z_src, self.t, self.eps = name, z, z_src, t, eps
        self._known: dict[Any, Any] = {}

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def direction(self, g: float, g_fake: float, weight: str, contrastive: float = 3.0) -> Array:
        z, z_src, t, eps = self.z, self.z_src, self.t, self.eps
        if self.name in ("sms", "vsd"):
            return oracles.vsd_direction(z, t, eps, STYLE, FAKE, g, g_fake, weight)
        if self.name == "sds":
            return oracles.sds_direction(z, t, eps, STYLE, g, weight)
        if self.name == "pds":
            return oracles.pds_direction(z, z_src, t, eps, STYLE, g)
        dds = oracles.dds_direction(z, z_src, t, eps, STYLE, g, weight)
        return dds if self.name == "dds" else dds + contrastive * oracles.CDS_SCALE * self.once("pull", self._pull)

    def relevance(self, order: str, clip: float | None) -> Array:
        if order == "off":
            return np.ones(self.z.shape[1:])
        noised = oracles.add_noise(self.z_src, self.eps, self.t)
        maps = {"mean_abs": oracles.relevance_released, "abs_mean": oracles.relevance_paper}
        return maps[order](REAL(noised, self.t, "edit"), REAL(noised, self.t, "null"), clip)

    def identity(self, kind: str, norm: str, cutoff: str | float) -> tuple[Array, float]:
        """Gradient and loss, per entry."""
        z, z_src, t, fixed = self.z, self.z_src, self.t, None if cutoff == "progressive" else float(cutoff)
        if kind == "mse":
            return oracles.mse_gradient(z, z_src), oracles.mse_loss(z, z_src)
        if norm == "l1":
            slope = oracles.spectral_gradient_released(z, z_src, t, 500, fixed)
            return slope, oracles.spectral_loss_released(z, z_src, t, 500, fixed)
        slope = oracles.spectral_gradient_paper(z, z_src, t, 500, fixed)
        return slope / z.size, oracles.spectral_loss_paper(z, z_src, t, 500, fixed) / z.size

    def _pull(self) -> Array:
        h, w = self.z.shape[1:]
        sizes = [(-(-h // 2), -(-w // 2)), (h, w)]
        every = [[list(range(h * w)), list(range((h // 2) * (w // 2)))] for h, w in sizes]
        features = lambda z_t, t, words: [layer.numpy() for layer in layers(torch.from_numpy(z_t), t, words)]  # noqa: E731
        return oracles.contrastive_gradient(self.z, self.z_src, self.t, self.eps, features, sizes, every)


GUIDANCE = [(4.5, 4.5), (7.5, 1.0), (1.0, 1.0)]  # on both scores, on the style score only, none
WEIGHTS = ["posterior_variance", "one_minus_abar", "dmd", "one"]
RELEVANCE = [("off", None), ("mean_abs", None), ("abs_mean", None), ("mean_abs", 0.2), ("abs_mean", 1.5)]
IDENTITY = [
    (0.0, "spectral", "l1", "progressive"),
    (0.05, "spectral", "l1", "progressive"),
    (0.05, "spectral", "l2", "progressive"),
    (0.05, "spectral", "l2", 0.3),
    (0.05, "mse", "l1", "progressive"),
]


def battery() -> Iterator[tuple[dict[str, Any], tuple[Any, ...]]]:
    """Every seventh combination; they pair each guidance with each weight and each map with each identity term."""
    every = itertools.product(GUIDANCE, WEIGHTS, RELEVANCE, IDENTITY)
    for guidance, weight, relevance, identity in itertools.islice(every, 0, None, 7):
        fields = {
            "guidance": guidance[0],
            "fake_guidance": guidance[1],
            "weight": weight,
            "relevance": relevance[0],
            "relevance_clip": relevance[1],
            "identity_weight": identity[0],
            "identity": identity[1],
            "spectral_norm": identity[2],
            "spectral_cutoff": identity[3],
            "t_max": 500,
        }
        yield fields, (guidance, weight, relevance, identity)


@pytest.mark.parametrize("shape", SHAPES, ids=["square", "landscape", "portrait"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_and_loss(name: str, shape: tuple[int, int, int]) -> None:
    """The cases combine guidances, weights, relevance maps and identity terms."""
    z, z_src, eps = arrays(shape)
    samples = [Expected(name, z[i], z_src[i], t, eps[i]) for i, t in enumerate(TIMESTEPS)]
    for fields, (guidance, weight, relevance, identity) in battery():
        gradient, loss = engine(Objective.model_validate({"name": name} | fields), z, z_src, eps)
        for i, oracle in enumerate(samples):
            direction = oracle.once((guidance, weight), lambda: oracle.direction(*guidance, weight))  # noqa: B023
            r = oracle.once(relevance, lambda: oracle.relevance(*relevance))  # noqa: B023
            pull, distance = oracle.once(identity[1:], lambda: oracle.identity(*identity[1:]))  # noqa: B023
            expected = r * direction + identity[0] * pull * pull.size
            np.testing.assert_allclose(gradient[i], expected, atol=2e-4 * np.abs(expected).max(), err_msg=str(fields))
            value = ((r * direction) ** 2).mean() / 2 + identity[0] * distance
            np.testing.assert_allclose(loss[i], value, rtol=1e-3, err_msg=str(fields))


# --------------------------------------------------------------------------------------------- requests of an objective


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sms", {("style", "target", "z"), ("fake", "target", "z")}),
        ("vsd", {("style", "target", "z"), ("fake", "target", "z")}),
        ("sds", {("style", "target", "z")}),
        ("dds", {("style", "target", "z"), ("style", "source", "z_src")}),
        ("pds", {("style", "target", "z"), ("style", "source", "z_src")}),
        ("cds", {("style", "target", "z"), ("style", "source", "z_src")}),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_each_asks_for_what_its_formula_names(name: str, expected: set[tuple[str, str, str]], mapped: bool) -> None:
    z, z_src, eps = arrays((2, 4, 4))
    places = {
        key: np.stack([oracles.add_noise(x[i], eps[i], t) for i, t in enumerate(TIMESTEPS)])
        for key, x in (("z", z), ("z_src", z_src))
    }
    if mapped:
        expected = expected | {("real", "edit", "z_src"), ("real", "null", "z_src")}
    scores = Pretended()
    engine(off(name, relevance="mean_abs" if mapped else "off"), z, z_src, eps, scores)
    found = {
        (ask.model, ask.words, key)
        for ask in scores.asked
        for key, place in places.items()
        if np.allclose(ask.z_t.detach().numpy(), place, atol=1e-5)
    }
    assert found == expected
    assert len(scores.asked) == len(expected) + (2 if name == "cds" else 0), "features once at each place"


# ------------------------------------------------------------------------------------------- properties of the formulas


def test_sms_with_everything_off_is_vsd() -> None:
    z, z_src, eps = arrays((4, 5, 6))
    for weight, guidance in itertools.product(WEIGHTS, GUIDANCE):
        constants = {"weight": weight, "guidance": guidance[0], "fake_guidance": guidance[1]}
        sms, vsd = (engine(off(name, **constants), z, z_src, eps) for name in ("sms", "vsd"))
        np.testing.assert_array_equal(sms[0], vsd[0])
        np.testing.assert_array_equal(sms[1], vsd[1])
    assert not np.allclose(engine(off("sms", relevance="mean_abs"), z, z_src, eps)[0], sms[0])


def test_pds_is_weighted_dds_and_a_pull_to_the_source() -> None:
    z, z_src, eps = arrays((4, 5, 6))
    pds, dds = (engine(off(name, weight="one", guidance=5.0), z, z_src, eps)[0] for name in ("pds", "dds"))
    for i, t in enumerate(TIMESTEPS):
        psi, chi = oracles.pds_coefficients(t)
        np.testing.assert_allclose(pds[i], psi * (z[i] - z_src[i]) + chi * dds[i], atol=2e-3)


def test_a_style_that_is_the_fake_and_a_result_that_is_the_source_pull_nowhere() -> None:
    z, z_src, eps = arrays((2, 4, 4))
    assert not engine(off("sms"), z, z_src, eps, Pretended(style=FAKE))[0].any()

    def wordless(z_t: Array, t: int, words: str) -> Array:
        return STYLE(z_t, t, "null")

    for name in ("dds", "pds"):
        assert not engine(off(name), z_src, z_src, eps, Pretended(style=wordless))[0].any()
        assert engine(off(name), z_src, z_src, eps)[0].any(), "other words, another place"


@pytest.mark.parametrize("name", ["sms", "vsd", "sds", "dds"])
def test_the_weight_of_dmd_is_free_of_scale(name: str) -> None:
    """With models linear in z_t, scaling latents and noise by 3 leaves G unchanged; with weight "one" G scales by 3."""

    def linear(factor: float) -> oracles.Score:
        return lambda z_t, t, words: (factor + 0.2 * WORDS[words]) * np.roll(z_t, 1, axis=-1)

    def gradient(scale: float, weight: str) -> Array:
        z, z_src, eps = (scale * x for x in arrays((4, 5, 6)))
        return engine(off(name, weight=weight), z, z_src, eps, Pretended(linear(0.5), linear(0.3)))[0]

    np.testing.assert_allclose(gradient(3.0, "dmd"), gradient(1.0, "dmd"), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gradient(3.0, "one"), 3 * gradient(1.0, "one"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_sample_that_is_not_finite_stays_alone(name: str) -> None:
    z, z_src, eps = arrays((2, 4, 4))
    broken = z.copy()
    broken[1, 0, 2, 2] = np.nan
    fields = {"name": name, "weight": "dmd", "relevance": "abs_mean", "relevance_clip": 1.5, "identity_weight": 1e-3}
    config = Objective.model_validate(fields | {"t_max": 500})
    with_it, without = engine(config, broken, z_src, eps)[0], engine(config, z, z_src, eps)[0]
    assert np.isnan(with_it[1]).any()
    np.testing.assert_array_equal(with_it[[0, 2]], without[[0, 2]])


# ------------------------------------------------------------------------------- relevance map and contrastive term


@pytest.mark.parametrize(
    ("order", "oracle"), [("mean_abs", oracles.relevance_released), ("abs_mean", oracles.relevance_paper)]
)
@pytest.mark.parametrize("clip", [None, 0.0, 1.5])
def test_relevance_map(
    order: Literal["mean_abs", "abs_mean"], oracle: Callable[[Array, Array, float | None], Array], clip: float | None
) -> None:
    rng = np.random.default_rng(4)
    e_edit, e_null = rng.normal(size=(3, 4, 5, 7)), rng.normal(size=(3, 4, 5, 7))
    e_edit[1, :, 2, 3] = 40.0  # an outlier
    e_edit[2] = e_null[2] + 1.0  # a constant map
    ours = relevance_map(torch.tensor(e_edit - e_null, dtype=torch.float32), order, clip)
    assert ours.shape == (3, 1, 5, 7)
    for i in range(2):
        np.testing.assert_allclose(ours[i, 0].numpy(), oracle(e_edit[i], e_null[i], clip), atol=1e-5)
    exact = relevance_map(torch.ones(1, 4, 5, 7), order, clip)
    np.testing.assert_array_equal(exact.numpy(), np.ones((1, 1, 5, 7)))


@pytest.mark.parametrize("contrastive", [0.0, 1.0, 3.0])
def test_contrastive_weight(contrastive: float) -> None:
    z, z_src, eps = arrays((2, 4, 4))
    dds = engine(off("dds", weight="one", guidance=2.0), z, z_src, eps)[0]
    cds = engine(off("cds", weight="one", guidance=2.0, contrastive_weight=contrastive), z, z_src, eps)[0]
    for i, t in enumerate(TIMESTEPS):
        pull = Expected("cds", z[i], z_src[i], t, eps[i])._pull()
        expected = contrastive * oracles.CDS_SCALE * pull
        np.testing.assert_allclose(cds[i] - dds[i], expected, atol=1e-3 * max(np.abs(expected).max(), 1e-2))


def test_contrastive_term_of_drawn_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """With more positions than are sampled, as in a full-size latent, the oracle is given the sampled positions."""
    monkeypatch.setattr(objectives, "_PATCHES", 5)
    z, z_src, eps = arrays((2, 4, 6))
    dds, cds = (engine(off(name, weight="one", guidance=2.0), z, z_src, eps)[0] for name in ("dds", "cds"))
    noise = torch.tensor(eps, dtype=torch.float32)
    sizes, patches = [(2, 3), (4, 6)], [[6, 1], [24, 6]]
    for i, t in enumerate(TIMESTEPS):
        drawn = [
            [positions(noise, count, 2 * layer + size)[i].tolist() for size, count in zip((1, 2), counts, strict=True)]
            for layer, counts in enumerate(patches)
        ]
        assert [len(p) for layer in drawn for p in layer] == [5, 1, 5, 5]
        features = lambda z_t, t, words: [layer.numpy() for layer in layers(torch.from_numpy(z_t), t, words)]  # noqa: E731
        pull = oracles.contrastive_gradient(z[i], z_src[i], t, eps[i], features, sizes, drawn)
        expected = 3.0 * oracles.CDS_SCALE * pull
        np.testing.assert_allclose(cds[i] - dds[i], expected, atol=1e-3 * np.abs(expected).max())


@given(side=st.integers(4, 40), turn=st.integers(0, 30), seed=st.integers(0, 99))
def test_positions_are_different_ones_and_a_samples_own(side: int, turn: int, seed: int) -> None:
    eps = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(seed))
    drawn = positions(eps, side * side, turn)
    assert drawn.shape == (2, min(side * side, 256))
    for row in drawn.tolist():
        assert len(set(row)) == len(row)
        assert set(row) <= set(range(side * side))
    assert torch.equal(positions(eps[1:], side * side, turn), drawn[1:])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(positions(eps, side * side, turn + 1), drawn)


def test_positions_cover_the_latent_alike() -> None:
    """All positions are drawn equally often over random noises, by a chi-squared test."""
    counts = torch.zeros(1024)
    generator = torch.Generator().manual_seed(0)
    for turn in range(400):
        counts[positions(torch.randn(1, 4, 32, 32, generator=generator), 1024, turn % 18)] += 1
    expected = 400 * 256 / 1024
    assert float(((counts - expected) ** 2 / (expected * 0.75)).sum()) < 1024 + 4 * (2 * 1024) ** 0.5


# --------------------------------------------------------------------------------------------------------- cached maps


def test_cached_maps_are_those_of_the_nearest_timestep_of_the_grid() -> None:
    z, z_src, eps = arrays((4, 4, 6))
    config = off("sms", relevance="abs_mean", relevance_grid=4, guidance=1.0, fake_guidance=1.0)
    objective = OBJECTIVES["sms"](config, SCHEDULE, torch.tensor(z_src, dtype=torch.float32))
    drawn = [torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    remaining = iter(drawn)
    objective.cache_maps(Pretended(), lambda: next(remaining))
    assert next(remaining, None) is None, "one noise for every timestep of the grid"
    scores = Pretended()
    gradient, _ = objective.gradient(
        *(torch.tensor(z, dtype=torch.float32), torch.tensor(TIMESTEPS), torch.tensor(eps, dtype=torch.float32)), scores
    )
    assert {ask.model for ask in scores.asked} == {"style", "fake"}, "the map costs nothing any more"
    grid = [20 + 480 * (k + 1) / 5 for k in range(4)]  # 116, 212, 308, 404
    for i, t in enumerate(TIMESTEPS):
        nearest = min(range(4), key=lambda k: abs(grid[k] - t))
        at, noise = round(grid[nearest]), drawn[nearest][i].double().numpy()
        noised = oracles.add_noise(z_src[i], noise, at)
        r = oracles.relevance_paper(REAL(noised, at, "edit"), REAL(noised, at, "null"))
        direction = oracles.vsd_direction(z[i], t, eps[i], STYLE, FAKE, 1.0, 1.0, "posterior_variance")
        expected = r * direction
        np.testing.assert_allclose(gradient[i].numpy() * z[i].size, expected, atol=5e-4 * np.abs(expected).max())


def test_a_map_of_nothing_finite_is_not_finite() -> None:
    """A map of ones would hide the model's overflow; with a map of NaN the sample ends as `diverged`."""
    difference = torch.randn(2, 4, 5, 5)
    difference[1, 2, 3, 3] = float("nan")
    mapped = relevance_map(difference, "mean_abs")
    assert mapped[0].isfinite().all()
    assert mapped[1].isnan().all()


def test_a_layer_of_a_single_row_has_no_patches_of_two() -> None:
    features = torch.randn(2, 3, 6)
    assert _patches(features, torch.Size((2, 4, 2, 6)), 1).shape == (2, 3, 6)
    assert _patches(features, torch.Size((2, 4, 2, 6)), 2).shape == (2, 0, 6)
