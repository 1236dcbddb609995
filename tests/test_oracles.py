"""Tests of the oracles against published figures and against libraries that share no code with them.

The file exceeds 400 lines because it follows `oracles.py` section by section.
"""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from diffusers import DDIMScheduler
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

Array = NDArray[np.float64]


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture(scope="module")
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1
    )


# ---------------------------------------------------------------------------------------------------- noise schedule


def test_schedule_is_that_of_diffusers(scheduler: DDIMScheduler) -> None:
    np.testing.assert_allclose(oracles.betas(), scheduler.betas.numpy(), rtol=1e-5)
    np.testing.assert_allclose(oracles.alphas_cumprod(), scheduler.alphas_cumprod.numpy(), rtol=1e-4)


def test_noising_and_the_clean_estimate_are_inverse_and_agree_with_diffusers(scheduler: DDIMScheduler) -> None:
    z, eps = noise(4, 5, 7), noise(4, 5, 7, seed=1)
    z_t = oracles.add_noise(z, eps, 321)
    theirs = scheduler.add_noise(torch.from_numpy(z)[None], torch.from_numpy(eps)[None], torch.tensor([321]))[0]
    np.testing.assert_allclose(z_t, theirs.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(oracles.predicted_clean(z_t, eps, 321), z, atol=1e-12)


@pytest.mark.parametrize(("t", "w"), [(21, 8.6e-4), (101, 1.36e-3), (201, 2.03e-3), (301, 2.83e-3), (499, 4.79e-3)])
def test_released_weight_has_the_published_values(t: int, w: float) -> None:
    assert oracles.weight_released(t) == pytest.approx(w, rel=5e-3)


def test_released_weight_needs_a_timestep_two_before() -> None:
    with pytest.raises(ValueError, match="t = 1"):
        oracles.weight_released(1)


def test_dmd_weight_turns_a_noise_difference_into_a_normalised_clean_difference() -> None:
    z, eps, e_real, e_fake = (noise(4, 3, 5, seed=s) for s in range(4))
    z_t = oracles.add_noise(z, eps, 250)
    x_real, x_fake = oracles.predicted_clean(z_t, e_real, 250), oracles.predicted_clean(z_t, e_fake, 250)
    expected = (x_fake - x_real) / np.abs(z - x_real).mean()
    np.testing.assert_allclose(oracles.weight_dmd(250, z, z_t, e_real) * (e_real - e_fake), expected, rtol=1e-9)


@pytest.mark.parametrize("t", [21, 300, 980])
def test_noise_of_a_v_prediction_is_that_of_diffusers_velocity(scheduler: DDIMScheduler, t: int) -> None:
    z, eps = noise(4, 3, 5), noise(4, 3, 5, seed=1)
    v = scheduler.get_velocity(torch.from_numpy(z)[None], torch.from_numpy(eps)[None], torch.tensor([t]))[0].numpy()
    np.testing.assert_allclose(oracles.predicted_noise(v, oracles.add_noise(z, eps, t), t), eps, atol=1e-4)
    assert oracles.fake_loss_v(v, z, eps, t) == pytest.approx(0, abs=1e-10)
    e = noise(4, 3, 5, seed=2)
    abar = oracles.alphas_cumprod()[t]
    v_of_e = (e - np.sqrt(1 - abar) * oracles.add_noise(z, eps, t)) / np.sqrt(abar)
    assert oracles.fake_loss_v(v_of_e, z, eps, t) == pytest.approx(oracles.fake_loss_paper(e, eps) / abar)


def test_weights_by_name() -> None:
    z, z_t, e = (noise(4, 3, 5, seed=s) for s in range(3))
    assert oracles.weight_named("one", 300, z, z_t, e) == 1.0
    assert oracles.weight_named("one_minus_abar", 999, z, z_t, e) == pytest.approx(0.9953, abs=1e-4)
    assert oracles.weight_named("posterior_variance", 301, z, z_t, e) == oracles.weight_released(301)
    assert oracles.weight_named("dmd", 300, z, z_t, e) == oracles.weight_dmd(300, z, z_t, e)


# ------------------------------------------------------------------------------------------------- timestep sampling


def test_released_grid_is_what_diffusers_sets(scheduler: DDIMScheduler) -> None:
    scheduler.set_timesteps(500)
    ascending = list(reversed(scheduler.timesteps.tolist()))
    assert oracles.released_range(0, 500) == ascending[10:250]


def test_released_range_has_the_published_ends_mean_and_collapse() -> None:
    ranges = [oracles.released_range(i, 500) for i in range(500)]
    assert ranges[0][0] == 21
    assert ranges[0][-1] == 499
    assert [r == [21] for r in ranges] == [False] * 477 + [True] * 23
    assert np.mean([np.mean(r) for r in ranges]) == pytest.approx(135, abs=0.5)
    assert np.mean([np.mean(np.array(r) < 100) for r in ranges]) == pytest.approx(0.49, abs=0.005)


@pytest.mark.parametrize("n", [1, 7, 50, 100, 500])
def test_ranges_start_whole_narrow_and_are_never_empty(n: int) -> None:
    for whole, of in (
        (list(range(21, 500, 2)), oracles.released_range),
        (list(range(20, 501)), oracles.paper_range),
    ):
        lengths = [len(of(i, n)) for i in range(n)]
        assert of(0, n) == whole
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[-1] >= 1
        assert all(of(i, n)[0] == whole[0] for i in range(n))


def test_ranges_are_exact_where_floats_are_not() -> None:
    assert int(500 * (0.5 * (1 - 32 / 100))) == 169  # exactly 170, but floats truncate to 169
    assert oracles.released_range(32, 100)[-1] == 1 + 2 * 169
    assert oracles.paper_range(1, 10, 20, 500)[-1] == 450
    assert oracles.paper_range(490, 500, 20, 500) == [20]
    assert oracles.paper_range(480, 500, 20, 500) == [20]
    assert oracles.paper_range(479, 500, 20, 500) == [20, 21]


@pytest.mark.parametrize(("t_min", "t_max", "grid", "ends"), [(20, 500, 2, (499, 21)), (50, 948, 1, (948, 50))])
def test_linear_timesteps_fall_from_end_to_end(t_min: int, t_max: int, grid: int, ends: tuple[int, int]) -> None:
    whole = oracles.whole_range(t_min, t_max, grid)
    assert (whole[-1], whole[0]) == ends
    fall = [oracles.linear_timestep(i, 40, t_min, t_max, grid) for i in range(41)]
    assert (fall[0], fall[40]) == ends
    steps = np.diff(fall)
    assert set(fall) <= set(whole)
    assert steps.max() - steps.min() <= grid
    assert oracles.whole_range(20, 500, 2) == oracles.released_range(0, 500)


# ---------------------------------------------------------------------------------------------------- style gradient


def test_guidance_one_is_the_condition_and_zero_the_null() -> None:
    null, cond = noise(2, 3, 3), noise(2, 3, 3, seed=1)
    np.testing.assert_allclose(oracles.guided(null, cond, 1.0), cond)
    np.testing.assert_allclose(oracles.guided(null, cond, 0.0), null)
    np.testing.assert_allclose(oracles.guided(np.zeros(1), np.ones(1), 4.5), [4.5])


def test_a_style_equal_to_the_fake_pulls_nowhere() -> None:
    e = noise(4, 3, 3)
    assert not oracles.style_gradient(0.3, e, e).any()
    np.testing.assert_allclose(oracles.style_gradient(2.0, np.ones(3), np.zeros(3)), 2.0)


def test_relevance_maps_differ_just_where_channels_cancel() -> None:
    null = np.zeros((2, 1, 3))
    edit = np.array([[[1.0, 2.0, 0.0]], [[-1.0, 2.0, 0.0]]])
    np.testing.assert_allclose(oracles.relevance_paper(edit, null), [[0.5, 1.0, 0.0]])
    np.testing.assert_allclose(oracles.relevance_released(edit, null), [[0.0, 1.0, 0.0]])


@pytest.mark.parametrize("relevance", [oracles.relevance_paper, oracles.relevance_released])
def test_relevance_spans_zero_to_one_ignores_scale_and_a_constant_map_is_ones(relevance) -> None:  # type: ignore[no-untyped-def]
    edit, null = noise(4, 6, 9), noise(4, 6, 9, seed=1)
    r = relevance(edit, null)
    assert (r.shape, r.min(), r.max()) == ((6, 9), 0.0, 1.0)
    np.testing.assert_allclose(relevance(null + 7 * (edit - null), null), r)
    np.testing.assert_array_equal(relevance(null, null), np.ones((6, 9)))


@pytest.mark.parametrize("relevance", [oracles.relevance_paper, oracles.relevance_released])
def test_clipping_levels_what_is_far_above_the_quartiles(relevance) -> None:  # type: ignore[no-untyped-def]
    edit = np.array([[[0.0, 1.0, 2.0, 3.0, 100.0]]])  # quartiles 1 and 3: clipped at 3 + 2 k
    null = np.zeros_like(edit)
    np.testing.assert_allclose(relevance(edit, null, 1.5), [[0, 1 / 6, 2 / 6, 3 / 6, 1]])
    np.testing.assert_allclose(relevance(edit, null, 0.0), [[0, 1 / 3, 2 / 3, 1, 1]])
    np.testing.assert_allclose(relevance(edit, null, 1e9), relevance(edit, null))


# ---------------------------------------------------------------------------------------------------------- spectrum


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 5, 9), (2, 12, 3), (1, 1, 6)])
def test_dct_is_scipys_orthonormal_one(shape: tuple[int, ...]) -> None:
    x = noise(*shape)
    np.testing.assert_allclose(oracles.dct2(x), dctn(x, axes=(1, 2), norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(oracles.idct2(x), idctn(x, axes=(1, 2), norm="ortho"), atol=1e-12)


@pytest.mark.parametrize(
    ("t", "kept"), [(21, 0.005), (101, 0.086), (201, 0.32), (301, 0.68), (401, 0.92), (499, 0.9998)]
)
def test_mask_keeps_the_published_share_of_a_64_by_64_latent(t: int, kept: float) -> None:
    assert oracles.low_pass_mask(64, 64, t).mean() == pytest.approx(kept, abs=0.006 if kept < 0.99 else 1e-4)


def test_mask_of_a_non_square_latent_counts_both_sides() -> None:
    mask = oracles.low_pass_mask(3, 5, 250)  # int(250/500 * 6) = 3
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    assert oracles.low_pass_mask(3, 5, 500).all()
    assert oracles.low_pass_mask(3, 5, 0).sum() == 1


def test_a_fixed_cut_off_is_read_as_decimals() -> None:
    assert int(0.29 * 100) == 28  # exactly 29, but floats truncate to 28
    assert oracles.low_pass_mask(1, 101, 0, cutoff=0.29).sum() == 30
    for t in (0, 499):  # 0.3 of 8 + 5 - 2 is 3.3
        np.testing.assert_array_equal(oracles.low_pass_mask(8, 5, t, cutoff=0.3), np.add.outer(range(8), range(5)) <= 3)
    assert oracles.low_pass_mask(8, 5, 0, cutoff=1.0).all()


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 3, 6)])
@pytest.mark.parametrize(("t", "cutoff"), [(21, None), (150, None), (499, None), (21, 0.3)])
@pytest.mark.parametrize("preset", ["released", "paper"])
def test_spectral_gradients_are_the_slopes_of_their_losses(
    shape: tuple[int, ...], t: int, cutoff: float | None, preset: str
) -> None:
    z, z_src = noise(*shape), noise(*shape, seed=1)
    loss = getattr(oracles, f"spectral_loss_{preset}")
    slope = oracles.finite_difference(lambda x: loss(x, z_src, t, 500, cutoff), z)
    closed = getattr(oracles, f"spectral_gradient_{preset}")(z, z_src, t, 500, cutoff)
    np.testing.assert_allclose(closed, slope, atol=1e-7)
    assert np.abs(closed).max() > 0


def test_mse_gradient_is_the_slope_and_the_unmasked_spectrum_again() -> None:
    z, z_src = noise(2, 3, 6), noise(2, 3, 6, seed=1)
    slope = oracles.finite_difference(lambda x: oracles.mse_loss(x, z_src), z)
    np.testing.assert_allclose(oracles.mse_gradient(z, z_src), slope, atol=1e-8)
    assert oracles.mse_loss(z, z_src) == pytest.approx(oracles.spectral_loss_paper(z, z_src, 500) / z.size)


def test_spectral_losses_of_an_unmasked_spectrum_are_plain_norms() -> None:
    z, z_src = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    assert oracles.spectral_loss_paper(z, z_src, 500) == pytest.approx(((z - z_src) ** 2).sum())  # Parseval
    difference = dctn(z - z_src, axes=(1, 2), norm="ortho")
    assert oracles.spectral_loss_released(z, z_src, 500) == pytest.approx(np.abs(difference).mean())
    assert oracles.spectral_loss_released(z, z_src, 21) < oracles.spectral_loss_released(z, z_src, 500)


# --------------------------------------------------------------------------------------------------- fake score, AdamW


@pytest.mark.parametrize(("t", "weight"), [(21, 0.96), (499, 0.077)])
def test_released_fake_loss_is_the_papers_times_the_published_weight(t: int, weight: float) -> None:
    e, eps = noise(4, 3, 3), noise(4, 3, 3, seed=1)
    ratio = oracles.fake_loss_released(e, eps, t) / oracles.fake_loss_paper(e, eps)
    assert ratio == pytest.approx(weight, rel=5e-3)


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_is_torchs(weight_decay: float) -> None:
    x, state = noise(3, 4), oracles.adam_start(np.zeros((3, 4)))
    parameter = torch.nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=weight_decay)
    for step in range(6):
        lr, gradient = 0.02 * (step + 1), noise(3, 4, seed=step) * 1e-7  # near epsilon, so its position matters
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        x, state = oracles.adamw_step(x, gradient, state, lr, weight_decay=weight_decay)
        np.testing.assert_allclose(x, parameter.detach().numpy(), rtol=1e-10)


def test_learning_rate_has_the_published_ends_and_weight_decay_shrinks_by_the_published_factor() -> None:
    lrs = [oracles.learning_rate(i) for i in range(500)]
    assert lrs[0] == 0.0
    assert lrs[100] == max(lrs) == pytest.approx(0.1)
    assert lrs[499] == pytest.approx(0.0325, abs=5e-5)
    assert np.prod([1 - 0.01 * lr for lr in lrs]) == pytest.approx(0.707, abs=2e-3)


def test_learning_rate_is_diffusers_warm_up_and_cosine() -> None:
    from diffusers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, 750)
    for i in range(500):
        assert oracles.learning_rate(i) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_learning_rate_of_a_shorter_run_is_the_same_curve() -> None:
    assert [oracles.learning_rate(i, 100) for i in range(100)] == [oracles.learning_rate(5 * i) for i in range(100)]


# -------------------------------------------------------------------------------------------------------------- LoRA


def test_linear_lora_is_a_matrix_product() -> None:
    down, up = noise(4, 6), noise(5, 4, seed=1)
    np.testing.assert_allclose(oracles.lora_delta(down, up, alpha=2.0, scale=0.8), 0.8 * 0.5 * up @ down)
    np.testing.assert_allclose(oracles.lora_delta(down, up), up @ down)
    np.testing.assert_allclose(oracles.lora_delta(down, up, alpha=0.0), up @ down)


@pytest.mark.parametrize("k", [1, 3])
def test_convolution_lora_acts_as_its_two_convolutions_in_a_row(k: int) -> None:
    down, up, x = noise(4, 6, k, k), noise(5, 4, 1, 1, seed=1), torch.from_numpy(noise(1, 6, 7, 8, seed=2))
    whole = torch.nn.functional.conv2d(x, torch.from_numpy(oracles.lora_delta(down, up, alpha=8.0)), padding=k // 2)
    middle = torch.nn.functional.conv2d(x, torch.from_numpy(down), padding=k // 2)
    np.testing.assert_allclose(whole, 2.0 * torch.nn.functional.conv2d(middle, torch.from_numpy(up)), atol=1e-10)


# -------------------------------------------------------------------------------------------------------- directions


def scores(seed: int) -> oracles.Score:
    """An artificial score function that depends on all of its arguments."""
    shift = {"target": 0.3, "source": -0.4, "null": -0.1, "edit": 0.7}
    pattern = noise(2, 4, 6, seed=seed)
    return lambda z_t, t, text: np.sin(z_t + shift[text] * pattern) + t / 1000 * pattern


PDS_PUBLISHED = [
    (21, 1.61, 0.232),
    (101, 0.314, 0.116),
    (201, 0.140, 0.092),
    (301, 0.079, 0.084),
    (499, 0.032, 0.082),
    (801, 0.010, 0.096),
]


@pytest.mark.parametrize(("t", "psi", "chi"), PDS_PUBLISHED)
def test_pds_has_the_published_coefficients(t: int, psi: float, chi: float) -> None:
    assert oracles.pds_coefficients(t) == (
        pytest.approx(psi, rel=4e-3, abs=6e-4),
        pytest.approx(chi, abs=6e-4),
    )


@pytest.mark.parametrize("t", [2, 21, 201, 499, 979])
def test_pds_of_a_posterior_that_agrees_with_itself_is_weighted_dds(t: int) -> None:
    psi, chi = oracles.pds_coefficients(t, consistent=True)
    assert psi == pytest.approx(0, abs=1e-10)
    z, z_src, eps, eps_before = (noise(2, 4, 6, seed=s) for s in range(4))
    long = oracles.pds_direction_long(z, z_src, t, eps, eps_before, scores(4), 3.0, consistent=True)
    np.testing.assert_allclose(
        long, chi * oracles.dds_direction(z, z_src, t, eps, scores(4), 3.0, "one"), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("t", [21, 201, 979])
@pytest.mark.parametrize("g", [1.0, 100.0])
def test_pds_in_closed_form_is_pds_by_its_definition(t: int, g: float) -> None:
    z, z_src, eps, eps_before = (noise(2, 4, 6, seed=s) for s in range(4))
    closed = oracles.pds_direction(z, z_src, t, eps, scores(4), g)
    np.testing.assert_allclose(
        oracles.pds_direction_long(z, z_src, t, eps, eps_before, scores(4), g), closed, rtol=1e-8, atol=1e-9
    )


def test_dds_and_pds_of_the_source_itself_under_its_own_words_are_zero() -> None:
    z, eps = noise(2, 4, 6), noise(2, 4, 6, seed=1)

    def same(z_t: Array, t: int, text: str) -> Array:
        return scores(4)(z_t, t, "null" if text == "null" else "target")

    assert not oracles.dds_direction(z, z, 201, eps, same, 7.5, "one_minus_abar").any()
    assert not oracles.pds_direction(z, z, 201, eps, same, 7.5).any()
    assert oracles.dds_direction(z, z, 201, eps, scores(4), 7.5, "one").any()


def test_sds_is_vsd_of_a_fake_score_that_knows_the_noise() -> None:
    z, eps = noise(2, 4, 6), noise(2, 4, 6, seed=1)
    for weight in ("one", "one_minus_abar", "posterior_variance", "dmd"):
        vsd = oracles.vsd_direction(z, 301, eps, scores(4), lambda *_: eps, 7.5, 1.0, weight)
        np.testing.assert_allclose(oracles.sds_direction(z, 301, eps, scores(4), 7.5, weight), vsd)


# ------------------------------------------------------------------------------------------- contrastive term of CDS


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (2, 6)])
@pytest.mark.parametrize("patch", [1, 2])
def test_patch_nce_is_cross_entropy_of_pooled_unit_features(size: tuple[int, int], patch: int) -> None:
    source, result = noise(size[0] * size[1], 7), noise(size[0] * size[1], 7, seed=1)
    count = (size[0] // patch) * (size[1] // patch)
    positions = np.random.default_rng(2).permutation(count)[: max(1, count - 1)].tolist()

    def units(tokens: Array) -> torch.Tensor:
        image = torch.from_numpy(tokens).T.reshape(1, 7, *size)
        pooled = torch.nn.functional.avg_pool2d(image, patch)
        return torch.nn.functional.normalize(pooled, dim=1).flatten(2)[0].T[positions]

    logits = units(source) @ units(result).T / 0.07
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(len(positions)))
    assert oracles.patch_nce(source, result, size, patch, positions) == pytest.approx(expected.item())


def test_patch_nce_of_equal_features_is_small_and_of_one_position_zero() -> None:
    source, result = noise(16, 7), noise(16, 7, seed=1)
    every = list(range(16))
    same = oracles.patch_nce(source, source, (4, 4), 1, every)
    assert 0 < same < 0.1 * oracles.patch_nce(source, result, (4, 4), 1, every)
    assert oracles.patch_nce(source, result, (4, 4), 1, [3]) == pytest.approx(0)


def test_contrastive_gradient_is_torchs_through_the_noising() -> None:
    z, z_src, eps = (noise(2, 4, 6, seed=s) for s in range(3))
    mixing = torch.from_numpy(noise(5, 2, seed=3))

    def layers(z_t: torch.Tensor) -> list[torch.Tensor]:
        return [(mixing @ z_t.flatten(1)).sin().T, (mixing @ z_t[:, ::2, ::2].flatten(1)).T]

    def features(z_t: Array, t: int, text: str) -> list[Array]:
        return [layer.numpy() for layer in layers(torch.from_numpy(z_t) + (text == "source"))]

    sizes, every = [(4, 6), (2, 3)], [[list(range(24)), list(range(6))], [list(range(6)), [0]]]
    found = oracles.contrastive_gradient(z, z_src, 301, eps, features, sizes, every)
    x, abar = torch.from_numpy(z).requires_grad_(), oracles.alphas_cumprod()[301]
    loss = torch.zeros(())
    for r, g, (h, w) in zip(
        features(oracles.add_noise(z_src, eps, 301), 301, "source"),
        layers(abar**0.5 * x + (1 - abar) ** 0.5 * torch.from_numpy(eps)),
        sizes,
        strict=True,
    ):
        for patch in (1, 2):
            unit = [
                torch.nn.functional.normalize(
                    torch.nn.functional.avg_pool2d(f.T.reshape(1, -1, h, w), patch), dim=1
                ).flatten(2)[0].T
                for f in (torch.from_numpy(r), g)
            ]  # fmt: skip
            loss = loss + torch.nn.functional.cross_entropy(unit[0] @ unit[1].T / 0.07, torch.arange(len(unit[0])))
    (expected,) = torch.autograd.grad(loss, x)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


# ----------------------------------------------------------------------------------------------------- one iteration


@pytest.mark.parametrize("preset", ["released", "paper"])
def test_iteration_is_the_slope_of_the_stop_gradient_loss(preset: oracles.Preset) -> None:
    z, z_src, eps = (noise(2, 4, 6, seed=s) for s in range(3))
    arguments = (preset, z, z_src, 201, eps, scores(3), scores(4), scores(5))
    guidance = 4.5 if preset == "released" else 1.0
    found = oracles.sms_iteration(*arguments, lam=0.05, guidance=guidance)
    target = z - found.relevance * found.style  # constant, as under the stop-gradient
    reduce = np.mean if preset == "released" else np.sum
    spectral = getattr(oracles, f"spectral_loss_{preset}")

    def loss(x: Array) -> float:
        return float(0.5 * reduce((x - target) ** 2) + 0.05 * spectral(x, z_src, 201))

    np.testing.assert_allclose(found.gradient, oracles.finite_difference(loss, z), atol=1e-6)


def test_iteration_asks_each_model_at_the_right_place() -> None:
    z, z_src, eps = (noise(2, 4, 6, seed=s) for s in range(3))
    asked: dict[str, list[tuple[str, Array]]] = {"style": [], "fake": [], "real": []}

    def spy(name: str) -> oracles.Score:
        def score(z_t: Array, t: int, text: str) -> Array:
            assert t == 101
            asked[name].append((text, z_t))
            return scores(3)(z_t, t, text)

        return score

    found = oracles.sms_iteration("released", z, z_src, 101, eps, spy("style"), spy("fake"), spy("real"), 0.0, 4.5)
    assert not found.gradient.any()  # style and fake agree, and lambda is 0
    for name, base, texts in (("style", z, "target null"), ("fake", z, "target null"), ("real", z_src, "edit null")):
        assert sorted(text for text, _ in asked[name]) == sorted(texts.split())
        for _, z_t in asked[name]:
            np.testing.assert_allclose(z_t, oracles.add_noise(base, eps, 101))


# --------------------------------------------------------------------------------------------------------- generator


def random_layers(width: int, blocks: int) -> list[oracles.Layer]:
    rng = torch.Generator().manual_seed(0)
    k = width
    shapes = [(k, 3, 7), (2 * k, k, 3), (4 * k, 2 * k, 3), *[(4 * k, 4 * k, 3)] * (2 * blocks)]
    shapes += [(2 * k, 4 * k, 3), (k, 2 * k, 3), (3, k, 7)]
    return [
        (
            torch.randn(out, inputs, size, size, generator=rng, dtype=torch.float64) / inputs**0.5 / size,
            torch.randn(out, generator=rng, dtype=torch.float64) * 0.1,
        )
        for out, inputs, size in shapes
    ]


def test_generator_has_the_published_number_of_parameters() -> None:
    assert oracles.generator_parameters(64, 9) == 11_378_179
    assert oracles.generator_parameters(64, 6) == 7_837_699
    layers = random_layers(4, 2)
    assert oracles.generator_parameters(4, 2) == sum(weight.numel() + bias.numel() for weight, bias in layers)


def test_generator_of_modules_of_torch() -> None:
    """The reference samples as CUT does: a strided convolution down, a transposed convolution up."""
    layers, image = random_layers(4, 2), torch.rand(1, 3, 24, 32, dtype=torch.float64)
    norm, reflect = torch.nn.functional.instance_norm, torch.nn.functional.pad

    def convolved(x: torch.Tensor, layer: oracles.Layer) -> torch.Tensor:
        half = layer[0].shape[-1] // 2
        return torch.nn.functional.conv2d(reflect(x, (half,) * 4, mode="reflect"), *layer)

    def kernel(row: list[float], channels: int) -> torch.Tensor:
        line = torch.tensor(row, dtype=torch.float64)
        return (torch.outer(line, line) / line.sum() ** 2).expand(channels, 1, -1, -1)

    x = norm(convolved(2 * image - 1, layers[0])).relu()
    for layer in layers[1:3]:
        x = norm(convolved(x, layer)).relu()
        x = torch.nn.functional.conv2d(
            reflect(x, (1,) * 4, mode="reflect"), kernel([1, 2, 1], x.shape[1]), stride=2, groups=x.shape[1]
        )
    for first, second in zip(layers[3:-3:2], layers[4:-3:2], strict=True):
        x = x + norm(convolved(norm(convolved(x, first)).relu(), second))
    for layer in layers[-3:-1]:
        x = torch.nn.functional.conv_transpose2d(
            reflect(x, (1,) * 4, mode="replicate"),
            4 * kernel([1, 3, 3, 1], x.shape[1]),
            stride=2,
            padding=2,
            groups=x.shape[1],
        )[..., 1:-1, 1:-1]
        x = norm(convolved(x, layer)).relu()
    expected = (convolved(x, layers[-1]).tanh() + 1) / 2
    np.testing.assert_allclose(oracles.generator(layers, image[0]).numpy(), expected[0].numpy(), atol=1e-10)


def test_generator_of_odd_sides_is_that_of_the_reflected_picture() -> None:
    layers, image = random_layers(4, 1), torch.rand(3, 21, 30, dtype=torch.float64)
    padded = torch.nn.functional.pad(image[None], (0, 2, 0, 3), mode="reflect")[0]
    torch.testing.assert_close(oracles.generator(layers, image), oracles.generator(layers, padded)[:, :21, :30])


# ------------------------------------------------------------------------------------------------------ distillation


def test_generator_gradient_is_the_slope_of_its_surrogate() -> None:
    """The slope is by finite differences of the surrogate, written out for two images with two draws each."""
    theta, x, encoder = noise(3, 3), noise(2, 3, seed=1), noise(4, 3, seed=2)
    draws = [[(100, noise(4, 1, 1, seed=3)), (200, noise(4, 1, 1, seed=4))] for _ in x]

    def latent(theta: Array, number: int) -> Array:
        return np.tanh(encoder @ np.sin(theta @ x[number])).reshape(4, 1, 1)

    def gradient(number: int, z: Array, t: int, eps: Array) -> Array:
        return np.asarray((number + 1) * z**2 + t / 100 * eps)

    held = [[gradient(n, latent(theta, n), t, eps) for t, eps in of_image] for n, of_image in enumerate(draws)]

    def surrogate(theta: Array) -> float:
        return float(sum((g * latent(theta, n)).sum() for n, of_image in enumerate(held) for g in of_image) / 4)

    parameter = torch.from_numpy(theta.copy()).requires_grad_()
    calls = []

    def of_image(number: int) -> torch.Tensor:
        calls.append(number)
        inside = (parameter @ torch.from_numpy(x[number])).sin()
        return (torch.from_numpy(encoder) @ inside).tanh().view(4, 1, 1)

    (found,) = oracles.generator_gradient([parameter], [lambda: of_image(0), lambda: of_image(1)], draws, gradient)
    np.testing.assert_allclose(found.numpy(), oracles.finite_difference(surrogate, theta), atol=1e-8)
    assert calls == [0, 0, 1, 1]


def test_shared_lora_gradient_is_the_slope_of_its_loss() -> None:
    down, up = {"layer": noise(2, 5)}, {"layer": noise(3, 2, seed=1)}
    weight, inputs, targets = noise(3, 5, seed=2), noise(4, 5, seed=3), noise(4, 3, seed=4)
    rows = [(torch.from_numpy(target).float(), 1.0 + number) for number, target in enumerate(targets)]

    def predict(number: int, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
        return (torch.from_numpy(weight).float() + deltas["layer"]) @ torch.from_numpy(inputs[number]).float()

    def loss(down: Array, up: Array) -> float:
        errors = inputs @ (weight + 0.5 * up @ down).T - targets
        return float(np.mean([((1 + n) * error) ** 2 for n, error in enumerate(errors)]))

    value, of_down, of_up = oracles.shared_lora_gradient(predict, rows, down, up, 0.5)
    assert value == pytest.approx(loss(down["layer"], up["layer"]), rel=1e-5)
    slope_down = oracles.finite_difference(lambda d: loss(d, up["layer"]), down["layer"])
    slope_up = oracles.finite_difference(lambda u: loss(down["layer"], u), up["layer"])
    np.testing.assert_allclose(of_down["layer"], slope_down, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(of_up["layer"], slope_up, rtol=1e-4, atol=1e-4)


def test_running_average_is_torchs() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    layer = torch.nn.Linear(3, 2, bias=False).double()
    theirs = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(layer)  # the first update copies the weights
    average = layer.weight.detach().numpy().copy()
    for seed in range(4):
        layer.weight.data = torch.from_numpy(noise(2, 3, seed=seed))
        theirs.update_parameters(layer)
        average = oracles.running_average(average, noise(2, 3, seed=seed), 0.9)
    np.testing.assert_allclose(average, theirs.module.weight.detach().numpy(), rtol=1e-12)


def test_decaying_rate_is_flat_and_then_a_line_to_zero() -> None:
    rates = [oracles.decaying_rate(step, 10, 2.0, 0.5) for step in range(11)]
    np.testing.assert_allclose(rates, [2, 2, 2, 2, 2, 2, 1.6, 1.2, 0.8, 0.4, 0])
    assert [oracles.decaying_rate(step, 4, 1.0, 0.0) for step in range(4)] == [1.0] * 4
    assert [oracles.decaying_rate(step, 4, 1.0, 1.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
