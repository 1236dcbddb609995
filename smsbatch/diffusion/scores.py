"""The three score models, evaluated together.

An objective lists the predictions it needs: by which model, at which z_t and with which prompt. Each UNet is called
once, and once more for a prediction that keeps its graph: fake and real rows share the prior's and differ in whether a
LoRA is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from smsbatch.diffusion.fake import FakeScore
from smsbatch.diffusion.priors.stable_diffusion import Prior
from smsbatch.manifest import Prompts

ScoreName = Literal["style", "fake", "real"]
Words = Literal["target", "source", "edit", "null"]


class Ask(NamedTuple):
    """A noise prediction e^g(z_t; y) = e(z_t; null) + g (e(z_t; y) - e(z_t; null)); g = 1 computes e(z_t; y) alone."""

    model: ScoreName
    z_t: Tensor
    words: Words
    guidance: float = 1.0


class Scores(Protocol):
    """The score models as an objective calls them."""

    def __call__(self, t: Tensor, *asked: Ask) -> list[Tensor]:
        """The predictions [B, C, h, w] at `t` [B], one for each `asked`, without gradients."""

    def features(self, model: ScoreName, z_t: Tensor, t: Tensor, words: Words) -> list[Tensor]:
        """Outputs of the self-attentions in the UNet's upper half, [B, tokens, channels], with gradients to `z_t`."""


class ScoreModels:
    """The scores of B samples: `prior` bare (real) and with the LoRAs of `fake`, and `style`, each with its own text
    encoder.

    Args:
        fake: None for an objective that does not use it.
        prompts: of each sample.
        graph: keep the graph of the fake's prediction of the target, for `fake.learn`, as `fake_prediction`.
    """

    def __init__(
        self, prior: Prior, style: Prior, fake: FakeScore | None, prompts: Sequence[Prompts], *, graph: bool = False
    ) -> None:
        self._prior, self._style, self._fake, self._graph = prior, style, fake, graph
        self._words: dict[Words, list[str]] = {
            "target": [p.target for p in prompts],
            "source": [p.source for p in prompts],
            "edit": [p.edit for p in prompts],
            "null": [""] * len(prompts),
        }
        self._texts: dict[tuple[int, Words], Tensor] = {}
        self.fake_prediction: Tensor | None = None

    def text(self, model: ScoreName, words: Words) -> Tensor:
        """Embeddings [B, L, D] of the samples' prompts by the model's own text encoder."""
        prior = self._style if model == "style" else self._prior
        known = (id(prior), words)
        if known not in self._texts:
            different = list(dict.fromkeys(self._words[words]))
            rows = [different.index(prompt) for prompt in self._words[words]]
            self._texts[known] = prior.embed(different)[rows]
        return self._texts[known]

    def __call__(self, t: Tensor, *asked: Ask) -> list[Tensor]:
        """See `Scores`."""
        rows = [
            (number, words)
            for number, ask in enumerate(asked)
            for words in (("null", ask.words) if ask.guidance != 1 else (ask.words,))
        ]
        styled = [row for row in rows if asked[row[0]].model == "style"]
        faked = [row for row in rows if asked[row[0]].model == "fake"]
        real = [row for row in rows if asked[row[0]].model == "real"]
        found: dict[tuple[int, str], Tensor] = {}
        if self._graph and faked:
            trained = faked.pop()  # the target row, which follows its null row
            with torch.enable_grad():
                found |= self._ask(self._prior, t, asked, [trained], faked=1)
            self.fake_prediction = found[trained]
        with torch.no_grad():
            if self._style is self._prior:
                styled, real = [], styled + real
            found |= self._ask(self._style, t, asked, styled)
            found |= self._ask(self._prior, t, asked, faked + real, faked=len(faked))
        answers = []
        for number, ask in enumerate(asked):
            e = found[number, ask.words].detach()
            if ask.guidance != 1:
                e_null = found[number, "null"]
                e = e_null + ask.guidance * (e - e_null)
            answers.append(e)
        return answers

    def features(self, model: ScoreName, z_t: Tensor, t: Tensor, words: Words) -> list[Tensor]:
        """See `Scores`."""
        prior = self._style if model == "style" else self._prior
        return prior.features(z_t, t, self.text(model, words))

    def _ask(
        self, prior: Prior, t: Tensor, asked: Sequence[Ask], rows: Sequence[tuple[int, Words]], faked: int = 0
    ) -> dict[tuple[int, str], Tensor]:
        """One call of a UNet; the first `faked` rows are the fake score's."""
        if not rows:
            return {}
        z_t = torch.cat([asked[number].z_t for number, _ in rows])
        text = torch.cat([self.text(asked[number].model, words) for number, words in rows])
        adapter = self._fake.adapter(faked * len(t)) if self._fake is not None and faked else None
        e = prior.noise(z_t, t.repeat(len(rows)), text, adapter).chunk(len(rows))
        return dict(zip(rows, e, strict=True))
