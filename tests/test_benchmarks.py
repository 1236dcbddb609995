"""Tests of the benchmarks: compared loops compute the same, and rows and FLOPs are those that are stated."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OPTIONS = argparse.Namespace(
    device="cpu", model="tiny", side=64, precision="fp32", channels_last=False, compile=False, threads=1
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module benchmarks/engine.py, with its folder on the import path as in a run of the script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import engine

    return engine


@pytest.fixture
def common(engine: ModuleType) -> ModuleType:
    return sys.modules["common"]


def rows_of_calls(*unets: nn.Module) -> list[int]:
    """A list that receives the number of rows of every later call of the networks."""
    rows: list[int] = []
    for unet in unets:
        unet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


def test_both_loops_compute_the_same_gradients(engine: ModuleType, common: ModuleType) -> None:
    apart = engine.difference(common.parts("tiny", "cpu"), OPTIONS, steps=3)
    assert len(apart) == 3
    assert max(apart) < engine.TOLERANCE


def test_the_plain_loop_computes_eight_forwards_and_ours_seven(engine: ModuleType, common: ModuleType) -> None:
    model = common.parts("tiny", "cpu")
    plain, priors = engine.Plain(OPTIONS, model), common.engine(OPTIONS, model)
    theirs = rows_of_calls(plain.plain.style, plain.plain.fake)
    ours = rows_of_calls(*(prior._unet for prior in priors))
    plain.loop(1)
    engine.Engine(OPTIONS, 2, priors).loop(1)
    assert theirs == [2, 2, 2, 2]
    assert sorted(ours) == [2, 4, 8], "two samples: training; style; fake and real"


def test_counted_flops_are_those_of_an_iteration(engine: ModuleType, common: ModuleType) -> None:
    plain = engine.Plain(OPTIONS)
    assert common.flops(lambda: plain.loop(1)) == pytest.approx(engine.count(OPTIONS)[0], rel=1e-3)


def test_sd15_is_sd15(common: ModuleType) -> None:
    model = common.parts("sd15", "meta")
    assert model.unet.num_parameters() == 859_520_964
    assert sum(p.numel() for p in model.vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in model.text_encoder.parameters()) == 123_060_480
    inputs = [torch.empty(shape, device="meta") for shape in ((1, 4, 64, 64), (1,), (1, 77, 768))]
    assert common.flops(lambda: model.unet(*inputs)) == pytest.approx(0.803e12, rel=2e-3)


def test_distilling_naively_differs_in_rows_and_calls_alone(engine: ModuleType, common: ModuleType) -> None:
    """With four repeats the naive step has 4 times the rows in generator and VAE, and one more call for the scores."""
    import distill

    options = argparse.Namespace(**vars(OPTIONS), width=4, blocks=1)
    priors = common.engine(options)
    found = {}
    for naive in (True, False):
        step = distill.Step(options, priors, 4, naive)
        parts = (step.distiller.generator, priors[0]._vae.encoder, priors[1]._unet, priors[0]._unet)
        calls = [rows_of_calls(part) for part in parts]
        losses = step()
        found[naive] = [list(rows) for rows in calls]
        assert set(losses) == {"objective", "fake"}
    assert found[True] == [[4], [4, 4], [8], [8, 8, 4]]
    assert found[False] == [[1], [1, 1], [8], [16, 4]]
    for part, ours, theirs in zip(
        distill.parts(options, priors, 4), (1, 1, 1, 8, 16, 4), (4, 4, 4, 8, 16, 4), strict=True
    ):
        assert (sum(part.ours), sum(part.naive)) == (ours, theirs)


def test_counted_flops_are_those_of_a_training_step(engine: ModuleType, common: ModuleType) -> None:
    import distill

    options = argparse.Namespace(**vars(OPTIONS), width=8, blocks=1)
    counted = distill.counted(options, 2)
    priors = common.engine(options)
    for naive in (False, True):
        step = distill.Step(options, priors, 2, naive)
        step()  # embeds the texts and creates the optimizers
        texts = common.flops(lambda: priors[0].embed([common.PROMPTS.target]))
        made = common.flops(step)
        expected = sum(of_one[1 + naive] for of_one in counted)
        assert made == pytest.approx(expected + 5 * texts, rel=0.02), "two prompts and the empty one, of two encoders"


def test_a_run_is_held_against_its_parts(engine: ModuleType) -> None:
    import stylize  # in the folder of engine.py

    options = argparse.Namespace(
        **vars(OPTIONS) | {"width": 8, "blocks": 1, "images": 6, "batch": 2, "rounds": 1, "side": 32}
    )
    threads, *rates, ratio, idle_fraction, measured = stylize.measure(options, 1)
    assert threads == "1"
    assert len(rates) == 4
    assert all(float(value) > 0 for value in (*rates, ratio, measured))
    assert 0 <= float(idle_fraction.removesuffix(" %")) <= 100
