"""Golden traces: stored losses of a few iterations of every objective, on a model of random weights.

The oracles show that a step is correct; the traces show that the step and its constants, draws, optimizers and order of
updates have not changed. A line of a trace is `step loss fake_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from numpy.typing import NDArray
from support.goldens import FOLDER
from torch import Tensor

from smsbatch.diffusion.lora import read_style
from smsbatch.diffusion.optimize import optimize
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.diffusion.timesteps import allowed, draw
from smsbatch.manifest import Model, Objective, Style

STEPS = 8
WORDS = "oil paint"
TOLERANCE = 5e-4  # a change of the source by 1e-5, more than another CPU's rounding, changes no loss by more than 6e-5
TRACES: dict[str, dict[str, Any]] = {
    "sms": {},
    "sms-paper": {"preset": "paper"},
    "sms-fast": {"preset": "fast"},
    "vsd": {"name": "vsd"},
    "sds": {"name": "sds"},
    "dds": {"name": "dds"},
    "pds": {"name": "pds"},
    "cds": {"name": "cds"},
    "dds-bare": {"name": "dds"},  # without the style LoRA
}
"""The file in tests/golden, and the fields of the objective."""

Trace = Callable[..., str]


@pytest.fixture(scope="module")
def prior(model: Path) -> Prior:
    return Prior.load(Model(path=str(model)))


@pytest.fixture(scope="module")
def style(prior: Prior, lora: Path) -> Prior:
    deltas = read_style(Style(lora=(str(lora),), prompt=WORDS), prior)
    return prior.with_deltas(deltas.unet, deltas.text)


def source() -> Tensor:
    return torch.randn(1, 4, 8, 6, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def trace(prior: Prior, style: Prior) -> Trace:
    """The function `trace(name, changed={})`, which returns the lines of one run."""

    def run(name: str, changed: Mapping[str, Any] = MappingProxyType({})) -> str:
        config = Objective.model_validate(TRACES[name] | dict(changed) | {"steps": STEPS})
        lines: list[str] = []
        optimize(
            prior,
            prior if name.endswith("-bare") else style,
            source(),
            [config.prompts(WORDS, "a red fox")],
            [5],
            config,
            trace=lambda step, loss, fake_loss: lines.append(f"{step} {loss.item():.6e} {fake_loss.item():.6e}\n"),
        )
        return "".join(lines)

    return run


def numbers(text: str) -> NDArray[np.float64]:
    return np.array([line.split() for line in text.splitlines()], dtype=np.float64)


@pytest.mark.parametrize("name", TRACES)
def test_the_trace_is_what_it_was(name: str, trace: Trace, golden: Callable[[str, str], str]) -> None:
    found = trace(name)
    pinned = numbers(golden(f"{name}.txt", found))
    assert pinned.shape == (STEPS, 3)
    np.testing.assert_allclose(
        numbers(found), pinned, rtol=TOLERANCE, err_msg="if it should be: pytest --regenerate-golden"
    )


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("sms", {"identity_weight": 5.1e-4}),
        ("sms", {"fake": {"learning_rate": 1.2e-3}}),
        ("sms-paper", {"fake": {"trains_on": "result"}}),
        ("sds", {"guidance": 101.0}),
        ("dds", {"learning_rate": 0.05}),
        ("pds", {"t_max": 978}),
        ("cds", {"contrastive_weight": 3.1}),
    ],
)
def test_a_trace_tells_when_a_constant_changes(name: str, changed: dict[str, Any], trace: Trace) -> None:
    pinned = numbers((FOLDER / f"{name}.txt").read_text())
    assert not np.allclose(numbers(trace(name, changed)), pinned, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("name", ["sds", "dds", "pds"])
def test_a_run_is_the_oracles_step_by_step(name: str, prior: Prior, style: Prior) -> None:
    """The oracle repeats the run in float64 with the same draws; the two share only the model's predictions."""
    config = Objective.model_validate({"name": name, "steps": STEPS, "guidance": 7.5})
    prompts = config.prompts(WORDS, "a red fox")
    ours = optimize(prior, style, source(), [prompts], [5], config).z[0].double().numpy()
    texts = {"target": prompts.target, "source": prompts.source, "null": ""}

    def score(z_t: NDArray[np.float64], t: int, words: str) -> NDArray[np.float64]:
        with torch.no_grad():
            row = torch.tensor(z_t[None], dtype=torch.float32)
            return style.noise(row, torch.tensor([t]), style.embed([texts[words]]))[0].double().numpy()

    generator, z_src = torch.Generator().manual_seed(5), source()[0].double().numpy()
    z, state = z_src, oracles.adam_start(z_src)
    choices = allowed(0, 1, t_min=config.t_min, t_max=config.t_max, grid=config.grid)
    for step in range(STEPS):
        t, eps = draw(choices, generator), torch.randn(z.shape, generator=generator).double().numpy()
        if name == "dds":
            z = oracles.sgd_step(z, oracles.dds_direction(z, z_src, t, eps, score, 7.5, "one"), 200 / 64**2)
            continue
        if name == "sds":
            direction = oracles.sds_direction(z, t, eps, score, 7.5, "one_minus_abar")
        else:
            direction = oracles.pds_direction(z, z_src, t, eps, score, 7.5)
        lr = oracles.learning_rate(step, STEPS)
        z, state = oracles.adamw_step(z, direction / z.size, state, lr, weight_decay=0.0)
    assert np.abs(z - z_src).max() > 0.05
    np.testing.assert_allclose(ours, z, atol=1e-3 * np.abs(z - z_src).max())
